"""The model that trains is the model that v4surgery runs, and training it works."""

from __future__ import annotations

import json
from pathlib import Path

import export
import numpy as np
import pytest
import sinkhorn
import torch
import train
from model import Context, TrainableV4
from muon import Muon, orthogonalise
from torch import nn

import v4surgery
from v4surgery.catalogue import Catalogue
from v4surgery.model.cache import Cache, LayerCache, Progress
from v4surgery.model.loader import load_model
from v4surgery.model.numerics import Numerics
from v4surgery.model.transformer import Transformer

# All six kinds of layer and the drafter. Sixteen index heads: with four a score is exactly 0 for
# one entry in sixteen, and the two break ties in other ways.
SMALL = train.CONFIG.replace(
    vocab_size=128,
    moe_intermediate_size=32,
    hidden_size=64,
    q_lora_rank=32,
    n_routed_experts=4,
    num_hidden_layers=6,
    compress_ratios=(0, 4, 128, 0, 4, 128, 0),
    index_n_heads=16,
    index_topk=16,
)


@pytest.fixture(scope="module")
def model() -> TrainableV4:
    torch.manual_seed(0)
    made = TrainableV4(SMALL)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def test_trainable_forward_is_the_forward_of_the_package(model: TrainableV4) -> None:
    found = export.tensors(model)
    ours = Transformer(SMALL, Numerics(), drafters=True)
    for entry in Catalogue(SMALL).entries():
        path, _, leaf = (entry.stem + entry.template.suffix).rpartition(".")
        module, value = ours.get_submodule(path), found[entry.stem]
        if value.is_floating_point():
            setattr(module, leaf, nn.Parameter(value))
        else:
            module.register_buffer(leaf, value)
    ids = torch.randint(0, SMALL.vocab_size, (2, 257))
    now, upcoming = ids[:, :-1], ids[:, 1:]
    with torch.no_grad():
        x, drafted = model(ids, Context(torch.float32))
        h, _ = ours.run_blocks(now, Cache())
        logits = ours.logits(h)
        mtp = ours.mtp[0].draft(
            h,
            ours.embed(upcoming),
            upcoming,
            Progress.start(2, torch.device("cpu")).advance(256),
            LayerCache(),
        )
    # float32 sums of up to 512 terms in another order through 7 blocks: about 7 sqrt(512) eps / 2.
    bound = 7 * 512**0.5 * 2**-24
    assert (x @ model.head.T - logits).norm() <= bound * logits.norm()
    assert (drafted - mtp).norm() <= bound * mtp.norm()


def test_sinkhorn_kernel_has_the_gradient_of_the_formula() -> None:
    torch.manual_seed(1)
    x = torch.rand(3, 50, 4, 4).add_(0.05).requires_grad_()
    grad = torch.randn(3, 50, 4, 4)
    y = sinkhorn._Sinkhorn.apply(x, 20, 1e-6)
    (actual,) = torch.autograd.grad(y, x, grad)
    exact = x.detach().double().requires_grad_()
    expected = sinkhorn.plain_sinkhorn(exact, 20, 1e-6)
    (wanted,) = torch.autograd.grad(expected, exact, grad.double())
    # 39 normalisations of float32, each rounding a few times; entries are below 1, gradients 10.
    assert (y - expected).abs().max() < 39 * 2**-24
    assert (actual - wanted).abs().max() < 10 * 39 * 2**-24


def test_newton_schulz_brings_singular_values_to_one() -> None:
    torch.manual_seed(2)
    for shape in ((3, 64, 128), (2, 96, 32)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.99 and values.max() < 1.01


def test_muon_update_has_the_size_that_it_says() -> None:
    torch.manual_seed(3)
    weight = nn.Parameter(torch.zeros(2, 48, 96))
    weight.grad = torch.randn_like(weight)
    Muon([weight], lr=0.5, decay=0.0).step()
    assert weight.square().mean().sqrt().item() == pytest.approx(0.5 * 0.18, rel=1e-2)


def test_training_learns_and_its_checkpoint_opens_and_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = SMALL.replace(num_hidden_layers=2, compress_ratios=(4, 128, 0), num_hash_layers=1)
    monkeypatch.setattr(train, "CONFIG", tiny)
    text = torch.arange(24).repeat(60).int()
    settings = train.Settings(steps=10, batch=2, seq=128, warmup_steps=3)
    made, steps = train.train(settings, text, text[:300], tmp_path / "log.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == 10 and lines[-1]["held_out"] < lines[0]["loss"] - 1
    assert made.layers[1].ffn.bias.abs().max() > 0  # loads were balanced
    export.write_published(export.tensors(made), tiny, tmp_path / "parent", {})
    with v4surgery.open(tmp_path / "parent") as checkpoint:
        stored = checkpoint.tensors["layers.1.ffn.experts.2.w1"]
        assert stored.fmt == "FP4"
        # The last steps trained on what FP4 stores, so storing it changes nothing.
        trained = train.fake_fp4(made.layers[1].ffn.w1.detach())[2].numpy()
        assert np.array_equal(checkpoint.read_float(stored, slice(0, 32)), trained)
        logits = load_model(checkpoint, Numerics())(text[None, :128].long())
        loss = nn.functional.cross_entropy(logits[0, :-1], text[1:128].long())
        assert loss.item() < lines[0]["loss"] - 1
