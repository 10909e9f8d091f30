"""Which examples make an optimizer step, and how they become tensors.

Everything here is a function of ``(seed, round, client)`` and the plan, so that every engine sees
the same examples in the same order. Sequences are padded on the right: a causal model never looks
at what follows a token, so no attention mask is needed, and padded positions have no loss.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.core.seeding import generator
from fedlora.core.types import LocalPlan

PAD = 0
"""What fills a row after its last token. Any valid id would do: nothing attends to it."""


class TokenExample(Protocol):
    """What a tokenised example offers (`fedlora.data.store.Example`)."""

    @property
    def input_ids(self) -> NDArray[Any]:
        """``[t]`` token ids with BOS and EOS."""

    @property
    def prompt_tokens(self) -> int:
        """How many tokens go before the last answer, BOS included."""

    @property
    def responses(self) -> NDArray[np.bool_] | None:
        """``[t]``, which tokens belong to answers; None: all from `prompt_tokens` on."""

    @property
    def label(self) -> int:
        """Index of its class; -1: it has none."""

    @property
    def states(self) -> Tensor | None:
        """``[inputs, d]``, what enters the first adapted block; None: not at hand."""


E = TypeVar("E", bound=TokenExample)


@dataclass(frozen=True)
class Batch:
    """The examples of one forward pass."""

    inputs: Tensor
    """``[b, t]`` int64: every token but the last of each example (classification: every token),
    padded on the right."""
    positions: Tensor
    """``[n]`` int64: supervised positions as indices into ``inputs.flatten()`` (classification:
    rows, ``n = b``)."""
    targets: Tensor
    """``[n]`` int64: the token that follows each of these positions (classification: the label of
    each row)."""
    position_ids: Tensor | None = None
    """Position of every input in its own sequence, shaped like ``inputs``, where rows hold several;
    None: counted from each row's start."""
    mask: Tensor | None = None
    """``[b, t]`` bool, which inputs are tokens rather than padding; None: of no consequence, for
    the model is causal."""
    segments: Tensor | None = None
    """``[b, t]`` int64, 1 in the second of two texts (``token_type_ids``); None: all 0."""
    real: Tensor | None = None
    """Int64: which of ``inputs.flatten()`` are tokens rather than padding, ascending; None: all."""
    states: Tensor | None = None
    """``[b, t, d]``, what enters the first adapted block, zero at pads; None: unless all examples
    have it. With states a forward pass begins there (`fedlora.models.prefix`)."""

    @property
    def tokens(self) -> int:
        """How many tokens, or labels, have a loss."""
        return self.targets.shape[0]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        tensors = {name: x.to(device) for name, x in vars(self).items() if x is not None}
        return dataclasses.replace(self, **tensors)


def first_target(example: TokenExample, loss: str) -> int:
    """Index of the first token that may have a loss: after BOS for ``full``, else of the answer.

    Of the last answer, if there are several: the one that is evaluated.
    """
    return max(1, example.prompt_tokens) if loss == "response" else 1


def targets_of(example: TokenExample, loss: str) -> NDArray[np.int64]:
    """Indices of the tokens with a loss: of all answers for ``response``."""
    if loss == "response" and example.responses is not None:
        return np.flatnonzero(example.responses[1:]) + 1
    return np.arange(first_target(example, loss), len(example.input_ids))


def supervised_tokens(example: TokenExample, loss: str) -> int:
    """How many tokens of an example have a loss; one with a label has that alone."""
    if example.label >= 0:
        return 1
    if loss == "response" and example.responses is not None:
        return int(np.count_nonzero(example.responses[1:]))
    return max(0, len(example.input_ids) - first_target(example, loss))


