"""Computing the bytes of one edited tensor, a bounded chunk of rows at a time.

Requantization runs as vectorised numpy on the CPU; so does dequantization to bf16, unless the
job was given the decoder of a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from v4surgery import formats
from v4surgery.catalogue import BF16, F32, FP4, FP8, FP8_F32, QUANTIZED
from v4surgery.checkpoint.layout import OutputTensor, row_offsets
from v4surgery.checkpoint.reader import NUMPY_DTYPE, Checkpoint, decode
from v4surgery.checkpoint.refs import StoredTensorRef
from v4surgery.slicers.basis_file import BasisFile
from v4surgery.slicers.compress_ratios import interpolate_rows
from v4surgery.slicers.decoding import Decoder, host_decoder
from v4surgery.slicers.edit import COPY, FOLD, GATHER, INTERPOLATE, REMAP, ZERO, TensorEdit
from v4surgery.slicers.encoding import largest_scales, narrowed, quantized
from v4surgery.slicers.fp4_to_fp8 import fp4_to_fp8
from v4surgery.slicers.hash_table import HashRemap, similarity_rank
from v4surgery.slicers.mixing import MIXING_BYTES, Mixer, kept_factor
from v4surgery.slicers.plan import Plan
from v4surgery.slicers.selection import IntArray
from v4surgery.slicers.tally import Tally

COPY_BYTES = 8 << 20
CHUNK_ELEMENTS = 1 << 20
"""Values decoded at a time: about 24 MB of temporaries a worker."""
WORKER_BYTES = 40 << 20
"""What one worker needs at most; the memory budget divided by it bounds the workers."""


def worker_bytes(plan: Plan) -> int:
    """What one worker of a plan needs at most."""
    return MIXING_BYTES if plan.bases else WORKER_BYTES


Buffers = Sequence[NDArray[Any] | memoryview | None]
_scratch = threading.local()


class EditJob:
    """One edit as a job of the writer; see :class:`v4surgery.checkpoint.job.Job`.

    ``bases`` are the recorded ones, where the edit mixes; ``slack`` says how far two machines may
    be apart in what was computed last.
    """

    hole = False

    def __init__(
        self,
        parent: Checkpoint,
        edit: TensorEdit,
        nonfinite: str,
        decoder: Decoder = host_decoder,
        bases: BasisFile | None = None,
    ) -> None:
        self.parent, self.edit, self.bases = parent, edit, bases
        self.tally = Tally(edit, nonfinite)
        self.state = self.tally.state
        self._decoder = decoder
        self.outputs = tuple(OutputTensor(*output) for output in edit.outputs)
        self._remap: HashRemap | None = None
        self.slack = 0.0
        if edit.transform == COPY:
            assert edit.source is not None
            self.num_chunks = max(-(-self.outputs[0].nbytes // COPY_BYTES), 1)
        else:
            self._step = self._rows_per_chunk()
            self.num_chunks = max(-(-edit.shape[0] // self._step), 1)

    def compute(self, chunk: int) -> Buffers:
        """The next bytes of each output; see the writer's Job."""
        if self.edit.transform == COPY:
            return self._copy(chunk)
        begin = chunk * self._step
        end = min(begin + self._step, self.edit.shape[0])
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinities are counted
            return self._compute_rows(begin, end)

    def offsets(self, chunk: int) -> tuple[int, ...]:
        """Where a chunk's bytes begin in each output."""
        if self.edit.transform == COPY:
            return (chunk * COPY_BYTES, 0)[: len(self.outputs)]
        return row_offsets(self.outputs, chunk * self._step)

    @property
    def is_mixed(self) -> bool:
        """Whether values are sums, which other machines may add up in another order."""
        return self.edit.mix is not None and self.edit.transform != FOLD

    def _rows_per_chunk(self) -> int:
        edit = self.edit
        if self.is_mixed and edit.mix is not None and edit.mix.rows is not None:
            return edit.rows_a_pass
        width = edit.shape[1] if len(edit.shape) == 2 else 1
        if edit.source is not None:
            width = max(width, edit.source.weight.row_bytes)
        if edit.transform == INTERPOLATE:
            return edit.shape[0]
        if edit.transform == REMAP:
            assert edit.remap is not None
            width = max(width, int(edit.remap.new_id.max()) + 1, 8 * edit.shape[1])
        rows = max(CHUNK_ELEMENTS // width, 1)
        if edit.fmt in (FP8, FP8_F32):
            rows = max(rows // formats.FP8_BLOCK, 1) * formats.FP8_BLOCK
        return min(rows, edit.shape[0])

    def _copy(self, chunk: int) -> Buffers:
        source = self.edit.source
        assert source is not None
        ref = source.weight
        begin = ref.begin + chunk * COPY_BYTES
        end = min(begin + COPY_BYTES, ref.end)
        weight = self._read_scratch(ref.file, begin, end)
        if source.scale is None:
            return (weight,)
        if chunk < self.num_chunks - 1:
            return weight, None
        scale = source.scale
        return weight, memoryview(self.parent.source.read(scale.file, scale.begin, scale.end))

    def _read_scratch(self, file: str, begin: int, end: int) -> memoryview:
        """Read into this thread's buffer: a fresh one would be paid for page by page."""
        if not hasattr(_scratch, "buffer"):
            _scratch.buffer = memoryview(bytearray(COPY_BYTES))
        view: memoryview = _scratch.buffer[: end - begin]
        if len(view):
            self.parent.source.read_into(file, begin, view)
        return view

    def _compute_rows(self, begin: int, end: int) -> Buffers:
        edit = self.edit
        if edit.transform == ZERO:
            dtype = NUMPY_DTYPE[edit.outputs[0].dtype]
            return (np.zeros((end - begin, *edit.shape[1:]), dtype=dtype),)
        assert edit.source is not None
        if edit.mix is not None:
            return self._mixed(edit.source, begin, end)
        if edit.transform == REMAP:
            return (self._remap_rows(edit.source, begin, end),)
        if edit.transform == INTERPOLATE:
            return (self._interpolated(edit.source),)
        if edit.transform == GATHER:
            return self._gather(edit.source, begin, end)
        if edit.fmt in QUANTIZED:
            return self._requantize(edit.source, begin, end)
        return (self._to_plain(edit.source, begin, end),)

    def _mixed(self, source: StoredTensorRef, begin: int, end: int) -> Buffers:
        """Rows in another basis, or (a norm that was absorbed) ones."""
        edit, bases = self.edit, self.bases
        assert bases is not None, edit.target.stem
        if edit.transform == FOLD:
            ones = np.full(end - begin, edit.factor * kept_factor(edit, bases), np.float32)
            return (narrowed(ones, edit.fmt),)

        def read(first: int, last: int) -> NDArray[np.float32]:
            return np.concatenate(
                [
                    decode(source.fmt, *self.parent.read_codes(source, rows, cols), "f32")
                    for rows, cols in self._pieces(first, last)
                ]
            )

        mixer = Mixer(self.parent, edit, bases, read)
        values = mixer.rows(begin, end).astype(np.float32)
        self.slack = mixer.slack
        self.tally.check_finite(~np.isfinite(values))
        if edit.fmt in QUANTIZED:
            return self._quantized(values)
        return (narrowed(values, edit.fmt),)

    def _pieces(self, begin: int, end: int) -> list[tuple[slice | IntArray, IntArray | None]]:
        """Parent rows and columns of some picked rows: one piece, or one for each group met."""
        edit = self.edit
        rows = edit.rows

        def source_rows(a: int, b: int) -> slice | IntArray:
            return slice(a, b) if rows is None else rows[a:b]

        if edit.cols is None or edit.cols.ndim == 1:
            return [(source_rows(begin, end), edit.cols)]
        assert edit.source is not None
        picked = edit.source.weight.shape[0] if rows is None else len(rows)
        per_group = picked // len(edit.cols)
        pieces = []
        while begin < end:
            group = begin // per_group
            stop = min((group + 1) * per_group, end)
            pieces.append((source_rows(begin, stop), edit.cols[group]))
            begin = stop
        return pieces

    def _gather(self, source: StoredTensorRef, begin: int, end: int) -> Buffers:
        """Stored codes of some rows and columns, and the scales of their blocks."""
        codes, scales = [], []
        for rows, cols in self._pieces(begin, end):
            code, scale = self.parent.read_codes(source, rows, cols)
            codes.append(code)
            if scale is not None:
                step = 1 if source.fmt == FP4 else formats.FP8_BLOCK
                block = formats.FP4_GROUP if source.fmt == FP4 else formats.FP8_BLOCK
                scales.append(scale[::step, ::block])
        code = np.concatenate(codes) if len(codes) > 1 else codes[0]
        if source.fmt == FP4:
            code = formats.pack_fp4(code)
        code = np.ascontiguousarray(code)
        return (code, np.ascontiguousarray(np.concatenate(scales))) if scales else (code,)

    def _to_plain(self, source: StoredTensorRef, begin: int, end: int) -> NDArray[Any]:
        """Values in bf16 (or the parent's plain dtype), multiplied by the edit's factor."""
        edit = self.edit
        parts = []
        for rows, cols in self._pieces(begin, end):
            if edit.factor == 1.0 and edit.fmt == BF16:
                part: NDArray[Any] = self._decoder(self.parent, source, rows, cols)
                self.tally.check_finite((part & 0x7F80) == 0x7F80)
                if source.fmt == F32:
                    self.tally.count_rounded(part, self.parent.read_codes(source, rows, cols)[0])
            else:
                codes, scales = self.parent.read_codes(source, rows, cols)
                values = decode(source.fmt, codes, scales, "f32").astype(np.float64) * edit.factor
                wide = values.astype(np.float32)
                self.tally.check_finite(~np.isfinite(wide))
                part = narrowed(wide, edit.fmt)
            parts.append(part)
        return np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0])

    def _requantize(self, source: StoredTensorRef, begin: int, end: int) -> Buffers:
        edit = self.edit
        if source.fmt == FP4 and edit.fmt == FP8 and edit.cols is None:
            return self._fp4_to_fp8(source, begin, end)
        parts: list[NDArray[np.float32]] = []
        scale_parts: list[NDArray[Any]] = []
        for rows, cols in self._pieces(begin, end):
            codes, scales = self.parent.read_codes(source, rows, cols)
            parts.append(decode(source.fmt, codes, scales, "f32"))
            if source.fmt == FP8_F32:
                assert scales is not None
                scale_parts.append(np.broadcast_to(scales, codes.shape))
        values = np.concatenate(parts) if len(parts) > 1 else parts[0]
        self.tally.check_finite(~np.isfinite(values))
        if edit.fmt == FP8_F32 and source.fmt == FP8_F32:
            return self._quantized(values, largest_scales(np.concatenate(scale_parts)))
        return self._quantized(values)

    def _fp4_to_fp8(self, source: StoredTensorRef, begin: int, end: int) -> Buffers:
        """FP8 of whole rows of FP4: by table where they lose nothing, else by value."""
        assert source.scale is not None
        ((rows, _),) = self._pieces(begin, end)
        packed = self.parent.read_rows(source.weight, rows)
        scales = self.parent.read_rows(source.scale, rows)
        found = fp4_to_fp8(packed, scales)
        if found is not None:
            codes, block_scales, stats = found
            self.tally.add(stats, block_scales.size)
            return codes, block_scales
        spread = np.repeat(scales, formats.FP4_GROUP, axis=1)
        values = decode(FP4, formats.unpack_fp4(packed), spread, "f32")
        self.tally.check_finite(~np.isfinite(values))
        return self._quantized(values)

    def _quantized(
        self, values: NDArray[np.float32], block_scales: NDArray[np.float32] | None = None
    ) -> Buffers:
        """Codes and scales of values; what that loses is counted."""
        codes, scales, again = quantized(values, self.edit.fmt, block_scales)
        self.tally.count_requantized(values, again)
        return codes, scales

    def _remap_rows(self, source: StoredTensorRef, begin: int, end: int) -> NDArray[np.int64]:
        edit = self.edit
        assert edit.remap is not None
        if self._remap is None:
            self._remap = self._with_rank(edit.remap)
        (rows, _), *_ = self._pieces(begin, end)
        table = self.parent.read_rows(source.weight, rows).view(np.int64)
        mapped, lost = self._remap.apply(table, begin)
        self.tally.count_lost_experts(lost)
        return mapped

    def _with_rank(self, remap: HashRemap) -> HashRemap:
        if remap.policy != "nearest":
            return remap
        source = self.edit.source
        assert source is not None and source.entry.block is not None
        gate = self.parent.tensors[source.entry.block.prefix + "ffn.gate"]
        values = self.parent.read_float(gate, slice(0, gate.weight.shape[0]))
        kept = np.empty(int(remap.new_id.max()) + 1, dtype=np.int64)
        alive = np.flatnonzero(remap.new_id >= 0)
        kept[remap.new_id[alive]] = alive
        return replace(remap, rank=similarity_rank(values, kept))

    def _interpolated(self, source: StoredTensorRef) -> NDArray[np.float32]:
        values = self.parent.read_float(source, slice(0, source.weight.shape[0]))
        if self.edit.cols is not None:
            values = values[:, self.edit.cols]
        return interpolate_rows(values, self.edit.shape[0])
