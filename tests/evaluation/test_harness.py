"""Log-likelihoods, greedy flags, texts and metrics equal those of lm-evaluation-harness's own model."""

from __future__ import annotations

import ast
import importlib
import itertools
import logging
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from manyicl.engine import local
from manyicl.engine.label_trie import tries_of
from manyicl.engine.packing import ActivationBudget
from manyicl.errors import UserError
from manyicl.model.load import load_model
from tests.builders import TEXTS, byte_level_bpe, sentencepiece_bpe, tiny_model, word_level
from tests.engine.parts import refused

pytest.importorskip("lm_eval", reason="the extra 'lm-eval' is not installed")

import lm_eval
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from manyicl.evaluation import harness
from manyicl.evaluation.harness import HarnessModel
from manyicl.evaluation.shared_contexts import shared_beginnings

TOKENIZERS = {"byte_level_bpe": byte_level_bpe, "sentencepiece_bpe": sentencepiece_bpe}
# A window of nine tokens, shorter than any text here, and a tokenizer that puts bos before every text.
MODELS = [
    pytest.param(("llama", "byte_level_bpe"), id="llama-byte_level_bpe"),
    pytest.param(("llama", "sentencepiece_bpe"), id="llama-sentencepiece_bpe", marks=pytest.mark.slow),
    pytest.param(("mistral", "byte_level_bpe"), id="mistral-byte_level_bpe", marks=pytest.mark.slow),
    pytest.param(("gemma2", "sentencepiece_bpe"), id="gemma2-sentencepiece_bpe"),
]
WORDS = [word for text in TEXTS[:4] for word in text.split()]
LABELS = ["good", "bad", "good film", "a long one", "never", "the red box"]


