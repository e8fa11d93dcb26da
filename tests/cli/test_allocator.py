"""Freed arrays are used again without the kernel, where the C library can be told so."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from v4surgery.cli._allocator import keep_freed_memory

assert keep_freed_memory() == (sys.argv[1] == "kept")
for _ in range(100):
    arrays = [np.ones(2 << 20, np.uint8) for _ in range(8)]
    del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(how: str, **environment: str) -> int:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc here")
def test_pages_are_not_asked_for_again() -> None:
    """Touched are 100 times 16 MB, in pages of 4 kB; a user's own setting stays."""
    by_default = faults("left", MALLOC_ARENA_MAX="4")
    assert by_default > 50_000
    assert faults("kept") < by_default / 5
