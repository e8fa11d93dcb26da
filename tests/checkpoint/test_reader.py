"""Opening a checkpoint: every tensor known, none missing, nothing outside the folder; then bytes.

The decoders here are written from spec/checkpoint.md, "Number formats", as tables; they share no
code with the package.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import v4surgery
from tests.support import parents
from tests.support.parents import RawTensor, Shards
from v4surgery.checkpoint import reader
from v4surgery.checkpoint.reader import Checkpoint, decode, row_segments
from v4surgery.checkpoint.refs import StoredTensorRef
from v4surgery.errors import (
    CatalogueError,
    CheckpointError,
    ConfigError,
    HeaderError,
    ReadError,
)

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
E8M0 = [2.0 ** (byte - 127) for byte in range(255)] + [float("nan")]


def e4m3(byte: int) -> float:
    """1 sign, 4 exponent (bias 7), 3 mantissa bits; all ones is NaN, there is no infinity."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = [e4m3(byte) for byte in range(256)]


def expected_values(tensors: dict[str, RawTensor], stem: str, suffix: str) -> NDArray[np.float32]:
    """A tensor decoded element by element, ``(rows, columns)`` as the reader gives vectors."""
    weight = tensors[stem + suffix]
    scale = tensors.get(stem + ".scale") if suffix else None
    raw = np.frombuffer(weight.data, np.uint8)
    if weight.dtype == "BF16":
        bits = raw.view("<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(weight.shape[0], -1)
    if weight.dtype in ("F32", "F16", "I64"):
        values = raw.view({"F32": "<f4", "F16": "<f2", "I64": "<i8"}[weight.dtype])
        return values.astype(np.float32).reshape(weight.shape[0], -1)
    assert scale is not None
    rows, cols = weight.shape
    if scale.dtype == "F32":
        factors = np.frombuffer(scale.data, "<f4").reshape(scale.shape).astype(np.float64)
    else:
        factors = np.array(E8M0)[np.frombuffer(scale.data, np.uint8)].reshape(scale.shape)
    if weight.dtype == "I8":
        nibbles = np.stack([raw & 15, raw >> 4], axis=1)  # the low nibble is the even column
        codes = np.array(E2M1)[nibbles].reshape(rows, 2 * cols)
        return as_float32(codes * factors.repeat(32, axis=1))
    codes = np.array(E4M3)[raw].reshape(rows, cols)
    blocks = factors.repeat(128, axis=0)[:rows].repeat(128, axis=1)[:, :cols]
    return as_float32(codes * blocks)


def as_float32(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rounded once; what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


@pytest.fixture(scope="module")
def odd_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP4 and FP8 of dims that are no multiples of 128: blocks at the edges are not whole."""
    changes = {**parents.SMALL, "hidden_size": 288, "moe_intermediate_size": 160}
    changes |= {"q_lora_rank": 144, "vocab_size": 77}
    return parents.write_parent(tmp_path_factory.mktemp("reader") / "odd", changes=changes)


@pytest.fixture(scope="module")
def base_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with F32 scales, FP8 experts and the drafter's own embedding and head."""
    changes = {**parents.SMALL, "hidden_size": 288, "moe_intermediate_size": 160}
    out = tmp_path_factory.mktemp("reader") / "base"
    return parents.write_parent(out, "flash-base", changes=changes)


@pytest.fixture(scope="module")
def plain_parent(odd_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some linears without quantization, as replicas have them."""

    def edit(shards: Shards) -> None:
        rng = np.random.default_rng(0)
        for name, dtype, numpy_dtype in (
            ("layers.0.attn.wq_a", "F32", np.float32),
            ("layers.1.attn.wq_a", "F16", np.float16),
            ("layers.1.ffn.experts.2.w2", "BF16", np.uint16),
        ):
            tensors = parents.shard_of(shards, f"{name}.weight")
            rows, cols = tensors[f"{name}.weight"].shape
            cols *= 2 if tensors[f"{name}.weight"].dtype == "I8" else 1
            values = rng.integers(0, 1000, (rows, cols)).astype(numpy_dtype)
            tensors[f"{name}.weight"] = RawTensor(dtype, (rows, cols), values.tobytes())
            del tensors[f"{name}.scale"]

    out = tmp_path_factory.mktemp("reader") / "plain"
    return parents.edit_checkpoint(odd_parent, out, edit)


@pytest.fixture(params=["odd", "base", "plain", "tiny_v4"])
def any_parent(request: pytest.FixtureRequest) -> Path:
    name = request.param if request.param == "tiny_v4" else f"{request.param}_parent"
    found: Path = request.getfixturevalue(name)
    return found


def sample_stems(parent: Checkpoint) -> list[str]:
    """One tensor of each kind and format."""
    seen: dict[tuple[str, str, int], str] = {}
    for stem, stored in parent.tensors.items():
        template = stored.entry.template
        ratio = stored.entry.block.ratio if stored.entry.block else -1
        seen.setdefault((template.stem, stored.fmt, ratio), stem)
    return list(seen.values())


def raw_tensors(folder: Path) -> dict[str, RawTensor]:
    single = folder / "model.safetensors"
    return parents.read_shard(single) if single.exists() else parents.read_tensors(folder)


def read_cols(
    parent: Checkpoint, stored: StoredTensorRef, rows: Any, cols: NDArray[np.int64] | None
) -> NDArray[np.float32]:
    codes, scales = parent.read_codes(stored, rows, cols)
    return decode(stored.fmt, codes, scales, "f32")


def opened_fds() -> set[str]:
    """What this process has open, shards only."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.endswith((".safetensors", ".json")):
            found.add(target)
    return found


def test_every_kind_of_tensor_reads_to_the_values_of_the_spec(any_parent: Path) -> None:
    tensors = raw_tensors(any_parent)
    formats = set()
    with v4surgery.open(any_parent) as parent:
        for stem in sample_stems(parent):
            stored = parent.tensors[stem]
            formats.add(stored.fmt)
            values = parent.read_float(stored, slice(0, stored.weight.shape[0]))
            expected = expected_values(tensors, stem, stored.entry.template.suffix)
            np.testing.assert_array_equal(values, expected, err_msg=stem, strict=True)
    assert {"BF16", "F32", "I64"} < formats


def test_rows_and_columns_read_to_the_values_of_the_spec(any_parent: Path) -> None:
    tensors = raw_tensors(any_parent)
    rng = np.random.default_rng(7)
    with v4surgery.open(any_parent) as parent:
        for stem in sample_stems(parent):
            stored = parent.tensors[stem]
            expected = expected_values(tensors, stem, stored.entry.template.suffix)
            num_rows, num_cols = expected.shape
            some = rng.integers(0, num_rows, 9)
            every = slice(0, num_rows)
            cols = [rng.permutation(num_cols)[:37], np.arange(num_cols)[1::3], None]
            for rows in (some, np.sort(some), slice(num_rows // 3, num_rows), every):
                for kept in cols:
                    chosen = expected[rows] if kept is None else expected[rows][:, kept]
                    found = read_cols(parent, stored, rows, kept)
                    np.testing.assert_array_equal(found, chosen, err_msg=stem, strict=True)


def test_every_code_and_scale_decodes_to_the_tables(small_parent: Path, tmp_path: Path) -> None:
    fp4, fp8 = "layers.0.ffn.experts.0.w1", "layers.1.attn.indexer.wq_b"

    def edit(shards: Shards) -> None:
        for stem in (fp4, fp8):
            tensors = parents.shard_of(shards, f"{stem}.weight")
            for name in (f"{stem}.weight", f"{stem}.scale"):
                dtype, shape, data = tensors[name]
                ramp = np.arange(len(data), dtype=np.uint32).astype(np.uint8)
                tensors[name] = RawTensor(dtype, shape, ramp.tobytes())

    folder = parents.edit_checkpoint(small_parent, tmp_path / "ramp", edit)
    tensors = parents.read_tensors(folder)
    with v4surgery.open(folder) as parent:
        for stem in (fp4, fp8):
            stored = parent.tensors[stem]
            values = parent.read_float(stored, slice(0, stored.weight.shape[0]))
            np.testing.assert_array_equal(values, expected_values(tensors, stem, ".weight"))
        assert set(np.frombuffer(tensors[f"{fp8}.weight"].data, np.uint8)) == set(range(256))


def test_native_bytes_of_a_tensor_are_those_of_the_file(any_parent: Path) -> None:
    tensors = raw_tensors(any_parent)
    with v4surgery.open(any_parent) as parent:
        assert parent.num_tensors == len(tensors)
        assert parent.payload_bytes == sum(len(tensor.data) for tensor in tensors.values())
        for stem, stored in parent.tensors.items():
            data = parent.read_rows(stored.weight, slice(0, stored.weight.shape[0])).tobytes()
            assert data == tensors[stem + stored.entry.template.suffix].data
            if stored.scale is not None:
                data = parent.read_rows(stored.scale, slice(0, stored.scale.shape[0])).tobytes()
                assert data == tensors[stem + ".scale"].data
        num_stored = sum(1 + (s.scale is not None) for s in parent.tensors.values())
        assert num_stored == len(tensors)


NUM_ROWS = 77


@pytest.fixture(scope="module")
def embedding(odd_parent: Path) -> Iterator[tuple[Checkpoint, NDArray[np.uint8]]]:
    data = parents.read_tensors(odd_parent)["embed.weight"].data
    with v4surgery.open(odd_parent) as parent:
        yield parent, np.frombuffer(data, np.uint8).reshape(NUM_ROWS, -1)


ROW_IDS = st.lists(st.integers(0, NUM_ROWS - 1), max_size=40).map(lambda ids: np.array(ids, "i8"))
BOUNDS = st.none() | st.integers(-NUM_ROWS - 2, NUM_ROWS + 2)


@given(
    rows=ROW_IDS | ROW_IDS.map(np.sort) | st.builds(slice, BOUNDS, BOUNDS),
    gap_bytes=st.sampled_from([0, 576, 3000, 1 << 20]),
    scratch_bytes=st.sampled_from([1, 576, 2000, 1 << 20]),
)
@settings(deadline=None)
def test_read_rows_is_numpy_indexing(
    embedding: tuple[Checkpoint, NDArray[np.uint8]],
    rows: Any,
    gap_bytes: int,
    scratch_bytes: int,
) -> None:
    parent, expected = embedding
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parent.source, "gap_bytes", gap_bytes, raising=False)
        patch.setattr(reader, "SCRATCH_BYTES", scratch_bytes)
        found = parent.read_rows(parent.tensors["embed"].weight, rows)
    np.testing.assert_array_equal(found, expected[rows], strict=True)
    assert found.flags.c_contiguous


@given(rows=ROW_IDS | st.builds(slice, BOUNDS, BOUNDS), gap_bytes=st.sampled_from([0, 576, 3000]))
@settings(deadline=None)
def test_planned_requests_and_bytes_are_those_of_the_read(
    embedding: tuple[Checkpoint, NDArray[np.uint8]], rows: Any, gap_bytes: int
) -> None:
    parent, _ = embedding
    ref = parent.tensors["embed"].weight
    sizes: list[int] = []
    read_into = parent.source.read_into

    def counted(file: str, begin: int, buffer: memoryview) -> None:
        assert ref.begin <= begin
        assert begin + buffer.nbytes <= ref.end
        sizes.append(buffer.nbytes)
        read_into(file, begin, buffer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parent.source, "gap_bytes", gap_bytes, raising=False)
        patch.setattr(parent.source, "read_into", counted)
        parent.read_rows(ref, rows)
    assert row_segments(rows, ref, gap_bytes) == (len(sizes), sum(sizes))


@pytest.mark.parametrize("rows", [[-1], [NUM_ROWS], [0, NUM_ROWS + 5]])
def test_rows_outside_a_tensor_are_never_another_tensors_bytes(
    embedding: tuple[Checkpoint, NDArray[np.uint8]], rows: list[int]
) -> None:
    parent, _ = embedding
    with pytest.raises(AssertionError):
        parent.read_rows(parent.tensors["embed"].weight, np.array(rows))


def zeros(dtype: str, *shape: int) -> RawTensor:
    size = {"I64": 8, "F32": 4, "BF16": 2, "F8_E8M0": 1, "F8_E4M3": 1, "I8": 1}[dtype]
    return RawTensor(dtype, shape, bytes(int(np.prod(shape)) * size))


# SMALL: D 128, F 64, E 4, K 2, N 4, H 64, Q 64, G 2, L 64, V 64, X 4, Y 64; ratios 0 4 128 4.
SPOILED: dict[str, tuple[str, RawTensor, list[str]]] = {
    "a transposed matrix": (
        "layers.1.ffn.gate.weight",
        zeros("BF16", 128, 4),
        ["layers.1.ffn.gate.weight is BF16 [128, 4]", "BF16 [4, 128] (n_routed_experts, hidden"],
    ),
    "a vector of the wrong length": (
        "layers.3.attn.attn_sink",
        zeros("F32", 5),
        ["layers.3.attn.attn_sink is F32 [5]", "F32 [4] (num_attention_heads)"],
    ),
    "a matrix for a vector": (
        "norm.weight",
        zeros("BF16", 1, 128),
        ["norm.weight is BF16 [1, 128]", "makes it BF16 [128]"],
    ),
    "a scalar for one number": (
        "hc_head_scale",
        RawTensor("F32", (), bytes(4)),
        ["hc_head_scale is F32 []", "makes it F32 [1]"],
    ),
    "unpacked FP4": (
        "layers.0.ffn.experts.1.w2.weight",
        zeros("I8", 128, 64),
        ["layers.0.ffn.experts.1.w2.weight is I8 [128, 64]", "I8 [128, 32] with scale F8_E8M0"],
    ),
    "BF16 for an mHC projection": (
        "layers.0.hc_attn_fn",
        zeros("BF16", 24, 512),
        ["layers.0.hc_attn_fn is BF16 [24, 512]", "makes it F32 [24, 512]"],
    ),
    "BF16 for attention sinks": (
        "layers.0.attn.attn_sink",
        zeros("BF16", 4),
        ["layers.0.attn.attn_sink is BF16 [4]", "makes it F32 [4]"],
    ),
    "BF16 for positions": (
        "layers.1.attn.compressor.ape",
        zeros("BF16", 4, 128),
        ["layers.1.attn.compressor.ape is BF16", "makes it F32 [4, 128]"],
    ),
    "BF16 for a routing bias": (
        "layers.1.ffn.gate.bias",
        zeros("BF16", 4),
        ["layers.1.ffn.gate.bias is BF16", "makes it F32 [4]"],
    ),
    "F32 for a hash table": (
        "layers.0.ffn.gate.tid2eid",
        zeros("F32", 64, 2),
        ["layers.0.ffn.gate.tid2eid is F32", "makes it I64 [64, 2]"],
    ),
    "integers for a linear": (
        "layers.0.attn.wq_a.weight",
        zeros("I64", 64, 128),
        ["layers.0.attn.wq_a.weight is I64 [64, 128] with scale", "BF16, FP8 or FP4 [64, 128]"],
    ),
    "FP8 for a norm": (
        "layers.0.attn_norm.weight",
        zeros("F8_E4M3", 128),
        ["layers.0.attn_norm.weight is F8_E4M3 [128]", "makes it BF16 [128]"],
    ),
    "FP8 without a scale for a gate": (
        "layers.0.ffn.gate.weight",
        zeros("F8_E4M3", 4, 128),
        ["layers.0.ffn.gate.weight is F8_E4M3 [4, 128] without a scale", "[1, 1]"],
    ),
    "scales of another geometry": (
        "layers.0.attn.wq_b.scale",
        zeros("F8_E8M0", 1, 2),
        ["layers.0.attn.wq_b.weight", "scale F8_E8M0 [1, 2]", "scale F8_E8M0 [2, 1]"],
    ),
    "FP4 scales in blocks of 128": (
        "layers.0.ffn.experts.0.w1.scale",
        zeros("F8_E8M0", 1, 1),
        ["layers.0.ffn.experts.0.w1.weight", "scale F8_E8M0 [1, 1]", "scale F8_E8M0 [64, 4]"],
    ),
    "BF16 scales": (
        "layers.0.attn.wkv.scale",
        zeros("BF16", 1, 1),
        ["layers.0.attn.wkv.weight", "scale BF16 [1, 1]", "scale F8_E8M0 [1, 1]"],
    ),
    "F32 scales of FP4": (
        "layers.0.ffn.experts.0.w1.scale",
        zeros("F32", 64, 4),
        ["layers.0.ffn.experts.0.w1.weight", "scale F32 [64, 4]", "scale F8_E8M0 [64, 4]"],
    ),
    "BF16 with a scale": (
        "layers.0.attn.wo_a.weight",
        zeros("BF16", 128, 128),
        ["layers.0.attn.wo_a.weight is BF16 [128, 128] with scale", "makes it BF16 [128, 128] ("],
    ),
}


def catalogue_error(folder: Path) -> str:
    with pytest.raises(CatalogueError) as caught:
        v4surgery.open(folder).close()
    message = str(caught.value)
    assert message.startswith("the tensors are not those of the config\n  where: ")
    assert "\n  rule: exactly the tensors of docs/tensors.md" in message
    assert "\n  next: " in message
    return message


@pytest.mark.parametrize("name", SPOILED)
def test_checkpoint_is_refused_for(small_parent: Path, tmp_path: Path, name: str) -> None:
    tensor, spoiled, words = SPOILED[name]
    folder = parents.replace_tensor(small_parent, tmp_path / "spoiled", tensor, spoiled)
    message = catalogue_error(folder)
    assert all(word in message for word in words), message
    assert "missing: " not in message
    assert "unknown: " not in message


@pytest.mark.parametrize(
    "name",
    [
        "embed.weight",
        "hc_head_scale",
        "layers.0.ffn.gate.tid2eid",
        "layers.2.ffn.experts.3.w2.weight",
        "layers.3.attn.indexer.compressor.ape",
        "mtp.0.ffn.gate.bias",
    ],
)
def test_missing_tensor_is_named(small_parent: Path, tmp_path: Path, name: str) -> None:
    folder = parents.delete_tensor(small_parent, tmp_path / "spoiled", name)
    message = catalogue_error(folder)
    assert f"missing: {name}" in message


@pytest.mark.parametrize("stem", ["layers.2.attn.wq_a", "layers.2.ffn.experts.3.w2"])
def test_missing_scale_is_told_with_its_weight(
    small_parent: Path, tmp_path: Path, stem: str
) -> None:
    folder = parents.delete_tensor(small_parent, tmp_path / "spoiled", f"{stem}.scale")
    message = catalogue_error(folder)
    assert f"{stem}.weight is " in message
    assert " without a scale; the config makes it " in message
    assert " with scale F8_E8M0 [" in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layers.0.attn.wq_a.bias", "unknown: layers.0.attn.wq_a.bias"),
        ("layers.4.attn_norm.weight", "unknown: layers.4.attn_norm.weight"),
        ("layers.0.ffn.experts.4.w1.weight", "unknown: layers.0.ffn.experts.4.w1.weight"),
        ("mtp.1.norm.weight", "unknown: mtp.1.norm.weight"),
        ("layers.0.attn_norm.scale", "layers.0.attn_norm.weight is BF16 [128] with scale F32"),
        ("layers.0.ffn.gate.weight_scale", "layers.0.ffn.gate.weight is BF16 [4, 128] with scale"),
        ("hc_head_fn.scale", "unknown: hc_head_fn.scale"),
        ("layers.0.ffn.gate.bias", "unknown: layers.0.ffn.gate.bias"),
        ("layers.00.attn_norm.weight", "unknown: layers.00.attn_norm.weight"),
        ("", "unknown: "),
    ],
)
def test_unknown_tensor_or_scale_is_named(
    small_parent: Path, tmp_path: Path, name: str, words: str
) -> None:
    folder = parents.add_tensor(small_parent, tmp_path / "spoiled", name, zeros("F32", 1))
    assert words in catalogue_error(folder)


@pytest.mark.parametrize(
    ("name", "family"),
    [("layers.0.ffn.gate.bias_vl", "Vision-Exp"), ("layers.1.engram.table", "V4.1")],
)
def test_tensors_of_a_relative_refuse_it_by_name(
    small_parent: Path, tmp_path: Path, name: str, family: str
) -> None:
    folder = parents.add_tensor(small_parent, tmp_path / "spoiled", name, zeros("F32", 1))
    with pytest.raises(CatalogueError, match=rf"this is DeepSeek-\S*{family}"):
        v4surgery.open(folder)


def test_every_problem_is_told_at_once_and_the_list_is_cut(
    small_parent: Path, tmp_path: Path
) -> None:
    folder = parents.copy_checkpoint(small_parent, tmp_path / "spoiled")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 256}))
    message = catalogue_error(folder)
    assert "embed.weight is BF16 [64, 128]; the config makes it BF16 [64, 256]" in message
    assert " more" in message
    assert len(message) < 4000


