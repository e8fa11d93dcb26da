"""What glibc does with freed memory: kept for the next array, not given back and cleared anew.

Slices decode a few megabytes at a time, over and over. By default every such array is fresh pages
from the kernel, which took half of the time of a conversion (docs/log.md).
"""

from __future__ import annotations

import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEPT_BYTES = 256 << 20
_LARGEST_ARRAY = 32 << 20
"""The most that glibc accepts; what is larger still goes back at once."""


def keep_freed_memory() -> bool:
    """Set it for this process, unless the user has; says whether it is set. For verbs only."""
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return False
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_ARRAY) and mallopt(_TRIM_THRESHOLD, _KEPT_BYTES))
