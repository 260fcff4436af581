"""Words of a text in any script: what ROUGE counts, what TF-IDF weighs and what makes examples near."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

# Scripts written without spaces: each character counts as a word, as is usual for ROUGE in Chinese and Japanese.
_UNSPACED = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


def words(text: str) -> list[str]:
    """Split a text into lower-case words of letters, marks and digits; emoji and Han characters stand alone.

    On ASCII this is rouge-score's own tokenizer. That one deletes every other letter, so that two identical
    Russian texts score 0.
    """
    normal = unicodedata.normalize("NFC", text.lower())
    return "".join(map(_spaced, normal)).split()


@lru_cache(maxsize=50_000)
def _spaced(character: str) -> str:
    """Return a character with the spaces that part it from its neighbours."""
    category = unicodedata.category(character)
    if category == "So" or any(low <= ord(character) <= high for low, high in _UNSPACED):
        return f" {character} "
    return character if category[0] in "LMN" else " "
