"""How much a fuzz test tries, and what it may end with: a sound object, or one sentence."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from manyicl.errors import UserError

# What takes longer hangs. Processor time: a busy machine makes everything wait.
MOST_SECONDS = 10

# The same examples every time, so that a run without a change never differs.
FEW = settings(
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    # To explain a failure, every line is traced, which takes long.
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
MANY = settings(FEW, max_examples=10_000, derandomize=False)

# Ten thousand examples take as long as the machine lets them; one that hangs is stopped by `ends_well`.
_MANY_MARKS = [pytest.mark.slow, pytest.mark.timeout(0)]
efforts = pytest.mark.parametrize(
    "effort", [pytest.param(FEW, id="few examples"), pytest.param(MANY, id="many examples", marks=_MANY_MARKS)]
)

AWKWARD = [
    "",
    " ",
    "a",
    "good",
    "text",
    "{{ text }}",
    "{{ ",
    "~",
    "null",
    "yes",
    "1e999",
    "-1",
    "007",
    "*",
    "&a",
    "<<",
    "\u2028",
    "\ufeff",
    "é",
    "a\nb",
    "a\n\nb",
    "x" * 5000,
    "../..",
    "/",
    "日本",
    "\x1b[31m",
    "'",
    '"',
    "%",
    "!!int x",
]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 10**30, -(10**30), 10**400])
    | st.floats()
    | st.dates()
    | st.sampled_from(AWKWARD)
    | st.text(max_size=12)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(scalars, inner, max_size=4),
    max_leaves=12,
)


def ends_well(act: Callable[[], Any]) -> Any:
    """Return what ``act`` returns, or None where it refuses in one sentence; anything else fails the test."""
    signal.signal(signal.SIGVTALRM, _hangs)
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)
    try:
        return act()
    except UserError as error:
        said = str(error)
        assert said.strip()
        assert said == " ".join(said.splitlines())
        assert len(said) < 20_000
        return None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _hangs(*_: object) -> None:
    raise AssertionError(f"it takes more than {MOST_SECONDS} seconds of processor time")


@st.composite
def spoilt_yaml(draw: st.DrawFn, sound: dict[str, Any]) -> str | bytes:
    """Draw the text of a YAML file that was sound until keys, values or bytes of it were changed."""
    content = dict(sound)
    for _ in range(draw(st.integers(0, 3))):
        content = _changed(draw, content)
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False, default_flow_style=draw(st.booleans()))
    match draw(st.integers(0, 5)):
        case 0:
            place = draw(st.integers(0, len(text)))
            return text[:place] + draw(st.sampled_from(AWKWARD) | st.text(max_size=8)) + text[place:]
        case 1:
            line = draw(st.sampled_from(text.splitlines() or [""]))
            return text + line + "\n"
        case 2:
            raw = text.encode("utf-8", "surrogatepass")
            place = draw(st.integers(0, len(raw)))
            return raw[:place] + draw(st.binary(max_size=4)) + raw[place + draw(st.integers(0, 3)) :]
        case 3:
            depth = draw(st.sampled_from([3, 60, 600, 5000]))
            return text + "deep: " + draw(st.sampled_from(["[", "{a: ", "- "])) * depth
        case _:
            return text


def _changed(draw: st.DrawFn, content: dict[str, Any]) -> dict[str, Any]:
    """Drop, rename, add or replace one key, of the mapping or of one in it."""
    if not content:
        return {draw(st.text(max_size=5)): draw(values)}
    key = draw(st.sampled_from(sorted(content, key=str)))
    value = content[key]
    if isinstance(value, dict) and draw(st.integers(0, 3)):
        return {**content, key: _changed(draw, value)}
    match draw(st.integers(0, 4)):
        case 0:
            return {name: old for name, old in content.items() if name != key}
        case 1:
            renamed = draw(st.sampled_from([f"{key}s", str(key)[:-1], str(key).upper()]) | scalars)
            names: dict[Any, Any] = {renamed if name == key else name: old for name, old in content.items()}
            return names
        case 2:
            return {**content, draw(st.text(max_size=8)): draw(values)}
        case _:
            return {**content, key: draw(values)}
