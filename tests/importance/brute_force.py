"""Every score a second time: float64 numpy, token by token, from recorded activations.

Nothing here shares code with the package's scoring: weights are decoded by tests.slicers.reference,
activations come from a trace (``v4surgery trace --taps all``), and what no tap shows (queries,
keys, neurons) is computed from them by the formulas of spec/forward.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Trace = Mapping[str, NDArray[Any]]

EPS = 1e-6


@dataclass
class Measured:
    """A model, and what a trace of some prompts holds of one block.

    Attributes:
        weights: Decoded, by stem.
        config: config.json.
        trace: Activations by ``<prompt>/<block><tap>``.
        num_prompts: How many prompts there are.
        prefix: The block.
        ratio: Its compress ratio.
    """

    weights: Mapping[str, NDArray[Any]]
    config: Mapping[str, Any]
    trace: Trace
    num_prompts: int
    prefix: str
    ratio: int

    def weight(self, name: str) -> Array:
        return self.weights[self.prefix + name].astype(np.float64)

    def prompts(self, tap: str) -> list[Array]:
        """The tap in each prompt that has it, ``(S, ...)``."""
        keys = [f"{number}/{self.prefix}{tap}" for number in range(self.num_prompts)]
        values = [self.trace[key] for key in keys if key in self.trace]
        if not tap.startswith("gate."):
            values = [value[0] for value in values]
        return [value.astype(np.float64) for value in values]

    def tokens(self, tap: str) -> Array:
        """The tap of all prompts, ``(T, ...)``."""
        return np.concatenate(self.prompts(tap))


def n(x: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)


def query_ranks(m: Measured, x: Array) -> Array:
    return n(x @ m.weight("attn.wq_a").T) * m.weight("attn.q_norm")


def low_outputs(m: Measured, heads: Array) -> Array:
    """wo_a's output ``(G, L)`` of one token's heads ``(N, H)``."""
    groups, rank = m.config["o_groups"], m.config["o_lora_rank"]
    wo_a = m.weight("attn.wo_a").reshape(groups, rank, -1)
    return np.stack([wo_a[g] @ heads.reshape(groups, -1)[g] for g in range(groups)])


def head_contributions(m: Measured) -> tuple[Array, Array]:
    """Each head muted in turn the other way round: all others zero, through wo_a and wo_b."""
    wo_b, tokens = m.weight("attn.wo_b"), m.tokens("attn.heads")
    num_heads, groups = m.config["num_attention_heads"], m.config["o_groups"]
    heads, of_groups = np.zeros(num_heads), np.zeros(groups)
    for token in tokens:
        for head in range(num_heads):
            alone = np.zeros_like(token)
            alone[head] = token[head]
            heads[head] += np.linalg.norm(wo_b @ low_outputs(m, alone).reshape(-1))
        for group, members in enumerate(np.split(np.arange(num_heads), groups)):
            alone = np.zeros_like(token)
            alone[members] = token[members]
            of_groups[group] += np.linalg.norm(wo_b @ low_outputs(m, alone).reshape(-1))
    return heads / len(tokens), of_groups / len(tokens)


def query_activation(m: Measured) -> Array:
    readers = [m.weight("attn.wq_b")]
    if m.ratio == 4:
        readers.append(m.weight("attn.indexer.wq_b"))
    columns = np.sqrt((np.concatenate(readers) ** 2).sum(0))
    return np.abs(query_ranks(m, m.tokens("attn.in"))).mean(0) * columns


def output_activation(m: Measured) -> Array:
    low = np.stack([low_outputs(m, heads).reshape(-1) for heads in m.tokens("attn.heads")])
    return np.abs(low).mean(0) * np.sqrt((m.weight("attn.wo_b") ** 2).sum(0))


def pooled(m: Measured, x: Array, name: str, width: int) -> Array:
    """Compressed entries before their norm, ``(C, width)``, window by window."""
    ratio, names = m.ratio, f"attn.{name}compressor."
    kv = x @ m.weight(names + "wkv").T
    gate = x @ m.weight(names + "wgate").T
    gate = gate + m.weight(names + "ape")[np.arange(len(x)) % ratio]
    entries = []
    for c in range(len(x) // ratio):
        now = slice(c * ratio, (c + 1) * ratio)
        if ratio == 4:
            slots = [(kv[now, width:], gate[now, width:])]
            if c:
                before = slice((c - 1) * ratio, c * ratio)
                slots.insert(0, (kv[before, :width], gate[before, :width]))
            values, scores = (np.concatenate(part) for part in zip(*slots, strict=True))
        else:
            values, scores = kv[now], gate[now]
        share = np.exp(scores - scores.max(0))
        entries.append((share / share.sum(0) * values).sum(0))
    return np.stack(entries) if entries else np.zeros((0, width))


def nope_energy(m: Measured) -> Array:
    """Mean of (q_j k_j)^2 over every pair of a head's query and a key."""
    size = m.config["head_dim"]
    nope = size - m.config["qk_rope_head_dim"]
    queries, keys = [], []
    for x in m.prompts("attn.in"):
        q = (query_ranks(m, x) @ m.weight("attn.wq_b").T).reshape(-1, size)
        queries.append(n(q)[:, :nope])
        keys.append((n(x @ m.weight("attn.wkv").T) * m.weight("attn.kv_norm"))[:, :nope])
        if m.ratio:
            entries = n(pooled(m, x, "", size)) * m.weight("attn.compressor.norm")
            keys.append(entries[:, :nope])
    q, k = np.concatenate(queries), np.concatenate(keys)
    return np.stack([np.mean((q[:, j, None] * k[None, :, j]) ** 2) for j in range(nope)])


