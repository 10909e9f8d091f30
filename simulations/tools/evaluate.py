"""Evaluate a run's model on the tasks of lm-evaluation-harness (`pip install fedlora[evaluate]`).

python -m simulations.tools.evaluate outputs/RUN --tasks boolq,piqa,hellaswag
python -m simulations.tools.evaluate outputs/RUN --tasks boolq --adapter none    # the base model
python -m simulations.tools.evaluate outputs/RUN --tasks mine --include tasks/   # tasks/mine.yaml

Writes lm_eval.json (results, settings, versions) into the run folder; lm_eval-base.json for the
base model. The harness fetches the data of its own tasks from the hub.
"""

import argparse
import difflib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fedlora.core.errors import CheckpointError, ConfigError, DataError, ModelError
from fedlora.core.files import write_file
from fedlora.models.language_model import LanguageModel
from fedlora.run.tracking import plain
from simulations.tools.generate import ADAPTERS
from simulations.tools.merge import say
from simulations.tools.prompts import load_model

INSTALL = "pip install 'fedlora[evaluate]' (from a checkout: pip install -e '.[evaluate]')"


@dataclass(frozen=True)
class Request:
    """What to evaluate."""

    tasks: tuple[str, ...]
    include: Path | None = None
    """Folder with the YAML files of further tasks."""
    shots: int | None = None
    """Examples in each prompt; None: as the task says."""
    limit: int | None = None
    """The first so many examples of each task; None: all."""
    batch_size: int = 8
    adapter: str = "final"
    device: str = "auto"

    @property
    def file(self) -> str:
        """The name of the file in the run folder."""
        return "lm_eval.json" if self.adapter == "final" else "lm_eval-base.json"


def installed() -> bool:
    """Whether lm-evaluation-harness is there."""
    return importlib.util.find_spec("lm_eval") is not None


def evaluate_run(run: Path, request: Request) -> dict[str, Any]:
    """Evaluate one run and write its file; what it holds.

    Raises:
        ConfigError: if the harness is not installed, does not know a task or cannot read its data.
        CheckpointError, DataError, ModelError: if model or update cannot be read.
    """
    if not installed():
        raise ConfigError(f"fedlora evaluate needs lm-evaluation-harness: {INSTALL}")
    from lm_eval.tasks import TaskManager

    include = str(request.include) if request.include else None
    known = TaskManager(include_path=include)
    _check_tasks(request, known.all_tasks)
    model = load_model(run, request.adapter, request.device, say)
    found = _harness(model, request, known)
    record = {
        "results": found["results"],
        "examples": found["n-samples"],
        "shots": found["n-shot"],
        "versions": found["versions"],
        "lm_eval": metadata.version("lm-eval"),
        "base": model.info.fingerprint,
        "adapter": request.adapter,
        "limit": request.limit,
    }
    text = json.dumps(plain(record), indent=1, ensure_ascii=False)
    write_file(run / request.file, text + "\n")
    return record


def _check_tasks(request: Request, known: Sequence[str]) -> None:
    """Refuse a task that the harness does not know.

    Raises:
        ConfigError: naming it and what is like it.
    """
    for task in request.tasks:
        if task not in known:
            like = difflib.get_close_matches(task, known, 3) or ["lm-eval ls tasks lists them"]
            raise ConfigError(
                f"--tasks: lm-evaluation-harness has no task {task!r}; near it: {', '.join(like)}. "
                "Your own tasks need --include with their folder"
            )


def _harness(model: LanguageModel, request: Request, known: Any) -> Mapping[str, Any]:
    """The harness's own results."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    config: Any = model.network.config
    config.use_cache = True  # for tasks that generate
    try:
        wrapped = HFLM(
            pretrained=model.network,
            tokenizer=model.tokenizer,
            max_length=model.info.context,
            batch_size=request.batch_size,
        )
        found = simple_evaluate(
            model=wrapped,
            tasks=list(request.tasks),
            num_fewshot=request.shots,
            limit=request.limit,
            task_manager=known,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise ConfigError(
            f"lm-evaluation-harness could not do {', '.join(request.tasks)}: "
            f"{type(error).__name__}: {first}"
        ) from error
    finally:
        config.use_cache = False
    assert found is not None  # None: on the other ranks of a distributed run
    return dict(found)


def table(record: Mapping[str, Any]) -> str:
    """One line per task and metric."""
    rows = [
        (task, key.partition(",")[0], value, scores.get(key.replace(",", "_stderr,", 1)))
        for task, scores in record["results"].items()
        for key, value in scores.items()
        if isinstance(value, float) and "_stderr," not in key
    ]
    width = max([len("task"), *(len(row[0]) for row in rows)])
    lines = [f"{'task':<{width}}  {'metric':<16}     value    stderr"]
    for task, metric, value, error in rows:
        spread = f"{error:8.4f}" if isinstance(error, float) else f"{'-':>8}"
        lines.append(f"{task:<{width}}  {metric:<16}  {value:8.4f}  {spread}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="fedlora evaluate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("run", type=Path, help="a run folder")
    add("--tasks", required=True, help="names, separated by commas")
    add("--include", type=Path, help="folder with the YAML files of further tasks")
    add("--shots", type=int, help="examples in each prompt; default: as the task says")
    add("--limit", type=int, help="the first so many examples of each task")
    add("--batch-size", type=int, default=8)
    add("--adapter", choices=ADAPTERS, default="final", help="none: the base model as it is")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options = vars(parser.parse_args(arguments))
    run, tasks = options.pop("run"), options.pop("tasks")
    try:
        names = tuple(name for name in tasks.split(",") if name)
        record = evaluate_run(run, Request(names, **options))
    except (CheckpointError, DataError, ModelError, ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
