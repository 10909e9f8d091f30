"""Silos as people run them: SuperLink and SuperNodes as processes, TLS, node authentication.

    pytest -n0 -m deploy tests/deploy

Minutes each: every message to a silo starts a process that imports PyTorch.
"""

import time

import pytest

from fedlora.run.tracking import read_jsonl
from simulations.bench.loopback import Loopback, words_of
from simulations.tools.keys import write_keys
from tests.deploy.relay import Relay
from tests.simulations.app.leaks import leaks, secrets_of
from tests.simulations.app.silos import RANKS, WORDS, simulate, write_cards, write_records

pytestmark = pytest.mark.deploy
PATIENCE_S = 900.0
"""Two minutes of work on an idle machine of two cores."""


def caches(folder, cards):
    """A cache of its own for every silo, as on machines of their own."""
    for name, card in cards.items():
        sign = " =" if card.suffix == ".toml" else ":"
        card.write_text(card.read_text() + f'cache{sign} "{folder}/cache-{name}"\n')
    return cards


def words(folder, *more):
    return words_of([*WORDS, f"output_dir={folder}/out", "name=silos", "runtime.silos=3", *more])


def rounds(folder):
    return [r for r in read_jsonl(folder / "out/silos/metrics.jsonl") if r["kind"] == "round"]


def clients(folder, round):
    rows = read_jsonl(folder / "out/silos/clients.jsonl")
    return {r["tier"]: r for r in rows if r["round"] == round}


def test_tls_authentication_and_a_silo_that_is_killed_and_restarted(tmp_path):
    """Round 1 is that of the simulation; in round 2 a silo is killed, in the last it is back."""
    data = write_records(tmp_path / "data")
    cards = caches(tmp_path, write_cards(tmp_path, data))
    write_keys(tmp_path / "keys", ["127.0.0.1"], [*RANKS, "stranger"])
    with Loopback(tmp_path, keys=tmp_path / "keys") as deployed:
        for name in RANKS:
            deployed.register(name)
            deployed.start_node(name, cards[name])
        deployed.start_node("stranger", cards["alba"])  # another key, the name of a silo
        run = deployed.submit(words(tmp_path, "rounds=6"))
        killed = restarted = 0

        def meanwhile():
            nonlocal killed, restarted
            done = len(rounds(tmp_path)) if (tmp_path / "out/silos/metrics.jsonl").exists() else 0
            if done >= 1 and not killed:
                time.sleep(4)  # it has its message by then
                deployed.kill_node("bern")
                killed = done + 1
            # while its heartbeat has not run out, the SuperLink refuses it: as a service manager
            # would, start it again until it stays
            if killed and done >= killed and not deployed.alive("bern"):
                restarted += 1
                deployed.start_node("bern", cards["bern"])

        status = deployed.wait(run, PATIENCE_S, meanwhile)
        log = deployed.log(run)
        assert status == "finished:completed", log[-4000:]
        assert not deployed.alive("stranger"), "an unregistered key was let in"
    done = rounds(tmp_path)
    same = simulate(tmp_path / "sim", data, "rounds=1")
    assert done[0]["state/hash"] == same.hash
    assert "failure" in clients(tmp_path, killed)["bern"]
    assert restarted
    last = clients(tmp_path, len(done))
    assert "failure" not in last["bern"], log[-4000:]
    assert {r["client"] for r in read_jsonl(tmp_path / "out/silos/clients.jsonl")} == {0, 1, 2}
    assert last["bern"]["client"] == 1
    assert len(done) == 6
    assert (tmp_path / "out/silos/adapter").is_dir()


