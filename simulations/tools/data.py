"""Look at a data set, named by a run's configuration.

fedlora data stats data=jsonl data.path=records.jsonl
fedlora data show data=sotu --client 700
fedlora data stats data=e2e model=gpt2                 with another model's tokens
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.core.cache import cache_root
from fedlora.core.config import build, locate
from fedlora.core.errors import ModelError
from fedlora.data import (
    SPLITS,
    Source,
    TokenStore,
    prepare,
)
from fedlora.data.batches import targets_of
from fedlora.data.build import moved_text
from fedlora.data.tokenizer import FolderTokenizer
from fedlora.models.folder import tokenizer_id
from fedlora.models.spec import ModelSpec
from fedlora.prune.spec import Pruned
from simulations.app.compose import load
from simulations.app.unseen import unseen_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a mistake in the data or the options is one line and exit code 2."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        source, folder, loss, unseen = sources(options.words)
        tokenizer = FolderTokenizer(folder)
        store = TokenStore(prepare(source, tokenizer, tokenizer_id(folder), cache_root()))
        if options.command == "stats":
            lines = statistics_lines(store.statistics(), unseen)
        else:
            at = (options.client, options.split, options.index)
            lines = example_lines(store, tokenizer, *at, loss)
        histograms = label_lines(store) if options.command == "stats" else ()
        for line in chain(lines, histograms):
            sys.stdout.write(line + "\n")
    except (ValueError, IndexError, ModelError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fedlora data", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "command", choices=("stats", "show"), help="count and measure, or one example"
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="key=value",
        help="as of fedlora run: data=..., data.key=..., model=...",
    )
    parser.add_argument("--client", type=int, default=0, help="show: whose")
    parser.add_argument("--split", choices=SPLITS, default="train", help="show: of which split")
    parser.add_argument("--index", type=int, default=0, help="show: position in the split")
    return parser


class Sources(NamedTuple):
    """What of a run decides which tokens it trains on."""

    data: Source
    tokenizer: Path
    """The folder that holds it."""
    loss: str
    """``full`` or ``response``: `client.loss`."""
    unseen: str
    """What clients that never train are evaluated with."""


def sources(words: Sequence[str]) -> Sources:
    """The data of a run with these words, its tokenizer and its loss.

    Raises:
        ConfigError: for a word that a run would refuse too.
        ModelError: if the model has no folder here.
    """
    cfg = load(words)
    source = build(cfg.data, Source, "data")  # type: ignore[type-abstract]
    model = build(cfg.model, ModelSpec, "model")  # type: ignore[type-abstract]
    base = model.base if isinstance(model, Pruned) else model  # pruning leaves the tokenizer alone
    private = locate(str(cfg.strategy["_target_"])).private  # type: ignore[attr-defined]
    unseen = unseen_model(model.head, classifies=model.classifies, private=private)
    return Sources(source, base.folder(), str(cfg.client.loss), unseen)


def statistics_lines(s: dict[str, Any], unseen: str) -> Iterator[str]:
    """The statistics as a table for a person.

    Args:
        s: of the store.
        unseen: what clients that never train are evaluated with.
    """
    total = sum(s["examples"].values())
    per_client, tokens = s["train_examples_per_client"], s["tokens_per_example"]
    cut = f"max_length {s['max_length']}, truncation {s['truncation']}"
    yield f"data               {s['source']}, {cut}"
    yield f"clients            {s['clients']:,}"
    splits = ", ".join(f"{split} {n:,}" for split, n in s["examples"].items())
    yield f"examples           {total:,} ({splits})"
    yield f"train per client   {_spread_text(per_client)}"
    yield f"tokens             {s['tokens']:,}"
    yield f"tokens per example {_spread_text(tokens)}"
    for split, spread in s["tokens_by_split"].items():
        yield f"{split:>8} tokens    {_spread_text(spread)}"
        if not s["labels"]:
            yield f"{split:>8} response  {_spread_text(s['response_tokens_by_split'][split])}"
    yield f"truncated          {s['truncated_share']:.1%} of the examples"
    if not s["labels"]:
        yield f"response tokens    {s['response_token_share']:.1%} of all"
        yield f"without response   {s['without_response']:,} (no response token survives)"
        yield f"empty outputs      {s['empty_outputs']:,}"
        yield f"only empty outputs {_ids_text(s['clients_with_only_empty_outputs'])}"
    else:
        yield f"labels per client  {_spread_text(s['labels_per_client'])}"
    if s["moved_examples"]:
        yield f"moved              {moved_text(s['moved_examples'], total)}"
    yield f"never trained      {_ids_text(s['clients_without_training_examples'])}"
    yield f"unseen clients     evaluated with {unseen}"
    yield f"categories         {s['categories']}"
    for category, n in s["largest_categories"].items():
        yield f"{n:>8} clients   {category or '(none)'}"


def label_lines(store: TokenStore) -> Iterator[str]:
    """How the labels lie over the clients: a row of bars for each, a column a label."""
    if not store.labels:
        return
    counts = store.label_counts("train")
    each = counts.sum(axis=0)
    most, least = int(each.argmax()), int(each.argmin())
    yield (
        f"labels             {len(store.labels)}; training examples: "
        f"{each[least]:,} ({store.labels[least]}) to {each[most]:,} ({store.labels[most]})"
    )
    wide = len(store.labels) > _BAR_LABELS
    scale = "the most frequent" if wide else f"{BARS[-1]} is {counts.max():,}"
    yield f"training labels    by client: examples, labels, {scale}"
    for client, row in enumerate(counts[:_BAR_CLIENTS]):
        bars = _largest(row, store.labels) if wide else label_bars(row, int(counts.max()))
        yield f"{client:>8} {row.sum():>6,} of {(row > 0).sum():>3}   {bars}"
    if len(counts) > _BAR_CLIENTS:
        yield f"     ... and {len(counts) - _BAR_CLIENTS:,} clients more"


BARS = "▁▂▃▄▅▆▇█"
_BAR_CLIENTS, _BAR_LABELS = 50, 160


def label_bars(counts: NDArray[np.int64], largest: int) -> str:
    """One character a label: a space for none, else a bar in proportion to ``largest``.

    >>> label_bars(np.array([0, 1, 4, 8]), 8)
    ' ▁▄█'
    """
    heights = -(-counts * len(BARS) // max(1, largest))  # rounded up: one example can be seen
    return "".join(BARS[h - 1] if h else " " for h in heights.tolist())


def _largest(counts: NDArray[np.int64], labels: Sequence[str]) -> str:
    """The most frequent labels of a client, in words."""
    order = [i for i in np.argsort(-counts, kind="stable")[:4].tolist() if counts[i]]
    return ", ".join(f"{labels[i]} {counts[i]:,}" for i in order)


def _spread_text(v: dict[str, float]) -> str:
    return (
        f"mean {v['mean']:.1f}, median {v['median']:g}, p95 {v['p95']:g}, "
        f"min {v['min']}, max {v['max']}"
    )


def _ids_text(ids: Sequence[int]) -> str:
    shown = ", ".join(str(i) for i in ids[:8]) + (", ..." if len(ids) > 8 else "")
    return f"{len(ids)} clients" + (f" ({shown})" if ids else "")


def example_lines(
    store: TokenStore, tokenizer: FolderTokenizer, client: int, split: str, index: int, loss: str
) -> Iterator[str]:
    """One example as the model sees it: its parts, and how many tokens of each have a loss."""
    example = store.example(client, split, index)
    info = store.clients[client]
    ids = example.input_ids
    held = f"train {info.num_train}, eval {info.num_eval}, test {info.num_test}"
    yield f"client {client} ({info.name}, {info.category}): {held}"
    if store.labels:
        yield f"label {example.label} of {len(store.labels)}: {store.labels[example.label]}"
        first, second = np.split(ids, [example.prompt_tokens])
        for name, tokens in (("text", first), ("second text", second)):
            if len(tokens):
                yield f"--- {name}, {len(tokens)} tokens"
                yield tokenizer.decode(tokens.tolist())
        return
    trained = np.zeros(len(ids), dtype=np.bool_)
    trained[targets_of(example, loss)] = True
    yield f"client.loss={loss}: {trained.sum()} of {len(ids)} tokens have a loss"
    is_response = example.responses
    if is_response is None:
        is_response = np.arange(len(ids)) >= example.prompt_tokens
    borders = [0, *(np.flatnonzero(np.diff(is_response)) + 1).tolist(), len(ids)]
    for start, end in pairwise(borders):
        part = "response" if is_response[start] else "prompt"
        yield f"--- {part}, {end - start} tokens, {trained[start:end].sum()} with a loss"
        yield tokenizer.decode(ids[start:end].tolist())
    yield "--- reference"
    yield store.references(client, split)[index]


if __name__ == "__main__":
    sys.exit(main())