def rotated(x: Array, positions: Array, frequencies: Array) -> Array:
    """RoPE as complex numbers on the last dims."""
    rope = 2 * len(frequencies)
    pairs = x[..., -rope::2] + 1j * x[..., -rope + 1 :: 2]
    angles = np.exp(1j * positions.reshape(-1, *(1,) * (x.ndim - 1)) * frequencies)
    turned = pairs * angles
    flat = np.stack([turned.real, turned.imag], -1).reshape(*x.shape[:-1], rope)
    return np.concatenate([x[..., :-rope], flat], -1)


def index_scores(m: Measured, frequencies: Array) -> tuple[Array, Array]:
    """Contribution of index heads, and energy of index dims."""
    num_heads, size = m.config["index_n_heads"], m.config["index_head_dim"]
    nope = size - m.config["qk_rope_head_dim"]
    mass, pairs = np.zeros(num_heads), 0
    all_q, all_k = [], []
    for x in m.prompts("attn.in"):
        q = (query_ranks(m, x) @ m.weight("attn.indexer.wq_b").T).reshape(-1, num_heads, size)
        k = n(pooled(m, x, "indexer.", size)) * m.weight("attn.indexer.compressor.norm")
        all_q.append(q.reshape(-1, size)[:, :nope])
        all_k.append(k[:, :nope])
        weights = x @ m.weight("attn.indexer.weights_proj").T / np.sqrt(size * num_heads)
        q = rotated(q, np.arange(len(x), dtype=float), frequencies)
        k = rotated(k, np.arange(len(k)) * 4.0, frequencies)
        for t in range(len(x)):
            for c in range((t + 1) // 4):
                mass += np.abs(weights[t]) * np.maximum(q[t] @ k[c], 0)
                pairs += 1
    q, k = np.concatenate(all_q), np.concatenate(all_k)
    return mass / max(pairs, 1), (q**2).mean(0) * (k**2).mean(0)


def expert_scores(m: Measured) -> tuple[Array, Array, dict[str, Array]]:
    """REAP, frequency, and the neurons of each expert that a token reached."""
    limit, experts = m.config["swiglu_limit"], m.config["n_routed_experts"]
    x, indices = m.tokens("ffn.in"), m.tokens("gate.indices").astype(int)
    shares = m.tokens("gate.weights")

    def neurons(name: str, token: Array, share: float) -> Array:
        g = np.minimum(m.weight(f"ffn.{name}.w1") @ token, limit)
        u = np.clip(m.weight(f"ffn.{name}.w3") @ token, -limit, limit)
        return g / (1 + np.exp(-g)) * u * share

    reap, count = np.zeros(experts), np.zeros(experts)
    activity: dict[str, list[Array]] = {}
    for token, chosen, share in zip(x, indices, shares, strict=True):
        for expert, weight in zip(chosen, share, strict=True):
            hidden = neurons(f"experts.{expert}", token, weight)
            unweighted = neurons(f"experts.{expert}", token, 1.0)
            down = m.weight(f"ffn.experts.{expert}.w2")
            reap[expert] += weight * np.linalg.norm(down @ unweighted)
            count[expert] += 1
            activity.setdefault(f"experts.{expert}", []).append(np.abs(hidden))
        hidden = neurons("shared_experts", token, 1.0)
        activity.setdefault("shared_experts", []).append(np.abs(hidden))
    means = {
        name: np.mean(rows, axis=0) * np.sqrt((m.weight(f"ffn.{name}.w2") ** 2).sum(0))
        for name, rows in activity.items()
    }
    return reap / np.maximum(count, 1), count / len(x), means


def collapsed_by_head(m: Measured, h: Array) -> Array:
    """The head's collapse of streams ``(T, M, D)``."""
    flat = h.reshape(len(h), -1)
    weights = {k: m.weights[f"hc_head_{k}"].astype(np.float64) for k in ("fn", "base", "scale")}
    mixes = flat @ weights["fn"].T / np.sqrt((flat**2).mean(1, keepdims=True) + EPS)
    pre = 1 / (1 + np.exp(-(mixes * weights["scale"] + weights["base"]))) + m.config["hc_eps"]
    return np.einsum("tm,tmd->td", pre, h)


def blocks(m: Measured) -> Iterator[Measured]:
    """The trunk's blocks."""
    for i in range(m.config["num_hidden_layers"]):
        yield Measured(
            m.weights,
            m.config,
            m.trace,
            m.num_prompts,
            f"layers.{i}.",
            m.config["compress_ratios"][i],
        )


def relative(energy: Array) -> Array:
    return energy / energy.mean(1, keepdims=True)


def model_scores(m: Measured) -> dict[str, Array]:
    """Scores of channels, streams and layers."""
    channels, streams, influence = [], [], []
    last = np.zeros(0)
    for block in blocks(m):
        h, last = block.tokens("in"), block.tokens("out")
        channels.append(relative((h**2).sum(1)))
        channels += [relative(block.tokens(tap) ** 2) for tap in ("attn.in", "ffn.in")]
        streams.append(relative((h**2).sum(2)))
        a, b = h.reshape(len(h), -1), last.reshape(len(h), -1)
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        influence.append(np.mean(1 - cosine))
    channels.append(relative((last**2).sum(1)))
    final = n(collapsed_by_head(m, last)) * m.weights["norm"].astype(np.float64)
    channels.append(relative(final**2))
    streams.append(relative((last**2).sum(2)))
    return {
        "energy/hidden_size/model": np.concatenate(channels).mean(0),
        "energy/streams/model": np.concatenate(streams).mean(0),
        "influence/layers/model": np.asarray(influence),
    }


def hidden_moment(m: Measured) -> Array:
    rows = [n(block.tokens(tap)) for block in blocks(m) for tap in ("attn.hc", "ffn.hc")]
    last = list(blocks(m))[-1].tokens("out")
    x = np.concatenate([*rows, n(collapsed_by_head(m, last))])
    return np.asarray(sum(np.outer(row, row) for row in x)) / len(x)


def block_moments(m: Measured) -> dict[str, Array]:
    groups = m.config["o_groups"]
    heads = m.tokens("attn.heads")
    q = n(m.tokens("attn.in") @ m.weight("attn.wq_a").T)
    low = np.stack([low_outputs(m, token) for token in heads])
    grouped = heads.reshape(len(heads), groups, -1)

    def moment(x: Array) -> Array:
        return np.asarray(sum(row[..., :, None] * row[..., None, :] for row in x)) / len(x)

    return {
        "q_lora_rank": moment(q),
        "o_groups*o_lora_rank": moment(low),
        "heads": moment(grouped),
    }
