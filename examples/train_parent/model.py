"""V4 as a model to train: whole sequences, every parameter float32, computed in bf16 or float32.

It is the forward of v4surgery.model in mode exact (a test holds the two together), written for
gradients and speed: windows as blocks instead of gathered keys, all experts as two products, no
cache. Parameters have the checkpoint's names; a layer's experts are stacked.

Shapes: B batch, S positions (a multiple of the window and of every ratio), D hidden, M streams,
N heads, H head_dim, R rope dims, W window, C compressed entries, X index heads, E experts, K a
token's, F their width, G groups, L o_lora.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sinkhorn import sinkhorn
from torch import Tensor, nn
from torch.nn import functional as F

from v4surgery.catalogue import Block as BlockSpec
from v4surgery.catalogue import Catalogue
from v4surgery.config import CSA_RATIO, V4Config
from v4surgery.model.rope import rope_frequencies

EPS = 1e-6
NEVER = -1e30  # a finite stand-in for -inf: a row that sees nothing keeps finite gradients


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for the GPU on first use; a CPU runs it as it is."""

    @functools.cache
    def on_gpu() -> Callable[..., Any]:
        torch._dynamo.config.recompile_limit = 64  # a version for each shape, of which few
        return torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def choose(*args: Any) -> Any:
        is_cuda = any(isinstance(a, Tensor) and a.is_cuda for a in args)
        return (on_gpu() if is_cuda else function)(*args)

    return choose


@dataclass
class Context:
    """What blocks share in one forward.

    Attributes:
        dtype: Of the matrix products.
        sparse: Let CSA see only the indexer's choice.
        fake_quant: Experts as FP4 will store them; gradients pass straight through.
        index_losses: How far each indexer is from the attention that it chooses for.
        loads: Tokens of each expert, by block.
    """

    dtype: torch.dtype
    sparse: bool = True
    fake_quant: Callable[[Tensor], Tensor] | None = None
    index_losses: list[Tensor] = field(default_factory=list)
    loads: dict[str, Tensor] = field(default_factory=dict)


@compiled
def rms(x: Tensor, weight: Tensor | None) -> Tensor:
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    return (y if weight is None else y * weight).to(x.dtype)


@compiled
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of interleaved pairs on the last R dims; cos and sin ``(S, 1..., R/2)``."""
    dims = 2 * cos.shape[-1]
    nope, rope = x[..., :-dims], x[..., -dims:].float().unflatten(-1, (-1, 2))
    a, b = rope.unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return torch.cat((nope, turned.to(x.dtype)), -1)


def angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    angle = positions[:, None].float() * frequencies
    return angle.cos(), angle.sin()


@compiled
def pooled(kv: Tensor, gate: Tensor) -> Tensor:
    """Windows ``(B, C, slots, H)`` weighted by softmax over their slots, by channel."""
    return (kv.float() * gate.float().softmax(2)).sum(2)


@compiled
def attend(
    local: Tensor, far: Tensor, sink: Tensor, sees: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax with a sink over window scores ``(B, S, N, 2W)`` and those of entries, C of them."""
    size = local.shape[-1] // 2
    seq = local.shape[1]
    position = torch.arange(seq, device=local.device)[:, None]
    key = torch.arange(2 * size, device=local.device)
    offset, chunk = position % size, position // size
    in_window = (key > offset) & (key <= offset + size) & ((chunk > 0) | (key >= size))
    local = torch.where(in_window[None, :, None], local.float() * scale, NEVER)
    far = torch.where(sees[:, :, None], far.float() * scale, NEVER)
    peak = torch.maximum(local.amax(-1), sink)
    if far.shape[-1]:
        peak = torch.maximum(peak, far.amax(-1))
    peak = peak.detach()[..., None]
    local, far = (local - peak).exp(), (far - peak).exp()
    total = local.sum(-1, keepdim=True) + far.sum(-1, keepdim=True) + (sink[:, None] - peak).exp()
    return local / total, far / total


