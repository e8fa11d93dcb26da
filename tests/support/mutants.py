"""Seeded damage: files one to three edits away from a good one, in their JSON or in their bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

NASTY_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, 10**30),
    *(1.5, -0.0, 1e-320, 1e308, 1e999),
    *("", "a", "0", "../../x", "/etc/passwd", "\0", "\ud800", "\x1b[2J", "x" * 2000, "same"),
    *([], {}, [[]], [0], [0, 0], [-1], [None], ["a"], {"a": 1}, {"": []}, [1] * 300),
]
NASTY_TEXTS = [
    *("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 2000, '{"a":' * 2000, "null"),
    *("{", "}", "[", "]", ",", ":", '"', "\\", "\\ud800", "\0", "\ufeff", "//", "\x1b[31m"),
    *("true", "-0", "01", "1.0", '"a"', "{}", "[]", " ", "\n", "é"),
]

Edit = Callable[[random.Random, bytes], bytes]


def json_mutant(rng: random.Random, text: bytes) -> bytes:
    """Values replaced, keys taken away, doubled or renamed; now and then the text itself."""
    if rng.random() < 0.2:
        return text_mutant(rng, text)
    root = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        root = _edit_tree(rng, root)
    return json.dumps(root).encode("utf-8", "surrogatepass")


def text_mutant(rng: random.Random, text: bytes) -> bytes:
    """Pieces of text put in, taken away or doubled."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        begin = rng.randint(0, len(text))
        end = min(len(text), begin + rng.choice([0, 0, 1, 2, 8, 40]))
        piece = rng.choice([rng.choice(NASTY_TEXTS).encode("utf-8", "surrogatepass"), b""])
        piece = rng.choice([piece, piece, text[begin:end] * 2, rng.randbytes(2)])
        text = text[:begin] + piece + text[end:]
    return text


def header_mutant(rng: random.Random, file: bytes) -> bytes:
    """A safetensors file with another header (of the right length mostly), or cut short."""
    length = int.from_bytes(file[:8], "little")
    header = json_mutant(rng, file[8 : 8 + length])
    claimed = len(header) + rng.choice([0] * 12 + [-1, 1, 2**62])
    payload = file[8 + length :]
    if rng.random() < 0.1:
        payload = payload[: rng.randint(0, len(payload))]
    return max(claimed, 0).to_bytes(8, "little") + header + payload


def payload_mutant(rng: random.Random, file: bytes) -> bytes:
    """A safetensors file with a run of other bytes among its data: NaN, zeros, anything."""
    begin = rng.randint(8 + int.from_bytes(file[:8], "little"), len(file))
    size = min(rng.choice([1, 4, 64, 4096]), len(file) - begin)
    run = rng.choice([b"\xff" * size, bytes(size), b"\x7f" * size, rng.randbytes(size)])
    return file[:begin] + run + file[begin + size :]


def _edit_tree(rng: random.Random, root: Any) -> Any:
    """One edit somewhere: deep places are as likely as high ones."""
    path, node = [], root
    while isinstance(node, (dict, list)) and node and rng.random() < 0.8:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        path.append((node, key))
        node = node[key]
    if not path:
        return rng.choice(NASTY_VALUES) if rng.random() < 0.3 else root
    parent, key = path[-1]
    kind = rng.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(["", "../x", "\0", str(key) + "x", "__metadata__"])] = parent.pop(key)
    elif kind == 2 and isinstance(node, int) and not isinstance(node, bool):
        parent[key] = rng.choice([node + 1, node - 1, -node, node * 2, float(node), str(node)])
    elif kind == 3:
        others = [each[1] for each in _leaves(root)]
        parent[key] = copy.deepcopy(rng.choice(others)) if others else None
    else:
        parent[key] = copy.deepcopy(rng.choice(NASTY_VALUES))
    return root


def _leaves(root: Any) -> list[tuple[Any, Any]]:
    """Up to 200 leaves with their keys."""
    found: list[tuple[Any, Any]] = []
    waiting = [root]
    while waiting and len(found) < 200:
        node = waiting.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            if isinstance(value, (dict, list)):
                waiting.append(value)
            else:
                found.append((key, value))
    return found