class Both:
    """The same folder as lm-eval loads it, and as we do."""

    def __init__(self, folder: Path, max_length: int | None = None, **given: Any) -> None:
        self.theirs: Any = HFLM(str(folder), device="cpu", dtype="float32", batch_size=1, max_length=max_length)
        self.ours = HarnessModel.from_pretrained(
            str(folder), dtype="float32", device="cpu", max_context_tokens=max_length, **given
        )

    def scorable(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Leave out what the tokenizer joins to the context: lm-eval's model stops at a continuation of no tokens."""
        return [pair for pair in pairs if not pair[0] or self.ours._encode_pair(*pair)[1]]

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Score both ways, compare, and return ours."""
        pairs = self.scorable(pairs)
        assert len(pairs) > 6
        theirs = self.theirs.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
        ours = cast(
            "list[tuple[float, bool]]", self.ours.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
        )
        assert_equal_answers(ours, theirs)
        return ours


def asked(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [Instance(kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


def assert_equal_answers(ours: Sequence[tuple[float, bool]], theirs: Sequence[tuple[float, bool]]) -> None:
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], rel=1e-5, abs=1e-4)
    assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in theirs]


class Never:
    """Ends no answer before its limit."""

    texts: tuple[str, ...] = ()
    token_ids: frozenset[int] = frozenset()

    def ended(self, token_ids: Sequence[int]) -> bool:
        return False


def greedy(model: HarnessModel, context: Sequence[int], num_tokens: int) -> list[int]:
    """Write the most probable tokens after a context."""
    backend = model.local
    tokens = backend.generate(backend.prefill(()), [tuple(context)], Never(), num_tokens)
    return [token.token_id for token in tokens]


def saved(folder: Path, architecture: str = "llama", tokenizer: str = "byte_level_bpe", **changes: Any) -> Path:
    """A tiny model and its tokenizer in a folder."""
    built: PreTrainedTokenizerFast = TOKENIZERS[tokenizer]()
    tiny_model(architecture, len(built), **changes).save_pretrained(folder)
    built.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(saved(tmp_path_factory.mktemp("model"), *request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("llama"))


def sentence(rng: random.Random, most_words: int = 9) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(2, most_words)))


def tasks(num_queries: int = 7, shots: int = 6) -> list[dict[str, Any]]:
    """A task with options and a task of free answers, each with the same examples before every query."""
    rng = random.Random(0)
    rows = {
        split: Dataset.from_list([{"text": sentence(rng), "answer": rng.choice(LABELS)} for _ in range(count)])
        for split, count in (("train", shots + 2), ("test", num_queries))
    }
    common = {
        "custom_dataset": lambda **_: rows,
        "test_split": "test",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": shots,
        "doc_to_text": "Text: {{text}}\nAnswer:",
        "doc_to_target": "{{answer}}",
    }
    choosing = {
        "task": "choosing",
        "output_type": "multiple_choice",
        "doc_to_choice": LABELS,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    writing = {
        "task": "writing",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n", "the"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    return [common | choosing, common | writing]


def evaluate(model: Any, wanted: Sequence[dict[str, Any]]) -> Any:
    manager = TaskManager(include_defaults=False)
    return lm_eval.evaluate(model, manager.load([dict(task) for task in wanted]), bootstrap_iters=0)


def test_tasks_score_as_with_lm_eval_s_own_model(both: Both) -> None:
    ours, theirs = evaluate(both.ours, tasks()), evaluate(both.theirs, tasks())
    for name in ("choosing", "writing"):
        for one, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert one["arguments"] == other["arguments"]
            if name == "choosing":
                assert_equal_answers([r[0] for r in one["resps"]], [r[0] for r in other["resps"]])
            else:
                assert one["resps"] == other["resps"]
        assert ours["results"][name] == theirs["results"][name]
    assert ours["n-shot"] == {"choosing": 6, "writing": 6}


def test_simple_evaluate_takes_it_and_records_the_model(llama: Path) -> None:
    model = HarnessModel.from_pretrained(str(llama))
    results: Any = lm_eval.simple_evaluate(
        model=model, tasks=tasks(3)[:1], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    assert results["config"]["model_sha"] == load_model(str(llama)).fingerprint
    assert results["config"]["model_reference"] == str(llama)
    assert results["config"]["num_truncated_requests"] == 0
    assert len(results["samples"]["choosing"]) == 3


def test_a_block_of_examples_is_read_once(llama: Path) -> None:
    model = HarnessModel.from_pretrained(str(llama))
    num_read = 0

    def count(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        nonlocal num_read
        num_read += keywords["input_ids"].shape[1]

    model.loaded.model.register_forward_pre_hook(count, with_kwargs=True)
    samples = evaluate(model, tasks(20)[:1])["samples"]["choosing"]
    contexts = sorted({arguments[0] for sample in samples for arguments in sample["arguments"]})
    lengths = [len(model.tok_encode(context)) for context in contexts]
    shortest_query = min(lengths) // 7
    assert num_read < min(lengths) + sum(length - min(lengths) + 4 * shortest_query for length in lengths)
    assert num_read < sum(lengths) / 3


PAIRS = [
    ("the film was good and the", " music was fine"),
    ("the film was good and the", " music"),
    ("the film was good and the", " music was fine"),
    ("the film was good and the ", "box"),
    ("Where is the red box?\n", "It stands by the door."),
    ("", "a bad play"),
    ("", "1 + 12 = 13"),
    ("</s>", "a bad play"),
    ("<s>the film", " was good"),
    ("a", " b"),
    ("a red box", " #7"),
    ("a red box", " #7 qz"),
    ("a red box", " ~"),
    ("日本語 и", " русский 🎉 déjà vu"),
]


def test_awkward_requests_score_the_same(both: Both) -> None:
    both.score(PAIRS)


def test_contexts_that_share_nothing_score_the_same(both: Both) -> None:
    both.score([(first + sentence(random.Random(i)), " good") for i, first in enumerate("abcdefghijklmnop")])


def test_the_order_of_requests_changes_nothing(both: Both) -> None:
    rng = random.Random(1)
    block = "\n\n".join(f"Text: {sentence(rng)}\nAnswer: {rng.choice(LABELS)}" for _ in range(8))
    queries = [f"{block}\n\nText: {sentence(rng)}\nAnswer:" for _ in range(5)]
    pairs = both.scorable(PAIRS + [(query, f" {label}") for query in queries for label in LABELS])
    expected = dict(zip(pairs, both.score(pairs), strict=True))
    for seed in range(3):
        shuffled = random.Random(seed).sample(pairs, len(pairs))
        found = both.ours.loglikelihood(asked("loglikelihood", shuffled), disable_tqdm=True)
        assert_equal_answers(found, [expected[pair] for pair in shuffled])


@pytest.mark.parametrize(("least_spared", "most_trie_tokens"), [(1, 256), (10**9, 256), (256, 2), (1, 1)])
def test_however_requests_are_read_the_scores_are_the_same(
    both: Both, monkeypatch: pytest.MonkeyPatch, least_spared: int, most_trie_tokens: int
) -> None:
    monkeypatch.setattr(local, "MOST_TRIE_TOKENS", most_trie_tokens)
    monkeypatch.setattr(harness, "shared_beginnings", lambda contexts: shared_beginnings(contexts, least_spared))
    rng = random.Random(2)
    beginnings = [sentence(rng, 40) for _ in range(3)]
    pairs = [(f"{beginning} {sentence(rng)}", f" {label}") for beginning in beginnings for label in LABELS]
    both.score(PAIRS + pairs + [(context, " never again!") for context, _ in pairs])


def test_little_activation_budget_changes_nothing(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token a pass: queries are longer than a pass, and tries are cut."""
    small = ActivationBudget.of(both.ours.model, 1)
    monkeypatch.setattr(ActivationBudget, "after", lambda model, blocks, mib: small)
    rng = random.Random(3)
    options = [f" {sentence(rng)}" for _ in range(12)]
    pairs = both.scorable([(f"the film was {word}", option) for word in ("good", "bad and long") for option in options])
    continuations = [tuple(both.ours._encode_pair(*pair)[1]) for pair in pairs if "good" in pair[0]]
    assert len(tries_of(continuations, small.slots_per_query())) > 1
    both.score(PAIRS + pairs)


def test_greedy_continuations_are_told_from_others(both: Both) -> None:
    for context in ([5, 9, 33], [7], list(range(40, 90))):
        text = greedy(both.ours, context, 6)
        changed = [[*text[:i], (text[i] + 1) % 97, *text[i + 1 :]] for i in range(6)]
        requests = [(None, context, ids) for ids in (text, text[:1], text[:4], *changed)]
        theirs = both.theirs._loglikelihood_tokens(requests, disable_tqdm=True)
        ours = both.ours._loglikelihood_tokens(requests, disable_tqdm=True)
        assert_equal_answers(ours, theirs)
        assert [is_greedy for _, is_greedy in ours] == [True] * 3 + [False] * 6


def test_rolling_windows_score_the_same(tmp_path: Path) -> None:
    both = Both(saved(tmp_path, "mistral", "sentencepiece_bpe"), max_length=24)
    texts = [(sentence(random.Random(i), most),) for i, most in enumerate((3, 60, 20, 3))]
    ours = both.ours.loglikelihood_rolling(asked("loglikelihood_rolling", texts), disable_tqdm=True)
    theirs = both.theirs.loglikelihood_rolling(asked("loglikelihood_rolling", texts), disable_tqdm=True)
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-4)
    assert both.ours.num_truncated_requests == 0


