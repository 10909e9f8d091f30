"""Composition by Hydra: two strings become the resolved configuration of one run.

Flower's run config holds scalars only, so it holds ``experiment`` (a file of conf/experiment) and
``overrides`` (Hydra's grammar in one string). `simulations.run` composes the same way.
"""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fedlora.core import renamed, variables
from fedlora.core.errors import ConfigError
from fedlora.run.source_hash import ROOT

CONF = ROOT / "conf"


def split_overrides(experiment: str, overrides: str) -> list[str]:
    """The two strings of Flower's run config as Hydra overrides.

    ``overrides`` is split into words as a shell would: a quote that Hydra is to see needs another
    kind of quote around its word.

    Raises:
        ConfigError: for an unbalanced quote.
    """
    try:
        words = shlex.split(overrides)
    except ValueError as error:
        raise ConfigError(f"overrides={overrides!r}: {error}") from error
    return [f"experiment={experiment}", *words] if experiment else words


def load(overrides: Sequence[str]) -> DictConfig:
    """The whole configuration with every interpolation still in place.

    ``name`` is set to ``<strategy>-<ranks>-<data>-<model>-s<seed>`` where it is empty.

    Raises:
        ConfigError: one sentence for a misspelt or renamed group, option, key or value.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", overrides=list(overrides), return_hydra_config=True)
        choices = cfg.hydra.runtime.choices
        with open_dict(cfg):
            cfg.pop("hydra")
            if not cfg.name:
                parts = [choices[g] for g in ("strategy", "ranks", "data", "model")]
                cfg.name = "-".join([*parts, f"s{cfg.seed}"])
            _anchor(cfg)
            _train_answers(cfg, overrides)
        OmegaConf.to_container(cfg, resolve=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_sentence(error, overrides)) from error
    assert isinstance(cfg, DictConfig)
    return cfg


def _sentence(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's error on one line, with the given value and the allowed ones."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [s for s in lines if not s.startswith(("full_key", "object_type", "Set the env"))]
    text = " ".join(lines).partition(" Config search path:")[0].partition(" To append to your")[0]
    groups = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name != "hydra")
    allowed = f"groups: {', '.join(groups)}"
    if unknown := re.search(r"Could not override '(?:([\w.]+)\.)?\w+'", text):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            node = OmegaConf.select(compose("config"), unknown[1]) if unknown[1] else None
        if isinstance(node, DictConfig):
            allowed = f"{unknown[1]} has: {', '.join(sorted(str(k) for k in node))}"
    now = renamed.answer(word.lstrip("+~").partition("=")[0] for word in overrides)
    return f"{text} (overrides: {' '.join(overrides) or 'none'}; {allowed}){now}"


def _anchor(cfg: DictConfig) -> None:
    """Make paths of files absolute: the server and its workers run in other directories.

    What neither exists, nor is a pattern, nor ends like a data file may be a hub id and stays.
    """
    from fedlora.data.files import COMPRESSED, SUFFIXES

    endings = (*SUFFIXES, *COMPRESSED, ".zip")
    for group in ("data", "model", "model.base"):
        node = OmegaConf.select(cfg, group)
        path = node.get("path") if isinstance(node, DictConfig) else None
        if not isinstance(path, str) or not path:
            continue
        file_like = any(c in path for c in "*?[") or path.endswith(endings)
        if absolute(path).exists() or (group == "data" and file_like):
            node.path = str(absolute(path))
    template = cfg.data.get("template")
    if isinstance(template, str) and absolute(template).is_file():
        cfg.data.template = str(absolute(template))


def _train_answers(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Set the loss of a chat template: it is that of answers, whatever the default is.

    Raises:
        ConfigError: if the user asks for another one.
    """
    from fedlora.data.template import is_chat

    template = cfg.data.get("template")
    if not isinstance(template, str) or not is_chat(template) or cfg.client.loss == "response":
        return
    if any(word.lstrip("+").startswith("client.loss=") for word in overrides):
        raise ConfigError(
            f"client.loss={cfg.client.loss} with data.template={template}: a chat template has its "
            "loss on answers only; leave client.loss out, or use data.template=ours"
        )
    cfg.client.loss = "response"


def absolute(path: str) -> Path:
    """A user's path, ``~`` expanded, made absolute against the directory the user works in.

    The launcher runs Flower in a neutral directory and names the user's in ``FEDLORA_CWD``.
    """
    base = Path(os.environ.get(variables.CWD) or Path.cwd())
    return Path(os.path.abspath(base / Path(path).expanduser()))
