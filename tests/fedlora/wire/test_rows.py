"""Wires keep their promises: the bits or a bound, the bytes of the formula, and no nonsense."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.config import build
from fedlora.core.errors import ConfigError
from fedlora.core.seeding import torch_generator
from fedlora.wire.rows import LEVELS, Wire
from tests.generators import seeds

TINY = 2e-36  # 127 of the smallest normal float32


@st.composite
def rows(draw: st.DrawFn) -> torch.Tensor:
    """Rows of any size and magnitude, some numbers far larger than the rest, some rows zero."""
    tokens, d = draw(st.integers(0, 5)), draw(st.integers(1, 150))
    g = torch_generator(draw(seeds), "test-rows")
    x = torch.randn(tokens, d, generator=g) * 10.0 ** draw(st.integers(-30, 25))
    x *= torch.rand(tokens, 1, generator=g) * 10.0 ** draw(st.integers(-6, 6))
    if tokens and draw(st.booleans()):
        x[:, draw(st.integers(0, d - 1))] *= draw(st.sampled_from([0.0, 50.0, -3000.0]))
        x[draw(st.integers(0, tokens - 1))] *= draw(st.sampled_from([0.0, 1.0]))
    return x


wires = st.one_of(
    st.builds(Wire, kind=st.sampled_from(["fp32", "fp64", "fp16", "bf16"])),
    st.builds(
        Wire,
        kind=st.sampled_from(["int8", "int4"]),
        group=st.sampled_from([0, 1, 7, 64]),
        keep=st.sampled_from([0, 1, 8]),
        stochastic=st.booleans(),
    ),
    st.builds(Wire, kind=st.just("topk"), k=st.sampled_from([1, 5, 64, 1000])),
)


def generator(seed: int = 0) -> torch.Generator:
    return torch_generator(seed, "test-rounding")


def there(wire: Wire, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return wire.decode(wire.encode(x, generator(seed)))


def relative(wire: Wire, x: torch.Tensor) -> float:
    """Frobenius error of the way."""
    return float((there(wire, x).double() - x.double()).norm() / x.double().norm())


@given(rows())
def test_fp32_and_fp64_keep_every_bit(x: torch.Tensor):
    assert torch.equal(there(Wire("fp32"), x), x)
    wide = x.double() * (1 + 1e-12)
    assert torch.equal(there(Wire("fp64"), wide), wide)


@given(wires, rows(), seeds)
def test_sending_again_changes_nothing(wire: Wire, x: torch.Tensor, seed: int):
    once = there(wire, x, seed)
    assert torch.equal(there(wire, once, seed + 1), once)


@given(wires, rows())
def test_bytes_are_those_of_the_formula(wire: Wire, x: torch.Tensor):
    parts = wire.encode(x, generator())
    assert sum(a.nbytes for a in parts.values()) == wire.bytes(*x.shape)
    assert all(type(a) is np.ndarray and a.dtype.kind in "fiu" for a in parts.values())


@given(wires, rows())
def test_the_shape_and_the_type_come_back_in_fresh_memory(wire: Wire, x: torch.Tensor):
    parts = wire.encode(x, generator())
    for array in parts.values():
        array.flags.writeable = False
    got = wire.decode(parts, tuple(x.shape))
    assert got.shape == x.shape
    assert got.dtype == (torch.float64 if wire.kind == "fp64" else torch.float32)
    got.add_(1)
    assert torch.equal(wire.decode(parts) + 1, got)


@given(rows(), st.sampled_from([("fp16", 2.0**-11), ("bf16", 2.0**-8)]))
def test_half_precision_errs_by_half_a_step(x: torch.Tensor, kind: tuple[str, float]):
    """Relative to each number, or, for fp16, to what a row's largest number leaves of it."""
    name, step = kind
    floor = x.abs().amax(1, keepdim=True) * 2.0**-38 if name == "fp16" else 0.0
    error = (there(Wire(name), x) - x).abs()
    assert (error <= step * x.abs() + floor + TINY).all()


