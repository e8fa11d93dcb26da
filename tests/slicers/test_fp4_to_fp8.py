"""FP4 to FP8 by table is quantization by value, where it answers; where it must, it does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4surgery import formats
from v4surgery.slicers.fp4_to_fp8 import fp4_to_fp8


def random_fp4(
    seed: int, rows: int, groups: int, lowest: int, highest: int
) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    packed = random.integers(0, 256, (rows, groups * 16), dtype=np.uint8)
    scales = random.integers(lowest, highest + 1, (rows, groups), dtype=np.uint8)
    packed.reshape(rows, groups, 16)[random.random((rows, groups)) < 0.1] &= 0x88  # zeros, and -0
    return packed, scales


def decoded(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    spread = np.repeat(scales, formats.FP4_GROUP, 1)
    return formats.decode_fp4(formats.unpack_fp4(packed), spread, "f32")


@given(
    st.integers(0, 2**32),
    st.sampled_from([1, 127, 128, 130, 257]),
    st.integers(1, 9),
    st.integers(0, 254),
    st.integers(0, 20),
)
def test_codes_scales_and_counts_are_those_of_quantization(
    seed: int, rows: int, groups: int, lowest: int, spread: int
) -> None:
    packed, scales = random_fp4(seed, rows, groups, lowest, min(lowest + spread, 254))
    values = decoded(packed, scales)
    found = fp4_to_fp8(packed, scales)
    codes, block_scales = formats.quantize_fp8(values, "F8_E8M0")
    wide = np.repeat(np.repeat(block_scales, 128, 0), 128, 1)[:rows, : 32 * groups]
    again = formats.decode_fp8(codes, np.ascontiguousarray(wide), "f32")
    stats = formats.quantized_error(values, again)
    if found is None:
        assert spread > 8 or not np.isfinite(values).all()
        return
    np.testing.assert_array_equal(found[0], codes)
    np.testing.assert_array_equal(found[1], block_scales)
    assert stats.lossless
    assert (found[2].count, found[2].num_changed) == (stats.count, 0)
    # Sums of squares in another order, each with a rounding of 2^-53.
    assert found[2].sum_sq == pytest.approx(stats.sum_sq, rel=values.size * 2**-53)


def test_a_spread_of_14_with_a_six_is_exact_and_one_of_15_is_not_taken() -> None:
    """448 = 7 * 2^6 holds 6 * 2^6; 0.5 * 2^-8 is E4M3's smallest number."""
    packed = np.full((1, 32), 0x77, np.uint8)
    packed[:, 16:] = 0x11
    for spread in (14, 15):
        found = fp4_to_fp8(packed, np.array([[140, 140 - spread]], np.uint8))
        assert (found is None) == (spread == 15)


def test_what_is_not_finite_is_left_to_values() -> None:
    packed, scales = random_fp4(0, 4, 4, 254, 254)  # 6 * 2^127 is infinite
    assert fp4_to_fp8(packed, scales) is None
    scales[:] = 120
    scales[3, 3] = formats.E8M0_NAN
    assert fp4_to_fp8(packed, scales) is None
