"""Small, faithful, loadable DeepSeek-V4 replicas cut from the real weights.

::

    import v4surgery as v4

    parent = v4.open("path/to/DeepSeek-V4-Flash")   # lazy: headers only
    v4.score(parent, "prompts.txt", "scores.safetensors")
    plan = v4.plan(parent, "mini3b", scores="scores.safetensors")   # pure; scores are optional
    replica = v4.slice(plan, "out/mini3b")          # streams, resumes
    v4.verify(replica, parent)
    v4.validate(replica, parent).passed             # streams the parent layer by layer

Importing the package imports nothing heavy: each name is loaded when it is first used, and
torch only when ``score`` or ``validate`` is called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from v4surgery.version import __version__

if TYPE_CHECKING:
    from v4surgery.api import convert, open, plan, score, slice, validate, verify
    from v4surgery.checkpoint.reader import Checkpoint
    from v4surgery.config import V4Config
    from v4surgery.errors import V4SurgeryError
    from v4surgery.recipes import Recipe, load_recipe
    from v4surgery.slicers.apply import Replica
    from v4surgery.slicers.plan import Plan
    from v4surgery.slicers.verify import Verification

__all__ = [
    "Checkpoint",
    "Plan",
    "Recipe",
    "Replica",
    "V4Config",
    "V4SurgeryError",
    "Verification",
    "__version__",
    "convert",
    "load_recipe",
    "open",
    "plan",
    "score",
    "slice",
    "validate",
    "verify",
]

_HOMES = {
    "Checkpoint": "v4surgery.checkpoint.reader",
    "Plan": "v4surgery.slicers.plan",
    "Recipe": "v4surgery.recipes",
    "Replica": "v4surgery.slicers.apply",
    "V4Config": "v4surgery.config",
    "V4SurgeryError": "v4surgery.errors",
    "Verification": "v4surgery.slicers.verify",
    "convert": "v4surgery.api",
    "load_recipe": "v4surgery.recipes",
    "open": "v4surgery.api",
    "plan": "v4surgery.api",
    "score": "v4surgery.api",
    "slice": "v4surgery.api",
    "validate": "v4surgery.api",
    "verify": "v4surgery.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
