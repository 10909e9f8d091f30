"""Tests how many clients' sequences can be given to a model: end to end, one per row, or apart."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from fedlora.core.memo import remembered
from fedlora.core.seeding import torch_generator
from fedlora.models.language_model import LanguageModel
from fedlora.models.layers import AdaptedLinear
from fedlora.models.ragged import Geometry, RaggedAttention, is_exchangeable, ragged
from fedlora.models.two_parts import RaggedClassifier, Sample

LENGTHS = (5, 2, 9, 1, 8)
"""Two of similar length share a stack of attention, where the shorter one has a pad."""
WINDOW_TRIED = 512
"""A sequence longer than the model's attention window is tried if the window is at most this."""


def why_not_ragged(model: LanguageModel) -> str:
    """The reason in a few words, or an empty text if ragged sequences give the right logits.

    A few random sequences end to end are compared with each of them alone, through the model's own
    attention. When every other sequence is replaced, the logits of the rest must not change.
    """
    network = model.network
    name = type(network).__name__
    if not is_exchangeable(network):
        return f"{name} has built-in attention"
    sequences = _sequences(model)
    try:
        with torch.no_grad():
            wanted = torch.cat([_alone(model, s) for s in sequences])
            attention = RaggedAttention()
            found = _ragged_logits(model, sequences, attention)
            beside_others = _ragged_logits(model, _every_other_changed(model, sequences), attention)
    except Exception as error:
        return f"{name} does not run ragged ({type(error).__name__}: {error})"
    if not attention.calls:
        return f"{name} has built-in attention"
    limit = _unseen_limit(model, attention.windowed)
    if limit:
        return f"{name} limits its attention to {limit} tokens by a mask only"

    # The right logits? Half precision rounds differently in another shape, hardly in the same one.
    full = network.dtype in (torch.float32, torch.float64)
    most = max(1.0, float(wanted.abs().max()))
    gap = float((found - wanted).abs().max())
    if not gap <= (1e-4 if full else 2**-4) * most:
        return f"{name} gives other logits when ragged (by {gap:.1e})"

    # The same logits beside other sequences?
    sizes = [1 if model.info.classifies else len(s) for s in sequences]
    kept = torch.cat([torch.full((n,), i % 2 == 1) for i, n in enumerate(sizes)])
    seen = float((found - beside_others)[kept.to(model.device)].abs().max())
    if not seen <= (1e-4 if full else 2**-8) * most:
        return f"{name} lets ragged sequences see one another (logits change by {seen:.1e})"
    return ""


def why_not_fused(model: LanguageModel) -> str:
    """The reason in a few words why clients cannot share forward passes, or an empty text.

    An adapted layer must be given each token once, or it cannot be told whose a row is: DeBERTa's
    layers of queries and keys are also given its relative positions.
    """
    sequences = _sequences(model)[:2]
    batch = model.collate([Sample.of(s) for s in sequences], "full").to(model.device)
    wrong: list[str] = []

    def look(path: str, x: Tensor) -> None:
        if x.numel() != batch.inputs.numel() * x.shape[-1]:
            wrong.append(path)

    handles = [
        layer.register_forward_pre_hook(lambda _, args, path=path: look(path, args[0]))
        for path, layer in model.layers.items()
    ]
    try:
        with torch.no_grad():
            model.logits(batch)
    finally:
        for handle in handles:
            handle.remove()
    name = type(model.network).__name__
    return f"{name} gives {wrong[0]} more than the tokens" if wrong else ""


def readers_of_all(model: LanguageModel) -> tuple[AdaptedLinear, ...]:
    """The adapted layers of a classifier's last block that read all tokens, where the rest of it is
    computed for pooled rows alone; none if the block is of another kind, or its weights are
    quantised."""
    if not is_exchangeable(model.network):
        return ()
    try:
        last = RaggedClassifier(model).last
    except Exception:  # of the architecture's own code: why_not_ragged says which
        return ()
    found = () if last is None else last.readers
    return tuple(layer for layer in found if layer.weight.is_floating_point())