@given(rows(), st.sampled_from(["int8", "int4"]), st.sampled_from([0, 1, 7, 64]), st.booleans())
def test_codes_err_by_half_a_step_of_their_group(
    x: torch.Tensor, kind: str, group: int, stochastic: bool
):
    size = min(group, x.shape[1]) if group else x.shape[1]
    pad = torch.nn.functional.pad(x.abs(), (0, -x.shape[1] % size))
    largest = (
        pad.view(len(x), pad.shape[1] // size, size)
        .amax(2)
        .repeat_interleave(size, 1)[:, : x.shape[1]]
    )
    got = there(Wire(kind, group=group, stochastic=stochastic), x)
    bound = largest / LEVELS[kind] * (1.002 if stochastic else 0.502)
    assert ((got - x).abs() <= bound + TINY).all()
    assert (got.abs() <= largest).all()


@given(rows(), st.integers(1, 8))
def test_kept_channels_are_exact_and_leave_the_others_a_finer_scale(x: torch.Tensor, keep: int):
    got = there(Wire("int8", group=0, keep=keep), x)
    largest = x.abs().topk(min(keep, x.shape[1]), dim=1).indices
    assert torch.equal(got.gather(1, largest), x.gather(1, largest))
    rest = x.scatter(1, largest, 0.0).abs().amax(1, keepdim=True)
    assert ((got - x).abs() <= rest / 127 * 0.502 + TINY).all()


@given(rows(), st.integers(1, 20))
def test_topk_sends_the_largest_numbers_and_zeros(x: torch.Tensor, k: int):
    got = there(Wire("topk", k=k), x)
    largest = x.abs().topk(min(k, x.shape[1]), dim=1).indices
    assert torch.equal(got.gather(1, largest), there(Wire("fp16"), x.gather(1, largest)))
    assert (got.scatter(1, largest, 0.0) == 0).all()


def test_a_hand_made_row_of_int8():
    x = torch.tensor([[127.0, -63.6, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0]])
    parts = Wire("int8", group=2).encode(x)
    assert parts["codes"].tolist() == [[127, -64, 127, 0], [0, 0, 0, 0]]
    assert parts["scales"][0] == pytest.approx([1.0, 0.4 / 127], rel=1e-4)
    assert Wire("int8", group=2).decode(parts)[0] == pytest.approx([127, -64, 0.4, 0], rel=1e-4)


def test_a_hand_made_row_of_int4():
    x = torch.tensor([[7.0, -3.4, 0.4, 0.0, -14.0]])
    parts = Wire("int4", group=4).encode(x)
    assert parts["codes"].tolist() == [[0xD7, 0x00, 0x09]]  # 7 and -3, 0 and 0, -7
    assert Wire("int4", group=4).decode(parts)[0] == pytest.approx([7, -3, 0, 0, -14], rel=1e-4)


def test_a_hand_made_row_of_topk():
    parts = Wire("topk", k=2).encode(torch.tensor([[1.0, -8.0, 0.5, 4.0]]))
    assert parts["positions"].tolist() == [[1, 3]]
    assert parts["values"].tolist() == [[-16384.0, 8192.0]] and parts["exponents"].tolist() == [-11]


def test_small_gradients_survive_fp16():
    """float16 itself knows nothing below 6e-8: the exponent of a row must."""
    x = 1e-9 * torch.randn(4, 32, generator=generator())
    assert (x.half() == 0).all()
    assert relative(Wire("fp16"), x) < 2**-11


def test_stochastic_rounding_has_no_bias_and_is_a_function_of_its_generator():
    x = torch.rand(1, 64, generator=generator())
    wire = Wire("int8", stochastic=True)
    step = float(x.max()) / 127
    draws = torch.stack([there(wire, x, seed) for seed in range(400)])
    assert (draws.mean(0) - x).abs().max() < 5 * step / 2 / 400**0.5  # variance <= step² / 4
    assert (there(Wire("int8"), x) - x).abs().max() > 5 * step / 2 / 400**0.5
    assert torch.equal(draws[3], there(wire, x, 3)) and not torch.equal(draws[3], draws[4])


def test_zeros_and_nothing_travel_as_they_are():
    for tokens in (2, 0):
        assert torch.equal(there(Wire("int8"), torch.zeros(tokens, 3)), torch.zeros(tokens, 3))


@pytest.mark.parametrize("kind", ["fp32", "fp64", "fp16", "bf16", "int8", "topk"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_and_named(kind: str, bad: float):
    x = torch.zeros(3, 4)
    x[1, 2] = bad
    with pytest.raises(ValueError, match=r"1 of 12 numbers .* row 1, channel 2"):
        Wire(kind).encode(x)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "int8", "topk"])
def test_what_is_out_of_range_is_refused(kind: str):
    with pytest.raises(ValueError, match="finite numbers of its range"):
        Wire(kind).encode(torch.full((1, 1), 1e300, dtype=torch.float64))
    largest = torch.full((1, 1), torch.finfo(torch.float32).max)
    if kind in ("fp32", "int8"):
        assert relative(Wire(kind), largest) < 1e-4
    else:
        with pytest.raises(ValueError, match="finite numbers of its range"):
            Wire(kind).encode(largest)


@pytest.mark.parametrize(
    "x", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(2, 0), torch.zeros(2, 3).long()]
)
def test_only_rows_of_floats_travel(x: torch.Tensor):
    with pytest.raises(ValueError, match="rows"):
        Wire().encode(x)