def collate(examples: Sequence[TokenExample], loss: str, states: bool = True) -> Batch:
    """Examples as one batch, as wide as its longest one.

    Args:
        examples: at least one; each has at least one token.
        loss: ``full`` or ``response``, as in `LocalPlan.loss`.
        states: whether the batch brings the examples' states, if they have some.
    """
    width = max(1, max(len(e.input_ids) for e in examples) - 1)
    inputs = np.full((len(examples), width), PAD, dtype=np.int64)
    positions, targets = [], []
    for row, example in enumerate(examples):
        ids, chosen = example.input_ids, targets_of(example, loss)
        inputs[row, : len(ids) - 1] = ids[:-1]
        positions.append(row * width + chosen - 1)
        targets.append(ids[chosen])
    return Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(np.concatenate(positions)),
        torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        real=real_of([len(e.input_ids) - 1 for e in examples], width),
        states=padded_states(examples, width) if states else None,
    )


def real_of(lengths: Sequence[int], width: int) -> Tensor | None:
    """`Batch.real` of rows of so many tokens, padded on the right to a width.

    >>> real_of([2, 1], 2), real_of([2, 2], 2)
    (tensor([0, 1, 2]), None)
    """
    if min(lengths) == width:
        return None
    # Row r begins at place r * width and fills as many places as it has tokens.
    mask = np.arange(width) < np.array(lengths)[:, None]  # [b, width]
    return torch.from_numpy(np.flatnonzero(mask))


def states_of(examples: Sequence[TokenExample]) -> list[Tensor] | None:
    """The states of each example, ``[inputs, d]``; None unless all have some."""
    held = [e.states for e in examples if e.states is not None]
    return held if len(held) == len(examples) else None


def padded_states(examples: Sequence[TokenExample], width: int) -> Tensor | None:
    """The states of a batch ``[b, width, d]``, padded on the right with zeros; None unless all
    examples have some."""
    held = states_of(examples)
    if held is None:
        return None
    padded = held[0].new_zeros(len(held), width, held[0].shape[-1])
    for row, states in zip(padded, held, strict=True):
        row[: len(states)] = states
    return padded


def subset(n: int, limit: int, seed: int, purpose: str, *keys: int) -> list[int]:
    """Draw at most ``limit`` of ``n`` indices without replacement, ascending; 0: all."""
    if not 0 < limit < n:
        return list(range(n))
    return sorted(generator(seed, purpose, *keys).permutation(n)[:limit].tolist())


def num_steps(n: int, plan: LocalPlan) -> int:
    """Optimizer steps of a round over ``n`` examples."""
    return plan.steps or plan.epochs * math.ceil(n / plan.batch_size)


def step_indices(
    n: int,
    plan: LocalPlan,
    *,
    seed: int,
    round: int,
    client: int,
    lengths: Sequence[int] | None = None,
) -> Iterator[NDArray[np.int64]]:
    """The examples of each optimizer step: a fresh permutation per epoch, cut into batches.

    The last batch of an epoch may be smaller. With ``plan.steps`` epochs follow one another until
    so many steps are done. With ``plan.group_by_length`` examples of like length share a batch
    (`epoch_order`). With ``plan.privacy`` each step has every example by itself with the
    probability that gives a batch of the plan's size on average: none, or more, are possible.

    Args:
        n: number of examples.
        plan: batch size, epochs or steps, and whether to group.
        seed: of the run; with ``round`` and ``client`` it decides the order.
        round: counted from 1.
        client: the client's id.
        lengths: of the examples (`lengths_of`); may be left out where the plan does not group.
    """
    if plan.privacy is not None:
        steps = num_steps(n, plan)
        stream = {"seed": seed, "round": round, "client": client}
        yield from plan.privacy.batches(n, plan.batch_size, steps, **stream)
        return
    order = generator(seed, "order", round, client)
    per_epoch = math.ceil(n / plan.batch_size)
    for step in range(num_steps(n, plan)):
        at = step % per_epoch
        if at == 0:
            permutation = epoch_order(order.permutation(n), plan, lengths)
        yield permutation[at * plan.batch_size : (at + 1) * plan.batch_size]