def test_half_of_the_optional_tensors_is_refused(base_parent: Path, tmp_path: Path) -> None:
    folder = parents.delete_tensor(base_parent, tmp_path / "half", "mtp.0.head.weight")
    assert "missing: the other half of mtp.0.emb.tok_emb" in catalogue_error(folder)


def test_base_without_its_optional_tensors_is_the_other_revision(
    base_parent: Path, tmp_path: Path
) -> None:
    one = parents.delete_tensor(base_parent, tmp_path / "one", "mtp.0.head.weight")
    none = parents.delete_tensor(one, tmp_path / "none", "mtp.0.emb.tok_emb.weight")
    with v4surgery.open(base_parent) as full, v4surgery.open(none) as parent:
        assert full.catalogue.optional
        assert not parent.catalogue.optional
        assert full.num_tensors == parent.num_tensors + 2


def test_quantized_compressors_of_an_older_base_revision_are_read(
    base_parent: Path, tmp_path: Path
) -> None:
    stem = "layers.1.attn.compressor.wkv"
    weight = RawTensor("F8_E4M3", (128, 288), bytes(range(256)) * 144)
    one = parents.replace_tensor(base_parent, tmp_path / "one", f"{stem}.weight", weight)
    scale = RawTensor("F32", (1, 3), np.array([1.0, 0.5, 3.0], "<f4").tobytes())
    folder = parents.add_tensor(one, tmp_path / "two", f"{stem}.scale", scale)
    with v4surgery.open(folder) as parent:
        stored = parent.tensors[stem]
        assert stored.fmt == "FP8_F32"
        values = parent.read_float(stored, slice(0, 128))
        expected = expected_values(parents.read_tensors(folder), stem, ".weight")
        np.testing.assert_array_equal(values, expected)


