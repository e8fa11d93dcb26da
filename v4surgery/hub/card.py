"""The model card of a replica: what it is, what was kept of what, and how faithful that is.

A card is made from the replica's own files alone (``v4surgery.json``, ``config.json``,
``recipe.yaml``, ``verified.json``, ``validation.json``), so the same replica has the same card
anywhere. It opens with a comment that says so: a README.md that begins otherwise was written by
its owner and is never replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from v4surgery.checkpoint.layout import PROVENANCE_FILE
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.errors import CheckpointError
from v4surgery.hub.markdown import bullets, fenced, plain, table
from v4surgery.hub.serving import loading_notes
from v4surgery.presets import PRESETS
from v4surgery.recipes import Recipe
from v4surgery.redact import without_tokens
from v4surgery.slicers.edit import TRANSFORMS
from v4surgery.slicers.lineage import CARD_FILE, license_fields, without_front_matter
from v4surgery.slicers.provenance import RECIPE_FILE, read_provenance, read_recipe
from v4surgery.slicers.verified import read_verified
from v4surgery.summary import dimensions

VALIDATION_FILE = "validation.json"
MARKER = (
    "<!-- Written by v4surgery from this replica's own files, and written again at each push. "
    "Delete this comment to keep a text of your own. -->"
)

# The published V4 repositories are under MIT. Source: the `license` field of their cards.
_PUBLISHED = {item.repo_id: "mit" for item in PRESETS.values() if item.repo_id}
_MIT_TERMS = "Permission is hereby granted, free of charge, to any person obtaining a copy"
_REPO_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


@dataclass(frozen=True)
class Facts:
    """What the card says, as read from the replica.

    Attributes:
        record: v4surgery.json.
        recipe: The recipe as run, and its text.
        sizes: Dimensions of the replica; ``parent_sizes`` of the parent, where recorded.
        verified: verified.json, if verify has passed.
        validation: validation.json, if there is one; see :func:`read_validation`.
        license: Its fields in the front matter.
    """

    record: Mapping[str, Any]
    recipe: Recipe
    recipe_text: str
    sizes: Mapping[str, Any]
    verified: Mapping[str, Any] | None
    validation: Mapping[str, Any] | None
    license: Mapping[str, str]
    loading: tuple[str, ...]

    @property
    def parent(self) -> Mapping[str, Any]:
        parent: Mapping[str, Any] = self.record["parent"]
        return parent

    @property
    def base_model(self) -> str | None:
        """The parent's repository on the Hub, where weights of it are in here."""
        name = self.parent["name"]
        is_cut = self.recipe.init != "random" and not self.parent.get("synthetic")
        return name if is_cut and "revision" in self.parent and _REPO_ID.fullmatch(name) else None


def read_facts(replica: Checkpoint) -> Facts:
    """Everything that the card of a replica says.

    Raises:
        CheckpointError: It is no replica, or one of its files is malformed.
    """
    record = read_provenance(replica)
    return Facts(
        record=record,
        recipe=read_recipe(replica),
        recipe_text=replica.read_file(RECIPE_FILE).decode(),
        sizes=dimensions(replica.config),
        verified=read_verified(replica),
        validation=read_validation(replica),
        license=_license(replica, record["parent"]),
        loading=tuple(loading_notes(replica.config)),
    )


def read_validation(replica: Checkpoint) -> dict[str, Any] | None:
    """The validation report of a replica, if there is one.

    ``validation.json`` holds at least ``{"verdict": "pass" or "fail", "grade": text,
    "summary": {name: number}}``; whatever else it holds is not shown on the card.

    Raises:
        CheckpointError: It is there, and is not of this form.
    """
    if VALIDATION_FILE not in replica.source.list_files():
        return None
    try:
        report = json.loads(replica.read_file(VALIDATION_FILE))
        if report["verdict"] not in ("pass", "fail"):
            raise ValueError(f"verdict {report['verdict']!r}")
        summary = {str(name): float(value) for name, value in report["summary"].items()}
        return {"verdict": report["verdict"], "grade": str(report["grade"]), "summary": summary}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            "the validation report is malformed",
            where=f"{replica.name}/{VALIDATION_FILE}",
            value=f"{type(error).__name__}: {error}"[:200],
            rule='{"verdict": "pass" or "fail", "grade": text, "summary": {name: number}}',
            hint="validate again, or delete the file",
        ) from None