def test_long_contexts_are_cut_as_with_lm_eval_and_counted(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    both = Both(llama, max_length=32)
    block = " ".join(WORDS)
    pairs = [(f"{block} {word}", f" {label}") for word in ("one", "two") for label in LABELS] + PAIRS
    encoded = [both.ours._encode_pair(*pair) for pair in pairs if pair[0]]
    num_lost = [len(context) + len(continuation) - 33 for context, continuation in encoded]
    with caplog.at_level(logging.WARNING, harness.__name__):
        both.score(pairs)
    assert both.ours.num_truncated_requests == sum(lost > 0 for lost in num_lost) >= 12
    assert both.ours.num_truncated_tokens == sum(max(0, lost) for lost in num_lost)
    (record,) = [record for record in caplog.records if record.name == harness.__name__]
    assert f"{both.ours.num_truncated_tokens:,} tokens" in record.message
    assert both.ours.get_model_info()["num_truncated_requests"] == both.ours.num_truncated_requests

    writing = [(context, {"until": ["\n"], "max_gen_toks": 8}) for context, _ in pairs[:7]]
    theirs = both.theirs.generate_until(asked("generate_until", writing), disable_tqdm=True)
    before = both.ours.num_truncated_requests
    assert both.ours.generate_until(asked("generate_until", writing), disable_tqdm=True) == theirs
    assert both.ours.num_truncated_requests == before + 7


@pytest.mark.parametrize("stop", [["\n"], ["the", " a"], [], ["e"], ["good", "\n\n", "</s>"]])
def test_answers_end_where_they_end_with_lm_eval(both: Both, stop: list[str]) -> None:
    contexts = [*TEXTS, TEXTS[0], "<s>the film", "</s>", "a"]
    arguments = [(text, {"until": stop, "max_gen_toks": 20 + 3 * (i % 2)}) for i, text in enumerate(contexts)]
    theirs = both.theirs.generate_until(asked("generate_until", arguments), disable_tqdm=True)
    ours = both.ours.generate_until(asked("generate_until", arguments), disable_tqdm=True)
    assert ours == theirs
    assert any(ours)


def test_answers_end_at_any_token_that_the_model_ends_with(tmp_path: Path) -> None:
    """Chat models end a turn with a token that is not the tokenizer's end of text."""
    folder = saved(tmp_path)
    free = Both(folder)
    arguments = [(TEXTS[0], {"until": [], "max_gen_toks": 20})]
    written = greedy(free.ours, free.ours.tok_encode(TEXTS[0]), 20)
    GenerationConfig(eos_token_id=[written[7], 1]).save_pretrained(folder)
    both = Both(folder)
    theirs = both.theirs.generate_until(asked("generate_until", arguments), disable_tqdm=True)
    assert both.ours.generate_until(asked("generate_until", arguments), disable_tqdm=True) == theirs
    assert theirs != free.ours.generate_until(asked("generate_until", arguments), disable_tqdm=True)


def test_an_empty_context_begins_with_what_stands_for_one(llama: Path) -> None:
    model = HarnessModel.from_pretrained(str(llama))
    begun, named = model.generate_until(
        asked("generate_until", [(text, {"until": [], "max_gen_toks": 5}) for text in ("", "</s>")]), disable_tqdm=True
    )
    assert begun == named != ""


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"do_sample": True, "temperature": 0.7}, "greedy"),
        ({"temperature": 0.7}, "greedy"),
        ({"num_beams": 4}, "one beam"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"max_gen_toks": 512}, "1 to 511"),
    ],
)
def test_other_than_greedy_answers_are_refused(llama: Path, arguments: dict[str, Any], found: str) -> None:
    model = HarnessModel.from_pretrained(str(llama))
    with pytest.raises(UserError, match=found):
        model.generate_until(asked("generate_until", [("a", {"until": ["\n"], **arguments})]))
    harmless = {"do_sample": False, "temperature": 0.0, "top_p": 0.9, "num_beams": 1, "max_gen_toks": 3}
    model.generate_until(asked("generate_until", [("a", {"until": "\n", **harmless})]), disable_tqdm=True)