def replaced(old: str, new: str) -> Callable[[str], str]:
    return lambda name: name.replace(old, new)


def with_hc_modules(name: str) -> str:
    """hc_head_fn -> hc_head.hc_fn; layers.0.hc_attn_fn -> layers.0.attn_hc.fn."""
    for part in ("fn", "base", "scale"):
        name = name.replace(f"hc_head_{part}", f"hc_head.hc_{part}")
        name = name.replace(f"hc_attn_{part}", f"attn_hc.{part}")
        name = name.replace(f"hc_ffn_{part}", f"ffn_hc.{part}")
    return name


RENAMES: dict[str, Callable[[str], str]] = {
    "model.": lambda name: f"model.{name}",
    "model. for all but the head": lambda n: n if n.startswith("head.") else f"model.{n}",
    "embed_tokens": lambda name: name.replace("embed.", "embed_tokens."),
    "lm_head": lambda name: f"lm_{name}" if name.startswith("head.") else name,
    "self_attn": replaced(".attn.", ".self_attn."),
    "mlp": replaced(".ffn.", ".mlp."),
    "weight_scale": replaced(".scale", ".weight_scale"),
    "weight_scale_inv": replaced(".scale", ".weight_scale_inv"),
    "e_score_correction_bias": replaced("gate.bias", "gate.e_score_correction_bias"),
    "hc_head.hc_fn and attn_hc.fn": with_hc_modules,
    "attn.norm": replaced("attn.kv_norm", "attn.norm"),
}


