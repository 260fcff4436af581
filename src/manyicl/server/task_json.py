"""Records of tasks, versions and demonstrations as answers of the API."""

from __future__ import annotations

from dataclasses import asdict

from manyicl.engine.observed import ObservedAnswer, groups_of_shots
from manyicl.server.records import DemonstrationRecord, TaskRecord, VersionRecord
from manyicl.server.schemas import (
    CurvePoint,
    DemonstrationOut,
    PrefixOut,
    SettingsOut,
    TaskOut,
    VersionOut,
    WrittenOut,
)
from manyicl.server.services import Services


def task_out(services: Services, task: TaskRecord, *, is_whole: bool = True) -> TaskOut:
    """Return a task.

    Args:
        services: Parts of the server.
        task: The task.
        is_whole: Whether the curve and the share of the most frequent answer belong to it, which lists omit.
    """
    newest, answering = task.newest, services.service.answering_version(task)
    num_bytes = services.prefix_bytes(answering.key)
    return TaskOut(
        id=task.id,
        name=task.name,
        revision=task.revision,
        version=newest.key.version,
        ready_version=task.ready,
        state=newest.state,
        task=dict(task.keys),
        settings=SettingsOut(**asdict(task.settings)),
        labels=_labels(answering),
        num_demonstrations=newest.num_demonstrations,
        num_shots=answering.num_shots,
        num_dropped=answering.num_dropped,
        num_tokens=answering.num_tokens,
        curve=curve(answering) if is_whole else None,
        majority=services.service.majority(task, answering) if is_whole else None,
        model=answering.model,
        problem=None if newest.problem is None else dict(newest.problem),
        prefix=PrefixOut(
            resident=num_bytes is not None,
            bytes=num_bytes or 0,
            pinned=task.settings.pinned,
            rebuilt=services.was_rebuilt(answering.key),
        ),
        created_at=task.created_at,
        updated_at=task.updated_at,
    )


def curve(version: VersionRecord) -> list[CurvePoint] | None:
    """Return how well the demonstrations were predicted, by the number of those before; None before it is known."""
    if version.answers is None:
        return None
    from manyicl.evaluation.uncertainty import mean_over_queries

    points = []
    answers = [ObservedAnswer(shots, nats, bool(is_right)) for shots, nats, is_right in version.answers]
    for first, last, group in groups_of_shots(answers):
        right = mean_over_queries([float(one.is_right) for one in group])
        points.append(
            CurvePoint(
                shots=(first, last),
                num_answers=len(group),
                accuracy=right.mean,
                standard_error=right.standard_error,
                nats_per_answer=-sum(one.log_probability for one in group) / len(group),
            )
        )
    return points


def version_out(version: VersionRecord) -> VersionOut:
    """Return a version."""
    return VersionOut(
        version=version.key.version,
        created_at=version.created_at,
        change=version.change,
        state=version.state,
        num_demonstrations=version.num_demonstrations,
        labels=_labels(version),
        num_tokens=version.num_tokens,
        num_shots=version.num_shots,
        num_dropped=version.num_dropped,
        model=version.model,
        problem=None if version.problem is None else dict(version.problem),
    )


def demonstration_out(row: DemonstrationRecord) -> DemonstrationOut:
    """Return a demonstration."""
    return DemonstrationOut(number=row.number, added_in=row.added_in, columns=dict(row.columns))


def written_out(services: Services, task: TaskRecord, version: VersionRecord, numbers: tuple[int, ...]) -> WrittenOut:
    """Return the result of a change of demonstrations."""
    return WrittenOut(
        task=task_out(services, task),
        version=version_out(version),
        numbers=(numbers[0], numbers[-1]) if numbers else None,
    )


def _labels(version: VersionRecord) -> list[str] | None:
    return None if version.labels is None else list(version.labels)
