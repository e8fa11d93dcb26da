"""The bases themselves: principal components, and the best factors of a product. Numpy, float64.

*Principal components.* Of all projections on k directions P = R R^T, the one on the k leading
eigenvectors of C = E[y y^T] loses the least energy, E|y - P y|^2 = the sum of the other
eigenvalues.

*Factors.* Of a product B A (D, L)(L, w) with inputs x of second moment 1, the k-term SVD
U S V^T loses the least, sqrt(sum of the other S^2) in the Frobenius norm. The product is never
made: with B = Q R_B and A = L_A Q' (as QR has them), R_B L_A = U' S V'^T is small (L, L), has the
same S, and

    into = S^-1/2 U'^T R_B  (k, L)      out = L_A V' S^-1/2  (L, k)

give A' = into A = S^1/2 V^T and B' = B out = U S^1/2, as a look at each product shows. Where the
second moment C (L, L) of A's output y is known, the loss that counts is E|B y - B' A' x|^2 =
|(B - B out into) F|^2 with F F^T = C: the same with F for L_A. As without, ``into out = 1``, so
with k = L the product is unchanged on every input, whatever C is.

Directions whose S is rounding (below 1e-14 of the largest) become zeros: the product has no more.
"""

from __future__ import annotations

import contextlib

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

# float64 sums of L = 1024 terms are off by about L^1/2 * 2^-53 = 4e-15 of the largest.
NO_RANK = 1e-14
# Pivots of a Cholesky decomposition below this share of the largest may be rounding.
REGULAR = 1e-5
# A second moment of few tokens has no rank for all directions; so much of its mean is added to
# each, which keeps ``out`` and ``into`` within 1e2 of each other's inverses in any direction.
SHRINKAGE = 1e-4


def principal_components(moment: Float, keep: int) -> tuple[Float, float]:
    """Leading eigenvectors ``(size, keep)``, and the share of energy that they keep.

    Args:
        moment: Symmetric, ``(size, size)``, eigenvalues 0 or more up to rounding.
        keep: How many.
    """
    values, vectors = np.linalg.eigh(moment)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(len(values))])
    total = values.sum()
    share = 1.0 if keep == len(values) or not total else float(values[:keep].sum() / total)
    return np.ascontiguousarray(vectors[:, :keep] * signs[:keep]), share


def factor_pair(
    b: Float, a: Float, keep: int, moment: Float | None = None
) -> tuple[Float, Float, float]:
    """``into`` (keep, L), ``out`` (L, keep) of the best ``b out into a``, and the energy kept.

    Args:
        b: ``(D, L)``.
        a: ``(L, w)``.
        keep: Rank of the new pair.
        moment: Second moment of what ``a`` gives, ``(L, L)``; None counts every input alike.
    """
    rank = b.shape[1]
    root_b = _triangle(b)
    root_a: Float = _root(moment) if moment is not None else _triangle(a.T).T
    left, values, right = np.linalg.svd(root_b @ root_a, full_matrices=False)
    usable = int((values > NO_RANK * values.max(initial=0)).sum())
    kept = min(keep, usable)
    scale = values[:kept] ** -0.5
    into, out = np.zeros((keep, rank)), np.zeros((rank, keep))
    into[:kept] = scale[:, None] * (left[:, :kept].T @ root_b)
    out[:, :kept] = (root_a @ right[:kept].T) * scale
    energy = values**2
    total = energy.sum()
    share = 1.0 if kept == usable or not total else float(energy[:kept].sum() / total)
    return into, out, share


def _triangle(matrix: Float) -> Float:
    """R of a QR decomposition: of the Gram matrix, ten times as fast, where that has full rank.

    ``out into`` is 1 for any R that is regular, so a R that is a little off only moves the optimum,
    by 2^-53 times the square of the condition number.
    """
    if len(matrix) >= matrix.shape[1]:
        with contextlib.suppress(np.linalg.LinAlgError):
            root: Float = np.linalg.cholesky(matrix.T @ matrix).T.astype(np.float64, copy=False)
            if root.diagonal().min(initial=np.inf) > REGULAR * root.diagonal().max(initial=0):
                return root
    triangle: Float = np.linalg.qr(matrix, mode="r")  # type: ignore[assignment]
    return triangle


def _root(moment: Float) -> Float:
    """F with F F^T = the moment, shrunk a little towards its mean."""
    values, vectors = np.linalg.eigh(moment)
    floor = SHRINKAGE * max(values.mean(), 0.0)
    root: Float = vectors * np.sqrt(np.maximum(values, 0) + floor)
    return root
