"""The whole family, end to end on the command line: Base, the DSpark variants 0731 and 0813."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.cli.conftest import Run, _plain_terminal, v4  # noqa: F401 - the command line
from tests.conversion.conftest import DSPARK, WIDE
from tests.support import parents

VARIANTS = ("flash-base", "flash-0731", "pro-0813")
SIZES = WIDE | {"vocab_size": 128, "o_groups": 4}
# Layers 0, 2, 4 of 6: both kinds, and the last target of a DSpark drafter is gone.
KEEP = "keep: {layers: {by: ids, ids: [0, 2, 3, 4]}, experts: {keep: 4, by: gate}, mtp: MTP}"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each variant with six layers, by the very command that a reader would give."""
    from v4surgery.cli import main

    folder = tmp_path_factory.mktemp("family")
    for like in VARIANTS:
        changes = SIZES | ({} if like == "flash-base" else DSPARK)
        words = [f"--set={name}={value}" for name, value in changes.items()]
        with pytest.raises(SystemExit) as stopped:
            main(["synth", "--like", like, "--layers", "6", "--out", str(folder / like), *words])
        assert not stopped.value.code
    return {like: folder / like for like in VARIANTS}


def write_recipe(path: Path, *, dtype: str, mtp: str) -> Path:
    keep = KEEP.replace("MTP", mtp)
    path.write_text(f"name: cut\n{keep}\nstore: {{dtype: {dtype}}}\n")
    return path


