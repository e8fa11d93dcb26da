"""Options that go together: a parameter whose type is a group stands for an option for each field.

Verbs that share options so declare them once, in an order and with defaults that are the same
everywhere, and hand them on as one value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Any, get_type_hints

from v4surgery.cli._options import (
    ActivationMemory,
    Activations,
    AsJson,
    Device,
    Dtype,
    FirstTokens,
    Implementation,
    Mode,
    Prompt,
    Prompts,
    Quiet,
    Revision,
    Token,
    TokenIds,
    Verbose,
    WeightMemory,
    Workers,
)

if TYPE_CHECKING:
    import os

    from v4surgery.checkpoint.reader import Checkpoint
    from v4surgery.model.numerics import Numerics


@dataclass(frozen=True)
class Reading:
    """How checkpoints are read."""

    revision: Revision = None
    token: Token = None
    max_workers: Workers = None

    def open(self, path: str | os.PathLike[str]) -> Checkpoint:
        from v4surgery.checkpoint.reader import open_checkpoint

        return open_checkpoint(
            path, revision=self.revision, token=self.token, workers=self.max_workers
        )

    def workers(self, *read: Checkpoint) -> int:
        """Threads that work on what is read."""
        from v4surgery.api import default_workers

        return self.max_workers or default_workers(*read)


@dataclass(frozen=True)
class Output:
    """What is printed."""

    as_json: AsJson = False
    quiet: Quiet = False
    verbose: Verbose = 0


@dataclass(frozen=True)
class Computing:
    """How a model computes."""

    mode: Mode = "exact"
    dtype: Dtype = None
    device: Device = "cpu"
    implementation: Implementation = "reference"

    def numerics(self) -> Numerics:
        from v4surgery.cli._model import make_numerics

        return make_numerics(self.mode, self.dtype, self.implementation)


@dataclass(frozen=True)
class Texts:
    """What a model reads."""

    prompt: Prompt = None
    prompts: Prompts = None
    ids: TokenIds = None
    tokens: FirstTokens = None


@dataclass(frozen=True)
class Streaming:
    """What a model that is read block by block may take."""

    weight_memory: WeightMemory = "8GB"
    activation_memory: ActivationMemory = "4GB"
    activations: Activations = "host"


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb as typer is to see it, with the options of its groups in their places."""
    groups: dict[str, type[Any]] = {}
    options: list[Parameter] = []
    for parameter in signature(verb, eval_str=True).parameters.values():
        if is_dataclass(group := parameter.annotation) and isinstance(group, type):
            groups[parameter.name] = group
            options += _options_of(group)
        else:
            options.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))

    @functools.wraps(verb)
    def with_options(**given: Any) -> None:
        values = {
            name: group(**{item.name: given.pop(item.name) for item in fields(group)})
            for name, group in groups.items()
        }
        verb(**given, **values)

    with_options.__signature__ = Signature(options)  # type: ignore[attr-defined]
    with_options.__annotations__ = {option.name: option.annotation for option in options}
    return with_options


def _options_of(group: type[Any]) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(
            item.name, Parameter.KEYWORD_ONLY, default=item.default, annotation=hints[item.name]
        )
        for item in fields(group)
    ]
