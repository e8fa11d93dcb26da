"""The forward on a CUDA device: what a GPU adds is rounding, and the streaming loader's copies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from v4surgery.checkpoint.reader import Checkpoint, open_checkpoint
from v4surgery.kernels.dispatch import Ops
from v4surgery.model.cache import Cache
from v4surgery.model.loader import load_model
from v4surgery.model.numerics import Numerics
from v4surgery.model.streaming import Streamer, StreamOptions
from v4surgery.synth import plan_synthesis, write_synthesis

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    # Many index heads: with few, many scores are exactly 0 and ties decide.
    folder: Path = tmp_path_factory.mktemp("parent") / "demo"
    write_synthesis(plan_synthesis("demo", layers=6, changes={"index_n_heads": 32}), folder)
    return open_checkpoint(folder)


def tokens(count: int) -> torch.Tensor:
    return torch.randint(0, 1024, (1, count), generator=torch.Generator().manual_seed(7))


def numerics(mode: str, implementation: str = "reference") -> Numerics:
    dtype = torch.bfloat16 if mode == "official" else torch.float32
    return Numerics(mode, dtype, Ops(implementation))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("mode", ["exact", "official"])
def test_streaming_on_the_device_equals_the_resident_model_bit_for_bit(
    parent: Checkpoint, mode: str, implementation: str
) -> None:
    ids, chosen = tokens(200), numerics(mode, implementation)
    with torch.no_grad():
        resident = load_model(parent, chosen, device=CUDA)(ids.cuda())[0].cpu()
    for options in (StreamOptions(), StreamOptions(weight_bytes=1, activations="disk")):
        with Streamer(parent, chosen, CUDA, options) as streamer:
            (streamed,) = streamer.run([ids[0].tolist()], logits="all")
        assert torch.equal(streamed, resident)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_the_device_agrees_with_the_cpu_in_float32(parent: Checkpoint, implementation: str) -> None:
    """Sums in another order: 2^-24 a step, over some hundred steps and layers; 1e-5 is ample."""
    ids = tokens(150)
    with torch.no_grad():
        here = load_model(parent, numerics("exact"))(ids)
        model = load_model(parent, numerics("exact", implementation), device=CUDA)
        there = model(ids.cuda()).cpu()
    assert ((here - there).norm() / here.norm()).item() < 1e-5


def test_the_kernels_agree_with_the_reference_in_mode_official(parent: Checkpoint) -> None:
    """The same roundings, fed by float32 sums in another order.

    A sum that lies within its own error (about 2^-20) of a rounding boundary of bf16 (2^-9) or
    E4M3 (2^-4) falls to the other side, for about one value in 2^10; the flip is one step of one
    value among hundreds, 2^-4 / sqrt(256) of its vector, and grows through the layers until an
    expert is chosen differently somewhere. So nearly all positions are close and single ones far.
    """
    ids = tokens(200)
    with torch.no_grad():
        here, there = (
            load_model(parent, numerics("official", name), device=CUDA)(ids.cuda())[0]
            for name in ("reference", "triton")
        )
    cosines = torch.cosine_similarity(here, there, dim=-1)
    assert cosines.median() > 0.999
    assert (cosines > 0.98).float().mean() > 0.9


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_decoding_on_the_device_equals_prefill(parent: Checkpoint, implementation: str) -> None:
    ids = tokens(140).cuda()
    model = load_model(parent, numerics("exact", implementation), device=CUDA)
    with torch.no_grad():
        whole = model(ids)
        cache = Cache()
        steps = [model(ids[:, :70], cache)]
        steps += [model(ids[:, i : i + 1], cache) for i in range(70, 140)]
    stepped = torch.cat(steps, 1)
    assert ((stepped - whole).norm() / whole.norm()).item() < 1e-5
