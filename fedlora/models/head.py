"""The head of a sequence classifier: what follows the last block of its base model.

It is every module outside the base model (``classifier``, ``score``, ``pre_classifier``, ...), and
the pooler that some families keep inside. What the checkpoint lacks of it is drawn from the run's
seed, so that all workers, methods and machines begin with the same head.
"""

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedlora.core.reading import json_in
from fedlora.core.seeding import torch_generator

FROZEN, AVERAGED, LOCAL = "frozen", "averaged", "local"
"""What becomes of a head (``model.head``)."""
POOLER = "pooler"
"""Name of the module that BERT and its relatives keep inside the base model, after its blocks."""


class HeadTensor(NamedTuple):
    """One parameter of a head."""

    name: str
    """In ``network.named_parameters()``."""
    shape: tuple[int, ...]


def head_modules(network: Any) -> tuple[str, ...]:
    """Paths of the modules that make up the head, in the order of ``named_parameters()``.

    Args:
        network: a ``PreTrainedModel`` for sequence classification, on any device (``meta`` too).
    """
    prefix = network.base_model_prefix
    inside = f"{prefix}.{POOLER}"
    tops = [name.split(".")[0] for name, _ in network.named_parameters()]
    found = [top for top in dict.fromkeys(tops) if top != prefix]
    pooled = any(name.startswith(f"{inside}.") for name, _ in network.named_parameters())
    return (inside, *found) if pooled else tuple(found)


def head_parameters(network: Any) -> dict[str, nn.Parameter]:
    """Name -> parameter of the head, in the order of ``named_parameters()``."""
    paths = tuple(f"{path}." for path in head_modules(network))
    return {n: p for n, p in network.named_parameters() if n.startswith(paths)}


def head_tensors(network: Any) -> tuple[HeadTensor, ...]:
    """The parameters of the head without their values."""
    return tuple(HeadTensor(n, tuple(p.shape)) for n, p in head_parameters(network).items())


def complete_head(
    network: Any, absent: Iterable[str], folder: Path, labels: Sequence[str], seed: int
) -> list[str]:
    """Draw what a checkpoint lacks of the head, and the output layer if it is of other classes.

    Args:
        network: as loaded.
        absent: names of the parameters that the checkpoint lacks.
        folder: of the checkpoint.
        labels: the classes.
        seed: of the draw.

    Returns:
        The names of what is absent outside the head.
    """
    drawn = head_parameters(network).keys() & set(absent)
    if classes_of(folder) not in ((), tuple(labels)):
        drawn |= output_parameters(network)
    draw_head(network, drawn, seed)
    return [name for name in absent if name not in drawn]


def draw_head(network: Any, names: Iterable[str], seed: int) -> None:
    """Set parameters of the head to initial values: weights normal with standard deviation
    ``initializer_range``, scales of norms one, biases zero.

    Each is drawn on the CPU in float32 from ``(seed, "head", name)``, then rounded to its type.
    """
    spread = float(getattr(network.config.get_text_config(), "initializer_range", 0.02))
    head = head_parameters(network)
    with torch.no_grad():
        for name in names:
            head[name].copy_(_initial(name, head[name].shape, spread, seed))


def _initial(name: str, shape: torch.Size, spread: float, seed: int) -> Tensor:
    if len(shape) < 2:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    random = torch_generator(seed, "head", zlib.crc32(name.encode()))
    return spread * torch.randn(shape, generator=random)


def output_parameters(network: Any) -> set[str]:
    """Names of the parameters of the head's last layer, which has one row a class."""
    head = list(head_parameters(network))
    last = head[-1].rpartition(".")[0]
    return {name for name in head if name.rpartition(".")[0] == last}


def classes_of(folder: Path) -> tuple[str, ...]:
    """The class names that a model folder states, in order of their index; empty: it states none,
    or only transformers' ``LABEL_0``, ``LABEL_1``, ..."""
    stated = json_in(folder / "config.json", "the configuration of the base model").get("id2label")
    if not isinstance(stated, dict):
        return ()
    names = tuple(str(stated[key]) for key in sorted(stated, key=int))
    return () if names == tuple(f"LABEL_{i}" for i in range(len(names))) else names
