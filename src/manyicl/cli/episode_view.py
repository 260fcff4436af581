"""An episode on the terminal: what is supervised is coloured, or in «» without colour."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

    from manyicl.episodes.encoding import Encoder
    from manyicl.episodes.episode import EncodedEpisode

Span = tuple[Iterable[str], bool]  # texts side by side, and whether they are supervised
NOT_SUPERVISED = ("default", "default dim")
SUPERVISED = ("black on green", "black on bright_green")


def spans_of(episode: EncodedEpisode, encoder: Encoder, by_token: bool) -> Iterator[Span]:
    """Yield the texts of an episode, token by token or each span as one text, answers as supervised."""
    boundaries = [0, *chain(*episode.answer_spans), len(episode.token_ids)]
    for number, (start, end) in enumerate(pairwise(boundaries)):
        if token_ids := episode.token_ids[start:end]:
            is_answer = number % 2 == 1
            yield _token_texts(encoder, token_ids) if by_token else [encoder.decode(token_ids)], is_answer


def draw(spans: Iterable[Span], with_marks: bool) -> Text:
    """Draw texts in two alternating shades, their line breaks visible, what is supervised on a coloured ground.

    Args:
        spans: Texts side by side, and whether they are supervised.
        with_marks: Put what is supervised in «», for output without colour.
    """
    from rich.text import Text

    from manyicl.printing import printable

    drawn = Text()
    for texts, is_supervised in spans:
        drawn.append("«" if is_supervised and with_marks else "")
        for number, text in enumerate(texts):
            style = (SUPERVISED if is_supervised else NOT_SUPERVISED)[number % 2]
            *lines, rest = printable(text).split("\n")
            for line in lines:
                drawn.append(f"{line}⏎", style).append("\n")
            drawn.append(rest, style)
        drawn.append(("»\n" if with_marks else "\n") if is_supervised else "")
    return drawn


def _token_texts(encoder: Encoder, token_ids: Sequence[int]) -> Iterator[str]:
    """Yield the text of each token; tokens that are parts of one character come together."""
    pending: list[int] = []
    for position, token_id in enumerate(token_ids):
        pending.append(token_id)
        text = encoder.decode(pending)
        if "\ufffd" in text and position + 1 < len(token_ids):
            continue
        yield text
        pending = []
