"""Whole runs: what a run leaves behind, resuming, failures, and mistakes of the user."""

import json

import pytest
import torch

from fedlora.core.errors import CheckpointError, ConfigError, RunError, RunFolderError
from fedlora.core.files import claim
from fedlora.run import checkpoint
from fedlora.run.tracking import Wandb, read_jsonl
from fedlora.techniques.lora.peft import load_peft

FIVE = ["fedavg", "fedit", "flexlora", "heterolora", "slora"]


def asked(strategy):
    """The word that asks for a strategy; the default needs none."""
    return () if strategy == "flexlora" else (f"strategy={strategy}",)


@pytest.mark.parametrize("strategy", FIVE)
def test_every_strategy_runs_and_leaves_a_complete_folder(finished, strategy):
    stages = ["strategy.stage1_rounds=1"] if strategy == "slora" else []
    done = finished(*asked(strategy), *stages)
    assert done.status["status"] == "completed"
    assert [r["round"] for r in done.rounds] == [1, 2]
    assert all(r["clients"] == 6 for r in done.rounds)
    for name in ("config.yaml", "environment.json", "population.json", "adapter"):
        assert (done.folder / name).exists(), name
    adapter = load_peft(done.folder / "adapter")
    assert any(f.delta().abs().sum() > 0 for f in adapter.values())
    assert len(done.clients) == 12
    assert all(row["bytes_up"] > 0 and row["bytes_down"] > 0 for row in done.clients)


def test_the_headline_says_which_ranks_are_held_and_which_are_trained(finished):
    """Where a method has clients train other ranks than they hold, both are said, in words."""

    def headline(strategy):
        (line,) = (
            line for line in finished(*asked(strategy)).said.splitlines() if "clients hold" in line
        )
        return line

    held = "rank 2 in attention modules and 15 in mlp modules (6 clients), rank 15 (6 clients)"
    smallest = headline("fedit")
    assert held in smallest
    assert smallest.endswith("; under FedIT they train rank 1 (all clients)")
    own = headline("flexlora")
    assert held in own
    assert "under" not in own
    assert "2/15" not in smallest + own


def examples(tmp_path, counts, **fields):
    """A file with so many short records of each client."""
    row = {"instruction": "Say it.", "output": "It is said.", **fields}
    lines = [json.dumps(row | {"client": f"c{k}"}) for k, n in enumerate(counts) for _ in range(n)]
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(lines))
    return "data=jsonl", f"data.path={path}", "population.clients=0"


def test_clients_too_small_for_a_test_split_are_not_drawn_to_be_evaluated(federate, tmp_path):
    data = examples(tmp_path, [2, 10] * 8)
    panels = "evaluate.groups=[seen,unseen_random,participants]"
    done = federate(*data, "evaluate=loss", panels, "population.unseen_fraction=0.3", "rounds=1")
    judged = [r for r in done.records if r["kind"] == "evaluate"]
    assert {r["group"] for r in judged} == {"seen", "unseen_random", "participants"}
    assert all(r["failed"] == 0 and r["clients"] > 0 for r in judged)


def test_an_evaluation_that_no_client_can_do_is_refused_before_there_is_a_folder(
    federate, tmp_path
):
    data = examples(tmp_path, [6] * 8)
    with pytest.raises(ConfigError, match=r"none of the 7 clients of seen has examples in the tes"):
        federate(*data, "evaluate=loss", "evaluate.groups=[seen]", "data.test_fraction=0")
    assert not (tmp_path / "out").exists()


def test_heterogeneity_is_real_on_the_wire(finished):
    sizes = {row["rank"]: row["bytes_down"] for row in finished().clients}
    assert len(sizes) >= 3
    assert len(set(sizes.values())) == len(sizes)


@pytest.mark.slow
def test_aggregated_weights_are_loaded(federate):
    """Guards against the fault that every round restarts from the initial adapter."""
    again = federate("client.lr=1e-2", "client.dropout=0", "rounds=4", "population.per_round=20")
    first = [r["train/loss_first"] for r in again.rounds]
    assert first[-1] < first[0] - 0.02


