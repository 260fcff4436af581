"""What libraries say becomes a clause that a sentence of ours can hold."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from manyicl.library_errors import reason


class Pair(BaseModel):
    left: int
    right: int = 0


@pytest.mark.parametrize(
    ("error", "clause"),
    [
        (OSError(36, "File name too long", "x" * 300), "file name too long"),
        (OSError("no number"), "no number"),
        (RuntimeError("\n Expected one tensor: \n at line 3 of a C++ file"), "expected one tensor"),
        (RuntimeError("CUDA error."), "CUDA error"),
        (ValueError("LlamaConfig has no 'x'."), "LlamaConfig has no 'x'"),
        (KeyError(), "KeyError"),
        (MemoryError("   "), "MemoryError"),
    ],
)
def test_an_error_becomes_one_clause(error: Exception, clause: str) -> None:
    assert reason(error) == clause


def test_refused_data_are_named_by_their_first_problem() -> None:
    with pytest.raises(ValidationError) as caught:
        Pair.model_validate({"left": "a", "right": "b"})
    assert reason(caught.value).startswith("left: input should be a valid integer")
    assert reason(caught.value).endswith("found 'a'")


def test_an_access_token_is_never_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert reason(RuntimeError("401 for hf_secret")) == "401 for $HF_TOKEN"
