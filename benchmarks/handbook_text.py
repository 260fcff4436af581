"""English text under a stated free licence, for measuring what a model forgets: the Debian Administrator's Handbook.

The book is by Raphaël Hertzog and Roland Mas, under CC-BY-SA-3.0 or GPL-2.0-or-later. Debian's package
`debian-handbook` (11.20220922) holds it as HTML pages; this script writes its paragraphs as plain text, in the order of
the pages. The text itself is not part of this project.

    dpkg -x debian-handbook_11.20220922_all.deb book
    python -m benchmarks.handbook_text book/usr/share/doc/debian-handbook/html/en-US handbook.txt
    manyicl compare recipes/compare/real.yaml --set compare.forgetting.text=handbook.txt ...
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

XHTML = "{http://www.w3.org/1999/xhtml}"


def pages(folder: Path) -> Iterator[ElementTree.Element]:
    """Yield the pages, each followed by the one that it names as its next, the foreword first."""
    name: str | None = "foreword.html"
    while name is not None:
        page = ElementTree.parse(folder / name).getroot()
        yield page
        name = next((link.get("href") for link in page.iter(f"{XHTML}link") if link.get("rel") == "next"), None)


def paragraphs(page: ElementTree.Element) -> Iterator[str]:
    """Yield the text of each paragraph that holds no other one, with single spaces."""
    for part in page.iter(f"{XHTML}div"):
        if part.get("class") != "para" or any(
            inner.get("class") for inner in part.iter(f"{XHTML}div") if inner is not part
        ):
            continue
        if text := " ".join("".join(part.itertext()).split()):
            yield text


def main(folder: str, output: str) -> None:
    """Write the text, and print its size and hash."""
    text = "\n\n".join(paragraph for page in pages(Path(folder)) for paragraph in paragraphs(page)) + "\n"
    Path(output).write_text(text, encoding="utf-8")
    print(f"{output}: {len(text):,} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
