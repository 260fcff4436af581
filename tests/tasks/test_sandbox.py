"""Chat templates of model folders render as transformers renders them, and can neither hang nor fill the memory."""

from __future__ import annotations

import time

import pytest
from jinja2 import TemplateError

from manyicl.tasks.sandbox import MOST_CHARACTERS, MOST_STEPS, render_chat_template
from tests.episodes.chat_templates import FAMILIES

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is\n\nit? "},
    {"role": "assistant", "content": "This."},
    {"role": "user", "content": "And that?"},
]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("start", [0, 1])
def test_a_chat_template_renders_as_in_transformers(name: str, start: int) -> None:
    family = FAMILIES[name]
    if any(word in family.template for word in ("random", "strftime_now", "{{ f() }}")):
        pytest.skip("writes something else each time, or without end")
    tokenizer = family.tokenizer()
    variables = {**tokenizer.special_tokens_map, **family.arguments}
    try:
        expected = tokenizer.apply_chat_template(
            MESSAGES[start:], tokenize=False, add_generation_prompt=True, **family.arguments
        )
    except TemplateError as error:
        with pytest.raises(TemplateError, match=str(error)):
            render_chat_template(family.template, {"messages": MESSAGES[start:], **variables})
        return
    variables |= {"messages": MESSAGES[start:], "add_generation_prompt": True, "tools": None, "documents": None}
    assert render_chat_template(family.template, variables) == expected


TOO_LONG = f"more than {MOST_CHARACTERS:,} characters"
TOO_MANY_STEPS = f"more than {MOST_STEPS:,} steps"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for x in range(90000) %}{% for y in range(90000) %}{% endfor %}{% endfor %}", TOO_MANY_STEPS),
        ("{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "without end"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            TOO_MANY_STEPS,
        ),
        (
            "{% macro f(n) %}{% if n %}long text {{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "more",
        ),
        ("{{ 'a' * 10000000000 }}", TOO_LONG),
        ("{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", TOO_LONG),
        ("{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "more"),
        ("{{ messages | tojson(indent=100000000) }}", "indents by more than 99"),
        ("{{ ('a\n' * 1000000) | indent(99) }}", TOO_LONG),
        ("{{ 'a' | indent(1000000000, true) }}", "indents by more than 99"),
        ("{{ ('a\r' * 1000000) | indent(99) }}", TOO_LONG),
        ("{{ '%999999999s' % 'a' }}", "not formatted"),
        ("{{ '{:999999999}'.format('a') }}", "unsafe"),
        ("{{ 'a'.ljust(999999999) }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "no name"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set s = 'a-' * 1900000 %}{% for i in range(12) %}{% set q = s | title %}{% endfor %}", TOO_MANY_STEPS),
        ("{% set s = '<b>' * 1000000 %}{% for i in range(9) %}{% set q = s | striptags %}{% endfor %}", TOO_MANY_STEPS),
        ("{% set s = range(90000) | list %}{% for i in range(9) %}{% set q = s | sort %}{% endfor %}", TOO_MANY_STEPS),
        ("{{ ('a' * 1900000).lstrip('c' * 1900000 ~ 'a') }}", TOO_MANY_STEPS),
        ("{{ ('a' * 1900000) | trim('c' * 1900000 ~ 'a') }}", TOO_MANY_STEPS),
        ("{{ ('a' * 2000000).rfind('a' * 20000 ~ 'b' ~ 'a' * 20000) }}", TOO_MANY_STEPS),
        ("{{ ('a' * 1000000).rsplit(sep='a' * 10000 ~ 'b') }}", TOO_MANY_STEPS),
        ("a" * (MOST_CHARACTERS + 1), TOO_LONG),
        ("{% include 'other' %}", "^macros, blocks, includes and recursive loops are refused; only a chat template"),
        ("{{ " + "(" * 5000 + "a" + ")" * 5000 + " }}", "nested too deeply"),
        ("{{ raise_exception('no system turn') }}", "no system turn"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_chat_template_that_runs_away_is_refused_within_a_second(source: str, message: str) -> None:
    started = time.process_time()
    with pytest.raises(TemplateError, match=message):
        render_chat_template(source, {"messages": MESSAGES})
    assert time.process_time() - started < 1


def test_an_answer_marked_for_training_renders_as_it_is() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert render_chat_template(source, {"messages": MESSAGES[2:]}) == "This.And that?"
