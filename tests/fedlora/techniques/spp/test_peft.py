"""PEFT computes what we mount, through its own extension points (P10)."""

from dataclasses import replace

import peft
import pytest
import torch

from fedlora.core.errors import ModelError
from fedlora.core.files import RECORD
from fedlora.models.export import merge, save
from fedlora.techniques.lora.peft import CONFIG, load_peft
from fedlora.techniques.spp.peft import (
    SPP,
    load_spp,
    spp_config,
)
from tests.fedlora.models.networks import NETWORKS, logits, tokens
from tests.fedlora.prune.models import (
    LORA_ALPHA,
    pruned,
    scale,
)


def theirs(model, name, folder):
    """The saved adapter on the plain pruned network, loaded by PEFT."""
    network = NETWORKS[name]().double()
    network.load_state_dict(model.base_state())
    config = spp_config(peft.LoraConfig.from_pretrained(folder))
    config.fan_in_fan_out = name == "gpt2"
    return peft.PeftModel.from_pretrained(network, folder, config=config).double().eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_peft_computes_what_we_mounted(name, tmp_path):
    model = pruned(name)
    payload = scale(model)
    model.mount(payload)
    save(payload, model.info, tmp_path, base_name="base", dropout=0.1)
    back = load_spp(tmp_path)
    assert dict(back.blocks) == dict(payload.blocks)
    assert (back.mask, back.lora_alpha) == (payload.mask, LORA_ALPHA)
    for (one, x), (other, y) in zip(payload.tensors(), back.tensors(), strict=True):
        assert one == other
        assert torch.equal(x, y)
    wrapped = theirs(model, name, tmp_path)
    found = logits(wrapped)
    torch.testing.assert_close(found, logits(model.network), rtol=1e-5, atol=1e-6)
    bases = {n: m.base_layer.weight.clone() for n, m in _layers(wrapped)}
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(wrapped), found, rtol=1e-9, atol=1e-9)
    for n, m in _layers(wrapped):
        assert torch.equal(m.base_layer.weight == 0, bases[n] == 0)
    wrapped.unmerge_adapter()
    assert all(torch.equal(m.base_layer.weight, bases[n]) for n, m in _layers(wrapped))
    wrapped.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(wrapped), found, rtol=1e-9, atol=1e-9)
    for _, m in _layers(wrapped):
        delta = m.get_delta_weight("default")
        assert delta.shape == m.base_layer.weight.shape


def _layers(wrapped):
    return [(n, m) for n, m in wrapped.named_modules() if hasattr(m, "lora_A")]


def test_gradients_are_ours():
    model = pruned()
    config = peft.LoraConfig(r=4, lora_alpha=LORA_ALPHA, target_modules="all-linear")
    network = NETWORKS["llama"]().double()
    network.load_state_dict(model.base_state())
    wrapped = peft.get_peft_model(network, spp_config(config)).double()
    payload = scale(model)
    with torch.no_grad():
        for n, m in _layers(wrapped):
            path = n.removeprefix("base_model.model.")
            assert not m.lora_B["default"].weight.any()
            m.lora_A["default"].weight.copy_(payload.alpha[path])
            m.lora_B["default"].weight.copy_(payload.beta[path][:, None])
    wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
    model.mount(payload)
    model.network(input_ids=tokens(), labels=tokens()).loss.backward()
    for (_, m), (alpha, beta) in zip(_layers(wrapped), model.parameters(), strict=True):
        torch.testing.assert_close(m.lora_A["default"].weight.grad, alpha.grad)
        torch.testing.assert_close(m.lora_B["default"].weight.grad[:, 0], beta.grad)


