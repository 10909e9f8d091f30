"""Cores as they travel, are checked, mounted and exported: they are the factors that they make."""

import dataclasses

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedlora.algebra.init import orthonormal_rows
from fedlora.core.errors import ModelError, RejectedUpdate
from fedlora.core.types import Client, Expected, LocalPlan, Ranks, Update
from fedlora.models.export import merge
from fedlora.models.head import head_parameters
from fedlora.models.headed import WithHead
from fedlora.server.validation import check_update
from fedlora.techniques.cores.payload import Core, CorePayload, fixed
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.lora.peft import load_peft
from fedlora.wire.codec import (
    WIRE_BYTES,
    decode_payload,
    encode_payload,
    encode_reply,
    payload_bytes,
    update_bytes,
)
from tests.fedlora.models import classifiers
from tests.fedlora.models.networks import NETWORKS, logits, wrap
from tests.fedlora.techniques.cores.test_training import cores

CPU = torch.device("cpu")


def payload(name: str = "llama", seed: int = 1, sizes=(2, 2, 1), gains=False) -> CorePayload:
    return cores(wrap(NETWORKS[name]().double()), sizes, seed, gains)


# ------------------------------------------------------------------------------ fixed factors


def test_fixed_factors_are_orthonormal_nested_and_of_their_module_alone():
    big = orthonormal_rows(3, "w/u", 9, 12, torch.float64, CPU)
    torch.testing.assert_close(big @ big.T, torch.eye(9).double(), rtol=0, atol=1e-6)
    for rank in (1, 4, 9):
        assert torch.equal(orthonormal_rows(3, "w/u", rank, 12, torch.float64, CPU), big[:rank])
        assert torch.equal(
            orthonormal_rows(3, "w/u", rank, 12, torch.float32, CPU), big[:rank].float()
        )
    for seed, name in ((4, "w/u"), (3, "w/v"), (3, "x/u")):
        other = orthonormal_rows(seed, name, 9, 12, torch.float64, CPU)
        assert float((big @ other.T).norm()) < 0.99 * 9**0.5
    square = orthonormal_rows(3, "s", 64, 64, torch.float64, CPU)
    torch.testing.assert_close(square.T @ square, torch.eye(64).double(), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"w/u: 13 orthonormal rows of 12 entries: expected 1\.\."):
        orthonormal_rows(3, "w/u", 13, 12, torch.float64, CPU)


def test_writing_into_the_factors_of_a_payload_reaches_no_other():
    one, other = payload(), payload(seed=2)
    before = {p: f.a.clone() for p, f in other.low_rank().items()}
    for f in one.low_rank().values():
        f.a.fill_(9.0)
        f.b.fill_(9.0)
    assert all(torch.equal(f.a, before[p]) for p, f in payload(seed=2).low_rank().items())
    assert all(torch.equal(f.a, before[p]) for p, f in other.low_rank().items())


# ------------------------------------------------------------------------------------ travel


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float64"])
def test_they_travel_without_their_fixed_factors(wire):
    sent = payload(gains=True)
    array, header = encode_payload(sent, wire)
    back = decode_payload(array, header)
    assert isinstance(back, CorePayload)
    assert (back.alpha, back.seed, back.gains) == (sent.alpha, sent.seed, sent.gains)
    for (name, x), (other, y) in zip(sent.tensors(), back.tensors(), strict=True):
        assert name == other and torch.equal(x.to(getattr(torch, wire)).float(), y.float())
    floats = len(sent.cores) * (4 + 4 + 1)
    assert array.nbytes == payload_bytes(sent, wire) == WIRE_BYTES[wire] * floats
    assert update_bytes(sent, LocalPlan(train_a=False), wire) == array.nbytes
    own = sent.copy()
    next(iter(own.cores.values())).blocks[0].zero_()
    assert all(bool(t.any()) for _, t in sent.tensors())


def test_a_rounded_reply_is_the_change_of_the_core():
    start, end = payload(seed=1), payload(seed=2)
    array, header, _ = encode_reply(end, "bfloat16", start)
    back = decode_payload(array, header, start=start)
    for (_, x), (_, y), (_, z) in zip(end.tensors(), back.tensors(), start.tensors(), strict=True):
        assert float((x - y).norm()) <= 2**-8 * float((x - z).norm())


