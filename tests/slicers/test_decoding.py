"""Weights decoded by the kernels are the bytes that numpy gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import parents
from v4surgery.checkpoint.reader import open_checkpoint
from v4surgery.errors import UsageError
from v4surgery.slicers.decoding import device_decoder, find_decoder, host_decoder

STEMS = ("layers.1.attn.wq_b", "layers.1.ffn.experts.2.w1", "layers.1.attn.compressor.wkv")


@pytest.fixture(scope="module", params=["flash", "flash-base"])
def parent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP4 experts and E8M0 scales, or FP8 experts and float32 scales."""
    folder = tmp_path_factory.mktemp("parent") / "parent"
    changes = {**parents.SMALL, "q_lora_rank": 160, "num_hidden_layers": 2}
    changes["compress_ratios"] = [0, 4, 0]
    return parents.write_parent(folder, request.param, changes=changes)


@pytest.mark.parametrize("stem", STEMS)
def test_the_kernels_decode_what_numpy_decodes(parent: Path, stem: str) -> None:
    decoder = device_decoder(torch.device("cpu"))  # interpreted
    with open_checkpoint(parent) as checkpoint:
        stored = checkpoint.tensors[stem]
        num_rows, num_cols = checkpoint.catalogue.shape(stored.entry)
        some_rows = np.random.default_rng(0).permutation(num_rows)[: num_rows // 3]
        some_cols = np.random.default_rng(1).permutation(num_cols)[: num_cols // 2]
        for rows in (slice(0, 8), slice(5, num_rows), np.sort(some_rows)):
            for cols in (None, some_cols):
                expected = host_decoder(checkpoint, stored, rows, cols)
                assert np.array_equal(decoder(checkpoint, stored, rows, cols), expected)


def test_without_a_gpu_auto_is_numpy_and_cuda_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert find_decoder("auto") is host_decoder is find_decoder("cpu")
    with pytest.raises(UsageError, match="weights cannot be decoded there"):
        find_decoder("cuda")
