"""The hyper-connection kernels in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from v4surgery.errors import UsageError
from v4surgery.kernels import hyper_connections as module
from v4surgery.kernels.cases import Case
from v4surgery.kernels.cases.streams import CASES
from v4surgery.kernels.check import check_case
from v4surgery.kernels.dispatch import Ops
from v4surgery.kernels.hyper_connections import hc_head, hc_post, hc_pre
from v4surgery.kernels.reference import hyper_connections as reference

GOLDEN = Path(__file__).parents[1] / "data" / "ops.safetensors"
ROWS = [*range(0, 50, 7), 49]
OPTIONS = {"iterations": 20, "hc_eps": 1e-6, "norm_eps": 1e-6}


NAN = float("nan")
SMALL = [case for case in CASES if case.op in ("hc_pre", "hc_post", "hc_head") and not case.real]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}: {case.label}")
def test_case_is_within_its_bound(case: Case) -> None:
    result = check_case(case, Ops("triton"), torch.device("cpu"))
    assert result.passed, result


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def arguments(tokens: int, streams: int, hidden: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_mixes = (2 + streams) * streams
    fn = torch.randn(num_mixes, streams * hidden) / (streams * hidden) ** 0.5
    return torch.randn(tokens, streams, hidden), fn, torch.rand(3), torch.randn(num_mixes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_golden_sinkhorn_is_within_1e_6(dtype: torch.dtype) -> None:
    """Token t has 8 at one place of each stream, so that its RMS is 1 and fn says its mixes."""
    recorded = {k: v for k, v in load_file(GOLDEN).items() if k.startswith("hc.")}
    mixes = recorded["hc.mixes"][0, ROWS]
    token, stream = torch.meshgrid(torch.arange(len(ROWS)), torch.arange(4), indexing="ij")
    h, fn = torch.zeros(len(ROWS), 4, 64, dtype=dtype), torch.zeros(24, 4, 64)
    h[token, stream, 16 * stream + token] = 8
    fn[:, 0, : len(ROWS)] = mixes.T / 8
    scale, base = recorded["hc.scale"], recorded["hc.base"]
    options = OPTIONS | {"norm_eps": 0.0}
    x, post, comb = hc_pre(h, fn.flatten(1), scale, base, **options)
    assert relative_error(post, recorded["hc.post"][0, ROWS]) < 1e-6
    assert relative_error(comb, recorded["hc.comb"][0, ROWS]) < 1e-6
    pre = recorded["hc.pre"][0, ROWS]
    assert relative_error(x[token, 16 * stream + token], (8 * pre).to(dtype)) < 1e-6


@pytest.mark.parametrize("streams", [1, 2, 3, 5, 8])
def test_hc_pre_of_any_number_of_streams_is_the_references(streams: int) -> None:
    args = arguments(3, streams, 21)
    for actual, expected in zip(
        hc_pre(*args, **OPTIONS), reference.hc_pre(*args, **OPTIONS), strict=True
    ):
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_hc_pre_iterates_as_often_as_it_is_told(iterations: int) -> None:
    args, options = arguments(2, 4, 16), OPTIONS | {"iterations": iterations}
    comb, expected = hc_pre(*args, **options)[2], reference.hc_pre(*args, **options)[2]
    torch.testing.assert_close(comb, expected, atol=2e-6, rtol=2e-6)


def test_hc_pre_without_eps_is_finite_for_streams_that_are_padded() -> None:
    args, options = arguments(2, 3, 16), OPTIONS | {"hc_eps": 0.0}
    for actual, expected in zip(
        hc_pre(*args, **options), reference.hc_pre(*args, **options), strict=True
    ):
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("grid", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("poisoned")
def test_hc_pre_does_not_depend_on_the_number_of_parts(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, grid: int
) -> None:
    h, *rest = arguments(2, 4, 149)
    args = (h.to(dtype), *rest)
    monkeypatch.setattr(module, "FULL_GRID", grid)
    _, post, comb = hc_pre(*args, **OPTIONS)
    _, expected_post, expected_comb = reference.hc_pre(*args, **OPTIONS)
    assert relative_error(post, expected_post) < 1e-6
    assert relative_error(comb, expected_comb) < 1e-6


def test_hc_pre_keeps_all_of_fn_when_h_is_bf16() -> None:
    """Of 1 + 2^-9 + 2^-18, less 1, one bf16 number has nothing and two have not the last part."""
    h, fn = torch.zeros(1, 4, 16).bfloat16(), torch.zeros(24, 64)
    h[0, :2, 3] = 1
    fn[4, 3], fn[4, 19] = 1 + 2.0**-9 + 2.0**-18, -1
    scale, options = torch.full((3,), 2.0**6), OPTIONS | {"norm_eps": 0.0}
    post = hc_pre(h, fn, scale, torch.zeros(24), **options)[1]
    root = (64 / 2) ** 0.5
    exact, cut = (
        2 * torch.tensor(2.0**6 * root * mix).double().sigmoid()
        for mix in (2.0**-9 + 2.0**-18, 2.0**-9)
    )
    assert abs(post[0, 0] - exact) < 1e-6 < abs(exact - cut)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_hc_nan_stays_in_its_token() -> None:
    h, fn, scale, base = arguments(3, 4, 16)
    h[1, 2, 3] = NAN
    x, post, comb = hc_pre(h, fn, scale, base, **OPTIONS)
    for part in (x, post, comb, hc_post(x, h, post, comb)):
        is_nan = part.isnan().flatten(1)
        assert is_nan[1].all() and not is_nan[0].any() and not is_nan[2].any()


def test_hc_takes_streams_that_are_views() -> None:
    h, fn, scale, base = arguments(4, 4, 16)
    repeated = h[:, :1].expand(-1, 4, -1)
    parts = hc_pre(repeated, fn, scale, base, **OPTIONS)
    same = hc_pre(repeated.contiguous(), fn, scale, base, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(parts, same, strict=True))
    x, post, comb = parts
    assert torch.equal(
        hc_post(x, repeated, post, comb.mT),
        hc_post(x, h[:, :1].repeat(1, 4, 1), post, comb.mT.clone()),
    )


def test_hc_post_takes_a_y_of_another_dtype() -> None:
    h, *_ = arguments(2, 4, 16)
    y, post, comb = torch.randn(2, 16), torch.randn(2, 4), torch.randn(2, 4, 4)
    expanded = hc_post(y, h.bfloat16(), post, comb)
    torch.testing.assert_close(expanded, reference.hc_post(y, h.bfloat16(), post, comb))


def test_hc_head_is_the_references() -> None:
    h, fn, *_ = arguments(5, 4, 18)
    args = (h, fn[:4], torch.rand(1), torch.randn(4))
    options = {"hc_eps": 1e-6, "norm_eps": 1e-6}
    torch.testing.assert_close(
        hc_head(*args, **options), reference.hc_head(*args, **options), atol=2e-6, rtol=2e-6
    )


def test_hc_refuses_other_dtypes_and_shapes() -> None:
    h, fn, scale, base = arguments(2, 4, 16)
    with pytest.raises(UsageError, match="fn has the wrong shape"):
        hc_pre(h, fn[:23], scale, base, **OPTIONS)
    with pytest.raises(UsageError, match="scale has the wrong shape"):
        hc_head(h, fn[:4], scale, base[:4], hc_eps=1e-6, norm_eps=1e-6)
    with pytest.raises(UsageError, match="fn has the wrong dtype"):
        hc_pre(h, fn.bfloat16(), scale, base, **OPTIONS)
    with pytest.raises(UsageError, match="h has the wrong dtype"):
        hc_pre(h.double(), fn, scale, base, **OPTIONS)
    with pytest.raises(UsageError, match="comb has the wrong shape"):
        hc_post(h[:, 0], h, torch.zeros(2, 4), torch.zeros(2, 4, 3))
