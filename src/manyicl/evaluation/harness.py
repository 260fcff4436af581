"""Run tasks of lm-evaluation-harness on this engine, with its prompts and metrics; shared text is prefilled once.

::

    import lm_eval
    from manyicl.evaluation.harness import HarnessModel

    model = HarnessModel.from_pretrained("runs/one-model")
    lm_eval.simple_evaluate(model=model, tasks=["mmlu_astronomy"], num_fewshot=5)

lm-eval hands over pairs of a context and a continuation. The continuations of one context become one trie after it,
and what many contexts begin with is read once, before them:

::

    requests    F q1 | A     F q1 | B     F q2 | A     F q2 | B
    read        F    q1 | {A, B}    q2 | {A, B}

F is long where a task shows every query the same examples (``fewshot_config: {sampler: first_n}``). Most tasks draw
examples anew for every query; then only the trie is shared.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

from tqdm import tqdm  # type: ignore[import-untyped]

from manyicl.engine.backend import Prefix, TokenIds, require_context
from manyicl.engine.local import LocalBackend
from manyicl.episodes.encoding import Encoder
from manyicl.errors import UserError
from manyicl.evaluation.shared_contexts import shared_beginnings
from manyicl.library_errors import reason
from manyicl.model.load import LoadedModel, load_model

try:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise UserError(
        "missing_library",
        f"lm-evaluation-harness cannot be imported, {reason(error)}",
        remedy="Install it with `pip install 'manyicl[lm-eval]'`.",
    ) from error

logger = logging.getLogger(__name__)

# Log-probability in nats, and whether greedy decoding would have written the continuation.
Answer = tuple[float, bool]

# lm-eval hands rolling windows over in batches of so many.
ROLLING_WINDOWS = 64
# Arguments without effect on greedy decoding.
ONLY_FOR_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
# What generation_config.json may ask for that changes greedy answers; lm-eval's own model obeys it.
NOT_PLAIN_GREEDY = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "num_beams",
    "min_length",
    "min_new_tokens",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "guidance_scale",
    "sequence_bias",
)


@dataclass
class Truncation:
    """What did not fit, and was cut from the left.

    Attributes:
        num_requests: Requests that lost tokens.
        num_tokens: Tokens that they lost.
    """

    num_requests: int = 0
    num_tokens: int = 0

    def cut(self, token_ids: Sequence[int], most: int) -> tuple[int, ...]:
        """Return the last ``most`` tokens, and count the others."""
        num_lost = max(0, len(token_ids) - most)
        self.num_requests += num_lost > 0
        self.num_tokens += num_lost
        return tuple(token_ids[num_lost:])


class HarnessModel(HFLM):  # type: ignore[misc]  # lm_eval carries no types
    """A model for `lm_eval.simple_evaluate` that answers from shared prefixes.

    It is lm-eval's own model with another way to run the network: text becomes tokens, contexts are cut at the
    maximum length, chat templates are applied and answers are cut at stop strings by its code. Log-probabilities are
    taken in float32, where lm-eval takes them in the network's own precision unless told ``softmax_dtype``.
    """

    def __init__(
        self, loaded: LoadedModel, *, max_context_tokens: int | None = None, activation_budget_mib: int | None = None
    ) -> None:
        """Take a loaded model.

        Args:
            loaded: From `manyicl.model.load.load_model`.
            max_context_tokens: Where contexts are cut from the left; None for lm-eval's rule: what the
                configuration allows, else what the tokenizer says, else 2,048.
            activation_budget_mib: Bound on what queries in flight use beside model and prefix, in MiB; None for half
                of what the prefix uses, and at least 64.

        Raises:
            UserError: If the model allows fewer positions, the tokenizer has no token that may stand for an empty
                context, or a bound is below 1.
        """
        self.local = LocalBackend(loaded, activation_budget_mib=activation_budget_mib)
        require_context(max_context_tokens, self.local.identity)
        if loaded.tokenizer.bos_token_id is None and loaded.tokenizer.eos_token_id is None:
            raise UserError(
                "no_bos_or_eos",
                f"the tokenizer of {loaded.reference!r} has neither a bos nor an eos token",
                expected="one of them, which lm-eval puts before a text without context",
            )
        with _quiet("lm_eval.models.huggingface"):
            super().__init__(
                pretrained=loaded.model,
                # It is given a padding token, which is not to be seen elsewhere.
                tokenizer=copy.deepcopy(loaded.tokenizer),
                max_length=max_context_tokens,
                batch_size=ROLLING_WINDOWS,
                trust_remote_code=False,
            )
        self.loaded = loaded
        self.truncated = Truncation()
        # An end-of-answer text plays no part: lm-eval's tasks have formats and stop strings of their own.
        manifest = loaded.manifest
        self._answer_end_id = Encoder(loaded.tokenizer, manifest.text_format).answer_end_id if manifest else None
        self._encode = lru_cache(maxsize=4)(super().tok_encode)

    @classmethod
    def from_pretrained(
        cls,
        reference: str,
        *,
        dtype: str | None = None,
        device: str | None = None,
        max_context_tokens: int | None = None,
        activation_budget_mib: int | None = None,
    ) -> Self:
        """Load a folder, a .gguf file, ``hf:owner/name`` or ``builtin:`` and a name.

        Raises:
            UserError: If it cannot be loaded, or mixes the episodes of a packed row.
        """
        return cls(
            load_model(reference, dtype=dtype, device=device),
            max_context_tokens=max_context_tokens,
            activation_budget_mib=activation_budget_mib,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode as lm-eval does, once for a context that comes with many continuations.

        The list may be shared with other callers; it is not to be written to.
        """
        token_ids: list[int] = self._encode(string, add_special_tokens, left_truncate_len)
        return token_ids

    def get_model_info(self) -> dict[str, Any]:
        """Describe model and run for the results; counts what was cut since the model was made."""
        return {
            "model_num_parameters": sum(weights.numel() for weights in self.model.parameters()),
            "model_dtype": str(self.model.dtype),
            "model_revision": "",
            "model_sha": self.loaded.fingerprint,
            "model_reference": self.loaded.reference,
            "max_context_tokens": self.max_length,
            "num_truncated_requests": self.truncated.num_requests,
            "num_truncated_tokens": self.truncated.num_tokens,
        }

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        """Score continuations after their contexts.

        Args:
            requests: Text, context tokens and continuation tokens of each; no text for rolling windows.
            disable_tqdm: Show no progress.
            override_bs: Without effect here.

        Returns:
            Log-probability and whether every token is the most probable, in the order of the requests.

        Raises:
            UserError: If a continuation has no tokens, or more than fit the model.
        """
        truncation = Truncation()
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    "continuation_too_long",
                    f"the continuation of request {place + 1} has {len(continuation):,} tokens",
                    expected=f"1 to {self.max_length:,}, the longest context",
                )
            # The last token of a continuation is predicted, never read, so one more fits.
            kept = truncation.cut(context, self.max_length + 1 - len(continuation))
            groups.setdefault(kept, []).append(place)
        self._report(truncation, len(requests))
        contexts = sorted(groups)
        answers: dict[int, Answer] = {}
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        for prefix, numbers, queries in self._after_shared_beginnings(contexts):
            options = [[tuple(requests[i][2]) for i in groups[contexts[number]]] for number in numbers]
            for number, scores in zip(numbers, self.local.score(prefix, queries, options, "all"), strict=True):
                for option, i in enumerate(groups[contexts[number]]):
                    answers[i] = scores.log_probabilities[option], option in scores.greedy
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                    progress.update(1)
        progress.close()
        return [answers[place] for place in range(len(requests))]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Write greedy answers up to a stop string, the end of the text, or a limit.

        Contexts are cut from the left so that the longest answer fits, as lm-eval does it for one request at a time.
        An empty context begins with the token that `loglikelihood` puts before empty contexts. The control token in
        which a fine-tuned model ends its answers ends them here, too.

        Raises:
            UserError: If a request asks for anything but plain greedy decoding, or leaves no room for a context.
        """
        asked: dict[tuple[tuple[str, ...], int], dict[tuple[int, ...], list[int]]] = {}
        truncation = Truncation()
        for place, request in enumerate(requests):
            context, arguments = request.args
            stop, most = self._greedy_arguments(arguments)
            kept = truncation.cut(self._context_ids(context), self.max_length - most)
            asked.setdefault((stop, most), {}).setdefault(kept, []).append(place)
        self._report(truncation, len(requests))
        self._warn_of_generation_config()
        answers: dict[int, str] = {}
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests")
        for (stop, most), groups in asked.items():
            contexts = sorted(groups)
            own_end = frozenset() if self._answer_end_id is None else frozenset({self._answer_end_id})
            ending = _Ending(self.tokenizer, stop, self.local.identity.end_token_ids | own_end)
            for prefix, numbers, queries in self._after_shared_beginnings(contexts):
                written: list[list[int]] = [[] for _ in queries]
                for token in self.local.generate(prefix, queries, ending, most):
                    written[token.query].append(token.token_id)
                for number, token_ids in zip(numbers, written, strict=True):
                    if token_ids[-1] in own_end:
                        token_ids.pop()
                    text = postprocess_generated_text(self.tok_decode(token_ids), list(stop), None)
                    for place in groups[contexts[number]]:
                        answers[place] = text
                        self.cache_hook.add_partial("generate_until", requests[place].args, text)
                        progress.update(1)
        progress.close()
        return [answers[place] for place in range(len(requests))]

    def _greedy_arguments(self, arguments: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        """Return the stop strings and the most tokens that a request asks for, and refuse what is not greedy."""
        normal = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
        stop = handle_stop_sequences(normal.pop("until"), self._end_of_text())
        most: int = normal.pop("max_gen_toks")
        if normal.pop("do_sample") or normal.pop("num_beams", 1) != 1:
            raise UserError(
                "not_greedy",
                f"answers are greedy here; the task requests {arguments}",
                remedy="Set do_sample: false, temperature: 0 and one beam, or use lm-eval's own model.",
            )
        if unknown := sorted(set(normal) - set(ONLY_FOR_SAMPLING)):
            raise UserError(
                "not_greedy",
                f"answers are greedy here, up to a stop string; {', '.join(unknown)} among the task's "
                "generation_kwargs would change them",
                remedy="Leave that out, or use lm-eval's own model.",
            )
        if not 0 < most < self.max_length:
            raise UserError(
                "out_of_range",
                "max_gen_toks is out of range",
                expected=f"1 to {self.max_length - 1:,}, so that a context fits before it",
                found=f"{most:,}",
            )
        return tuple(stop), most

    def _end_of_text(self) -> str | None:
        """Return the text of the tokenizer's end-of-sequence token, if it has one."""
        if self.eot_token_id is None:
            return None
        text: str = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        return text

    def _context_ids(self, context: str) -> list[int]:
        """Encode a context to be continued; a bos token that the text brings along is not added again."""
        bos = self.tokenizer.bos_token
        brings_bos = bos is not None and context.startswith(bos)
        return self.tok_encode(context, not brings_bos) or [self.prefix_token_id]

    def _warn_of_generation_config(self) -> None:
        """Say what lm-eval's own model would obey and this one does not."""
        config = getattr(self.model, "generation_config", None)
        asked = {name: getattr(config, name, None) for name in NOT_PLAIN_GREEDY}
        if asked := {name: value for name, value in asked.items() if value and value != 1}:
            logger.warning(
                "The generation_config.json of %r sets %s; answers here are plain greedy and leave it aside.",
                self.loaded.reference,
                asked,
            )

    def _report(self, truncation: Truncation, num_requests: int) -> None:
        """Add to the counts of what was cut, and warn once a call."""
        self.truncated.num_requests += truncation.num_requests
        self.truncated.num_tokens += truncation.num_tokens
        if truncation.num_requests:
            logger.warning(
                "%s of %s requests were longer than %s tokens and lost %s tokens at their beginning, as they do with "
                "lm-eval's own model. Show fewer examples, or raise max_context_tokens.",
                f"{truncation.num_requests:,}",
                f"{num_requests:,}",
                f"{self.max_length:,}",
                f"{truncation.num_tokens:,}",
            )

    def _after_shared_beginnings(
        self, contexts: Sequence[TokenIds]
    ) -> Iterator[tuple[Prefix, list[int], list[TokenIds]]]:
        """Prefill what contexts share, beginning after beginning; yield it, the contexts' numbers and their rests."""
        prefix: Prefix | None = None
        for beginning in shared_beginnings(contexts):
            token_ids = contexts[beginning.contexts[0]][: beginning.num_tokens]
            prefix = self.local.prefill(token_ids, prefix)
            yield prefix, beginning.contexts, [contexts[number][len(token_ids) :] for number in beginning.contexts]


class _Ending:
    """Ends an answer as lm-eval's own model does: at a stop string or a token that the model ends with."""

    def __init__(self, tokenizer: Any, texts: tuple[str, ...], token_ids: frozenset[int]) -> None:
        self.texts = texts
        self.token_ids = token_ids
        self._tokenizer = tokenizer
        # As in lm-eval's MultiTokenEOSCriteria, whose state would keep one object from serving several answers.
        self._num_decoded = [len(tokenizer.encode(text, add_special_tokens=False)) + 2 for text in texts]

    def ended(self, token_ids: Sequence[int]) -> bool:
        """Tell whether an answer with these tokens has ended."""
        decode = self._tokenizer.decode
        return token_ids[-1] in self.token_ids or any(
            text in decode(token_ids[-most:]) for text, most in zip(self.texts, self._num_decoded, strict=True)
        )


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library from advice that does not concern the user."""
    library = logging.getLogger(name)
    was_disabled = library.disabled
    library.disabled = True
    try:
        yield
    finally:
        library.disabled = was_disabled
