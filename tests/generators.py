"""The nouns of the project, made small and exact: settings, cohorts, updates, and the vectors.

Everything is float64, `ALPHA` is nobody's default, no layer is square, and the module order is not
the alphabetical one, so that a forgotten scale, a transpose or a lost order cannot hide.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from fedlora.algebra.init import initial_a
from fedlora.algebra.linalg import stack
from fedlora.core.payload import Payload
from fedlora.core.seeding import mask_noise, torch_generator
from fedlora.core.types import Adapter, Client, Factors, Module, Ranks, Setting, Update
from fedlora.techniques.cores.payload import CorePayload
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.rebased.payload import Rebased
from fedlora.techniques.sparse.payload import SparseDelta
from fedlora.techniques.spp.payload import MaskedScale, alpha_of, merged_gain, scale
from fedlora.techniques.spp.scale import factor

ALPHA = 12.0
MASK = "0123456789abcdef"
"""Of a base that may be pruned; only methods that need one look at it."""

MODULES = (
    Module("model.layers.2.self_attn.v_proj", "attention", d_out=6, d_in=5),
    Module("model.layers.2.mlp.up_proj", "mlp", d_out=9, d_in=7),
    Module("model.layers.10.self_attn.v_proj", "attention", d_out=5, d_in=8),
)

TIERS: Mapping[str, tuple[int, int]] = {"T1": (1, 2), "T2": (2, 2), "T3": (2, 5), "T4": (5, 6)}
"""(attention, mlp) ranks by tier."""


ROOMY = tuple(replace(m, d_out=m.d_out + 5, d_in=m.d_in + 5) for m in MODULES)
"""The same, where one more than any tier's rank still leaves vectors to exchange (SwitchLoRA)."""


def roomy_setting(tiers: Sequence[str] = ("T1", "T2", "T3", "T4", "T1", "T4")) -> Setting:
    """The population of `setting`, with ranks one larger, on `ROOMY` modules."""
    usual = setting(tiers)
    clients = tuple(
        replace(c, ranks=Ranks({p: r + 1 for p, r in c.ranks.items()})) for c in usual.clients
    )
    return replace(usual, modules=ROOMY, clients=clients)


def ranks_of(tier: str) -> Ranks:
    attention, mlp = TIERS[tier]
    return Ranks({m.path: attention if m.kind == "attention" else mlp for m in MODULES})


def setting(
    tiers: Sequence[str] = ("T1", "T2", "T3", "T4", "T1", "T4"),
    *,
    alpha: float = ALPHA,
    seed: int = 5,
    parameters: int = 700,
) -> Setting:
    """A population with one client per entry of ``tiers``, of 10, 17, 24, ... examples."""
    clients = tuple(
        Client(id=i, ranks=ranks_of(t), num_examples=10 + 7 * i, tier=t)
        for i, t in enumerate(tiers)
    )
    return Setting(
        modules=MODULES,
        model_parameters=parameters,
        alpha=alpha,
        clients=clients,
        seed=seed,
        mask=MASK,
    )


def as_payload(value: Payload | Adapter) -> Payload:
    """What a strategy's hook gives as what travels."""
    return value if isinstance(value, Payload) else LowRankPayload(value)


def trained(payload: Payload | Adapter, seed: int, size: float = 1.0) -> Payload:
    """A start payload after some training: every number moved, float64; the same form, but of
    factors over a moved base only the factors."""
    g = torch_generator(seed, "test-training")

    def moved(t: Tensor) -> Tensor:
        return t.double() + size * torch.randn(t.shape, generator=g, dtype=torch.float64)

    if isinstance(payload, SparseDelta):
        return replace(payload, values={p: moved(v) for p, v in payload.values.items()})
    if isinstance(payload, MaskedScale):
        return _trained_scale(payload, moved)
    if isinstance(payload, CorePayload):
        own = {n: moved(t) if "/core" in n else t for n, t in payload.tensors()}
        return CorePayload.from_header(payload.header(), own)
    if isinstance(payload, Rebased):
        payload = payload.factors
    return LowRankPayload({p: Factors(moved(f.a), moved(f.b), f.alpha) for p, f in payload.items()})


def with_tensors(payload: CorePayload, do: Callable[[Tensor], Tensor]) -> CorePayload:
    """The same with each of its tensors replaced."""
    tensors = {name: do(t) for name, t in payload.tensors()}
    return CorePayload.from_header(payload.header(), tensors)


def _trained_scale(payload: MaskedScale, moved: Callable[[Tensor], Tensor]) -> MaskedScale:
    """What its round trains has moved; what stays is kept, so that its effect can be seen."""
    alpha, beta, change = (
        {p: t.clone() for p, t in tensors.items()}
        for tensors in (payload.alpha, payload.beta, payload.change)
    )
    if payload.trains != "alpha":
        beta = {p: moved(b) for p, b in beta.items()}
    if payload.trains != "beta":
        change = {p: moved(torch.zeros(r, alpha[p].shape[1])) for p, r in payload.tied.items()}
        alpha = {p: a if p in change else moved(a) for p, a in alpha.items()}
    merges = tuple({p: (a.clone(), b.clone()) for p, (a, b) in m.items()} for m in payload.merges)
    return replace(payload, alpha=alpha, beta=beta, change=change, merges=merges)