def test_an_update_is_validated():
    start = payload()
    path, core = next(iter(start.cores.items()))
    client = Client(5, Ranks(dict.fromkeys(start.cores, 5)), 9)
    expected = Expected(client, start, LocalPlan())
    check_update(Update(client, start, 9), expected, max_norm=1e-6)

    def other(changed: Core) -> CorePayload:
        return dataclasses.replace(start, cores={**start.cores, path: changed})

    def blocks(*sizes: int) -> Core:
        return dataclasses.replace(core, blocks=tuple(torch.zeros(n, n).double() for n in sizes))

    wide = dataclasses.replace(core, d_out=core.d_out + 1)
    nan = dataclasses.replace(core, blocks=(core.blocks[0] * torch.nan, *core.blocks[1:]))
    faults = {
        "factors where cores between fixed factors are required": LowRankPayload(start.low_rank()),
        "seed 8, expected 7": dataclasses.replace(start, seed=8),
        "alpha 11.0, expected 12.0": dataclasses.replace(start, alpha=11.0),
        "gains True, expected False": dataclasses.replace(start, gains=True),
        f"{path}: outputs and inputs .*, expected": other(wide),
        rf"{path}: a core of blocks \[2, 3\], expected \[2, 2, 1\]": other(blocks(2, 3)),
        r"blocks \[2, 2\], expected": other(blocks(2, 2)),
        "entries that are NaN": other(nan),
        "above 0.001": other(dataclasses.replace(core, blocks=tuple(b + 1 for b in core.blocks))),
    }
    for said, bad in faults.items():
        with pytest.raises(RejectedUpdate, match=said):
            check_update(Update(client, bad, 9), expected, max_norm=1e-3)
    stated = dataclasses.replace(client, ranks=Ranks(dict.fromkeys(start.cores, 4)))
    with pytest.raises(RejectedUpdate, match="it states rank 4, and has 5 of 5"):
        check_update(Update(stated, start, 9), expected, max_norm=1e-3)
    array, header = encode_payload(start)
    gap = header.replace(f'["{path}/core1"', f'["{path}/corex"')
    with pytest.raises(ValueError, match="core2, which is no tensor"):
        decode_payload(array, gap)


@pytest.mark.parametrize("value", ["7.0", "true", '"7"', "null", "[7]"])
@pytest.mark.parametrize("which", ["seed", "size"])
def test_a_header_holds_whole_numbers(which, value):
    """What equals the right number passes a comparison, and would stop the server later."""
    array, header = encode_payload(payload())
    right = '"seed": 7' if which == "seed" else ": [16, "
    wrong = right.replace("7" if which == "seed" else "16", value)
    assert right in header
    with pytest.raises(ValueError, match="expected a whole number"):
        decode_payload(array, header.replace(right, wrong, 1))


def given(held: CorePayload) -> CorePayload:
    """The same with fixed factors that are another seed's."""
    other = dataclasses.replace(held, seed=held.seed + 1)
    return dataclasses.replace(
        held, bases={p: other.fixed(p, torch.float64, CPU) for p in held.cores}
    )


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float64"])
def test_fixed_factors_that_come_with_them_travel_down_alone(wire):
    sent = given(payload(gains=True))
    array, header = encode_payload(sent, wire)
    back = decode_payload(array, header)
    for (name, x), (other, y) in zip(sent.tensors(), back.tensors(), strict=True):
        assert name == other and torch.equal(x.to(getattr(torch, wire)).float(), y.float())
    assert array.nbytes == payload_bytes(sent, wire)
    assert update_bytes(sent, LocalPlan(), wire) == payload_bytes(payload(), wire) < array.nbytes
    answer, head, _ = encode_reply(back, wire, back)
    again = decode_payload(answer, head, start=sent)
    client = Client(5, Ranks(dict.fromkeys(sent.cores, 5)), 9)
    check_update(Update(client, again, 9), Expected(client, sent, LocalPlan()), max_norm=1.0)


def test_they_make_the_factors_and_must_not_change():
    start = given(payload())
    seeded = dataclasses.replace(start, seed=start.seed + 1, bases=None)
    for path, f in start.low_rank().items():
        torch.testing.assert_close(f.delta(), seeded.low_rank()[path].delta())
    model = wrap(NETWORKS["llama"]().double())
    model.mount(start)
    found = logits(model.network)
    model.mount(seeded)
    torch.testing.assert_close(found, logits(model.network), rtol=1e-12, atol=1e-12)
    client = Client(5, Ranks(dict.fromkeys(start.cores, 5)), 9)
    expected = Expected(client, start, LocalPlan())
    path, (u, v) = next(iter(start.bases.items()))
    faults = {
        f"{path}: its V has changed, which no round trains": {**start.bases, path: (u, 1.01 * v)},
        f"{path}: its U has changed, which no round trains": {**start.bases, path: (u[:-1], v)},
    }
    for said, bases in faults.items():
        bad = dataclasses.replace(start, bases=bases)
        with pytest.raises(RejectedUpdate, match=said):
            check_update(Update(client, bad, 9), expected, max_norm=0.0)
    none = dataclasses.replace(start, bases=None)
    with pytest.raises(RejectedUpdate, match="bases False, expected True"):
        check_update(Update(client, none, 9), expected, max_norm=0.0)