def renamed_in_every_way(name: str) -> str:
    for style in ("embed_tokens", "lm_head", "self_attn", "mlp", "weight_scale_inv"):
        name = RENAMES[style](name)
    for style in ("e_score_correction_bias", "hc_head.hc_fn and attn_hc.fn", "attn.norm"):
        name = RENAMES[style](name)
    return f"model.{name}"


@pytest.mark.parametrize("style", [*RENAMES, "all of them"])
def test_resaved_copy_reads_to_the_same_bytes(
    base_parent: Path, small_parent: Path, tmp_path: Path, style: str
) -> None:
    for number, original in enumerate((small_parent, base_parent)):
        rename = RENAMES.get(style, renamed_in_every_way)
        copy = parents.rename_tensors(original, tmp_path / str(number), rename)
        assert set(parents.read_tensors(copy)) != set(parents.read_tensors(original))
        with v4surgery.open(original) as first, v4surgery.open(copy) as second:
            assert_same_tensors(first, second)


def assert_same_tensors(first: Checkpoint, second: Checkpoint) -> None:
    assert list(first.tensors) == list(second.tensors)
    for stem, stored in first.tensors.items():
        other = second.tensors[stem]
        assert other.fmt == stored.fmt
        for a, b in ((stored.weight, other.weight), (stored.scale, other.scale)):
            if a is None or b is None:
                assert a is b, stem
                continue
            left, right = first.read_rows(a, slice(None)), second.read_rows(b, slice(None))
            np.testing.assert_array_equal(left, right, err_msg=stem, strict=True)