def test_a_generation_config_that_is_left_aside_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path)
    without_effect: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "num_beams": 1, "eos_token_id": 2}
    GenerationConfig(repetition_penalty=1.2, **without_effect).save_pretrained(folder)
    model = HarnessModel.from_pretrained(str(folder))
    model.generate_until(asked("generate_until", [("a", {"until": "\n", "max_gen_toks": 2})]), disable_tqdm=True)
    assert "sets {'repetition_penalty': 1.2};" in caplog.text


def test_what_cannot_be_scored_is_refused(llama: Path) -> None:
    model = HarnessModel.from_pretrained(str(llama), max_context_tokens=8)
    for continuation in ([], list(range(9))):
        with refused("continuation_too_long", what="request 2"):
            model._loglikelihood_tokens([(None, [1], [2]), (("a", "b"), [1], continuation)])
    with refused("out_of_range", field="max_context_tokens", expected="1 to 512"):
        HarnessModel.from_pretrained(str(llama), max_context_tokens=513)
    with refused("out_of_range", field="activation_budget_mib"):
        HarnessModel.from_pretrained(str(llama), activation_budget_mib=0)


def test_a_tokenizer_without_bos_and_eos_is_refused(tmp_path: Path) -> None:
    tokenizer = word_level()
    tiny_model("llama", len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with refused("no_bos_or_eos"):
        HarnessModel.from_pretrained(str(tmp_path))


def test_the_loaded_tokenizer_stays_as_it_is(llama: Path) -> None:
    loaded = load_model(str(llama))
    HarnessModel(loaded)
    assert loaded.tokenizer.pad_token is None


def test_chat_templates_are_applied_as_lm_eval_does(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    both = Both(folder)
    history = [{"role": "user", "content": "a bad play"}]
    assert both.ours.apply_chat_template(history) == both.theirs.apply_chat_template(history) == "[user]a bad play\n"
    assert both.ours.chat_template(True) == both.theirs.chat_template(True) == tokenizer.chat_template
    assert both.ours.tokenizer_name == both.theirs.tokenizer_name


@pytest.mark.parametrize("seed", range(20))
def test_every_context_stands_behind_one_beginning_of_its_own(seed: int) -> None:
    rng = random.Random(seed)
    blocks = [tuple(rng.choices(range(3), k=rng.randint(0, 60))) for _ in range(4)]
    contexts = sorted({(*rng.choice(blocks), *rng.choices(range(3), k=rng.randint(1, 9))) for _ in range(40)})
    least_spared = rng.choice([1, 20, 100])
    found = shared_beginnings(contexts, least_spared)
    assert sorted(number for beginning in found for number in beginning.contexts) == list(range(len(contexts)))
    for beginning in found:
        assert beginning.num_tokens < min(len(contexts[number]) for number in beginning.contexts)
        assert len({contexts[number][: beginning.num_tokens] for number in beginning.contexts}) == 1
    for one, other in itertools.pairwise(found):
        # Beginnings come in the order of their tokens, so that each is read once.
        assert contexts[one.contexts[0]][: one.num_tokens] <= contexts[other.contexts[0]][: other.num_tokens]


def test_beginnings_are_shared_only_where_it_pays() -> None:
    block, other = tuple(range(100, 400)), tuple(range(500, 600))
    contexts = sorted([(*block, i, 7) for i in range(5)] + [(*other, i) for i in range(3)] + [(9,), (9, 9)])
    found = {beginning.num_tokens: beginning.contexts for beginning in shared_beginnings(contexts, 256)}
    assert found == {0: [0, 1, 7, 8, 9], 300: [2, 3, 4, 5, 6]}
    assert {beginning.num_tokens for beginning in shared_beginnings(contexts, 150)} == {0, 300, 100}
    assert shared_beginnings([]) == []
    assert [one.contexts for one in shared_beginnings([(1,)])] == [[0]]


def test_without_lm_eval_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, harness.__name__)
    with pytest.raises(UserError, match=r"pip install 'manyicl\[lm-eval\]'"):
        importlib.import_module(harness.__name__)


def test_nothing_else_imports_lm_eval() -> None:
    package = Path(harness.__file__).parent.parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if path != Path(harness.__file__):
                assert not any(name.startswith(("lm_eval", harness.__name__)) for name in names), path


def test_bfloat16_differs_by_rounding_alone(llama: Path) -> None:
    theirs: Any = HFLM(str(llama), device="cpu", dtype="bfloat16", softmax_dtype="float32", batch_size=1)
    ours = HarnessModel.from_pretrained(str(llama), dtype="bfloat16")
    assert ours.model.dtype == torch.bfloat16
    pairs = asked("loglikelihood", PAIRS)
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    found = ours.loglikelihood(pairs, disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=0.05, abs=0.5)