@compiled
def index_scores(dots: Tensor, weights: Tensor, sees: Tensor) -> Tensor:
    """Dots ``(B, S, X, C)`` and head weights ``(B, S, X)`` to ``(B, S, C)``."""
    score = (dots.float().relu() * weights.float()[..., None]).sum(2)
    return torch.where(sees, score, NEVER)


@compiled
def index_loss(score: Tensor, attention: Tensor, sees: Tensor) -> Tensor:
    """KL from the heads' attention to entries ``(B, S, N, C)`` to the indexer's softmax."""
    target = attention.float().sum(2)
    mass = target.sum(-1, keepdim=True)
    target = target / mass.clamp_min(EPS)
    log_q = torch.where(sees, score, NEVER).log_softmax(-1)
    divergence = target * (target.clamp_min(1e-9).log() - log_q)
    return torch.where(sees & (mass > EPS), divergence, 0.0).sum() / score.shape[0] / score.shape[1]


@compiled
def gated(gate_up: Tensor, weights: Tensor, limit: float) -> Tensor:
    """SwiGLU of all experts ``(T, 2, E, F)``, weighted ``(T, E)``; ``(T, E * F)``."""
    gate, up = gate_up.float().unbind(1)
    hidden = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    return (hidden * weights[..., None]).flatten(1).to(gate_up.dtype)


@compiled
def mixes(h: Tensor, fn: Tensor) -> Tensor:
    flat = h.flatten(-2)
    return (flat @ fn.T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)


