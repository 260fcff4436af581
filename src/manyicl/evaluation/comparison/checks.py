"""What would go wrong in a comparison, found before anything is trained and said all at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from manyicl.episodes.encoding import free_answers_in_channel_form
from manyicl.episodes.text_tokenizer import TextTokenizer
from manyicl.errors import UserError, pluralized
from manyicl.evaluation.comparison.budgets import nominal_recipe
from manyicl.evaluation.comparison.regimes import made_for_shots
from manyicl.evaluation.comparison.roles import ComparisonTasks
from manyicl.evaluation.comparison.settings import Comparison, ForgettingSettings, ReplaySettings
from manyicl.evaluation.forgetting import held_out_text
from manyicl.evaluation.imported import require_answers_to
from manyicl.model.load import read_manifest
from manyicl.model.reference import HUB_PREFIX, resolve_reference
from manyicl.paths import nearest_path, sha256_of_file
from manyicl.tasks.task import Example, Task
from manyicl.training.requirements import problems as machine_problems

# A refusal names so many problems and counts the others.
MOST_NAMED = 10
# Rows on which a dedicated model is scored while its length is chosen.
FEWEST_REMAINING = 10


def require_possible(problems: Sequence[UserError]) -> None:
    """Refuse a comparison with everything that is wrong.

    Raises:
        UserError: If anything is; of several problems with the code ``cannot_compare``.
    """
    if len(problems) == 1:
        raise problems[0]
    if problems:
        sentences = [str(problem) for problem in problems[:MOST_NAMED]]
        if len(problems) > MOST_NAMED:
            sentences.append(f"{len(problems) - MOST_NAMED} more problems are like these.")
        raise UserError("cannot_compare", f"the comparison has {len(problems)} problems. {' '.join(sentences)}")


def comparison_problems(settings: Comparison, tasks: ComparisonTasks) -> Iterator[UserError]:
    """Yield what is wrong with a comparison, as far as that shows without a model."""
    yield from machine_problems(settings, with_tasks=False)
    yield from _missing_files(settings)
    yield from _unusable_predictions(settings, tasks)
    yield from _relatives(settings, tasks)
    yield from _too_few_rows(settings, tasks)
    if settings.format.kind == "channel":
        everything = (*tasks.train, *tasks.validation, *tasks.unseen, *tasks.probes)
        yield from (free_answers_in_channel_form(task) for task in everything if not task.is_closed)
    for task in tasks.evaluated:
        yield from _single_class(task, ("training", task.train), ("test", task.test))
    # Of a validation task the training side alone is used, where something is chosen.
    for task in tasks.validation if settings.is_tuned else ():
        yield from _single_class(task, ("training", task.train))
    yield from _impossible_variants(settings)


def _missing_files(settings: Comparison) -> Iterator[UserError]:
    """Find texts and predictions that are not there."""
    compare = settings.compare
    files = {f"compare.predictions.{name}": path for name, path in compare.predictions.items()}
    if compare.replay is not None:
        files["compare.replay.text"] = compare.replay.text
    if compare.forgetting is not None and compare.forgetting.text is not None:
        files["compare.forgetting.text"] = compare.forgetting.text
    for field, path in files.items():
        if not path.is_file():
            remedy = nearest_path(path).strip() or "Name a file."
            yield UserError("missing_file", f"{field} names no file", remedy=remedy, file=path, field=field)
    if (
        compare.replay is not None
        and compare.forgetting is not None
        and _is_one_text(compare.replay, compare.forgetting)
    ):
        what, field = "what is replayed is the text on which forgetting is measured", "compare.forgetting.text"
        yield UserError("same_text", what, remedy="Hold another text out.", field=field)
    if compare.forgetting is not None and not settings.tasks.evaluate:
        what, field = (
            "forgetting is measured along training together with validation tasks, and there are none",
            "tasks.evaluate",
        )
        yield UserError("no_validation_tasks", what, remedy="Name some in tasks.evaluate.", field=field)


def _is_one_text(replay: ReplaySettings, forgetting: ForgettingSettings) -> bool:
    if forgetting.text is None or not (replay.text.is_file() and forgetting.text.is_file()):
        return False
    return sha256_of_file(replay.text) == sha256_of_file(forgetting.text)


def _unusable_predictions(settings: Comparison, tasks: ComparisonTasks) -> Iterator[UserError]:
    """Find files of answers of other systems that cannot be read, or answer other queries."""
    for path in settings.compare.predictions.values():
        try:
            if path.is_file():
                require_answers_to(tasks.evaluated, path)
        except UserError as error:
            yield error


def text_problems(settings: Comparison, tokenizer: PreTrainedTokenizerBase) -> Iterator[UserError]:
    """Yield why forgetting could not be measured on its text, if there is one."""
    forgetting, field = settings.compare.forgetting, "compare.forgetting.text"
    if forgetting is None or (forgetting.text is not None and not forgetting.text.is_file()):
        return
    try:
        text, known = held_out_text(forgetting.text, settings.model.base, field), TextTokenizer(tokenizer)
        known.require_known_words(text, field)
        if len(known.ids_from(text.text, 0, 2)) < 2:
            what = "the text is too short to be scored"
            yield UserError("text_too_short", what, expected="at least 2 tokens", file=text.name, field=field)
    except UserError as error:
        yield error


def _relatives(settings: Comparison, tasks: ComparisonTasks) -> Iterator[UserError]:
    """Find tasks that are not unseen to training, to the choice of rates, or to the base."""
    for key, held_out, known in (
        ("tasks.evaluate", tasks.validation, (("training", tasks.train),)),
        ("compare.unseen", tasks.unseen, (("training", tasks.train), ("validation", tasks.validation))),
        ("compare.forgetting.probes", tasks.probes, (("training", tasks.train), ("unseen", tasks.unseen))),
    ):
        for role, others in known:
            sources = {task.source: task.name for task in others}
            for task in held_out:
                if (sibling := sources.get(task.source)) is not None:
                    what = f"{key}: {task.name!r} comes from the same source ({task.source!r}) as the {role} task"
                    remedy = "Leave one of them out."
                    yield UserError("task_not_unseen", f"{what} {sibling!r}", remedy=remedy, field=key)
    names = [task.name for task in (*tasks.train, *tasks.validation, *tasks.unseen, *tasks.probes)]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield UserError("duplicate_task", f"two tasks are named {name!r}", remedy="Rename one of them.")
    yield from _known_to_the_base(settings, tasks)


def _known_to_the_base(settings: Comparison, tasks: ComparisonTasks) -> Iterator[UserError]:
    base = settings.model.base
    if base is None or base.startswith(HUB_PREFIX):
        return
    try:
        manifest = read_manifest(resolve_reference(base))
    except UserError:  # said already
        return
    for task in (*tasks.validation, *tasks.unseen):
        for known in manifest.tasks if manifest else ():
            if known.source == task.source or known.data_hash == task.data_hash:
                what = f"{task.name!r} is not unseen: the base {base!r} was trained on {known.name!r} of its source"
                yield UserError("task_not_unseen", what, remedy="Leave it out, or use another base.")


def _too_few_rows(settings: Comparison, tasks: ComparisonTasks) -> Iterator[UserError]:
    compare = settings.compare
    for task in (*tasks.evaluated, *tasks.probes):
        if not task.test:
            what = f"task {task.name!r} has no test rows"
            yield UserError("no_test_rows", what, remedy="Give it some, or leave it out.")
    if compare.num_queries == 1:
        what, field = "one test query for each task gives scores without an error", "compare.num_queries"
        yield UserError("wrong_value", what, expected="at least 2", found="1", field=field)
    for task in tasks.evaluated:
        if len(task.test) == 1:
            what = f"task {task.name!r} has one test row, so that its score has no error"
            remedy = "Give it more, or leave it out."
            yield UserError("too_few_rows", what, expected="at least 2", found="1", remedy=remedy)
        yield from _needs(task, max(settings.shots), "compare.shots", "shots")
    most_probe_shots = max(compare.forgetting.probe_shots) if compare.forgetting else 0
    for task in tasks.probes:
        yield from _needs(task, most_probe_shots, "compare.forgetting.probe_shots", "probe shots")
    if "few_shot" in compare.regimes:
        for task in tasks.train:
            number, field = compare.few_shot_demonstrations + 1, "compare.few_shot_demonstrations"
            yield from _needs(task, number, field, "an episode of few_shot")
    most = max(compare.dedicated.num_examples)
    for task in tasks.dedicated:
        yield from _needs(task, most, "compare.dedicated.num_examples", "dedicated models")
    if settings.is_tuned:
        for task in tasks.dedicated_validation:
            field = "compare.dedicated.num_examples"
            yield from _needs(task, most + FEWEST_REMAINING, field, "dedicated models, and rows to score them on")
        yield from _too_few_to_validate(settings, tasks)


def _too_few_to_validate(settings: Comparison, tasks: ComparisonTasks) -> Iterator[UserError]:
    """Find validation tasks without enough rows for queries and demonstrations."""
    judged = [each for each in settings.compare.regimes if each not in ("base", "dedicated")]
    most_shots = max((max(made_for_shots(settings, regime)) for regime in judged), default=0)
    for task in tasks.validation:
        num_queries = min(settings.training.evaluate_queries, len(task.train) // 2)
        field = "training.evaluate_shots"
        yield from _needs(task, most_shots + max(num_queries, 1), field, "validation shots and queries")


def _needs(task: Task, number: int, field: str, what_for: str) -> Iterator[UserError]:
    if len(task.train) < number:
        what = f"task {task.name!r} has too few training rows for {what_for}"
        expected, found = f"at least {number:,} ({field})", pluralized(len(task.train), "row")
        remedy = "Lower that, or leave the task out."
        yield UserError("too_few_rows", what, expected=expected, found=found, remedy=remedy, field=field)


def _impossible_variants(settings: Comparison) -> Iterator[UserError]:
    """Find variants that name what does not exist, or ask for more than base and machine have."""
    known = {str(problem) for problem in machine_problems(settings, with_tasks=False)}
    for variant in settings.compare.variants.values():
        try:
            recipe = nominal_recipe(settings, "all_answers", variant)
            problems = [one for one in machine_problems(recipe, with_tasks=False) if str(one) not in known]
        except UserError as error:
            problems = [error]
        known |= {str(problem) for problem in problems}
        yield from problems


def _single_class(task: Task, *sides: tuple[str, Sequence[Example]]) -> Iterator[UserError]:
    """Refuse a task of which every row of a side has the same label: any constant answer would be right."""
    if task.labels is None:
        return
    for side, examples in sides:
        answers = {example.answer for example in examples}
        if len(answers) == 1:
            what = f"every {side} row of task {task.name!r} in the family {task.family!r} has one label"
            found = repr(answers.pop())
            yield UserError("single_class", what, expected="at least two", found=found, remedy="Leave the task out.")