MOST_BATCHES = 50
"""Batches among which examples are sorted by length, at most."""


def lengths_of(examples: Sequence[TokenExample]) -> list[int]:
    """The tokens of each example."""
    return [len(e.input_ids) for e in examples]


def epoch_order(
    permutation: NDArray[np.int64], plan: LocalPlan, lengths: Sequence[int] | None
) -> NDArray[np.int64]:
    """The order of an epoch: the permutation, or that order grouped by length.

    Grouped as by transformers' ``get_length_grouped_indices``: the permutation is cut into spans of
    a fourth of the epoch's batches (at most `MOST_BATCHES`), and each span is sorted, longest
    first. Then the longest of all examples changes places with the first one, so that a batch that
    does not fit into memory comes first. Of less than eight batches a span is one: nothing is
    grouped.

    Args:
        permutation: ``[n]``, drawn for the epoch.
        plan: batch size, and whether to group.
        lengths: of the ``n`` examples.

    Raises:
        ValueError: if the plan groups and no lengths are given.

    >>> plan, lengths = LocalPlan(batch_size=1, group_by_length=True), [3, 1, 4, 1, 5, 9, 2, 6]
    >>> epoch_order(np.arange(8), plan, lengths).tolist()  # spans of two; 5 is the longest
    [5, 1, 2, 3, 0, 4, 7, 6]
    """
    if not plan.group_by_length:
        return permutation
    if lengths is None:
        raise ValueError("client.group_by_length=true: the lengths of the examples are not given")
    size = plan.batch_size * max(1, min(len(permutation) // (4 * plan.batch_size), MOST_BATCHES))
    length = np.asarray(lengths)
    spans = [permutation[i : i + size] for i in range(0, len(permutation), size)]
    order = np.concatenate([span[np.argsort(-length[span], kind="stable")] for span in spans])
    # The longest example begins its span; the first of several that are equally long.
    longest = size * int(np.argmax(length[order[::size]]))
    order[[0, longest]] = order[[longest, 0]]
    return order


def parts(indices: NDArray[np.int64], plan: LocalPlan) -> list[list[int]]:
    """The examples of one optimizer step, cut into those of each forward pass."""
    size, chosen = plan.micro_batch_size or plan.batch_size, indices.tolist()
    return [chosen[i : i + size] for i in range(0, len(chosen), size)]


def micro_batches(
    examples: Sequence[TokenExample],
    indices: NDArray[np.int64],
    plan: LocalPlan,
    collate: Callable[[Sequence[TokenExample], str], Batch] = collate,
) -> list[Batch]:
    """The forward passes of one optimizer step, collated as the model wants it."""
    return [collate([examples[i] for i in part], plan.loss) for part in parts(indices, plan)]


def check_vocabulary(examples: Sequence[TokenExample], vocabulary: int, client: int) -> None:
    """Raise an IndexError that names the client and its first token that the model lacks.

    One such token would end the forward pass of all its clients.
    """
    for e in examples:
        least, most = int(e.input_ids.min()), int(e.input_ids.max())
        if not 0 <= least <= most < vocabulary:
            raise IndexError(
                f"client {client} holds token {least if least < 0 else most}, but the model has a "
                f"vocabulary of {vocabulary:,}"
            )


def trainable(examples: Sequence[E], loss: str) -> list[E]:
    """The examples that have a token to learn from.

    A response can be missing when the prompt alone fills the context; such an example would add
    an optimizer step without a gradient.
    """
    return [e for e in examples if supervised_tokens(e, loss) > 0]


def sample_examples(
    examples: Sequence[E], plan: LocalPlan, *, seed: int, round: int, client: int
) -> list[E]:
    """What a client trains on this round: its trainable examples, or a random part of them."""
    usable = trainable(examples, plan.loss)
    chosen = subset(len(usable), plan.max_examples, seed, "subset", round, client)
    return [usable[i] for i in chosen]