@compiled
def split(mixed: Tensor, scale: Tensor, base: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pre and post ``(..., M)`` and the positive matrix ``(..., M, M)`` before Sinkhorn."""
    m = int((mixed.shape[-1] + 1) ** 0.5) - 1
    pre = (mixed[..., :m] * scale[0] + base[:m]).sigmoid() + eps
    post = 2 * (mixed[..., m : 2 * m] * scale[1] + base[m : 2 * m]).sigmoid()
    comb = (mixed[..., 2 * m :] * scale[2] + base[2 * m :]).unflatten(-1, (m, m))
    return pre, post, comb.softmax(-1) + eps


@compiled
def collapse(h: Tensor, pre: Tensor) -> Tensor:
    return (h * pre[..., None]).sum(-2)


@compiled
def expand(h: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = (comb[..., None] * h[..., :, None, :]).sum(-3)
    return post[..., None] * y.float()[..., None, :] + mixed


def matrix(*shape: int) -> nn.Parameter:
    """Uniform of variance 1 / inputs."""
    bound = (3 / shape[-1]) ** 0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def ones(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


def zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


class Compressor(nn.Module):
    """Windows of tokens pooled to one entry each."""

    def __init__(self, config: V4Config, ratio: int, width: int) -> None:
        super().__init__()
        self.ratio = ratio
        channels = width * (2 if ratio == CSA_RATIO else 1)
        self.wkv, self.wgate = (matrix(channels, config.hidden_size) for _ in range(2))
        self.ape, self.norm = zeros(ratio, channels), ones(width)

    def forward(self, x: Tensor, frequencies: Tensor) -> Tensor:
        """``(B, S, D)`` to entries ``(B, C, width)``."""
        kv, gate = x @ self.wkv.to(x.dtype).T, x @ self.wgate.to(x.dtype).T
        kv, gate = (t.unflatten(1, (-1, self.ratio)) for t in (kv, gate))
        gate = gate.float() + self.ape
        if self.ratio == CSA_RATIO:
            kv, gate = _overlapping(kv, 0.0), _overlapping(gate, NEVER)
        entries = rms(pooled(kv, gate).to(x.dtype), self.norm)
        starts = torch.arange(entries.shape[1], device=x.device) * self.ratio
        rotated: Tensor = rotate(entries, *angles(starts, frequencies))
        return rotated


def _overlapping(x: Tensor, first: float) -> Tensor:
    """Previous window with the first half of the channels, then this one with the second half."""
    before, now = x.chunk(2, -1)
    before = F.pad(before[:, :-1], (0, 0, 0, 0, 1, 0), value=first)
    return torch.cat((before, now), 2)


class Indexer(nn.Module):
    """Scores of compressed entries; its inputs pass no gradient on."""

    def __init__(self, config: V4Config) -> None:
        super().__init__()
        self.heads, self.width = config.index_n_heads, config.index_head_dim
        self.wq_b = matrix(self.heads * self.width, config.q_lora_rank)
        self.weights_proj = matrix(self.heads, config.hidden_size)
        self.compressor = Compressor(config, CSA_RATIO, self.width)

    def forward(
        self, x: Tensor, qr: Tensor, cos: Tensor, sin: Tensor, frequencies: Tensor, sees: Tensor
    ) -> Tensor:
        x, qr = x.detach(), qr.detach()
        q = (qr @ self.wq_b.to(x.dtype).T).unflatten(-1, (self.heads, self.width))
        q = rotate(q, cos, sin)
        k = self.compressor(x, frequencies)
        dots = (q.flatten(1, 2) @ k.mT).unflatten(1, (-1, self.heads))
        weights = (x @ self.weights_proj.to(x.dtype).T).float()
        scores: Tensor = index_scores(dots, weights * (self.width * self.heads) ** -0.5, sees)
        return scores


class Attention(nn.Module):
    frequencies: Tensor

    def __init__(self, config: V4Config, ratio: int) -> None:
        super().__init__()
        self.config, self.ratio = config, ratio
        heads, width, rank = config.num_attention_heads, config.head_dim, config.q_lora_rank
        self.wq_a, self.wq_b = matrix(rank, config.hidden_size), matrix(heads * width, rank)
        self.wkv = matrix(width, config.hidden_size)
        self.q_norm, self.kv_norm, self.attn_sink = ones(rank), ones(width), zeros(heads)
        low = config.o_groups * config.o_lora_rank
        self.wo_a = matrix(low, heads * width // config.o_groups)
        self.wo_b = matrix(config.hidden_size, low)
        self.register_buffer("frequencies", rope_frequencies(config, ratio), persistent=False)
        self.compressor = Compressor(config, ratio, width) if ratio else None
        self.indexer = Indexer(config) if ratio == CSA_RATIO else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        config, size = self.config, self.config.sliding_window
        batch, seq, _ = x.shape
        heads, width = config.num_attention_heads, config.head_dim
        cos, sin = angles(torch.arange(seq, device=x.device), self.frequencies)
        qr = rms(x @ self.wq_a.to(x.dtype).T, self.q_norm)
        q = rms((qr @ self.wq_b.to(x.dtype).T).unflatten(-1, (heads, width)), None)
        q = rotate(q, cos[:, None], sin[:, None])
        kv = rotate(rms(x @ self.wkv.to(x.dtype).T, self.kv_norm), cos, sin)
        chunks = kv.unflatten(1, (-1, size))
        keys = torch.cat((F.pad(chunks[:, :-1], (0, 0, 0, 0, 1, 0)), chunks), 2)
        blocks = q.unflatten(1, (-1, size)).flatten(2, 3)
        local = (blocks @ keys.mT).view(batch, seq, heads, 2 * size)
        entries, sees, scores = self._compressed(x, qr, cos, sin, context)
        far = (q.flatten(1, 2) @ entries.mT).view(batch, seq, heads, -1)
        near_p, far_p = attend(local, far, self.attn_sink, sees, width**-0.5)
        if scores is not None:
            context.index_losses.append(index_loss(scores, far_p.detach(), sees))
        near_p, far_p = near_p.to(x.dtype), far_p.to(x.dtype)
        out = (near_p.reshape(batch, seq // size, size * heads, 2 * size) @ keys).view_as(q)
        out = out + (far_p.flatten(1, 2) @ entries).view_as(q)
        out = rotate(out, cos[:, None], -sin[:, None])
        grouped = out.flatten(2).unflatten(-1, (config.o_groups, -1))
        wo_a = self.wo_a.to(x.dtype).unflatten(0, (config.o_groups, -1))
        low = torch.einsum("bsgd,gld->bsgl", grouped, wo_a).flatten(2)
        return low @ self.wo_b.to(x.dtype).T

    def _compressed(
        self, x: Tensor, qr: Tensor, cos: Tensor, sin: Tensor, context: Context
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Entries ``(B, C, H)``, which of them each query sees, and the indexer's scores."""
        batch, seq, _ = x.shape
        if self.compressor is None:
            none = x.new_zeros(batch, 0, self.config.head_dim)
            return none, torch.zeros(1, seq, 0, dtype=torch.bool, device=x.device), None
        entries = self.compressor(x, self.frequencies)
        past = (torch.arange(seq, device=x.device) + 1) // self.ratio
        sees = (torch.arange(entries.shape[1], device=x.device) < past[:, None])[None]
        if self.indexer is None:
            return entries, sees, None
        scores = self.indexer(x, qr, cos[:, None], sin[:, None], self.frequencies, sees)
        if context.sparse and entries.shape[1] > self.config.index_topk:
            best = scores.detach().topk(self.config.index_topk, -1).indices
            sees = sees & torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
        return entries, sees, scores


class Experts(nn.Module):
    """The gate, routed experts ``(E, ...)`` and the shared one, computed for every token."""

    tid2eid: Tensor | None
    bias: Tensor | None

    def __init__(self, config: V4Config, *, is_hash: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        experts, hidden, inner = (
            config.n_routed_experts,
            config.hidden_size,
            config.moe_intermediate_size,
        )
        self.gate = matrix(experts, hidden)
        self.w1, self.w3 = (matrix(experts, inner, hidden) for _ in range(2))
        self.w2 = matrix(experts, hidden, inner)
        self.shared_w1, self.shared_w3 = (matrix(inner, hidden) for _ in range(2))
        self.shared_w2 = matrix(hidden, inner)
        order = torch.rand(config.vocab_size, experts, generator=generator).argsort(1)
        table = order[:, : config.num_experts_per_tok].contiguous()
        self.register_buffer("tid2eid", table if is_hash else None)
        self.register_buffer("bias", None if is_hash else torch.zeros(experts))

    def route(self, x: Tensor, ids: Tensor) -> Tensor:
        """Weights of all experts ``(T, E)``, zero for those not chosen; float32."""
        scores = F.softplus(x.float() @ self.gate.T).sqrt()
        if self.tid2eid is not None:
            chosen = self.tid2eid[ids]
        else:
            chosen = (scores + self.bias).topk(self.config.num_experts_per_tok, -1).indices
        picked = torch.zeros_like(scores).scatter(1, chosen, 1.0)
        weights = scores * picked
        return weights / weights.sum(-1, keepdim=True) * self.config.routed_scaling_factor

    def forward(self, x: Tensor, ids: Tensor, context: Context, prefix: str) -> Tensor:
        flat, dtype = x.flatten(0, 1), x.dtype
        weights = self.route(flat, ids.flatten())
        context.loads[prefix] = (weights.detach() > 0).float().sum(0)
        quant = context.fake_quant or (lambda w: w)
        w1, w2, w3 = (quant(w) for w in (self.w1, self.w2, self.w3))
        up = torch.cat((w1, self.shared_w1[None], w3, self.shared_w3[None])).flatten(0, 1)
        gate_up = (flat @ up.to(dtype).T).view(len(flat), 2, -1, w1.shape[1])
        weights = F.pad(weights, (0, 1), value=1.0)
        down = torch.cat((w2, self.shared_w2[None])).transpose(0, 1).flatten(1)
        return (gated(gate_up, weights, self.config.swiglu_limit) @ down.to(dtype).T).view_as(x)


class Connection(nn.Module):
    """mHC around a sublayer: starts as a plain residual of the mean stream."""

    def __init__(self, config: V4Config, rows: int, scales: int) -> None:
        super().__init__()
        self.config = config
        self.fn = matrix(rows, config.hc_mult * config.hidden_size)
        self.scale, self.base = nn.Parameter(torch.full((scales,), 0.1)), zeros(rows)
        streams = config.hc_mult
        if rows > streams:  # comb: each stream mostly stays itself
            with torch.no_grad():
                self.base[2 * streams :] = 3.0 * torch.eye(streams).flatten()

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Streams to x ``(B, S, D)``, post and comb."""
        pre, post, comb = split(mixes(h, self.fn), self.scale, self.base, self.config.hc_eps)
        comb = sinkhorn(comb, self.config.hc_sinkhorn_iters, self.config.hc_eps)
        return collapse(h, pre), post, comb

    def head(self, h: Tensor) -> Tensor:
        pre = (mixes(h, self.fn) * self.scale + self.base).sigmoid() + self.config.hc_eps
        x: Tensor = collapse(h, pre)
        return x


class Block(nn.Module):
    def __init__(self, config: V4Config, spec: BlockSpec, generator: torch.Generator) -> None:
        super().__init__()
        self.prefix = spec.prefix
        rows = (2 + config.hc_mult) * config.hc_mult
        self.hc_attn, self.hc_ffn = (Connection(config, rows, 3) for _ in range(2))
        self.attn_norm, self.ffn_norm = ones(config.hidden_size), ones(config.hidden_size)
        self.attn = Attention(config, spec.ratio)
        self.ffn = Experts(config, is_hash=spec.is_hash, generator=generator)

    def forward(self, h: Tensor, ids: Tensor, context: Context) -> Tensor:
        x, post, comb = self.hc_attn(h)
        h = expand(h, self.attn(rms(x.to(context.dtype), self.attn_norm), context), post, comb)
        x, post, comb = self.hc_ffn(h)
        y = self.ffn(rms(x.to(context.dtype), self.ffn_norm), ids, context, self.prefix)
        streams: Tensor = expand(h, y, post, comb)
        return streams


class Drafter(Block):
    """The classic MTP block."""

    def __init__(self, config: V4Config, spec: BlockSpec, generator: torch.Generator) -> None:
        super().__init__(config, spec, generator)
        hidden = config.hidden_size
        self.e_proj, self.h_proj = matrix(hidden, hidden), matrix(hidden, hidden)
        self.enorm, self.hnorm, self.norm = ones(hidden), ones(hidden), ones(hidden)
        self.hc_head = Connection(config, config.hc_mult, 1)

    def draft(self, h: Tensor, embedded: Tensor, next_ids: Tensor, context: Context) -> Tensor:
        dtype = context.dtype
        e = rms(embedded.to(dtype), self.enorm) @ self.e_proj.to(dtype).T
        mixed = e[:, :, None] + rms(h.to(dtype), self.hnorm) @ self.h_proj.to(dtype).T
        h = self(mixed.float(), next_ids, context)
        return rms(self.hc_head.head(h).to(dtype), self.norm)


class TrainableV4(nn.Module):
    """Trunk and classic drafter.

    Args:
        config: The model; its drafters are classic.
        seed: Of the hash tables; parameters take torch's own generator.
    """

    def __init__(self, config: V4Config, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        shape = (config.vocab_size, config.hidden_size)
        self.embed = nn.Parameter(torch.randn(shape) * 0.5)
        self.head = nn.Parameter(torch.randn(shape) * 0.02)
        self.norm, self.hc_head = ones(config.hidden_size), Connection(config, config.hc_mult, 1)
        specs = Catalogue(config).blocks
        trunk, drafters = ([s for s in specs if s.is_drafter == wanted] for wanted in (False, True))
        self.layers = nn.ModuleList([Block(config, s, generator) for s in trunk])
        self.mtp = nn.ModuleList([Drafter(config, s, generator) for s in drafters])

    def forward(self, ids: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """What the head turns into logits, ``(B, S, D)``: of the next token, of the one after.

        Args:
            ids: ``(B, S + 1)``; the last one only tells the drafter what came next.
            context: Collects losses and loads.
        """
        now, upcoming = ids[:, :-1], ids[:, 1:]
        h = self.embed[now][:, :, None].expand(-1, -1, self.config.hc_mult, -1)
        for layer in self.layers:
            h = layer(h, now, context)
        x = rms(self.hc_head.head(h).to(context.dtype), self.norm)
        drafter = self.mtp[0]
        assert isinstance(drafter, Drafter)
        return x, drafter.draft(h, self.embed[upcoming], upcoming, context)