@pytest.mark.parametrize(
    ("original", "names"),
    [
        ("norm.weight", ["norm.weight", "model.norm.weight"]),
        ("head.weight", ["lm_head.weight", "model.lm_head.weight"]),
        ("layers.0.attn.wkv.scale", ["layers.0.attn.wkv.scale", "layers.0.attn.wkv.weight_scale"]),
        ("hc_head_fn", ["hc_head_fn", "hc_head.hc_fn", "model.hc_head_fn"]),
    ],
)
def test_one_tensor_under_two_names_is_refused(
    small_parent: Path, tmp_path: Path, original: str, names: list[str]
) -> None:
    def edit(shards: Shards) -> None:
        tensors = parents.shard_of(shards, original)
        tensor = tensors.pop(original)
        tensors.update(dict.fromkeys(names, tensor))

    message = catalogue_error(parents.edit_checkpoint(small_parent, tmp_path / "twice", edit))
    assert "under two names: " in message
    assert f"mean {original}" in message
    assert "missing: " not in message


@pytest.mark.parametrize("num_shards", [2, 7, 30])
def test_repacked_copy_reads_to_the_same_bytes(
    small_parent: Path, tmp_path: Path, num_shards: int
) -> None:
    copy = parents.repack(small_parent, tmp_path / "repacked", num_shards)
    with v4surgery.open(small_parent) as first, v4surgery.open(copy) as second:
        layer = {
            ref.weight.file for stem, ref in second.tensors.items() if stem.startswith("layers.1.")
        }
        assert len(layer) > 1
        assert_same_tensors(first, second)
        assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("file", ["model.safetensors", "v4.safetensors"])
