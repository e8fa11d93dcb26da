"""``v4surgery`` with an accident on one rank: VICTIM=<rank>:<what>:<place>:<count>.

The rank may come ``late``, by ``count`` seconds, to all or to its ``report``; or it is ``hasty``:
between the tries of a read from the Hub it hardly waits, and the Hub sees which rank asks.

After ``count`` chunks of a slice (place ``chunk``) or blocks of a forward (``block``) the rank is
killed (``kill``), hangs (``stop``), finds its disk full (``full``), or meets bytes that it cannot
read (``unread``).

With SHARED_GPU all ranks compute on the first GPU. NCCL refuses two ranks on one GPU of a host, so
each says that it is on a host of its own, and NCCL goes through sockets.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import Any

rank, what, place, count = os.environ.get("VICTIM", "-1:::0").split(":")
left = int(count)


def accident() -> None:
    global left
    left -= 1
    if left >= 0:
        return
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    from v4surgery.errors import ReadError

    raise ReadError("the disk has gone", where="a cable", hint="put it back")


def before(owner: Any, name: str) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        accident()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


os.environ["HF_HUB_USER_AGENT_ORIGIN"] = "rank-" + os.environ["RANK"]
if os.environ["RANK"] == rank:
    if what == "late" and place == "report":
        from v4surgery.validation import report

        write = report.write_report
        report.write_report = lambda *args: (time.sleep(left), write(*args))[1]
    elif what == "late":
        time.sleep(left)
    elif what == "hasty":
        from functools import partial

        from v4surgery.checkpoint import remote
        from v4surgery.checkpoint.patience import Patience

        remote.Patience = partial(Patience, wait=lambda wake, _: wake.wait(0.05))  # type: ignore[misc,assignment]
    elif place == "chunk":
        from v4surgery.checkpoint.shard import OutputFile

        before(OutputFile, "append")
    else:
        from v4surgery.model.streaming import Streamer

        before(Streamer, "run_block")

if "SHARED_GPU" in os.environ:
    from v4surgery.distributed import team

    os.environ["NCCL_HOSTID"] = f"host-{os.environ['RANK']}"
    team.rank_device = lambda name, _: name if name == "cpu" else "cuda:0"

from v4surgery.cli import main  # noqa: E402 - the accident is prepared first

main()
