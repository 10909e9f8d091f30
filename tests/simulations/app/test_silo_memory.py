"""What silos keep themselves, so that starts are compressed and rounding errors fed back."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from fedlora.core import variables
from fedlora.core.errors import ConfigError, RunError
from fedlora.silo.card import read_card
from fedlora.silo.memory import FOLDER, SiloMemory, memory_of
from fedlora.wire.messages import decode_jobs
from fedlora.wire.recall import Forgotten, Held
from tests.simulations.app.silos import (
    RANKS,
    SiloGrid,
    federate,
    simulate,
    write_cards,
    write_records,
)

BOTH = ("compression=int4", "compression.error_feedback=true")
"""In both directions, with what rounding withholds: all that a silo can keep."""
THREE = "rounds=3"


class Watched(SiloGrid):
    """A grid whose replies can get lost, and before whose rounds something can happen."""

    def __init__(self, cards, lose=(), before=()):
        super().__init__([*cards.values()])
        self.sent, self._begun = [], set()
        self._lose, self._before = set(lose), dict(before)

    def push_messages(self, messages):
        messages = [*messages]
        for message in messages:
            if message.metadata.message_type != "train":
                continue
            round = round_of(message)
            if round not in self._begun and round in self._before:
                self._before[round](self)
            self._begun.add(round)
            self.sent.append(message)
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        found = super().pull_messages(message_ids)
        for reply in found:
            if (len(self._begun), reply.metadata.src_node_id) in self._lose:
                reply.content.config_records["results"]["nonce"] = "of another message"
        return found


def header(message):
    return json.loads(message.content.config_records["cohort"]["header"])


def round_of(message):
    """The round of a message's job."""
    return header(message)["rows"][0][1]


def node(cards, name):
    return [*cards].index(name) + 1


def failures(run):
    return [(r["round"], r["tier"], r["failure"]) for r in run.clients if "failure" in r]


def hashes(run):
    return [r["state/hash"] for r in run.rounds]


def traffic(run):
    return [(r["wire/up_bytes"], r["wire/down_bytes"]) for r in run.rounds]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Silos whose memory is in one folder, and a run of them."""
    folder = tmp_path_factory.mktemp("silos")
    data = write_records(folder / "data")
    cards = write_cards(folder, data, cache=str(folder / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(variables.CACHE, str(folder / "cache"))
        grid = Watched(cards)
        whole = federate(folder / "whole", grid, *BOTH, THREE)
    home = folder / "cache" / FOLDER
    return SimpleNamespace(folder=folder, data=data, cards=cards, home=home, grid=grid, whole=whole)


@pytest.fixture
def home(place, monkeypatch):
    monkeypatch.setenv(variables.CACHE, str(place.folder / "cache"))
    return place.home


def test_state_and_traffic_are_those_of_the_simulation(tmp_path, place, home):
    same = simulate(tmp_path / "sim", place.data, *BOTH, THREE)
    assert hashes(place.whole) == hashes(same)
    assert traffic(place.whole) == traffic(same)
    assert not failures(place.whole)


def test_error_feedback_of_the_plain_wire(tmp_path, place, home):
    words = ("federation.wire=bfloat16", "federation.error_feedback=true", "strategy=heterolora")
    done = federate(tmp_path / "silos", SiloGrid([*place.cards.values()]), *words)
    assert hashes(done) == hashes(simulate(tmp_path / "sim", place.data, *words))


def test_what_travels_is_what_is_counted(place):
    sent = [m.content.array_records for m in place.grid.sent]
    assert len(sent) == 3 * len(RANKS)
    for i, record in enumerate(place.whole.rounds):
        part = sent[len(RANKS) * i : len(RANKS) * (i + 1)]
        down = sum(a.numpy().nbytes for records in part for a in records["changes"].values())
        assert down == record["wire/down_bytes"] > 0
    assert not any(records["starts"] or records["residuals"] for records in sent)
    contents = [reply.content.array_records for reply in place.grid.replies]
    replies = [records for records in contents if "payloads" in records]
    assert len(replies) == 3 * len(RANKS)
    assert not any(records["residuals"] for records in replies), "what a silo keeps has left it"


def test_a_lost_reply_leaves_both_ends_at_the_round_before(tmp_path, place, home):
    """What cusco keeps of a round counts for nothing: as if it had been away."""
    who = node(place.cards, "cusco")
    lost = federate(tmp_path / "lost", Watched(place.cards, lose=[(2, who)]), *BOTH, THREE)
    assert failures(lost) == [(2, "cusco", "WorkerError")]
    leaves = Watched(place.cards)
    leaves.pull_messages = _leaves_for_a_round(leaves, who)
    away = federate(tmp_path / "away", leaves, *BOTH, THREE)
    assert failures(away) == [(2, "cusco", "Unavailable")]
    assert hashes(lost) == hashes(away)


def _leaves_for_a_round(grid, who):
    """Its node is away from its first reply until the next round's are there."""
    pull = grid.pull_messages

    def pulled(message_ids):
        found = pull(message_ids)
        if found and "results" in found[0].content:
            (grid.away.add if len(grid._begun) == 1 else grid.away.discard)(who)
        return found

    return pulled


