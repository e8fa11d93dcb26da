"""A streamed forward is the resident one: the same operations on the same bytes, read later."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.parents import write_small_parent
from v4surgery.checkpoint.reader import Checkpoint, open_checkpoint
from v4surgery.checkpoint.refs import TensorRef
from v4surgery.errors import ReadError, UsageError
from v4surgery.model.loader import load_model
from v4surgery.model.numerics import Numerics
from v4surgery.model.ranges import RangeLoader, lay_out, tensor_refs
from v4surgery.model.streaming import Streamer, StreamOptions

SMALL_BUDGET = StreamOptions(weight_bytes=1, activations="disk", workers=2)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_small_parent(tmp_path_factory.mktemp("streaming") / "parent"))


def prompts(checkpoint: Checkpoint, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    size = checkpoint.config.vocab_size
    return [torch.randint(0, size, (n,), generator=generator).tolist() for n in lengths]


def resident(checkpoint: Checkpoint, numerics: Numerics, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = load_model(checkpoint, numerics)(torch.tensor([ids]))[0]
    return logits


@pytest.mark.parametrize("mode", ["exact", "official"])
@pytest.mark.parametrize("options", [StreamOptions(), SMALL_BUDGET], ids=["roomy", "tight"])
def test_streaming_equals_the_resident_forward_bit_for_bit(
    parent: Checkpoint, mode: str, options: StreamOptions
) -> None:
    numerics = Numerics(mode, torch.bfloat16 if mode == "official" else torch.float32)
    texts = prompts(parent, 40, 7)
    with Streamer(parent, numerics, options=options) as streamer:
        streamed = streamer.run(texts, logits="all")
    for ids, logits in zip(texts, streamed, strict=True):
        assert torch.equal(logits, resident(parent, numerics, ids))


def test_only_routed_experts_are_read(parent: Checkpoint) -> None:
    """One token goes to K experts of each block; the bytes read are those and the dense ones."""
    config = parent.config
    with Streamer(parent, Numerics()) as streamer:
        streamer.run([[5]], logits="none")
        timings = streamer.timings
    for timing in timings:
        own = [
            stored
            for stored in parent.tensors.values()
            if stored.entry.block is not None and stored.entry.block.prefix == timing.prefix
        ]
        dense = sum(stored.nbytes for stored in own if stored.entry.expert is None)
        expert = sum(stored.nbytes for stored in own if stored.entry.expert == 0)
        # The next block's dense weights may be counted here: they are read meanwhile.
        assert timing.bytes_read >= config.num_experts_per_tok * expert
    dense = sum(s.nbytes for s in parent.tensors.values() if s.entry.expert is None)
    routed = sum(t.bytes_read for t in timings)
    everything = sum(s.nbytes for s in parent.tensors.values())
    assert routed < everything
    assert streamer.loader.bytes_read <= dense + len(timings) * config.num_experts_per_tok * expert


def test_many_tokens_read_the_experts_ahead(parent: Checkpoint) -> None:
    texts = prompts(parent, 64)
    with Streamer(parent, Numerics()) as streamer:
        assert streamer._reads_experts_ahead(64)
        assert not streamer._reads_experts_ahead(1)
        (logits,) = streamer.run(texts, logits="all")
    assert torch.equal(logits, resident(parent, Numerics(), texts[0]))


def test_the_head_is_read_once_where_it_fits(parent: Checkpoint) -> None:
    """Later prompts read nothing; the head's rows in float32 are the budget that it takes."""
    head = parent.tensors["head"]
    rows, channels = head.weight.shape
    streams = torch.zeros(1, 1, parent.config.hc_mult, channels)
    for budget, readings in ((4 * rows * channels, 1), (4 * rows * channels - 1, 3)):
        with Streamer(parent, Numerics(), options=StreamOptions(weight_bytes=budget)) as streamer:
            streamer.head([streams])
            first = streamer.loader.bytes_read
            logits = streamer.head([streams, streams])
            collapse = first - head.nbytes
            assert streamer.loader.bytes_read == readings * head.nbytes + 2 * collapse
        assert torch.equal(logits[0], logits[1])


