"""Sparse attention, and the choice of an indexer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from v4surgery.kernels.cases import Arguments, Case, Verdict, num_different, relative_error

# Rounding a weight to bf16 moves it by up to 2^-8 of itself, 1.66e-3 in the root mean square over
# all mantissas; the weights' errors are independent, so they meet the sum as they meet its norm.
# The result is rounded once more: sqrt(2) * 1.66e-3 = 2.34e-3, and a quarter for small samples.
BF16_BOUND = 3e-3
# A score is a float32 sum of head_dim products, sqrt(512) * 2^-24 = 1.4e-6 of its terms' norm;
# exp2 on a GPU adds 2^-22, and so does the sum of the values.
FLOAT32_BOUND = 3e-6
# Worst case of a score, relative to the sum of its terms' magnitudes: 128 products in 8 steps of a
# tensor core that cuts off below 2^-22, then 64 additions at 2^-24 each: less than 2^-18 together.
SCORE_BOUND = 2.0**-18
CHUNK_BYTES = 1 << 30

MakeIndex = Callable[[int, int, int, int, torch.Generator], Tensor]


def randn(generator: torch.Generator, *shape: int, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device) * std


def scattered(batch: int, num_queries: int, num_rows: int, size: int, g: torch.Generator) -> Tensor:
    """Even rows in any order, repeats among them, a fifth -1; the first query has no key."""
    rows = torch.randint(
        -num_rows // 5, num_rows, (batch, num_queries, size), generator=g, device=g.device
    )
    index = torch.where(rows < 0, -1, rows // 2 * 2)
    index[:, :1] = -1
    return index


def window(num_queries: int, size: int, g: torch.Generator) -> Tensor:
    """Slots of a sliding window behind ``size`` older keys, ``(S, size)``."""
    starts = torch.arange(1, num_queries + 1, device=g.device)
    return starts[:, None] + torch.arange(size, device=g.device)


def chosen_entries(visible: Tensor, num_entries: int, topk: int, g: torch.Generator) -> Tensor:
    """Ascending entries, random among the visible ones of each query, -1 behind them."""
    draws = torch.rand(len(visible), num_entries, generator=g, device=g.device)
    entries = torch.arange(num_entries, device=g.device)
    draws.masked_fill_(entries >= visible[:, None], 2.0)
    chosen = draws.topk(min(topk, num_entries), largest=False).indices.sort().values
    order = torch.where(chosen < visible[:, None], chosen, num_entries).sort().values
    return torch.where(order < num_entries, order, -1)


def full_window_and_entries(
    batch: int, num_queries: int, num_rows: int, size: int, g: torch.Generator
) -> Tensor:
    """As in the middle of a long text: 128 newest keys, and entries out of the last rows."""
    num_entries = num_rows - num_queries - 128
    visible = torch.full((num_queries,), num_entries, device=g.device)
    entries = chosen_entries(visible, num_entries, size - 128, g) + num_queries + 128
    return torch.cat((window(num_queries, 128, g), entries), -1).expand(batch, -1, -1)


def prefill_of_ratio_4(
    batch: int, num_queries: int, num_rows: int, size: int, g: torch.Generator
) -> Tensor:
    """As a prefill from the start has it: keys of the future and before the start are -1."""
    slots = window(num_queries, 128, g)
    slots = torch.where(slots >= 128, slots, -1)
    visible = torch.arange(1, num_queries + 1, device=g.device) // 4
    entries = chosen_entries(visible, num_rows - num_queries - 128, size - 128, g)
    entries = torch.where(entries < 0, -1, entries + num_queries + 128)
    return torch.cat((slots, entries), -1).expand(batch, -1, -1)


def attention_formula(q: Tensor, kv: Tensor, sink: Tensor, index: Tensor, scale: float) -> Tensor:
    """In float64; a query's softmax is taken relative to its largest score or sink."""
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    step = max(CHUNK_BYTES // (8 * q.shape[0] * max(index.shape[-1], 1) * q.shape[-1]), 1)
    for begin in range(0, q.shape[1], step):
        part = index[:, begin : begin + step].long()
        rows = part.clamp_min(0).flatten(1)[..., None].expand(-1, -1, kv.shape[-1])
        keys = kv.gather(1, rows).double().unflatten(1, part.shape[1:])
        keys = keys.masked_fill((part < 0)[..., None], 0.0)
        scores = q[:, begin : begin + step].double() @ keys.mT * scale
        scores = scores.masked_fill((part < 0)[:, :, None], float("-inf"))
        top = torch.cat((scores, sink.double().expand(scores.shape[:-1])[..., None]), -1).amax(-1)
        weights = (scores - top[..., None]).exp()
        total = weights.sum(-1) + (sink.double() - top).exp()
        out[:, begin : begin + step] = weights @ keys / total[..., None]
    return out


def attention(
    label: str,
    queries: tuple[int, int, int, int],
    num_rows: int,
    size: int,
    make_index: MakeIndex = scattered,
    *,
    dtype: torch.dtype = torch.bfloat16,
    is_transposed: bool = False,
    num_named: int | None = None,
    real: bool = False,
) -> Case:
    """Attention of ``(B, S, N, H)`` to ``size`` of ``num_rows`` keys; rows without a name are NaN.

    ``num_named`` counts the keys that are no -1, of all queries, where they are not all.
    """
    batch, num_queries, heads, head_dim = queries

    def make(device: torch.device, g: torch.Generator) -> Arguments:
        index = make_index(batch, num_queries, num_rows, size, g)
        q = randn(g, *queries).to(dtype)
        if is_transposed:
            q, index = q.transpose(1, 2).contiguous().transpose(1, 2), index.int()
        is_named = torch.zeros(batch, num_rows + 1, dtype=torch.bool, device=device)
        is_named.scatter_(1, index.flatten(1).long() % (num_rows + 1), value=True)
        kv = randn(g, batch, num_rows, head_dim).to(dtype)
        kv = kv.masked_fill(~is_named[:, :num_rows, None], float("nan"))
        return (q, kv, randn(g, heads), index, head_dim**-0.5), {}

    def check(result: Tensor, args: tuple[Any, ...], _: object) -> Verdict:
        bound = BF16_BOUND if dtype == torch.bfloat16 else FLOAT32_BOUND
        if result.dtype != dtype:
            return Verdict(float("inf"), bound)
        return relative_error(result, attention_formula(*args), bound)

    num_bytes = dtype.itemsize * batch * head_dim * (2 * num_queries * heads + num_rows)
    flops = 4 * heads * head_dim * (num_named or batch * num_queries * size)
    num_bytes += 8 * batch * num_queries * size
    return Case("sparse_attention", label, make, check, num_bytes, flops, real)


def indexer_formula(
    q: Tensor, k: Tensor, weights: Tensor, part: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """float64 scores of one query ``(C,)``, and the sum of their terms' magnitudes."""
    query, keys = q[part].double(), k[part[0]].double()
    weight = weights[part].double()
    scores = (query @ keys.mT).relu().mT @ weight
    return scores, keys.abs() @ (query.abs().mT @ weight.abs())


def is_valid_choice(result: Tensor, num_visible: Tensor, count: int, num_entries: int) -> bool:
    """As many different entries as there are to choose, all in the past, and -1 for the rest."""
    if result.dtype != torch.int64 or result.shape != (*num_visible.shape, count):
        return False
    is_chosen = result >= 0
    limit = num_visible.clamp_max(num_entries)[..., None]
    ascending = result.sort(-1).values
    is_repeated = (ascending[..., 1:] == ascending[..., :-1]) & (ascending[..., 1:] >= 0)
    is_wrong = (result < -1) | (result >= limit)
    is_wrong |= is_chosen.sum(-1, keepdim=True) != limit.clamp_max(count)
    return not (is_wrong.any() or is_repeated.any())


def shortfall(chosen: Tensor, scores: Tensor, magnitudes: Tensor) -> float:
    """How far the worst chosen score is below the last that should be, in units of its bound."""
    entries = chosen[chosen >= 0]
    if not len(entries):
        return 0.0
    best = scores.topk(len(entries))
    slack = SCORE_BOUND * (magnitudes[entries] + magnitudes[best.indices[-1]])
    return float(((best.values[-1] - scores[entries]) / slack).max())


def check_choice(result: Tensor, args: tuple[Any, ...], _: object) -> Verdict:
    """Against float64: near-ties may fall either way, everything else may not."""
    q, k, weights, num_visible, topk = args
    if not is_valid_choice(result, num_visible, min(topk, k.shape[1]), k.shape[1]):
        return Verdict(float("inf"), 1.0)
    worst = 0.0
    for part in list(product(*map(range, num_visible.shape)))[:: num_visible.numel() // 256 + 1]:
        scores, magnitudes = indexer_formula(q, k, weights, part)
        worst = max(worst, shortfall(result[part], scores[: int(num_visible[part])], magnitudes))
    return Verdict(worst, 1.0)


def indexer(
    label: str,
    queries: tuple[int, int, int, int],
    num_entries: int,
    topk: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    first: int = 0,
    real: bool = False,
) -> Case:
    """The choice of ``(B, S, X, Y)`` queries from position ``first``, at ratio 4."""
    batch, num_queries, heads, head_dim = queries

    def make(device: torch.device, g: torch.Generator) -> Arguments:
        q, k = randn(g, *queries).to(dtype), randn(g, batch, num_entries, head_dim).to(dtype)
        weights = randn(g, batch, num_queries, heads, std=(heads * head_dim) ** -0.5)
        positions = torch.arange(first, first + num_queries, device=device)
        return (q, k, weights, ((positions + 1) // 4).expand(batch, -1), topk), {}

    visible = sum(min((first + t + 1) // 4, num_entries) for t in range(num_queries))
    num_bytes = dtype.itemsize * batch * head_dim * (num_queries * heads + num_entries)
    num_bytes += batch * num_queries * (4 * heads + 8 + 8 * min(topk, num_entries))
    flops = 2 * batch * heads * head_dim * visible
    return Case("indexer_topk", label, make, check_choice, num_bytes, flops, real)


def make_ties(device: torch.device, g: torch.Generator) -> Arguments:
    """Small integers, so that every sum is exact: most scores are equal to others, many are 0."""
    q, k = (randn(g, *shape).round().bfloat16() for shape in ((2, 3, 3, 4), (2, 40, 4)))
    weights = randn(g, 2, 3, 3).sign() / 4
    return (q, k, weights, torch.tensor([[40, 33, 7], [0, 12, 90]], device=device), 12), {}


def check_ties(result: Tensor, args: tuple[Any, ...], _: object) -> Verdict:
    """Exact: a stable sort of exact scores."""
    q, k, weights, num_visible, topk = args
    expected = torch.full_like(result, -1)
    for part in product(*map(range, num_visible.shape)):
        scores = indexer_formula(q, k, weights, part)[0][: int(num_visible[part])]
        best = scores.sort(descending=True, stable=True).indices[:topk]
        expected[part][: len(best)] = best
    return num_different(result.sort(-1).values, expected.sort(-1).values)


FLASH = (1, 4096, 64, 512)
FLASH_INDEX = (1, 4096, 64, 128)

PREFILL_NAMED = sum(min(t, 128) + min(t // 4, 512) for t in range(1, 4097))

CASES: tuple[Case, ...] = (
    attention("2 queries, 5 heads of 48, 37 keys", (1, 2, 5, 48), 60, 37),
    attention("2 x 2 queries, 3 heads of 64, 70 keys", (2, 2, 3, 64), 90, 70),
    attention("head_dim 80, transposed, int32", (1, 2, 2, 80), 30, 9, is_transposed=True),
    attention("float32, 2 heads of 20, 40 keys", (1, 2, 2, 20), 50, 40, dtype=torch.float32),
    attention("33 heads of 512, one tile", (1, 2, 33, 512), 30, 20),
    attention("no queries", (1, 0, 4, 64), 10, 5),
    attention("no keys", (1, 2, 4, 64), 10, 0),
    attention("4,096 x 640 keys", FLASH, 4224 + 1024, 640, full_window_and_entries, real=True),
    attention(
        "4,096-token prefill, CSA",
        FLASH,
        4224 + 1024,
        640,
        prefill_of_ratio_4,
        num_named=PREFILL_NAMED,
        real=True,
    ),
    attention("4,096 x 160 keys", FLASH, 4224 + 32, 160, full_window_and_entries, real=True),
    attention("4,096 x 128 keys", FLASH, 4224, 128, full_window_and_entries, real=True),
    attention("100 queries, 64 heads, 333 scattered", (1, 100, 64, 512), 900, 333, real=True),
    attention("3 queries, 64 heads, 640 scattered", (3, 1, 64, 512), 900, 640, real=True),
    attention(
        "decode, 640 keys", (1, 1, 64, 512), 129 + 1024, 640, full_window_and_entries, real=True
    ),
    attention(
        "decode, 8,320 keys", (1, 1, 64, 512), 129 + 8192, 8320, full_window_and_entries, real=True
    ),
    attention(
        "replica, 4,096 x 320, 24 heads of 64",
        (1, 4096, 24, 64),
        4224 + 1024,
        320,
        prefill_of_ratio_4,
        real=True,
    ),
    attention("float32, 64 x 640 keys", (1, 64, 64, 512), 900, 640, dtype=torch.float32, real=True),
    indexer("3 queries, 5 heads of 24, 7 of 40", (2, 3, 5, 24), 40, 7, first=150),
    indexer("sees a part", (1, 4, 4, 32), 30, 5, first=17),
    indexer("sees no more than topk", (1, 3, 4, 32), 30, 9, first=20),
    indexer("all entries are chosen", (1, 3, 2, 16), 6, 9, first=12),
    indexer("no queries", (1, 0, 2, 16), 6, 3),
    indexer("no entries", (1, 2, 2, 16), 0, 3),
    indexer("float32", (1, 2, 3, 20), 40, 6, dtype=torch.float32, first=120),
    Case("indexer_topk", "equal scores", make_ties, check_ties),
    indexer("4,096 queries, 512 of 1,024", FLASH_INDEX, 1024, 512, real=True),
    indexer("decode, 512 of 1,024", (1, 1, 64, 128), 1024, 512, first=4095, real=True),
    indexer(
        "64 queries, 512 of 262,144", (1, 64, 64, 128), 262144, 512, first=2**20 - 64, real=True
    ),
    indexer("decode, 512 of 262,144", (1, 1, 64, 128), 262144, 512, first=2**20 - 1, real=True),
    indexer("replica, 192 of 1,000", (2, 1000, 16, 96), 1000, 192, first=3000, real=True),
    indexer(
        "float32, 64 queries",
        (1, 64, 64, 128),
        1024,
        512,
        dtype=torch.float32,
        first=4032,
        real=True,
    ),
)
