"""What a mistyped override was probably meant to be."""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml
from hydra import compose
from omegaconf import DictConfig, OmegaConf

from fedlora.core import renamed

QUOTING = (
    "a value with spaces, commas or signs that Hydra reads goes in quotes of its own inside those "
    "of the shell: \"key='a, b'\""
)
NO_GROUPS = ("hydra", "study")
"""Folders of conf/ that are no groups of a run."""
MOST = 4
"""Suggestions shown."""


def sentence(error: Exception, overrides: Sequence[str], conf: Path) -> str:
    """Hydra's error on one line, with the given value, the allowed ones, and what was meant.

    To be called where Hydra is initialized.

    Args:
        error: of Hydra or OmegaConf.
        overrides: as given.
        conf: the folder of configuration.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [s for s in lines if not s.startswith(("full_key", "object_type", "Set the env"))]
    text = " ".join(lines).partition(" Config search path:")[0].partition(" To append to your")[0]
    groups = sorted(p.name for p in conf.iterdir() if p.is_dir() and p.name not in NO_GROUPS)
    text = text.partition(" See https:")[0].rstrip(".")
    hint, allowed = "", f"groups: {', '.join(groups)}"
    if type(error).__name__ == "OverrideParseException":
        hint = f". To quote: {QUOTING}"
    if unknown := re.search(r"Could not override '((?:([\w.]+)\.)?\w+)'", text):
        cfg = compose("config")
        node = OmegaConf.select(cfg, unknown[2]) if unknown[2] else None
        if isinstance(node, DictConfig):
            allowed = f"{unknown[2]} has: {', '.join(sorted(str(k) for k in node))}"
        hint = meant(unknown[1], cfg, conf)
    now = renamed.answer(word.lstrip("+~").partition("=")[0] for word in overrides)
    return f"{text}{hint} (overrides: {' '.join(overrides) or 'none'}; {allowed}){now}"


def meant(key: str, cfg: DictConfig, conf: Path) -> str:
    """``. Did you mean client.lr?`` for a key that does not exist; empty if nothing is like it.

    Args:
        key: dotted, as given.
        cfg: the default configuration.
        conf: the folder of configuration, for keys of groups that the default does not choose.
    """
    known, leaf = [k for k in _keys(cfg) if k != key], key.rpartition(".")[2]
    elsewhere = dict(_other_choices(conf))
    found = [k for k in known if k.rpartition(".")[2] == leaf]
    if not found and leaf in elsewhere:
        return f". Did you mean {elsewhere[leaf]}?"
    if not found:
        found = get_close_matches(key, known, MOST, cutoff=0.8)
    if not found:
        near = get_close_matches(leaf, {k.rpartition(".")[2] for k in known}, MOST, cutoff=0.75)
        found = [k for k in known if k.rpartition(".")[2] in near]
    found = sorted(found, key=lambda k: k.count("."))[:MOST]
    return f". Did you mean {' or '.join(found)}?" if found else ""


def _keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a configuration, interpolations not followed."""
    for key in cfg:
        name = str(key)
        if name.startswith("_"):
            continue
        yield prefix + name
        node = cfg._get_node(name)
        if isinstance(node, DictConfig) and not (node._is_none() or node._is_interpolation()):
            yield from _keys(node, f"{prefix}{name}.")


def _other_choices(conf: Path) -> Iterator[tuple[str, str]]:
    """Keys of all choices of all groups, each with where it belongs."""
    for file in sorted(conf.glob("*/**/*.yaml")):
        group = file.parent.relative_to(conf)
        if group.parts[0] in ("experiment", *NO_GROUPS):
            continue
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        for key in content:
            if str(key)[:1] not in "_@" and key != "defaults":
                yield key, f"{'.'.join(group.parts)}.{key}, of {group.as_posix()}={file.stem}"
