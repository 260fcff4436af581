"""README and docs/ as tests read them: pages, their headings, links, blocks of code and commands."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```[ \t]*$", re.DOTALL | re.MULTILINE
)
INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<target>[^()\s]+)(?:\s+\"[^\"]*\")?\)")
HEADING = re.compile(r"^#{1,6} +(?P<text>.+?)(?: +#+)?$", re.MULTILINE)
TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced block of code: its language, its file name where it has one, its text."""

    language: str
    title: str | None
    text: str


def blocks(page: str) -> list[Block]:
    """List the fenced blocks of a page in order."""
    found = []
    for fence in FENCE.finditer(page):
        info = fence["info"].strip()
        title = TITLE.search(info)
        found.append(Block(info.split(" ")[0], title[1] if title else None, fence["text"]))
    return found


def prose(page: str) -> str:
    """The page without fenced blocks."""
    return FENCE.sub("", page)


def links(page: str) -> list[str]:
    """Targets of links and images, those in code left out."""
    return [link["target"] for link in LINK.finditer(INLINE_CODE.sub("", prose(page)))]


def anchors(page: str) -> set[str]:
    """Anchors of the headings, where GitHub and mkdocs make the same of them."""
    return _numbered(page, _github_slug) & _numbered(page, _mkdocs_slug)


def _numbered(page: str, slug: object) -> set[str]:
    assert callable(slug)
    seen: Counter[str] = Counter()
    found = set()
    for heading in HEADING.finditer(prose(page)):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading["text"]).replace("`", "").replace("*", "")
        name = slug(text)
        # A second heading of the same words gets another anchor, and each of both its own; link to neither.
        seen[name] += 1
        found.add(name)
    return {name for name in found if seen[name] == 1}


def _github_slug(text: str) -> str:
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def _mkdocs_slug(text: str) -> str:
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_text).strip().lower())


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command in a block of shell lines: continued lines joined, comments left out."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        words = _words(line.removeprefix("$ "))
        while words:
            end = next((i for i, word in enumerate(words) if word in ("|", "&&", ";")), len(words))
            if words[:end]:
                yield words[:end]
            words = words[end + 1 :]


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    lexer.commenters = ""
    try:
        words = list(lexer)
    except ValueError:
        return []
    comment = next((i for i, word in enumerate(words) if word.startswith("#")), len(words))
    return words[:comment]
