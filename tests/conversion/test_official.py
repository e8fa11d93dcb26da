"""The official code's shards: as its converter writes them, and back byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import v4surgery as v4
from tests.conversion import reference
from tests.conversion.conftest import EXPERTS, VARIANTS, write_wide
from tests.support import parents
from v4surgery.checkpoint.official import SCALES_FILE, reference_config
from v4surgery.config import V4Config
from v4surgery.conversion.run import Converted, plan_conversion
from v4surgery.errors import CheckpointError, PlanError, ReadError, UsageError
from v4surgery.presets import FLASH, PRESETS


def convert(source: Path, out: Path, to: str, ranks: int | None = None) -> Converted:
    with v4.open(source) as checkpoint:
        return v4.convert(checkpoint, out, to, ranks=ranks, workers=2)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("model*.safetensors"))}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("like", VARIANTS)
def test_shards_are_byte_for_byte_those_of_the_official_converter(
    like: str, ranks: int, wide: dict[str, Path], tmp_path: Path
) -> None:
    convert(wide[like], tmp_path / "ours", "official", ranks)
    reference.write(wide[like], tmp_path / "theirs", ranks, EXPERTS)
    ours, theirs = files_of(tmp_path / "ours"), files_of(tmp_path / "theirs")
    assert list(ours) == list(theirs) == [f"model{i}-mp{ranks}.safetensors" for i in range(ranks)]
    for name in ours:
        assert parents.read_shard(tmp_path / "ours" / name) == parents.read_shard(
            tmp_path / "theirs" / name
        )
        assert ours[name] == theirs[name]


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("like", VARIANTS)
def test_round_trip_through_official_shards_is_byte_identical(
    like: str, ranks: int, wide: dict[str, Path], tmp_path: Path
) -> None:
    done = convert(wide[like], tmp_path / "official", "official", ranks)
    convert(tmp_path / "official", tmp_path / "back", "published")
    before, after = parents.read_tensors(wide[like]), parents.read_tensors(tmp_path / "back")
    gone = {"mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"} if like == "flash-base" else set()
    assert before.keys() - after.keys() == gone
    assert all(before[name] == tensor for name, tensor in after.items())
    assert all(name[: -len(".weight")] in done.conversion.lost[0] for name in gone)
    if not gone:
        assert files_of(wide[like]) == files_of(tmp_path / "back")
        configs = [
            json.loads((p / "config.json").read_text()) for p in (wide[like], tmp_path / "back")
        ]
        assert configs[0] == configs[1]
    with v4.open(tmp_path / "official") as official:
        assert v4.verify(tmp_path / "back", official).passed


def test_shards_go_to_another_number_of_ranks(wide: dict[str, Path], tmp_path: Path) -> None:
    convert(wide["flash"], tmp_path / "two", "official", 2)
    convert(tmp_path / "two", tmp_path / "eight", "official", 8)
    convert(wide["flash"], tmp_path / "at-once", "official", 8)
    assert files_of(tmp_path / "eight") == files_of(tmp_path / "at-once")
    scales = [(tmp_path / name / SCALES_FILE).read_bytes() for name in ("eight", "at-once")]
    assert scales[0] == scales[1]


def test_shards_of_others_come_back_by_the_official_rule(
    wide: dict[str, Path], tmp_path: Path
) -> None:
    """Without our scales: power-of-two ones follow from the values."""
    reference.write(wide["flash"], tmp_path / "shards", 4, EXPERTS)
    with pytest.raises(CheckpointError, match=r"without their config.json"):
        v4.open(tmp_path / "shards")
    with v4.open(wide["flash"]) as parent:
        config = reference_config(parent.config, "FP8", "FP4")
    (tmp_path / "shards" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "shards", tmp_path / "back", "published")
    before, after = parents.read_tensors(wide["flash"]), parents.read_tensors(tmp_path / "back")
    # Random codes reach the top of E4M3's range in every block, as the rule has it.
    assert before == after


def test_scales_that_the_rule_would_choose_otherwise_need_the_record(
    wide: dict[str, Path], tmp_path: Path
) -> None:
    """A block of small codes: its values come back without the record, its bytes only with it."""
    name = "layers.0.attn.wo_a.weight"
    old = parents.read_tensors(wide["flash"])[name]
    small = np.full(old.shape, 0x38, np.uint8)  # 1.0 everywhere: the rule takes 2^-8 of it
    path = parents.replace_tensor(
        wide["flash"], tmp_path / "p", name, old._replace(data=small.tobytes())
    )
    convert(path, tmp_path / "official", "official", 2)
    convert(tmp_path / "official", tmp_path / "exact", "published")
    assert parents.read_tensors(tmp_path / "exact") == parents.read_tensors(path)
    (tmp_path / "official" / SCALES_FILE).unlink()
    convert(tmp_path / "official", tmp_path / "by-rule", "published")
    state = [reference.load(folder) for folder in (path, tmp_path / "by-rule")]
    scale = name.replace("weight", "scale")
    assert not torch.equal(state[0][name].view(torch.uint8), state[1][name].view(torch.uint8))
    values = [s[name].float() * s[scale].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
              for s in state]  # fmt: skip
    assert torch.equal(*values)


def test_base_shards_without_the_record_keep_wo_a_in_bf16_and_say_so(
    wide: dict[str, Path], tmp_path: Path
) -> None:
    convert(wide["flash-base"], tmp_path / "official", "official", 2)
    (tmp_path / "official" / SCALES_FILE).unlink()
    done = convert(tmp_path / "official", tmp_path / "back", "published")
    assert "the scales of wo_a" in done.conversion.lost[0]
    after = parents.read_tensors(tmp_path / "back")
    assert after["layers.0.attn.wo_a.weight"].dtype == "BF16"
    assert after["layers.0.attn.wq_b.scale"].dtype == "F32"


def test_shards_changed_afterwards_are_not_guessed_at(
    wide: dict[str, Path], tmp_path: Path
) -> None:
    convert(wide["flash"], tmp_path / "official", "official", 1)
    path = tmp_path / "official" / "model0-mp1.safetensors"
    shard = parents.read_shard(path)
    old = shard["layers.1.attn.wo_a.weight"]
    values = np.frombuffer(old.data, np.uint16).copy()
    values[7] ^= 1  # the last of 8 significant bits, where a code has 4
    shard["layers.1.attn.wo_a.weight"] = old._replace(data=values.tobytes())
    parents.write_shard(path, shard)
    with pytest.raises(ReadError, match=r"no FP8 codes under its scales") as caught:
        convert(tmp_path / "official", tmp_path / "back", "published")
    assert "layers.1.attn.wo_a.weight" in str(caught.value)


@pytest.mark.parametrize("ratios", [(0, 4, 128, 4, 0)])
def test_official_folder_works_wherever_a_checkpoint_does(
    ratios: tuple[int, ...], small_parent: Path, tmp_path: Path
) -> None:
    """bf16 linears, dims below a block: the same forward and the same slice as of the parent."""
    convert(small_parent, tmp_path / "bf16", "bf16")
    convert(tmp_path / "bf16", tmp_path / "official", "official", 2)
    with v4.open(tmp_path / "official") as official, v4.open(tmp_path / "bf16") as published:
        assert official.config == published.config
        assert official.config.compress_ratios == ratios
        for stem, stored in published.tensors.items():
            whole = slice(0, stored.weight.shape[0])
            there = official.tensors[stem]
            assert (there.fmt, there.weight.shape) == (stored.fmt, stored.weight.shape)
            assert np.array_equal(
                official.read_rows(there.weight, whole), published.read_rows(stored.weight, whole)
            )


def test_any_range_of_the_view_is_the_same_range_of_the_published_bytes(
    wide: dict[str, Path], tmp_path: Path
) -> None:
    convert(wide["flash"], tmp_path / "official", "official", 4)
    rng = np.random.default_rng(0)
    before = parents.read_tensors(wide["flash"])
    with v4.open(tmp_path / "official") as view:
        source = view.source
        assert source.list_files() == ["config.json", "model.safetensors"]
        size = source.size("model.safetensors")
        whole = source.read("model.safetensors", 0, size)
        for begin, end in np.sort(rng.integers(0, size, (200, 2)), axis=1).tolist():
            end = min(end, begin + 40_000)
            assert source.read("model.safetensors", begin, end) == whole[begin:end]
        for name in ("layers.2.attn.wo_b", "layers.2.attn.wo_a", "layers.4.ffn.experts.5.w2"):
            ref = view.tensors[name].weight
            assert whole[ref.begin : ref.end] == before[name + ".weight"].data
        with pytest.raises(ReadError, match="not a range"):
            source.read("model.safetensors", size - 1, size + 1)


@pytest.mark.parametrize("like", ["flash", "pro", "flash-0731"])
def test_reference_config_is_read_back(like: str) -> None:
    config = PRESETS[like].config
    back = V4Config.from_dict(reference_config(config, "FP8", "FP4"))
    loose = {"num_nextn_predict_layers": 1, "quantization_config": None}
    assert back.replace(**loose) == config.replace(**loose)
    flat = config.replace(rope_scaling=None)
    assert V4Config.from_dict(reference_config(flat, "BF16", "BF16")).rope_scaling is None


def test_reference_config_has_no_key_that_modelargs_lacks() -> None:
    """Fields of ModelArgs, copied by hand; one more is a TypeError there."""
    known = {
        *("max_batch_size", "max_seq_len", "dtype", "scale_fmt", "expert_dtype", "scale_dtype"),
        *("vocab_size", "dim", "moe_inter_dim", "n_layers", "n_hash_layers", "n_mtp_layers"),
        *("n_heads", "n_routed_experts", "n_shared_experts", "n_activated_experts"),
        *("score_func", "route_scale", "swiglu_limit", "q_lora_rank", "head_dim"),
        *("rope_head_dim", "norm_eps", "o_groups", "o_lora_rank", "window_size"),
        *("compress_ratios", "compress_rope_theta", "original_seq_len", "rope_theta"),
        *("rope_factor", "beta_fast", "beta_slow", "index_n_heads", "index_head_dim"),
        *("index_topk", "hc_mult", "hc_sinkhorn_iters", "hc_eps"),
    }
    dspark = {f"dspark_{n}" for n in ("block_size", "noise_token_id", "target_layer_ids",
                                      "markov_rank")}  # fmt: skip
    assert reference_config(FLASH, "FP8", "FP4").keys() <= known
    extra = reference_config(PRESETS["flash-0731"].config, "FP8", "FP4").keys() - known
    assert extra == dspark


def test_sizes_that_ranks_cannot_share_are_refused_with_all_reasons(tmp_path: Path) -> None:
    parent = write_wide(tmp_path / "p", "flash", o_groups=4, n_routed_experts=6)
    with v4.open(parent) as checkpoint:
        with pytest.raises(PlanError) as caught:
            plan_conversion(checkpoint, "official", ranks=8)
        text = str(caught.value)
        assert "o_groups 4 is no multiple of 8; n_routed_experts 6 is no multiple of 8" in text
        assert "--tp" in text
    narrow = write_wide(tmp_path / "n", "flash", o_lora_rank=64, head_dim=128)
    with v4.open(narrow) as checkpoint, pytest.raises(PlanError, match="columns of wo_b are not"):
        plan_conversion(checkpoint, "official", ranks=8)


def test_half_a_set_of_shards_is_refused(wide: dict[str, Path], tmp_path: Path) -> None:
    convert(wide["flash"], tmp_path / "official", "official", 2)
    (tmp_path / "official" / "model1-mp2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not one whole set"):
        v4.open(tmp_path / "official")


def test_shards_of_another_config_are_refused(wide: dict[str, Path], tmp_path: Path) -> None:
    convert(wide["flash"], tmp_path / "official", "official", 2)
    config = json.loads((tmp_path / "official" / "config.json").read_text())
    for change, text in (
        ({"n_layers": 4, "compress_ratios": [0, 0, 4, 128, 0]}, "that the config does not have"),
        ({"n_layers": 6, "compress_ratios": [0, 0, 4, 128, 4, 4, 0]}, "lacks a tensor"),
    ):
        (tmp_path / "official" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=text):
            v4.open(tmp_path / "official")


def test_published_index_wins_over_shards_beside_it(wide: dict[str, Path], tmp_path: Path) -> None:
    both = parents.copy_checkpoint(wide["flash"], tmp_path / "both")
    shutil.copy(next(both.glob("model-*.safetensors")), both / "model0-mp1.safetensors")
    with v4.open(both) as checkpoint:
        assert "layout" not in checkpoint.source.identity()


@pytest.mark.parametrize(
    ("to", "options", "text"),
    [
        ("gguf", {}, "unknown target"),
        ("bf16", {"ranks": 2}, "only official shards have ranks"),
        ("official", {"ranks": 5000}, "not a number of ranks"),
        ("official", {"max_shard_size": 10}, "whatever its size"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    to: str, options: dict[str, int], text: str, wide: dict[str, Path]
) -> None:
    with v4.open(wide["flash"]) as checkpoint, pytest.raises(UsageError, match=text):
        plan_conversion(checkpoint, to, ranks=options.get("ranks"),
                        max_shard_size=options.get("max_shard_size"))  # fmt: skip


SPOILT: dict[str, tuple[str, parents.RawTensor, str]] = {
    "shapes differ": (
        "layers.1.attn.wq_b.weight",
        parents.RawTensor("F8_E4M3", (256, 128), bytes(256 * 128)),
        "in different shapes",
    ),
    "a scalar": ("layers.1.attn.attn_sink", parents.RawTensor("F32", (), bytes(4)), "in different"),
    "a flat wo_a": (
        "layers.1.attn.wo_a.weight",
        parents.RawTensor("BF16", (4,), bytes(8)),
        "in different shapes",
    ),
    "one more": ("layers.1.attn.x", parents.RawTensor("F32", (1,), bytes(4)), "does not have"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_shards_are_refused_by_name(
    case: str, wide: dict[str, Path], tmp_path: Path
) -> None:
    name, tensor, text = SPOILT[case]
    convert(wide["flash"], tmp_path / "official", "official", 2)
    path = tmp_path / "official" / "model1-mp2.safetensors"
    parents.write_shard(path, parents.read_shard(path) | {name: tensor})
    with pytest.raises(CheckpointError, match=text) as caught:
        v4.open(tmp_path / "official")
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "record", [b"[", b"[]", b'{"official": {}}', b"[" * 100_000, b'{"official": {"reference": 1}}']
)
def test_a_record_that_is_not_ours_is_passed_over(
    record: bytes, wide: dict[str, Path], tmp_path: Path
) -> None:
    convert(wide["flash"], tmp_path / "official", "official", 2)
    (tmp_path / "official" / "v4surgery.json").write_bytes(record)
    with v4.open(tmp_path / "official") as view, v4.open(wide["flash"]) as parent:
        assert view.config.compress_ratios == parent.config.compress_ratios


def test_scales_that_do_not_fit_are_refused(wide: dict[str, Path], tmp_path: Path) -> None:
    convert(wide["flash"], tmp_path / "official", "official", 2)
    path = tmp_path / "official" / SCALES_FILE
    scales = parents.read_shard(path)
    name = "layers.0.attn.wo_a.scale"
    parents.write_shard(path, scales | {name: parents.RawTensor("F8_E8M0", (1, 1), b"x")})
    with pytest.raises(CheckpointError, match="scales do not fit"):
        v4.open(tmp_path / "official")
    parents.write_shard(path, scales | {name: parents.RawTensor("I64", (1,), bytes(8))})
    with pytest.raises(CheckpointError, match="not a scale"):
        v4.open(tmp_path / "official")