def make_card(replica: Checkpoint, repo_id: str | None = None) -> str:
    """The text of README.md, front matter included.

    Args:
        replica: An opened replica.
        repo_id: Where it will live; the folder's name stands in for it where there is none yet.

    Raises:
        CheckpointError: It is no replica, or one of its files is malformed.
    """
    name = repo_id or replica.name
    try:
        facts = read_facts(replica)
        # Width without bound: a folded line is the same YAML, and worse to read.
        head = yaml.safe_dump(
            make_front_matter(facts), sort_keys=False, allow_unicode=True, width=float("inf")
        )
        body = "\n\n".join(_body(facts, name))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            "the replica's record is malformed",
            where=f"{replica.name}/{PROVENANCE_FILE}",
            value=f"{type(error).__name__}: {error}"[:200],
            rule="v4surgery.json as `v4surgery slice` writes it",
            hint="slice it again into another folder",
        ) from None
    title = plain(name.rpartition("/")[2])
    return without_tokens(f"---\n{head}---\n\n{MARKER}\n\n# {title}\n\n{body}\n")


def is_generated(text: str) -> bool:
    """Whether a README.md is a card of ours, which may be written anew."""
    return without_front_matter(text).lstrip().startswith(MARKER)


def is_empty(text: str) -> bool:
    """Whether a README.md says nothing to a reader, whatever its front matter says."""
    return not re.sub(r"<!--.*?-->", "", without_front_matter(text), flags=re.DOTALL).strip()


def card_of(replica: Checkpoint, repo_id: str | None = None) -> str:
    """The card that a replica has: its owner's README.md, or else ours as of now.

    Raises:
        CheckpointError: It is no replica, or its README.md is no text.
    """
    if CARD_FILE in replica.source.list_files():
        try:
            own = replica.read_file(CARD_FILE).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                "the card is not UTF-8 text", where=f"{replica.name}/{CARD_FILE}", value=error
            ) from None
        if not is_generated(own):
            read_provenance(replica)
            return own
    return make_card(replica, repo_id)


def make_front_matter(facts: Facts) -> dict[str, Any]:
    """What the Hub reads of the card.

    The Hub knows four relations to a base model: finetune, adapter, merge, quantized. A cut is
    none of them; finetune, which it assumes where nothing is said, stands for changed weights.
    """
    data: dict[str, Any] = dict(facts.license)
    if facts.base_model is not None:
        data |= {"base_model": facts.base_model, "base_model_relation": "finetune"}
    tags = ["v4surgery", "deepseek_v4", "mixture-of-experts", "pruned"]
    if facts.parent.get("synthetic") or facts.recipe.init == "random":
        tags.append("random-weights")
    return data | {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }


def _license(replica: Checkpoint, parent: Mapping[str, Any]) -> dict[str, str]:
    """As the parent's card declared it; else what its LICENSE file or its repository says."""
    if declared := license_fields(dict(parent.get("license") or {})):
        return declared
    if "LICENSE" in replica.source.list_files():
        text = " ".join(replica.read_file("LICENSE").decode(errors="replace").split())
        if _MIT_TERMS in text:
            return {"license": "mit"}
        return {"license": "other", "license_name": "parent-license", "license_link": "LICENSE"}
    known = _PUBLISHED.get(parent["name"])
    return {"license": known} if known and "revision" in parent else {}


def _body(facts: Facts, name: str) -> Iterator[str]:
    if facts.recipe.description:
        yield plain(facts.recipe.description)
    yield _what_it_is(facts)
    yield "## What was kept of what"
    yield _kept(facts)
    yield _layers(facts)
    yield from _tensors(facts.record["report"])
    yield "## Fidelity"
    yield bullets(_fidelity(facts))
    yield "## Recipe"
    yield fenced(facts.recipe_text, "yaml")
    yield "## Provenance"
    yield _provenance(facts)
    yield "## How to load it"
    yield fenced(
        "from transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})",
        "python",
    )
    yield bullets(facts.loading)
    yield "## Limits"
    yield bullets(_limits(facts))


def _what_it_is(facts: Facts) -> str:
    parent = plain(facts.parent["name"])
    like = facts.parent.get("synthetic")
    if facts.recipe.init == "random":
        return (
            f"A randomly initialised scaffold: the shape of a cut of {parent}, and **none of its "
            "weights**. It has to be trained before it says anything."
        )
    if like:
        return (
            f"A replica cut from {parent}, a **synthetic** parent: random values in the layout of "
            f"{plain(like)}. It fits tests of loaders, kernels and engines; its text means nothing."
        )
    how = "some axes in another basis, " if facts.record.get("bases") else ""
    return (
        f"A replica of {parent}: the parent's own weights with units removed, {how}and nothing "
        "trained. "
        "It is a warm start, a test fixture, a scaffold; it is not a chat model."
    )


