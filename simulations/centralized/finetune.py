r"""Train a model on one machine, all text in one place, and write the merged model: SPP and what it
is compared with.

    python -m simulations.centralized.finetune OUT --method spp client.steps=200
    python -m simulations.centralized.finetune OUT --method masked_lora model.pattern=2:4
    python -m simulations.centralized.finetune OUT --method lora    # fills the zeros; again:
    python -m simulations.centralized.finetune PRUNED --method none \
        model@model.base=hf model.base.path=OUT

    spp           alpha and beta of the weights that are not zero (arXiv:2405.16057)
    masked_lora   W + M * (alpha / r) B A, M one where W is not zero (SQFT, arXiv:2410.03750)
    masked_full   every weight that is not zero
    lora          zeros are filled
    none          nothing: prunes and writes

The other words are those of `simulations.run`. The clients that `population` holds out neither
train nor calibrate; their text is what losses are of. ``ranks`` and ``strategy`` mean nothing here.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fedlora.core.cache import cache_root
from fedlora.core.checks import at_least
from fedlora.core.config import build
from fedlora.core.errors import ConfigError, DataError, ModelError
from fedlora.core.files import output_folder, write_file
from fedlora.core.types import LocalPlan
from fedlora.data.batches import TokenExample
from fedlora.data.source import Source
from fedlora.data.store import TokenStore, prepare
from fedlora.models.export import write_merged
from fedlora.models.folder import mask_identity
from fedlora.models.language_model import LanguageModel
from fedlora.models.masks import (
    Masks,
    check_network,
    load_masks,
)
from fedlora.models.spec import ModelSpec
from fedlora.models.stored import require_masked
from fedlora.population.sampling import (
    Population,
    held_out,
    members,
)
from fedlora.training.loop import optimise
from simulations.app.compose import load
from simulations.app.limits import check_length, check_tokens
from simulations.centralized.baselines import (
    METHODS,
    Start,
    bake,
    loss_of,
)

RECORD = "finetune.json"


def texts(
    store: TokenStore, population: Population, seed: int, held: int
) -> tuple[list[TokenExample], list[TokenExample]]:
    """Training examples of those who train, and the first ``held`` of those who are held out.

    Raises:
        ConfigError: if no client is held out.
    """
    shards = members(population, store.clients)
    apart = set().union(*held_out(population, shards, seed))
    train = [e for c in shards if c.id not in apart for e in store.examples(c.id, "train")]
    judged = [e for c in sorted(apart) for e in store.examples(c, "train")][:held]
    if not judged:
        raise ConfigError(
            f"population.unseen_fraction={population.unseen_fraction} holds no client out, but "
            "losses are those of held-out clients: choose a larger fraction"
        )
    return list(train), list(judged)


def words(method: str, overrides: Sequence[str]) -> list[str]:
    """The overrides behind what a method begins with."""
    defaults = {"client": "spp" if method == "spp" else "adamw", "model": "pruned"}
    if method.startswith("masked"):
        defaults["client.dropout"] = "0.0"
    given = {w.partition("=")[0] for w in overrides}
    return [*(f"{k}={v}" for k, v in defaults.items() if k not in given), *overrides]


def check(model: LanguageModel, method: str, masks: Masks) -> None:
    """Refuse a model on which a method means nothing.

    Raises:
        ModelError: saying what to use.
    """
    if method in ("lora", "none"):
        return
    if not masks or model.info.splits:
        why = "is dense" if not masks else "was pruned with its fused layers whole"
        raise ModelError(
            f"--method {method} keeps a pruned model's zeros, and {model.info.name} {why}: use "
            "model=pruned, or model=hf with a pruned model's folder and model.split_qkv=false"
        )
    require_masked((m.path for m in model.info.modules), masks, model.info.name)


def finetune(options: argparse.Namespace, emit: Callable[[str], None]) -> dict[str, Any]:
    """Train as asked and write the merged model; its record.

    Raises:
        ConfigError, DataError, ModelError, ValueError, FloatingPointError: one sentence each.
    """
    cfg, method = load(words(options.method, options.overrides)), options.method
    plan = build(cfg.client, LocalPlan, "client")
    spec = build(cfg.model, ModelSpec, "model")  # type: ignore[type-abstract]
    source = build(cfg.data, Source, "data")  # type: ignore[type-abstract]
    population = build(cfg.population, Population, "population")
    if plan.dropout and method.startswith("masked"):
        raise ConfigError(f"client.dropout={plan.dropout} with --method {method}, which has none")
    if source.labelled or spec.classifies:
        raise ConfigError(
            f"fedlora finetune trains a model to write, and data={source.name} with model.task="
            f"{spec.task} is for classification: use data with answers and model.task=causal_lm"
        )
    check_length(source, info := spec.describe())
    store = TokenStore(prepare(source, spec.tokenizer(), spec.tokenizer_id(), cache_root()))
    check_tokens(store, info)
    train, held = texts(store, population, cfg.seed, options.held)
    model = spec.load(torch.device("cpu"))
    masks = load_masks(spec.folder()) if model.info.mask else {}
    check(model, method, masks)
    record: dict[str, Any] = {"method": method, "overrides": options.overrides, "parameters": 0}
    record["perplexity_before"] = math.exp(loss_of(model, held, plan.loss))
    if (mount := METHODS[method]) is not None:
        start = Start(options.rank, options.alpha, plan.dropout, cfg.seed)
        parameters = mount(model, start)
        record["parameters"] = sum(p.numel() for p in parameters)
        emit(f"{model.info.name}: {method} trains {record['parameters']:,} parameters")
        optimise(model, parameters, train, plan, seed=cfg.seed, round=1, client=0)
    bake(model)
    record["perplexity_after"] = math.exp(loss_of(model, held, plan.loss))
    write(model, {} if method == "lora" else masks, options.target, record)
    return record


def write(model: LanguageModel, masks: Masks, target: Path, record: dict[str, Any]) -> None:
    """The model as a folder, with its masks if its zeros are where they say, and its record, to
    which the identity of the masks is added.

    Raises:
        ModelError: if a zero has moved; nothing is written then.
    """
    check_network(masks, model.network, "after training")
    with output_folder(target, {"trained_on": model.info.fingerprint}) as draft:
        write_merged(model, None, draft)
        record["mask"] = mask_identity(draft)
        write_file(draft / RECORD, json.dumps(record, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        prog="fedlora finetune", description=" ".join((__doc__ or "").split("\n\n")[0].split())
    )
    parser.add_argument("target", type=Path, help="folder to write the model to")
    parser.add_argument("--method", choices=list(METHODS), required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=16.0, help="the scale is alpha / rank")
    parser.add_argument("--held", type=int, default=64, help="examples that losses are of")
    parser.add_argument("overrides", nargs="*", help="as of fedlora run")
    options = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(1)
    try:
        at_least("--held", options.held, 1)
        if options.target.is_dir() and any(options.target.iterdir()):
            raise ConfigError(f"{options.target} is not empty: name a new folder")
        record = finetune(options, print)
    except (DataError, ModelError, ValueError, FloatingPointError) as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"perplexity of held-out clients {record['perplexity_before']:.2f} -> "
        f"{record['perplexity_after']:.2f}; zeros: {record['mask'] or 'none are kept'}\n"
        f"model: {options.target.absolute()}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
