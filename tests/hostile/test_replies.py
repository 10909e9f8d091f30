"""Every hostile reply, with every method: the run goes on, the client is named and left out, and
the result is bitwise that of a run in which it simply failed."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from flwr.app import Message

from fedlora.core.types import TrainJob, Update
from fedlora.wire.messages import Result, decode_jobs
from tests.hostile.attacks import ATTACKS, HARMLESS, Attack, NotApplicable
from tests.hostile.world import BAD, METHODS, Edit, Spoil, World, failed, honest

CLIENTS = 6


def attacked(round: int) -> tuple[Spoil, Edit | None]:
    """One attack in each round; where a method sends nothing of the kind, the client fails."""
    attack = ATTACKS[round - 1]

    def spoil(job: TrainJob, update: Update) -> Sequence[Result]:
        try:
            return attack.spoil(job, update)
        except NotApplicable:
            return failed(job, update)

    return spoil, attack.edit


@pytest.mark.parametrize("method", METHODS)
def test_a_hostile_reply_costs_its_client_alone(method: str, tmp_path: Path) -> None:
    """The run is broken off half-way: it goes on from its checkpoint and decides the same."""
    world = World(METHODS[method](), tmp_path / "attacked", attacked)
    world.play(len(ATTACKS) // 2).play(len(ATTACKS))
    without = World(METHODS[method](), tmp_path / "failed", lambda _: (failed, None))
    without.play(len(ATTACKS))
    for round, attack in enumerate(ATTACKS, 1):
        check(attack, world.rows(round))
        said = [line for line in world.said if line.startswith(f"round {round}: client {BAD} ")]
        assert len(said) == 1, attack.name
        assert world.hashes[round - 1] == without.hashes[round - 1], attack.name


def check(attack: Attack, rows: dict[int, dict[str, object]]) -> None:
    """The round's records name the client, and no other has failed."""
    assert sorted(rows) == list(range(CLIENTS)), attack.name
    assert [i for i, r in rows.items() if "failure" in r] == [BAD], attack.name
    message = str(rows[BAD]["message"])
    assert len(message) <= 1000, attack.name
    assert message.isprintable(), attack.name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attack", HARMLESS)
def test_what_harms_nobody_changes_nothing(attack: str, method: str, tmp_path: Path) -> None:
    world = World(METHODS[method](), tmp_path / "a", lambda _: (HARMLESS[attack], None)).play(2)
    without = World(METHODS[method](), tmp_path / "b").play(2)
    assert world.hashes == without.hashes
    assert not any("failure" in row for row in world.rows(2).values())


class Stale(World):
    """The hostile client answers every round with the content of its first reply."""

    first: Message | None = None

    def answer(self, message: Message) -> Message:
        reply = super().answer(message)
        if [j.client.id for j in decode_jobs(message.content).jobs] != [BAD]:
            return reply
        self.first = self.first or reply
        return Message(self.first.content, reply_to=message)


@pytest.mark.parametrize("method", METHODS)
def test_a_reply_of_another_round_is_not_averaged(method: str, tmp_path: Path) -> None:
    alone = {"clients_per_message": 1}
    stale = Stale(METHODS[method](), tmp_path / "stale", options=alone).play(3)
    without = World(
        METHODS[method](),
        tmp_path / "failed",
        lambda round: (honest if round == 1 else failed, None),
        options=alone,
    ).play(3)
    assert stale.hashes == without.hashes
    assert "answers another message" in stale.rows(2)[BAD]["message"]
