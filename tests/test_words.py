"""Code and pages are written in the field's own words."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from tests.documents import INLINE_CODE, PAGES, ROOT, prose

# Word that is not used -> what is said instead.
INSTEAD = {
    r"likeliest": "most probable, argmax, greedy",
    r"terminators?": "end-of-answer text",
    r"costs? nothing": "trivial baselines",
    r"watched tasks?|watched quer(y|ies)": "held-out validation task, on-the-fly scoring",
    r"mend(s|ed|ing)?": "fix, patch",
    r"behind": "after, conditioned on",
    r"asked": "evaluated, requested, answered, test queries",
    r"left out": "dropped, skipped, omitted",
    r"goes on|go on with|begun": "resumes, started",
    r"to be had": "available",
    r"persons?|whoever": "user, anyone",
    r"rectangles?": "padded batch",
    r"swept|flaws?": "cleaned up, integrity error",
    r"unseen characters": "zero-width characters",
    r"in no time|in one go": "at once",
    r"for ever": "forever",
    r"strangers?": "untrusted, not yours",
    r"likeness": "similarity",
    r"in (its|the) way": "missing",
    r"held to": "checked against",
}
FILES = [*sorted((ROOT / "src").rglob("*.py")), *(page for page in PAGES if page.name != "log.md")]


def written(path: Path) -> str:
    """Return the prose of a page without code and the targets of links, or the comments and texts of a module."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return re.sub(r"\]\([^)]*\)", "]", INLINE_CODE.sub("", prose(text)))
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    return "\n".join(
        token.string
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        # The name of a key in files of earlier versions.
        if token.type in kinds and token.string != '"terminator"'
    )


# Names that say neither what something holds nor what it does.
NO_NAMES = {"listed", "shown", "counted", "told", "wanted"}


def names_in(path: Path) -> set[str]:
    """Return the names that a module gives to functions, classes, arguments and values."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return (
        {node.id for node in nodes if isinstance(node, ast.Name)}
        | {node.arg for node in nodes if isinstance(node, ast.arg)}
        | {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    )


def test_names_say_what_they_hold_or_do() -> None:
    found = {
        path.name: {name.lstrip("_") for name in names_in(path)} & NO_NAMES for path in (ROOT / "src").rglob("*.py")
    }
    assert not {name: names for name, names in found.items() if names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_that_a_stranger_would_stumble_over_are_not_used(path: Path) -> None:
    text = written(path)
    found = {
        match[0]: instead
        for word, instead in INSTEAD.items()
        for match in re.finditer(rf"\b(?:{word})\b", text, re.IGNORECASE)
    }
    assert not found
