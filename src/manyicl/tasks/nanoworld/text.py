"""Plain text of the nano world: running sentences such as the tiny base was trained on, and no task."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

from manyicl.tasks.nanoworld.basics import draw_sentence

# What a text is for: to be mixed into training, or to measure what training has forgotten. None was in the base.
Purpose = Literal["replay", "held_out"]
FEWEST_SENTENCES, MOST_SENTENCES = 3, 5
# About 600,000 tokens, and about 30,000: more than is scored at once.
NUM_PARAGRAPHS: dict[Purpose, int] = {"replay": 16_000, "held_out": 800}


def nano_text(purpose: Purpose, seed: int = 0, num_paragraphs: int | None = None) -> str:
    """Draw paragraphs of sentences, with a blank line between them; the same on every machine.

    Their sentences are drawn as those of the ``nano-base-text-*`` tasks that the base was trained on, from random
    numbers of their own, so that a paragraph is new and its words and forms are not.

    Args:
        purpose: What the text is for; another purpose is another text.
        seed: Decides the text.
        num_paragraphs: How many; None for as many as the purpose takes.
    """
    rng = random.Random(f"nano text {seed} {purpose}")
    number = NUM_PARAGRAPHS[purpose] if num_paragraphs is None else num_paragraphs
    return "\n\n".join(_paragraph(rng) for _ in range(number)) + "\n"


def _paragraph(rng: random.Random) -> str:
    return " ".join(draw_sentence(rng) for _ in range(rng.randint(FEWEST_SENTENCES, MOST_SENTENCES)))


def write_nano_text(folder: Path | str, seed: int = 0) -> list[Path]:
    """Write a text to be replayed in training and one to measure forgetting with; return the files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    purposes: tuple[Purpose, ...] = ("replay", "held_out")
    files = [folder / f"{purpose}.txt" for purpose in purposes]
    for purpose, file in zip(purposes, files, strict=True):
        file.write_bytes(nano_text(purpose, seed).encode())
    return files
