"""The command line, the loopback Hub and the ranks, as the other rooms have them."""

from __future__ import annotations

from tests.cli.conftest import _plain_terminal, start, v4  # noqa: F401 - the command line
from tests.distributed.conftest import torchrun  # noqa: F401 - ranks as a user starts them
from tests.hub.conftest import (  # noqa: F401 - a Hub on loopback, and a replica to push to it
    _pushable,
    hub,
    replica,
    waits,
    writes,
)
