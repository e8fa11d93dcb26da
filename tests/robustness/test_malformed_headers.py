"""Headers against the safetensors package: what we accept, it accepts and reads the same way."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import sys
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from tests.support.mutants import header_mutant
from v4surgery.checkpoint.header import (
    MAX_HEADER_BYTES,
    TensorInfo,
    build_header,
    header_length,
    parse_header,
    payload_bytes,
)
from v4surgery.errors import HeaderError
from v4surgery.formats import ITEM_BYTES

NUM_MUTANTS = int(os.environ.get("V4SURGERY_FUZZ_MUTANTS", "20000"))
NUM_SLOW_MUTANTS = 200_000
NUMPY_DTYPES = {
    "I64": np.int64, "U64": np.uint64, "F64": np.float64, "F32": np.float32, "U32": np.uint32,
    "I32": np.int32, "F16": np.float16, "U16": np.uint16, "I16": np.int16, "I8": np.int8,
    "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def ours(file: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    num_bytes = header_length(file[:8], len(file), "x.safetensors")
    return parse_header(file[8 : 8 + num_bytes], len(file), "x.safetensors")


def oracle_accepts(file: bytes) -> bool:
    try:
        safetensors.deserialize(file)
    except safetensors.SafetensorError:
        return False
    return True


def with_prefix(header: str | bytes, payload: bytes = b"") -> bytes:
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + payload


def entry(name: str = "a", dtype: str = '"U8"', shape: str = "[4]", offsets: str = "[0,4]") -> str:
    return f'"{name}":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


def one(payload: bytes = b"wxyz", **parts: str) -> bytes:
    return with_prefix("{" + entry(**parts) + "}", payload)


def two(first: str, second: str, payload: bytes = b"abcdwxyz") -> bytes:
    return with_prefix("{" + first + "," + second + "}", payload)


# Name: file, a piece of the message.
MALFORMED = {
    "half a byte too few": (one(dtype='"F4"', shape="[7]"), "smaller than 2**63"),
    "empty file": (b"", "too short"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "too short"),
    "prefix past the end": (struct.pack("<Q", 3) + b"{}", "ends inside its header"),
    "prefix of 2**64-1": (b"\xff" * 8 + b"{}", "18,446,744,073,709,551,615"),
    "prefix over the limit": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "too long"),
    "header of no bytes": (with_prefix(b""), "no JSON object"),
    "not UTF-8": (with_prefix(b'{"\xff":1}'), "not valid JSON"),
    "surrogate in UTF-8": (with_prefix('{"\ud800":1}'), "not valid JSON"),
    "overlong UTF-8": (with_prefix(b'{"\xc0\xaf":1}'), "not valid JSON"),
    "byte order mark": (with_prefix("\ufeff{}"), "no JSON object"),
    "UTF-16": (with_prefix("{}".encode("utf-16-le")), "not valid JSON"),
    "array": (with_prefix("[]"), "no JSON object"),
    "string": (with_prefix('"{}"'), "no JSON object"),
    "cut JSON": (with_prefix("{"), "not valid JSON"),
    "two objects": (with_prefix("{}{}"), "not valid JSON"),
    "padded with NUL": (with_prefix("{}\0"), "not valid JSON"),
    "trailing comma": (with_prefix("{" + entry() + ",}", b"wxyz"), "not valid JSON"),
    "comment": (with_prefix("{/**/}"), "not valid JSON"),
    "control character in a name": (one(name="a\n"), "not valid JSON"),
    "bad escape": (one(name="\\x61"), "not valid JSON"),
    "high surrogate alone": (one(name="\\ud800"), "lone surrogates"),
    "low surrogate alone": (one(name="\\udc00"), "lone surrogates"),
    "surrogates the wrong way round": (one(name="\\ude00\\ud83d"), "lone surrogates"),
    "deep arrays": (with_prefix('{"a":' + "[" * 200_000), "nested too deeply"),
    "deep objects": (with_prefix('{"a":' * 200_000), "nested too deeply"),
    "entry is null": (with_prefix('{"a":null}'), "'a' is malformed"),
    "entry is a number": (with_prefix('{"a":1}'), "'a' is malformed"),
    "key missing": (with_prefix('{"a":{"dtype":"U8","shape":[0]}}'), "'a' is malformed"),
    "key twice in an entry": (one(shape='[4],"shape":[4]'), "'shape' twice"),
    "key twice through an escape": (one(shape='[4],"\\u0073hape":[4]'), "'shape' twice"),
    "dtype unknown": (one(dtype='"U7"'), "the dtype is one of BOOL, U8"),
    "dtype in small letters": (one(dtype='"u8"'), "'a' is malformed"),
    "dtype is a number": (one(dtype="8"), "'a' is malformed"),
    "shape is null": (one(shape="null"), "array of sizes"),
    "shape is a string": (one(shape='"4"'), "array of sizes"),
    "shape nested": (one(shape="[[4]]"), "array of sizes"),
    "dimension is a float": (one(shape="[4.0]"), "array of sizes"),
    "dimension with an exponent": (one(shape="[4e0]"), "array of sizes"),
    "dimension is true": (one(shape="[4,true]"), "array of sizes"),
    "dimension is a string": (one(shape='["4"]'), "array of sizes"),
    "dimension is NaN": (one(shape="[NaN]"), "array of sizes"),
    "dimension is Infinity": (one(shape="[Infinity]"), "array of sizes"),
    "dimension negative": (one(shape="[-4]"), "'shape': [-4]"),
    "dimensions twice negative": (one(shape="[-2,-2]"), "array of sizes"),
    "dimension with a leading zero": (one(shape="[04]"), "not valid JSON"),
    "dimension with a plus": (one(shape="[+4]"), "not valid JSON"),
    "dimension of minus zero": (one(b"", shape="[-0]", offsets="[0,0]"), "'shape': [-0]"),
    "dimension of 2**64": (one(b"", shape=f"[0,{2**64}]", offsets="[0,0]"), "array of sizes"),
    "dimension of 4000 digits": (one(shape=f"[{'9' * 4000}]"), "array of sizes"),
    "dimension of 5000 digits": (one(shape=f"[{'9' * 5000}]"), "not valid JSON"),
    "shape product overflows": (one(shape=f"[{2**32},{2**32}]"), "smaller than 2**63"),
    "shape product wraps to 4": (one(shape=f"[4,{2**62 + 1}]"), "smaller than 2**63"),
    "shape overflows before a zero": (
        with_prefix("{" + entry(shape=f"[{2**62},8,0]", offsets="[0,0]") + "}"),
        "smaller than 2**63",
    ),
    "shape smaller than its bytes": (one(shape="[3]"), "takes 3 bytes"),
    "shape larger than its bytes": (one(dtype='"F32"', shape="[4]"), "takes 16 bytes"),
    "offsets of one": (one(offsets="[4]"), "two byte offsets"),
    "offsets of three": (one(offsets="[0,4,4]"), "two byte offsets"),
    "offset is a float": (one(offsets="[0,4.0]"), "two byte offsets"),
    "offset is false": (one(offsets="[false,4]"), "two byte offsets"),
    "offset of minus zero": (one(offsets="[-0,4]"), "[-0, 4]"),
    "offset negative": (one(offsets="[-4,0]"), "two byte offsets"),
    "offset of 30 digits": (
        one(b"", shape="[0]", offsets=f"[{10**30},{10**30}]"),
        "two byte offsets",
    ),
    "offsets run backwards": (one(offsets="[4,0]"), "run backwards"),
    "overlap": (
        two(entry("a"), entry("b", offsets="[3,7]"), b"abcdxyz"),
        "tensor 'b' overlaps the one before it",
    ),
    "same bytes twice": (two(entry("a"), entry("b"), b"wxyz"), "overlaps"),
    "hole": (two(entry("a"), entry("b", offsets="[5,9]"), b"abcd-wxyz"), "'b' comes after a hole"),
    "hole at the start": (
        with_prefix("{" + entry(offsets="[1,5]") + "}", b"-wxyz"),
        "'a' comes after a hole",
    ),
    "trailing bytes": (one() + b"!", "1 bytes at the end"),
    "bytes and no tensor": (with_prefix("{}", b"x"), "belong to no tensor"),
    "truncated by one byte": (one()[:-1], "ends before tensor 'a' does"),
    "truncated to the header": (one()[:-4], "ends before tensor 'a' does"),
    "empty tensor past the end": (
        with_prefix("{" + entry(shape="[0]", offsets="[9,9]") + "}"),
        "hole",
    ),
    "metadata is an array": (with_prefix('{"__metadata__":[]}'), "'__metadata__' is malformed"),
    "metadata looks like a tensor": (
        with_prefix("{" + entry("__metadata__", shape="[0]", offsets="[0,0]") + "}"),
        "'__metadata__' is malformed",
    ),
    "metadata holds a number": (
        with_prefix('{"__metadata__":{"format":1}}'),
        "'__metadata__.format' is malformed",
    ),
    "metadata holds an object": (with_prefix('{"__metadata__":{"a":{}}}'), "__metadata__.a"),
    "metadata with a lone surrogate": (
        with_prefix('{"__metadata__":{"a":"\\ud800"}}'),
        "lone surrogates",
    ),
    "metadata key with a lone surrogate": (
        with_prefix('{"__metadata__":{"\\ud800":"a"}}'),
        "lone surrogates",
    ),
    "metadata twice": (
        with_prefix('{"__metadata__":{"a":"b"},"__metadata__":{"a":"b"}}'),
        "'__metadata__' twice",
    ),
    "the header is one entry": (
        with_prefix('{"dtype":"U8","shape":[4],"data_offsets":[0,4]}', b"wxyz"),
        "no table of tensors",
    ),
}

# The package (0.8) accepts these; the comment says why we do not.
STRICTER = {
    # The last one wins there: two readers could see two different tensors.
    "tensor twice": (two(entry(), entry(), b"wxyz"), "'a' twice"),
    "tensor twice through an escape": (two(entry(), entry("\\u0061"), b"wxyz"), "'a' twice"),
    "metadata key twice": (
        with_prefix('{"__metadata__":{"a":"b","a":"c"}}'),
        "'__metadata__' is malformed",
    ),
    # The format says: must begin with "{".
    "leading space": (with_prefix(" {}"), "no JSON object"),
    # No writer makes these, so they are damage or somebody hiding something.
    "unknown key": (one(dtype='"U8","x":1'), "dtype, shape and data_offsets"),
    "entry as an array": (with_prefix('{"a":["U8",[4],[0,4]]}', b"wxyz"), "'a' is malformed"),
    "metadata is null": (with_prefix('{"__metadata__":null}'), "'__metadata__' is malformed"),
    # Sizes stop at 2**63 - 1, where numpy and files do.
    "dimension of 2**63 beside a zero": (
        with_prefix("{" + entry(shape=f"[0,{2**63}]", offsets="[0,0]") + "}"),
        "array of sizes",
    ),
    "shape overflows after a zero": (
        with_prefix("{" + entry(shape=f"[0,{2**62},8]", offsets="[0,0]") + "}"),
        "smaller than 2**63",
    ),
}


@pytest.mark.parametrize(("file", "text"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_file_is_refused_here_and_by_safetensors(file: bytes, text: str) -> None:
    with pytest.raises(HeaderError) as caught:
        ours(file)
    assert text in str(caught.value)
    assert "where: x.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert not oracle_accepts(file)


@pytest.mark.parametrize(("file", "text"), STRICTER.values(), ids=STRICTER.keys())
def test_odd_file_is_refused_although_safetensors_takes_it(file: bytes, text: str) -> None:
    with pytest.raises(HeaderError) as caught:
        ours(file)
    assert text in str(caught.value)
    assert oracle_accepts(file)


ACCEPTED = {
    "two codes a byte": one(dtype='"F4"', shape="[2,4]"),
    "nothing": with_prefix("{}"),
    "only metadata": with_prefix('{"__metadata__":{"format":"pt"}}'),
    "empty metadata": with_prefix('{"__metadata__":{}}'),
    "metadata named like an entry": with_prefix(
        '{"__metadata__":{"dtype":"U8","shape":"","data_offsets":""}}'
    ),
    "scalar": one(dtype='"F32"', shape="[]"),
    "empty tensors around a full one": with_prefix(
        "{" + ",".join([entry("c", shape="[2,0]", offsets="[4,4]"), entry("b"),
                        entry("a", shape="[0]", offsets="[0,0]")]) + "}", b"wxyz"
    ),
    "tensors out of order": two(entry("b", offsets="[4,8]"), entry("a")),
    "keys out of order": with_prefix(
        '{"a":{"data_offsets":[0,4],"shape":[4],"dtype":"U8"}}', b"abcd"
    ),
    "white space everywhere": with_prefix('{ "a"\t: {\r\n"dtype" : "U8", "shape" : [ 4 ] ,'
                                          ' "data_offsets":[ 0,4 ] } }\t\r\n ', b"wxyz"),
    "surrogate pair": one(name="\\ud83d\\ude00"),
    "name beyond ASCII": one(name="wüdth"),
    "name with a path and a NUL": one(name="../../x\\u0000"),
    "minus sign in a name": one(name="model-00001"),
    "empty name": one(name=""),
    "names that only look the same": two(entry("é"), entry("e\u0301", offsets="[4,8]")),
}  # fmt: skip


def assert_same_reading(file: bytes) -> None:
    tensors, _ = ours(file)
    read = dict(safetensors.deserialize(file))
    assert tensors.keys() == read.keys()
    for name, info in tensors.items():
        assert info.dtype == read[name]["dtype"]
        assert list(info.shape) == read[name]["shape"]
        assert file[info.begin : info.end] == read[name]["data"]


@pytest.mark.parametrize("file", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_odd_but_valid_file_reads_as_safetensors_reads_it(file: bytes) -> None:
    assert_same_reading(file)


def test_tensors_come_in_the_order_of_their_bytes() -> None:
    tensors, _ = ours(two(entry("b", offsets="[4,8]"), entry("a")))
    base = len(two(entry("b", offsets="[4,8]"), entry("a"))) - 8
    assert list(tensors.items()) == [
        ("a", TensorInfo("U8", (4,), base, base + 4)),
        ("b", TensorInfo("U8", (4,), base + 4, base + 8)),
    ]


def test_message_of_a_malformed_entry_says_everything() -> None:
    with pytest.raises(HeaderError) as caught:
        ours(one(shape="[3]"))
    assert str(caught.value) == (
        "the header entry of 'a' is malformed\n"
        "  where: x.safetensors\n"
        "  value: {'data_offsets': [0, 4], 'dtype': 'U8', 'shape': [3]}\n"
        "  rule: U8 of this shape takes 3 bytes"
    )


def test_message_escapes_and_cuts_the_names_of_strangers() -> None:
    with pytest.raises(HeaderError) as caught:
        ours(one(name="\\u001b[2J" + "x" * 100_000, shape="[3]"))
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_header_at_the_limit_is_read_and_one_byte_more_is_not() -> None:
    assert header_length(struct.pack("<Q", MAX_HEADER_BYTES), 2**40, "x") == MAX_HEADER_BYTES
    with pytest.raises(HeaderError, match="at most 100,000,000 bytes"):
        header_length(struct.pack("<Q", MAX_HEADER_BYTES + 1), 2**40, "x")


def test_header_is_refused_before_it_is_parsed_when_the_file_is_smaller() -> None:
    with pytest.raises(HeaderError, match="ends inside its header"):
        parse_header(b"{}", 9, "x")


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = texts.filter(lambda name: name != "__metadata__")


# At most one metadata key: safetensors writes several in a random order. And not an empty table,
# with which safetensors 0.8 writes broken JSON when there is no tensor either.
@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(names, st.tuples(st.sampled_from(sorted(NUMPY_DTYPES)), shapes), max_size=8),
    st.none() | st.dictionaries(texts, texts, min_size=1, max_size=1),
)
def test_built_header_has_the_bytes_that_safetensors_writes(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None
) -> None:
    arrays = {name: np.ones(shape, NUMPY_DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}
    file = save(arrays, metadata)
    found, found_metadata = ours(file)
    # Empty tensors share their offsets; the order of the text tells them apart.
    order = [key for key in json.loads(file[8 : 8 + header_length(file[:8], len(file), "x")])
             if key != "__metadata__"]  # fmt: skip
    assert sorted(found) == sorted(order)
    entries = [(name, *tensors[name]) for name in order]
    payload = sum(payload_bytes(dtype, shape) for _, dtype, shape in entries)
    assert build_header(entries, metadata) == file[: len(file) - payload]
    assert found_metadata == (metadata or {})
    assert_same_reading(file)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(names, st.sampled_from(sorted(ITEM_BYTES)), shapes), unique_by=lambda e: e[0]
    )
)
def test_any_built_header_is_read_back_by_us_and_by_safetensors(
    entries: list[tuple[str, str, tuple[int, ...]]],
) -> None:
    prefix = build_header(entries)
    assert len(prefix) % 8 == 0
    file = prefix + bytes(sum(payload_bytes(dtype, shape) for _, dtype, shape in entries))
    tensors, metadata = ours(file)
    assert {(n, i.dtype, i.shape) for n, i in tensors.items()} == set(entries)
    assert metadata == {}
    assert_same_reading(file)


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([("a", "U8", (1,)), ("a", "U8", (1,))], "names are unique"),
        ([("__metadata__", "U8", (1,))], "none is __metadata__"),
        ([("\ud800", "U8", (1,))], "lone surrogates"),
        ([("a", "F5", (1,))], "unknown dtype 'F5'"),
        ([("a", "U8", (-1,))], "not the shape of a tensor"),
        ([("a", "U8", (True,))], "not the shape of a tensor"),
        ([("a", "U8", (2**63,))], "below 2**63"),
        ([("a", "U8", (2**62,)), ("b", "U8", (2**62,))], "below 2**63 bytes of data"),
        ([("a" * MAX_HEADER_BYTES, "U8", (1,))], "more shards"),
    ],
)
def test_header_that_could_not_be_read_back_is_not_built(
    entries: list[tuple[str, str, tuple[int, ...]]], text: str
) -> None:
    with pytest.raises(HeaderError) as caught:
        build_header(entries)
    assert text in str(caught.value)


def test_payload_bytes_counts_items_and_scalars() -> None:
    assert payload_bytes("BF16", (3, 5)) == 30
    assert payload_bytes("I64", ()) == 8
    assert payload_bytes("F8_E8M0", (7, 0)) == 0


def test_seventy_thousand_tensors_parse_without_recursion_or_quadratic_time() -> None:
    entries = [(f"layers.{i // 1536}.ffn.experts.{i % 1536}.w1.weight", "I8", (2048, 2048))
               for i in range(70_000)]  # fmt: skip
    prefix = build_header(entries)
    tensors, _ = parse_header(prefix[8:], len(prefix) + 70_000 * 2048 * 2048, "x")
    assert list(tensors) == [name for name, _, _ in entries]


TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+|[^\s]')
NASTY = r"""
    -0 -1 0 1 4 5 8 00 1.0 1e0 1E400 -1e-1 NaN Infinity -Infinity true false null [] {} [[]] [0]
    9223372036854775807 9223372036854775808 18446744073709551615 18446744073709551616 4294967296
    "" "a" "b" "\u0061" "\ud800" "\udc00" "\ud83d\ude00" "\u0000" "\x" "\/" "__metadata__"
    "dtype" "shape" "data_offsets" "U8" "F32" "F4" "F8_E8M0" "C64" "BF16" "é" , : [ ] { } " \ '