def test_a_silo_that_has_lost_its_memory_is_sent_a_whole_start(tmp_path, place, home):
    def forgets(grid):
        shutil.rmtree(home / "bern")

    def mistakes(grid):
        """The file is whole, and is not what the server has sent."""
        newest = max((home / "alba").glob("*/00001.memory"), key=lambda f: f.stat().st_mtime)
        SiloMemory(newest.parent).keep(1, Held({"x/a": torch.ones(2, 3)}, {}), 0)

    grid = Watched(place.cards, before={2: mistakes, 3: forgets})
    done = federate(tmp_path / "silos", grid, *BOTH, "rounds=4")
    assert failures(done) == [(2, "alba", "Forgotten"), (3, "bern", "Forgotten")]
    said = {r["message"] for r in done.clients if "failure" in r}
    assert said == {f"the log of silo {name} says why" for name in ("alba", "bern")}
    assert since(grid, place, "alba") == [0, 1, 0, 3]
    assert since(grid, place, "bern") == [0, 1, 2, 0]
    assert since(grid, place, "cusco") == [0, 1, 2, 3]


def since(grid, place, name):
    """The rounds whose memory a silo was to take up, by round."""
    who = node(place.cards, name)
    headers = [header(m) for m in grid.sent if m.metadata.dst_node_id == who]
    return [entry["since"] for h in headers for entry in h["recalls"].values()]


def test_a_resumed_run_goes_on_with_what_silos_keep(tmp_path, place, home):
    federate(tmp_path, SiloGrid([*place.cards.values()]), *BOTH, "rounds=1")
    before = len(list((home / "alba").iterdir()))
    more = federate(tmp_path, SiloGrid([*place.cards.values()]), *BOTH, THREE, "resume=auto")
    assert hashes(more) == hashes(place.whole)
    assert not failures(more)
    assert len(list((home / "alba").iterdir())) == before, "a resumed run has another memory"


def test_a_job_that_builds_on_a_memory_needs_one(place):
    with pytest.raises(ValueError, match="this one keeps nothing itself"):
        decode_jobs(place.grid.sent[0].content)


# --- the files ------------------------------------------------------------------------


def test_the_memory_that_counts_is_kept(tmp_path):
    memory = SiloMemory(tmp_path / "run")
    held = [
        Held({"u/a": torch.full((2, 3), float(r))}, {"u/b": torch.ones(3, 2)}) for r in range(6)
    ]
    since = 0
    for round in range(1, 6):
        memory.keep(round, held[round], since)
        if round != 4:  # its reply was lost
            since = round
    assert memory.rounds() == [2, 3, 5], "lost rounds would pile up while nothing is accepted"
    assert torch.equal(memory.held(3).start["u/a"], held[3].start["u/a"])
    assert torch.equal(memory.held(3).withheld["u/b"], torch.ones(3, 2))
    assert memory.held(0) == Held({}, {})
    with pytest.raises(Forgotten, match=r"00001\.memory cannot be read"):
        memory.held(1)


@pytest.mark.parametrize("at", [0, 40, -1, "cut", "empty"])
def test_a_damaged_file_is_a_lost_one(tmp_path, at):
    memory = SiloMemory(tmp_path)
    memory.keep(1, Held({"u/a": torch.ones(2, 3)}, {}), 0)
    (file,) = tmp_path.iterdir()
    blob = bytearray(file.read_bytes())
    if isinstance(at, int):
        blob[at] ^= 1
    file.write_bytes({"cut": blob[:50], "empty": b""}.get(at, blob))
    with pytest.raises(Forgotten, match="is damaged"):
        memory.held(1)


def test_a_memory_that_cannot_be_written_is_told_without_its_path(tmp_path, caplog):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunError, match="its log says why") as raised:
        SiloMemory(tmp_path / "run").keep(1, Held({}, {}), 0)
    assert str(tmp_path) not in str(raised.value)
    assert str(tmp_path) in caplog.text


@pytest.mark.parametrize("run", ["", "../../etc", "a/b", 7, None])
def test_a_run_is_named_by_hexadecimal_digits(place, run):
    with pytest.raises(ConfigError, match="names no run whose memory"):
        memory_of(read_card(place.cards["alba"]), json.dumps({"run": run}))
