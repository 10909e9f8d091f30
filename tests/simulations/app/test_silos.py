"""Silos in one process: the state of a simulation, and nothing of their records at the server."""

import json
import re

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedlora.core.errors import ConfigError, RunError
from fedlora.data.store import TokenStore
from simulations.app import client_app
from simulations.app.compose import load
from simulations.app.parts import build_parts
from simulations.run import main
from tests.simulations.app.leaks import leaks, of_reply, secrets_of
from tests.simulations.app.silos import (
    RANKS,
    WORDS,
    SiloGrid,
    federate,
    sentence,
    simulate,
    write_cards,
    write_records,
)


@pytest.fixture
def data(tmp_path):
    return write_records(tmp_path / "data")


@pytest.fixture
def cards(tmp_path, data):
    return write_cards(tmp_path, data)


@pytest.mark.parametrize("strategy", ["flexlora", "heterolora", "ffa"])
def test_the_state_is_that_of_the_simulation_of_the_same_clients(tmp_path, data, cards, strategy):
    grid = SiloGrid([cards[name] for name in ("cusco", "alba", "bern")])  # in no order of names
    done = federate(tmp_path / "silos", grid, f"strategy={strategy}")
    same = simulate(tmp_path / "sim", data, f"strategy={strategy}")
    assert [r["state/hash"] for r in done.rounds] == [r["state/hash"] for r in same.rounds]
    assert [r["loss"] for r in done.clients] == [r["loss"] for r in same.clients]
    assert {r["tier"]: r["rank"] for r in done.clients} == {n: str(r) for n, r in RANKS.items()}
    assert done.status["status"] == "completed"
    assert (done.folder / "adapter").is_dir()
    silos = json.loads((done.folder / "population.json").read_text())["silos"]
    assert [(s["name"], s["client"]) for s in silos] == [(n, i) for i, n in enumerate(RANKS)]


def test_evaluations_are_those_of_the_simulation(tmp_path, data, cards):
    words = ("rounds=1", "evaluate=loss", "evaluate.groups=[seen]", "evaluate.clients=0")
    done = federate(tmp_path / "silos", SiloGrid([*cards.values()]), *words)
    same = simulate(tmp_path / "sim", data, *words)
    for one, other in zip(done.records, same.records, strict=True):
        keys = [k for k in one if not re.search("second|tier|rank", k)]
        assert {k: one[k] for k in keys} == {k: other[k] for k in keys}


def test_no_reply_holds_text_or_tokens_of_the_records(tmp_path, data, cards):
    grid = SiloGrid([*cards.values()])
    words = ("evaluate=loss", "evaluate.groups=[seen]", "evaluate.clients=0")
    federate(tmp_path / "silos", grid, *words)
    assert len(grid.replies) == 2 * 3 + 2 * 3 + 3 * 3
    received = [of_reply(reply) for reply in grid.replies]
    for name in RANKS:
        hidden = secrets_of(data / f"{name}.jsonl")
        assert len(hidden) > 40
        for blob in received:
            assert not leaks(blob, hidden)


@pytest.mark.parametrize("form", ["text", "int64", "int32", "uint16", "list", "json", "base64"])
def test_a_leak_would_be_found(tmp_path, data, form):
    """The scan itself: each form in which a client could send a record."""
    hidden = secrets_of(data / "alba.jsonl")
    assert leaks(leaking(form, data / "alba.jsonl"), hidden)


def leaking(form, file):
    """The bytes of a reply that carries one record."""
    import base64

    from tests.simulations.app.leaks import tokens_of

    (text, ids), *_ = tokens_of(file)
    config, arrays = {}, {}
    if form == "text":
        config["note"] = text
    elif form == "base64":
        config["note"] = base64.b64encode(b"x" + text.encode()).decode()
    elif form == "json":
        config["note"] = json.dumps(ids)
    elif form == "list":
        config["ids"] = ids
    else:
        arrays["ids"] = Array(np.array(ids, dtype=form))
    record = RecordDict({"config": ConfigRecord(config), "arrays": ArrayRecord(arrays)})
    SiloGrid([])  # gives this process the identity that messages need
    request = Message(RecordDict(), 1, "train")
    request.metadata.__dict__["_message_id"] = "1"
    return of_reply(Message(record, reply_to=request))


