"""bf16 and FP8: what is exact, and that what rounds is counted; no F32 scale becomes E8M0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import v4surgery as v4
from tests.conversion import reference
from tests.conversion.conftest import VARIANTS
from tests.support import parents

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
STEM = "layers.1.ffn.experts.3.w1"


def values_of(state: dict[str, torch.Tensor], stem: str) -> torch.Tensor:
    """A weight in float32, decoded by torch's own dtypes and a table."""
    weight, scale = state[f"{stem}.weight"], state.get(f"{stem}.scale")
    if weight.dtype == torch.int8:
        assert scale is not None
        table = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)])
        raw = weight.view(torch.uint8).long()
        codes = torch.stack([raw & 15, raw >> 4], -1).flatten(1)
        return table[codes] * scale.float().repeat_interleave(32, 1)
    if scale is None:
        return weight.float()
    spread = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return weight.float() * spread[: weight.shape[0], : weight.shape[1]]


def stems_of(state: dict[str, torch.Tensor]) -> list[str]:
    return [name[: -len(".weight")] for name in state if name.endswith(".weight")]


@pytest.mark.parametrize("like", ["flash", "flash-0731", "pro-0813"])
@pytest.mark.parametrize("to", ["bf16", "fp8"])
def test_values_are_equal_in_the_other_format(
    like: str, to: str, wide: dict[str, Path], tmp_path: Path
) -> None:
    done = v4.convert(wide[like], tmp_path / "out", to)
    before, after = reference.load(wide[like]), reference.load(tmp_path / "out")
    assert {n for n in before if not n.endswith(".scale")} == {
        n for n in after if not n.endswith(".scale")
    }
    for stem in stems_of(before):
        assert torch.equal(values_of(before, stem), values_of(after, stem)), stem
    expected = torch.float8_e4m3fn if to == "fp8" else torch.bfloat16
    assert after[f"{STEM}.weight"].dtype == expected
    assert done.report["requantized"]["blocks_changed"] == 0
    assert done.conversion.lost == ()
    with v4.open(wide[like]) as parent:
        assert v4.verify(tmp_path / "out", parent).passed


def spread_scales(source: Path, out: Path, spreads: dict[tuple[int, int], int]) -> Path:
    """A copy in which some blocks of one expert have scales that lie 2^spread apart."""

    def edit(shards: parents.Shards) -> None:
        shard = parents.shard_of(shards, f"{STEM}.scale")
        scale = shard[f"{STEM}.scale"]
        codes = np.full(scale.shape, 120, np.uint8)
        for (row, col), spread in spreads.items():
            codes[128 * row + 5, 4 * col + 2] -= spread
        shard[f"{STEM}.scale"] = scale._replace(data=codes.tobytes())

    return parents.edit_checkpoint(source, out, edit)


@pytest.mark.parametrize("spread", range(20))
def test_fp4_blocks_come_back_as_far_as_their_scales_allow_and_the_others_are_counted(
    spread: int, wide: dict[str, Path], tmp_path: Path
) -> None:
    """Within 2^6, as published, always; beyond, by what E4M3's subnormals hold."""
    path = spread_scales(wide["flash"], tmp_path / "p", {(0, 1): spread})
    done = v4.convert(path, tmp_path / "out", "fp8")
    before, after = reference.load(path), reference.load(tmp_path / "out")
    old, new = values_of(before, STEM), values_of(after, STEM)
    assert torch.equal(old[:, :128], new[:, :128])
    changed = int(not torch.equal(old[:, 128:], new[:, 128:]))
    requantized = done.report["requantized"]
    assert requantized["blocks_changed"] == changed
    assert requantized["by_tensor"].keys() == ({STEM} if changed else set())
    if changed:
        assert requantized["by_tensor"][STEM]["blocks"] == 2
        assert requantized["by_tensor"][STEM]["changed"] == int((old != new).sum())
    assert not changed if spread <= 14 else True
    assert changed if spread >= 18 else True  # 0.5 * 2^-18 / 2^-6 is below half a step of 2^-9


def test_base_keeps_its_scales_in_f32_whatever_it_is_converted_to(
    wide: dict[str, Path], tmp_path: Path
) -> None:
    before = parents.read_tensors(wide["flash-base"])
    for to in ("fp8", "published", "official", "bf16"):
        done = v4.convert(wide["flash-base"], tmp_path / to, to)
        after = parents.read_tensors(tmp_path / to)
        dtypes = {name: tensor.dtype for name, tensor in after.items()}
        assert "F8_E8M0" not in dtypes.values()
        scales = [name for name in after if name.endswith(".scale")]
        assert all(dtypes[name] == "F32" for name in scales)
        assert bool(scales) == (to != "bf16")
        if to in ("fp8", "published"):
            assert after == before
        if to == "bf16":
            assert sum(done.conversion.summary()["inexact"].values()) > 0
        if to == "official":
            assert "rounds every scale" in done.conversion.summary()["notes"][0]


def test_base_to_bf16_rounds_each_value_once(wide: dict[str, Path], tmp_path: Path) -> None:
    v4.convert(wide["flash-base"], tmp_path / "out", "bf16")
    before, after = reference.load(wide["flash-base"]), reference.load(tmp_path / "out")
    for stem in stems_of(before):
        assert torch.equal(values_of(before, stem).bfloat16(), after[f"{stem}.weight"]), stem


def test_older_base_revision_with_compressor_scales_is_converted(
    wide: dict[str, Path], tmp_path: Path
) -> None:
    """Its compressors are FP8 with a scale: published formats keep them so, bf16 decodes them."""
    name = "layers.3.attn.compressor.wkv"

    def edit(shards: parents.Shards) -> None:
        shard = parents.shard_of(shards, f"{name}.weight")
        shape = shard[f"{name}.weight"].shape
        codes = np.arange(np.prod(shape), dtype=np.int64).astype(np.uint8) & 0x77
        shard[f"{name}.weight"] = parents.RawTensor("F8_E4M3", shape, codes.tobytes())
        grid = (-(-shape[0] // 128), -(-shape[1] // 128))
        scales = np.linspace(0.01, 0.02, np.prod(grid), dtype=np.float32)
        shard[f"{name}.scale"] = parents.RawTensor("F32", grid, scales.tobytes())

    path = parents.edit_checkpoint(wide["flash-base"], tmp_path / "old", edit)
    v4.convert(path, tmp_path / "same", "published")
    assert parents.read_tensors(tmp_path / "same") == parents.read_tensors(path)
    v4.convert(path, tmp_path / "bf16", "bf16")
    before, after = reference.load(path), reference.load(tmp_path / "bf16")
    assert torch.equal(values_of(before, name).bfloat16(), after[f"{name}.weight"])


@pytest.mark.parametrize("like", VARIANTS)
def test_published_from_published_is_the_same_bytes(
    like: str, wide: dict[str, Path], tmp_path: Path
) -> None:
    repacked = parents.repack(wide[like], tmp_path / "repacked", 3)
    v4.convert(repacked, tmp_path / "out", "published")
    for path in wide[like].glob("model-*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_max_shard_size_is_kept(wide: dict[str, Path], tmp_path: Path) -> None:
    limit = 600_000
    v4.convert(wide["flash"], tmp_path / "out", "bf16", max_shard_size=limit)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("model-*.safetensors")]
    assert len(sizes) > 8 and max(sizes) < limit + 100_000