def test_a_head_that_was_not_read_to_its_end_is_read_again(
    parent: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In slices of 3 rows, of which the second fails once."""
    monkeypatch.setattr("v4surgery.model.ends.HEAD_ROWS", 3)
    streams = torch.ones(1, 1, parent.config.hc_mult, parent.config.hidden_size)
    with Streamer(parent, Numerics()) as streamer:
        load, left = streamer.loader.load_common, [True, True, False]

        def fail_once(refs: Sequence[TensorRef]) -> dict[TensorRef, Tensor]:
            if left and not left.pop(0):
                raise ReadError("gone")
            return load(refs)

        monkeypatch.setattr(streamer.loader, "load_common", fail_once)
        with pytest.raises(ReadError, match="gone"):
            streamer.head([streams])
        (logits,) = streamer.head([streams])
    assert logits.shape == (1, parent.config.vocab_size)


def test_a_prompt_beyond_the_activation_budget_is_refused(parent: Checkpoint) -> None:
    options = StreamOptions(activation_bytes=1000)
    with (
        Streamer(parent, Numerics(), options=options) as streamer,
        pytest.raises(UsageError, match="does not fit the memory for activations"),
    ):
        streamer.run(prompts(parent, 50))


def test_an_error_does_not_wait_for_what_is_read(
    parent: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that does not answer holds readers for long, unless they are cancelled."""
    cancelled = threading.Event()

    def wait(*_: object) -> None:
        if not cancelled.wait(30):
            pytest.fail("nobody cancelled")
        raise ReadError("cancelled")

    monkeypatch.setattr(parent.source, "read_into", wait)
    monkeypatch.setattr(parent.source, "cancel", cancelled.set)
    with pytest.raises(UsageError, match="stop"), Streamer(parent, Numerics()) as streamer:
        block = parent.catalogue.blocks[0]
        read = streamer._prefetcher.begin(lambda: streamer.load_block(block, experts_ahead=True))
        raise UsageError("stop")
    assert isinstance(read.exception(), ReadError)


def test_an_unknown_place_for_activations_is_refused() -> None:
    with pytest.raises(UsageError, match="host or disk"):
        StreamOptions(activations="moon")


def test_the_range_loader_gives_every_tensor_as_the_file_has_it(parent: Checkpoint) -> None:
    """Whatever the order and the neighbours: adjacent tensors, single ones, odd offsets."""
    refs = [ref for stored in parent.tensors.values() for ref in tensor_refs(stored)]
    loader = RangeLoader(parent, torch.device("cpu"), workers=2)
    for some in (refs, refs[::-3], refs[5:6], []):
        loaded = loader.load(some)
        assert set(loaded) == set(some)
        for ref, tensor in loaded.items():
            raw = parent.source.read(ref.file, ref.begin, ref.end)
            assert tuple(tensor.shape) == ref.shape
            assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == raw
    loader.close()


def test_probes_see_every_routed_expert_and_its_tokens(parent: Checkpoint) -> None:
    """What importance scores need: neurons and outputs of experts, heads, routing weights."""
    model = load_model(parent, Numerics())
    block = model.layers[0]
    assert isinstance(block, nn.Module)
    seen: dict[str, list[tuple[int, Tensor, Tensor]]] = {"neurons": [], "outputs": []}
    heads: list[Tensor] = []
    routed: list[tuple[Tensor, Tensor]] = []

    def keep(name: str) -> object:
        return lambda _, inputs, output: seen[name].append((inputs[1], inputs[2], output))

    ffn = block.get_submodule("ffn")
    ffn.get_submodule("neuron_probe").register_forward_hook(keep("neurons"))  # type: ignore[arg-type]
    ffn.get_submodule("output_probe").register_forward_hook(keep("outputs"))  # type: ignore[arg-type]
    ffn.get_submodule("gate").register_forward_hook(lambda _, __, output: routed.append(output))
    block.get_submodule("attn.heads").register_forward_hook(
        lambda _, __, output: heads.append(output)
    )
    total: list[Tensor] = []
    shared: list[Tensor] = []
    ffn.register_forward_hook(lambda _, __, output: total.append(output))
    ffn.get_submodule("shared_experts").register_forward_hook(lambda _, __, o: shared.append(o))
    with torch.no_grad():
        model(torch.tensor(prompts(parent, 20)))
    config = parent.config
    assert heads[0].shape == (1, 20, config.num_attention_heads, config.head_dim)
    indices, weights = routed[0]
    assert weights.shape == indices.shape == (20, config.num_experts_per_tok)
    again = shared[0].clone()
    for expert, token, output in seen["outputs"]:
        assert token.tolist() == (indices == expert).any(-1).nonzero()[:, 0].tolist()
        again[token] += output
    torch.testing.assert_close(again, total[0][0], rtol=1e-5, atol=1e-6)
    assert [e for e, _, _ in seen["neurons"]] == sorted(indices.unique().tolist())
    assert all(o.shape[1] == config.moe_intermediate_size for _, _, o in seen["neurons"])


def test_closing_leaves_no_threads_behind(parent: Checkpoint, tmp_path: Path) -> None:
    import threading

    before = threading.active_count()
    with Streamer(parent, Numerics(), options=SMALL_BUDGET) as streamer:
        streamer.run(prompts(parent, 5))
    assert threading.active_count() <= before


@given(st.integers(8, 30), st.lists(st.integers(0, 99), min_size=1, max_size=9))
def test_every_tensor_lies_aligned_and_is_read_where_it_lies(begin: int, sizes: list[int]) -> None:
    """Wherever the header ends and whatever the neighbours' sizes, without a gap in the file."""
    bounds = [begin + sum(sizes[:i]) for i in range(len(sizes) + 1)]
    refs = [TensorRef("a", "I8", (b - a,), a, b) for a, b in pairwise(bounds)]
    ordered, offsets, size, pieces = lay_out(refs)
    file = bytes(range(256)) * 5
    buffer = bytearray(size)
    for piece in pieces:
        buffer[piece.offset : piece.offset + piece.end - piece.begin] = file[
            piece.begin : piece.end
        ]
    for ref in ordered:
        assert offsets[ref] % 16 == 0
        assert buffer[offsets[ref] :][: ref.end - ref.begin] == file[ref.begin : ref.end]
    assert len(pieces) <= 1 + sum(n % 16 > 0 for n in sizes[:-1])
