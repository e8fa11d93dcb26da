"""Headers of a checkpoint against the catalogue: each logical tensor once, none over."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import NamedTuple

from v4surgery.catalogue import (
    BF16,
    EXPERT,
    F16,
    F32,
    FP4,
    FP8,
    FP8_F32,
    LINEAR,
    QUANTIZED,
    Catalogue,
    Entry,
    canonical_name,
    foreign_family,
    stored_tensors,
)
from v4surgery.checkpoint.refs import StoredTensorRef, TensorRef
from v4surgery.checkpoint.saved_names import published_refs
from v4surgery.config import V4Config
from v4surgery.errors import CatalogueError
from v4surgery.formats import FP4_GROUP

_shown = reprlib.Repr()
_shown.maxstring = 160

QUANTIZABLE = frozenset({LINEAR, EXPERT, BF16})


def match_tensors(
    config: V4Config, found: Mapping[str, TensorRef], where: str
) -> tuple[Catalogue, dict[str, StoredTensorRef]]:
    """Hold the headers against the catalogue: each logical tensor once, none over."""
    catalogue = Catalogue(config, optional=True)
    by_name = published_refs(catalogue, found)
    twice: list[str] = []
    expected = {
        name
        for e in catalogue.entries()
        for name in (e.stem + e.template.suffix, e.stem + ".scale")
    }
    for name in [name for name in by_name if name not in expected]:
        published = canonical_name(name)
        if published not in expected:
            continue
        ref = by_name.pop(name)
        if published in by_name:
            twice.append(f"{name} and another name both mean {published}")
        by_name.setdefault(published, ref)
    tensors: dict[str, StoredTensorRef] = {}
    missing: list[str] = []
    problems: list[str] = []
    absent_optional = False
    for entry in catalogue.entries():
        stem = entry.stem
        weight = by_name.pop(stem + entry.template.suffix, None)
        if weight is None:
            if entry.template.optional:
                absent_optional = True
            else:
                missing.append(stem + entry.template.suffix)
            continue
        scale = by_name.pop(stem + ".scale", None) if entry.template.suffix else None
        fmt = _stored_format(entry, weight, scale)
        shape = catalogue.shape(entry)
        if _expected(entry, shape, fmt) != _headers(weight, scale):
            problems.append(_mismatch(entry, shape, fmt, weight, scale))
        tensors[stem] = StoredTensorRef(entry, fmt, weight, scale)
    _report(where, missing, [_shown_name(name) for name in sorted(by_name)], problems, twice)
    present = [stem for stem, stored in tensors.items() if stored.entry.template.optional]
    if not present:
        catalogue = Catalogue(config)
    elif absent_optional:
        _report(where, ["the other half of " + ", ".join(present)], [], [], [])
    return catalogue, tensors


def _stored_format(entry: Entry, weight: TensorRef, scale: TensorRef | None) -> str:
    """The format that the stored dtypes mean, decided tensor by tensor."""
    if weight.dtype == "I8" and len(weight.shape) == 2:
        return FP4
    if weight.dtype == "F8_E4M3" and len(weight.shape) == 2:
        return FP8_F32 if scale is not None and scale.dtype == "F32" else FP8
    allowed = {BF16, F32, F16} if entry.template.storage in (LINEAR, EXPERT, BF16) else set()
    return weight.dtype if weight.dtype in allowed else entry.template.storage


class _Header(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


def _headers(weight: TensorRef, scale: TensorRef | None) -> tuple[_Header, ...]:
    return tuple(_Header(ref.dtype, ref.shape) for ref in (weight, scale) if ref is not None)


def _expected(entry: Entry, shape: tuple[int, ...], fmt: str) -> tuple[_Header, ...]:
    """What headers store a tensor in this format; nothing if it cannot have the format."""
    if fmt in QUANTIZED and (len(shape) != 2 or entry.template.storage not in QUANTIZABLE):
        return ()
    if fmt in (LINEAR, EXPERT) or (fmt == FP4 and shape[1] % FP4_GROUP):
        return ()
    return tuple(_Header(t.dtype, t.shape) for t in stored_tensors(entry, shape, fmt))


def _mismatch(
    entry: Entry, shape: tuple[int, ...], fmt: str, weight: TensorRef, scale: TensorRef | None
) -> str:
    expected = _expected(entry, shape, fmt)
    storage = entry.template.storage
    plain = "BF16, FP8 or FP4" if storage in (LINEAR, EXPERT) else storage
    right = _in_words(expected) if expected else f"{plain} {list(shape)}"
    return (
        f"{entry.stem}{entry.template.suffix} is {_in_words(_headers(weight, scale))}; "
        f"the config makes it {right} ({', '.join(entry.template.axes)})"
    )


def _in_words(headers: tuple[_Header, ...]) -> str:
    """``F8_E4M3 [256, 128] with scale F8_E8M0 [2, 1]``."""
    words = " with scale ".join(f"{item.dtype} {list(item.shape)}" for item in headers)
    needs_scale = headers[0].dtype in ("I8", "F8_E4M3") and len(headers) == 1
    return words + " without a scale" * needs_scale


def _shown_name(name: str) -> str:
    """A stranger's tensor name for a message: escaped where it could move the cursor, and cut."""
    return name if name.isprintable() and 0 < len(name) <= 160 else _shown.repr(name)


def _report(
    where: str, missing: list[str], unknown: list[str], problems: list[str], twice: list[str]
) -> None:
    family = next((f for name in unknown if (f := foreign_family(name))), None)
    if family:
        raise CatalogueError(f"this is {family}; v4surgery cuts DeepSeek-V4 only", where=where)
    lines = []
    for label, names in (
        ("missing", missing),
        ("unknown", unknown),
        ("wrong shape or storage", problems),
        ("under two names", twice),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            lines.append(f"{label}: " + "; ".join(names[:5]) + more)
    if lines:
        raise CatalogueError(
            "the tensors are not those of the config",
            where=where,
            value="\n         ".join(lines),
            rule="exactly the tensors of docs/tensors.md, each in a known format",
            hint="check that config.json belongs to these shards and that no shard is missing",
        )
