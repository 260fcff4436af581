"""Saved and loaded = in memory; what the prefill observes = asking again; files that do not belong are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from manyicl.engine.compiled_file import HASH_KEY, HEADER_KEY
from manyicl.engine.engine import Engine
from manyicl.engine.local import target_scores
from manyicl.engine.observed import ObservedAnswer, answer_targets, groups_of_shots, observed_answers
from manyicl.episodes.text_format import ChannelFormat, PlainFormat
from manyicl.errors import UserError
from manyicl.model.manifest import Manifest
from manyicl.tasks.task import Task
from tests.builders import make_example, make_task, tiny_loaded
from tests.engine.parts import model_of, refused

LABELS = ("good", "good film", "bad", "a", "long and bad")


def closed() -> Task:
    rows = [make_example(f"film {i} was fine", LABELS[i % 5]) for i in range(40)]
    return make_task(labels=LABELS, train=rows, instruction="Is it {{ labels | join(', ') }}?")


def free() -> Task:
    return make_task(labels=None, family="qa", metric="exact_match", max_answer_tokens=6)


def choices() -> Task:
    train = [make_example(f"film {i}", ("red", "long")[i % 2], ("red", "long", "box")) for i in range(9)]
    return make_task("quiz", train, [], labels=None, family="qa", choices_column="options")


TASKS: list[Callable[[], Task]] = [closed, free, choices]


@pytest.mark.parametrize("make", TASKS)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral"])
def test_a_loaded_prefix_answers_exactly_as_the_one_in_memory(
    architecture: str, make: Callable[[], Task], tmp_path: Path
) -> None:
    engine = Engine.local(tiny_loaded(architecture))
    task = make()
    compiled = engine.compile(task, task.train[:9])
    engine.save(compiled, tmp_path / "task.prefix")
    loaded = engine.load(tmp_path / "task.prefix")
    assert loaded.answers == compiled.answers
    assert loaded.token_ids == compiled.token_ids
    assert loaded.demonstrations == compiled.demonstrations
    rows: list[Any] = [{"text": "film", "options": ["door", "box"]}, {"text": "play 3", "options": ["red", "one"]}]
    assert list(engine.predict(loaded, rows)) == list(engine.predict(compiled, rows))
    again = engine.extend(loaded, task.train[9:10] if len(task.train) > 9 else task.train[:1])
    assert again.num_shots == 10


def test_the_prefix_of_a_compilation_is_that_of_a_prefill() -> None:
    engine = Engine.local(tiny_loaded())
    task = closed()
    compiled, prefilled = engine.compile(task, task.train[:20]), engine.prefill(task, task.train[:20])
    assert compiled.token_ids == prefilled.token_ids
    for one, other in zip(engine.predict(compiled, ["film"]), engine.predict(prefilled, ["film"]), strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_observed_is_what_asking_after_the_shots_before_it_would_say(seed: int) -> None:
    engine = Engine.local(tiny_loaded(seed=seed))
    task = closed()
    compiled = engine.compile(task, task.train[:12])
    for shot, observed in enumerate(compiled.answers):
        example = task.train[shot]
        (asked,) = engine.predict(engine.prefill(task, task.train[:shot]), [example.query], scores="all")
        assert asked.scores is not None
        assert observed.num_shots == shot
        expected = asked.scores.log_probabilities[example.answer]
        assert observed.log_probability == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_right_is_the_answer_chosen_token_by_token_among_the_labels() -> None:
    """The judge walks the labels by itself, with one full pass per token."""
    from tests.reference.slow_engine import full_pass_logits, plain_copy

    engine = Engine.local(tiny_loaded(seed=1))
    plain = plain_copy(model_of(engine))
    task = closed()
    label_ids = [engine.encoder.answer_ids(label) for label in LABELS]
    rights = []
    for shot, observed in enumerate(engine.compile(task, task.train[:25]).answers):
        prefix = engine.prefill(task, task.train[:shot])
        place = engine.encoder.preceding("", shot)
        ids = [*prefix.token_ids, *engine.encoder.query_ids(task.train[shot].query.text, place)]
        chosen: tuple[int, ...] = ()
        while chosen not in label_ids:
            logits = full_pass_logits(plain, [*ids, *chosen])[-1]
            allowed = [one[len(chosen)] for one in label_ids if one[: len(chosen)] == chosen]
            chosen = (*chosen, max(allowed, key=lambda token: float(logits[token])))
        assert observed.is_right == (chosen == engine.encoder.answer_ids(task.train[shot].answer))
        rights.append(observed.is_right)
    assert 0 < sum(rights) < len(rights)


@pytest.mark.parametrize(("others", "is_right"), [((), True), ((2,), False), ((0, 1, 2), False)])
def test_a_free_answer_is_right_where_its_every_token_is_the_likeliest(others: tuple[int, ...], is_right: bool) -> None:
    encoder = Engine.local(tiny_loaded()).encoder
    task = make_task(labels=None, train=[make_example("film", "good film")], family="qa", metric="exact_match")
    (targets,) = answer_targets(task, task.train, encoder)
    answer = encoder.answer_ids("good film")
    assert len(answer) >= 3
    logits = torch.zeros(len(answer), len(encoder.tokenizer))
    logits[range(len(answer)), list(answer)] = 3.0
    for row in others:
        logits[row, 7] = 3.5
    allowed = [target.allowed for target in targets]
    # Two chunks of a prefill may tear an answer apart.
    scores = [*target_scores(logits[:1], answer[:1], allowed[:1]), *target_scores(logits[1:], answer[1:], allowed[1:])]
    (observed,) = observed_answers([targets], scores)
    assert observed.is_right == is_right
    expected = logits.log_softmax(-1)[range(len(answer)), list(answer)].sum()
    assert observed.log_probability == pytest.approx(float(expected), abs=1e-5)


def saved(tmp_path: Path, engine: Engine | None = None) -> Path:
    engine = engine or Engine.local(tiny_loaded())
    task = closed()
    engine.save(engine.compile(task, task.train[:5]), tmp_path / "task.prefix")
    return tmp_path / "task.prefix"


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Change header or tensors and write them back under the old hash."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    header = json.loads(metadata[HEADER_KEY])
    change(header, tensors)
    save_file(tensors, path, {HEADER_KEY: json.dumps(header), HASH_KEY: metadata[HASH_KEY]})


def earlier_version(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    header["format_version"] = 1


def other_example(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    header["demonstrations"][0]["answer"] = "bad"


def other_values(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["values.1"][0, 0, 0, 0] += 1


def lost_key(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del header["task"]


@pytest.mark.parametrize(
    ("change", "code", "what"),
    [
        (earlier_version, "other_version", "another version"),
        (other_example, "altered_file", "altered"),
        (other_values, "altered_file", "altered"),
        (lost_key, "incomplete_file", "task: field required"),
    ],
)
def test_an_altered_file_is_refused(
    change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None], code: str, what: str, tmp_path: Path
) -> None:
    path = saved(tmp_path)
    rewritten(path, change)
    with refused(code, what=what, file=str(path)):
        Engine.local(tiny_loaded()).load(path)


@pytest.mark.parametrize("kept", [0, 7, 400, 0.5, -1])
def test_a_truncated_file_is_refused(kept: float, tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with refused("incomplete_file", file=str(path)):
        Engine.local(tiny_loaded()).load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    engine = Engine.local(tiny_loaded())
    with refused("not_a_compiled_task", what="does not exist"):
        engine.load(tmp_path / "none.prefix")
    save_file({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with refused("not_a_compiled_task", what="no compiled task"):
        engine.load(tmp_path / "weights.safetensors")


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with refused("foreign_prefix", what="another model", found="'tiny-llama'"):
        Engine.local(tiny_loaded(seed=1)).load(path)


# peft asks transformers for a property under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_another_adapter_of_the_same_base_is_called_that(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from manyicl.model.load import fingerprint

    engines = []
    for seed in (0, 1):
        loaded = tiny_loaded()
        manifest = Manifest(max_context_tokens=256, base="base", base_fingerprint=fingerprint(loaded.model))
        model: Any = get_peft_model(loaded.model, LoraConfig(r=2, target_modules="all-linear"))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weights in model.named_parameters():
                if "lora_B" in name:
                    weights.copy_(torch.randn(weights.shape, generator=generator))
        model.eval()
        engines.append(
            Engine.local(
                replace(loaded, model=model, manifest=manifest, fingerprint=fingerprint(model), reference=f"a{seed}")
            )
        )
    path = saved(tmp_path, engines[0])
    assert engines[0].load(path).num_shots == 5
    with refused("foreign_prefix", what="another adapter of the same base", found="'a0'"):
        engines[1].load(path)


def test_another_format_precision_or_context_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with refused("foreign_prefix", what="another text format"):
        Engine.local(tiny_loaded(), text_format=PlainFormat(separator=" -> ")).load(path)
    with refused("foreign_prefix", expected="channel", found="plain", remedy="Give --format plain, or compile"):
        Engine.local(tiny_loaded(), text_format=ChannelFormat()).load(path)
    saved(tmp_path, Engine.local(tiny_loaded(), text_format=PlainFormat(end_of_answer=" ##")))
    ends = {"expected": r"plain, end of answer '\n\n'", "found": "plain, end of answer ' ##'"}
    with refused("foreign_prefix", **ends, remedy="Give --end-of-answer ' ##', or compile"):
        Engine.local(tiny_loaded()).load(path)
    saved(tmp_path)
    loaded = tiny_loaded()
    loaded.model.to(torch.bfloat16)  # type: ignore[arg-type]
    with refused("foreign_prefix", what="another precision (float32 against bfloat16)"):
        Engine.local(loaded).load(path)
    with refused("prefix_too_long", expected="at most max_context_tokens, 50", file=str(path)):
        Engine.local(tiny_loaded(), max_context_tokens=50).load(path)


def test_another_tokenizer_is_named_where_the_text_has_another_number_of_tokens(tmp_path: Path) -> None:
    path = saved(tmp_path)
    loaded = tiny_loaded()
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.add_tokens(["film"])
    with refused("foreign_prefix", what="another tokenizer", file=str(path)):
        Engine.local(replace(loaded, tokenizer=tokenizer)).load(path)


def test_nothing_to_compile_and_no_place_to_write_are_refused(tmp_path: Path) -> None:
    engine = Engine.local(tiny_loaded())
    with refused("nothing_to_compile"):
        engine.save(engine.compile(make_task(), ()), tmp_path / "task.prefix")
    task = closed()
    compiled = engine.compile(task, task.train[:2])
    with refused("output_is_folder"):
        engine.save(compiled, tmp_path)
    with refused("output_folder_missing"):
        engine.save(compiled, tmp_path / "none" / "task.prefix")


def test_shots_are_grouped_by_doubling() -> None:
    answers = [ObservedAnswer(shot, -1.0, True) for shot in range(11)]
    groups = [(first, last, len(group)) for first, last, group in groups_of_shots(answers)]
    assert groups == [(0, 0, 1), (1, 1, 1), (2, 3, 2), (4, 7, 4), (8, 10, 3)]


def lost_tensor(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors["keys.1"]


def no_tokens(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = (tensor[:, :, :0] if tensor.dim() == 4 else tensor[:0]).contiguous()


def fewer_heads(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["values.0"] = tensors["values.0"][:, :1].contiguous()


def other_precision(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["keys.2"] = tensors["keys.2"].bfloat16()


def one_token_less(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["keys.2"] = tensors["keys.2"][:, :, 1:].contiguous()


def other_tokens(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["token_ids"][3] += 1


def other_demonstrations(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    header["demonstrations"] = header["demonstrations"][:2]


def no_labels(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    header["task"]["labels"] = []


def label_twice(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    header["task"]["labels"].append(header["task"]["labels"][0])


def label_gone(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del header["task"]["labels"][0]


def wrong_limit(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    header["task"]["max_answer_tokens"] = -5


@pytest.mark.parametrize(
    "change",
    [
        lost_tensor,
        no_tokens,
        fewer_heads,
        other_precision,
        one_token_less,
        other_tokens,
        other_demonstrations,
        no_labels,
        label_twice,
        label_gone,
        wrong_limit,
    ],
)
def test_a_forged_file_with_a_hash_that_fits_is_refused(
    change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None], tmp_path: Path
) -> None:
    from manyicl.engine.compiled import content_digest

    path = saved(tmp_path)
    rewritten(path, change)
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata()[HEADER_KEY]
    save_file(tensors, path, {HEADER_KEY: header, HASH_KEY: content_digest(header, tensors)})
    with pytest.raises(UserError) as caught:
        Engine.local(tiny_loaded()).load(path)
    assert caught.value.code in ("incomplete_file", "foreign_prefix", "foreign_demonstration")


def test_the_same_weights_under_another_configuration_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    loaded = tiny_loaded()
    loaded.model.config.rope_parameters = {**loaded.model.config.rope_parameters, "rope_theta": 123.0}
    with refused("foreign_prefix", what="another configuration"):
        Engine.local(loaded).load(path)


def test_a_file_that_is_no_compiled_task_is_never_replaced(tmp_path: Path) -> None:
    engine = Engine.local(tiny_loaded())
    task = closed()
    compiled = engine.compile(task, task.train[:2])
    (tmp_path / "rows.csv").write_text("text,label\n", encoding="utf-8")
    with refused("output_exists"):
        engine.save(compiled, tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text(encoding="utf-8") == "text,label\n"
    (tmp_path / "task.prefix.part").write_text("of the user", encoding="utf-8")
    for _ in range(2):
        engine.save(compiled, tmp_path / "task.prefix")
    assert (tmp_path / "task.prefix.part").read_text(encoding="utf-8") == "of the user"
    with refused("not_a_compiled_task", what="is a folder"):
        engine.load(tmp_path)


def test_a_file_of_the_first_version_is_refused_with_what_to_do() -> None:
    old = Path(__file__).parent / "compiled_v1.prefix"
    with refused("other_version", expected="format version 2", found="1", remedy="Compile the task again."):
        Engine.local(tiny_loaded()).load(old)
