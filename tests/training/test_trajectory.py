from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.training.trajectory import CASES, PATH, losses


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_the_losses_of_twenty_steps_are_those_that_were_recorded(name: str, tmp_path: Path) -> None:
    recorded = json.loads(PATH.read_text(encoding="utf-8"))
    assert losses(name, tmp_path) == pytest.approx(recorded[name], rel=1e-5), recorded["versions"]
