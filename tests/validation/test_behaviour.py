"""Grade three: a replica's activations beside its parent's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import v4surgery
from tests.support.parents import write_parent
from tests.validation.masked_support import TINY, Case, cut, prompts
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.errors import UsageError
from v4surgery.model.numerics import Numerics
from v4surgery.model.streaming import Streamer
from v4surgery.slicers.provenance import read_provenance
from v4surgery.validation.behaviour import BLOCK_TAPS, FREE, TAUGHT, WAYS, Behaviour
from v4surgery.validation.behaviour import compare_behaviour as compare
from v4surgery.validation.mapping import ReplicaMapping
from v4surgery.validation.taps import TapRecorder

IDS = prompts(TINY["vocab_size"], (27, 9))


def behaviour(
    path: Path, parent: Checkpoint, ids: list[list[int]] = IDS, **options: Any
) -> Behaviour:
    with v4surgery.open(path) as replica:
        record = read_provenance(replica)
        return compare(replica, parent, record, ids, make_numerics=Numerics, **options)


def activations(model: Checkpoint, ids: list[list[int]]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    with Streamer(model, Numerics()) as streamer:
        recorder = TapRecorder(("embed", *BLOCK_TAPS, "gate.indices", "logits"), seen.__setitem__)
        streamer.run(ids, observe=recorder, logits="all")
    return seen


def assert_exact(found: Behaviour, way: str) -> None:
    for layer in found.layers:
        assert set(layer.taps[way]) == set(BLOCK_TAPS)
        inexact = [tap for tap, close in layer.taps[way].items() if not close.is_exact]
        assert not inexact, (layer.target, inexact)
        share = layer.router[way].share
        assert share == 1 or share != share, layer.target


@pytest.mark.parametrize("store", ["native", "bf16"])
def test_identity_is_exact_both_ways(tiny: Checkpoint, tmp_path: Path, store: str) -> None:
    found = behaviour(cut(tiny, tmp_path / "r", {}, store={"dtype": store}), tiny)
    for way in WAYS:
        assert_exact(found, way)
    logits = found.logits.to_json()
    assert found.embed.is_exact and logits["kl"] == 0 and logits["top5_agreement"] == 1
    assert logits["perplexity"] == logits["parent_perplexity"]
    assert found.num_tokens == sum(map(len, IDS))


def test_a_depth_only_replica_is_exact_at_every_layer_when_taught(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    found = behaviour(cut(tiny, tmp_path / "r", {"layers": {"ids": [0, 2, 3]}}), tiny)
    assert [layer.source for layer in found.layers] == ["layers.0.", "layers.2.", "layers.3."]
    assert_exact(found, TAUGHT)
    assert found.layers[0].taps[FREE]["out"].is_exact
    assert not found.layers[1].taps[FREE]["in"].is_exact
    assert found.logits.to_json()["kl"] > 0


def test_experts_that_hold_all_chosen_ones_change_nothing(tmp_path: Path) -> None:
    changes = {**TINY, "n_routed_experts": 16}
    with v4surgery.open(write_parent(tmp_path / "p", changes=changes)) as parent:
        ids = [[3, 1]]
        seen = activations(parent, ids)
        chosen = {int(e) for name in seen if "gate" in name for e in seen[name].flatten()}
        kept = sorted(chosen | {min(set(range(16)) - chosen)})
        assert len(kept) < 16
        found = behaviour(cut(parent, tmp_path / "r", {"experts": kept}), parent, ids)
        # A gate of fewer rows may be multiplied in another order: D products, each rounded, change
        # a weight by D units at most, and so what the experts of each layer add to the streams.
        bound = len(found.layers) * parent.config.hidden_size * 2**-24
        for way in WAYS:
            for layer in found.layers:
                assert set(layer.taps[way]) == set(BLOCK_TAPS)
                assert layer.router[way].share == 1
                assert max(tap.relative_error for tap in layer.taps[way].values()) <= bound


def test_numbers_are_those_of_two_whole_runs(tiny_case: Case) -> None:
    parent, path = tiny_case.parent, tiny_case.replica
    with v4surgery.open(path) as replica:
        ids = prompts(replica.config.vocab_size, (27, 9))
        mapping = ReplicaMapping(replica, parent, read_provenance(replica))
        mine = activations(replica, ids)
        theirs = activations(parent, [mapping.ids(torch.tensor(p)).tolist() for p in ids])
        found = behaviour(path, parent, ids)
        for layer, block in zip(found.layers, mapping.blocks, strict=True):
            for tap in BLOCK_TAPS:
                pairs = [
                    (
                        mine[f"{i}/{layer.target}{tap}"].double(),
                        mapping.cut(tap, theirs[f"{i}/{layer.source}{tap}"], block).double(),
                    )
                    for i in range(2)
                ]
                off = sum((a - b).square().sum() for a, b in pairs)
                size = sum(b.square().sum() for _, b in pairs)
                error = layer.taps[FREE][tap].relative_error
                assert error == pytest.approx((off / size).sqrt().item(), rel=1e-9)
            assert layer.taps[TAUGHT]["in"].is_exact
    assert all(set(layer.cka) == set(WAYS) for layer in found.layers)
    assert all(0 <= value <= 1 + 1e-9 for layer in found.layers for value in layer.cka.values())


def test_teacher_forcing_feeds_each_layer_the_parents_input(tiny_case: Case) -> None:
    parent = tiny_case.parent
    with v4surgery.open(tiny_case.replica) as replica:
        ids = prompts(replica.config.vocab_size, (9,))
        mapping = ReplicaMapping(replica, parent, read_provenance(replica))
        theirs = activations(parent, [mapping.ids(torch.tensor(p)).tolist() for p in ids])
        found = behaviour(tiny_case.replica, parent, ids)
        with Streamer(replica, Numerics()) as streamer, torch.no_grad():
            for layer, block in zip(found.layers, mapping.blocks, strict=True):
                given = mapping.cut("in", theirs[f"0/{layer.source}in"], block)
                out = streamer.run_block(
                    streamer.load_block(block.target), given, torch.tensor(ids)
                )
                wanted = mapping.cut("out", theirs[f"0/{layer.source}out"], block)
                off = out.double() - wanted.double()
                error = (off.norm() / wanted.double().norm()).item()
                assert layer.taps[TAUGHT]["out"].relative_error == pytest.approx(error, rel=1e-9)


def test_cka_is_left_out_where_both_have_the_same_channels(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    found = behaviour(cut(tiny, tmp_path / "r", {"experts": [0, 2, 3]}), tiny)
    assert all(layer.cka == {} for layer in found.layers)


def test_what_ran_is_counted_for_each_model(tiny: Checkpoint, tmp_path: Path) -> None:
    found = behaviour(cut(tiny, tmp_path / "r", {"layers": {"ids": [0, 1]}}), tiny)
    # Of the parent five layers and two prompts; of the replica's two layers both ways.
    assert found.ran["parent"]["sparse_attention"] == 5 * 2
    assert found.ran["replica"]["sparse_attention"] == 2 * 2 * 2
    assert 0 < found.bytes_read["replica"] < found.bytes_read["parent"]
    assert len(found.timings) == 5


def test_layers_out_of_order_are_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    path = cut(tiny, tmp_path / "r", {"layers": {"ids": [0, 2]}})
    with v4surgery.open(path) as replica:
        record = read_provenance(replica)
        blocks = record["selections"]["blocks"]
        blocks[0]["source"], blocks[1]["source"] = blocks[1]["source"], blocks[0]["source"]
        with pytest.raises(UsageError, match="not in the parent's order"):
            compare(replica, tiny, record, IDS, make_numerics=Numerics)


def test_no_prompts_are_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no prompts"):
        behaviour(cut(tiny, tmp_path / "r", {}), tiny, [])
