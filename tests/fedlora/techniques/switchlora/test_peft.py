"""SwitchLoRA on PEFT's layers: I1, I2, I4, I5, I10 to I13 on small networks."""

import copy
import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import nn

from fedlora.core.errors import ConfigError
from fedlora.core.seeding import torch_generator
from fedlora.run import checkpoint
from fedlora.techniques.switchlora.init import SIDES
from fedlora.techniques.switchlora.optimizer import RowAdamW
from fedlora.techniques.switchlora.peft import (
    adapt,
    pretraining,
    wrap_network,
)
from fedlora.techniques.switchlora.schedule import Switching
from tests.fedlora.engine.world import exact
from tests.fedlora.models.networks import VOCABULARY, gpt2, llama

OFTEN = Switching(interval=4.0, ratio=10.0, freeze=2)
NEVER = Switching(interval=1e12)
KINDS = ["llama", "gpt2"]
CHOICES = ["ring", "random"]


def network(kind: str, dtype: torch.dtype = torch.float64):
    made = llama() if kind == "llama" else gpt2()
    made.eval()
    return exact(made) if dtype == torch.float64 else made


def batch(t: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 10), generator=torch_generator(t, "test-batch"))


def logits(of) -> torch.Tensor:
    with torch.no_grad():
        return of(input_ids=batch(99)).logits


class Training:
    """A network under SwitchLoRA and what trains it."""

    def __init__(self, kind: str = "llama", switching: Switching = OFTEN, rank: int = 4, **options):
        base = network(kind, options.pop("dtype", torch.float64))
        self.peft, self.controller = wrap_network(
            base, rank, switching=switching, total=100, seed=1, **options
        )
        pretraining(self.peft)
        rest = [p for n, p in self.peft.named_parameters() if p.requires_grad and "lora_" not in n]
        self.optimizer = RowAdamW(
            [*self.controller.groups(), {"params": rest, "side": None}], lr=5e-3
        )

    def backward(self, t: int) -> None:
        self.optimizer.zero_grad()
        self.peft(input_ids=batch(t), labels=batch(t)).loss.backward()

    def run(self, start: int, stop: int) -> None:
        for t in range(start, stop):
            self.backward(t)
            self.controller.before_step(t, self.optimizer)
            self.optimizer.step()

    def effective(self) -> dict[str, torch.Tensor]:
        return {p: layer.effective().clone() for p, layer in self.controller.layers.items()}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_wrapping_and_exchanges_keep_the_function(kind, dtype, tolerance, choice):
    before = logits(network(kind, dtype))
    training = Training(kind, dataclasses.replace(OFTEN, choice=choice), dtype=dtype)
    assert float((logits(training.peft) - before).abs().max()) < tolerance
    training.run(0, 3)
    before, done = logits(training.peft), training.controller.exchanged
    training.backward(3)
    for t in range(3, 9):
        training.controller.before_step(t, training.optimizer)
    assert training.controller.exchanged > done
    assert float((logits(training.peft) - before).abs().max()) < tolerance


def test_the_next_vectors_are_chosen_as_asked():
    ring, other = (Training(switching=dataclasses.replace(OFTEN, choice=c)) for c in CHOICES)
    for training in (ring, other):
        training.run(0, 6)
    steps: list[set[int]] = []
    for training in (ring, other):
        for layer in training.controller.layers.values():
            ids, at = layer.ids["a"], layer.pointers["a"]
            turn = [*ids[at:], *ids[:at]]  # as they came in
            steps.append({(b - a) % layer.num_candidates for a, b in pairwise(turn)})
    half = len(steps) // 2
    assert all(found == {1} for found in steps[:half])
    assert any(found != {1} for found in steps[half:])


