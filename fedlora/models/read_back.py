"""Exported files are read back by the program that they are for, before they are used.

The program computes the logits of a small text from the exported folder, and they are compared with
our own for the same payload. What cannot be checked is said, never passed over.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from fedlora.core.errors import ModelError
from fedlora.core.payload import Payload
from fedlora.models.spec import ModelSpec

RELATIVE, ROUNDING = 1e-3, 1e-5
"""The tolerance, as a part of the payload's own effect and of the largest logit (float32)."""
TEXT = "The state of the union is read by two programs, which have to agree on every word of it."
TOKENS = 32
_REMEDY = "fedlora merge writes a plain model instead, which every program reads alike"
_ROOM = 2.0  # memory of a float32 model with its activations, as a multiple of its weights


@dataclass(frozen=True)
class ReadBack:
    """What came of it."""

    reader: str
    """The program, with its version."""
    checked: bool = False
    """Whether the program has been asked."""
    agrees: bool = False
    """Whether the largest difference of two logits was within the tolerance."""
    gap: float = math.nan
    """That difference."""
    effect: float = math.nan
    """The largest difference that the payload makes to the base's logits."""
    note: str = ""
    """Why it was not checked, or does not agree; empty: it agrees."""

    def record(self) -> dict[str, Any]:
        """JSON values."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v == v}

    def sentence(self) -> str:
        """For a person."""
        if self.agrees:
            return (
                f"{self.reader} computes the same from this folder: the largest difference of two "
                f"logits is {self.gap:.1e}, where the update changes them by up to "
                f"{self.effect:.1e}."
            )
        kind = "does not compute the same from it" if self.checked else "was not checked on it"
        return f"{self.reader} {kind}: {self.note}. {_REMEDY}"


def read_back(payload: Payload, folder: Path, spec: ModelSpec) -> ReadBack | None:
    """Compare our logits with those of the program that an exported folder is for.

    One copy of the base is in memory at a time, on the CPU in float32.

    Args:
        payload: that was exported.
        folder: to which it was.
        spec: of its base.

    Returns:
        None: no other program reads such a folder.
    """
    reader = payload.reader(folder)
    if reader is None:
        return None
    if why := _cannot(spec):
        return ReadBack(reader, note=why)
    spec = dataclasses.replace(spec, dtype="float32")
    model = spec.load(torch.device("cpu"))
    ids = _batch(model.tokenizer, min(TOKENS, model.info.context))
    with torch.no_grad():
        bare = model.network(input_ids=ids).logits
        model.mount(payload)
        ours = model.network(input_ids=ids).logits
    del model
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            theirs = payload.read_elsewhere(folder, spec.network(torch.device("cpu")))(
                input_ids=ids
            ).logits
    except ModelError as error:
        return ReadBack(reader, checked=True, note=str(error))
    except Exception as error:  # whatever the other program raises is its answer
        first = next(iter(str(error).strip().splitlines()), "").rstrip(".")
        why = f"it refuses the folder ({type(error).__name__}: {first})"
        return ReadBack(reader, checked=True, note=why)
    return _compare(reader, bare, ours, theirs)


def _compare(reader: str, bare: Tensor, ours: Tensor, theirs: Tensor) -> ReadBack:
    """``[rows, tokens, vocabulary]`` each."""
    gap, effect = (float((ours - other).abs().max()) for other in (theirs, bare))
    allowed = RELATIVE * effect + ROUNDING * float(ours.abs().max())
    if gap <= allowed:
        return ReadBack(reader, True, True, gap, effect)
    note = (
        f"logits of a small text differ by {gap:.1e}, where {allowed:.1e} is allowed and the "
        f"update changes them by {effect:.1e}"
    )
    return ReadBack(reader, True, False, gap, effect, note)


def _cannot(spec: ModelSpec) -> str:
    """Why this base cannot be loaded for the comparison; empty: it can."""
    quantization = getattr(spec, "quantization", "none")
    if quantization != "none":
        return f"the base is quantised (model.quantization={quantization})"
    needed = _ROOM * 4 * spec.describe().parameters
    free = psutil.virtual_memory().available
    if needed > free:
        return (
            f"the base needs about {needed / 2**30:.1f} GiB in float32, and {free / 2**30:.1f} GiB "
            "are free"
        )
    return ""


def _batch(tokenizer: Any, length: int) -> Tensor:
    """A text, and its tokens in the reverse order: ``[2, tokens]``."""
    ids = torch.tensor(tokenizer(TEXT)["input_ids"][:length])
    return torch.stack([ids, ids.flip(0)])