def test_resumed_equals_uninterrupted(federate, finished):
    finished("strategy=heterolora", output="cut")
    resumed = federate("rounds=3", "strategy=heterolora", "resume=auto", output="cut")
    whole = federate("rounds=3", "strategy=heterolora")
    assert resumed.hash == whole.hash
    assert [r["round"] for r in resumed.rounds] == [1, 2, 3]
    assert "resuming after round 2 of 3" in resumed.said


def test_messages_and_nodes_do_not_change_the_result(federate):
    one = federate("engine=sequential", "federation.clients_per_message=1", "runtime.nodes=7")
    many = federate("engine=sequential", "federation.clients_per_message=6", "runtime.nodes=2")
    assert one.hash == many.hash


def test_postprocessors_act_between_accepted_and_averaged(federate, finished):
    words = ("strategy=fedit", "engine=sequential")
    plain = finished(*words)
    wide, narrow = (
        federate(*words, *more)
        for more in (
            ["postprocess=bound", "postprocess.bound.norm=1e6"],
            ["postprocess=bound", "postprocess.bound.norm=1e-3"],
        )
    )
    losses = [[r["train/loss"] for r in done.rounds] for done in (plain, wide, narrow)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2][0] == losses[0][0]
    assert narrow.hash not in (plain.hash, wide.hash)


BF16 = ("strategy=fedit", "engine=sequential", "federation.wire=bfloat16")


def test_a_rounding_wire_halves_the_bytes_and_keeps_the_account(federate, finished):
    plain = finished(*BF16[:2])
    half = federate(*BF16)
    fed = federate(*BF16, "federation.error_feedback=true")
    assert len({plain.hash, half.hash, fed.hash}) == 3
    for done in (half, fed):
        assert [2 * r["wire/up_bytes"] for r in done.rounds] == [
            r["wire/up_bytes"] for r in plain.rounds
        ], "what a client keeps is no traffic"
    assert all(r["client_state/bytes"] > 0 for r in fed.rounds)
    assert not any("client_state/bytes" in r for r in half.rounds)


def test_error_feedback_resumes_bit_by_bit(federate):
    few = ("population.clients=10", "population.per_round=8")  # who takes part has done so before
    words = (*BF16, "federation.error_feedback=true", "client.steps=1", *few)
    whole = federate(*words, "rounds=3")
    federate(*words, "rounds=2", output="cut")
    resumed = federate(*words, "rounds=3", "resume=auto", output="cut")
    assert resumed.hash == whole.hash


@pytest.mark.slow
def test_another_seed_is_another_run(federate):
    assert federate("seed=1").hash != federate("seed=2").hash


def test_a_finished_run_is_left_as_it_is(federate, finished):
    first = finished()
    again = federate("resume=auto")
    assert again.folder == first.folder
    assert again.hash == first.hash
    assert len(again.rounds) == 2


def test_a_new_run_never_writes_into_an_old_folder(federate, finished):
    first, second = finished(), federate("rounds=1")
    assert second.folder != first.folder
    assert second.folder.name == f"{first.folder.name}-2"


TWELVE = ("engine=faulty", "population.per_round=12", "client.steps=1")


def test_some_clients_raise_and_the_round_goes_on(federate):
    done = federate(*TWELVE, "engine.raise_fraction=0.3")
    failed = [row for row in done.clients if row.get("failure")]
    assert failed
    assert sum(r["failed"] for r in done.rounds) == len(failed)
    assert f"client {failed[0]['client']} " in done.said
    assert "PlantedFault" in done.said


@pytest.mark.parametrize("fault", ["nan", "shape"])
def test_a_bad_update_is_rejected_and_named(federate, fault):
    done = federate(*TWELVE, f"engine.{fault}_fraction=0.3")
    rejected = [row for row in done.clients if row.get("failure") == "RejectedUpdate"]
    assert rejected
    assert sum(r["rejected"] for r in done.rounds) == len(rejected)
    state = checkpoint.latest(done.folder / "checkpoints").state
    assert all(torch.isfinite(t).all() for t in state.values() if t.is_floating_point())


