"""Examples similar to a query, found by BM25: retrieved to be put before it, or found to explain its answer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from manyicl.errors import UserError
from manyicl.tasks.task import Example, Query
from manyicl.tasks.words import is_unspaced, words


class Retriever:
    """Retrieves the examples most like a query, the most similar last, so that it comes just before the query.

    Similarity is BM25 (Lucene's form, k1 1.5, b 0.75) between the texts of query and example; answers take no part.
    An example that shares no word with the query is never shown, so a query may get fewer than ``num_examples``,
    and none where nothing is like it: an arbitrary example would only pose as a similar one. Among equals the
    one given first counts as more similar.

    Source: Robertson and Zaragoza 2009, The Probabilistic Relevance Framework; Liu et al. 2022, arXiv:2101.06804,
    for examples chosen by query and the most similar last; Rubin et al. 2022, arXiv:2112.08633, for BM25 as the
    baseline of such a choice.
    """

    def __init__(self, examples: Sequence[Example], num_examples: int, *, exclude: Iterable[Example] = ()) -> None:
        """Index the examples once.

        Args:
            examples: Examples to choose from, such as a task's training side. Equal ones count once.
            num_examples: Most examples that a query gets.
            exclude: Examples never shown, by content: those that are in the shared prefix already.

        Raises:
            UserError: If ``num_examples`` is negative, no example is left to choose from, or bm25s is not installed.
        """
        if num_examples < 0:
            what = "Too few examples to retrieve"
            raise UserError("out_of_range", what, expected="0 or more", found=str(num_examples), field="num_examples")
        excluded = {(example.query, example.answer) for example in exclude}
        by_content: dict[tuple[Query, str], Example] = {}
        for example in examples:
            by_content.setdefault((example.query, example.answer), example)
        self.candidates = tuple(example for content, example in by_content.items() if content not in excluded)
        if not self.candidates:
            what = f"No example is left to retrieve: {len(by_content)} were given and {len(excluded)} excluded"
            remedy = (
                "Share fewer demonstrations (`--shots N`) or give more rows: those that all queries share are excluded."
            )
            raise UserError("no_example_left", what, remedy=remedy)
        self.num_examples = num_examples
        self._index = _index([terms(example.query.text) for example in self.candidates])

    def __call__(self, query: Query) -> tuple[Example, ...]:
        """Return up to ``num_examples`` examples that share a word with the query, the most similar last."""
        if self._index is None:
            return ()
        known = self._index.get_tokens_ids(terms(query.text))
        scores = self._index.get_scores_from_ids(known)
        # A stable sort, unlike the partition in bm25s' own `retrieve`, keeps equals in their given order.
        ranked = (-scores).argsort(kind="stable")[: self.num_examples]
        return tuple(self.candidates[position] for position in reversed(ranked) if scores[position] > 0)


class MostSimilar:
    """Finds the demonstrations in the context of a query that are most like it, the most similar first.

    They are to explain an answer: what the model has seen that is like the query. Similarity is that of `Retriever`.
    """

    def __init__(self, demonstrations: Sequence[Example], num_examples: int) -> None:
        """Index the demonstrations that all queries share.

        Raises:
            UserError: If ``num_examples`` is negative, or bm25s is not installed.
        """
        self.demonstrations, self.num_examples = tuple(demonstrations), num_examples
        self._shared = Retriever(self.demonstrations, num_examples) if self.demonstrations else None

    def __call__(self, query: Query, retrieved: Sequence[Example] = ()) -> tuple[Example, ...]:
        """Return up to ``num_examples`` demonstrations that share a word with the query.

        Args:
            query: The query.
            retrieved: Examples that were put before this query alone, which are in its context too.
        """
        # Scores of two indices cannot be compared, so that retrieved examples are indexed together with the others.
        found = Retriever((*self.demonstrations, *retrieved), self.num_examples) if retrieved else self._shared
        return found(query)[::-1] if found else ()


def terms(text: str) -> list[str]:
    """Split a text into the terms of the similarity: words and, where a script has no spaces, its characters.

    There each pair of neighbours is a term as well, as in Lucene's analysis of Chinese and Japanese: most words
    are longer than a character, and a pair says more than two characters apart.

    >>> terms("Red box")
    ['red', 'box']
    >>> terms("赤い箱")
    ['赤', 'い', '箱', '赤い', 'い箱']
    """
    single = words(text)
    if text.isascii():
        return single
    return single + [one + other for one, other in pairwise(single) if is_unspaced(one) and is_unspaced(other)]


def _index(texts: Sequence[list[str]]) -> Any:
    """Build the BM25 index of texts, given as terms; None if no text has any, which bm25s cannot index.

    Raises:
        UserError: If bm25s is not installed.
    """
    try:
        bm25s = _bm25s()
    except ImportError as error:
        what = "Similar examples are found with bm25s, which is not installed"
        raise UserError("missing_requirement", what, remedy="pip install 'manyicl[retrieval]'") from error
    if not any(texts):
        return None
    index = bm25s.BM25()
    index.index(list(texts), create_empty_token=False, show_progress=False)
    return index


def _bm25s() -> Any:
    """Import bm25s as if jax were not installed.

    For a choice of the best that is not used here it would start jax, which takes most of a GPU's free memory.
    """
    missing = object()
    found: Any = sys.modules.get("jax", missing)
    sys.modules["jax"] = None  # type: ignore[assignment]
    try:
        import bm25s
    finally:
        if found is missing:
            del sys.modules["jax"]
        else:
            sys.modules["jax"] = found
    # On import it sets its logger to DEBUG, so that any logging would report every index built.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s
