"""A command on several ranks: one speaks, one reports what failed, and then all end.

A rank that fails says so in the store where ranks meet, before it exits; torchrun then ends the
others (SIGTERM). A rank that is killed says nothing, so the first survivor that loses it reports.
SIGTERM is waited for in a thread: the main one may be inside a collective that never returns. On
several machines that thread also looks whether the others live.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from v4surgery.distributed.launch import Launch, find_launch, lost_rank, require_verb
from v4surgery.distributed.pulse import PERIOD, Pulse

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

_FAILURES = "v4surgery/failures"
_PATIENCE = timedelta(seconds=10)
# The first rank reports what all ranks found wrong; others wait so long for it.
_COURTESY = timedelta(seconds=2)


class Session:
    """This process's part of a run; the first rank is heard, the others are silent.

    Args:
        launch: From torchrun.
        report: Prints an error.
    """

    def __init__(self, launch: Launch, report: Callable[[Exception], None]) -> None:
        self.launch, self._report = launch, report
        self._stderr: TextIO = sys.stderr
        self._store: TCPStore | None = None
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # peers that go are reported once
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before there are threads
        threading.Thread(target=self._await_end, name="v4surgery-end", daemon=True).start()
        if launch.rank:
            sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the end

    def fail(self, error: Exception, code: int) -> NoReturn:
        """Report an error unless another rank did, and end; torchrun ends the others."""
        if self._is_first_failure():
            sys.stderr = self._stderr
            self._report(error)
        self._exit(code)

    def leave(self, code: int) -> NoReturn:
        """End as all ranks do, with what the first one has printed: a usage error, for one."""
        with contextlib.suppress(Exception):
            store = self._connect()
            if self.launch.rank:  # torchrun would end the first one before it has said so
                store.wait([_FAILURES], _PATIENCE)
            else:
                store.add(_FAILURES, 1)
        self._exit(code)

    def _await_end(self) -> None:
        pulse, found = Pulse(self.launch.node, self.launch.nodes), None
        while signal.sigtimedwait({signal.SIGTERM}, PERIOD) is None:
            found = self._look(pulse)
            if found is not None:
                break
        lost = lost_rank(f"rank {self.launch.rank} of {self.launch.size}", found)
        self.fail(lost, lost.exit_code)

    def _look(self, pulse: Pulse) -> str | None:
        """What is wrong with the other machines, if there are any and they have met."""
        torch = sys.modules.get("torch")
        if not pulse.others or self.launch.local_rank or torch is None:
            return None
        try:
            if not torch.distributed.is_initialized():
                return None
            store = self._connect()
            if store.check([_FAILURES]):
                return "another machine reported a failure"
            node = pulse.find_lost(store, time.monotonic())
        except AttributeError:  # torch is being imported
            return None
        except RuntimeError as error:
            return f"the first machine is gone: {str(error).partition(chr(10))[0]}"
        return None if node is None else f"machine {node} is silent"

    def _is_first_failure(self) -> bool:
        """Whether no other rank has failed before; if they cannot be asked, it is so."""
        with contextlib.suppress(Exception):
            store = self._connect()
            if self.launch.rank:
                with contextlib.suppress(Exception):
                    store.wait([_FAILURES], _COURTESY)
            return store.add(_FAILURES, 1) == 1
        return True

    def _connect(self) -> TCPStore:
        """A connection of its own: the main thread may be waiting in the other."""
        if self._store is None:
            from torch.distributed import TCPStore  # type: ignore[attr-defined]

            self._store = TCPStore(
                self.launch.address, self.launch.port, is_master=False, timeout=_PATIENCE
            )
        return self._store

    def _exit(self, code: int) -> NoReturn:
        for stream in (sys.stdout, self._stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)  # no destructor may wait for a peer that is gone


def begin_session(arguments: Sequence[str], report: Callable[[Exception], None]) -> Session | None:
    """The session of this process; None where it runs alone.

    Raises:
        UsageError: torchrun's variables are wrong.
    """
    launch = find_launch()
    if launch is None:
        return None
    session = Session(launch, report)
    try:
        require_verb(arguments, launch.size)
    except Exception as error:
        session.fail(error, getattr(error, "exit_code", 1))
    return session