def test_the_server_opens_no_records(tmp_path, data, cards, monkeypatch):
    """Every store that is opened is opened while a silo answers."""
    inside, opened = [], []
    real = TokenStore.__init__

    def note(self, folder, only=None):
        opened.append(bool(inside))
        real(self, folder, only)

    monkeypatch.setattr(TokenStore, "__init__", note)
    grid = SiloGrid([*cards.values()])
    ask = grid._app

    def answered(message, context):
        inside.append(1)
        try:
            return ask(message, context)
        finally:
            inside.pop()

    grid._app = answered
    federate(tmp_path / "silos", grid, "rounds=1")
    assert opened
    assert all(opened)


def test_a_silo_that_is_away_costs_its_round_and_comes_back_as_the_same_client(tmp_path, cards):
    grid = SiloGrid([*cards.values()])
    done = federate(tmp_path / "silos", grid, "rounds=1")
    assert len(done.rounds) == 1
    away = sorted(cards).index("bern") + 1
    ask = grid.pull_messages

    def leaves_after_the_questions(ids):
        found = ask(ids)
        if any("results" in r.content for r in found if r.has_content()):
            grid.away.discard(away)
            if away in grid._contexts:
                grid.away.discard(grid.move(away))
        elif len(grid.replies) % 6 == 0:
            grid.away.add(away)
        return found

    grid.replies.clear()
    grid.pull_messages = leaves_after_the_questions
    more = federate(tmp_path / "silos", grid, "rounds=3", "resume=auto")
    rows = [r for r in more.clients if r["round"] == 2]
    assert [r["tier"] for r in rows if "failure" in r] == ["bern"]
    assert "silo bern is not connected" in more.said
    assert [r["tier"] for r in more.clients if r["round"] == 3] == [*RANKS]
    assert {r["client"] for r in more.clients if r["tier"] == "bern"} == {1}


def test_a_resumed_run_ends_in_the_same_state(tmp_path, cards):
    whole = federate(tmp_path / "whole", SiloGrid([*cards.values()]))
    federate(tmp_path / "parts", SiloGrid([*cards.values()]), "rounds=1")
    again = federate(tmp_path / "parts", SiloGrid([*cards.values()]), "resume=auto")
    assert again.hash == whole.hash
    assert "resuming after round 1" in again.said


def test_other_records_or_ranks_are_another_run(tmp_path, data, cards):
    federate(tmp_path / "out", SiloGrid([*cards.values()]), "rounds=1")
    file = data / "bern.jsonl"
    file.write_text(file.read_text().replace("drawer", "shelf"))
    with pytest.raises(RunError, match="written under another configuration"):
        federate(tmp_path / "out", SiloGrid([*cards.values()]), "resume=auto")


def test_records_that_change_within_a_run_cost_their_silo(tmp_path, data, cards):
    grid = SiloGrid([*cards.values()])
    ask = grid.pull_messages

    def changed(ids):
        found = ask(ids)
        if len(grid.replies) == 6:
            file = data / "cusco.jsonl"
            file.write_text(file.read_text().replace("drawer", "shelf"))
        return found

    grid.pull_messages = changed
    done = federate(tmp_path / "out", grid, "rounds=1")
    (row,) = [r for r in done.clients if "failure" in r]
    assert row["tier"] == "cusco"
    assert "its records are no longer those that it joined this run with" in row["message"]


def test_what_goes_wrong_at_a_silo_is_told_without_its_text(tmp_path, data, cards, capsys):
    file = data / "alba.jsonl"
    file.write_text(file.read_text() + '{"instruction": "half a reco')
    grid = SiloGrid([*cards.values()])
    with pytest.raises(RunError, match="DataError: the log of silo alba says why"):
        federate(tmp_path / "out", grid)
    assert "half a reco" not in "".join(r.error.reason for r in grid.replies if r.has_error())
    assert "alba.jsonl" in capsys.readouterr().out


