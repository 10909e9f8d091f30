"""Stages in a row are the whole model, and each holds its own part of it and nothing else."""

import hashlib

import pytest
import torch

from fedlora.core.errors import ModelError
from fedlora.core.types import LocalPlan, Module
from fedlora.data.batches import Batch
from fedlora.models.forward import supervised_logits
from fedlora.models.language_model import LanguageModel
from fedlora.models.stages import Span, Stage, Stages, block_of, blocks_of, check_stages
from fedlora.split.protocol import Cut, Terms
from tests.fedlora.engine.world import SEED
from tests.fedlora.models.families import FAMILIES, family
from tests.fedlora.models.networks import VOCABULARY, adapter, wrap
from tests.fedlora.split.world import MODELS, Federation, start

BLOCKS = 2
ROWS = [
    [Span(0, c, embeds=True), Span(c, last), Span(last, BLOCKS, heads=True)]
    for c in range(BLOCKS + 1)
    for last in range(c, BLOCKS + 1)
] + [[Span(0, c, embeds=True), Span(c, BLOCKS, heads=True)] for c in range(BLOCKS + 1)]
"""All ways to cut two blocks, between two parties and with a U-shape."""
IDS = torch.randint(0, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.tensor([0, 1, 5, 9, 10, 12, 20, 21])


def through(stages: list[Stage]) -> torch.Tensor:
    x = IDS
    for stage in stages:
        x = stage.logits(x, POSITIONS) if stage.span.heads else stage.hidden(x)
    return x


def hooks(model: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.network.modules())


def parameters(network: torch.nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in network.named_parameters()}


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"llama4_text"}))
def test_stages_in_a_row_are_the_whole_and_share_nothing(name: str) -> None:
    """For every cut: logits bit by bit, adapters mounted; every weight in one stage, but for an
    output embedding that is the input embedding too."""
    model = wrap(family(name))
    network = model.network
    model.mount(adapter(model.info.modules, 2, dtype=torch.float32))
    with torch.no_grad():
        whole = supervised_logits(network, Batch(IDS, POSITIONS, POSITIONS))
    made, before = Stages(model), hooks(model)
    all_, head = parameters(network), id(network.get_output_embeddings().weight)
    for spans in ROWS:
        stages = [made[span] for span in spans]
        with torch.no_grad():
            assert torch.equal(through(stages), whole), spans
        held = [parameters(stage.network) for stage in stages]
        assert set().union(*held) == set(all_), spans
        for i, mine in enumerate(held):
            for other in held[:i]:
                assert mine.keys() & other.keys() <= {head}, spans
            blocks = {block_of(all_[p]) for p in mine} - {None}
            assert blocks == set(range(spans[i].start, spans[i].stop))
            assert (head in mine) == spans[i].heads or all_[head] != "lm_head.weight"
        assert [p for s in stages for p in s.layers] == list(model.layers)
    assert hooks(model) == before
    model.unmount()
    check_stages(model, [made[span] for span in ROWS[0]])


def test_an_architecture_without_a_base_model_is_refused() -> None:
    with pytest.raises(ModelError, match="Llama4ForCausalLM cannot be cut: it has no base model"):
        Stages(wrap(family("llama4_text")))


def test_an_architecture_that_uses_its_blocks_otherwise_is_refused() -> None:
    """What the stages compute is compared with the whole, not trusted."""
    model = wrap(family("llama"))
    stages = Stages(model)
    both = [stages[Span(0, 1, embeds=True)], stages[Span(0, BLOCKS, heads=True)]]  # one twice
    with pytest.raises(ModelError, match="stages in a row differ from the whole by"):
        check_stages(model, both)


@pytest.mark.parametrize("span", [Span(0, 3), Span(2, 1), Span(-1, 2)])
def test_a_span_outside_the_model_is_refused(span: Span) -> None:
    with pytest.raises(ModelError, match=r"does not lie inside random.*a cut is in 0\.\.2"):
        Stage(wrap(family("llama")), span)


def test_parties_that_overlap_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot hold the first 2 and the last 1 blocks"):
        Stages(wrap(family("llama"))).check_order(2, 1)


def test_an_adapter_outside_the_blocks_is_refused() -> None:
    inside = Module("model.layers.1.mlp.up_proj", "mlp", 4, 4)
    assert blocks_of([inside]) == {inside.path: 1}
    with pytest.raises(ModelError, match=r"model\.project lies outside the model's blocks"):
        blocks_of([inside, Module("model.project", "mlp", 4, 4)])


@pytest.mark.parametrize("cut", [Cut(2), Cut(1, 1)], ids=["two parties", "U-shape"])
@pytest.mark.parametrize("name", MODELS)
def test_training_changes_no_byte_of_the_base(name: str, cut: Cut) -> None:
    model = MODELS[name](double=False)
    before = digest(model)
    plan = LocalPlan(lr=0.1, steps=3, batch_size=2, dropout=0.1)
    f = Federation(
        model, plan, start(model), clients=(0, 1), cuts={0: cut, 1: cut}, terms=Terms(SEED)
    )
    f.play()
    assert digest(model) == before
    assert all(layer.update is None for layer in model.layers.values())
    assert not any(p.requires_grad or p.grad is not None for p in model.network.parameters())


def digest(model: LanguageModel) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.base_state().items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()
