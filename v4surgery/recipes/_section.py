"""What every part of a recipe is made of: the base model, its number and text types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, ClassVar, TypeGuard

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)
from pydantic_core import PydanticCustomError

from v4surgery.config import MAX_REAL, MIN_SCALING
from v4surgery.redact import holds_token

__all__ = [
    "MAX_LAYERS",
    "Count",
    "Digest",
    "Index",
    "LayerCount",
    "Line",
    "NonNegative",
    "Positive",
    "Section",
    "SeedInt",
    "ShardBytes",
    "Share",
    "Slug",
    "Text",
    "broken_rule",
    "is_whole",
]

MAX_LAYERS = 1000
"""Limit of `layers.count` and of an expanded `compress_ratios` list."""

Count = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]
Index = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]
LayerCount = Annotated[StrictInt, Field(ge=1, le=MAX_LAYERS)]
SeedInt = Annotated[StrictInt, Field(ge=0, le=2**63 - 1)]
Positive = Annotated[StrictFloat, Field(ge=MIN_SCALING, le=MAX_REAL, allow_inf_nan=False)]
NonNegative = Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[StrictFloat, Field(ge=0, le=1, allow_inf_nan=False)]


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an int, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def broken_rule(message: str, **values: object) -> PydanticCustomError:
    """The error of a rule of ours; ``values`` fill the ``{}`` fields of the message."""
    return PydanticCustomError("recipe_rule", message, values)


def _public(text: str) -> str:
    if holds_token(text):
        raise broken_rule(
            "must not hold a Hub token: a recipe is copied into the replica and its card"
        )
    return text


Text = Annotated[StrictStr, AfterValidator(_public)]


def _one_line(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise broken_rule("must be one line of printable text, not empty")
    return text


Line = Annotated[Text, AfterValidator(_one_line)]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def _slug(text: str) -> str:
    if not _NAME.fullmatch(text) or len(text) > 100:
        raise broken_rule(
            "must be made of a-z, 0-9, '.', '_' and '-', start with a letter or digit, "
            "and have at most 100 characters"
        )
    return text


_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?) ?([kmgt]?)(i?)b", re.IGNORECASE)


def _size_bytes(value: object) -> object:
    if not isinstance(value, str):
        return value
    if (match := _SIZE.fullmatch(value)) is None or (match[3] and not match[2]):
        raise broken_rule("must be a number of bytes, or a size such as 5GB, 500MB or 2GiB")
    base = 1024 if match[3] else 1000
    return int(Decimal(match[1]) * base ** ("kmgt".index(match[2].lower()) + 1 if match[2] else 0))


def _digest(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise broken_rule("must be 64 hexadecimal digits, in lower case")
    return text


Digest = Annotated[StrictStr, AfterValidator(_digest)]
Slug = Annotated[Text, AfterValidator(_slug)]
ShardBytes = Annotated[StrictInt, Field(ge=1, le=2**63 - 1), BeforeValidator(_size_bytes)]


class Section(BaseModel):
    """What all parts of a recipe share: unknown keys refused, frozen, null means not written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: ClassVar[str] = "must be a mapping of keys to values"
    """What the error says when the whole section is of the wrong kind."""
    entry_sections: ClassVar[dict[str, type[Section]]] = {}
    """The sections that the entries of a list field are written as, but not kept as."""

    @model_validator(mode="before")
    @classmethod
    def _written_keys_only(cls, value: object) -> object:
        value = cls.long_form(value)
        if not isinstance(value, Mapping):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        written = {k: v for k, v in value.items() if v is not None or k not in known}
        return cls._completed(written)

    @classmethod
    def long_form(cls, value: object) -> object:
        """Turns a short form, such as an int for {keep: int}, into a mapping."""
        return value

    @classmethod
    def _completed(cls, written: dict[Any, Any]) -> dict[Any, Any]:
        """Fills in keys that follow from others."""
        return written