""".split()  # noqa: SIM905
NASTY += ["9" * 5000, "[" * 3000, "\x00", "\n", "\x7f", "\ufeff", "\ufffe", " ", "\u00a0"]
SEEDS = [
    build_header([("a", "U8", (4,)), ("b", "F32", (2, 1)), ("c", "BF16", (0, 3))])
    + bytes(range(12)),
    build_header([("x", "I64", ())], {"format": "pt", "k": ""}) + bytes(range(8)),
    build_header([("é\n", "F8_E8M0", (2, 2)), ("w-1", "I8", (3,))]) + bytes(range(7)),
    with_prefix("{" + entry("b", offsets="[4,8]") + ", " + entry("a") + "}  ", b"abcdefgh"),
]


def mutant(rng: random.Random) -> bytes:
    """A file one to three edits away from a good one, in its tokens, its bytes or its lengths."""
    file = rng.choice(SEEDS)
    if rng.random() < 0.1:
        return header_mutant(rng, file)
    stop = 8 + struct.unpack("<Q", file[:8])[0]
    header, payload = file[8:stop], file[stop:]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        edit = rng.choice([edit_tokens, edit_numbers, edit_bytes, edit_texts])
        header = edit(rng, header)
    if rng.random() < 0.15:
        payload = payload[: rng.randint(0, len(payload))] + bytes(rng.randint(0, 2))
    file = with_prefix(header, payload)
    if rng.random() < 0.05:
        length = rng.choice([0, 1, len(header) - 1, len(header) + 1, 2**63, 2**64 - 1, 10**8 + 1])
        file = struct.pack("<Q", max(0, length)) + file[8:]
    return file


def edit_tokens(rng: random.Random, header: bytes) -> bytes:
    tokens = TOKEN.findall(header.decode("utf-8", "surrogateescape")) or ["{"]
    i, j = rng.randrange(len(tokens)), rng.randrange(len(tokens))
    kind = rng.randrange(5)
    if kind == 0:
        tokens[i] = rng.choice(NASTY)
    elif kind == 1:
        tokens.insert(i, rng.choice(NASTY))
    elif kind == 2:
        tokens[i], tokens[j] = tokens[j], tokens[i]
    elif kind == 3:
        del tokens[i : i + rng.randint(1, 4)]
    else:
        tokens[j:j] = tokens[min(i, j) : max(i, j) + 1]
    return "".join(tokens).encode("utf-8", "surrogateescape")


def edit_numbers(rng: random.Random, header: bytes) -> bytes:
    """Small steps, so that some mutants stay valid and the overlaps and holes are near misses."""
    spots = list(re.finditer(rb"\d+", header))
    if not spots:
        return header
    spot = rng.choice(spots)
    changed = rng.choice([int(spot[0][:18]) + rng.randint(-4, 4), int(spot[0][:18]) * 2, 0])
    return header[: spot.start()] + str(changed).encode() + header[spot.end() :]


def edit_bytes(rng: random.Random, header: bytes) -> bytes:
    data = bytearray(header)
    for _ in range(rng.randint(1, 2)):
        i = rng.randrange(len(data) + 1)
        data[i : i + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
    return bytes(data)


def edit_texts(rng: random.Random, header: bytes) -> bytes:
    """Another name, or space between tokens: most of these stay valid."""
    if rng.random() < 0.5:
        spots = [spot.start() for spot in re.finditer(rb"[:,{}\[\]]", header)] or [0]
        pieces = [b" ", b"\t", b"\r\n", b"\x0b", b"\x0c", b"\0", b"\xc2\xa0", b"\xef\xbb\xbf"]
    else:
        spots = [spot.end() for spot in re.finditer(rb'[{,]"', header)] or [0]
        pieces = [
            b"q",
            b"-",
            b"\\u00e9",
            b"\\ud800",
            b"\\udc00",
            b"\\ud83d\\ude00",
            b"\x7f",
            b"\x1f",
        ]
    i = rng.choice(spots)
    return header[:i] + rng.choice(pieces) + header[i:]


def fuzz(num_mutants: int, seed: int) -> tuple[int, int]:
    """How many mutants we accepted, and how many safetensors did."""
    rng = random.Random(seed)
    num_ours = num_oracle = 0
    for _ in range(num_mutants):
        file = mutant(rng)
        num_oracle += oracle_accepts(file)
        try:
            ours(file)
        except HeaderError:
            continue
        num_ours += 1
        assert_same_reading(file)
    return num_ours, num_oracle


def check_fuzz(num_mutants: int, seed: int) -> None:
    """Neither side of the comparison may be empty, and we are stricter than the oracle."""
    num_ours, num_oracle = fuzz(num_mutants, seed)
    assert num_mutants * 0.04 < num_ours <= num_oracle < num_mutants * 0.5


@pytest.mark.parametrize("seed", [20260])
def test_no_mutant_that_we_accept_is_refused_by_safetensors(seed: int) -> None:
    check_fuzz(NUM_MUTANTS, seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_mutant_of_the_longer_run_is_refused_by_safetensors() -> None:
    check_fuzz(NUM_SLOW_MUTANTS, 20260)


counts = st.integers(-2, 20) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 10**30])
values = st.none() | st.booleans() | counts | st.floats() | st.text(max_size=3)
loose_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*sorted(ITEM_BYTES), "F4", "C64", "u8", ""]) | values,
        "shape": st.lists(counts, max_size=3) | values,
        "data_offsets": st.lists(counts, max_size=3) | values,
    },
    optional={"extra": values},
)
loose_tables = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__", "é", "../x", ""]), loose_entries | values, max_size=3
)


@settings(max_examples=600, deadline=None)
@given(loose_tables, st.integers(0, 40), st.integers(-2, 2))
def test_no_table_that_we_accept_is_refused_by_safetensors(
    table: dict[str, Any], num_bytes: int, shift: int
) -> None:
    header = json.dumps(table).encode()
    file = struct.pack("<Q", max(len(header) + shift, 0)) + header + bytes(num_bytes)
    try:
        ours(file)
    except HeaderError:
        return
    assert_same_reading(file)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 90) | st.none())
def test_no_bytes_that_we_accept_are_refused_by_safetensors(
    data: bytes, length: int | None
) -> None:
    file = data if length is None else struct.pack("<Q", length) + data
    try:
        ours(file)
    except HeaderError:
        return
    assert_same_reading(file)


def test_recursion_limit_does_not_decide_what_is_accepted() -> None:
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(10_000)
        with pytest.raises(HeaderError):
            ours(with_prefix('{"a":' + "[" * 5000 + "]" * 5000 + "}"))
    finally:
        sys.setrecursionlimit(limit)
