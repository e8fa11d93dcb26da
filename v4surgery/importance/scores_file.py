"""Scores files: safetensors with a vector for each score, dim and place, and what they are of.

::

    reap/n_routed_experts/layers.3.            F32 (E,)
    energy/hidden_size/model                   F32 (D,)
    second_moment/q_lora_rank/layers.3.        F32 (Q, Q)

The metadata ``v4surgery.scores`` is JSON: the parent that they were measured on (with its
fingerprint), tokens and prompts, mode, dtype, implementation, tool version.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from v4surgery.checkpoint.appended import AppendedFile
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.errors import OutputError, PlanError
from v4surgery.parents import SCORES_FILE, boxed_file

METADATA_KEY = "v4surgery.scores"
FORMAT = 1
_HASH_BYTES = 4 << 20


class ScoresFile:
    """A scores file opened for reading.

    Attributes:
        path: The file; given as the name of a parent in the box, that parent's.
        about: What its metadata says.

    Raises:
        PlanError: It cannot be read, or is no scores file.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path = boxed_file(path, SCORES_FILE)
        try:
            opened: Any = safe_open
            self._file = opened(path, framework="numpy")
            self.about: dict[str, Any] = json.loads((self._file.metadata() or {})[METADATA_KEY])
            self.fingerprint = str(self.about["parent"]["fingerprint"])
            if self.about["format"] != FORMAT:
                raise ValueError(f"format {self.about['format']!r}")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise PlanError(
                "not a scores file",
                where=path,
                value=f"{type(error).__name__}: {error}",
                rule=f"safetensors with `{METADATA_KEY}` in its metadata",
                hint="make one: v4surgery score PARENT --prompts FILE --out SCORES",
            ) from None

    @cached_property
    def keys(self) -> frozenset[str]:
        """``<score>/<dim>/<place>`` of everything that is there."""
        return frozenset(self._file.keys())

    @cached_property
    def axes(self) -> frozenset[tuple[str, str]]:
        """Score and dim of everything that is there; neurons as one dim."""
        pairs = (key.split("/")[:2] for key in self.keys if key.count("/") == 2)
        return frozenset((score, dim.partition(".")[0]) for score, dim in pairs)

    @cached_property
    def blake3(self) -> str:
        """Digest of the whole file, in hex."""
        digest = blake3()
        with self.path.open("rb") as file:
            while block := file.read(_HASH_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def require_parent(self, parent: Checkpoint) -> None:
        """Raise PlanError unless the scores are of this parent."""
        if self.fingerprint != parent.fingerprint:
            raise PlanError(
                "the scores are of another parent",
                where=self.path,
                value=f"{self.about['parent'].get('name')}, fingerprint {self.fingerprint[:16]}",
                rule=f"{parent.name}, fingerprint {parent.fingerprint[:16]}",
                hint=f"v4surgery score {parent.name} --prompts FILE --out SCORES",
            )

    def require_shape(self, key: str, shape: tuple[int, ...]) -> None:
        """Raise PlanError if a tensor that is there has another shape; reads no values."""
        if key in self.keys:
            given = self._file.get_slice(key).get_shape()
            if tuple(given) != shape:
                raise self._unfit(key, f"shape {list(given)}", shape)

    def _unfit(self, key: str, value: str, shape: tuple[int, ...]) -> PlanError:
        size = " x ".join(map(str, shape))
        return PlanError(
            "the scores do not fit the parent",
            where=f"{self.path}: {key}",
            value=value,
            rule=f"{size} finite numbers",
        )

    def array(self, key: str, shape: tuple[int, ...]) -> NDArray[np.floating[Any]]:
        """One vector or matrix, in its own dtype.

        Raises:
            PlanError: It is not there, of another shape, or not finite.
        """
        from safetensors import SafetensorError

        self.require_shape(key, shape)
        try:
            values = self._file.get_tensor(key)
        except (SafetensorError, OSError, TypeError) as error:  # TypeError: no dtype of numpy's
            raise PlanError(
                "the scores cannot be read",
                where=f"{self.path}: {key}",
                value=str(error),
                rule="a float32 or float64 vector for each score, axis and place",
            ) from None
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            raise self._unfit(key, f"{values.dtype}, shape {list(values.shape)}", shape)
        result: NDArray[np.floating[Any]] = values
        return result


class ScoresWriter:
    """Writes one scores file, block by block; nothing is there under its name until it is whole.

    Raises:
        OutputError: Something else than a scores file stands there.
    """

    def __init__(self, path: Path) -> None:
        if path.exists():
            try:
                ScoresFile(path)
            except PlanError:
                raise OutputError(
                    "the output exists, and is no scores file",
                    where=path,
                    rule="a new file, or scores to replace",
                    hint="choose another --out",
                ) from None
        self.path = path
        self._file = AppendedFile(path)

    def __len__(self) -> int:
        return len(self._file)

    def write(self, scores: Iterator[tuple[str, NDArray[np.float32]]]) -> None:
        """Add vectors and matrices.

        Raises:
            OutputError: One of them has NaN or infinite values.
        """
        for key, values in scores:
            if not np.isfinite(values).all():
                raise OutputError(
                    "a score is not a finite number",
                    where=key,
                    value=f"{int((~np.isfinite(values)).sum())} of {values.size} values",
                    rule="the forward must not overflow",
                    hint="look for NaN or infinite weights: v4surgery trace PARENT --taps all; or "
                    "score with --dtype float32",
                )
            self._file.append(key, "F32", values.shape, values.astype("<f4").tobytes())

    def finish(self, about: dict[str, Any]) -> None:
        """Write the file, with ``about`` in its header."""
        self._file.finish({METADATA_KEY: json.dumps({"format": FORMAT, **about})})

    def drop(self) -> None:
        """Write nothing."""
        self._file.drop()