def test_too_many_failures_stop_the_run_and_keep_what_was_done(federate, tmp_path):
    with pytest.raises(RunError, match=r"only 0 of 6 clients succeeded.*No round was complete yet"):
        federate("engine=faulty", "engine.raise_fraction=1.0")
    (folder,) = (tmp_path / "out").iterdir()
    status = json.loads((folder / "status.json").read_text())
    assert status["status"] == "failed"
    assert status["kind"] == "RunError"


def test_evaluation_is_written_and_summarised(federate):
    done = federate(
        "evaluate=fast",
        "evaluate.clients=1",
        "evaluate.groups=[seen,unseen_random,participants]",
        "evaluate.adapters=[full,own]",
        "evaluate.plan.max_new_tokens=2",
    )
    found = [r for r in done.records if r["kind"] == "evaluate"]
    assert {(r["round"], r["group"], r["adapter"]) for r in found} == {
        (t, g, a)
        for t in (0, 1, 2)
        for g in ("seen", "unseen_random", "participants")
        for a in ("full", "own")
    }
    assert all(r["loss_response"] > 0 for r in found)


@pytest.mark.parametrize("engine", ["sequential", "fused"])
def test_a_metric_is_one_file_and_one_line(federate, engine):
    """A metric that nothing else knows of: in the records, each client with the metric's weight."""
    done = federate(
        "+evaluate.plan.metrics.length._target_=tests.fedlora.evaluation.toy_metric.ResponseLength",
        "evaluate=fast", "evaluate.clients=3", "evaluate.plan.max_new_tokens=2", "rounds=1",
        f"engine={engine}",
    )  # fmt: skip
    first, last = (r for r in done.records if r["kind"] == "evaluate")
    names = ("", "_weighted", "_low", "_high")
    lengths = [first[f"response_length{name}"] for name in names]
    assert lengths == [last[f"response_length{name}"] for name in names]
    mean, weighted, low, high = lengths
    assert low <= mean <= high
    # Three clients of two examples: weights are proportional to the values themselves.
    assert mean == pytest.approx(first["tokens_response"] / first["examples"], rel=1e-12)
    assert weighted >= mean


def test_the_base_is_what_round_zero_measures(federate):
    """B = 0 before the first round: every rank and strategy measures the same base model."""
    words = ("evaluate=loss", "evaluate.clients=2", "rounds=1", "client.steps=1")
    losses = {
        r["loss_response"]
        for s in ("fedit", "flexlora", "heterolora")
        for r in federate(f"strategy={s}", *words, "evaluate.adapters=[full,own]").records
        if r["kind"] == "evaluate" and r["round"] == 0
    }
    assert len(losses) == 1


def test_two_runs_in_one_folder(federate, finished):
    done = finished()
    with claim(done.folder), pytest.raises(RunFolderError, match="belongs to the run of process"):
        federate("resume=auto", "rounds=3")
    assert [r["round"] for r in done.rounds] == [1, 2]


def test_another_configuration_may_not_resume(federate, finished):
    name = finished().folder.name
    with pytest.raises(
        RunError, match=r"another configuration.*differs: client\.lr=0\.5, was 0\.[0-9]+$"
    ):
        federate("resume=auto", "client.lr=0.5", f"name={name}")


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(federate, finished):
    done = finished()
    newest = done.folder / "checkpoints" / "round_00002" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-40])
    again = federate("resume=auto")
    assert again.hash == done.hash
    assert "resuming after round 1 of 2" in again.said


COMPRESSED = ("strategy=fedit", "engine=sequential", "compression=int4")


def test_compressed_changes_are_counted_as_they_travel(federate, finished):
    plain, small = finished(*COMPRESSED[:2]), federate(*COMPRESSED)
    for done, whole in zip(small.rounds, plain.rounds, strict=True):
        assert 0 < done["wire/up_bytes"] < 0.2 * whole["wire/up_bytes"]
        assert done["client_state/bytes"] > 0  # what clients were sent last


@pytest.mark.slow
def test_compression_resumes_bit_by_bit(federate):
    few = ("population.clients=10", "population.per_round=8")  # who takes part has done so before
    words = (*COMPRESSED, "compression.error_feedback=true", *few)
    whole = federate(*words, "rounds=3")
    federate(*words, "rounds=2", output="cut")
    resumed = federate(*words, "rounds=3", "resume=auto", output="cut")
    assert resumed.hash == whole.hash