def test_one_file_needs_no_index(small_parent: Path, tmp_path: Path, file: str) -> None:
    config = (small_parent / "config.json").read_text()
    shards = {file: parents.read_tensors(small_parent)}
    copy = parents.write_checkpoint(tmp_path / "one", config, shards, index=False)
    with v4surgery.open(small_parent) as first, v4surgery.open(copy) as second:
        assert second.files == (file,)
        assert_same_tensors(first, second)


def test_other_files_beside_model_safetensors_are_left_alone(tiny_v4: Path) -> None:
    # golden.safetensors lies beside it and holds activations.
    assert (tiny_v4 / "golden.safetensors").exists()
    with v4surgery.open(tiny_v4) as parent:
        assert parent.files == ("model.safetensors",)
        assert parent.num_tensors == 504


def test_fingerprint_follows_config_and_headers_not_the_folder(
    small_parent: Path, tmp_path: Path
) -> None:
    copy = parents.copy_checkpoint(small_parent, tmp_path / "copy")
    with v4surgery.open(small_parent) as first, v4surgery.open(copy) as second:
        assert first.fingerprint == second.fingerprint
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "index_topk": 7}))
    with v4surgery.open(small_parent) as first, v4surgery.open(copy) as second:
        assert first.fingerprint != second.fingerprint


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / parents.INDEX_FILE
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def checkpoint_error(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        v4surgery.open(folder).close()
    return str(caught.value)


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "../../etc/passwd",
        "/etc/passwd",
        "sub/model.safetensors",
        "%2e%2e/outside.safetensors",
        "%2e%2e%2foutside.safetensors",
        "..\\outside.safetensors",
        "model\x00.safetensors",
        "model.safetensors?download=1",
        "model.safetensors#x",
        "https://example.com/model.safetensors",
        "..",
        "",
        " ",
        "model\n.safetensors",
        7,
        None,
        ["model.safetensors"],
        {},
    ],
)
def test_index_that_points_elsewhere_is_refused(
    small_parent: Path, tmp_path: Path, shard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = parents.copy_checkpoint(small_parent, tmp_path / "parent")
    parents.write_shard(tmp_path / "outside.safetensors", {"norm.weight": zeros("BF16", 128)})
    edit_index(folder, lambda weight_map: weight_map.update({"norm.weight": shard}))
    touched: list[str] = []
    real_open = os.open

    def recorded(path: Any, *args: Any, **kwargs: Any) -> int:
        touched.append(os.path.basename(path))  # noqa: PTH119 - any kind of path may come
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", recorded)
    message = checkpoint_error(folder)
    assert "not the name of a file in this checkpoint" in message
    assert parents.INDEX_FILE in message
    assert set(touched) <= {"config.json", parents.INDEX_FILE}


def test_index_that_names_a_missing_shard_is_refused(small_parent: Path, tmp_path: Path) -> None:
    folder = parents.copy_checkpoint(small_parent, tmp_path / "parent")
    (folder / "model-00003-of-00007.safetensors").unlink()
    message = checkpoint_error(folder)
    assert "the index names shards that are not there" in message
    assert "value: model-00003-of-00007.safetensors" in message


def test_index_that_names_another_shard_is_refused(small_parent: Path, tmp_path: Path) -> None:
    folder = parents.copy_checkpoint(small_parent, tmp_path / "parent")
    wrong = "model-00002-of-00007.safetensors"
    edit_index(folder, lambda weight_map: weight_map.update({"norm.weight": wrong}))
    message = checkpoint_error(folder)
    assert "index and shards disagree" in message
    assert f"norm.weight: the index says {wrong}, the headers say model-00006-of" in message


def test_index_that_names_a_tensor_of_no_shard_is_refused(
    small_parent: Path, tmp_path: Path
) -> None:
    folder = parents.copy_checkpoint(small_parent, tmp_path / "parent")
    file = "model-00002-of-00007.safetensors"
    edit_index(folder, lambda weight_map: weight_map.update({"norm.wait": file}))
    message = checkpoint_error(folder)
    assert "index and shards disagree" in message
    assert f"norm.wait: the index says {file}, the headers say no shard" in message


def test_tensor_that_the_index_does_not_name_is_refused(small_parent: Path, tmp_path: Path) -> None:
    folder = parents.copy_checkpoint(small_parent, tmp_path / "parent")
    edit_index(folder, lambda weight_map: weight_map.pop("norm.weight"))
    message = checkpoint_error(folder)
    assert "a shard holds a tensor that the index does not name" in message
    assert "norm.weight in model-00006-of-00007.safetensors" in message


def test_tensor_in_two_shards_is_refused(small_parent: Path, tmp_path: Path) -> None:
    folder = parents.copy_checkpoint(small_parent, tmp_path / "parent")
    path = folder / "model-00001-of-00007.safetensors"
    norm = parents.read_tensors(folder)["norm.weight"]
    parents.write_shard(path, {**parents.read_shard(path), "norm.weight": norm})
    message = checkpoint_error(folder)
    assert "a tensor stands in two files" in message
    assert "where: norm.weight" in message
    assert "model-00001-of-00007.safetensors and model-00006-of-00007.safetensors" in message


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": null}',
        b'{"weight_map": "model.safetensors"}',
        b"\xff\xfe{}",
        b'{"weight_map": ' + b"[" * 100_000,
        b'{"weight_map": {"a": 1' + b"0" * 10_000 + b"}}",
    ],
)
def test_malformed_index_is_refused(small_parent: Path, tmp_path: Path, text: bytes) -> None:
    folder = parents.copy_checkpoint(small_parent, tmp_path / "parent")
    (folder / parents.INDEX_FILE).write_bytes(text)
    message = checkpoint_error(folder)
    assert "the index is malformed" in message
    assert f"where: parent/{parents.INDEX_FILE}" in message
    assert len(message) < 1000


