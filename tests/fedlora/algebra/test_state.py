"""States: what goes in comes out, in the model's order, also through a file."""

import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.algebra.state import (
    integers,
    order,
    pack,
    paths,
    prefixed,
    scalar,
    under,
    unpack,
)
from tests.generators import ALPHA, MODULES, factors


def test_unpack_inverts_pack() -> None:
    adapter = {m.path: factors(m.d_out, m.d_in, 2, seed=i) for i, m in enumerate(MODULES)}
    state = pack(adapter, "global/") | {"global/order": order(adapter)}
    back = unpack(state, ALPHA, "global/")
    assert list(back) == list(adapter)
    for path, f in adapter.items():
        assert torch.equal(back[path].a, f.a)
        assert torch.equal(back[path].b, f.b)
        assert back[path].alpha == ALPHA


@given(st.lists(st.text("abz019./_", min_size=1, max_size=6), unique=True, min_size=1))
def test_the_order_of_modules_survives_a_file(names: list[str]) -> None:
    state = {f"x/{n}/v": torch.zeros(1) for n in names} | {"x/order": order(names)}
    loaded = safetensors.torch.load(safetensors.torch.save(state))
    assert paths(loaded, "v", "x/") == names
    assert under(prefixed(loaded, "y/"), "y/").keys() == loaded.keys()


def test_numbers_survive_exactly() -> None:
    state = {"alpha": scalar(0.1 + 0.2), "n": integers(2**62), "ranks": integers([3, 1])}
    loaded = safetensors.torch.load(safetensors.torch.save(state))
    assert float(loaded["alpha"]) == 0.1 + 0.2
    assert int(loaded["n"]) == 2**62
    assert loaded["ranks"].tolist() == [3, 1]
