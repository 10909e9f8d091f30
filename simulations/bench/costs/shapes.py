"""Populations on the shapes of a model's adapted layers, without the model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.core.rates import LR_SUM
from fedlora.core.seeding import torch_generator
from fedlora.core.types import Client, Factors, Module, Setting, TrainJob, Update
from fedlora.models.spec import Tiny
from fedlora.population.ranks import RankDistribution, module_ranks, quotas
from simulations.bench.aggregation import ALPHA, KINDS, LAYERS, PARAMETERS

SEED = 5
MASK = "0123456789abcdef"
"""Identity of the zeros of a base that may be pruned; only SPP looks at it."""
DENSITY = 0.5
EXAMPLES = 20
"""Examples of every client."""
MOVED = 0.01
"""Standard deviation of what training adds to each scalar."""


@dataclass(frozen=True)
class Shapes:
    """The adapted layers of some blocks of a model."""

    name: str
    modules: tuple[Module, ...]
    parameters: int
    """Parameters of the model, in proportion to the blocks: budgets of ranks and masks refer to
    them."""
    blocks: int
    model_blocks: int

    @property
    def scale(self) -> float:
        """What a measurement of these blocks is multiplied by to be one of the model."""
        return self.model_blocks / self.blocks


def tiny() -> Shapes:
    """The shipped model, whole."""
    info = Tiny().describe()
    return Shapes("tiny", info.modules, info.parameters, info.blocks, info.blocks)


def smollm2(blocks: int = LAYERS) -> Shapes:
    """Some of the 30 blocks of SmolLM2-135M, which are all alike."""
    modules = tuple(
        Module(_path(block, kind, name), "attention" if kind == "attention" else "mlp", d_out, d_in)
        for block in range(blocks)
        for names, kind, d_out, d_in, _ in KINDS
        for name in names.split(", ")
    )
    return Shapes("SmolLM2-135M", modules, PARAMETERS * blocks // LAYERS, blocks, LAYERS)


def _path(block: int, kind: str, name: str) -> str:
    return f"model.layers.{block}.{'self_attn' if kind == 'attention' else 'mlp'}.{name}"


def population(shapes: Shapes, ranks: RankDistribution, clients: int) -> Setting:
    """Clients of these ranks on these layers."""
    tiers = ranks.resolve(shapes.modules, shapes.parameters)
    numbers = quotas([t.fraction for t in tiers], clients)
    names = [t.name for t, number in zip(tiers, numbers, strict=True) for _ in range(number)]
    held = {t.name: module_ranks(t, shapes.modules, clamp=True) for t in tiers}
    enrolled = tuple(Client(i, held[name], EXAMPLES, name) for i, name in enumerate(names))
    return Setting(
        shapes.modules, shapes.parameters, ALPHA, enrolled, SEED, mask=MASK, density=DENSITY
    )


def answered(job: TrainJob) -> Update:
    """What a client might send: its start, with noise on the factors that its plan trains, or on
    all of it where it is something else."""
    g = torch_generator(job.seed, "bench-costs", job.round, job.client.id)

    def moved(t: Tensor) -> Tensor:
        return t + MOVED * torch.randn(t.shape, generator=g)

    start, factors = job.start, job.start.low_rank()
    other = start.parametrisation(torch.float32, torch.device("cpu"))
    if factors is None or other is not None:
        tensors = {name: moved(t) for name, t in start.tensors()}
        payload = start.from_header(start.header(), tensors)
    else:
        a, b = (moved if trains else _same for trains in (job.plan.train_a, job.plan.train_b))
        payload = start.trained(
            {path: Factors(a(f.a), b(f.b), f.alpha) for path, f in factors.items()}
        )
    return Update(job.client, payload, job.client.num_examples, {LR_SUM: 0.25})


def _same(t: Tensor) -> Tensor:
    return t