def test_stochastic_rounding_asks_for_its_generator():
    with pytest.raises(ValueError, match="generator"):
        Wire("int8", stochastic=True).encode(torch.zeros(1, 1))


X = torch.arange(1.0, 25.0).view(3, 8)
DAMAGE = [
    ("fp32", {"values": np.zeros((3, 8))}, "values: float64"),
    ("fp32", {"values": np.zeros(8, np.float32)}, "values: float32"),
    ("fp32", {"values": np.full((3, 8), np.nan, np.float32)}, "values: 24 of 24"),
    ("fp32", {"other": np.zeros(1)}, "other"),
    ("bf16", {"values": np.full((3, 8), 0x7F80, np.uint16)}, "not finite"),
    ("fp16", {"exponents": np.zeros(2, np.int8)}, "exponents"),
    ("fp16", {"exponents": np.full(3, -128, np.int8)}, "exponents"),
    ("fp16", {"exponents": np.full(3, 127, np.int8)}, "not finite"),
    ("int8", {"codes": np.zeros((3, 8), np.uint8)}, "codes: uint8"),
    ("int8", {"scales": np.full((3, 2), np.inf, np.float32)}, "scales: 6 of 6"),
    ("int8", {"scales": np.ones((3, 3), np.float32)}, "scales"),
    ("int8", {"scales": np.ones((2, 2), np.float32)}, "scales"),
    ("int8", {"kept_at": np.full((3, 2), 8, np.uint16)}, "position 8 in a row of 8"),
    ("int8", {"kept": np.zeros((3, 1), np.float32)}, "kept"),
    ("int8", {"codes": np.zeros((0,), np.int8)}, "codes"),
    ("topk", {"width": np.array([0], np.uint32)}, "width"),
    ("topk", {"width": np.array([7], np.uint32)}, "position 7 in a row of 7"),
    ("topk", {"positions": np.zeros((3, 4), np.int64)}, "positions: int64"),
    ("topk", {"values": np.zeros((3, 2), np.float16)}, "values"),
]


@pytest.mark.parametrize(("kind", "change", "what"), DAMAGE)
def test_damage_is_named(kind: str, change: dict[str, np.ndarray], what: str):
    wire = Wire(kind, group=4, keep=2, k=4)
    with pytest.raises(ValueError, match=what):
        wire.decode(wire.encode(X) | change)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "int8", "topk"])
@pytest.mark.parametrize("due", [(2, 8), (3, 9)])
def test_other_rows_than_were_due_are_refused(kind: str, due: tuple[int, int]):
    wire = Wire(kind)
    with pytest.raises(ValueError, match=r"due|width"):
        wire.decode(wire.encode(X), due)


def test_a_missing_array_is_named():
    wire = Wire("int8")
    with pytest.raises(ValueError, match="scales"):
        wire.decode({"codes": wire.encode(X)["codes"]})
    with pytest.raises(ValueError, match="codes"):
        wire.decode({})


@pytest.mark.parametrize(
    "settings",
    [{"kind": "int3"}, {"group": -1}, {"keep": -1}, {"k": 0}, {"kind": "fp16", "stochastic": True}],
)
def test_impossible_settings_are_refused(settings: dict[str, object]):
    with pytest.raises(ConfigError, match=str(next(iter(settings)))):
        build({"_target_": "fedlora.wire.rows.Wire"} | settings, Wire, "wire")
