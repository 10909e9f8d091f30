"""Model cards: the README.md beside exported weights, with front matter in the hub's format."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fedlora.core.config import locate
from fedlora.core.payload import Payload
from fedlora.models.read_back import ReadBack
from simulations.reporting.run_folder import Record, Run, number, read_run

CARD = "README.md"
_PRIVATE = {"_target_", "path", "folder"}  # of the data: places on somebody's machine
_PEFT = """\
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained("{base}")
    model = PeftModel.from_pretrained(base, "<this folder>")
"""
_PEFT_CLASSIFIER = """\
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("<this folder>")
    base = AutoModelForSequenceClassification.from_pretrained(
        "{base}", num_labels={labels}, pad_token_id=tokenizer.pad_token_id
    )
    model = PeftModel.from_pretrained(base, "<this folder>")   # with the head that was trained
"""
_PLAIN = """\
    from transformers import {auto}, AutoTokenizer

    model = {auto}.from_pretrained("<this folder>")
    tokenizer = AutoTokenizer.from_pretrained("<this folder>")
"""
_OURS = """\
    fedlora merge <run folder> merged/      # a plain model that transformers reads
"""


def adapter_card(
    folder: Path, payload: Payload, found: ReadBack | None, last: int | None = None
) -> str:
    """The card of a run's exported payload.

    Args:
        folder: the run's folder.
        payload: that was exported.
        found: what reading it back by another program has shown; None: there is no such program.
        last: the round that the payload is of; None: the run's last.
    """
    run = read_run(folder)
    if last is not None:
        run = replace(
            run,
            rounds=[r for r in run.rounds if r["round"] <= last],
            evaluations=[r for r in run.evaluations if r["round"] <= last],
        )
    base, labels = run.model.get("hub_id") or "<its base model>", _labels(run)
    text = _PEFT_CLASSIFIER if labels else _PEFT
    use = _OURS if found is None else text.format(base=base, labels=len(labels))
    checked = "Only fedlora reads this folder." if found is None else found.sentence()
    library = "fedlora" if found is None else "peft"
    return _card(run, library, f"An update ({payload.noun}) for a base model", use, checked)


def merged_card(folder: Path) -> str:
    """The card of the plain model that a run's base and update make together."""
    checked = "transformers has read every tensor back as it was written."
    what = "A base model with an update added to its weights"
    run = read_run(folder)
    auto = "AutoModelForSequenceClassification" if _labels(run) else "AutoModelForCausalLM"
    return _card(run, "transformers", what, _PLAIN.format(auto=auto), checked)


def _card(run: Run, library: str, what: str, use: str, checked: str) -> str:
    metrics = _metrics(run)
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(run).items())
    results = "\n".join(f"| {g} | {m} | {v:.4f} |" for g, m, v in metrics)
    shown = (
        f"After round {run.evaluations[-1].get('round')}, means over clients:\n\n"
        f"| clients | metric | value |\n|---|---|---|\n{results}\n"
        if metrics
        else "The run evaluated nothing.\n"
    )
    return (
        f"---\n{_front(run, library, metrics)}\n---\n\n# {run.name}\n\n"
        f"{what}, trained by federated learning with fedlora.\n\n| | |\n|---|---|\n{rows}\n\n"
        f"## Use\n\n{use}\n{checked}\n\n## Evaluation\n\n{shown}\n"
        f"## Licences\n\nText: {_licence(run.config) or 'not known to fedlora'}. The licence of "
        "the base model applies to everything made from it.\n"
    )


def _labels(run: Run) -> list[str]:
    """Class names of a classifier, in the order of their index; empty: it is none."""
    return [str(name) for name in run.model.get("labels", ())]


def _front(run: Run, library: str, metrics: list[tuple[str, str, float]]) -> str:
    """The YAML of the hub; what is not known is left out."""
    data = _class(run.config.get("data", {}))
    task = "text-classification" if _labels(run) else "text-generation"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data.lower(),
            dataset_name=data,
            metric_type=metric,
            metric_value=value,
            metric_name=f"{metric}, {group}",
        )
        for group, metric, value in metrics
    ]
    return ModelCardData(
        base_model=run.model.get("hub_id") or None,
        library_name=library,
        pipeline_tag=task,
        tags=["fedlora", "federated-learning", "lora"],
        model_name=run.name,
        eval_results=results or None,
    ).to_yaml()


def _facts(run: Run) -> dict[str, str]:
    """What a reader wants to know first."""
    config, model = run.config, run.model
    groups = {k: v for k, v in config.items() if isinstance(v, Mapping)}
    data, client = groups.get("data", {}), groups.get("client", {})
    ranks = run.population.get("ranks", {})
    names = ", ".join(f"{i} {name}" for i, name in enumerate(_labels(run)))
    return {
        "base model": f"{model.get('hub_id') or model.get('name', '?')}, fingerprint "
        f"`{model.get('fingerprint', '?')}`",
        **({"labels": names} if names else {}),
        "method": _class(groups.get("strategy", {})),
        "ranks": ", ".join(f"{rank} ({n} clients)" for rank, n in ranks.items()) or "?",
        "data": ", ".join([_class(data), *(f"{k} {data[k]}" for k in data if k not in _PRIVATE)]),
        "clients": f"{run.population.get('clients', '?')}, of which "
        f"{run.population.get('per_round', '?')} train in a round",
        "rounds": str(len(run.rounds)),
        "client": ", ".join(
            f"{k} {client[k]}" for k in ("optimizer", "lr", "steps", "epochs") if k in client
        ),
        "seed": str(config.get("seed", "?")),
        "fedlora": str(run.environment.get("packages", {}).get("fedlora", "?")),
    }


def _class(group: Mapping[str, Any]) -> str:
    """The name of the class that a group of the configuration builds."""
    return str(group.get("_target_", "?")).rpartition(".")[2]


def _metrics(run: Run) -> list[tuple[str, str, float]]:
    """Group, metric and value of every group's last evaluation."""
    found = []
    for group, records in run.groups().items():
        found += [(group, name, value) for name, value in _measured(records[-1])]
    return found


def _measured(record: Record) -> list[tuple[str, float]]:
    """The means over clients: what has a weighted mean beside it (`fedlora.evaluation.summary`)."""
    return [
        (name, value)
        for name, raw in record.items()
        if f"{name}_weighted" in record and (value := number(raw)) is not None
    ]


def _licence(config: Mapping[str, Any]) -> str:
    """The licence of the data, as its source states it; empty: none is stated."""
    target = str(config.get("data", {}).get("_target_", ""))
    return str(getattr(locate(target), "licence", "")) if target else ""
