"""Tasks of lm-evaluation-harness on this engine: its prompts, tokens and metrics; what requests share is read once.

::

    import lm_eval
    from manyicl.evaluation.harness import HarnessModel

    model = HarnessModel.from_pretrained("runs/one-model")
    lm_eval.simple_evaluate(model=model, tasks=["mmlu_astronomy"], num_fewshot=5)

lm-eval hands over pairs of a context and a continuation. The continuations of one context become one trie behind it,
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from manyicl.engine.label_trie import num_shared_tokens, tries_of
from manyicl.engine.packing import QueriesInFlight, WorkingMemory, require_bounds
from manyicl.engine.prefix_cache import encode_behind, shared_beginning
from manyicl.engine.scoring import score_labels
from manyicl.episodes.encoding import Encoder
from manyicl.errors import UserError
from manyicl.evaluation.shared_contexts import Answer, Pack, score_alone, shared_beginnings
from manyicl.model.continuation import Block
from manyicl.model.load import LoadedModel, load_model

try:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.models.utils_hf import stop_sequences_criteria
except ImportError as error:
    raise UserError(
        f"lm-evaluation-harness cannot be imported: {error}. Install it with `pip install 'manyicl[lm-eval]'`."
    ) from error

logger = logging.getLogger(__name__)

# Longer continuations are read straight through, each alone: which token of a trie sees which is a square.
MOST_TRIE_TOKENS = 256
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
        self, loaded: LoadedModel, *, max_context_tokens: int | None = None, working_memory_mib: int | None = None
    ) -> None:
        """Take a loaded model.

        Args:
            loaded: From `manyicl.model.load.load_model`.
            max_context_tokens: Where contexts are cut from the left; None for lm-eval's rule: what the
                configuration allows, else what the tokenizer says, else 2,048.
            working_memory_mib: Bound on what queries in flight use beside model and prefix, in MiB; None for half
                of what the prefix uses, and at least 64.

        Raises:
            UserError: If the model allows fewer positions, the tokenizer has no token that may stand for an empty
                context, or a bound is below 1.
        """
        require_bounds(loaded, max_context_tokens, working_memory_mib)
        if loaded.tokenizer.bos_token_id is None and loaded.tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer of {loaded.reference!r} has neither a bos nor an eos token; lm-eval puts one of them "
                "before a text without context."
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
        self.working_memory_mib = working_memory_mib
        self.truncated = Truncation()
        self._tries = lru_cache(maxsize=64)(tries_of)
        self._encode = lru_cache(maxsize=4)(super().tok_encode)
        # A text that ends answers is left aside: lm-eval's tasks have formats and stop strings of their own.
        manifest = loaded.manifest
        self._answer_end_id = Encoder(loaded.tokenizer, manifest.text_format).answer_end_id if manifest else None

    @classmethod
    def from_pretrained(
        cls,
        reference: str,
        *,
        dtype: str | None = None,
        device: str | None = None,
        max_context_tokens: int | None = None,
        working_memory_mib: int | None = None,
    ) -> Self:
        """Load a model folder, ``hf:owner/name`` or ``builtin:nano``.

        Raises:
            UserError: If it cannot be loaded, or mixes the episodes of a packed row.
        """
        return cls(
            load_model(reference, dtype=dtype, device=device),
            max_context_tokens=max_context_tokens,
            working_memory_mib=working_memory_mib,
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
        """Score continuations behind their contexts.

        Args:
            requests: Text, context tokens and continuation tokens of each; no text for rolling windows.
            disable_tqdm: Show no progress.
            override_bs: Without effect here.

        Returns:
            Log-probability and whether every token is the likeliest, in the order of the requests.

        Raises:
            UserError: If a continuation has no tokens, or more than fit the model.
        """
        truncation = Truncation()
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"The continuation of request {place + 1} has {len(continuation):,} tokens; expected 1 to "
                    f"{self.max_length:,}, the longest context."
                )
            # The last token of a continuation is predicted, never read, so one more fits.
            kept = truncation.cut(context, self.max_length + 1 - len(continuation))
            groups.setdefault(kept, []).append(place)
        self._report(truncation, len(requests))
        contexts = sorted(groups)
        answers: dict[int, Answer] = {}
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        for pack in self._packs(contexts):
            options = [{i: tuple(requests[i][2]) for i in groups[contexts[number]]} for number in pack.numbers]
            for place, answer in self._score(pack, options).items():
                answers[place] = answer
                if requests[place][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
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
            for pack in self._packs(contexts):
                for number, token_ids in zip(pack.numbers, self._write(pack, stop, most), strict=True):
                    if token_ids[-1] == self._answer_end_id:
                        token_ids = token_ids[:-1]
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
                f"Answers are greedy here; the task asks for {arguments}. Set do_sample: false, temperature: 0 and "
                "one beam, or use lm-eval's own model."
            )
        if unknown := sorted(set(normal) - set(ONLY_FOR_SAMPLING)):
            raise UserError(
                f"Answers are greedy here, up to a stop string; {', '.join(unknown)} among the task's "
                "generation_kwargs would change them. Leave that out, or use lm-eval's own model."
            )
        if not 0 < most < self.max_length:
            raise UserError(
                f"max_gen_toks is {most:,}; expected 1 to {self.max_length - 1:,}, so that a context fits before it."
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

    def _packs(self, contexts: Sequence[tuple[int, ...]]) -> Iterator[Pack]:
        """Read what contexts share, beginning after beginning, and yield what is left of them behind it."""
        read: tuple[int, ...] = ()
        blocks: tuple[Block, ...] = ()
        for beginning in shared_beginnings(contexts):
            token_ids = contexts[beginning.contexts[0]][: beginning.num_tokens]
            num_known = num_shared_tokens(token_ids, read)
            blocks = encode_behind(self.model, shared_beginning(blocks, num_known), token_ids[num_known:])
            read = token_ids
            memory = WorkingMemory.behind(self.model, blocks, self.working_memory_mib)
            most = memory.tokens_per_pass()
            rests = {number: contexts[number][len(read) :] for number in beginning.contexts}
            together = [number for number, rest in rests.items() if len(rest) <= most]
            if together:
                yield Pack(together, blocks, [rests[number] for number in together], memory)
            for number, rest in rests.items():
                # What would exceed the working memory is read in chunks, up to its last token.
                if len(rest) > most:
                    own = encode_behind(self.model, blocks, rest[:-1], chunk_tokens=most)
                    yield Pack([number], own, [rest[-1:]], memory)

    def _score(self, pack: Pack, options: Sequence[Mapping[int, tuple[int, ...]]]) -> dict[int, Answer]:
        """Score the options of each query of a pack, numbered as they are asked for."""
        short = [{i: ids for i, ids in some.items() if len(ids) <= MOST_TRIE_TOKENS} for some in options]
        asked = [(query, some) for query, some in zip(pack.queries, short, strict=True) if some]
        tries = [self._tries(tuple(some.values()), pack.memory.slots_per_query()) for _, some in asked]
        found = score_labels(self.model, pack.blocks, [query for query, _ in asked], tries, pack.memory)
        answers: dict[int, Answer] = {}
        for (_, some), search in zip(asked, found, strict=True):
            answers.update({i: (search.scores[n], n in search.greedy) for n, i in enumerate(some)})
        for query, wanted in zip(pack.queries, options, strict=True):
            for i in wanted.keys() - answers.keys():
                answers[i] = score_alone(self.model, pack.blocks, query, wanted[i], pack.memory)
        return answers

    @torch.no_grad()
    def _write(self, pack: Pack, stop: Sequence[str], most: int) -> list[list[int]]:
        """Write the likeliest tokens behind each query of a pack, the one that ended it included."""
        answers: list[list[int]] = [[] for _ in pack.queries]
        has_ended = [self._ending(stop) for _ in pack.queries]
        for chunk in pack.memory.chunks([len(query) for query in pack.queries], [most] * len(pack.queries)):
            flight = QueriesInFlight(self.model, pack.blocks, [pack.queries[i] for i in chunk], most)
            logits = flight.read()
            live = list(range(len(chunk)))
            for place in range(most):
                for i, token in zip(live, logits.argmax(dim=-1).tolist(), strict=True):
                    answers[chunk[i]].append(token)
                live = [i for i in live if not has_ended[chunk[i]](answers[chunk[i]])]
                if not live or place == most - 1:
                    break
                logits = flight.follow(live, [answers[chunk[i]][-1] for i in live], [place - 1] * len(live))
        return answers

    def _ending(self, stop: Sequence[str]) -> Callable[[list[int]], bool]:
        """Return what tells, token after token, whether an answer has ended."""
        ends = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        end_ids = {self._answer_end_id, *(ends if isinstance(ends, list) else [ends])}
        criteria = stop_sequences_criteria(self.tokenizer, list(stop), 0, 1)

        def has_ended(answer: list[int]) -> bool:
            token_ids = torch.tensor([answer])
            return answer[-1] in end_ids or any(criterion(token_ids, None) for criterion in criteria)

        return has_ended


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library from advice that does not concern the person."""
    library = logging.getLogger(name)
    was_disabled = library.disabled
    library.disabled = True
    try:
        yield
    finally:
        library.disabled = was_disabled
