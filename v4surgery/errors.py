"""Every exception that v4surgery raises on purpose.

::

    V4SurgeryError                  exit code 1
    ├── UsageError                  exit code 2: the command or a library call does not make sense
    │   └── RecipeError             a recipe file or an override, all its problems at once
    ├── CheckpointError             something about the files of a parent or a replica
    │   ├── HeaderError             a safetensors header that must not be trusted
    │   ├── ConfigError             config.json is no V4 config, or contradicts itself
    │   ├── CatalogueError          tensors missing, unknown, or of the wrong shape or dtype
    │   └── ReadError               bytes that could not be read exactly
    ├── PlanError                   the recipe cannot be applied to this parent
    ├── OutputError                 the output folder cannot be written, or is not ours to write
    ├── HubError                    the Hub refused a push, or failed at it
    ├── RankError                   another process of a run on several was lost
    └── VerificationFailed          exit code 3: the check ran and the replica failed
"""

from __future__ import annotations

__all__ = [
    "CatalogueError",
    "CheckpointError",
    "ConfigError",
    "HeaderError",
    "HubError",
    "OutputError",
    "PlanError",
    "RankError",
    "ReadError",
    "RecipeError",
    "UsageError",
    "V4SurgeryError",
    "VerificationFailed",
]


class V4SurgeryError(Exception):
    """The root: what went wrong, where, the value, the rule it breaks, and what to do next.

    Args:
        what: One sentence, no trailing full stop needed.
        where: File, ``file:line`` or tensor name.
        value: The offending value as found.
        rule: What would have been right.
        hint: The next command or step.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        value: object = None,
        rule: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.value, self.rule, self.hint = what, where, value, rule, hint
        super().__init__(self._render())

    def _render(self) -> str:
        lines = [self.what]
        labelled = (("where", self.where), ("value", self.value), ("rule", self.rule))
        lines += [f"  {label}: {item}" for label, item in labelled if item is not None]
        if self.hint is not None:
            lines.append(f"  next: {self.hint}")
        return "\n".join(map(_printable, lines))


def _printable(text: str) -> str:
    """Names and values are a stranger's: what could move the cursor is escaped."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


class UsageError(V4SurgeryError):
    exit_code = 2


class RecipeError(UsageError):
    """A recipe with problems; ``problems`` holds one line for each, in file order."""

    def __init__(self, source: str, problems: list[str], *, hint: str | None = None) -> None:
        self.problems = problems
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        super().__init__("\n".join([f"{source}: {count}", *problems]), hint=hint)


class CheckpointError(V4SurgeryError):
    pass


class HeaderError(CheckpointError):
    pass


class ConfigError(CheckpointError):
    pass


class CatalogueError(CheckpointError):
    pass


class ReadError(CheckpointError):
    pass


class PlanError(V4SurgeryError):
    pass


class OutputError(V4SurgeryError):
    pass


class HubError(V4SurgeryError):
    pass


class RankError(V4SurgeryError):
    pass


class VerificationFailed(V4SurgeryError):
    exit_code = 3
