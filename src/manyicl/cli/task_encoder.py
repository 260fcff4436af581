"""What turns the tasks of a command into tokens: the encoder of a model, or characters where none is named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from manyicl.errors import MachineError, UserError

if TYPE_CHECKING:
    from manyicl.episodes.encoding import Encoder
    from manyicl.episodes.text_format import FormatKind
    from manyicl.tasks.task import Task


def encoder_of(
    reference: str | None, kind: FormatKind | None, end_of_answer: str | None, tasks: Sequence[Task]
) -> tuple[Encoder, int | None, int | None]:
    """Load a model's tokenizer and format, the context that it takes, and that with which it was fine-tuned."""
    if reference is None:
        if (kind, end_of_answer) != (None, None):
            what, remedy = "--format and --end-of-answer belong to a model", "Name it with --model, or leave them out."
            raise UserError("no_effect", what, remedy=remedy, field="--format")
        return character_encoder(), None, None
    from manyicl.episodes.encoding import Encoder
    from manyicl.model.reference import resolve_reference

    # A wrong name is refused before torch is loaded.
    folder = resolve_reference(reference)
    from manyicl.model.load import load_tokenizer, max_positions_of, read_manifest
    from manyicl.model.manifest import format_to_ask_in

    tokenizer = load_tokenizer(reference)
    manifest = read_manifest(folder)
    encoder = Encoder(tokenizer, format_to_ask_in(tokenizer, manifest, kind, end_of_answer, tasks))
    for task in tasks:
        encoder.require_suitable_answers(task)
    if manifest is None:
        return encoder, max_positions_of(reference), None
    try:
        allowed = max_positions_of(reference)
    except (UserError, MachineError):
        allowed = None  # the base of an adapter is not here, and only its weights would need it
    return encoder, allowed or manifest.max_context_tokens, manifest.max_context_tokens


def character_encoder() -> Encoder:
    """Return an encoder of the plain format in which every character is a token: all that needs no tokenizer."""
    from manyicl.episodes.encoding import Encoder
    from manyicl.episodes.text_format import PlainFormat, Segment

    class Characters(Encoder):
        def __init__(self) -> None:
            self.bos_ids = ()
            self._use_format(PlainFormat())

        def _encode_segment(self, segment: Segment, opens_sequence: bool) -> tuple[int, ...]:
            return tuple(map(ord, segment.text))

        def decode(self, token_ids: Iterable[int]) -> str:
            return "".join(map(chr, token_ids))

        def require_suitable_answers(self, task: Task) -> None:
            """Only a model decides what ends an answer."""

        def _ends_early(self, answer: str) -> bool:
            return False

    return Characters()
