"""The record of a replica, v4surgery.json, and the recipe beside it: written, and read again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from v4surgery.catalogue import I64
from v4surgery.checkpoint.layout import PROVENANCE_FILE
from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.errors import CheckpointError
from v4surgery.recipes import Recipe, recipe_from_text
from v4surgery.slicers.lineage import describe_parent
from v4surgery.slicers.plan import Plan
from v4surgery.slicers.record_shape import shape_problem
from v4surgery.summary import parameters
from v4surgery.version import __version__

RECIPE_FILE = "recipe.yaml"


def origin_of(parent: Checkpoint, plan_hash: str) -> dict[str, Any]:
    """What every record begins with: who wrote it, by which plan, from which parent."""
    weights = parent.weights_id
    return {
        "format": 1,
        "tool": {"name": "v4surgery", "version": __version__},
        "plan_hash": plan_hash,
        "parent": {
            **parent.source.identity(),
            **({} if weights is None else {"weights": weights}),
            "fingerprint": parent.fingerprint,
            **describe_parent(parent),
        },
    }


def provenance_of(
    plan: Plan, digests: Mapping[str, str], report: Mapping[str, Any]
) -> dict[str, Any]:
    """v4surgery.json: where every tensor comes from, without a path or a date."""
    tensors = {}
    for edit in plan.edits:
        source = edit.source
        for output in edit.outputs:
            item: dict[str, Any] = {"how": edit.transform, "blake3": digests.get(output.name)}
            if source is not None:
                part = source.weight if output is edit.outputs[0] else source.scale
                item["from"] = source.entry.stem
                if part is not None:
                    item["range"] = [part.file, part.begin, part.end]
            if edit.mix is not None:
                item |= edit.mix.to_json()
            tensors[output.name] = item
    counted = [edit for edit in plan.edits if edit.target.template.storage != I64]
    return {
        **origin_of(plan.parent, plan.plan_hash),
        "recipe": plan.recipe.name,
        "parameters": parameters(plan.catalogue),
        "num_tensors": len(counted),
        "notes": list(plan.notes),
        "selections": plan.selections.to_json(),
        "report": dict(report),
        "tensors": tensors,
    }


def read_provenance(replica: Checkpoint) -> dict[str, Any]:
    """v4surgery.json of a replica.

    Raises:
        CheckpointError: There is none, or it is no record of a slice.
    """
    where = f"{replica.name}/{PROVENANCE_FILE}"
    try:
        record = json.loads(replica.read_file(PROVENANCE_FILE))
    except (ValueError, RecursionError, OSError, CheckpointError):
        record = None
    if not isinstance(record, dict) or "selections" not in record:
        raise CheckpointError(
            "not a replica: it does not say what it was cut from",
            where=where,
            rule="a folder that `v4surgery slice` wrote",
        )
    problem = shape_problem(record)
    if problem is not None:
        raise CheckpointError(
            "the replica's record is malformed",
            where=where,
            value=problem,
            rule="v4surgery.json as `v4surgery slice` writes it",
            hint="get it from where the replica came from, or slice again into another folder",
        )
    return record


def read_recipe(replica: Checkpoint) -> Recipe:
    """The resolved recipe that a replica carries.

    Raises:
        CheckpointError: It is no replica, or its recipe is no text.
        RecipeError: Its recipe has problems.
    """
    read_provenance(replica)  # says best what is wrong with a folder that is no replica
    where = f"{replica.name}/{RECIPE_FILE}"
    try:
        text = replica.read_file(RECIPE_FILE).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError("the recipe is not UTF-8 text", where=where, value=error) from None
    # A resolved recipe is whole: one that names other files would have us open them.
    return recipe_from_text(text, RECIPE_FILE, is_whole=True)
