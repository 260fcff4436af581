"""A model folder that every case may name."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyicl.model.manifest import Manifest
from tests.model.exports import save_model


@pytest.fixture(name="model_folder", scope="session")
def _model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("bad_input") / "model")
    Manifest(max_context_tokens=256).write(folder)
    return folder
