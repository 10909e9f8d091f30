"""How long a sequence a model can take, and how many token ids it knows, without its weights."""

from typing import Any, NamedTuple

from torch import nn

IF_UNSTATED = 2048
"""Longest sequence of a model that states none: one without positions, or with relative ones."""
_STATED = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
)
"""Names of the longest sequence in configurations of transformers, most common first."""


class Limits(NamedTuple):
    """What sequences of token ids a network can be given."""

    context: int
    """Longest sequence, in tokens."""
    stated: bool
    """Whether the model states it; if not, it is `IF_UNSTATED` and no longer sequence fails."""
    vocabulary: int
    """Rows of the input embedding: ids are below."""


def limits(config: Any, network: nn.Module) -> Limits:
    """The limits of a network.

    The longest sequence is the smaller of what the configuration states and what a table of learned
    positions has rows for. RoBERTa and OPT leave the first rows of theirs unused. Rotary positions
    can be computed beyond what is stated, but the model was not trained there. A sliding window
    limits how far a token looks back, not the sequence.

    Args:
        config: a ``PretrainedConfig``.
        network: made from it, on any device (``meta`` too).
    """
    text = config.get_text_config()
    known = [int(n) for name in _STATED if (n := getattr(text, name, None))][:1]
    known += [
        _rows(layer)
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Embedding) and _holds_positions(path)
    ]
    embedding: Any = network.get_input_embeddings()  # type: ignore[operator]
    return Limits(min(known, default=IF_UNSTATED), bool(known), int(embedding.num_embeddings))


def _holds_positions(path: str) -> bool:
    name = path.rpartition(".")[2].lower()
    return name == "wpe" or ("position" in name and "relative" not in name)


def _rows(table: nn.Embedding) -> int:
    """Positions that a table can name."""
    unused = getattr(table, "offset", None)  # OPT, BART, BioGPT
    if not isinstance(unused, int):
        unused = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa
    return table.num_embeddings - unused