@pytest.mark.slow
def test_an_attack_that_ends_is_over(federate, finished):
    words = ("strategy=fedit", "engine=sequential", "population.per_round=8")
    plain = federate(*words)
    later = federate(*words, "attack=sign", "attack.fraction=0.5", "attack.start=2")
    assert later.rounds[0]["state/hash"] == plain.rounds[0]["state/hash"]
    assert later.hash != plain.hash
    assert 0 < later.rounds[1]["attack/accepted"] <= 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["federation.error_feedback=true"],
            "error_feedback=true with wire=float32: nothing is rounded off",
        ),
        (
            ["strategy=splitlora", *BF16[2:], "federation.error_feedback=true"],
            "error_feedback=true with strategy=splitlora",
        ),
        (("resume=/no/such/folder",), "neither never, auto nor a run folder"),
        (("data=natural_instructions", "data.path=/no/file.parquet"), "/no/file.parquet"),
        (("population.clients=999999",), "must be at most 400, the clients that the data has"),
        (("evaluate=fast", "evaluate.groups=[unseen_task]"), "unseen_task has no clients"),
        (("ranks=homogeneous", "ranks.rank=9999", "ranks.clamp=false"), "rank 9999 is above"),
        (("model=hf", "model.path=/no/model"), "/no/model"),
    ],
)
def test_mistakes_end_in_one_sentence(federate, overrides, message):
    with pytest.raises((ConfigError, ValueError, RuntimeError)) as caught:
        federate(*overrides)
    assert message in str(caught.value)


def test_a_client_without_examples_is_never_sampled(federate, tmp_path):
    """And a source that names such a client still works."""
    rows = [
        {"who": who, "instruction": f"Say {i}", "output": f"word {i}", "part": part}
        for who in ("ann", "bob", "eve")
        for i, part in enumerate(["train", "train", "train", "test"])
        if not (who == "eve" and part == "train")
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows))
    done = federate(
        "data=jsonl",
        f"data.path={path}",
        "data.key=who",
        "data.split_field=part",
        "population.clients=0",
        "population.per_round=2",
        "population.unseen_fraction=0",
    )
    names = {row["client"] for row in done.clients}
    assert len(names) == 2


@pytest.mark.slow
def test_the_number_of_server_threads_does_not_follow_the_machine(federate):
    """Enough clients for QR and SVD to be cut into threads where there are any."""
    words = ("rounds=1", "population.per_round=12", "ranks=heavy_tail_strong")
    torch.set_num_threads(2)
    try:
        two = federate(*words)
    finally:
        torch.set_num_threads(1)
    assert federate(*words).hash == two.hash


def test_a_mistake_leaves_no_folder_behind(federate, finished, tmp_path):
    done = finished()
    with pytest.raises(ValueError, match="the data has"):
        federate("rounds=1", "population.clients=9999")
    assert list((tmp_path / "out").iterdir()) == [done.folder]


def test_only_a_run_folder_can_be_resumed(federate, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("precious: 1\n")
    with pytest.raises(ConfigError, match=r"there is no .*status\.json"):
        federate(f"resume={tmp_path / 'mine'}")
    assert (tmp_path / "mine" / "config.yaml").read_text() == "precious: 1\n"


def test_a_refused_resume_changes_nothing(federate, finished):
    done = finished()
    before = {p: p.read_bytes() for p in done.folder.glob("*.*") if p.name != "status.json"}
    with pytest.raises(RunError, match="another configuration"):
        federate("resume=auto", "client.lr=0.5", "rounds=3", f"name={done.folder.name}")
    assert {p: p.read_bytes() for p in before} == before


def test_without_a_readable_checkpoint_nothing_is_thrown_away(federate, finished):
    done = finished()
    for meta in (done.folder / "checkpoints").glob("*/meta.json"):
        meta.write_text("{}")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        federate("resume=auto", "rounds=3")
    assert len(done.rounds) == 2


def test_changed_data_may_not_be_resumed(federate, tmp_path):
    path = tmp_path / "mine.jsonl"

    def write(word: str) -> None:
        rows = (
            {"client": f"c{i % 3}", "instruction": f"Say {i}", "output": f"{word} {i}"}
            for i in range(30)
        )
        path.write_text("\n".join(json.dumps(r) for r in rows))

    words = ("data=jsonl", f"data.path={path}", "population.clients=0", "population.per_round=2",
             "population.unseen_fraction=0")  # fmt: skip
    write("word")
    federate(*words, "rounds=1")
    write("other")
    with pytest.raises(RunError, match="another configuration"):
        federate(*words, "rounds=2", "resume=auto")


def test_an_evaluation_that_was_cut_short_is_completed(federate):
    words = ("evaluate=loss", "evaluate.clients=2", "evaluate.groups=[seen,unseen_random]")
    done = federate(*words, "rounds=1")
    file = done.folder / "metrics.jsonl"
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:-1]))  # killed between two groups
    federate(*words, "rounds=1", "resume=auto")
    found = [(r["round"], r["group"]) for r in done.records if r["kind"] == "evaluate"]
    assert found == [(t, g) for t in (0, 1) for g in ("seen", "unseen_random")]


