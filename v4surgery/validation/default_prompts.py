"""Prompts for a validation that names none: a few short texts, or ids where there is no tokenizer.

They are for a first look. How close a replica is on the text that it is meant for, only that text
can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from v4surgery.checkpoint.reader import Checkpoint
from v4surgery.text.prompts import Prompt, PromptEncoder, read_prompts
from v4surgery.text.tokenizer import read_tokenizer

TEXTS = (
    "The river rises in a lake between two hills, runs north for a hundred kilometres through "
    "farmland, and reaches the sea at a town that was once a port. In spring, when the snow melts, "
    "it floods the meadows on both banks; by August a child can wade across it. The mills that it "
    "drove are gone, all but one, which grinds flour for visitors on Sundays.",
    "def merge(left: list[int], right: list[int]) -> list[int]:\n"
    '    """Merge two sorted lists into one."""\n'
    "    merged, i, j = [], 0, 0\n"
    "    while i < len(left) and j < len(right):\n"
    "        if left[i] <= right[j]:\n"
    "            merged.append(left[i])\n"
    "            i += 1\n"
    "        else:\n"
    "            merged.append(right[j])\n"
    "            j += 1\n"
    "    return merged + left[i:] + right[j:]\n",
    "Question: a train leaves at 9:40 and travels 150 km at 60 km/h. When does it arrive? "
    "Answer: 150 divided by 60 is 2.5, so the journey takes two and a half hours, and the train "
    "arrives at 12:10.",
    "春天来了，河边的柳树长出了新叶。孩子们在草地上放风筝，老人坐在长椅上晒太阳。",
)
# Beyond the longest published ratio, 128; beyond small windows; short.
ID_LENGTHS = (144, 80, 24)


def default_prompts(replica: Checkpoint, lengths: Sequence[int] = ID_LENGTHS) -> list[list[int]]:
    """Built-in texts as the replica's tokenizer writes them, or else ids that look random.

    Args:
        replica: The model that the ids are for.
        lengths: Tokens of each prompt of ids.
    """
    tokenizer = read_tokenizer(replica)
    limit = replica.config.max_position_embeddings
    if tokenizer is None:
        rng = np.random.default_rng(0)
        vocab = replica.config.vocab_size
        return [rng.integers(vocab, size=min(length, limit)).tolist() for length in lengths]
    encoder = PromptEncoder(replica.config, tokenizer)
    prompts = [Prompt(f"built-in text {i}", text=text) for i, text in enumerate(TEXTS)]
    return [list(item.ids[:limit]) for item in encoder.encode_all(prompts)]


def choose_prompts(
    replica: Checkpoint, file: Path | None = None, tokens: int | None = None
) -> list[list[int]]:
    """Ids of the prompts of a file, or else the built-in ones, cut to their first tokens.

    Raises:
        UsageError: The file cannot be read, or the replica does not take its prompts.
    """
    if file is None:
        return [ids[:tokens] for ids in default_prompts(replica)]
    encoder = PromptEncoder(replica.config, read_tokenizer(replica))
    return [list(item.ids[:tokens]) for item in encoder.encode_all(read_prompts(file))]
