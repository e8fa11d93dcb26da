"""Train the parent in the box: a V4 of 14 M parameters in every layer kind, on one GPU.

    python corpus.py && python tokenizer.py
    python train.py --corpus corpus --out trained --minutes 8.5

Writes ``trained/parent`` (the published layout), ``trained/log.jsonl`` and ``trained/run.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import lzma
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import END
from export import tensors, write_published
from model import Context, TrainableV4, compiled
from muon import Muon
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from v4surgery.config import QUANTIZATION_CONFIG, RopeScaling, V4Config
from v4surgery.kernels.reference.dequant import dequant_fp4
from v4surgery.kernels.reference.quant import quant_fp4

END_ID = 1
MTP_WEIGHT, INDEX_WEIGHT, BALANCE_STEP = 0.2, 0.05, 2e-3

CONFIG = V4Config(
    vocab_size=4096,
    hidden_size=128,
    moe_intermediate_size=128,
    num_hidden_layers=10,
    num_attention_heads=8,
    head_dim=128,
    qk_rope_head_dim=64,
    q_lora_rank=128,
    o_lora_rank=32,
    o_groups=4,
    n_routed_experts=16,
    num_experts_per_tok=2,
    num_hash_layers=3,
    compress_ratios=(0, 4, 128, 0, 4, 128, 4, 128, 4, 4, 0),
    index_n_heads=4,
    index_head_dim=128,
    index_topk=64,
    sliding_window=64,
    routed_scaling_factor=1.5,
    max_position_embeddings=16384,
    rope_scaling=RopeScaling(original_max_position_embeddings=1024),
    expert_dtype="fp4",
    quantization_config=QUANTIZATION_CONFIG,
)
"""Sliding, CSA and HCA layers, each with hash and with score routing, and a drafter."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and how fast; shares are of the whole run.

    The run ends after ``steps``, or after ``minutes`` with its first step, which compiles; what is
    nearer to its end drives the schedule.
    """

    steps: int = 100_000
    minutes: float = 60.0
    batch: int = 64
    seq: int = 1024
    lr: float = 1e-2
    seed: int = 0
    warmup_steps: int = 50
    sparse_from: float = 0.3  # before it CSA layers see every entry, and their indexers only learn
    decay_from: float = 0.4
    fake_quant_from: float = 0.85


def fake_fp4(w: Tensor) -> Tensor:
    """Experts ``(E, rows, cols)`` as FP4 will store them; the gradient passes straight through."""
    codes, scales = quant_fp4(w.detach())
    return w + (dequant_fp4(codes, scales) - w.detach())


@compiled
def cross_entropy(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logits = (x @ head.to(x.dtype).T).float().flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten())


def read_tokens(folder: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens to learn and held out, int32, documents ended by END_ID."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    train = lzma.decompress((folder / "train.txt.xz").read_bytes()).decode().split(END)
    lines = (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    streams = []
    for documents in (train, [json.loads(line)["prompt"] for line in lines]):
        ids: list[int] = []
        for document in tokenizer.encode_batch_fast(documents):
            ids += [*document.ids, END_ID]
        streams.append(torch.tensor(ids, dtype=torch.int32, device=device))
    return streams[0], streams[1]


def optimizers(model: TrainableV4, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices; AdamW for embedding, head, norms, and the biases and gates of mHC."""
    ends = {id(model.embed), id(model.head)}
    tables = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in ends]
    rest = [p for p in model.parameters() if p.dim() < 2 or id(p) in ends]
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.0)
    return [Muon(tables, lr), adam]


def rate(settings: Settings, step: int, done: float) -> float:
    """Warm-up, constant, then linear to 2 % of the learning rate."""
    falling = (1 - done) / (1 - settings.decay_from)
    return min((step + 1) / settings.warmup_steps, 1.0, max(falling, 0.02))


def batches(tokens: Tensor, settings: Settings) -> Iterator[Tensor]:
    """Random windows ``(B, S + 2)``."""
    generator = torch.Generator().manual_seed(settings.seed)
    span = torch.arange(settings.seq + 2, device=tokens.device)
    while True:
        starts = torch.randint(
            len(tokens) - settings.seq - 2, (settings.batch, 1), generator=generator
        )
        yield tokens[starts.to(tokens.device) + span].long()


