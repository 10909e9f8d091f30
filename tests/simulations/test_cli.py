"""The ``fedlora`` command: what it says, what it delegates to, its exit codes."""

import subprocess
import sys

import pytest

from simulations import cli, run
from simulations.cli import COMMANDS, main


def test_help_names_commands_groups_and_choices(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for name, (_, about) in COMMANDS.items():
        assert f"  {name}" in said and about in said
    assert "data: e2e, intents, jsonl, natural_instructions, sotu" in said
    assert "strategy/server_optimizer: fedadagrad, fedadam, fedavgm, fedyogi, none" in said
    assert "fedlora run strategy=fedit" in said
    assert max(map(len, said.splitlines())) <= 100


def test_without_a_command_it_is_help_and_a_mistake(capsys):
    assert main([]) == 2
    assert "usage: fedlora COMMAND" in capsys.readouterr().out


def test_an_unknown_command_is_answered_with_those_that_exist(capsys):
    assert main(["fit", "rounds=3"]) == 2
    said = capsys.readouterr().err
    assert "'fit'" in said and ", ".join(COMMANDS) in said and said.count("\n") == 1


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("run", "study")])
def test_every_command_has_help_of_its_own(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: fedlora {command} ")


def test_help_of_a_run_has_groups_choices_examples_and_the_configuration(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["run", "strategy=fedit", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "fedlora run experiment=smoke" in said
    groups = dict(line.split(": ", 1) for line in said.splitlines() if ": " in line)
    assert {"fedavg", "fedit", "flexlora"} <= set(groups["strategy"].split(", "))
    assert "strategies.fedit.FedIT" in said
    assert 'eval "$(fedlora -sc install=bash)"' in said


def test_hydras_flags_work(capsys):
    assert main(["run", "--cfg", "job", "rounds=7", "--package", "federation"]) == 0
    assert "rounds: ${rounds}" in capsys.readouterr().out
    assert main(["run", "--cfg", "job", "rounds=7", "--package", "federation", "--resolve"]) == 0
    assert "rounds: 7" in capsys.readouterr().out
    # a process of its own, because --info turns debug messages on for good
    command = [sys.executable, "-m", "simulations.cli", "run", "--info", "config"]
    done = subprocess.run(command, cwd=cli.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Config search path" in done.stdout


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("fedlora ", "run study report"),
        ("fedlora st", "run study report"),
        ("fedlora run strategy=fl", "strategy=flexlora"),
        ("fedlora run client.weight", "client.weight_decay="),
        ("fedlora study rank", "ranks="),
        ("fedlora report out", None),
    ],
)
def test_completion(line, offered, capsys, monkeypatch):
    monkeypatch.setenv("COMP_LINE", line)
    assert main(["-sc", "query=bash"]) == 0
    said = capsys.readouterr().out
    assert said == "" if offered is None else offered in said


@pytest.mark.parametrize("words", [["-sc", "install=bash"], ["run", "-sc", "install=bash"]])
def test_the_script_for_a_shell(words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/fedlora"])
    assert main(words) == 0
    assert capsys.readouterr().out.rstrip().endswith("hydra_bash_completion fedlora")


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["run", "--cfg", "job"]])
def test_answers_that_need_no_model_load_no_torch(words):
    code = (
        "import sys; from simulations.cli import main; "
        "\ntry: code = main(" + repr(words) + ")\nexcept SystemExit as e: code = e.code\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == 0


NEVER_AT_START = (
    "peft",
    "datasets",
    "pandas",
    "pyarrow",
    "matplotlib",
    "wandb",
    "nltk",
    "sacrebleu",
)
"""What takes seconds to import and is needed late, or by no worker."""


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("simulations.cli", ("hydra", "torch", "flwr", "ray", "transformers")),
        ("simulations.run", ("torch", "flwr", "ray", "transformers")),
        ("simulations.app.simulate", ("torch", "flwr", "transformers")),
        ("simulations.app.federate", ("ray", "transformers")),
        ("simulations.app.preload", ("ray", "hydra")),
    ],
)
def test_a_process_imports_only_what_its_start_needs(module, absent):
    names = (*absent, *NEVER_AT_START)
    code = f"import sys, {module}; print(*[n for n in {names} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cli.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


# ---------------------------------------------------------------------------------------- sweeps


@pytest.fixture
def runs(monkeypatch):
    """Runs that only leave a note; ``seed=1`` fails, ``seed=9`` is interrupted."""
    done: list[list[str]] = []

    def one(overrides, began):
        done.append(overrides)
        return 1 if "seed=1" in overrides else 130 if "seed=9" in overrides else 0

    monkeypatch.setattr(run, "one_run", one)
    return done


@pytest.mark.parametrize("words", [["study"], ["run", "-m"], ["study", "--multirun"]])
def test_a_sweep_does_every_combination(words, runs, capsys):
    assert main([*words, "strategy=fedit,flexlora", "seed=0,2", "rounds=1"]) == 0
    expected = [
        [f"strategy={s}", f"seed={n}", "rounds=1"] for s in ("fedit", "flexlora") for n in (0, 2)
    ]
    assert runs == expected
    assert "4 of 4 runs completed" in capsys.readouterr().out


def test_a_failed_run_of_a_sweep_is_its_exit_code_and_the_others_are_done(runs, capsys):
    assert main(["study", "seed=0,1,2"]) == 1
    assert [words for (words,) in runs] == ["seed=0", "seed=1", "seed=2"]
    assert "2 of 3 runs completed" in capsys.readouterr().out


def test_an_interrupted_run_ends_its_sweep(runs):
    with pytest.raises(SystemExit) as ended:
        main(["study", "seed=0,9,2"])
    assert ended.value.code == 130
    assert len(runs) == 2


def test_a_study_says_what_it_is(capsys):
    assert main(["study", "--help"]) == 0
    said = capsys.readouterr().out
    assert "every combination" in said and "exit code" in said and "fedlora run --help" in said


def test_a_name_is_a_study_and_its_mistakes_are_an_exit_code(capsys):
    assert main(["study", "smoke", "--list", "seed=1"]) == 2
    assert "a study sets seed itself" in capsys.readouterr().err
    assert main(["study", "smoek", "--list"]) == 2
    assert "'smoek' is neither a YAML file nor one of conf/study" in capsys.readouterr().err
    assert main(["study", "smoke", "--list"]) == 0
    assert capsys.readouterr().out.count("fedlora run ") == 4


def test_a_mistake_in_a_sweep_is_an_exit_code(capsys):
    assert main(["study", "stragety=fedit,flexlora"]) == 2
    assert "'stragety'. Did you mean strategy?" in capsys.readouterr().out


def test_commands_are_modules_with_a_main():
    for module, _ in COMMANDS.values():
        assert callable(cli.importlib.import_module(module).main)
