"""What loading a model from its files takes: the import of transformers, its bars, its errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlora.core.errors import ModelError


def unloadable(what: str, folder: Path, error: Exception) -> str:
    """A library's error on one line, with what was being loaded."""
    said = " ".join(str(error).split())[:600] or type(error).__name__
    return f"{what} in {folder} cannot be loaded: {said}"


def check_finite(network: Any, folder: Path) -> None:
    """Raise a ModelError unless all weights are finite: the sum of a tensor is not if one is not.

    Reads all weights once, as the first forward pass would.
    """
    broken = [
        name
        for name, weight in network.named_parameters()
        if weight.is_floating_point() and not weight.detach().sum().isfinite()
    ]
    if broken:
        raise ModelError(
            f"the weights in {folder} hold NaN or infinity in {broken[:4]} ({len(broken)} "
            "tensors): the model is broken, or was converted to too narrow a number format"
        )


def import_transformers() -> None:
    """Import now what describing and loading a model needs: two seconds on an idle core."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.modeling_utils import PreTrainedModel  # noqa: F401


@contextmanager
def no_progress_bar(warnings: bool = True) -> Iterator[None]:
    """Keep transformers' bars out of the log of a worker that loads in a blink.

    Args:
        warnings: whether to leave it its warnings.
    """
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if not warnings:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
