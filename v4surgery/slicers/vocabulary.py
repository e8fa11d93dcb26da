"""A smaller vocabulary: token ids kept, and the tokenizer cut to match.

A byte-level BPE tokenizer whose vocabulary is cut stays a tokenizer if every single-byte token
stays and merges are kept exactly where both parts and the result are. ``by: first`` keeps the
lowest ids, which are the earliest merges, and the added tokens (bos, eos, turn markers), which
stand at the end of the published vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from v4surgery.config import V4Config
from v4surgery.errors import PlanError
from v4surgery.importance.scorebook import Scores
from v4surgery.recipes.schema import Choice
from v4surgery.slicers.pick import check_keep, choose
from v4surgery.slicers.selection import IntArray, whole_to_none

FIELD = "keep.vocab_size"


def choose_vocabulary(
    pick: Choice | None,
    config: V4Config,
    tokenizer: dict[str, Any] | None,
    *,
    seed: int,
    scores: Scores | None,
) -> IntArray | None:
    """Token ids kept, ascending.

    Raises:
        PlanError: Tokens that the model or the tokenizer cannot do without would go.
    """
    size = config.vocab_size
    if pick is None or pick.ids is not None:
        kept = choose(pick, size, field=FIELD, seed=seed, scores=scores)
    else:
        assert pick.keep is not None
        check_keep(pick.keep, size, FIELD)
        always = np.asarray(sorted(_indispensable(config, tokenizer)), dtype=np.int64)
        if len(always) > pick.keep:
            raise PlanError(
                "the vocabulary is smaller than the tokens that must stay",
                where=FIELD,
                value=pick.keep,
                rule=f"at least {len(always)}: single bytes, added tokens, bos and eos",
            )
        others = np.setdiff1d(np.arange(size), always)
        rest = pick.model_copy(update={"keep": pick.keep - len(always)})
        chosen = (
            choose(rest, len(others), field=FIELD, seed=seed, scores=_among(scores, others))
            if rest.keep
            else np.zeros(0, np.int64)
        )
        added = others if chosen is None else others[chosen]
        kept = whole_to_none(np.sort(np.concatenate([always, added])), size)
    if kept is not None:
        _require(config, tokenizer, kept)
        if tokenizer is not None:
            cut_tokenizer(tokenizer, kept)  # now, not after hours of writing
    return kept


def new_token_id(kept: IntArray | None, token: int | None) -> int | None:
    """A token's id in the replica; None for none, or for one that is gone."""
    if token is None or kept is None:
        return token
    found = np.flatnonzero(kept == token)
    return int(found[0]) if len(found) else None


def cut_tokenizer(tokenizer: dict[str, Any], kept: IntArray) -> dict[str, Any]:
    """tokenizer.json with only the kept tokens, renumbered."""
    new_id = {int(old): new for new, old in enumerate(kept)}
    model = tokenizer["model"]
    vocab = {token: new_id[i] for token, i in model["vocab"].items() if i in new_id}
    merges = []
    for merge in model.get("merges", []):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        if left in vocab and right in vocab and left + right in vocab:
            merges.append(merge)
    added = [
        {**token, "id": new_id[token["id"]]}
        for token in tokenizer.get("added_tokens", [])
        if token["id"] in new_id
    ]
    cut = {**tokenizer, "added_tokens": added, "model": {**model, "vocab": vocab, "merges": merges}}
    if "post_processor" in tokenizer:
        cut["post_processor"] = _renumbered(tokenizer["post_processor"], new_id)
    return cut


def _renumbered(processor: Any, new_id: Mapping[int, int]) -> Any:
    """A post-processor with the ids of the tokens that it inserts renumbered."""
    kind = processor.get("type") if isinstance(processor, dict) else processor
    try:
        if kind in (None, "ByteLevel"):
            return processor
        if kind == "Sequence":
            inner = [_renumbered(item, new_id) for item in processor["processors"]]
            return {**processor, "processors": inner}
        if kind == "TemplateProcessing":
            tokens = {
                name: {**token, "ids": [new_id[i] for i in token["ids"]]}
                for name, token in processor["special_tokens"].items()
            }
            return {**processor, "special_tokens": tokens}
    except (KeyError, TypeError, AttributeError):
        pass
    raise PlanError(
        "the tokenizer cannot be cut",
        where="tokenizer.json: post_processor",
        value=kind,
        rule="ByteLevel, or TemplateProcessing with tokens that stay",
        hint="leave keep.vocab_size out",
    )


