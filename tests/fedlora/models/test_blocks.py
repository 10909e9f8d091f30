"""``model.layers``: adapters in some blocks alone, as PEFT's ``layers_to_transform``."""

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedlora.core.config import build, describe
from fedlora.core.errors import ConfigError, ModelError
from fedlora.models.blocks import find_blocks
from fedlora.models.export import save
from fedlora.models.modules import find_modules
from fedlora.models.spec import HuggingFace, ModelSpec, Tiny
from fedlora.prune.spec import Pruned
from tests.fedlora.models.families import FAMILIES, family
from tests.fedlora.models.networks import adapter, gpt2, llama, logits, tokenizer

EXPERTS = {"mixtral", "qwen3_moe", "qwen3_next", "olmoe"}
"""PEFT adapts their experts too, which are no linear layers."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[llama, gpt2])
def saved(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / request.param.__name__
    request.param(layers=3).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - EXPERTS))
def test_the_layers_of_a_block_are_those_of_peft(name):
    path, blocks = find_blocks(family(name))
    ours = {m.path for m in find_modules(family(name), "all-linear", [1])}
    theirs = peft.get_peft_model(
        family(name),
        peft.LoraConfig(
            r=2,
            target_modules=sorted({p.rpartition(".")[2] for p in ours}),
            layers_to_transform=[1],
            layers_pattern=path.rpartition(".")[2],
        ),
    )
    paths = {
        p.removeprefix("base_model.model.")
        for p, layer in theirs.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert len(blocks) == 2
    assert ours == {p for p in paths if not p.endswith(".router")}
    assert ours < {m.path for m in find_modules(family(name), "all-linear")}


def test_the_top_and_a_list_name_the_same_blocks(saved):
    def described(layers):
        return HuggingFace(path=str(saved), layers=layers).describe()

    every = described("all")
    assert (every.blocks, every.adapted, every.frozen_blocks) == (3, (0, 1, 2), 0)
    top = described("top:2")
    assert top == described([2, 1]) == described((1, 2))
    assert (top.blocks, top.adapted, top.frozen_blocks) == (3, (1, 2), 1)
    assert described("top:3") == every
    assert described([0, 2]).frozen_blocks == 0
    assert {m.path for m in top.modules} < {m.path for m in every.modules}


def test_a_model_with_some_adapted_blocks_travels_and_loads(saved):
    spec = build(describe(HuggingFace(path=str(saved), layers=(2,))), ModelSpec, "model")
    model = spec.load(CPU)
    assert model.info.adapted == (2,)
    assert list(model.layers) == [m.path for m in model.info.modules]


def test_plain_peft_reads_the_adapter_of_some_blocks(saved, tmp_path):
    """Layers of other blocks are named by nothing: the logits are those of ours."""
    model = HuggingFace(path=str(saved), layers="top:1", dtype="float32").load(CPU)
    payload = adapter(model.info.modules, 2, dtype=torch.float32)
    save(payload, model.info, tmp_path / "adapter")
    model.mount(payload)
    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits(model.network), logits(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "layers", ["top:0", "top:", "bottom:1", "", 1, None, [], [-1], ["a"], [0.5], [True], [[1]]]
)
def test_what_is_no_choice_of_blocks_is_refused(layers):
    with pytest.raises(ValueError, match=r"model\.layers=.* must be all, top:k .*or a list"):
        Tiny(layers=layers)


def test_a_block_is_named_once():
    with pytest.raises(ValueError, match=r"model\.layers=\[1, 2, 1\] names block 1 twice"):
        Tiny(layers=[1, 2, 1])


def test_blocks_that_the_model_lacks_are_refused(saved):
    with pytest.raises(ConfigError, match=r"model\.layers=top:4: .* has 3 blocks; k is in 1\.\.3"):
        HuggingFace(path=str(saved), layers="top:4").describe()
    with pytest.raises(ConfigError, match=r"\[1, 3\]: .* no block 3; its 3 blocks are 0\.\.2"):
        HuggingFace(path=str(saved), layers=[1, 3]).describe()


def test_a_target_outside_the_chosen_blocks_is_refused(saved):
    inside = HuggingFace(path=str(saved)).describe().modules[0].path
    with pytest.raises(ConfigError, match=r"model\.targets: .* in the blocks of model\.layers=top"):
        HuggingFace(path=str(saved), layers="top:1", targets=[inside]).describe()


def test_a_network_whose_blocks_cannot_be_found_carries_adapters_in_all_of_it():
    network = llama()
    network.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match=r"top:1: .* no list of num_hidden_layers=7 .*layers=all"):
        find_modules(network, "all-linear", "top:1")
    assert find_modules(network, "all-linear")


def test_pruning_covers_all_blocks():
    with pytest.raises(ValueError, match=r"model\.base\.layers=top:1 says nothing"):
        Pruned(base=Tiny(layers="top:1"), method="magnitude")
    with pytest.raises(ConfigError, match=r"model\.layers='top:0'"):
        build(describe(Tiny()) | {"layers": "top:0"}, ModelSpec, "model")
