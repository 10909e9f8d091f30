"""The ``fedlora`` command: one name for everything that can be done from a shell.

Each command is a module with ``main(words) -> exit code``; it is imported when it is asked for, so
that ``fedlora --help`` and shell completion answer at once.
"""

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from textwrap import fill

from fedlora.core.package import ROOT

CONF = ROOT / "conf"

COMMANDS = {
    "run": ("simulations.run", "one run: federated fine-tuning with any method"),
    "study": ("simulations.run", "a matrix of runs: a file of conf/study, or values with commas"),
    "report": ("simulations.reporting.report", "a run, or several side by side, as one HTML page"),
    "merge": ("simulations.tools.merge", "the base model with a run's update added"),
    "export": ("simulations.tools.export", "a run's adapter for PEFT, and its upload"),
    "generate": ("simulations.tools.generate", "answers of a run's model, or texts with scores"),
    "evaluate": ("simulations.tools.evaluate", "a run's model on lm-evaluation-harness tasks"),
    "data": ("simulations.tools.data", "statistics and examples of a data set"),
    "keys": ("simulations.tools.keys", "keys and certificates of a deployment with silos"),
    "pretrain": ("simulations.pretraining.pretrain", "a small base model from nothing"),
    "finetune": (
        "simulations.centralized.finetune",
        "the same data on one machine, for comparison",
    ),
    "bench": ("simulations.bench.__main__", "how fast the engines are, beside others"),
}
"""Module and purpose of each command."""

USAGE = """\
usage: fedlora COMMAND [words ...]
       fedlora COMMAND --help

commands
{commands}

groups of `fedlora run` and their choices (group=choice)
{groups}

examples
  fedlora run                                          the default experiment
  fedlora run experiment=smoke                         a recorded experiment
  fedlora run strategy=fedit rounds=20 client.lr=1e-4  another method, longer
  fedlora study strategy=fedit,flexlora seed=0,1,2     six runs, one after another
  fedlora study smoke --jobs 2                         a study of conf/study, two runs at a time
  fedlora report outputs/A outputs/B                   a page for each, and one that compares them
  fedlora merge outputs/A merged                       a model folder for transformers
  fedlora data stats data=sotu                         what the clients hold
  eval "$(fedlora -sc install=bash)"                   completion of commands, groups and choices

Runs write into outputs/ of the current folder. Configuration: {conf}
"""

STUDY = """\
usage: fedlora study NAME [--jobs N] [--list] [key=value ...] [--only KEY=VALUE ...]
       fedlora study [group=choice,choice ...] [key=value,value ...]

NAME is a study of conf/study, or a YAML file: methods, settings and seeds, several runs at a time.
What is complete is kept, what was stopped continues, a failed run is named and the others go on.
{studies}

  fedlora study smoke --jobs 2
  fedlora study mine.yaml --list                       the runs, without starting them
  fedlora study smoke --only seed=0                    a part of the runs
  fedlora study smoke --sweep-yaml                     the same as a sweep of Weights & Biases

Without a name, runs every combination of the values that commas separate, one run after another: a
sweep, the same as `fedlora run --multirun`. In both, a failed run does not keep the others from
being done; the exit code is then not 0. Words, groups and choices: fedlora run --help.

  fedlora study strategy=fedit,flexlora seed=0,1,2
  fedlora study experiment=smoke client.lr=1e-4,1e-3
  fedlora report outputs/*                             the runs side by side
"""

SWEEP = ("-m", "--multirun")
COMPLETION = ("-sc", "--shell-completion")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one command; its exit code. 2 for a command that does not exist."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (words[0], words[1:]) if words else ("", [])
    if command in ("-h", "--help", "help", ""):
        print(usage(), end="")
        return 0 if command else 2
    if command == "--version":
        print(f"fedlora {metadata.version('fedlora')}")
        return 0
    if command in COMPLETION:
        return complete(words)
    if command not in COMMANDS:
        allowed = ", ".join(COMMANDS)
        print(f"fedlora: there is no command {command!r}; there is {allowed}", file=sys.stderr)
        return 2
    if command == "study":
        if {"-h", "--help"} & set(rest):
            studies = sorted(file.stem for file in (CONF / "study").glob("*.yaml"))
            print(STUDY.format(studies=f"Studies: {', '.join(studies)}"), end="")
            return 0
        if rest and "=" not in rest[0] and rest[0][:1] not in "-~":
            return call("study", rest, "simulations.study.__main__")
        rest = rest if set(SWEEP) & set(rest) else [SWEEP[0], *rest]
    return call(command, rest)


def call(command: str, words: Sequence[str], name: str = "") -> int:
    """Import the module of a command, or the named one, and run its ``main``; a disk that refuses
    is one sentence."""
    module = importlib.import_module(name or COMMANDS[command][0])
    try:
        return int(module.main(words))
    except OSError as error:
        from fedlora.core.reading import sentence

        print(f"fedlora {command}: {sentence(error)}", file=sys.stderr)
        return 2


def usage() -> str:
    """The help of ``fedlora``, with the groups that conf/ has now."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items())
    groups = "\n".join(
        fill(f"{name}: {', '.join(choices)}", 98, initial_indent="  ", subsequent_indent="      ")
        for name, choices in group_choices()
    )
    return USAGE.format(commands=commands, groups=groups, conf=CONF)


def group_choices(conf: Path = CONF) -> Iterator[tuple[str, list[str]]]:
    """The groups of conf/ with their choices, groups within groups after the one they are in.
    Hydra's own and studies are no groups of a run."""
    for folder in sorted(p for p in conf.rglob("*") if p.is_dir()):
        name = folder.relative_to(conf).as_posix()
        choices = sorted(p.stem for p in folder.glob("*.yaml"))
        if choices and not name.startswith(("hydra", "study")):
            yield name, choices


def complete(words: Sequence[str]) -> int:
    """Shell completion: of the command's name here, of what follows ``run`` and ``study`` by Hydra.

    Hydra's script for a shell calls ``fedlora -sc query=<shell>`` with the line in ``COMP_LINE``.
    """
    line = os.environ.get("COMP_LINE", "")
    typed = line.split()
    if words[-1].startswith("query="):
        if len(typed) < 2 or (len(typed) == 2 and not line.endswith(" ")):
            print("\n".join(COMMANDS) if words[-1] == "query=fish" else " ".join(COMMANDS))
            return 0
        if typed[1] not in ("run", "study"):
            return 0  # the shell completes files
        _, _, after = line.partition(f" {typed[1]}")
        os.environ["COMP_LINE"] = f"fedlora{after}"
    return call("run", words)


if __name__ == "__main__":
    sys.exit(main())