def factors(m: int, n: int, r: int, seed: int, alpha: float = ALPHA) -> Factors:
    """Random factors of one module."""
    g = torch_generator(seed, "test-factors", m, n, r)
    a = torch.randn(r, n, generator=g, dtype=torch.float64)
    b = torch.randn(m, r, generator=g, dtype=torch.float64)
    return Factors(a, b, alpha)


def dense(payload: Payload | Adapter, modules: Sequence[Module] = MODULES) -> dict[str, Tensor]:
    """What a payload adds to the base weights; of a scale, to what they are multiplied by."""
    if isinstance(payload, MaskedScale):
        drawn = {
            m.path: initial_a(payload.seed, m, payload.blocks[m.path])
            for m in modules
            if payload.seed >= 0
        }
        whole = replace(payload, alpha={**drawn, **payload.alpha})
        return {m.path: gain(whole, m.path) - 1 for m in modules}
    """What a payload adds to the base weights."""
    if isinstance(payload, Rebased):
        products = {
            p: Factors(f.a.double(), f.b.double(), f.alpha).delta()
            for p, f in payload.factors.items()
        }
        return {p: d.double() + products.get(p, 0.0) for p, d in payload.shift.items()}
    if isinstance(payload, CorePayload):
        payload = payload.low_rank()
    if not isinstance(payload, SparseDelta):
        return {p: f.delta() for p, f in payload.items()}
    out = {}
    for m in modules:
        mask = mask_noise(payload.seed, m.path, m.d_out, m.d_in) < payload.density
        d = torch.zeros(m.d_out, m.d_in, dtype=torch.float64)
        d[mask] = payload.values[m.path].double()
        out[m.path] = d
    return out


def lone(path: str, f: Factors, id: int = 0, examples: int = 1) -> Update:
    """An update of one module."""
    client = Client(id=id, ranks=Ranks({path: f.rank}), num_examples=examples)
    return Update(client=client, payload=LowRankPayload({path: f}), num_examples=examples)


def single_module_setting(
    m: int, n: int, ranks: Sequence[int], *, alpha: float = ALPHA, seed: int = 3
) -> Setting:
    """A population over one module ``w``; client ``i`` has rank ``ranks[i]``."""
    clients = tuple(Client(i, Ranks({"w": r}), 10 * (i + 1), f"r{r}") for i, r in enumerate(ranks))
    return Setting((Module("w", "attention", m, n),), m * n * 4, alpha, clients, seed)


# The vectors of the specification: m = 6, n = 5, alpha = 4, n_k = 10, 20, 30.


def vector_factors(k: int, rank: int, m: int = 6, n: int = 5, alpha: float = 4.0) -> Factors:
    """``B[i,j] = sin((i+1)²(j+1) + 7(k+1))``, ``A[i,j] = cos((j+1)²(i+1) + 3(k+1))``."""
    b = [[math.sin((i + 1) ** 2 * (j + 1) + 7 * (k + 1)) for j in range(rank)] for i in range(m)]
    a = [[math.cos((j + 1) ** 2 * (i + 1) + 3 * (k + 1)) for j in range(n)] for i in range(rank)]
    as64 = [torch.tensor(x, dtype=torch.float64) for x in (a, b)]
    return Factors(as64[0], as64[1], alpha)


VECTOR_EXAMPLES = (10, 20, 30)


def vector_updates(ranks: Sequence[int]) -> list[Update]:
    return [
        lone("w", vector_factors(k, r), id=k, examples=n)
        for k, (r, n) in enumerate(zip(ranks, VECTOR_EXAMPLES, strict=True))
    ]


def numbers(text: str) -> Tensor:
    """Numbers as printed, as float64."""
    return torch.tensor([float(x) for x in text.split()], dtype=torch.float64)


seeds = st.integers(0, 10**6)

shapes = st.tuples(st.integers(2, 9), st.integers(2, 9)).filter(lambda s: s[0] != s[1])


@st.composite
def stacks(draw: st.DrawFn, *, same_rank: bool = False) -> tuple[list[Factors], list[float]]:
    """Factors of a few clients on one module, with positive shares that sum to 1."""
    m, n = draw(shapes)
    top = min(m, n)
    count = draw(st.integers(1, 5))
    common = draw(st.integers(1, top))
    ranks = [common if same_rank else draw(st.integers(1, top)) for _ in range(count)]
    seed = draw(seeds)
    weights = draw(st.lists(st.integers(1, 50), min_size=count, max_size=count))
    p = [w / sum(weights) for w in weights]
    return [factors(m, n, r, seed + k) for k, r in enumerate(ranks)], p


def gain(payload: MaskedScale, path: str) -> Tensor:
    """``[d_out, d_in]``: what a module's weight is multiplied by in all."""
    last = 1 + scale(payload, path) * factor(alpha_of(payload, path), payload.beta[path])
    before = merged_gain(payload, path)
    return last if before is None else before * last


def weighted_delta(factors: Sequence[Factors], p: Sequence[float]) -> Tensor:
    """``Σ_k p_k s_k B_k A_k [d_out, d_in]`` as a dense matrix."""
    b, a = stack(factors, p)
    return b @ a
