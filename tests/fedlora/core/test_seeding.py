"""Streams depend on seed, purpose and keys, and on nothing else."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.seeding import (
    generator,
    mask_noise,
    torch_generator,
    torch_seed,
)

KEY = st.tuples(st.integers(0, 2**31), st.sampled_from(["cohort", "order", "dropout"]))


@given(KEY, KEY, st.integers(0, 99), st.integers(0, 99))
def test_equal_names_equal_streams_and_only_those(x, y, i, j):
    def draws(key, k):
        return generator(*key, k).integers(0, 2**62, 4).tolist()

    assert draws(x, i) == draws(x, i)
    assert (draws(x, i) == draws(y, j)) == ((x, i) == (y, j))
    assert (torch_seed(*x, i) == torch_seed(*y, j)) == ((x, i) == (y, j))


def test_no_global_generator_is_touched():
    before = torch.random.get_rng_state()
    torch_generator(1, "order", 2)
    mask_noise(3, "q_proj", 4, 5)
    assert torch.equal(torch.random.get_rng_state(), before)


@given(st.floats(0, 1), st.floats(0, 1))
def test_masks_are_nested_in_their_density(d, e):
    noise = mask_noise(5, "layer", 16, 16)
    small, large = noise < min(d, e), noise < max(d, e)
    assert bool((small <= large).all())
