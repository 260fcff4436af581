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
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Self

from tqdm import tqdm  # type: ignore[import-untyped]

from manyicl.engine.backend import Prefix, TokenIds, out_of_range, require_context
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
# What generation_config.json may ask for without changing a greedy answer; lm-eval's own model obeys the rest of it.
WITHOUT_EFFECT = {"do_sample", *ONLY_FOR_SAMPLING, "bos_token_id", "eos_token_id", "pad_token_id", "max_length"}
WITHOUT_EFFECT |= {"max_new_tokens", "use_cache", "cache_implementation", "transformers_version", "_from_model_config"}


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
            activation_budget_mib: Bound on the memory of queries in flight, without model and prefix; None for half of
                what the prefix uses, and at least 64.

        Raises:
            UserError: If the model allows fewer positions, the tokenizer has no token that may stand for an empty
                context, or a bound is below 1.
        """
        self.local = LocalBackend(loaded, activation_budget_mib=activation_budget_mib)
        require_context(max_context_tokens, self.local.identity)
        if loaded.tokenizer.bos_token_id is None and loaded.tokenizer.eos_token_id is None:
            what = f"the tokenizer of {loaded.reference!r} has neither a bos nor an eos token"
            raise UserError("no_bos_or_eos", what, expected="one, which lm-eval puts before a text without context")
        # lm-eval advises to load a model by its name, which does not concern the user.
        library = logging.getLogger("lm_eval.models.huggingface")
        was_disabled, library.disabled = library.disabled, True
        try:
            super().__init__(
                pretrained=loaded.model,
                # It is given a padding token, which is not to be seen elsewhere.
                tokenizer=copy.deepcopy(loaded.tokenizer),
                max_length=max_context_tokens,
                batch_size=ROLLING_WINDOWS,
                trust_remote_code=False,
            )
        finally:
            library.disabled = was_disabled
        self.loaded = loaded
        # Requests that lost tokens on the left because they did not fit, and the tokens that they lost.
        self.num_truncated_requests = self.num_truncated_tokens = 0
        # An end-of-answer text plays no part: lm-eval's tasks have formats and stop strings of their own.
        manifest = loaded.manifest
        self._answer_end_id = Encoder(loaded.tokenizer, manifest.text_format).answer_end_id if manifest else None
        self._encode = lru_cache(maxsize=4)(super().tok_encode)

    @classmethod
    def from_pretrained(
        cls, reference: str, *, dtype: str | None = None, device: str | None = None, **bounds: int | None
    ) -> Self:
        """Load a folder, .gguf file, ``hf:owner/name`` or ``builtin:name``; ``bounds`` are those of `__init__`.

        Raises:
            UserError: If it cannot be loaded, or mixes the episodes of a packed sequence.
        """
        return cls(load_model(reference, dtype=dtype, device=device), **bounds)

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
            "num_truncated_requests": self.num_truncated_requests,
            "num_truncated_tokens": self.num_truncated_tokens,
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
        for number, (_, _, continuation) in enumerate(requests, start=1):
            if not 0 < len(continuation) <= self.max_length:
                what = f"the continuation of request {number} has {len(continuation):,} tokens"
                expected = f"1 to {self.max_length:,}, the longest context"
                raise UserError("continuation_too_long", what, expected=expected)
        # The last token of a continuation is predicted, never read, so one more fits.
        contexts = self._cut([(ids, self.max_length + 1 - len(continuation)) for _, ids, continuation in requests])
        answers: dict[int, Answer] = {}
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        for prefix, groups, queries in self._after_shared_beginnings(dict(enumerate(contexts))):
            options = [[tuple(requests[i][2]) for i in group] for group in groups]
            for group, scores in zip(groups, self.local.score(prefix, queries, options, "all"), strict=True):
                for option, i in enumerate(group):
                    answers[i] = scores.log_probabilities[option], option in scores.greedy
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                    progress.update(1)
        progress.close()
        return [answers[i] for i in range(len(requests))]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Write greedy answers up to a stop string, the end of the text, or a limit.

        Contexts are cut from the left so that the longest answer fits, as lm-eval does it for one request at a time.
        An empty context begins with the token that `loglikelihood` puts before empty contexts. The control token in
        which a fine-tuned model ends its answers ends them here, too.

        Raises:
            UserError: If a request asks for anything but plain greedy decoding, or leaves no tokens for a context.
        """
        ends = [self._greedy_arguments(request.args[1]) for request in requests]
        encoded = [self._context_ids(request.args[0]) for request in requests]
        contexts = self._cut([(ids, self.max_length - most) for ids, (_, most) in zip(encoded, ends, strict=True)])
        self._warn_of_generation_config()
        contexts_by_end: dict[tuple[tuple[str, ...], int], dict[int, TokenIds]] = {}
        for i, end in enumerate(ends):
            contexts_by_end.setdefault(end, {})[i] = contexts[i]
        own_end = frozenset() if self._answer_end_id is None else frozenset({self._answer_end_id})
        answers: dict[int, str] = {}
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests")
        for (stop, most), some_contexts in contexts_by_end.items():
            ending = _Ending(self.tokenizer, stop, self.local.identity.end_token_ids | own_end)
            for prefix, groups, queries in self._after_shared_beginnings(some_contexts):
                written: list[list[int]] = [[] for _ in queries]
                for token in self.local.generate(prefix, queries, ending, most):
                    written[token.query].append(token.token_id)
                for group, token_ids in zip(groups, written, strict=True):
                    if token_ids[-1] in own_end:
                        token_ids.pop()
                    text = postprocess_generated_text(self.tok_decode(token_ids), list(stop), None)
                    for i in group:
                        answers[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                        progress.update(1)
        progress.close()
        return [answers[i] for i in range(len(requests))]

    def _greedy_arguments(self, arguments: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        """Return the stop strings and the most tokens that a request asks for, and refuse what is not greedy."""
        normal = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
        # The end of a text stops an answer, too, where the tokenizer has one.
        end = None if self.eot_token_id is None else self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stop = handle_stop_sequences(normal.pop("until"), end)
        most: int = normal.pop("max_gen_toks")
        samples = normal.pop("do_sample") or normal.pop("num_beams", 1) != 1
        if samples or not normal.keys() <= set(ONLY_FOR_SAMPLING):
            what = f"answers are greedy here, up to a stop string; the task's generation_kwargs are {arguments}"
            remedy = "Set do_sample: false, temperature: 0 and one beam, leave others out, or use lm-eval's own model."
            raise UserError("not_greedy", what, remedy=remedy)
        if not 0 < most < self.max_length:
            expected = f"1 to {self.max_length - 1:,}, so that a context fits before it"
            raise out_of_range("max_gen_toks", most, expected)
        return tuple(stop), most

    def _context_ids(self, context: str) -> list[int]:
        """Encode a context to be continued; a bos token that the text brings along is not added again."""
        bos = self.tokenizer.bos_token
        brings_bos = bos is not None and context.startswith(bos)
        return self.tok_encode(context, not brings_bos) or [self.prefix_token_id]

    def _warn_of_generation_config(self) -> None:
        """Say what lm-eval's own model would obey and this one does not."""
        config = getattr(self.model, "generation_config", None)
        settings = config.to_diff_dict().items() if config else ()
        changed = {name: value for name, value in settings if name not in WITHOUT_EFFECT and value and value != 1}
        if changed:
            logger.warning(
                f"The generation_config.json of {self.loaded.reference!r} sets {changed}; answers here are plain "
                "greedy and leave it aside."
            )

    def _cut(self, requests: Sequence[tuple[Sequence[int], int]]) -> list[TokenIds]:
        """Cut each context from the left to the most tokens it may have; count what was cut, and warn once a call."""
        lost = [max(0, len(token_ids) - most) for token_ids, most in requests]
        num_requests = sum(num > 0 for num in lost)
        self.num_truncated_requests += num_requests
        self.num_truncated_tokens += sum(lost)
        if num_requests:
            logger.warning(
                f"{num_requests:,} of {len(requests):,} requests were longer than {self.max_length:,} tokens and lost "
                f"{sum(lost):,} tokens at their beginning, as they do with lm-eval's own model. Show fewer examples, "
                "or raise max_context_tokens."
            )
        kept = (tuple(token_ids[num:]) for (token_ids, _), num in zip(requests, lost, strict=True))
        # Requests with the same context share one tuple: there may be thousands of them, each of thousands of tokens.
        known: dict[TokenIds, TokenIds] = {}
        return [known.setdefault(token_ids, token_ids) for token_ids in kept]

    def _after_shared_beginnings(
        self, context_of: Mapping[int, TokenIds]
    ) -> Iterator[tuple[Prefix, list[list[int]], list[TokenIds]]]:
        """Prefill what contexts share, beginning after beginning; yield it, the requests of each context and its rest.

        Args:
            context_of: Number of a request -> its context.
        """
        requests: dict[TokenIds, list[int]] = {}
        for i, context in context_of.items():
            requests.setdefault(context, []).append(i)
        contexts = sorted(requests)
        prefix: Prefix | None = None
        for beginning in shared_beginnings(contexts):
            some, most = [contexts[number] for number in beginning.contexts], beginning.num_tokens
            prefix = self.local.prefill(some[0][:most], prefix)
            yield prefix, [requests[context] for context in some], [context[most:] for context in some]


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
