"""Wanda's laws, on Llama and GPT-2 (whose layers store their weights transposed)."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from fedlora.core.errors import ModelError
from fedlora.models.layers import dense_weight
from fedlora.models.modules import linear_layers
from fedlora.prune.methods import DAMPING, magnitude, sparsegpt, wanda
from fedlora.prune.pattern import Pattern
from fedlora.prune.prune import METHODS, Pruning, by_block, prune, prune_by, prune_from, sparsity
from fedlora.prune.statistics import (
    Activations,
    measure,
    windows,
)
from tests.fedlora.models.networks import NETWORKS, wrap
from tests.fedlora.prune import plain_wanda
from tests.fedlora.prune.text import batches

_GPT2_BLOCKS = ("transformer.h.0", "transformer.h.1")


def model(name: str = "llama"):
    wrapped = wrap(NETWORKS[name]().double())
    return wrapped.network, list(wrapped.layers)


def test_wanda_by_hand() -> None:
    """4 x 8, every row by brute force over all ways to drop two of eight."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(4, 8, generator=g, dtype=torch.float64)
    x = torch.randn(30, 8, generator=g, dtype=torch.float64)
    kept = wanda(w, x.square().sum(0), Pattern.parse("0.25"))
    for row, keep in zip(w, kept, strict=True):
        costs = {
            pair: sum(float(row[j].abs() * x[:, j].norm()) for j in pair)
            for pair in product(range(8), repeat=2)
            if pair[0] < pair[1]
        }
        assert set((~keep).nonzero().flatten().tolist()) == set(min(costs, key=costs.__getitem__))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("pattern", ["0.5", "0.3", "2:4", "1:4"])
@pytest.mark.parametrize("sequential", [True, False])
def test_masks_of_every_layer_are_those_of_plain_wanda(
    name: str, pattern: str, sequential: bool
) -> None:
    """Each layer by its own inputs: measured with plain hooks on an unwrapped model."""
    network, paths = model(name)
    found = prune(network, paths, Pruning("wanda", pattern, sequential), batches())
    plain = NETWORKS[name]().double().eval()
    blocks = ("model.layers.0", "model.layers.1") if name == "llama" else _GPT2_BLOCKS
    n, colon, m = pattern.partition(":")
    how = {"group": (int(n), int(m))} if colon else {"fraction": float(pattern)}
    judged = plain_wanda.masks(plain, batches(), blocks=blocks if sequential else (), **how)
    assert list(found) == list(judged)
    for path, mask in judged.items():
        assert torch.equal(found[path], mask), path
        pruned = dense_weight(linear_layers(network, [path])[path])
        assert torch.equal(pruned, dense_weight(plain.get_submodule(path))), path


def test_equal_activations_leave_the_order_of_magnitudes() -> None:
    w = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    for text in ("0.5", "2:4"):
        pattern = Pattern.parse(text)
        by_row = torch.stack([magnitude(row[None], pattern)[0] for row in w])
        assert torch.equal(wanda(w, torch.full((12,), 7.0), pattern), by_row)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("sequential", [True, False])
