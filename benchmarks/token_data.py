"""Synthetic token ids as a user's own data would come: a jsonl file of `input_ids`, whole rows one after another."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from rows import SEED, Documents

MEAN_DOCUMENT, SHORTEST_DOCUMENT = 2048, 64
"""Tokens of packed documents, for rows of 32768; shorter rows have documents that are shorter in proportion."""
FULL_LENGTH = 32768


def lengths(documents: Documents, seq_len: int, generator: np.random.Generator) -> list[int]:
    """Lengths of the documents of one row, which they fill to the last token."""
    if documents == "full":
        return [seq_len]
    shortest = max(2, SHORTEST_DOCUMENT * seq_len // FULL_LENGTH)
    mean = max(2.0, MEAN_DOCUMENT * seq_len / FULL_LENGTH)
    result: list[int] = []
    while (left := seq_len - sum(result)) > 0:
        length = min(max(int(generator.exponential(mean)), shortest), left)
        result.append(left if left - length < shortest else length)
    return result


def write(path: Path, documents: Documents, *, rows: int, seq_len: int, vocabulary: int) -> None:
    """Write `rows` rows of random documents, in the order in which unshuffled packing puts them together again.

    Of `skewed` rows half of the tokens are one token, repeated in documents of its own: at every position of such a
    document a layer sees the same hidden state, so all of them go to the same experts, in every layer. With k of E
    experts a token, those k experts then get half of the tokens, E / 2k times the mean. Lengths are those of `packed`.
    """
    generator = np.random.default_rng([SEED, seq_len])
    frequent = int(generator.integers(vocabulary))
    with path.open("w", encoding="ascii") as file:
        for _ in range(rows):
            sizes = lengths(documents, seq_len, generator)
            repeated = half(sizes) if documents == "skewed" else set()
            for number, length in enumerate(sizes):
                tokens = generator.integers(vocabulary, size=length)
                if number in repeated:
                    tokens[:] = frequent
                file.write(json.dumps({"input_ids": tokens.tolist()}) + "\n")


def half(sizes: list[int]) -> set[int]:
    """Numbers of the documents that hold about half of all tokens: the longest first, each to the shorter half."""
    halves: tuple[set[int], set[int]] = (set(), set())
    totals = [0, 0]
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        lighter = totals.index(min(totals))
        halves[lighter].add(number)
        totals[lighter] += sizes[number]
    return halves[0]
