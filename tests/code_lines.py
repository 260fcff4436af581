"""Count the lines of code below a folder; docstrings, comments and blank lines are not counted.

python tests/code_lines.py [FOLDER] [--by-file]
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from pathlib import Path

NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def num_code_lines(source: str) -> int:
    """Count the lines that hold a token of code, docstrings left out."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                lines.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def main() -> None:
    """Print the count of each file, if asked for, and the sum."""
    parser = argparse.ArgumentParser(description="Count the lines of code below a folder.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent.parent / "src")
    parser.add_argument("--by-file", action="store_true")
    arguments = parser.parse_args()
    counts = {path: num_code_lines(path.read_text("utf-8")) for path in sorted(arguments.folder.rglob("*.py"))}
    if arguments.by_file:
        for path, count in sorted(counts.items(), key=lambda item: item[1]):
            print(f"{count:7,}  {path.relative_to(arguments.folder)}")
    print(f"{sum(counts.values()):7,}  code lines in {len(counts)} files")


if __name__ == "__main__":
    main()
