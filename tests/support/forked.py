"""The command line in processes of its own that are there at once: forked from one that is warm.

A fresh interpreter needs a third of a second before it does anything; killing it at a random
moment would mostly hit its imports.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

PRELOADED = ["v4surgery.cli", "v4surgery.conversion.run", "v4surgery.slicers.verify"]

_context = multiprocessing.get_context("forkserver")


class Ended(NamedTuple):
    """How a command ended: exit code (minus the signal that killed it), and what it printed."""

    code: int
    text: str
    seconds: float


def preload() -> None:
    """Before the first command: what every process has imported already."""
    _context.set_forkserver_preload(PRELOADED)


def run(
    args: Sequence[object],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    file_limit: int | None = None,
    kill_after: float | None = None,
) -> Ended:
    """Run ``v4surgery`` and wait for its end.

    Args:
        args: What follows ``v4surgery``.
        log: File that stdout and stderr go to.
        env: Environment variables to set.
        file_limit: No file can become larger (RLIMIT_FSIZE): for the process the disk is full.
        kill_after: Seconds until kill -9; None lets it end.
    """
    words = [str(arg) for arg in args]
    process = _context.Process(target=_child, args=(words, str(log), dict(env or {}), file_limit))
    began = time.monotonic()
    process.start()
    _wait(process, kill_after)
    seconds = time.monotonic() - began
    code = process.exitcode
    process.close()
    assert code is not None
    return Ended(code, log.read_text(errors="replace") if log.exists() else "", seconds)


def kill_at_random(
    args: Sequence[object],
    log: Path,
    rng: random.Random,
    *,
    seconds: float,
    kills: int,
    env: Mapping[str, str] | None = None,
) -> int:
    """Begin a command again and again, and kill it: so many times, or until it ends before.

    Args:
        args: What follows ``v4surgery``.
        log: File that stdout and stderr go to.
        rng: Chooses the moments.
        seconds: What the command takes undisturbed.
        kills: How many kills to try.
        env: Environment variables to set.

    Returns:
        How many times it was killed.
    """
    for number in range(kills):
        ended = run(args, log, env=env, kill_after=rng.uniform(0.02, seconds))
        if ended.code == 0:
            return number
        assert ended.code == -9, ended
    return kills


def _wait(process: BaseProcess, kill_after: float | None) -> None:
    process.join(120 if kill_after is None else kill_after)
    if process.is_alive():
        process.kill()
        process.join()


def _child(args: list[str], log: str, env: dict[str, str], file_limit: int | None) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.environ.update(env)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    from v4surgery.cli import main

    main(args)
