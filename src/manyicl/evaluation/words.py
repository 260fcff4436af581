"""The words of any script in the form that ROUGE asks for."""

from __future__ import annotations

from manyicl.tasks.words import words

__all__ = ["WordTokenizer", "words"]


class WordTokenizer:
    """``words`` in the form that rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        """Split a text into words."""
        return words(text)
