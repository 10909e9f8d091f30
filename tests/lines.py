"""How large the repository is: lines, comments and longest functions by room.

    python -m tests.lines [FOLDER]

Counted are the files that git tracks. The size of the code is every line, blank ones too, of the
Python files outside ``tests`` and of the script in ``.ci``: 31,136 at version 0.1 (652e757), where
25,000 is the goal. Results of benchmarks are JSON and count nowhere.
"""

import argparse
import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

GOAL = 25_000
TOGETHER = ("fedlora", "simulations", "tests")
"""Folders whose subfolders are rooms of their own."""
TEXT = (".yaml", ".toml", ".md")


@dataclass(frozen=True)
class Source:
    """A Python file."""

    path: Path
    lines: int
    comments: int
    """Lines that hold a comment and nothing else."""
    functions: tuple[tuple[int, str], ...]
    """Lines of each function, decorators left out, and where it is."""

    @property
    def room(self) -> str:
        """``fedlora/core``, ``strategies``, ..."""
        parts = self.path.parts[:-1]
        return "/".join(parts[: 2 if parts and parts[0] in TOGETHER else 1]) or "."


def tracked(root: Path) -> list[Path]:
    """Files that git tracks, relative to the root, as far as they are there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True)
    names = listed.stdout.decode().split("\0")
    return [Path(name) for name in names if name and (root / name).is_file()]


def read(root: Path, path: Path) -> Source:
    """One Python file."""
    text = (root / path).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = sum(t.type == tokenize.COMMENT and not t.line[: t.start[1]].strip() for t in tokens)
    functions = tuple(
        ((node.end_lineno or node.lineno) - node.lineno + 1, f"{path}:{node.lineno} {node.name}")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return Source(path, text.count("\n"), comments, functions)


def count(root: Path, path: Path) -> int:
    """Line breaks of a text file."""
    return (root / path).read_bytes().count(b"\n")


def table(sources: Sequence[Source]) -> Iterator[str]:
    """A row for each room."""
    yield f"{'room':28}{'files':>6}{'lines':>8}{'comments/1,000':>16}{'longest function':>18}"
    for room in sorted({s.room for s in sources}):
        held = [s for s in sources if s.room == room]
        lines, comments = sum(s.lines for s in held), sum(s.comments for s in held)
        longest = max((size for s in held for size, _ in s.functions), default=0)
        often = 1000 * comments / max(1, lines)
        yield f"{room:28}{len(held):6}{lines:8,}{often:16.1f}{longest:18}"


def report(root: Path, longest: int = 10) -> Iterator[str]:
    """All lines of the report."""
    paths = tracked(root)
    sources = [read(root, p) for p in paths if p.suffix == ".py"]
    code = [s for s in sources if s.path.parts[0] != "tests"]
    yield from table(sources)
    yield f"\nLongest functions outside tests (of {sum(len(s.functions) for s in code):,}):"
    for size, where in sorted((f for s in code for f in s.functions), reverse=True)[:longest]:
        yield f"{size:6}  {where}"
    scripts = sum(count(root, p) for p in paths if p.parts[0] == ".ci")
    total = sum(s.lines for s in code) + scripts
    comments = 1000 * sum(s.comments for s in code) / max(1, total)
    yield f"\nCode outside tests (.py, and {scripts} lines of .ci): {total:,} lines of {GOAL:,}"
    yield f"Own-line comments outside tests: {comments:.1f} per 1,000 lines"
    outside = [p for p in paths if p.parts[0] != "tests" and "results" not in p.parts]
    for suffix in TEXT:
        yield f"{suffix}: {sum(count(root, p) for p in outside if p.suffix == suffix):,} lines"
    yield f"Makefile: {count(root, Path('Makefile')):,} lines"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report of a checkout."""
    parser = argparse.ArgumentParser(prog="python -m tests.lines", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parents[1])
    for line in report(parser.parse_args(arguments).folder):
        sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