def test_no_byte_that_the_server_receives_is_of_a_record(tmp_path):
    """Without TLS, so that the bytes can be read: all that SuperNodes send, through a relay, and
    all that the SuperLink has stored."""
    data = write_records(tmp_path / "data")
    cards = caches(tmp_path, write_cards(tmp_path, data))
    more = ("rounds=1", "evaluate=loss", "evaluate.groups=[seen]", "evaluate.clients=0")
    with Loopback(tmp_path) as deployed:
        relay = Relay(deployed.port)
        for name in RANKS:
            deployed.start_node(name, cards[name], relay.port)
        run = deployed.submit(words(tmp_path, *more, "evaluate.first=false"))
        status = deployed.wait(run, PATIENCE_S)
        log = deployed.log(run)
        assert status == "finished:completed", log[-4000:]
        relay.close()
    stored = [p.read_bytes() for p in tmp_path.glob("state.db*")]
    sent = sum(len(b) for b in relay.received)
    assert sent > 3 * 100_000, "the adapters are not among them: the relay misses bytes"
    received = b"\0\0".join(bytes(b) for b in relay.received)
    for name in RANKS:
        hidden = secrets_of(data / f"{name}.jsonl")
        for blob in (received, *stored):
            assert not leaks(blob, hidden)
    assert rounds(tmp_path)[0]["state/hash"] == simulate(tmp_path / "sim", data, "rounds=1").hash


def test_a_secure_sum_over_tls_is_the_simulated_one(tmp_path):
    """Each stage is a process of its own at a silo: secrets live in its node's state."""
    data = write_records(tmp_path / "data")
    cards = caches(tmp_path, write_cards(tmp_path, data))
    write_keys(tmp_path / "keys", ["127.0.0.1"], [*RANKS])
    with Loopback(tmp_path, keys=tmp_path / "keys") as deployed:
        for name in RANKS:
            deployed.register(name)
            deployed.start_node(name, cards[name])
        run = deployed.submit(words(tmp_path, "rounds=1", "strategy=ffa", "secagg=real"))
        status = deployed.wait(run, PATIENCE_S)
        log = deployed.log(run)
        assert status == "finished:completed", log[-4000:]
    (done,) = rounds(tmp_path)
    assert done["secagg/clients"] == 3
    same = simulate(tmp_path / "sim", data, "rounds=1", "strategy=ffa", "secagg=simulated")
    assert done["state/hash"] == same.hash


def test_silos_train_with_noise_of_their_own_and_the_server_says_each_ones_epsilon(tmp_path):
    """The clip and the noise of `privacy=example` reach silos, which do not draw from the seed: the
    state is not that of the simulation, whose accounts it has."""
    data = write_records(tmp_path / "data")
    cards = caches(tmp_path, write_cards(tmp_path, data))
    private = ("rounds=1", "privacy=example", "privacy.epsilon=0", "privacy.sigma=2.0")
    with Loopback(tmp_path) as deployed:
        for name in RANKS:
            deployed.start_node(name, cards[name])
        run = deployed.submit(words(tmp_path, *private))
        status = deployed.wait(run, PATIENCE_S)
        log = deployed.log(run)
        assert status == "finished:completed", log[-4000:]
    (done,) = rounds(tmp_path)
    same = simulate(tmp_path / "sim", data, *private)
    assert done["privacy/epsilon"] == same.rounds[0]["privacy/epsilon"] > 0
    assert done["state/hash"] != same.hash
    assert not any("failure" in row for row in clients(tmp_path, 1).values())
    (line,) = [s for s in log.splitlines() if "epsilon of each, at most:" in s]
    for name in RANKS:
        assert f"{name} " in line
    assert f"{done['privacy/epsilon']:.4g} (" in line
    assert "privacy=example: epsilon at most" in log


def test_what_a_silo_keeps_outlives_its_processes(tmp_path):
    """Each round is a process of its own at a silo: starts compressed as changes of what it was
    sent, and rounding errors fed back, are read from its files."""
    data = write_records(tmp_path / "data")
    cards = caches(tmp_path, write_cards(tmp_path, data))
    small = ("rounds=3", "compression=int4", "compression.error_feedback=true")
    with Loopback(tmp_path) as deployed:
        for name in RANKS:
            deployed.start_node(name, cards[name])
        run = deployed.submit(words(tmp_path, *small))
        status = deployed.wait(run, PATIENCE_S)
        log = deployed.log(run)
        assert status == "finished:completed", log[-4000:]
    same = simulate(tmp_path / "sim", data, *small)
    for one, other in zip(rounds(tmp_path), same.rounds, strict=True):
        for key in ("state/hash", "wire/up_bytes", "wire/down_bytes"):
            assert one[key] == other[key]
    for name in RANKS:
        kept = (tmp_path / f"cache-{name}").glob(f"silo_memory/{name}/*/*.memory")
        assert sorted(file.name for file in kept) == [f"0000{r}.memory" for r in (1, 2, 3)]
