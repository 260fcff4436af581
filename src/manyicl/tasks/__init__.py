"""Tasks as plain data, read from folders."""

from manyicl.tasks.files import load_task, load_tasks
from manyicl.tasks.task import Example, Query, Task, TaskSpec

__all__ = ["Example", "Query", "Task", "TaskSpec", "load_task", "load_tasks"]
