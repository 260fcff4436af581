"""The closed vocabulary of the nano world: a few kinds of English words, digits, and coined words."""

from __future__ import annotations

import random

KINDS: dict[str, tuple[str, ...]] = {
    kind: tuple(words.split())
    for kind, words in {
        "name": "anna ben carl dora emil fay gus hanna ivan jill karl lena max nina otto pia",
        "colour": "red blue green black white brown pink grey yellow orange purple golden",
        "animal": "dog cat fox horse cow sheep goat duck hen mouse bear wolf owl frog bee ant",
        "food": "apple bread cheese rice soup cake egg pear plum bean corn fish honey milk nut tea",
        "place": "oslo paris rome cairo lima kyoto berlin madrid delhi quito dublin vienna athens lisbon prague riga",
        "object": "lamp chair table clock book spoon knife box bag hat coat shoe ring key pen cup",
        "day": "monday tuesday wednesday thursday friday saturday sunday",
        "action": "sold bought found lost took saw gave hid washed broke painted moved",
    }.items()
}
_FILLERS = (
    "please today now then again very often here there maybe also just only still near about quite really soon later "
    "early once twice always never well ok yes no hello thanks sure"
)
FILLERS: tuple[str, ...] = tuple(_FILLERS.split())
DIGITS: tuple[str, ...] = tuple("0123456789")

_NUM_COINED = 240


def _coined_words() -> tuple[str, ...]:
    """Make up words of five letters, the same on every machine; none is English in this world."""
    rng = random.Random(20250611)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    english = {word for words in KINDS.values() for word in words} | set(FILLERS)
    coined: dict[str, None] = {}
    while len(coined) < _NUM_COINED:
        word = rng.choice(syllables) + rng.choice(syllables) + rng.choice("nrslmk")
        if word not in english:
            coined[word] = None
    return tuple(coined)


# Cue words and labels of every task come from here. What a word stands for is drawn anew in each task.
COINED: tuple[str, ...] = _coined_words()
EVERY_WORD: tuple[str, ...] = (*COINED, *(word for words in KINDS.values() for word in words), *FILLERS)
