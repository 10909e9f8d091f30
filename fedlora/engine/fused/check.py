"""Whether a model computes the same for sequences laid end to end: tried out, not assumed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.models.language_model import LanguageModel
from fedlora.models.ragged import Geometry, RaggedAttention, ragged
from fedlora.seeding import torch_generator

LENGTHS = (5, 2, 9, 1)
WINDOW_TRIED = 512
"""A sequence longer than the model's attention window is tried if that is not longer than this."""


def why_not_ragged(model: LanguageModel) -> str:
    """The reason in a few words, or an empty text if ragged sequences give the right logits.

    Four random sequences end to end are compared with each of them alone, through the model's own
    attention.
    """
    network = model.network
    name = type(network).__name__
    sequences = _sequences(model)
    try:
        with torch.no_grad():
            wanted = torch.cat([_logits(model, s[None]) for s in sequences], dim=1)
            found, calls = _ragged_logits(model, sequences)
    except Exception as error:
        return f"{name} does not run ragged ({type(error).__name__}: {error})"
    if not calls:
        return f"{name} attends in a way of its own"
    # Half precision rounds differently in another shape; attention across sequences is far off.
    relative = 1e-4 if network.dtype in (torch.float32, torch.float64) else 2**-4
    gap = float((found - wanted).abs().max())
    allowed = relative * max(1.0, float(wanted.abs().max()))
    return "" if gap <= allowed else f"{name} gives other logits when ragged (by {gap:.1e})"


def _sequences(model: LanguageModel) -> list[Tensor]:
    config = model.network.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    lengths = [*LENGTHS, window + 3] if 0 < window <= WINDOW_TRIED else LENGTHS
    random = torch_generator(0, "ragged check")
    return [
        torch.randint(0, config.vocab_size, (min(n, model.info.context),), generator=random).to(
            model.device
        )
        for n in lengths
    ]


def _ragged_logits(model: LanguageModel, sequences: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Logits ``[1, N, vocabulary]`` and how often the ragged attention was asked."""
    lengths = [len(s) for s in sequences]
    attention = RaggedAttention()
    with ragged(model.network, attention):
        attention.geometry = Geometry.of(lengths).to(model.device)
        places = torch.cat([torch.arange(n, device=model.device) for n in lengths])
        return _logits(model, torch.cat(list(sequences))[None], places[None]), attention.calls


def _logits(model: LanguageModel, ids: Tensor, places: Tensor | None = None) -> Tensor:
    more = {} if places is None else {"position_ids": places}
    logits: Tensor = model.network(input_ids=ids, use_cache=False, **more).logits
    return logits
