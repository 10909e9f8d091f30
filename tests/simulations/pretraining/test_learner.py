"""Pre-training by factors: every method learns, resumes bit by bit, and exports a plain network."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedlora.core.errors import RunFolderError
from fedlora.techniques.switchlora.init import SIDES
from simulations.pretraining import learner, pretrain
from simulations.pretraining.learner import Method
from simulations.pretraining.recipe import build_model
from tests.simulations.pretraining.test_pretrain import SMALL, documents  # noqa: F401

SWITCH = Method("switchlora", rank=4, interval=4.0, ratio=10.0, freeze=2)
FACTORS = [
    SWITCH,
    Method("lora", rank=4),
    Method("relora", rank=4, merge_every=2, merge_warmup=1),
    replace(SWITCH, full_steps=2),
]
NAMES = [f"{m.method}{m.full_steps or ''}" for m in FACTORS]
RECIPE = replace(SMALL, lr=1e-2, decay=0.0)


@pytest.mark.parametrize("method", FACTORS, ids=NAMES)
def test_an_interrupted_run_ends_like_a_whole_one(
    method: Method, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request.getfixturevalue("documents")
    whole = pretrain.pretrain(RECIPE, tmp_path / "whole", "whole", method=method)
    step = pretrain.train_step

    def interrupted(*given: object) -> float:
        if given[2] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "train_step", interrupted)
        with pytest.raises(SystemExit, match="stopped"):
            pretrain.pretrain(RECIPE, tmp_path / "parts", "parts", method=method)
    parts = pretrain.pretrain(RECIPE, tmp_path / "parts", "parts", method=method)
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for key in ("held_out", "curve", "update_rank", "trained_parameters"):
        assert whole[key] == parts[key], key
    assert whole["method"]["rank"] == 4


@pytest.mark.parametrize("method", FACTORS, ids=NAMES)
def test_what_is_exported_computes_what_was_trained(method: Method) -> None:
    start = build_model(RECIPE).eval()
    trained = learner.learner(build_model(RECIPE), RECIPE, method)
    ids = torch.arange(24).view(2, 12)
    if method.method != "full":
        with torch.no_grad():
            difference = start(input_ids=ids).logits - trained.network(input_ids=ids).logits
        assert float(difference.abs().max()) < 1e-5
    blocks = [torch.randint(3, 300, (64,)).numpy().astype("uint16") for _ in range(6)]
    for t, block in enumerate(blocks):
        pretrain.train_step(trained, block, t, RECIPE)
    plain = trained.exported()
    assert not any("lora" in name for name, _ in plain.named_parameters())
    with torch.no_grad():
        difference = plain(input_ids=ids).logits - trained.network(input_ids=ids).logits
    assert float(difference.abs().max()) < 1e-5
    for path, weight in trained.effective().items():
        torch.testing.assert_close(plain.get_submodule(path).weight, weight)


def test_a_merge_changes_nothing_but_where_things_are() -> None:
    method = Method("relora", rank=3, merge_every=4, merge_warmup=2)
    trained = learner.learner(build_model(RECIPE), RECIPE, method)
    block = torch.randint(3, 300, (64,)).numpy().astype("uint16")
    for t in range(3):
        pretrain.train_step(trained, block, t, RECIPE)
    before = {p: w.clone() for p, w in trained.effective().items()}
    trained.after_step(3)
    for path, weight in trained.effective().items():
        torch.testing.assert_close(weight, before[path], rtol=0, atol=1e-6)
    assert [trained.rate(t) for t in (0, 3, 4, 5, 6)] == [1.0, 1.0, 0.5, 1.0, 1.0]
    assert isinstance(trained, learner.ReLoRA)
    for layer in trained.adapted.layers.values():
        assert not layer.lora_B["default"].weight.any()
        assert not trained.optimizer.state[layer.lora_A["default"].weight]["step"].any()


def test_numbers_trained_are_counted_and_ranks_follow() -> None:
    long = replace(RECIPE, tokens=40 * 64)
    found = {}
    for method in (Method(), Method("lora", rank=2), replace(SWITCH, rank=2)):
        trained = learner.learner(build_model(long), long, method)
        for t in range(40):
            block = torch.randint(3, 300, (64,)).numpy().astype("uint16")
            pretrain.train_step(trained, block, t, long)
        found[method.method] = trained.report()
    rest = 300 * 16 + 3 * 16
    factors = 2 * (4 * 2 * 16 + 3 * 2 * 16)
    assert found["lora"]["trained_parameters"] == rest + factors
    assert found["switchlora"]["trained_parameters"] == rest + factors
    assert found["full"]["trained_parameters"] == rest + 7 * 16 * 16
    assert found["lora"]["update_rank"]["largest"] <= 2
    assert found["switchlora"]["update_rank"]["smallest"] > 4
    assert found["switchlora"]["pool_floats"] == 7 * 16 * 32


def test_the_first_steps_may_train_the_layers_themselves() -> None:
    method = replace(SWITCH, full_steps=2)
    trained = learner.learner(build_model(RECIPE), RECIPE, method)
    assert isinstance(trained, learner.SwitchLoRA)
    layers = trained.controller.layers.values()
    block = torch.randint(3, 300, (64,)).numpy().astype("uint16")
    for t in range(4):
        before = [(x.weight.clone(), x.a.detach().clone()) for x in layers]
        exchanged = trained.controller.exchanged
        pretrain.train_step(trained, block, t, RECIPE)
        for (w, a), x in zip(before, layers, strict=True):
            assert torch.equal(a, x.a.detach()) == (t < 2)
            if trained.controller.exchanged == exchanged:
                assert torch.equal(w, x.weight) == (t >= 2)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (["method=switchlora", "--rank", "1"], "rank 1 cannot switch"),
        (["method=switchlora", "--rank", "16"], "rank 16 cannot switch.*2..15"),
        (["method=switchlora", "--interval", "8"], "interval=8 is less than twice"),
        (["method=relora", "--merge-every", "0"], "merge_every=0 must be >= 1"),
        (["method=lora", "--alpha", "0"], "alpha=0.0 must be a number > 0"),
        (["method=lora", "--full-steps", "2"], "full_steps=2 leaves none of the run's 2 steps"),
        (["--save-every", "0"], "--save-every 0 must be >= 1"),
        (["method=switchlora", "--choice", "best"], "2"),  # argparse says the rest
    ],
)
def test_impossible_methods_are_refused_before_text_is_read(
    wrong: list[str], why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pretrain, "build_text", lambda recipe: pytest.fail("text was read"))
    sizes = "--hidden 16 --intermediate 16 --layers 1 --heads 2 --positions 32 --batch 4"
    sizes += " --length 16 --vocabulary 300 --tokens 128"
    with pytest.raises(SystemExit, match=why):
        pretrain.main([*wrong, "--output", str(tmp_path / "out"), *sizes.split()])


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    trained = learner.learner(build_model(RECIPE), RECIPE, SWITCH)
    next(iter(trained.network.parameters())).data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="at step 0: lower --lr"):
        pretrain.train_step(trained, torch.zeros(64).numpy().astype("uint16"), 0, RECIPE)


@pytest.mark.parametrize("name", ["lr", "pools"])
def test_what_goes_wrong_later_is_one_sentence(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    request.getfixturevalue("documents")
    sizes = "--hidden 16 --intermediate 16 --layers 1 --heads 2 --positions 32 --batch 4 --rank 4"
    sizes += " --length 16 --vocabulary 300 --tokens 640 --held-out 0.2 --long-every 0 --warmup 1"
    file = tmp_path / "file"
    file.write_text("")
    wrong, why = {
        "lr": (["--lr", "1e30"], "pretrain: loss is nan at step"),
        "pools": (["method=switchlora", "--pools", str(file)], "pretrain: .*file"),
    }[name]
    with pytest.raises(SystemExit, match=why):
        pretrain.main([*wrong, "--output", str(tmp_path / "out"), *sizes.split()])


def test_pools_in_files_belong_to_one_run(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Another seed has other files; the same run a second time is refused; nothing is left."""
    request.getfixturevalue("documents")
    method = replace(SWITCH, pools=str(tmp_path / "pools"))
    with pretrain.own_pools(RECIPE, method) as one:
        with pretrain.own_pools(replace(RECIPE, seed=RECIPE.seed + 1), method) as two:
            assert one.pools != two.pools
        with pytest.raises(RunFolderError), pretrain.own_pools(RECIPE, method):
            pass
    report = pretrain.pretrain(RECIPE, tmp_path / "out", "x", method=method)
    assert report["complete"]
    assert not list((tmp_path / "pools").iterdir())


