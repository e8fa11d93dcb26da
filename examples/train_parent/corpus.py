"""The text that the parent in the box learns: Python sources of packages with permissive licences.

Downloads the wheels that ``packages.txt`` pins, takes their ``.py`` files, leaves out tests, tables
and what another package has already, and splits by file: one in 64 is held out. Nothing here
depends on the order of a folder, so the same wheels give the same corpus, byte for byte.

    python corpus.py --wheels wheels --out corpus      # train.txt.xz, heldout.jsonl and its sources
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
END = "\x00"  # between documents; the tokenizer's end-of-sentence token stands for it
MIN_BYTES, MAX_BYTES = 800, 120_000
PACKAGE_BYTES = 3_000_000
HELD_OUT_IN = 64
HELD_OUT_CHARS, HELD_OUT_DOCUMENT_CHARS = 160_000, 12_000
SKIPPED_FOLDERS = {
    "tests",
    "test",
    "testing",
    "_vendor",
    "vendor",
    "locale",
    "locales",
    "migrations",
}


def download(wheels: Path) -> None:
    """Fetch the pinned wheels, without what they depend on."""
    wheels.mkdir(parents=True, exist_ok=True)
    platforms = [f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28)] + ["manylinux2014_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.11", "--dest", str(wheels)]
    command += [word for name in platforms for word in ("--platform", name)]
    subprocess.run([*command, "-r", str(HERE / "packages.txt")], check=True)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sources(wheel: Path) -> Iterator[tuple[str, str]]:
    """Path and text of each file of a wheel that is worth learning, in the order of the digests."""
    found = []
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            parts = Path(info.filename).parts
            if not info.filename.endswith(".py") or SKIPPED_FOLDERS & set(parts):
                continue
            if parts[-1].startswith(("test_", "_version", "version")):
                continue
            if not MIN_BYTES <= info.file_size <= MAX_BYTES:
                continue
            text = archive.read(info).decode("utf-8", errors="replace").replace("\r\n", "\n")
            if is_prose_or_code(text):
                found.append((info.filename, text))
    return iter(sorted(found, key=lambda item: digest(item[0])))


def is_prose_or_code(text: str) -> bool:
    """False for tables of numbers, embedded data and text that is mostly not ASCII."""
    letters = sum(c.isalpha() and c.isascii() for c in text)
    lines = text.splitlines()
    longest = max(map(len, lines), default=0)
    return letters > 0.45 * len(text) and longest < 400 and END not in text and "�" not in text


def collect(wheels: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Documents to learn, and documents held out with where they come from."""
    train: list[str] = []
    held_out: list[tuple[str, str]] = []
    seen: set[str] = set()
    for wheel in sorted(wheels.glob("*.whl")):
        size = 0
        for path, text in sources(wheel):
            key = digest(text)
            if key in seen or size > PACKAGE_BYTES:
                continue
            seen.add(key)
            size += len(text)
            if int(digest(path)[:8], 16) % HELD_OUT_IN == 0:
                held_out.append((f"{wheel.name.split('-')[0]}: {path}", text))
            else:
                train.append(text)
    # Neighbours in the corpus come from different packages.
    return sorted(train, key=digest), sorted(held_out, key=lambda item: digest(item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, default=Path("wheels"))
    parser.add_argument("--out", type=Path, default=Path("corpus"))
    parser.add_argument("--no-download", action="store_true", help="take the wheels that are there")
    options = parser.parse_args()
    if not options.no_download:
        download(options.wheels)
    train, held_out = collect(options.wheels)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "train.txt.xz").write_bytes(lzma.compress(END.join(train).encode()))
    kept: list[tuple[str, str]] = []
    size = 0
    for where, text in held_out:
        if len(text) <= HELD_OUT_DOCUMENT_CHARS and size + len(text) <= HELD_OUT_CHARS:
            kept.append((where, text))
            size += len(text)
    lines = "".join(json.dumps({"prompt": text}) + "\n" for _, text in kept)
    (options.out / "heldout.jsonl").write_text(lines, encoding="utf-8")
    names = "".join(f"{where}\n" for where, _ in kept)
    (options.out / "heldout_sources.txt").write_text(names, encoding="utf-8")
    print(f"{len(train)} documents, {sum(map(len, train)):,} characters to learn")
    print(f"{len(kept)} of {len(held_out)} documents held out, {size:,} characters")


if __name__ == "__main__":
    main()
