"""docs/recipes.md: the schema of a recipe, and the built-in ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args

import yaml

from docs_pages.markdown import code, fenced, table
from v4surgery.checkpoint.layout import INDEX_FILE
from v4surgery.checkpoint.reader import CONFIG_FILE, Checkpoint, open_checkpoint
from v4surgery.checkpoint.source import Source
from v4surgery.cli._output import count, size
from v4surgery.parents import parent_folder
from v4surgery.recipes import builtin_names, builtin_path, load_recipe, loader, schema
from v4surgery.slicers.plan import make_plan
from v4surgery.synth import plan_synthesis

BIGGEST = 2**31 - 1

WAYS: Mapping[str, str] = {
    "even": "Evenly spaced, beginning with the first: unit `i * size // keep`. The default.",
    "first": "The first ones.",
    "ids": "Those listed in `ids`; the order is kept, except that layers rise.",
    "random": "Seeded random ones, drawn anew for every layer; the same seed gives the same units.",
    "norm": "The largest norm of all weights that a unit owns. Reads those weights.",
    "gate": "Experts only: the largest norm of the gate row. Reads a few MB.",
    "kinds": "Layers only: the first layer of every kind, then the second of every kind.",
    "scores": "The best scores of a file (`scores`): the first score that the axis has.",
    "reap": "Experts: the largest norm that an expert adds, a mean over its own tokens.",
    "frequency": "Experts, token ids: those that are met most often.",
    "contribution": "Heads, groups, index heads: the largest part in what they add up to.",
    "activation": "Neurons, ranks: the largest |activation| times norm of what reads it.",
    "energy": "Channels, streams, dims: the largest mean square.",
    "influence": "Layers: those that turn the streams most.",
}
"""What docs say of each `by`; a kind of layer is its compress ratio class and its routing."""

METHODS: Mapping[str, str] = {
    "select": "Units of the parent, chosen as above. The default.",
    "pca": "`hidden_size`, `q_lora_rank`: the leading principal components, by rotation; norms are "
    "absorbed into the weights that follow. `hidden_size` needs `mtp: drop`.",
    "svd": "`o_lora_rank`: the truncated SVD of each group's `wo_b @ wo_a`.",
}
"""What docs say of each `method`."""

SHORT_FORMS = (
    ("hidden_size", "1536"),
    ("hidden_size", "[0, 1, 2, 7]"),
    ("layers", "28"),
    ("layers", "[0, 2, 3]"),
    ("layers", "{compress_ratios: [0, {repeat: 2, of: [4, 128]}]}"),
    ("experts", "24"),
    ("head_dim", "{nope: 32, rope: 32}"),
)


def recipes_page() -> Iterator[str]:
    """The schema of a recipe and the built-in ones."""
    yield "# Recipes"
    yield (
        "A recipe is a YAML file that says which units of a parent a replica keeps on each axis "
        "and how the result is stored. An axis that it does not name is kept whole. Unknown keys "
        "are errors; `v4surgery recipes check FILE` prints all problems of a file at once, each "
        "with its line."
    )
    yield "`v4surgery recipes show mini3b` prints this one:"
    yield fenced(builtin_path("mini3b").read_text(encoding="utf-8"), "yaml")
    yield "## Built-in recipes"
    yield (
        "Parameters are logical ones (FP4 unpacked, scales and hash tables left out), drafter "
        "included; *active* is what one token meets, without the drafter. Reads and writes are "
        "those of the recipe's own parent, V4-Flash or the one in the box (`demo`: of `v4surgery "
        "synth --like demo`)."
    )
    yield builtin_table()
    yield "## Choosing units"
    yield "Most axes take a *choice*: how many units are kept, and which."
    yield key_table("", "Choice")
    yield "The ways to select:"
    yield table(("`by`", "units"), [(code(by), text) for by, text in ways()])
    yield (
        "The lower half are scores from activations, by `v4surgery score`; [scores.md](scores.md) "
        "has their formulas. `--scores FILE`, or `scores` in the recipe, names the file. Of a list "
        "such as `by: [scores, gate]` the first way is taken that the file has a score for, so "
        "that a recipe does without a file too. Where a block has no score (a DSpark drafter, an "
        "expert that no token went to), the next way of the list chooses, or else the gate's rows "
        "for experts and weight norms for the rest; a note of the plan says so."
    )
    yield (
        "Three axes have a free basis and take a `method` instead, which mixes units: "
        "`hidden_size: {keep: 1536, method: pca}`. See [methods.md](methods.md)."
    )
    assert set(get_args(schema.Method)) == set(METHODS)
    yield table(("`method`", "what is kept"), [(code(m), text) for m, text in METHODS.items()])
    yield "## Short forms"
    yield table(
        ("written", "means"),
        [(code(f"{key}: {text}"), code(f"{key}: {long_form(key, text)}")) for key, text in forms()],
    )
    yield "## Keys"
    yield (
        "*choice* is a mapping as above, or one of its short forms. A key whose value is null "
        "counts as not written."
    )
    for path, name in sections():
        yield f"### {code(path) if path else 'Top level'}"
        yield definitions()[name]["description"].split("\n\n")[0].replace("\n", " ")
        yield key_table(path, name)
    yield "## Extending another recipe"
    yield (
        "`extends` names another recipe: mappings are merged key by key, lists and values are "
        f"replaced, a null takes a key back. Recipes may extend one another {loader.MAX_EXTENDS} "
        "deep."
    )
    yield fenced(builtin_path("mini1b").read_text(encoding="utf-8"), "yaml")
    yield (
        "`--set keep.experts.keep=8` on the command line is laid over everything, several in their "
        "order; the value is YAML."
    )


@cache
def definitions() -> Mapping[str, Any]:
    top = schema.Recipe.model_json_schema(by_alias=True)
    extra = schema.Choice.model_json_schema(by_alias=True)
    return {**top["$defs"], "Recipe": top, "Choice": extra}


def sections(path: str = "", name: str = "Recipe") -> Iterator[tuple[str, str]]:
    """Key path and model of every mapping of the schema that is not a plain choice."""
    yield path, name
    for key, field in definitions()[name]["properties"].items():
        inner = section_name(field)
        if inner is not None and not is_choice(inner):
            yield from sections(f"{path}.{key}".lstrip("."), inner)


def is_choice(name: str) -> bool:
    """Whether a section is a plain choice, whose keys the page has once."""
    return issubclass(getattr(schema, name), (schema.Pick, schema.IndexDims))


def section_name(field: Mapping[str, Any]) -> str | None:
    options = field.get("anyOf", field.get("allOf", [field]))
    refs = [option["$ref"].rpartition("/")[2] for option in options if "$ref" in option]
    return refs[0] if refs else None


def key_table(path: str, name: str) -> str:
    rows = []
    required = definitions()[name].get("required", ())
    for key, field in definitions()[name]["properties"].items():
        full = f"{path}.{key}".lstrip(".")
        default = "required" if key in required else default_text(field)
        rows.append((code(full), type_text(full, field), default, field["description"]))
    if name == "Recipe":
        rows.append((code("extends"), "text", "", schema.EXTENDS_DESCRIPTION))
    return table(("key", "type", "default", "meaning"), rows)


def default_text(field: Mapping[str, Any]) -> str:
    default = field.get("default")
    if default is None or isinstance(default, dict):
        return ""
    return code(json.dumps(default) if isinstance(default, bool | int | float) else default or '""')


def type_text(path: str, field: Mapping[str, Any]) -> str:
    """The type in plain words."""
    special = {
        "store.max_shard_size": "whole number of bytes, or a size: `5GB`, `500MB`, `2GiB`",
        "keep.layers.compress_ratios": "list of ratios and of patterns `{repeat: n, of: [...]}`",
        "name": "text of a-z, 0-9, `.`, `_`, `-`",
    }
    if path in special:
        return special[path]
    if path.rpartition(".")[2] == "by":
        return "a way to select, or a list of them"
    inner = section_name(field)
    if inner is not None:
        if issubclass(getattr(schema, inner), schema.BasisPick):
            return "choice, or method"
        return "choice" if is_choice(inner) else "mapping, see below"
    options = [option for option in field.get("anyOf", [field]) if option.get("type") != "null"]
    return " or ".join(words(option) for option in options)


def words(option: Mapping[str, Any]) -> str:
    if "enum" in option:
        return "one of " + ", ".join(code(value) for value in option["enum"])
    if option["type"] == "array":
        return f"list of {words(option['items']).replace('number', 'numbers')}"
    if option["type"] in ("string", "boolean"):
        return {"string": "text", "boolean": "true or false"}[option["type"]]
    text = "number" if option["type"] == "number" else "whole number"
    if "exclusiveMinimum" in option:
        return f"{text} above {option['exclusiveMinimum']:g}"
    low, high = option.get("minimum"), option.get("maximum")
    limits = [] if low is None else [f"from {low:g}"]
    is_shown = high is not None and (high < BIGGEST or option["type"] == "number")
    limits += [f"to {high:g}"] if is_shown else []
    limits += [f", a multiple of {option['multipleOf']}"] if "multipleOf" in option else []
    return " ".join([text, *limits]).replace(" ,", ",")


def ways() -> Iterator[tuple[str, str]]:
    known = {*get_args(schema.By), *get_args(schema.LayersBy)}
    assert known == set(WAYS), known ^ set(WAYS)
    yield from WAYS.items()


def forms() -> Iterator[tuple[str, str]]:
    yield from SHORT_FORMS


def long_form(key: str, text: str) -> str:
    recipe = loader.recipe_from_text(f"name: x\nkeep: {{{key}: {text}}}", "short form")
    plain = json.loads(json.dumps(recipe.keep.model_dump(exclude_unset=True)[key]))
    return yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=1000).strip()


def builtin_table() -> str:
    rows = []
    for name in builtin_names():
        recipe = load_recipe(name)
        boxed = parent_folder(recipe.parent) if recipe.parent else None
        parent = headers("flash" if recipe.parent else "demo")
        plan = make_plan(parent if boxed is None else open_checkpoint(boxed), recipe)
        rows.append(
            (
                code(name),
                count(plan.catalogue.num_parameters()),
                count(plan.catalogue.num_active_parameters()),
                size(plan.cost.bytes_read),
                size(plan.cost.bytes_written),
                recipe.description,
            )
        )
    columns = ("recipe", "parameters", "active", "reads", "writes", "what it is")
    return table(columns, rows, right=columns[1:5])


class Headers(Source):
    """A preset's config, index and headers, with zeros for payload: enough to plan on."""

    gap_bytes = 16 * 1024

    def __init__(self, like: str) -> None:
        synthesis = plan_synthesis(like)
        self.name = like
        self.shards = {shard.file: shard for shard in synthesis.shards}
        weight_map = {item.name: s.file for s in synthesis.shards for item in s.tensors}
        self.small = {
            CONFIG_FILE: json.dumps(synthesis.config.to_dict()).encode(),
            INDEX_FILE: json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
        }

    def list_files(self) -> list[str]:
        return sorted([*self.small, *self.shards])

    def size(self, file: str) -> int:
        return len(self.small[file]) if file in self.small else self.shards[file].total_bytes

    def read(self, file: str, begin: int, end: int) -> bytes:
        content = self.small[file] if file in self.small else self.shards[file].header
        return content[begin:end].ljust(end - begin, b"\0")

    def read_into(self, file: str, begin: int, buffer: memoryview) -> None:
        buffer.cast("B")[:] = self.read(file, begin, begin + buffer.nbytes)

    def identity(self) -> dict[str, str]:
        return {"kind": "headers", "name": self.name}

    def check_unchanged(self) -> None: ...

    def close(self) -> None: ...


@cache
def headers(like: str) -> Checkpoint:
    return Checkpoint(Headers(like))
