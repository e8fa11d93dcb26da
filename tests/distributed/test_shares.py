"""Who does what: pure functions, for any number of ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4surgery.checkpoint.layout import OutputTensor, ShardLayout
from v4surgery.checkpoint.sharing import deal_out
from v4surgery.distributed.forecast import Rates, Work, forecast
from v4surgery.distributed.launch import Launch
from v4surgery.distributed.team import Team

WORK = Work(10, 3_000_000_000, 200_000_000, 1_000_000_000, 4096, 4096)


def team_of(size: int, rank: int = 0, local: int | None = None) -> Team:
    local = local or size
    launch = Launch(rank, size, rank % local, local, "localhost", 1)
    return Team(launch, None)  # type: ignore[arg-type] - no tensors are exchanged


@given(st.integers(1, 20), st.integers(0, 400))
def test_shares_of_experts_are_even_and_cover_all(ranks: int, count: int) -> None:
    shares = [team_of(ranks, rank).share(count) for rank in range(ranks)]
    assert [e for share in shares for e in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(1, 4), st.integers(1, 4))
def test_places_of_ranks_are_different(nodes: int, local: int) -> None:
    places = {team_of(nodes * local, rank, local).place for rank in range(nodes * local)}
    assert places == set(range(nodes * local))


def job(*names: str) -> Any:
    return SimpleNamespace(outputs=[OutputTensor(name, "U8", (10,)) for name in names], hole=False)


def shards(*files: str) -> list[ShardLayout]:
    return [
        ShardLayout.build(str(i), [OutputTensor(name, "U8", (10,)) for name in names])
        for i, names in enumerate(files)
    ]


def test_a_file_has_one_writer() -> None:
    """b and c part a pair between two files, so both are one rank's."""
    jobs = [job(*names) for names in ("a", "d", "ef", "g", "h", "bc")]
    shares = deal_out(shards("ab", "cd", "ef", "gh"), jobs, team_of(3))
    a, d, ef, g, h, bc = shares.owners
    assert a == d == bc
    assert g == h
    assert len({a, ef, g}) == 3
    assert not shares.files_are_shared


def test_few_files_are_shared_on_one_machine_only() -> None:
    jobs = list(map(job, "abcdef"))
    shares = deal_out(shards("abcdef"), jobs, team_of(6, local=3))
    assert shares.files_are_shared
    assert sorted(shares.owners) == [0, 0, 1, 1, 2, 2]
    alone = deal_out(shards("abc", "def"), jobs, team_of(2, local=1))
    assert not alone.files_are_shared
    assert sorted(alone.owners) == [0, 0, 0, 1, 1, 1]


def test_reading_that_dominates_is_halved_by_two_ranks() -> None:
    rates = Rates(rank_read=1e9, storage_read=8e9, link=100e9, expert_seconds=0.01)
    one, two = (forecast(WORK, rates, n).streamed for n in (1, 2))
    assert one == pytest.approx(WORK.total_bytes / 1e9 + 0.01)
    assert 1.9 < one / two < 2


def test_a_storage_that_is_full_gives_nothing_to_more_ranks() -> None:
    rates = Rates(rank_read=1e9, storage_read=1e9, link=100e9)
    one, four = (forecast(WORK, rates, n) for n in (1, 4))
    assert four.read == one.read
    assert four.streamed > one.streamed  # what is exchanged comes on top


def test_what_every_rank_computes_does_not_shrink() -> None:
    rates = Rates(1e12, 1e12, 1e12, replicated_seconds=1.0, expert_seconds=1.0)
    assert forecast(WORK, rates, 1).resident == pytest.approx(20)
    assert forecast(WORK, rates, 1000).resident == pytest.approx(10, rel=0.01)


def test_ranks_on_one_device_share_it() -> None:
    """Two ranks do what is replicated twice, one after the other; the experts once."""
    rates = Rates(1e12, 1e12, 1e12, replicated_seconds=1.0, expert_seconds=1.0)
    assert forecast(WORK, rates, 2, ranks_a_device=2).resident == pytest.approx(30, rel=0.01)