def _kept(facts: Facts) -> str:
    before: Mapping[str, Any] = facts.parent.get("dimensions") or {}
    rows = [(name, before.get(name, "-"), value) for name, value in facts.sizes.items()]
    totals = facts.record["parameters"]
    of_parent: Mapping[str, int] = facts.parent.get("parameters") or {}
    rows += [
        (f"parameters, {label}", f"{of_parent[key]:,}" if of_parent else "-", f"{totals[key]:,}")
        for key, label in (
            ("total", "all"),
            ("without_drafters", "without drafters"),
            ("active", "active per token"),
        )
    ]
    return table(("dimension", "parent", "replica"), rows, right=("parent", "replica"))


def _layers(facts: Facts) -> str:
    pairs = [
        f"{block['target'].rstrip('.')} is {block['source'].rstrip('.')}"
        for block in facts.record["selections"]["blocks"]
        if block["target"] != block["source"]
    ]
    if not pairs:
        return "Every block comes from the parent's block of the same number."
    return (
        "Blocks come from the parent's of the same number, except: "
        + plain(", ".join(pairs))
        + ". The units kept inside each block are listed in `v4surgery.json`."
    )


def _tensors(report: Mapping[str, Any]) -> Iterator[str]:
    transforms = report["transforms"]
    yield table(
        ("tensors", "how", "meaning"),
        [(count, name, TRANSFORMS.get(name, "")) for name, count in transforms.items()],
        right=("tensors",),
    )
    lost = report["hash_tables"]["tokens_by_lost_experts"]
    if lost:
        columns = [str(number) for number in range(max(map(len, lost.values())))]
        yield "Tokens of each hash table by how many of their experts were removed and replaced:"
        rows = [(stem, *counts) for stem, counts in lost.items()]
        yield table(("table", *columns), rows, right=columns)


def _fidelity(facts: Facts) -> Iterator[str]:
    verified, validation = facts.verified, facts.validation
    if verified is not None:
        yield (
            f"Bytes: verified. All {verified['tensors']:,} tensors, "
            f"{verified['bytes_compared']:,} bytes, were computed again from the parent and are "
            f"equal{_up_to_rounding(verified)} (v4surgery {plain(verified['tool']['version'])}); "
            "`verified.json` has the BLAKE3 digest of every file."
        )
    else:
        yield "Bytes: not verified against the parent yet."
    requantized = facts.record["report"]["requantized"]
    if requantized["tensors"]:
        yield (
            f"Rounding: {requantized['tensors']:,} tensors were quantized again, "
            f"{requantized['lossless']:,} of them without loss; the largest relative error of the "
            f"others is {requantized['largest_relative_rms']:.3g} (rms)."
        )
    if validation is None:
        yield (
            "Behaviour: not validated. Nobody has measured yet how close its activations and "
            "logits come to the parent's."
        )
        return
    figures = ", ".join(f"{name} {value:.4g}" for name, value in validation["summary"].items())
    verdict = "passed" if validation["verdict"] == "pass" else "**failed**"
    yield f"Behaviour ({plain(validation['grade'])}): validation {verdict}; {plain(figures)}."


def _up_to_rounding(verified: Mapping[str, Any]) -> str:
    rounded = verified.get("rounded", 0)
    return f", {rounded:,} of them up to one unit in the last place" if rounded else ""


def _provenance(facts: Facts) -> str:
    record, parent = facts.record, facts.parent
    tool = record["tool"]
    rows = [
        ("parent", parent["name"]),
        ("parent commit", parent.get("revision", "a local folder, no commit on record")),
        ("parent fingerprint (config and headers)", parent["fingerprint"]),
        ("recipe", record["recipe"]),
        ("plan", record["plan_hash"]),
        ("made by", f"{tool['name']} {tool['version']}"),
    ]
    return table(("what", "which"), rows)


def _limits(facts: Facts) -> Iterator[str]:
    yield (
        "It is a warm start, not a chat model: what a cut removes is not trained back. Expect "
        "text without sense until it has been trained."
    )
    yield "It has whatever biases and gaps its parent has; nothing was done about them."
    for note in facts.record["notes"]:
        yield plain(note)
