"""The words of a command line: overrides as people type them, and what Hydra reads.

Hydra's grammar knows values of plain ASCII letters and a few signs; a path with ``~``, ``=``,
``#``, a bracket or an accent must be quoted for it, inside the quotes of the shell. Here such
values are quoted for the user. Lists, dictionaries, functions and values that are quoted already
stay as they are.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from fedlora.core import variables
from fedlora.core.errors import ConfigError

SEARCH_PATH = "hydra.searchpath"
"""Hydra's key for further folders of configuration."""
CONFIG_DIR = ("--config-dir", "-cd")
_SCHEME = re.compile(r"(?!file://)\w+://")
_STRUCTURE = re.compile(r"""\s*(['"\[{]|\w+\()""")
"""The begin of a value that has a grammar of its own."""


def readable(words: Sequence[str], *, sweep: bool = False) -> list[str]:
    """Overrides with the values quoted that Hydra could not read.

    Args:
        words: ``key=value`` each; flags and words that Hydra can read are left as they are, and so
            are those that no quoting makes readable.
        sweep: whether commas part the values of a sweep; each is quoted by itself.
    """
    return [word if word.startswith("-") else _readable(word, sweep) for word in words]


def _readable(word: str, sweep: bool) -> str:
    key, equals, value = word.partition("=")
    if not equals or _parses(word) or _STRUCTURE.match(value):
        return word
    parts = value.split(",") if sweep else [value]
    values = [part if sweep and _parses(f"{key}={part}") else quoted(part) for part in parts]
    candidate = f"{key}={','.join(values)}"
    return candidate if _parses(candidate) else word


def _parses(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def quoted(value: str) -> str:
    """A string in Hydra's quotes: backslashes count double before a quote and at the end."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def with_search_path(words: Sequence[str]) -> list[str]:
    """The words with ``--config-dir`` as the override that reaches every process of a run, and with
    absolute paths in it: the server runs in another directory."""
    left, folders = [], []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag in CONFIG_DIR:
            folders.append(value if equals else next(rest, ""))
        elif flag == SEARCH_PATH:
            folders += [part.strip(" '\"") for part in value.strip("[]").split(",")]
        else:
            left.append(word)
    if not folders:
        return left
    paths = [quoted(f if _SCHEME.match(f) else f"file://{_existing(f)}") for f in folders]
    return [*left, f"{SEARCH_PATH}=[{','.join(paths)}]"]


def _existing(folder: str) -> Path:
    """A folder of configuration, absolute.

    Raises:
        ConfigError: if there is none.
    """
    path = absolute(folder.removeprefix("file://"))
    if not folder or not path.is_dir():
        raise ConfigError(
            f"{CONFIG_DIR[0]} {folder!r}: there is no folder {path}; it holds groups such as "
            "strategy/mine.yaml"
        )
    return path


def absolute(path: str) -> Path:
    """A user's path, ``~`` expanded, made absolute against the directory the user works in.

    The launcher runs Flower in a neutral directory and names the user's in ``FEDLORA_CWD``.
    """
    base = Path(os.environ.get(variables.CWD) or Path.cwd())
    return Path(os.path.abspath(base / Path(path).expanduser()))
