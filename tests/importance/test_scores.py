"""Each score is what brute force computes from recorded activations."""

from __future__ import annotations

import numpy as np
import pytest

from tests.importance import brute_force as brute
from tests.importance.conftest import Scored
from tests.slicers.conftest import ODD
from v4surgery.model.rope import rope_frequencies

# The activations are the same, bit for bit. Between them and a score lie float32 sums of at most
# n = 480 terms (heads x head_dim), each off by n 2^-24 = 3e-5 of its largest terms, three in a
# row: 1e-4 of the largest score of the vector.
TOLERANCE = 1e-4
BLOCKS = [*(f"layers.{i}." for i in range(7)), "mtp.0."]
EVERY_BLOCK = pytest.mark.parametrize("prefix", BLOCKS)


def assert_close(scores: np.ndarray, wanted: np.ndarray) -> None:
    assert scores.dtype == np.float32 and scores.shape == wanted.shape
    assert np.abs(wanted).max() > 0
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


@EVERY_BLOCK
def test_contribution_is_the_norm_of_what_a_head_alone_adds(scored: Scored, prefix: str) -> None:
    heads, groups = brute.head_contributions(scored.of(prefix))
    assert_close(scored.scores[f"contribution/num_attention_heads/{prefix}"], heads)
    assert_close(scored.scores[f"contribution/o_groups/{prefix}"], groups)


@EVERY_BLOCK
def test_activation_of_ranks_weighs_by_what_reads_them(scored: Scored, prefix: str) -> None:
    measured = scored.of(prefix)
    wanted = brute.query_activation(measured)
    assert_close(scored.scores[f"activation/q_lora_rank/{prefix}"], wanted)
    wanted = brute.output_activation(measured)
    assert_close(scored.scores[f"activation/o_groups*o_lora_rank/{prefix}"], wanted)


@EVERY_BLOCK
def test_energy_of_nope_dims_is_that_of_all_pairs(scored: Scored, prefix: str) -> None:
    wanted = brute.nope_energy(scored.of(prefix))
    assert_close(scored.scores[f"energy/nope/{prefix}"], wanted)


@pytest.mark.parametrize("prefix", ["layers.1.", "layers.4.", "layers.6."])
def test_index_heads_count_by_their_share_of_the_scores(scored: Scored, prefix: str) -> None:
    frequencies = rope_frequencies(scored.parent.config, 4).double().numpy()
    heads, dims = brute.index_scores(scored.of(prefix), frequencies)
    assert_close(scored.scores[f"contribution/index_n_heads/{prefix}"], heads)
    assert_close(scored.scores[f"energy/index_nope/{prefix}"], dims)


def test_layers_without_an_indexer_have_no_scores_of_one(scored: Scored) -> None:
    places = {key.rpartition("/")[2] for key in scored.scores if "/index_" in key}
    assert places == {"layers.1.", "layers.4.", "layers.6."}


@EVERY_BLOCK
def test_reap_and_frequency_and_neurons_are_those_of_each_experts_tokens(
    scored: Scored, prefix: str
) -> None:
    reap, frequency, neurons = brute.expert_scores(scored.of(prefix))
    assert_close(scored.scores[f"reap/n_routed_experts/{prefix}"], reap)
    assert_close(scored.scores[f"frequency/n_routed_experts/{prefix}"], frequency)
    assert frequency.sum() == pytest.approx(ODD["num_experts_per_tok"])
    head = "activation/moe_intermediate_size."
    found = {k.split("/")[1] for k in scored.scores if k.startswith(head) and k.endswith(prefix)}
    assert found == {f"moe_intermediate_size.{name}" for name in neurons}
    for name, wanted in neurons.items():
        assert_close(scored.scores[f"{head}{name}/{prefix}"], wanted)


def test_frequency_in_hash_layers_is_that_of_the_tokens_in_the_table(scored: Scored) -> None:
    table = scored.weights["layers.0.ffn.gate.tid2eid"]
    chosen = np.concatenate([table[prompt].reshape(-1) for prompt in scored.prompts])
    tokens = sum(map(len, scored.prompts))
    wanted = np.bincount(chosen, minlength=ODD["n_routed_experts"]) / tokens
    assert_close(scored.scores["frequency/n_routed_experts/layers.0."], wanted)


def test_scores_of_the_model_are_of_the_whole_trunk(scored: Scored) -> None:
    for key, wanted in brute.model_scores(scored.of("")).items():
        assert_close(scored.scores[key], wanted)
    counts = np.bincount(np.concatenate(scored.prompts), minlength=ODD["vocab_size"])
    assert_close(scored.scores["frequency/vocab_size/model"], counts / counts.sum())


def test_second_moments_are_means_of_outer_products(scored: Scored) -> None:
    found = scored.scores["second_moment/hidden_size/model"]
    assert_close(found, brute.hidden_moment(scored.of("")))
    # RMS-normalised rows have a mean square of 1, so the trace is the width, less what eps takes.
    assert np.trace(found) == pytest.approx(ODD["hidden_size"], rel=1e-2)
    assert (found == found.T).all()


@EVERY_BLOCK
def test_second_moments_of_blocks_are_group_by_group(scored: Scored, prefix: str) -> None:
    for dim, wanted in brute.block_moments(scored.of(prefix)).items():
        found = scored.scores[f"second_moment/{dim}/{prefix}"]
        assert_close(found, wanted)
        assert (found == np.swapaxes(found, -1, -2)).all()


def test_every_axis_has_its_default_score_in_every_block(scored: Scored) -> None:
    from v4surgery.importance.names import SCORED

    keys = scored.scores.keys()
    for item in SCORED:
        for score in item.scores:
            assert any(key.startswith(f"{score}/{item.dim}") for key in keys), item
