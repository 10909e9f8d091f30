"""Look at a data set: ``simulations.tools.data {stats,show} data=<source> [key=value ...]``."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedlora.core.cache import cache_root
from fedlora.core.config import build
from fedlora.core.errors import DataError, ModelError
from fedlora.data import (
    SPLITS,
    Source,
    TokenStore,
    prepare,
)
from fedlora.data.tokenizer import FolderTokenizer
from fedlora.models.folder import find_assets, tokenizer_id

SOURCES = {
    "sotu": "fedlora.data.sotu.Sotu",
    "natural_instructions": "fedlora.data.natural_instructions.NaturalInstructions",
    "jsonl": "fedlora.data.jsonl.Jsonl",
    "e2e": "fedlora.data.e2e.E2E",
}
PATHS = {
    "natural_instructions": ("FEDLORA_NI", "natural_instructions.parquet"),
    "e2e": ("FEDLORA_E2E", "e2e.parquet"),
}
"""Environment variable and default of sources whose path has one, as in ``conf/data``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a mistake in the data or the options is one line and exit code 2."""
    options = _parser().parse_args(arguments)
    try:
        source = parse_source(options.settings)
        tiny = options.model == "tiny"
        folder = find_assets("tiny") if tiny else Path(options.model).expanduser()
        tokenizer = FolderTokenizer(folder)
        cache = options.cache or cache_root()
        store = TokenStore(prepare(source, tokenizer, tokenizer_id(folder), cache))
        if options.command == "stats":
            lines = statistics_lines(store.statistics())
        else:
            lines = example_lines(store, tokenizer, options.client, options.split, options.index)
        for line in lines:
            sys.stdout.write(line + "\n")
    except (ValueError, IndexError, ModelError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m simulations.tools.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, about in (("stats", "count and measure"), ("show", "print one example")):
        sub = commands.add_parser(command, help=about)
        sub.add_argument(
            "settings", nargs="*", metavar="key=value", help="data=<source>, then its options"
        )
        sub.add_argument("--model", default="tiny", help="tiny, or a folder with tokenizer.json")
        sub.add_argument("--cache", type=Path, help="where token stores live")
    show = commands.choices["show"]
    show.add_argument("--client", type=int, default=0)
    show.add_argument("--split", choices=SPLITS, default="train")
    show.add_argument("--index", type=int, default=0, help="position in the split")
    return parser


def parse_source(settings: Sequence[str]) -> Source:
    """The source described by ``data=<name>`` and ``key=value`` (or ``data.key=value``)."""
    values: dict[str, Any] = {}
    name = "sotu"
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise DataError(f"{setting!r} is not of the form key=value")
        if key == "data":
            name = value
        else:
            values[key.removeprefix("data.")] = value
    if name not in SOURCES:
        raise DataError(f"data={name!r} is not one of {list(SOURCES)}")
    if name in PATHS:
        values.setdefault("path", os.environ.get(*PATHS[name]))
    elif name == "jsonl" and "path" not in values:
        raise DataError("data=jsonl needs path=<a file or a pattern such as data/*.jsonl>")
    return build({"_target_": SOURCES[name], **values}, Source, "data")  # type: ignore[type-abstract]


def statistics_lines(s: dict[str, Any]) -> Iterator[str]:
    """The statistics as a table for a person."""
    total = sum(s["examples"].values())
    per_client, tokens = s["train_examples_per_client"], s["tokens_per_example"]
    yield f"data               {s['source']}, cutoff {s['cutoff']}, truncation {s['truncation']}"
    yield f"clients            {s['clients']:,}"
    splits = ", ".join(f"{split} {n:,}" for split, n in s["examples"].items())
    yield f"examples           {total:,} ({splits})"
    yield f"train per client   {_spread_text(per_client)}"
    yield f"tokens             {s['tokens']:,}"
    yield f"tokens per example {_spread_text(tokens)}"
    for split, spread in s["tokens_by_split"].items():
        yield f"{split:>8} tokens    {_spread_text(spread)}"
        yield f"{split:>8} response  {_spread_text(s['response_tokens_by_split'][split])}"
    yield f"response tokens    {s['response_token_share']:.1%} of all"
    yield f"truncated          {s['truncated_share']:.1%} of the examples"
    yield f"without response   {s['without_response']:,} (no response token survives)"
    yield f"empty outputs      {s['empty_outputs']:,}"
    yield f"only empty outputs {_ids_text(s['clients_with_only_empty_outputs'])}"
    yield f"never trained      {_ids_text(s['clients_without_training_examples'])}"
    yield f"categories         {s['categories']}"
    for category, n in s["largest_categories"].items():
        yield f"{n:>8} clients   {category or '(none)'}"


def _spread_text(v: dict[str, float]) -> str:
    return (
        f"mean {v['mean']:.1f}, median {v['median']:g}, p95 {v['p95']:g}, "
        f"min {v['min']}, max {v['max']}"
    )


def _ids_text(ids: Sequence[int]) -> str:
    shown = ", ".join(str(i) for i in ids[:8]) + (", ..." if len(ids) > 8 else "")
    return f"{len(ids)} clients" + (f" ({shown})" if ids else "")


def example_lines(
    store: TokenStore, tokenizer: FolderTokenizer, client: int, split: str, index: int
) -> Iterator[str]:
    """One example as the model sees it."""
    example = store.example(client, split, index)
    info = store.clients[client]
    ids, border = example.input_ids.tolist(), example.prompt_tokens
    yield (
        f"client {client} ({info.name}, {info.category}): train {info.num_train}, "
        f"eval {info.num_eval}, test {info.num_test}"
    )
    yield f"--- prompt, {border} tokens"
    yield tokenizer.decode(ids[:border])
    yield f"--- response, {len(ids) - border} tokens"
    yield tokenizer.decode(ids[border:])
    yield "--- reference"
    yield store.references(client, split)[index]


if __name__ == "__main__":
    sys.exit(main())