def test_every_layer_is_as_sparse_as_asked(
    name: str, method: str, pattern: str, sequential: bool
) -> None:
    network, paths = model(name)
    masks = prune(network, paths, Pruning(method, pattern, sequential), batches())
    assert list(masks) == paths
    for path, layer in linear_layers(network, paths).items():
        zero = dense_weight(layer) == 0
        assert torch.equal(masks[path], ~zero), path
        if pattern == "2:4":
            assert (zero.view(len(zero), -1, 4).sum(-1) == 2).all()
        elif method == "wanda":
            assert (zero.sum(1) == zero.shape[1] // 2).all()
        else:
            assert int(zero.sum()) == zero.numel() // 2
    assert sparsity(network, paths) == 0.5


def test_statistics_add_up_over_texts_and_clients() -> None:
    network, paths = model()
    texts = batches(6)
    whole = measure(network, paths, texts, grams=True)
    parts = [measure(network, paths, texts[i::3], grams=True) for i in range(3)]
    added = parts[0] + parts[1] + parts[2]
    assert added.tokens == whole.tokens == dict.fromkeys(paths, 6 * 22)
    for path in paths:
        torch.testing.assert_close(added.squares[path], whole.squares[path], rtol=1e-12, atol=0)
        torch.testing.assert_close(added.grams[path], whole.grams[path], rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="different layers"):
        _ = whole + Activations({}, {})


@pytest.mark.parametrize("name", NETWORKS)
def test_an_input_of_several_layers_is_summed_and_sent_once(name: str) -> None:
    network, paths = model(name)
    seen = measure(network, paths, batches(3), grams=True)
    first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    expected = {
        p: p.replace(end, first[end])
        for p in paths
        if (end := p.rpartition(".")[2]) in first and name == "llama"
    }
    assert seen.shared == expected == (seen + seen).shared
    own = [s for p, s in seen.squares.items() if p not in expected]
    assert seen.floats == sum(len(s) + len(s) ** 2 + 1 for s in own)
    alone = [measure(network, [p], batches(3), grams=True) for p in paths]
    for path, one in zip(paths, alone, strict=True):
        assert not one.shared
        assert one.tokens[path] == seen.tokens[path]
        assert torch.equal(one.squares[path], seen.squares[path])
        assert torch.equal(one.grams[path], seen.grams[path])
    if expected:
        with pytest.raises(ValueError, match="layers share inputs in different ways"):
            _ = seen + measure(network, paths, [], grams=True)


@pytest.mark.parametrize("sequential", [True, False])
def test_the_order_of_the_text_does_not_matter(sequential: bool) -> None:
    texts = batches(5)
    shuffled = [texts[i].flip(0) for i in (3, 0, 4, 1, 2)]
    one, other = (
        prune(*model(), Pruning(sequential=sequential), text) for text in (texts, shuffled)
    )
    assert all(torch.equal(one[p], other[p]) for p in one)


def test_federated_calibration_is_central_calibration() -> None:
    """The masks from the sum over clients are those of all their text (S-F3)."""
    texts = batches(6)
    network, paths = model()
    central = prune(network, paths, Pruning(sequential=False), texts)
    network, _ = model()
    clients = [measure(network, paths, texts[i : i + 2]) for i in (0, 2, 4)]
    summed = prune_from(
        network, paths, Pruning(sequential=False), clients[0] + clients[1] + clients[2]
    )
    assert all(torch.equal(central[p], summed[p]) for p in paths)


def test_sequential_pruning_sees_the_blocks_already_pruned() -> None:
    """The second block's masks follow from a model whose first block is pruned."""
    network, paths = model()
    blocks = by_block(paths)
    assert list(blocks) == ["model.layers.0", "model.layers.1"]
    first, second = blocks.values()
    by_hand, _ = model()
    masks = prune_from(by_hand, first, Pruning(), measure(by_hand, first, batches()))
    masks |= prune_from(by_hand, second, Pruning(), measure(by_hand, second, batches()))
    found = prune(network, paths, Pruning(), batches())
    assert all(torch.equal(found[p], masks[p]) for p in paths)
    assert by_block(["lm_head", "h.0.c"]) == {"h.0": ["h.0.c"], "": ["lm_head"]}


def output_error(w: Tensor, new: Tensor, x: Tensor) -> float:
    return float((x @ (w - new).T).norm())


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "0.75"])
def test_sparsegpt_makes_up_for_what_goes(pattern: str) -> None:
    """On correlated inputs, wider than a block and with a dead channel, it beats Wanda."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(600, 20, generator=g, dtype=torch.float64)
    x = x @ torch.randn(20, 160, generator=g, dtype=torch.float64)
    x += torch.randn(600, 160, generator=g, dtype=torch.float64)
    x[:, 3] = 0
    w = torch.randn(12, 160, generator=g, dtype=torch.float64)
    p = Pattern.parse(pattern)
    kept, new = sparsegpt(w, x.T @ x, len(x), p)
    assert torch.equal(new != 0, kept & (new != 0))
    assert (new[:, 3] == 0).all()
    plain = w * wanda(w, x.square().sum(0), p)
    assert output_error(w, new, x) < 0.8 * output_error(w, plain, x)


def test_blocks_of_columns_change_the_rounding_of_sparsegpt_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Groups are decided one by one, so what a block leaves to later ones is all that it lost."""
    g = torch.Generator().manual_seed(6)
    x = torch.randn(200, 48, generator=g, dtype=torch.float64)
    x = x @ torch.randn(48, 48, generator=g, dtype=torch.float64)
    w = torch.randn(5, 48, generator=g, dtype=torch.float64)
    found = []
    for block in (48, 16, 4):
        monkeypatch.setattr("fedlora.prune.methods.BLOCK", block)
        found.append(sparsegpt(w, x.T @ x, len(x), Pattern.parse("2:4")))
    for kept, new in found[1:]:
        assert torch.equal(kept, found[0][0])
        torch.testing.assert_close(new, found[0][1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("pattern", ["0.5", "0.3", "2:4", "1:4", "2:8"])
def test_sparsegpt_of_independent_inputs_is_a_score_and_changes_nothing_that_stays(pattern):
    """H is diagonal then, and what a weight's loss costs is ``w_ij² (H_jj + damping)``; a share
    competes over all rows of a block of 128 columns, groups in their row."""
    g = torch.Generator().manual_seed(5)
    w = torch.randn(6, 256, generator=g, dtype=torch.float64)
    squares = torch.rand(256, generator=g, dtype=torch.float64) ** 4 * 1000
    p, h = Pattern.parse(pattern), 2 / 50 * squares
    cost = w.square() * (h + DAMPING * h.mean())
    want = torch.cat([p.kept(c, compete="layer") for c in cost.split(128, dim=1)], dim=1)
    kept, new = sparsegpt(w, squares.diag(), 50, p)
    assert torch.equal(kept, want)
    torch.testing.assert_close(new, w * want, rtol=1e-12, atol=0)


def test_sparsegpt_by_hand() -> None:
    """One weight of two goes: the surgeon's formula with a damped H, for the first and the second
    of a group. Undamped, the quiet input's weight would go."""
    loud, quiet = 1.0, 1e-4
    h = torch.tensor([[quiet, 0.0], [0.0, loud]], dtype=torch.float64)
    w = torch.tensor([[5.0, 0.1]], dtype=torch.float64)
    kept, _ = sparsegpt(w, h / 2, 1, Pattern.parse("1:2"))
    assert kept.tolist() == [[True, False]]
    assert (w[0, 0] ** 2 * quiet < w[0, 1] ** 2 * loud).item()
    h = torch.tensor([[2.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    damped = h + 0.01 * 1.5 * torch.eye(2, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    w = torch.tensor([[0.3, 2.0], [2.0, 0.3]], dtype=torch.float64)
    kept, new = sparsegpt(w, h / 2, 1, Pattern.parse("1:2"))
    assert kept.tolist() == [[False, True], [True, False]]
    made_up = w[0] - w[0, 0] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(new, torch.stack([made_up * kept[0], w[1] * kept[1]]))
    assert abs(new[0, 1] - 2.0) > 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_block_after_block_text_goes_no_further_than_the_block(name: str) -> None:
    """Later blocks run once for each of theirs, and the output embedding never."""
    network, paths = model(name)
    blocks = [b for b in by_block(paths) if b]
    calls = dict.fromkeys([*blocks, "lm_head"], 0)

    def count(path: str):
        def counted(*_) -> None:
            calls[path] += 1

        return counted

    for path in calls:
        network.get_submodule(path).register_forward_pre_hook(count(path))
    prune(network, paths, Pruning(), batches(3))
    assert calls == {blocks[0]: 6, blocks[1]: 3, "lm_head": 0}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("sequential", [True, False])
def test_layers_without_calibration_tokens_are_refused(method: str, sequential: bool) -> None:
    network, paths = model()
    before = {k: t.clone() for k, t in network.state_dict().items()}
    how = Pruning(method, sequential=sequential)
    with pytest.raises(ModelError, match=r"no token of the calibration text reached .*q_proj \(\d"):
        prune(network, paths, how, [])
    network.unused = nn.Linear(16, 4).double()
    with pytest.raises(ModelError, match=r"reached unused \(1 of"):
        prune(network, [*paths, "unused"], Pruning(method, sequential=False), batches())
    del network.unused
    assert all(torch.equal(before[k], t) for k, t in network.state_dict().items())
    assert prune(network, paths, Pruning("magnitude"), [])


def test_statistics_are_measured_when_they_are_needed() -> None:
    """Once for all layers, or once per block in the network as it is pruned by then."""
    network, paths = model()
    measured: list[tuple[str, int]] = []

    def statistics(block: str, group):
        layers = linear_layers(network, paths).values()
        measured.append((block, sum(bool((dense_weight(x) == 0).any()) for x in layers)))
        return measure(network, group, batches())

    one_shot = prune_by(network, paths, Pruning(sequential=False), statistics)
    assert measured == [("", 0)]
    central = prune(*model(), Pruning(sequential=False), batches())
    assert all(torch.equal(m, central[p]) for p, m in one_shot.items())
    network, _ = model()
    measured.clear()
    prune_by(network, paths, Pruning(), statistics)
    assert measured == [("model.layers.0", 0), ("model.layers.1", 7)]
    prune_by(network, paths, Pruning("magnitude"), statistics)
    assert len(measured) == 2


def test_what_cannot_be_pruned_is_refused_and_nothing_changes() -> None:
    network, paths = model()
    before = {k: t.clone() for k, t in network.state_dict().items()}
    with pytest.raises(ModelError, match=r"down_proj: 20 inputs .* groups of 8"):
        prune(network, paths, Pruning(pattern="2:8"), batches())
    with pytest.raises(ModelError, match=r"model.norm is a LlamaRMSNorm; only linear layers"):
        prune(network, ["model.norm"], Pruning(), batches())
    with pytest.raises(ModelError, match=r"has no module 'model.layers.7.x'"):
        prune(network, ["model.layers.7.x"], Pruning(), batches())
    layer = network.get_submodule(paths[0]).base
    packed = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    layer.weight, whole = packed, layer.weight
    with pytest.raises(ModelError, match=r"stores torch.int8 weights: a quantised base"):
        prune(network, paths, Pruning(), batches())
    layer.weight = whole
    assert all(torch.equal(before[k], t) for k, t in network.state_dict().items())
    with pytest.raises(ValueError, match=r"pruning.method='obd' is not one of"):
        Pruning(method="obd")


def test_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ModelError, match=r"3 sequences of 5 tokens = 15, and its text has 14"):
        windows([range(7), range(7)], 3, 5)
    cut = windows([range(7), range(9)], 3, 5)
    assert torch.cat(cut).flatten().tolist() == [*range(7), *range(8)]
