"""A pruned model as configuration: made once, whole, and refused when its zeros have moved."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedlora.core.cache import cache_root
from fedlora.core.config import build, describe
from fedlora.core.errors import ModelError
from fedlora.data.jsonl import Jsonl
from fedlora.data.store import TokenStore, prepare
from fedlora.models.export import merge
from fedlora.models.masks import (
    density,
    identity,
    load_masks,
)
from fedlora.models.spec import HuggingFace, ModelSpec, Tiny, TinyGPT2
from fedlora.prune.prune import Pruning, prune
from fedlora.prune.spec import (
    Pruned,
    calibration_traffic,
    prune_federated,
)
from tests.fedlora.models.networks import NETWORKS, wrap
from tests.fedlora.prune import plain_wanda
from tests.fedlora.prune.text import batches

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> Pruned:
    """Calibrated by two of three clients."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    words = "the people of these states have by their free choice made laws for peace and trade"
    rows = [
        {"client": str(k), "instruction": words, "output": " ".join(words.split()[k + i :])}
        for k in range(3)
        for i in range(8)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    source = Jsonl(path=str(path), key="client")
    return Pruned(pattern="2:4", calibration=source, clients=2, samples=1, length=64)


def test_it_is_made_once_and_is_what_it_says(spec):
    folder = spec.folder()
    made = (folder / "pruning.json").stat().st_mtime_ns
    resolved = spec.resolved()
    assert spec.folder() == resolved.folder() == folder
    assert (folder / "pruning.json").stat().st_mtime_ns == made
    about = json.loads((folder / "pruning.json").read_text())
    assert about["density"] == 0.5
    # One sum for the input of q, k and v, one for the input of gate and up.
    own = [m.d_in for m in spec.describe().modules if m.path.endswith(("q_proj", "o_proj"))]
    own += [m.d_in for m in spec.describe().modules if m.path.endswith(("gate_proj", "down_proj"))]
    floats = sum(own) + len(own)
    assert (about["exchanges"], about["floats_per_client"]) == (1, floats)
    assert calibration_traffic(folder) == {
        "calibration/clients": 2,
        "calibration/exchanges": 1,
        "calibration/up_bytes": 2 * 8 * floats,
        "calibration/down_bytes": 0,
    }
    assert len(about["calibration_clients"]) == 2
    model = resolved.load(CPU)
    masks = load_masks(folder)
    assert model.info.mask == about["mask"] == identity(masks)
    assert set(masks) == set(model.layers)
    assert model.info.mask == HuggingFace(path=str(folder)).describe().mask
    assert build(json.loads(json.dumps(describe(resolved))), ModelSpec, "model") == resolved
    assert Tiny().describe().mask == ""
    other = replace(spec, pattern="0.5")
    assert other.folder() != folder


@pytest.mark.parametrize("sequential", [False, True])
def test_the_folder_holds_what_plain_wanda_leaves(spec, sequential):
    """End to end: the first tokens of the calibrating clients' training text, through the plain
    base model."""
    folder = replace(spec, sequential=sequential).folder()
    about = json.loads((folder / "pruning.json").read_text())
    base = Tiny()
    plain = AutoModelForCausalLM.from_pretrained(base.folder(), dtype=torch.float32).eval()
    store = TokenStore(
        prepare(spec.calibration, base.tokenizer(), base.tokenizer_id(), cache_root())
    )
    texts = [_calibration_text(store, c, spec.length) for c in about["calibration_clients"]]
    blocks = [f"model.layers.{i}" for i in range(plain.config.num_hidden_layers)]
    judged = plain_wanda.masks(plain, texts, group=(2, 4), blocks=blocks if sequential else ())
    assert {p: m.tolist() for p, m in load_masks(folder).items()} == {
        p: m.tolist() for p, m in judged.items()
    }
    stored = load_file(folder / "model.safetensors")
    for path in judged:
        assert torch.equal(stored[f"{path}.weight"], plain.get_submodule(path).weight), path


def _calibration_text(store: TokenStore, client: int, length: int) -> torch.Tensor:
    """The first tokens of a client's training examples end to end, ``[1, length]``."""
    tokens = [int(t) for e in store.examples(client, "train") for t in e.input_ids]
    return torch.tensor([tokens[:length]])


def test_a_kept_weight_is_the_bases_own(spec):
    base, model = Tiny().load(CPU), spec.load(CPU)
    for path, mask in load_masks(spec.folder()).items():
        kept = model.layers[path].base.weight
        assert torch.equal(kept, base.layers[path].base.weight * mask)


def test_zeros_that_moved_are_refused(spec, tmp_path):
    folder = tmp_path / "model"
    merge(spec.load(CPU), None, folder)
    (folder / "masks.safetensors").write_bytes((spec.folder() / "masks.safetensors").read_bytes())
    HuggingFace(path=str(folder)).load(CPU)
    state = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    state[name][3] = state[name][3].roll(1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"zeros of model.layers.1.mlp.up_proj are not where its"):
        HuggingFace(path=str(folder)).load(CPU)


def test_what_cannot_be_calibrated_is_refused(spec):
    with pytest.raises(
        ModelError, match=r"asks 2 clients for 900 sequences of 64 tokens, and 0 of 3 hold"
    ):
        replace(spec, samples=900).folder()
    with pytest.raises(ValueError, match=r"model.method=wanda needs text"):
        Pruned()
    with pytest.raises(ValueError, match=r"pattern='4:2' must be the fraction"):
        replace(spec, pattern="4:2")
    split = Pruned(TinyGPT2().targets, base=TinyGPT2(split_qkv=True), method="magnitude")
    with pytest.raises(ModelError, match="split_qkv=false"):
        split.folder()
    assert density(load_masks(replace(split, base=TinyGPT2()).folder())) == pytest.approx(0.5)


def test_what_a_base_is_asked_for_in_vain_is_refused():
    with pytest.raises(
        ValueError, match=r"model.base.targets=\[q_proj\] says nothing: .* set that"
    ):
        Pruned(base=Tiny(["q_proj"]), method="magnitude")
    Pruned(["q_proj"], base=Tiny(["q_proj"]), method="magnitude")
    with pytest.raises(ValueError, match=r"base.quantization=int8: quantised weights cannot"):
        Pruned(base=HuggingFace(path="x", quantization="int8"), method="magnitude")
    with pytest.raises(ValueError, match=r"pattern='0' must be the fraction .* in \(0, 1\)"):
        Pruned(method="magnitude", pattern="0")
    with pytest.raises(
        ModelError, match=r"pattern=1e-9 leaves .* without a zero \(28 of 28 layers"
    ):
        Pruned(method="magnitude", pattern="1e-9").folder()


def test_a_folder_says_itself_how_it_was_pruned(tmp_path):
    made = Pruned(method="magnitude", pattern="2:8")
    assert Pruned(path=str(made.folder()), method="magnitude").name == "tiny-magnitude-2of8"
    assert made.resolved().name == made.name
    assert Pruned(path=str(tmp_path / "unknown"), method="magnitude").name == "unknown"


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("sequential", [False, True])
def test_clients_say_what_all_their_text_would_have_said(method, sequential):
    """S-F3, all at once and block after block."""
    texts = batches(6)
    pruning = Pruning(method, "0.5", sequential)
    one, other = (wrap(NETWORKS["llama"]().double()) for _ in range(2))
    central = prune(one.network, list(one.layers), pruning, texts)
    federated, about = prune_federated(other, pruning, [texts[:1], texts[1:4], texts[4:]])
    assert identity(central) == identity(federated)
    assert about["exchanges"] == (2 if sequential else 1)
    # Two blocks of a gram or a sum, and a count, of each of four inputs.
    widths = 2 * [16, 16, 16, 20]
    numbers = sum(d * d if method == "sparsegpt" else 0 for d in widths) + sum(widths) + 8
    assert about["floats_per_client"] == numbers
    assert about["up_bytes_per_client"] == 8 * numbers
    # In between clients are told of the first block: 1792 bits, and of SparseGPT half the weights.
    first = [m for p, m in federated.items() if ".layers.0." in p]
    weights = sum(m.numel() for m in first)
    told = weights // 8 + (8 * sum(int(m.sum()) for m in first) if method == "sparsegpt" else 0)
    assert about["down_bytes_per_client"] == (told if sequential else 0)


@pytest.mark.slow
def test_wanda_loses_less_than_magnitude(spec):
    """W4, on the tiny model: loss on later addresses with 2 of 4 weights. At 50 % without groups
    the two differ by a hundredth of the perplexity, and magnitude is ahead (docs/spp.md)."""
    from fedlora.data.sotu import Sotu
    from simulations.bench.sparse import loss_of, texts_of

    texts = texts_of(Tiny())
    wanda = replace(spec, calibration=Sotu(clients=400), clients=8, length=128)
    magnitude = Pruned(method="magnitude", pattern="2:4")
    dense, by_wanda, by_size = (loss_of(s.load(CPU), texts) for s in (Tiny(), wanda, magnitude))
    assert dense < by_wanda < by_size
