"""What a replica's record keeps of its parent, so that a card can be written without the parent."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from v4surgery.checkpoint.layout import PROVENANCE_FILE
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.errors import CheckpointError
from v4surgery.summary import dimensions, parameters

CARD_FILE = "README.md"
MAX_CARD_BYTES = 1_000_000
MAX_FRONT_MATTER = 64_000

# The Hub server's own pattern of a card's front matter.
# Source: huggingface_hub/repocard.py, REGEX_YAML_BLOCK.
_FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_LICENSE_FIELDS = {
    "license": re.compile(r"[a-z0-9][a-z0-9.+-]{0,39}"),
    "license_name": re.compile(r"[\w.+-][\w .+-]{0,99}"),
    "license_link": re.compile(r"LICENSE(\.md|\.txt)?|https://[\w.-]+(/[\w./%+-]*)?"),
}


class _PlainLoader(yaml.SafeLoader):
    """Without aliases: merging them in one another takes a few lines and all memory."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a front matter has no aliases")
        return super().compose_node(parent, index)


def describe_parent(parent: Checkpoint) -> dict[str, Any]:
    """Plain data for ``parent`` in v4surgery.json, beside its name and fingerprint.

    Returns:
        ``dimensions`` and ``parameters`` as :mod:`v4surgery.summary` gives them; ``license`` with
        the license fields of the parent's own card, where it has one; ``synthetic`` with the
        preset that its random values follow, where it, or what it was cut from, is synthetic.
    """
    about: dict[str, Any] = {
        "dimensions": dimensions(parent.config),
        "parameters": parameters(parent.catalogue),
    }
    names = parent.source.list_files()
    if CARD_FILE in names and parent.source.size(CARD_FILE) <= MAX_CARD_BYTES:
        text = parent.read_file(CARD_FILE).decode(errors="replace")
        if declared := license_fields(front_matter(text)):
            about["license"] = declared
    if PROVENANCE_FILE in names and (like := _synthetic_like(parent)):
        about["synthetic"] = like
    return about


def front_matter(text: str) -> dict[str, Any]:
    """The YAML block at the head of a card; empty if there is none, or if it is malformed."""
    found = _FRONT_MATTER.match(text)
    if found and len(found[1]) > MAX_FRONT_MATTER:
        return {}
    try:
        data = yaml.load(found[1], _PlainLoader) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def without_front_matter(text: str) -> str:
    """What a reader of the card sees."""
    return _FRONT_MATTER.sub("", text, count=1)


def license_fields(data: dict[str, Any]) -> dict[str, str]:
    """The license fields of a front matter that have the form the Hub asks for."""
    return {
        name: data[name]
        for name, form in _LICENSE_FIELDS.items()
        if isinstance(data.get(name), str) and form.fullmatch(data[name])
    }


def _synthetic_like(parent: Checkpoint) -> str | None:
    try:
        record = json.loads(parent.read_file(PROVENANCE_FILE))
        like = record.get("like") if record.get("synthetic") else record["parent"].get("synthetic")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, CheckpointError):
        return None
    return like if isinstance(like, str) else None
