"""The cost table: the paper's figures, and the formula's parts one by one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import v4surgery
from tests.cli.conftest import Run, _plain_terminal, v4  # noqa: F401 - the command line, as a fixture
from tests.support.parents import INDEX_FILE
from v4surgery.catalogue import Catalogue
from v4surgery.checkpoint.layout import ShardLayout
from v4surgery.config import V4Config
from v4surgery.cost import cost_of
from v4surgery.presets import FLASH, PRESETS, PRO
from v4surgery.synth import plan_synthesis

MILLION = 1_000_000


@pytest.mark.parametrize(
    ("name", "flops", "cache", "to_a_decimal"),
    [("pro", 27, 10, (26.8, 10.3)), ("flash", 10, 7, (10.0, 7.2))],
)
def test_the_papers_shares_of_v32_at_a_million_tokens(
    name: str, flops: int, cache: int, to_a_decimal: tuple[float, float]
) -> None:
    """Source: the V4 paper's cost table, as spec/forward.md has it."""
    cost = cost_of(Catalogue(PRESETS[name].config), MILLION).to_json()
    shares = 100 * cost["flops_share"], 100 * cost["kv_share"]
    assert (round(shares[0]), round(shares[1])) == (flops, cache)
    assert (round(shares[0], 1), round(shares[1], 1)) == to_a_decimal


def test_kv_cache_of_flash_adds_up_by_hand() -> None:
    """21 CSA layers with an index entry, 20 HCA layers; windows of 43 layers beside them."""
    cost = cost_of(Catalogue(FLASH), MILLION)
    assert cost.kv_bytes_per_token == 21 * (448 + 128 + 64) / 4 + 20 * (448 + 128) / 128
    assert cost.window_bytes == 43 * 128 * 576
    assert cost.v32_kv_bytes_per_token == 61 * (656 + 132)


def test_flops_of_pro_add_up_by_hand() -> None:
    """HCA in layers 0 and 1 and in 29 more, 30 CSA layers."""
    cost = cost_of(Catalogue(PRO), MILLION)
    parameters = 2 * (Catalogue(PRO).num_active_parameters() - 129280 * 7168)
    csa = 2 * 2 * 128 * 1024 * (128 + 1024) + 0.5 * 2 * 64 * 128 * MILLION / 4
    hca = 2 * 2 * 128 * 1024 * (128 + MILLION / 128)
    assert cost.flops == pytest.approx(parameters + 30 * csa + 31 * hca, rel=1e-12)
    v32 = 2 * 37e9 + 2 * 61 * 2 * 128 * 1088 * 2048 + 61 * 2 * 64 * 128 * MILLION
    assert cost.v32_flops == v32


def test_a_context_below_window_and_topk_counts_what_is_there() -> None:
    short, shorter = cost_of(Catalogue(FLASH), 64), cost_of(Catalogue(FLASH), 1)
    base = 2 * (Catalogue(FLASH).num_active_parameters() - 129280 * 4096)
    assert short.window_bytes == 43 * 64 * 576
    seen = 43 * 64 + 21 * 64 / 4 + 20 * 64 / 128
    assert short.flops - base == 4 * 64 * 1024 * seen + 21 * 64 * 128 * 64 / 4
    assert base < shorter.flops < short.flops


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Flash, Pro and mini3b with headers and no data: sparse files, the data all holes.

    Of 24 experts: what no token takes costs a router row, 0.1 % of the FLOPs.
    """
    folder = tmp_path_factory.mktemp("models")
    for like in ("flash", "pro"):
        planned = plan_synthesis(like, changes={"n_routed_experts": 24})
        write_headers(folder / like, planned.config, planned.shards)
    with v4surgery.open(folder / "flash") as flash:
        plan = v4surgery.plan(flash, "mini3b", ["keep.experts.by=first"])
        write_headers(folder / "mini3b", plan.config, plan.shards)
    return {name: folder / name for name in ("flash", "pro", "mini3b")}


def write_headers(folder: Path, config: V4Config, shards: Sequence[ShardLayout]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    weight_map = {}
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.total_bytes)
        weight_map |= {tensor.name: shard.file for tensor in shard.tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("name", "cache", "flops"),
    [
        ("flash", "3.45 GB 48.1 GB 7.2 %", "114.7 B 1.143 T 10.0 %"),
        ("pro", "4.94 GB 48.1 GB 10.3 %", "306.0 B 1.143 T 26.8 %"),
        ("mini3b", "478 MB 48.1 GB 1.0 %", "8.134 B 1.143 T 0.7 %"),
    ],
)
def test_inspect_prints_the_table_and_gives_it_to_programs(
    name: str,
    cache: str,
    flops: str,
    models: dict[str, Path],
    v4: Run,  # noqa: F811
) -> None:
    """The paper's 7 and 10 % for Flash, 10 and 27 % for Pro, to the rounding."""
    done = v4("inspect", models[name], "--context", MILLION)
    assert (done.code, done.err) == (0, "")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert f"KV cache {cache}" in lines
    assert f"FLOPs of the next token {flops}" in lines
    assert "at 1,000,000 tokens" in done.out
    data = json.loads(v4("inspect", models[name], "--context", MILLION, "--json").out)["cost"]
    assert f"{100 * data['kv_share']:.1f}" == cache.split()[-2]
    assert f"{100 * data['flops_share']:.1f}" == flops.split()[-2]


def test_mini3b_adds_up_by_hand(models: dict[str, Path]) -> None:
    """13 CSA layers at 4, 12 HCA layers at 112, three sliding; heads of 32 + 32 dims, K 4."""
    with v4surgery.open(models["mini3b"]) as mini3b:
        cost = cost_of(mini3b.catalogue, MILLION)
        active = 2 * (mini3b.catalogue.num_active_parameters() - 129280 * 1536)
    cache = 13 * (32 + 64 + 48) / 4 + 12 * (32 + 64) / 112
    assert cost.kv_bytes_per_token == pytest.approx(cache, rel=1e-12)
    attention = 13 * (64 + 192) + 12 * (64 + MILLION / 112) + 3 * 64
    indexer = 13 * 0.5 * 2 * 16 * 96 * MILLION / 4
    assert cost.flops == pytest.approx(active + 4 * 24 * 128 * attention + indexer, rel=1e-12)
    assert active == pytest.approx(2 * (1.08e9 - 129280 * 1536), rel=0.01)  # spec/slicing.md


def test_inspect_has_no_table_unless_asked(demo_parent: Path, v4: Run) -> None:  # noqa: F811
    assert {"cost", "compat"}.isdisjoint(json.loads(v4("inspect", demo_parent, "--json").out))
    assert v4("inspect", demo_parent, "--context", 0).code == 2
