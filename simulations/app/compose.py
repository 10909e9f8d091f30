"""Composition by Hydra: two strings become the resolved configuration of one run.

Flower's run config holds scalars only, so it holds ``experiment`` (a file of conf/experiment) and
``overrides`` (Hydra's grammar in one string). `simulations.run` composes the same way.
"""

import shlex
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fedlora.core.errors import ConfigError
from fedlora.core.package import ROOT
from simulations.app.hints import QUOTING, sentence
from simulations.app.naming import run_name
from simulations.app.words import absolute, readable, with_search_path

CONF = ROOT / "conf"
REFUSALS = (HydraException, OmegaConfBaseException)
"""What Hydra raises for a configuration that cannot be composed."""
_ALONE = threading.RLock()
"""Hydra's state is one for the whole process: one thread at a time composes."""


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
        raise ConfigError(f"overrides={overrides!r}: {error}; {QUOTING}") from error
    return [f"experiment={experiment}", *words] if experiment else words


def load(overrides: Sequence[str]) -> DictConfig:
    """The whole configuration with every interpolation still in place.

    ``name`` is set where it is empty (`simulations.app.naming`).

    Raises:
        ConfigError: one sentence for a misspelt or renamed group, option, key or value.
    """
    return load_chosen(overrides)[0]


def load_chosen(overrides: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
    """`load`, and the chosen file of each group as Hydra names both; None where there is none.

    Raises:
        ConfigError: as `load`.
    """
    words = readable(with_search_path(overrides))
    with _hydra():
        try:
            cfg = compose("config", overrides=words, return_hydra_config=True)
            choices = cfg.hydra.runtime.choices
            with open_dict(cfg):
                cfg.pop("hydra")
                if not cfg.name:
                    cfg.name = run_name(cfg, choices, words)
                _anchor(cfg)
            OmegaConf.to_container(cfg, resolve=True)
        except (*REFUSALS, ValueError) as error:
            raise ConfigError(sentence(error, overrides, CONF)) from error
    assert isinstance(cfg, DictConfig)
    _train_answers(cfg, words)
    return cfg, dict(choices)


def refused(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """What Hydra's own program refuses (`REFUSALS`), said as `load` says it."""
    with _hydra():
        return ConfigError(sentence(error, overrides, CONF))


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra initialized on conf/, whatever it was before, and no other thread's."""
    with _ALONE:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield


def _anchor(cfg: DictConfig) -> None:
    """Make paths of files absolute: the server and its workers run in other directories.

    What neither exists, nor is a pattern, nor ends like a data file may be a hub id and stays.
    """
    from fedlora.data.suffixes import COMPRESSED, SUFFIXES

    endings = (*SUFFIXES, *COMPRESSED, ".zip")
    for group in ("data", "model", "model.base"):
        node = OmegaConf.select(cfg, group)
        path = node.get("path") if isinstance(node, DictConfig) else None
        if not isinstance(path, str) or not path:
            continue
        file_like = any(c in path for c in "*?[") or path.endswith(endings)
        if absolute(path).exists() or (group == "data" and file_like):
            node.path = str(absolute(path))
    for key in ("table", "trace"):
        file = OmegaConf.select(cfg, f"devices.{key}")
        if isinstance(file, str) and file:
            cfg.devices[key] = str(absolute(file))
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