def test_empty_weight_map_has_no_tensors(small_parent: Path, tmp_path: Path) -> None:
    folder = parents.copy_checkpoint(small_parent, tmp_path / "parent")
    (folder / parents.INDEX_FILE).write_text('{"weight_map": {}}')
    assert "missing: embed.weight" in catalogue_error(folder)


def test_two_files_without_an_index_are_refused(small_parent: Path, tmp_path: Path) -> None:
    folder = parents.copy_checkpoint(small_parent, tmp_path / "parent")
    (folder / parents.INDEX_FILE).unlink()
    message = checkpoint_error(folder)
    assert "no index, and not exactly one .safetensors file" in message
    assert "model-00001-of-00007.safetensors, model-00002" in message


def test_folder_of_pickles_is_refused_with_what_to_do(small_parent: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_bytes((small_parent / "config.json").read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    message = checkpoint_error(folder)
    assert "pickles (.bin, .pt) are never loaded" in message


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert "no config.json: not a checkpoint" in checkpoint_error(tmp_path)


def test_config_error_names_the_file(small_parent: Path, tmp_path: Path) -> None:
    folder = parents.copy_checkpoint(small_parent, tmp_path / "parent")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"where: parent/config\.json"):
        v4surgery.open(folder)


def test_json_file_that_is_too_large_is_not_read(
    small_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("v4surgery.checkpoint.source.MAX_JSON_BYTES", 100)
    message = checkpoint_error(small_parent)
    assert "a JSON file is too large" in message
    assert "rule: at most 100 bytes" in message


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..\\x", "a\x00b", "layers.0/../../x"])
def test_tensor_names_are_never_paths(
    small_parent: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = parents.add_tensor(small_parent, tmp_path / "a" / "parent", name, zeros("F32", 1))
    opened: list[Path] = []
    real_open = os.open

    def recorded(path: Any, *args: Any, **kwargs: Any) -> int:
        opened.append(Path(path))
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", recorded)
    assert "unknown: " in catalogue_error(folder)
    assert {path.parent for path in opened} == {folder}
    assert {path.name for path in folder.iterdir()} >= {path.name for path in opened}
    assert not (tmp_path / "x").exists()


def test_truncated_shard_is_refused_on_opening(small_parent: Path, tmp_path: Path) -> None:
    folder = parents.copy_checkpoint(small_parent, tmp_path / "parent")
    path = folder / "model-00002-of-00007.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(HeaderError, match="model-00002-of-00007"):
        v4surgery.open(folder)


def test_shard_cut_after_opening_fails_to_read(small_parent: Path, tmp_path: Path) -> None:
    folder = parents.copy_checkpoint(small_parent, tmp_path / "parent")
    with v4surgery.open(folder) as parent:
        ref = parent.tensors["embed"].weight
        os.truncate(folder / ref.file, ref.end - 1)
        with pytest.raises(ReadError, match=ref.file):
            parent.read_rows(ref, slice(0, 64))
        with pytest.raises(ReadError, match="changed while it was being read"):
            parent.source.check_unchanged()


def test_opened_files_are_closed(small_parent: Path, tmp_path: Path) -> None:
    before = opened_fds()
    parent = v4surgery.open(small_parent)
    assert len(opened_fds() - before) == 7 + 2
    parent.close()
    assert opened_fds() == before
    with pytest.raises(ReadError, match="closed"):
        parent.read_rows(parent.tensors["norm"].weight, slice(0, 1))


@pytest.mark.parametrize("stage", ["config", "index", "header", "tensors"])
def test_files_are_closed_when_opening_fails(
    small_parent: Path, tmp_path: Path, stage: str
) -> None:
    folder = tmp_path / "parent"
    if stage == "tensors":
        parents.delete_tensor(small_parent, folder, "norm.weight")
    else:
        parents.copy_checkpoint(small_parent, folder)
        files = {"config": "config.json", "index": parents.INDEX_FILE}
        (folder / files.get(stage, "model-00006-of-00007.safetensors")).write_bytes(b"{")
    before = opened_fds()
    checkpoint_error(folder)
    assert opened_fds() == before


def test_companions_are_the_small_files_that_are_there(small_parent: Path, tmp_path: Path) -> None:
    folder = parents.copy_checkpoint(small_parent, tmp_path / "parent")
    (folder / "tokenizer.json").write_bytes(b'{"a": 1}')
    (folder / "LICENSE").write_bytes(b"MIT")
    (folder / "modeling_evil.py").write_bytes(b"raise SystemExit")
    with v4surgery.open(folder) as parent:
        assert parent.companions() == ["tokenizer.json", "LICENSE"]
        assert parent.read_file("tokenizer.json") == b'{"a": 1}'
