"""A byte-level BPE tokenizer of the corpus, with V4's first two ids: 0 begins, 1 ends a text.

python tokenizer.py --corpus corpus --out corpus/tokenizer.json
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

from corpus import END
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BEGIN_TOKEN, END_TOKEN = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
VOCAB_SIZE = 4096
SAMPLE_CHARS = 24_000_000


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """BPE of 4,096 entries; digits stand alone, so that numbers have one spelling."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BEGIN_TOKEN, END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("corpus"))
    parser.add_argument("--out", type=Path, default=Path("corpus/tokenizer.json"))
    options = parser.parse_args()
    text = lzma.decompress((options.corpus / "train.txt.xz").read_bytes()).decode()
    tokenizer = train_tokenizer(text[:SAMPLE_CHARS].split(END))
    tokenizer.save(str(options.out))
    tokens = len(tokenizer.encode(text[-SAMPLE_CHARS:]).ids)
    print(f"{tokenizer.get_vocab_size()} entries, {SAMPLE_CHARS / tokens:.2f} characters each")


if __name__ == "__main__":
    main()
