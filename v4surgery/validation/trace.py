"""Trace files: activations of a run, as safetensors with a header that says what they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4surgery.checkpoint.appended import AppendedFile
from v4surgery.errors import OutputError

METADATA_KEY = "v4surgery.trace"
_NAME = re.compile(r"\d{1,9}/(?:embed|logits|(?:layers|mtp)\.\d{1,9}\.[a-z_.]+)")
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
}


class TraceWriter:
    """Writes one trace file; nothing is there under its name until it is whole.

    Args:
        path: The file; it must not exist.
        dtype: Floating activations are stored so; None keeps theirs.
    """

    def __init__(self, path: Path, dtype: torch.dtype | None = None) -> None:
        if path.exists():
            raise OutputError("the trace exists already", where=path, hint="choose another --out")
        self.path, self.dtype = path, dtype
        self._file = AppendedFile(path)

    def __len__(self) -> int:
        return len(self._file)

    def record(self, name: str, value: Tensor) -> None:
        """Append one activation."""
        if self.dtype is not None and value.is_floating_point():
            value = value.to(self.dtype)
        value = value.contiguous().cpu()
        data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        self._file.append(name, DTYPE_NAMES[value.dtype], tuple(value.shape), data)

    def close(self, about: dict[str, Any] | None = None) -> None:
        """Finish the file with ``about`` in its header; None drops it."""
        if about is None:
            self._file.drop()
        else:
            self._file.finish({METADATA_KEY: json.dumps(about)})


def read_about(path: Path) -> dict[str, Any]:
    """What a trace says of itself.

    Raises:
        OutputError: The file is no trace.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})[METADATA_KEY])
            names = list(file.keys())
        _check_about(about, names)
        return about
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise OutputError("not a trace file", where=path, value=str(error)[:300]) from None


def _check_about(about: Any, names: list[str]) -> None:
    """Raise ValueError unless the header and the names are of the form that traces have."""
    if not isinstance(about, dict) or not isinstance(about.get("model"), dict):
        raise ValueError("the header does not say of which model it is")
    prompts = about.get("prompts")
    if not isinstance(prompts, list) or not all(map(_is_ids, prompts)):
        raise ValueError("prompts are lists of token ids")
    odd = next((name for name in names if not _NAME.fullmatch(name)), None)
    if odd is not None:
        raise ValueError(f"{odd[:80]!r} is not <prompt>/<block><tap>")


def _is_ids(ids: Any) -> bool:
    return isinstance(ids, list) and all(type(i) is int for i in ids)