def test_peft_refuses_to_load_it_as_lora(tmp_path):
    model = pruned()
    save(scale(model), model.info, tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(NETWORKS["llama"](), tmp_path)


def test_rank_one_is_never_taken_for_lora(tmp_path):
    """Its shapes would fit, so PEFT is shown nothing; our own reader refuses SPP as LoRA."""
    model = pruned()
    save(scale(model, rank=1), model.info, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert set(load_spp(tmp_path).blocks.values()) == {1}
    with pytest.raises(ModelError, match="holds a MaskedScale, which is more than LoRA"):
        load_peft(tmp_path)


def test_what_was_merged_is_kept_and_not_shown_to_peft(tmp_path):
    model = pruned()
    payload = scale(model)
    past = {p: (payload.alpha[p][None], payload.beta[p][None]) for p in payload.beta}
    save(replace(payload, merges=(past, past)), model.info, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    back = load_spp(tmp_path)
    assert len(back.merges) == 2
    assert all(torch.equal(back.merges[1][p][0], past[p][0]) for p in past)
    with pytest.raises(ModelError, match="no SPP adapter"):
        load_spp(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="pruned with the mask"):
        save(replace(payload, mask="other"), model.info, tmp_path)


def test_what_an_earlier_save_left_is_no_part_of_the_adapter(tmp_path):
    """With merges, PEFT's files of a save before them would be another adapter."""
    model = pruned()
    payload = scale(model)
    save(payload, model.info, tmp_path)
    assert (tmp_path / CONFIG).exists()
    past = {p: (payload.alpha[p][None], payload.beta[p][None]) for p in payload.beta}
    save(replace(payload, merges=(past,)), model.info, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {SPP, RECORD}


@pytest.mark.parametrize("rank", [1, 2])
def test_peft_scales_an_alpha_of_smaller_rank_as_we_do(rank, tmp_path):
    """``s`` is of the common rank; alpha may have fewer rows, one included."""
    model = pruned()
    payload = scale(model)
    small = replace(payload, alpha={p: a[:rank] for p, a in payload.alpha.items()})
    save(small, model.info, tmp_path)
    assert all(len(a) == rank for a in load_spp(tmp_path).alpha.values())
    model.mount(small)
    found = logits(theirs(model, "llama", tmp_path))
    torch.testing.assert_close(found, logits(model.network), rtol=1e-5, atol=1e-6)


def two_adapters(dtype=torch.float64):
    """A pruned network with two SPP adapters at random, and its layers."""
    model = pruned(dtype=dtype)
    network = NETWORKS["llama"]().to(dtype)
    network.load_state_dict(model.base_state())
    wanted = {"lora_alpha": LORA_ALPHA, "target_modules": ["q_proj", "up_proj"]}
    wrapped = peft.get_peft_model(network, spp_config(peft.LoraConfig(r=4, **wanted)))
    wrapped.add_adapter("other", spp_config(peft.LoraConfig(r=2, **wanted)))
    wrapped.base_model.set_adapter(["default", "other"])
    g = torch.Generator().manual_seed(4)
    layers = [m for _, m in _layers(wrapped)]
    with torch.no_grad():
        for m in layers:
            for b in m.lora_B.values():
                b.weight.copy_(torch.randn(b.weight.shape, generator=g))
    return wrapped.eval(), layers


@pytest.mark.parametrize("safe", [False, True])
def test_two_adapters_merge_into_their_sum_and_come_out_again(safe):
    wrapped, layers = two_adapters()
    bases = [m.base_layer.weight.clone() for m in layers]
    both = logits(wrapped)
    wrapped.base_model.set_adapter("default")
    one = logits(wrapped)
    wrapped.base_model.merge_adapter(["default", "other"], safe_merge=safe)
    torch.testing.assert_close(logits(wrapped), both, rtol=1e-9, atol=1e-9)
    for m, base in zip(layers, bases, strict=True):
        assert torch.equal(m.base_layer.weight == 0, base == 0)
    wrapped.base_model.unmerge_adapter()
    assert all(torch.equal(m.base_layer.weight, b) for m, b in zip(layers, bases, strict=True))
    wrapped.base_model.merge_adapter(["other"])
    wrapped.base_model.unmerge_adapter()
    torch.testing.assert_close(logits(wrapped), one, rtol=0, atol=0)


def test_a_merge_by_peft_that_would_break_the_model_is_refused():
    """A moved zero, and a weight that float16 cannot hold; nothing has changed then."""
    for dtype, value, said in (
        (torch.float64, torch.inf, "that should be zero are not"),
        (torch.float16, 1e9, "are not finite"),
    ):
        wrapped, layers = two_adapters(dtype)
        before = layers[0].base_layer.weight.clone()
        with torch.no_grad():
            layers[0].lora_B["other"].to(torch.float32).weight.fill_(value)
        with pytest.raises(ModelError, match=f"merging by PEFT: .*other.* {said}"):
            wrapped.base_model.merge_adapter(["other"])
        assert torch.equal(layers[0].base_layer.weight, before)


@pytest.mark.parametrize("name", NETWORKS)
def test_peft_reads_what_was_saved(name, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = pruned(name, dtype=torch.float32)
    merge(model, None, base)
    payload = scale(model)
    save(payload, model.info, adapter)
    model.mount(payload)
    network = type(model.network).from_pretrained(base)
    config = spp_config(peft.LoraConfig.from_pretrained(adapter))
    config.fan_in_fan_out = name == "gpt2"
    wrapped = peft.PeftModel.from_pretrained(network, adapter, config=config).eval()
    torch.testing.assert_close(logits(wrapped), logits(model.network), rtol=1e-5, atol=1e-5)