def reason_of(check: Callable[[LanguageModel], str], model: LanguageModel) -> str:
    """The answer of `why_not_fused` or `why_not_ragged`.

    It takes up to ten forward passes, and every worker of a run asks it. It is remembered
    (`fedlora.core.memo`) for a language model of transformers that was loaded from a folder: its
    fingerprint and its configuration then say what it is. A classifier's head may be drawn.
    """
    network, info = model.network, model.info
    theirs = type(network).__module__.startswith("transformers.")
    if model.folder is None or info.classifies or not theirs:
        return check(model)
    config: Any = network.config
    question = {
        "check": check.__name__,
        "model": info.to_json(),
        "network": [type(network).__name__, str(getattr(config, "quantization_config", ""))],
        "attention": str(getattr(config, "_attn_implementation", "")),
        "dtype": str(network.dtype),
        "device": model.device.type,
    }
    return str(remembered("fused", question, lambda: {"reason": check(model)})["reason"])


def _every_other_changed(model: LanguageModel, sequences: Sequence[Tensor]) -> list[Tensor]:
    """The same, but with another token in every place of the first, the third and so on."""
    return [s if i % 2 else (s + 1) % model.vocabulary for i, s in enumerate(sequences)]


def _sequences(model: LanguageModel) -> list[Tensor]:
    config = model.network.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    beyond = [window + 3, window + 2] if 0 < window <= WINDOW_TRIED else []
    lengths = [*LENGTHS, *beyond]
    random = torch_generator(0, "ragged check")
    return [
        torch.randint(0, model.vocabulary, (min(n, model.info.context),), generator=random).to(
            model.device
        )
        for n in lengths
    ]


def _unseen_limit(model: LanguageModel, windowed: bool) -> int:
    """The number of tokens that some layers attend to, if it is less than the context, was not
    tested and is not passed to their attention function; 0 without such layers."""
    config, context = model.network.config.get_text_config(), model.info.context
    kinds = getattr(config, "layer_types", None)
    window = 0 if windowed else getattr(config, "sliding_window", None) or 0
    if WINDOW_TRIED < window < context and (not kinds or "sliding_attention" in kinds):
        return int(window)
    chunk = getattr(config, "attention_chunk_size", None) or 0
    return int(chunk) if 0 < chunk < context and "chunked_attention" in (kinds or ()) else 0


def _alone(model: LanguageModel, ids: Tensor) -> Tensor:
    """Logits of one sequence ``[t]`` through the model's own attention: ``[t, vocabulary]``, or
    ``[1, classes]``."""
    if model.info.classifies:
        return model.logits(model.collate([Sample.of(ids)], "full").to(model.device))
    logits: Tensor = model.network(input_ids=ids[None], use_cache=False).logits
    return logits[0]


def _ragged_logits(
    model: LanguageModel, sequences: Sequence[Tensor], attention: RaggedAttention
) -> Tensor:
    """The same of all sequences, end to end: ``[N, vocabulary]``, or ``[S, classes]``."""
    lengths = [len(s) for s in sequences]
    rows = RaggedClassifier(model) if model.info.classifies else None
    with ExitStack() as stack:
        stack.enter_context(ragged(model.network, attention))
        attention.geometry = Geometry.of(lengths).to(model.device)
        if rows is not None:
            if rows.last is not None:
                stack.enter_context(rows.last.narrowed(attention))
            return rows.logits(rows.batch([Sample.of(s) for s in sequences]).to(model.device))
        places = torch.cat([torch.arange(n, device=model.device) for n in lengths])
        ids = torch.cat(list(sequences))
        logits: Tensor = model.network(
            input_ids=ids[None], position_ids=places[None], use_cache=False
        ).logits
        return logits[0]