def test_as_many_are_exchanged_as_the_schedule_says():
    """I7 of a run, several vectors a step, rarer and rarer."""
    training = Training(switching=Switching(interval=2.2, ratio=0.5, freeze=0))
    training.backward(0)
    for t in range(100):
        training.controller.before_step(t, training.optimizer)
    means = [4 / 2.2 * 0.3 ** ((t + 1) / 50) for t in range(100)]
    layers = len(training.controller.layers)
    spread = 2 * (layers * sum((m % 1) * (1 - m % 1) for m in means)) ** 0.5
    assert abs(training.controller.exchanged - 2 * layers * sum(means)) < 4 * spread


def test_exactly_the_partners_forget():
    training = Training(switching=Switching(interval=4.0, ratio=10.0, freeze=0))
    training.run(0, 3)
    controller, optimizer = training.controller, training.optimizer
    parameters = [p for both in controller.parameters.values() for p in both.values()]
    before = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]
    pointers = {path: dict(x.pointers) for path, x in controller.layers.items()}
    training.backward(3)
    controller.before_step(3, optimizer)
    at = iter(zip(parameters, before, strict=True))
    for path, layer in controller.layers.items():
        moved = (layer.pointers["a"] - pointers[path]["a"]) % layer.rank
        for side in SIDES:
            p, old = next(at)
            partner = pointers[path]["b" if side == "a" else "a"]
            gone = [(partner + i) % layer.rank for i in range(moved)]
            kept = [i for i in range(layer.rank) if i not in gone]
            for name, t in optimizer.state[p].items():
                now, was = (x if side == "a" else x.t() for x in (t, old[name]))
                assert not now[gone].any(), f"{path} {side} {name}"
                assert torch.equal(now[kept], was[kept]), f"{path} {side} {name}"


def test_planted_fault_a_partner_that_is_not_reset(monkeypatch):
    """The law above is what notices."""
    monkeypatch.setattr(RowAdamW, "reset", lambda *arguments: None)
    with pytest.raises(AssertionError, match=r"q_proj [ab] (step|exp_avg)"):
        test_exactly_the_partners_forget()


@pytest.mark.parametrize("count_frozen", [True, False])
def test_partners_do_not_move_for_as_long_as_they_are_frozen(count_frozen):
    training = Training(
        switching=Switching(interval=12.0, ratio=10.0, freeze=4, count_frozen=count_frozen)
    )
    controller = training.controller
    until: dict[tuple[str, str, int], int] = {}
    moved = still = 0
    for t in range(30):
        training.backward(t)
        pointers = {path: dict(x.pointers) for path, x in controller.layers.items()}
        controller.before_step(t, training.optimizer)
        for path, layer in controller.layers.items():
            for i in range((layer.pointers["a"] - pointers[path]["a"]) % layer.rank):
                until[path, "b", (pointers[path]["a"] + i) % layer.rank] = t + 4
                until[path, "a", (pointers[path]["b"] + i) % layer.rank] = t + 4
        before = {(p, s): x.vectors(s).clone() for p, x in controller.layers.items() for s in SIDES}
        training.optimizer.step()
        for (path, side, slot), end in until.items():
            same = torch.equal(
                before[path, side][slot], controller.layers[path].vectors(side)[slot]
            )
            assert same == (t < end), (path, side, slot, t, end)
            if t < end:
                state = training.optimizer.state[controller.parameters[path][side]]["step"]
                counted = float(state.reshape(-1)[slot])
                assert counted == (t - end + 5 if count_frozen else 0)
            moved, still = moved + (not same), still + same
    assert moved > 10 and still > 10


def test_saved_and_loaded_it_goes_on_bit_by_bit(tmp_path):
    whole, half, rest = (Training(dtype=torch.float32) for _ in range(3))
    whole.run(0, 12)
    half.run(0, 6)
    parts = [half.controller.state_dict(), half.peft.state_dict(), half.optimizer.state_dict()]
    saved = checkpoint.save(tmp_path, 6, checkpoint.pack(parts), keep=1)
    controller, peft, optimizer = checkpoint.unpack(checkpoint.load(saved).state)
    rest.run(20, 23)  # whatever it was before
    rest.peft.load_state_dict(peft)
    rest.controller.load_state_dict(controller)
    rest.optimizer.load_state_dict(optimizer)
    rest.run(6, 12)
    for name, t in whole.controller.state_dict().items():
        assert torch.equal(t, rest.controller.state_dict()[name]), name
    for name, t in whole.peft.state_dict().items():
        assert torch.equal(t, rest.peft.state_dict()[name]), name


