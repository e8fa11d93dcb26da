"""The command line and the loopback Hub, as the other rooms have them."""

from __future__ import annotations

from tests.cli.conftest import _plain_terminal, start, v4  # noqa: F401 - the command line
from tests.hub.conftest import hub, waits  # noqa: F401 - a Hub on loopback