def test_a_failing_client_leaves_its_trace_at_home(tmp_path, cards, monkeypatch, capsys):
    from fedlora.engine.client import LoRAClient

    real = LoRAClient._train

    def breaks(self, job):
        if job.client.id == 0:
            raise KeyError(sentence("alba", 3))
        return real(self, job)

    monkeypatch.setattr(LoRAClient, "_train", breaks)
    grid = SiloGrid([*cards.values()])
    done = federate(tmp_path / "out", grid, "rounds=1")
    (row,) = [r for r in done.clients if "failure" in r]
    assert (row["tier"], row["failure"]) == ("alba", "KeyError")
    assert row["message"] == "the log of silo alba says why"
    assert sentence("alba", 3) in capsys.readouterr().out
    assert not any(sentence("alba", 3).encode() in of_reply(r) for r in grid.replies)


def test_two_silos_of_one_name_are_refused(tmp_path, cards):
    with pytest.raises(RunError, match="two silos say that they are alba"):
        federate(tmp_path / "out", SiloGrid([cards["alba"], cards["alba"]]), nodes=2)


def test_another_base_model_is_refused_with_both_fingerprints(tmp_path, data):
    from fedlora.models.folder import find_assets

    cards = write_cards(tmp_path, data, model=str(find_assets("tiny_gpt2")))
    with pytest.raises(RunError, match=r"its base model has the fingerprint \w+, the server's has"):
        federate(tmp_path / "out", SiloGrid([*cards.values()]))


def test_too_few_silos(tmp_path, cards):
    with pytest.raises(RunError, match=r"3 SuperNodes are connected after 0\.1 s .*silos=4"):
        federate(tmp_path / "out", SiloGrid([*cards.values()]), "runtime.patience_s=0.1", nodes=4)


def test_a_node_without_a_card_says_how_to_give_it_one(tmp_path, cards):
    grid = SiloGrid([*cards.values()])
    del grid._contexts[2].node_config["silo"]
    with pytest.raises(RunError, match="started without a silo card: --node-config"):
        federate(tmp_path / "out", grid)


def test_a_silo_refuses_a_simulation(tmp_path, data, cards):
    """A run that names data of the server's gets nothing from a silo."""
    words = ["runtime=in_process", f"data.path={data}", f"output_dir={tmp_path}", "ranks=uniform"]
    from simulations.app.federate import run

    with pytest.raises(RunError, match="it trains on its own records only"):
        run(load([*WORDS, *words]), lambda _: SiloGrid([*cards.values()]), lambda _: None)


def test_a_message_for_another_silo_is_refused(cards):
    from fedlora.silo.card import read_card
    from fedlora.silo.site import worker_of

    parts = build_parts(load(WORDS))
    from fedlora.silo.site import Assignment

    told = Assignment("bern", 1, parts.model, parts.data, parts.engine, "")
    with pytest.raises(ConfigError, match="silo alba: the message is meant for bern"):
        worker_of(read_card(cards["alba"]), told.to_json())


def test_other_sources_are_refused_before_anything_is_read(tmp_path, cards, monkeypatch):
    monkeypatch.setattr(client_app, "source_hash", lambda: "other")
    with pytest.raises(RunError, match="worker sources other in"):
        federate(tmp_path / "out", SiloGrid([*cards.values()]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("~data.path data=sotu", "data=sotu is one data set that a server divides"),
        ("strategy=splitlora", "sends activations at every step"),
        ("strategy=local", "keeps a state of each client at the server"),
        ("strategy=fedsa", "keeps a state of each client at the server"),
        ("strategy=scaffold", "keeps a state of each client at the server"),
        ("engine.prefix=on", "engine.prefix=on"),
        ("population.clients=2", "the connected silos are the clients"),
        ("data.label_field=label model=minilm model.task=classification", "number the labels"),
        ("+runtime.num_cpus=2", "num_cpus=2 has no effect on silos"),
        ("+runtime.device=cuda", "device='cuda' has no effect on silos"),
        ("runtime.silos=0", "must lie in 1"),
    ],
)
def test_what_silos_cannot_do_is_refused_at_start(words, message):
    with pytest.raises(ConfigError, match=message):
        build_parts(load([*WORDS, *words.split()]))


def test_the_launcher_names_the_command_that_reaches_silos(capsys):
    assert main(["experiment=silos"]) == 2
    assert "flwr run . NAME" in capsys.readouterr().out