@pytest.mark.parametrize("mtp", ["keep", "drop"])
@pytest.mark.parametrize("dtype", ["native", "bf16"])
@pytest.mark.parametrize("like", VARIANTS)
def test_inspect_plan_slice_verify_and_forward(
    like: str,
    dtype: str,
    mtp: str,
    family: dict[str, Path],
    v4: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    parent, out = family[like], tmp_path / "replica"
    recipe = write_recipe(tmp_path / "cut.yaml", dtype=dtype, mtp=mtp)
    inspected = json.loads(v4("inspect", parent, "--json").out)
    drafters = "1 MTP" if like == "flash-base" else "3 DSpark"
    assert inspected["dimensions"]["drafters"] == drafters
    expert_format = "FP8_F32" if like == "flash-base" else "FP4"
    assert inspected["groups"]["experts"]["formats"] == [expert_format]

    words = ("--recipe", recipe, "--parent", parent)
    planned = json.loads(v4("plan", *words, "--json").out)
    sliced = json.loads(v4("slice", *words, "--out", out, "--json").out)
    assert sliced["plan_hash"] == planned["plan_hash"]
    assert planned["dimensions"]["drafters"] == (drafters if mtp == "keep" else "none")
    verified = v4("verify", out, "--parent", parent)
    assert (verified.code, verified.err) == (0, "")

    config = json.loads((out / "config.json").read_text())
    assert len(config["compress_ratios"]) == 4 + (int(drafters[0]) if mtp == "keep" else 0)
    if mtp == "drop":
        assert not [key for key in config if key.startswith("dspark")]
        assert not [name for name in parents.read_tensors(out) if name.startswith("mtp.")]
    elif like != "flash-base":
        assert config["dspark_target_layer_ids"] == [1, 2, 3]
        names = parents.read_tensors(out).keys()
        assert {"mtp.0.main_proj.weight", "mtp.2.markov_head.markov_w1.weight"} <= names

    traced = v4("trace", out, "--ids", "1,2,3,4,5", "--out", tmp_path / "t.safetensors", "--json")
    assert (traced.code, traced.err) == (0, "")
    logits = [x for name, x in load_file(tmp_path / "t.safetensors").items() if "logits" in name]
    assert logits and all(np.isfinite(x.astype(np.float32)).all() for x in logits)


def test_the_trunk_of_a_dspark_parent_runs_whole(
    family: dict[str, Path],
    v4: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Of the parent itself and of the replica that only drops its drafters: the same numbers."""
    recipe = tmp_path / "whole.yaml"
    recipe.write_text("name: whole\nkeep: {mtp: drop}\nstore: {dtype: native}\n")
    for like in ("flash-0731", "pro-0813"):
        out = tmp_path / like
        done = v4("slice", "--recipe", recipe, "--parent", family[like], "--out", out, "--json")
        assert done.code == 0
        traces = []
        for model in (family[like], out):
            path = tmp_path / f"{like}-{model.parent.name}.safetensors"
            v4("trace", model, "--ids", "1,2,3,4,5", "--out", path, "--json")
            traces.append(load_file(path))
        assert traces[0].keys() == traces[1].keys()
        assert all(np.array_equal(traces[0][name], traces[1][name]) for name in traces[0])


@pytest.mark.parametrize("dtype", ["native", "fp8", "bf16"])
def test_base_with_arbitrary_scales_is_never_stored_as_e8m0(
    dtype: str,
    family: dict[str, Path],
    v4: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Its F32 scales are no powers of two; a cut through a block keeps the largest of them."""
    scales = [
        np.frombuffer(tensor.data, np.float32)
        for name, tensor in parents.read_tensors(family["flash-base"]).items()
        if name.endswith(".scale")
    ]
    assert (np.frexp(np.concatenate(scales))[0] != 0.5).all()
    recipe = tmp_path / "cut.yaml"
    recipe.write_text(
        "name: cut\nkeep: {hidden_size: {keep: 200, by: random}, experts: {keep: 4}}\n"
        f"store: {{dtype: {dtype}}}\n"
    )
    words = ("--recipe", recipe, "--parent", family["flash-base"])
    sliced = json.loads(v4("slice", *words, "--out", tmp_path / "out", "--json").out)
    dtypes = {name: t.dtype for name, t in parents.read_tensors(tmp_path / "out").items()}
    assert "F8_E8M0" not in dtypes.values()
    is_quantized = dtype != "bf16"
    assert ("F8_E4M3" in dtypes.values()) == is_quantized
    assert all(dtypes[name] == "F32" for name in dtypes if name.endswith(".scale"))
    assert (sliced["report"]["requantized"]["tensors"] > 0) == is_quantized
    assert sliced["inexact"].keys() == {"requantize" if is_quantized else "dequantize"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "V4.1": (
        {
            "architectures": ["DeepseekV41ForCausalLM"],
            "model_type": "deepseek_v41",
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]},
            "text_config": {"model_type": "deepseek_v41_text", "hidden_size": 5120},
            "vision_config": {"hidden_size": 1024},
        },
        "this is DeepSeek-V4.1, whose layers V4 does not have (engram, 32x32 blocks)",
    ),
    "Vision-Exp": (
        {"model_type": "deepseek_v4", "hidden_size": 4096, "vision_config": {"patch_size": 14}},
        "this is DeepSeek-V4-Flash-Vision-Exp, which has a vision tower",
    ),
    "V3.2": (
        {
            "architectures": ["DeepseekV32ForCausalLM"],
            "model_type": "deepseek_v32",
            "kv_lora_rank": 512,
            "hidden_size": 7168,
        },
        "this is DeepSeek-V3 or V3.2, an earlier architecture (MLA, no hyper-connections)",
    ),
    "Llama": (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096},
        "this is a 'llama' model",
    ),
}


@pytest.mark.parametrize("verb", ["inspect", "convert", "plan"])
@pytest.mark.parametrize("family_name", REFUSED)
def test_other_families_are_refused_with_what_they_are(
    family_name: str,
    verb: str,
    v4: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    config, sentence = REFUSED[family_name]
    weights = {"model.safetensors": {"w": parents.RawTensor("F32", (1,), bytes(4))}}
    folder = parents.write_checkpoint(tmp_path / "other", config, weights, index=False)
    words = {
        "inspect": (folder,),
        "convert": (folder, tmp_path / "out", "--to", "bf16"),
        "plan": ("--recipe", "demo", "--parent", folder),
    }
    done = v4(verb, *words[verb])
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: {sentence}; v4surgery cuts DeepSeek-V4 only")
    assert "config.json" in done.err and not (tmp_path / "out").exists()