def cut_companions(files: Mapping[str, bytes], kept: IntArray) -> dict[str, bytes]:
    """The tokenizer's files for the kept tokens; those that name no token id stay as they are.

    Raises:
        PlanError: A file is not what its name says.
    """
    new_id = {int(old): new for new, old in enumerate(kept)}
    cut = dict(files)
    for name, text in files.items():
        if name == "tokenizer.json":
            cut[name] = _dumped(cut_tokenizer(load_tokenizer(text, name), kept))
        elif name in ("vocab.json", "added_tokens.json"):
            ids = _json_object(text, name)
            kept_ids = {t: i for t, i in ids.items() if isinstance(i, int) and i in new_id}
            cut[name] = _dumped({token: new_id[i] for token, i in kept_ids.items()})
        elif name in ("tokenizer_config.json", "generation_config.json"):
            before = _json_object(text, name)
            after = _with_new_ids(before, new_id)
            cut[name] = text if after == before else _dumped(after)
    if "merges.txt" in files and "vocab.json" in files:
        left = _json_object(cut["vocab.json"], "vocab.json")
        merges = files["merges.txt"].decode().splitlines(keepends=True)
        cut["merges.txt"] = "".join(line for line in merges if _stays(line, left)).encode()
    return cut


def _stays(line: str, vocab: Mapping[str, int]) -> bool:
    parts = line.split()
    is_merge = len(parts) == 2 and not line.startswith("#version")
    return not is_merge or all(part in vocab for part in (*parts, "".join(parts)))


def _with_new_ids(config: dict[str, Any], new_id: Mapping[int, int]) -> dict[str, Any]:
    """added_tokens_decoder and every ``*_token_id``, renumbered; ids that are gone are left out."""
    result = dict(config)
    for key, value in config.items():
        if key == "added_tokens_decoder" and isinstance(value, dict):
            old = {str(i): new for i, new in new_id.items()}
            result[key] = {str(old[i]): token for i, token in value.items() if i in old}
        elif key.endswith("_token_id") and isinstance(value, list):
            result[key] = [new_id[i] for i in value if isinstance(i, int) and i in new_id]
        elif key.endswith("_token_id") and isinstance(value, int):
            result[key] = new_id.get(value)
    return result


def _json_object(text: bytes, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
        if isinstance(data, dict):
            return data
    except (ValueError, RecursionError):
        pass
    raise PlanError(
        "the vocabulary cannot be cut",
        where=where,
        rule="a JSON object",
        hint="leave keep.vocab_size out",
    )


def _dumped(data: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(data, ensure_ascii=False, indent=2).encode()
    except UnicodeEncodeError:  # a lone surrogate, which came as an escape and goes as one
        return json.dumps(data, indent=2).encode()


def load_tokenizer(text: bytes, where: str) -> dict[str, Any]:
    """tokenizer.json as data.

    Raises:
        PlanError: No JSON, or no BPE tokenizer.
    """
    try:
        data = json.loads(text)
        if data["model"]["type"] == "BPE" and _has_shape(data):
            tokenizer: dict[str, Any] = data
            return tokenizer
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise PlanError(
        "the tokenizer cannot be cut",
        where=where,
        rule="a tokenizer.json with a BPE model",
        hint="leave keep.vocab_size out",
    )


def _has_shape(tokenizer: dict[str, Any]) -> bool:
    """Whether what is cut has the types that it has in every tokenizer.json."""
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"].get("merges", [])
    added = tokenizer.get("added_tokens", [])
    return (
        isinstance(vocab, dict)
        and all(type(i) is int for i in vocab.values())
        and isinstance(merges, list)
        and all(map(_is_merge, merges))
        and isinstance(added, list)
        and all(isinstance(token, dict) and type(token["id"]) is int for token in added)
    )


def _is_merge(merge: Any) -> bool:
    """``"a b"``, or in newer files ``["a", "b"]``."""
    parts = merge.split(" ", 1) if isinstance(merge, str) else merge
    is_pair = isinstance(parts, list) and len(parts) == 2
    return is_pair and all(isinstance(part, str) for part in parts)


def _indispensable(config: V4Config, tokenizer: dict[str, Any] | None) -> set[int]:
    ids = {config.bos_token_id, config.eos_token_id, config.pad_token_id}
    if config.is_dspark:
        ids.add(config.dspark_noise_token_id)
    if tokenizer is not None:
        ids |= {token["id"] for token in tokenizer.get("added_tokens", [])}
        ids |= {i for token, i in tokenizer["model"]["vocab"].items() if len(token) == 1}
    return {i for i in ids if i is not None and 0 <= i < config.vocab_size}


def _require(config: V4Config, tokenizer: dict[str, Any] | None, kept: IntArray) -> None:
    lost = sorted(_indispensable(config, tokenizer) - set(kept.tolist()))
    if lost:
        raise PlanError(
            "the recipe drops tokens that must stay",
            where=f"{FIELD}.ids",
            value=", ".join(map(str, lost[:8])),
            rule="bos, eos, added tokens and every single-byte token stay",
        )


def _among(scores: Scores | None, ids: IntArray) -> Scores | None:
    if scores is None:
        return None
    return lambda by, place: scores(by, place)[ids]