def test_the_engine_says_what_it_is_and_gets_the_messages_it_likes(federate):
    """Once per run, in every round's record, and in a resumed run as well."""
    talkative = "engine._target_=tests.simulations.app.talkative.Talkative"
    words = ("engine=sequential", talkative, "evaluate=loss",
             "evaluate.clients=2")  # fmt: skip
    whole = federate(*words, "rounds=2")
    assert whole.said.count("engine: talkative") == whole.said.count("engine: 6 at once") == 1
    assert whole.said.count("engine: ") == 2
    federate(*words, "rounds=1", output="cut")
    resumed = federate(*words, "rounds=2", "resume=auto", output="cut")
    for run in (whole, resumed):
        assert [r["engine"] for r in run.rounds] == ["6 at once; talkative"] * 2
        assert [r["engine/fused_share"] for r in run.rounds] == [0.5] * 2
    assert {r["fused"] for r in whole.clients} == {0.0, 1.0}


def test_the_sequential_engine_needs_one_word(federate):
    done = federate("engine=faulty", "client.steps=1")
    assert [x for x in done.said.splitlines() if x.startswith("engine")] == ["engine: sequential"]
    assert [r["engine"] for r in done.rounds] == ["sequential"] * 2
    assert not any("engine/fused_share" in r for r in done.rounds)


def test_frozen_factors_are_not_sent(federate, finished):
    """A frozen A follows from the seed: neither direction has it."""
    whole, half = finished(), federate("rounds=1", "client.train_a=false")
    for direction in ("down", "up"):
        sent, all_of_it = (r.rounds[0][f"wire/{direction}_bytes"] for r in (half, whole))
        assert sent < 0.7 * all_of_it
    assert half.rounds[0]["wire/down_bytes"] == half.rounds[0]["wire/up_bytes"]


def test_lost_tracking_is_no_clean_success(federate, tmp_path, monkeypatch):
    """All rounds are done and recorded in the folder; the end says what was lost."""

    def refuse(*_):
        raise RuntimeError("the service is gone")

    monkeypatch.setattr(Wandb, "open", refuse)
    with pytest.raises(RunError, match=r"all 1 rounds are complete .*the service is gone"):
        federate("rounds=1", "tracking=wandb")
    (folder,) = (tmp_path / "out").iterdir()
    assert json.loads((folder / "status.json").read_text())["status"] == "failed"
    assert [r["round"] for r in read_jsonl(folder / "metrics.jsonl")] == [1]
    assert (folder / "adapter").is_dir()


def test_impossible_tracking_leaves_no_folder(federate, tmp_path):
    with pytest.raises(ConfigError, match=r"tracking\.project='team/llm' contains /"):
        federate("tracking=wandb", "tracking.project=team/llm")
    assert not (tmp_path / "out").exists()


def test_lost_records_are_mentioned_on_resume(federate, finished):
    done = finished()
    file = done.folder / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    again = federate("rounds=3", "resume=auto")
    assert "metrics.jsonl has no record of round 1" in again.said
    assert [r["round"] for r in again.rounds] == [2, 3]
    assert "has no record" not in federate("rounds=1", "resume=auto", output="out2").said