def test_a_run_s_schedule_is_that_of_its_steps_and_clips_what_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = learner.learner(build_model(RECIPE), RECIPE, SWITCH)
    controller = trained.controller
    assert controller.total == RECIPE.steps
    held, clip = [], torch.nn.utils.clip_grad_norm_

    def watched(parameters, bound):
        for path, layer in controller.layers.items():
            for side in SIDES:
                p = controller.parameters[path][side]
                rows = p.grad if side == "a" else p.grad.t()
                # thawed by one step already: what is still held, and what this step held last
                held.append([bool(rows[i].any()) for i in layer.frozen_slots(side)])
        return clip(parameters, bound)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    block = (torch.arange(64).numpy() % 200).astype("uint16")
    for t in range(6):
        pretrain.train_step(trained, block, t, RECIPE)
    assert sum(map(len, held)) > 10 and not any(map(any, held))


def test_plain_words_name_the_method(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    request.getfixturevalue("documents")
    sizes = "--hidden 16 --intermediate 16 --layers 1 --heads 2 --positions 32 --batch 4 --rank 4"
    sizes += " --length 16 --vocabulary 300 --tokens 128 --held-out 0.2 --long-every 0"
    pretrain.main(["method=switchlora", "--output", str(tmp_path / "out"), *sizes.split()])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.hidden_size == 16
