"""The forward through the Triton kernels, interpreted on the CPU, beside the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.parents import SMALL, write_parent
from v4surgery.checkpoint.reader import Checkpoint, open_checkpoint
from v4surgery.kernels.dispatch import Ops
from v4surgery.model.cache import Cache
from v4surgery.model.loader import load_model
from v4surgery.model.numerics import Numerics
from v4surgery.model.streaming import Streamer, StreamOptions

CHANGES = {
    **SMALL,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_hash_layers": 0,
    "compress_ratios": [4, 8, 0],
    "index_topk": 2,
    "sliding_window": 4,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 2,
}
LENGTH = 17


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("parent") / "small"
    return open_checkpoint(write_parent(folder, changes=CHANGES))


def numerics(mode: str, implementation: str) -> Numerics:
    dtype = torch.bfloat16 if mode == "official" else torch.float32
    return Numerics(mode, dtype, Ops(implementation))


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (1, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("mode", ["exact", "official"])
def test_the_kernels_compute_the_reference_forward(parent: Checkpoint, mode: str) -> None:
    """float32: sums in another order, 2^-24 a step. Official: the kernels round probabilities of
    attention to bf16 as the official code does, which moves its output by 2^-9; where that turns
    an FP8 rounding, one of 64 inputs moves by 2^-4 of itself, 2^-7 of their vector, and a few of
    those in each of three linears and two layers come to some percent."""
    with torch.no_grad():
        expected = load_model(parent, numerics(mode, "reference"))(tokens())
        model = load_model(parent, numerics(mode, "triton"))
        cache = Cache()
        parts = [model(part, cache) for part in tokens().split([LENGTH - 1, 1], 1)]
    actual = torch.cat(parts, 1)
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error < (1e-5 if mode == "exact" else 6e-2)
    assert model.numerics.ops.implementation == "triton"
    assert {"experts", "sparse_attention", "hc_pre", "indexer_topk"} <= set(model.numerics.ops.ran)


def test_streamed_kernels_equal_resident_ones_bit_for_bit(parent: Checkpoint) -> None:
    """With a budget of one expert at a time, each batch fills its rows of the same output."""
    with torch.no_grad():
        resident = load_model(parent, numerics("official", "triton"))(tokens())[0]
    options = StreamOptions(weight_bytes=1)
    with Streamer(parent, numerics("official", "triton"), options=options) as streamer:
        (streamed,) = streamer.run([tokens()[0].tolist()], logits="all")
    assert torch.equal(streamed, resident)
