"""The bases that a replica was made with, recorded beside it and read back, array by array.

LAPACK gives other eigenvectors on other machines (and any, where eigenvalues are equal), so bases
are computed once, when a replica is begun. Whatever comes later, resuming and verifying too, takes
the recorded ones. The file is a safetensors file in all but its name: loaders that take every
``*.safetensors`` of a folder must not take it for weights. Matrices are float32, so that a recorded
rotation is orthogonal up to the rounding of its entries, and are read as float64.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from v4surgery.checkpoint.header import TensorInfo, header_length, parse_header
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.checkpoint.source import Source
from v4surgery.errors import CheckpointError
from v4surgery.slicers.bases import Bases, Basis

Float = NDArray[np.float64]

BASES_FILE = "v4surgery.bases"
ROTATION = "hidden_size/model/out"
_DTYPES = {"F32": np.float32, "F64": np.float64}
_READ_BYTES = 4 << 20
_WAITING_ARRAYS = 2
# Entries of both matrices are off by half a unit of float32, 2^-24 relative, so a sum of products
# is off by at most 2 * 2^-24 times the sum of their sizes; the float64 arithmetic is far below.
ENTRY_ROUNDING = 2.0**-22


class BasisFile:
    """Recorded bases of a replica.

    Args:
        source: The replica's folder.
        bases: What the plan asks for.

    Raises:
        CheckpointError: The file is not there, or holds other bases than the plan's.
    """

    def __init__(self, source: Source, bases: Bases) -> None:
        self.bases, self._source = bases, source
        self._tensors, self.metadata = _read_header(source)
        wanted = {name: value for basis in bases.items for name, value in basis.arrays.items()}
        found = {name: (info.dtype, info.shape) for name, info in self._tensors.items()}
        if found != wanted:
            odd = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
            raise CheckpointError(
                "the recorded bases are not those of the plan",
                where=f"{source.name}/{BASES_FILE}",
                value=f"{odd[0]} is {found.get(odd[0])}",
                rule=f"{wanted.get(odd[0])}",
                hint="slice again into another folder",
            )
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, Float] = OrderedDict()
        self._norms: dict[str, Float] = {}

    def close(self) -> None:
        """Closes the folder, once no job computes any more."""
        self._source.close()

    @cached_property
    def digest(self) -> str:
        """BLAKE3 of the whole file."""
        hasher, size = blake3(), self._source.size(BASES_FILE)
        for begin in range(0, size, _READ_BYTES):
            hasher.update(self._source.read(BASES_FILE, begin, min(begin + _READ_BYTES, size)))
        return hasher.hexdigest()

    def out(self, basis: Basis) -> Float:
        """``(groups, size, keep)``: what reads an axis is multiplied by it on the right."""
        return self._array(basis.out)

    def into(self, basis: Basis) -> Float:
        """``(groups, keep, size)``: what writes into an axis is multiplied by it on the left."""
        array = self._array(basis.into)
        return array.swapaxes(1, 2) if basis.into == basis.out else array

    def kept(self, basis: Basis) -> Float:
        """Share of the energy that a basis keeps, ``(groups,)``."""
        return self._array(f"{basis.key}/kept")

    def norm(self, parent: Checkpoint, stem: str) -> Float:
        """Weight of a norm of the parent, each read once."""
        with self._lock:
            if stem not in self._norms:
                stored = parent.tensors[stem]
                values = parent.read_float(stored, slice(0, stored.weight.shape[0]))
                self._norms[stem] = values.reshape(-1).astype(np.float64)
            return self._norms[stem]

    def to_json(self) -> dict[str, object]:
        """Plain data for the replica's record."""
        of = {
            basis.key: {**basis.to_json(), "kept": [float(f"{k:.9g}") for k in self.kept(basis)]}
            for basis in self.bases.items
        }
        return {"file": BASES_FILE, "blake3": self.digest, "of": of}

    def problems(self) -> Iterator[str]:
        """Bases that are none: ``into out`` is not 1 (or, past the rank of a product, 0)."""
        for basis in self.bases.items:
            for group, (into, out) in enumerate(
                zip(self.into(basis), self.out(basis), strict=True)
            ):
                error = np.abs(into @ out - np.diag((np.abs(into).sum(1) > 0).astype(np.float64)))
                bound = ENTRY_ROUNDING * (np.abs(into) @ np.abs(out))
                if not (error <= bound).all():  # NaN compares false
                    what = "rotation" if basis.into == basis.out else "pair of factors"
                    yield (
                        f"{BASES_FILE}: {basis.key}, group {group}, is no {what}: off by "
                        f"{error.max():.3g}"
                    )

    def _array(self, name: str) -> Float:
        """Model-wide arrays stay, and the last few of blocks."""
        with self._lock:
            if name in self._waiting:
                self._waiting.move_to_end(name)
                return self._waiting[name]
        array = _read(self._source, self._tensors[name])
        with self._lock:
            self._waiting[name] = array
            of_blocks = [key for key in self._waiting if "/model/" not in key]
            for old in of_blocks[:-_WAITING_ARRAYS]:
                del self._waiting[old]
        return array


def read_rotation(source: Source, record: Mapping[str, Any]) -> Float | None:
    """How a replica's channels lie in its parent's, ``(D, D')``; None where channels were picked.

    Args:
        source: The replica's folder.
        record: Its v4surgery.json.
    """
    if ROTATION.removesuffix("/out") not in record.get("bases", {}).get("of", {}):
        return None
    tensors, _ = _read_header(source)
    rotation: Float = _read(source, tensors[ROTATION])[0]
    return rotation


def _read_header(source: Source) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    where = f"{source.name}/{BASES_FILE}"
    if BASES_FILE not in source.list_files():
        raise CheckpointError(
            "the bases of the replica are not beside it",
            where=where,
            rule="the file that slice wrote",
            hint="get it from where the replica came from, or slice again into another folder",
        )
    size = source.size(BASES_FILE)
    length = header_length(source.read(BASES_FILE, 0, min(8, size)), size, where)
    return parse_header(source.read(BASES_FILE, 8, 8 + length), size, where)


def _read(source: Source, info: TensorInfo) -> Float:
    data = bytearray(info.end - info.begin)
    source.read_into(BASES_FILE, info.begin, memoryview(data))
    with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN, which no basis has
        return np.frombuffer(data, _DTYPES[info.dtype]).reshape(info.shape).astype(np.float64)
