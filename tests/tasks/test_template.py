"""Templates write what stands in a row, and can neither reach beyond it nor run away."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from manyicl.errors import UserError
from manyicl.tasks.sandbox import MOST_CHARACTERS, MOST_STEPS
from manyicl.tasks.template import Template


@pytest.mark.parametrize(
    ("source", "row", "text"),
    [
        ("{{ a }}: {{ b }}", {"a": "x", "b": None}, "x: "),
        (
            "{{ a ~ '-' ~ b }} {{ a + b }} {{ a * 3 }} {{ 2 ** 8 }} {{ 7 % 4 }}",
            {"a": "x", "b": "y"},
            "x-y xy xxx 256 3",
        ),
        ("{{ a | replace('_', ' ') }} {{ a.replace('_', '-', 1) }}", {"a": "a_b_c"}, "a b c a-b_c"),
        ("{{ c | join(', ') }}|{{ ', '.join(c) }}", {"c": ["a", "b"]}, "a, b|a, b"),
        ("{% for x in c %}{{ loop.index }}/{{ loop.length }}{{ x }} {% endfor %}", {"c": ["a", "b"]}, "1/2a 2/2b "),
        ("{% for x in c if x != 'a' %}{{ 'ABC'[loop.index0] }}{{ x }}{% endfor %}", {"c": ["a", "b"]}, "Ab"),
        (
            "{% for k, v in m.items() %}{{ k }}={{ v }} {% endfor %}{{ m | tojson }}",
            {"m": {"a": "1"}},
            'a=1 {"a": "1"}',
        ),
        ("{% set w = a.split() %}{{ w[0] }} {{ w[1:] | map('upper') | join('-') }}", {"a": "x y z"}, "x Y-Z"),
        ("{% filter upper %}{{ a }}{% endfilter %}{% set b %}<{{ a }}>{% endset %}{{ b }}", {"a": "x"}, "X<x>"),
        ("{{ 'yes' if a in ['x', 'y'] and a is not none else 'no' }}", {"a": "x"}, "yes"),
        (
            "{{ (n | int) + 1 }} {{ n | float | round(1) }} {{ a | truncate(6, true, '…', 0) }}",
            {"n": "12", "a": "long text"},
            "13 12.0 long …",
        ),
        ("{% for i in range(3) %}{{ i }}{% endfor %}{{ row['range'] }}", {"range": "r"}, "012r"),
        ("{{ m | tojson }}", {"m": {"a": "it's <b>"}}, '{"a": "it\'s <b>"}'),
        ("{{ n | title }} {{ a | sum(start=1) }}", {"n": 5, "a": [1, 2]}, "5 4"),
        ("{{ row }}", {"row": "text"}, "text"),
        ("{{ row[0] }}", {"row": ["text"]}, "text"),
        ("{{ row['row'] }}{{ row.a }}", {"row": "r", "a": "x"}, "rx"),
        (
            "{{ lipsum }}{{ dict }}{{ row['self'] }}{{ row['None'] }}",
            {"lipsum": 1, "dict": 2, "self": 3, "None": 4},
            "1234",
        ),
    ],
)
def test_a_template_writes_what_stands_in_the_row(source: str, row: dict[str, object], text: str) -> None:
    template = Template(source)
    assert template.render(row) == text
    assert set(template.columns) == set(row)


@pytest.mark.parametrize(
    ("source", "column"),
    [
        ("{{ a }}", "a"),
        (" {{ row['a b'] }}\n", "a b"),
        ("{{ row.a }}", "a"),
        ("{{ row['it\\'s'] }}", "it's"),
        ("{{ a }}.", None),
        ("{{ a | upper }}", None),
        ("{{ a }}{{ a }}", None),
        ("{% if a %}{{ a }}{% endif %}", None),
    ],
)
def test_a_column_alone_is_known(source: str, column: str | None) -> None:
    assert Template(source).bare_column == column


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ range }}", "a function is written in place of a value"),
        ("{{ a.upper }}", "a function is written in place of a value"),
        ("{{ self }}", r"a column named self is written row\['self'\]"),
        ("{{ a | random }}", "No filter named 'random'"),
        ("{{ a | center(9) }}", "No filter named 'center'"),
        ("{{ a.ljust(9) }}", "attribute 'ljust' of 'str' object is unsafe"),
        ("{{ '{:9}'.format(a) }}", "attribute 'format' of 'str' object is unsafe"),
        ("{{ '%9s' % a }}", "not formatted with %"),
        ("{{ a.__class__ }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ a }}", "macros, blocks, includes and recursive loops"),
        ("{% include a %}", "macros, blocks, includes and recursive loops"),
        ("{% for x in a recursive %}{{ loop(a) }}{% endfor %}", "recursive loops"),
        ("{{ lipsum() }}", "names the column 'lipsum'"),
    ],
)
def test_what_is_not_for_task_files_is_refused(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Template(source).render({"a": "x", "range": "r"})


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'pos' if label == 1 else 'neg' }}",
        "{{ 'pos' if 1 != label else 'neg' }}",
        "{{ 'pos' if row['a label'] in [0, 1.5] else 'neg' }}",
        "{{ 'pos' if label is eq 1 else 'neg' }}",
    ],
)
def test_a_column_is_not_compared_with_a_number_which_it_never_equals(source: str) -> None:
    with pytest.raises(UserError, match=r"compares a column with the number .* `column \| int` is a number"):
        Template(source)


def test_what_may_equal_a_number_is_compared_with_it() -> None:
    source = (
        "{{ a | int == 1 }} {{ a == '1' }} {{ c | length == 2 }} {% for x in c %}{{ loop.index == 1 }} {% endfor %}"
    )
    assert Template(source).render({"a": "1", "c": ["x", "y"]}) == "true true true true false "


TOO_LONG = f"more than {MOST_CHARACTERS:,} characters"
TOO_MANY_STEPS = f"more than {MOST_STEPS:,} steps"
TOO_MANY_BITS = "more than 20,000 bits"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ a }}" * 500, TOO_LONG),
        ("{{ 'a' * 300000000 }}", TOO_LONG),
        ("{{ 300000000 * [a] }}", TOO_LONG),
        ("{{ 10 ** (10 ** 10) }}", TOO_MANY_BITS),
        ("{% set x = 10 %}" + "{% set x = x * x %}" * 40, TOO_MANY_BITS),
        ("{{ ('f' * 3000000) | int(0, 16) }}", TOO_MANY_BITS),
        ("{{ 1 | round(1000000000, 'ceil') }}", "more than 100 decimals"),
        ("{{ [a] | tojson(indent=300000000) }}", "indents by more than 99"),
        ("{% set x = a ~ a %}" + "{% set x = x ~ x %}" * 40, TOO_LONG),
        ("{% set x = a + a %}" + "{% set x = x + x %}" * 40, TOO_LONG),
        ("{% set x = a %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}", TOO_LONG),
        ("{% set x = a %}" + "{% set x = {'a': x, 'b': x} %}" * 60 + "{{ x }}", TOO_LONG),
        ("{% set x = a %}" + "{% set y %}{{ x }}{{ x }}{% endset %}{% set x = y %}" * 40, TOO_LONG),
        ("{{ a | replace('', a) }}", TOO_LONG),
        ("{{ a.replace('', a) }}", TOO_LONG),
        ("{{ a | join(a) }}", TOO_LONG),
        ("{{ a.join(a) }}", TOO_LONG),
        ("{{ ([a] * 99) | map('replace', '', a) | join }}", TOO_LONG),
        ("{% for x in a %}{{ a }}{% endfor %}", TOO_LONG),
        ("{% filter upper %}{% for x in a %}{{ a }}{% endfor %}{% endfilter %}", TOO_LONG),
        ("{% for x in a %}" + "text " * 1000 + "{% endfor %}", TOO_LONG),
        ("{% for x in range(90000) %}{% for y in range(90000) %}{% endfor %}{% endfor %}", TOO_MANY_STEPS),
        ("{% for x in a %}{% for y in a %}{% for z in a %}{% endfor %}{% endfor %}{% endfor %}", TOO_MANY_STEPS),
        ("{% for x in range(40000) %}{{ range(40000) | sum }}{% endfor %}", TOO_MANY_STEPS),
        ("{% set b = a * 300 %}{% for x in range(40000) %}{% if b in b %}{% endif %}{% endfor %}", TOO_MANY_STEPS),
        ("{% set b = a * 300 %}{% for x in range(40000) %}{% if b is eq(b) %}{% endif %}{% endfor %}", TOO_MANY_STEPS),
        ("{% set b = a * 300 %}{% for x in range(40000) %}{% set c = b[1:] %}{% endfor %}", TOO_MANY_STEPS),
        ("{{ (('x' * 80000) | select('in', ('a,' * 8000).split(',')) | list) | length }}", TOO_MANY_STEPS),
        ("{{ ('x' * 3000000) | rejectattr('upper') | list | length }}", TOO_MANY_STEPS),
        ("{{ " + "(" * 5000 + "a" + ")" * 5000 + " }}", "nested too deeply"),
        ("{% for x in a %}" * 30 + "{% endfor %}" * 30, "nested too deeply"),
    ],
)
def test_a_template_can_neither_hang_nor_fill_the_memory(source: str, message: str) -> None:
    started = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            Template(source + "{{ a }}").render({"a": "a" * 10_000})
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 10