def test_what_is_no_core_is_refused():
    with pytest.raises(ValueError, match=r"a block \(2, 3\) of a core must be square"):
        Core(4, 5, (torch.zeros(2, 3),))
    with pytest.raises(ValueError, match="at least one block"):
        Core(4, 5, ())


def test_the_norm_of_a_change_is_that_of_the_weights():
    one, two = payload(seed=1), payload(seed=2)
    whole = sum(
        float((one.low_rank()[p].delta() - f.delta()).square().sum())
        for p, f in two.low_rank().items()
    )
    assert two.change_norm(one) == pytest.approx(whole**0.5, rel=1e-6)  # U and V are float32
    with pytest.raises(TypeError, match="no common change"):
        two.change_norm(LowRankPayload({}))


# ---------------------------------------------------------------------------------- on a model


@pytest.mark.parametrize("sizes", [(5,), (2, 2, 1)])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_mounted_core_computes_as_its_factors_do(name, sizes):
    model = wrap(NETWORKS[name]().double())
    held = cores(model, sizes, 3, True)
    model.mount(held)
    found = logits(model.network)
    weights = {path: model.effective_weight(path) for path in model.layers}
    again = model.payload()
    assert isinstance(again, CorePayload)
    for (_, x), (_, y) in zip(again.tensors(), held.tensors(), strict=True):
        assert torch.equal(x, y)
    model.mount(LowRankPayload(held.low_rank()))
    torch.testing.assert_close(found, logits(model.network), rtol=1e-12, atol=1e-12)
    for path, w in weights.items():
        torch.testing.assert_close(w, model.effective_weight(path), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gains", [False, True])
def test_the_start_of_what_trains_makes_the_payloads_own_factors(gains):
    held = payload(gains=gains)
    made = held.parametrisation(torch.float64, CPU)
    for path, f in made.factors(made.start).items():
        assert torch.equal(f.a, held.low_rank()[path].a)
        assert torch.equal(f.b, held.low_rank()[path].b)
    back = held.retrained(made.start)
    for (_, x), (_, y) in zip(back.tensors(), held.tensors(), strict=True):
        assert torch.equal(x, y)
    assert ("gains" in str(list(made.start))) == gains


def test_a_core_that_fits_no_layer_is_refused():
    model = wrap(NETWORKS["llama"]().double())
    held = payload()
    path, core = next(iter(held.cores.items()))
    wide = dataclasses.replace(core, d_in=core.d_in + 1)
    with pytest.raises(ValueError, match=rf"{path}.*do not fit a layer"):
        model.mount(dataclasses.replace(held, cores={path: wide}))
    with pytest.raises(ValueError, match="elsewhere"):
        model.mount(dataclasses.replace(held, cores={"elsewhere": core}))


# ------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("name", NETWORKS)
def test_peft_and_the_merged_model_compute_the_same(name, tmp_path):
    model = wrap(NETWORKS[name]().double())
    held = cores(model, (3, 2), 4)
    model.mount(held)
    ours = logits(model.network)
    folder, merged = tmp_path / "adapter", tmp_path / "merged"
    folder.mkdir()
    assert held.export(folder, model.info) == ""
    theirs = peft.PeftModel.from_pretrained(NETWORKS[name]().double(), folder).double().eval()
    torch.testing.assert_close(ours, logits(theirs), rtol=1e-5, atol=1e-5)
    assert held.reader(folder) == f"PEFT {peft.__version__}"
    elsewhere = held.read_elsewhere(folder, NETWORKS[name]().double()).double()
    torch.testing.assert_close(ours, logits(elsewhere), rtol=1e-5, atol=1e-5)
    for path, f in load_peft(folder, model.info).items():
        u, v = fixed(held.seed, path, held.cores[path], torch.float64, CPU)
        torch.testing.assert_close(f.a.double(), v, rtol=0, atol=1e-6)
        whole = u @ torch.block_diag(*held.cores[path].blocks)
        torch.testing.assert_close(f.b.double(), whole, rtol=1e-6, atol=1e-6)
    with pytest.raises(ModelError, match="exported as LoRA's factors"):
        CorePayload.load(folder, model.info)
    merge(model, held, merged)
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float64)
    torch.testing.assert_close(ours, logits(plain), rtol=1e-5, atol=1e-5)


def test_with_a_head_they_are_a_classifiers_adapter_to_peft(tmp_path):
    model = classifiers.classifier("bert")
    head = {n: p.detach() + 0.1 for n, p in head_parameters(model.network).items()}
    held = WithHead(cores(model, (3,), 4), head)
    model.mount(held)
    ours = classifiers.logits(model, classifiers.examples(4))
    held.export(tmp_path, model.info)
    back = WithHead.load(tmp_path, model.info)
    model.mount(back)
    theirs = classifiers.logits(model, classifiers.examples(4))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    array, header = encode_payload(held)
    assert isinstance(decode_payload(array, header).update, CorePayload)