def evaluate(model: TrainableV4, held_out: Tensor, context: Context, settings: Settings) -> float:
    """Mean loss in nats a token over windows of held-out text.

    Batches have the shape of training, with gradients on: nothing is compiled anew.
    """
    windows = held_out[: len(held_out) // settings.seq * settings.seq].view(-1, settings.seq)
    total = 0.0
    for rows in windows.long().split(settings.batch):
        ids = F.pad(rows, (0, 1, 0, settings.batch - len(rows)))
        x, _ = model(ids, context)
        logits = (x.detach()[: len(rows), :-1] @ model.head.detach().to(x.dtype).T).float()
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
        total += loss.item()
    return total / (windows.numel() - len(windows))


def balance(model: TrainableV4, context: Context, step_size: float) -> None:
    """Nudge each gate bias toward even loads."""
    for module in (*model.layers, *model.mtp):
        load = context.loads[module.prefix]
        if module.ffn.bias is not None:
            module.ffn.bias += step_size * torch.sign(load.mean() - load)


def train(
    settings: Settings, tokens: Tensor, held_out: Tensor, log: Path
) -> tuple[TrainableV4, int]:
    """The whole run, with a line of JSON now and then; the model and how many steps it took."""
    device = tokens.device
    torch.manual_seed(settings.seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = True
    model = TrainableV4(CONFIG, settings.seed).to(device)
    both = optimizers(model, settings.lr)
    source, began, quantize = batches(tokens, settings), time.perf_counter(), compiled(fake_fp4)
    step, first_step, done = 0, 0.0, 0.0
    while done < 1:
        context = Context(dtype, sparse=done >= settings.sparse_from)
        context.fake_quant = quantize if done >= settings.fake_quant_from else None
        losses = backward(model, next(source), context)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = rate(settings, step, done)
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        balance(model, context, BALANCE_STEP * factor)
        step += 1
        if step == 1 or step % 8 == 0:
            losses["loss"].item()  # waits for the device, so that the clock is right
        seconds = time.perf_counter() - began
        first_step = first_step or seconds
        of_time = (seconds - first_step) / (60 * settings.minutes - first_step)
        done = max(step / settings.steps, of_time)
        if step % 50 == 0 or step == 1 or done >= 1:
            line = {"step": step, "done": round(done, 4), "seconds": round(seconds, 1)}
            line |= {name: value.item() for name, value in losses.items()}
            if step % 500 == 0 or done >= 1:
                loads = context.loads.values()
                line["imbalance"] = max((load.max() / load.mean()).item() for load in loads)
                line["held_out"] = evaluate(model, held_out, context, settings)
            if not math.isfinite(line["loss"]):
                raise FloatingPointError(f"the loss is {line['loss']} at step {step}")
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    return model, step


def backward(model: TrainableV4, ids: Tensor, context: Context) -> dict[str, Tensor]:
    """Gradients of one batch ``(B, S + 2)``; the parts of its loss."""
    x, drafted = model(ids[:, :-1], context)
    main = cross_entropy(x, model.head, ids[:, 1:-1])
    second = cross_entropy(drafted, model.head, ids[:, 2:])
    index = torch.stack(context.index_losses).mean()
    (main + MTP_WEIGHT * second + INDEX_WEIGHT * index).backward()
    return {"loss": main.detach(), "mtp": second.detach(), "index": index.detach()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("corpus"))
    parser.add_argument("--out", type=Path, default=Path("trained"))
    parser.add_argument("--device", default="cuda")
    for item in dataclasses.fields(Settings):
        flag = "--" + item.name.replace("_", "-")
        parser.add_argument(flag, type=type(item.default), default=item.default)
    options = vars(parser.parse_args())
    folder, out, device = options.pop("corpus"), options.pop("out"), options.pop("device")
    settings = Settings(**options)
    out.mkdir(parents=True)
    tokens, held_out = read_tokens(folder, torch.device(device))
    began = time.perf_counter()
    model, steps = train(settings, tokens, held_out, out / "log.jsonl")
    run = {
        "settings": dataclasses.asdict(settings),
        "tokens_of_text": len(tokens),
        "steps": steps,
        "tokens_seen": steps * settings.batch * settings.seq,
        "seconds": round(time.perf_counter() - began, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    (out / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    tokenizer = (folder / "tokenizer.json").read_bytes()
    write_published(tensors(model), CONFIG, out / "parent", {"tokenizer.json": tokenizer})


if __name__ == "__main__":
    main()