def test_updates_add_up_to_more_than_lora_s_rank():
    def ranks(switching: Switching) -> list[int]:
        training = Training(switching=switching, rank=2)
        before = training.effective()
        training.run(0, 40)
        change = training.effective()
        return [int(torch.linalg.matrix_rank(change[p] - w, rtol=1e-9)) for p, w in before.items()]

    assert max(ranks(NEVER)) <= 4
    assert min(ranks(OFTEN)) > 4


def test_without_exchanges_it_is_lora_from_the_same_start():
    training = Training(switching=NEVER)
    plain = copy.deepcopy(training.peft)
    optimizer = torch.optim.AdamW(
        [p for p in plain.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0
    )
    training.run(0, 6)
    assert training.controller.exchanged == 0
    for t in range(6):
        optimizer.zero_grad()
        plain(input_ids=batch(t), labels=batch(t)).loss.backward()
        optimizer.step()
    for p, q in zip(training.peft.parameters(), plain.parameters(), strict=True):
        assert float((p - q).detach().abs().max()) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_is_the_plain_network(kind):
    training = Training(kind)
    training.run(0, 5)
    before, effective = logits(training.peft), training.effective()
    merged = training.peft.merge_and_unload()
    assert float((logits(merged) - before).abs().max()) < 1e-12
    for path, w in effective.items():
        stored = merged.get_submodule(path).weight
        stored = stored if isinstance(merged.get_submodule(path), nn.Linear) else stored.t()
        assert float((stored - w).detach().abs().max()) < 1e-13


def test_pools_can_lie_in_files(tmp_path):
    one, two = Training(dtype=torch.float32), Training(dtype=torch.float32, pools=tmp_path)
    for training in (one, two):
        training.run(0, 8)
    assert len(list(tmp_path.iterdir())) == 2 * len(two.controller.layers)
    for name, t in one.controller.state_dict().items():
        assert torch.equal(t, two.controller.state_dict()[name]), name


@pytest.mark.parametrize(
    ("wrong", "error", "why"),
    [
        ({"rank": 1}, ValueError, "rank 1 cannot switch"),
        ({"rank": 8}, ValueError, "k_proj: rank 8 cannot switch.*choose a rank in 2..7"),
        (
            {"targets": "embed_tokens"},
            ConfigError,
            "'embed_tokens' is the end of no adaptable linear",
        ),
        ({"dtype": torch.bfloat16}, ValueError, "q_proj: the base is torch.bfloat16.*float32"),
    ],
)
def test_what_cannot_switch_is_refused(wrong, error, why):
    base = llama().to(wrong.get("dtype", torch.float32))
    with pytest.raises(error, match=why):
        wrap_network(
            base,
            wrong.get("rank", 4),
            wrong.get("targets", "all-linear"),
            switching=OFTEN,
            total=9,
            seed=0,
        )
    assert not any("lora" in name for name, _ in base.named_modules())


def test_a_state_of_other_layers_is_refused():
    training = Training()
    state = training.controller.state_dict()
    path = next(iter(training.controller.layers))
    partial = {k: t for k, t in state.items() if not k.startswith(path)}
    with pytest.raises(ValueError, match=f"{path} is not in the state"):
        training.controller.load_state_dict(partial)


def test_plain_layers_of_peft_are_there_for_baselines():
    adapted = adapt(llama(), 3, ["q_proj"], 1.0)
    assert len(adapted.layers) == 2
