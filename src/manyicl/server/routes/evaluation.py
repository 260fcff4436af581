"""Route that evaluates a task on rows that hold their answers."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from manyicl.checked import validated
from manyicl.server.answering import answers, client_of, require_all_answers, require_all_rows, require_answerable
from manyicl.server.authentication import Predictor
from manyicl.server.bodies import RowsAndKeys, in_thread, read_body, rows_of
from manyicl.server.documented import body_of, errors
from manyicl.server.evaluation import Accepted, evaluated, require_evaluable, rows_with_answers, summary
from manyicl.server.routes.parameters import TaskName
from manyicl.server.row_input import ROWS
from manyicl.server.schemas import AnswerChoices, EvaluateIn, EvaluationOut
from manyicl.server.services import App, Services
from manyicl.server.task_service import Question, task_without_rows

router = APIRouter(prefix="/v1/tasks", tags=["predictions"])


@router.post(
    "/{task}/evaluate",
    response_model=EvaluationOut,
    responses=errors(404, 409, body=True),
    openapi_extra=body_of(EvaluateIn, lines=True),
)
async def evaluate(
    task: TaskName, request: Request, caller: Predictor, services: App, choices: Annotated[AnswerChoices, Query()]
) -> Any:
    """Answer rows that hold their answers, and say how many are right and which are wrong.

    A row of JSON that cannot be used makes the whole request fail, and the error names all such rows; one of lines or
    a table is counted and named under `problems`. More rows than a request may have are evaluated by a job.
    """
    body = await read_body(request)
    content = await rows_of(request, body, ROWS, services.settings.max_rows)
    services.limits.count_rows(caller, len(content.rows))
    chosen = validated(AnswerChoices, {**choices.model_dump(exclude_unset=True), **content.keys}, None)
    question, expected = await in_thread(request, lambda: _question(services, caller.owner, task, chosen, content))
    async with client_of(request, services) as client:
        await require_answerable(services, question.version)
        predictions = [one async for one in answers(services, client, question)]
    version = await require_answerable(services, question.version)  # which may have become ready for these rows
    if not content.is_lines:
        require_all_answers(question, predictions)

    def found() -> dict[str, Any]:
        results = (evaluated(one, answers) for one, answers in zip(predictions, expected, strict=True))
        return summary(task_without_rows(question.task, version), zip(question.numbers, results, strict=True))

    scores = await in_thread(request, found)
    return EvaluationOut(task=question.task.id, version=version.key.version, model=version.model, **scores)


def _question(
    services: Services, owner: str, task: str, chosen: AnswerChoices, content: RowsAndKeys
) -> tuple[Question, list[Accepted | None]]:
    """Render the queries and the answers of rows; of JSON, all or none."""
    record, version = services.service.version_that_answers(owner, task, chosen.version)
    without_rows = task_without_rows(record, version)
    require_evaluable(without_rows)
    with_answers = rows_with_answers(without_rows, content.rows)
    # Another version may be ready by now, with other labels.
    chosen = chosen.model_copy(update={"version": version.key.version})
    question = services.service.question(owner, record.id, chosen, with_answers.rows)
    if not content.is_lines:
        require_all_rows(question)
    return question, with_answers.expected
