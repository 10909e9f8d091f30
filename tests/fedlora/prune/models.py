"""Small pruned models, and scales for them."""

from dataclasses import replace
from pathlib import Path

import torch

from fedlora.algebra.init import initial_a
from fedlora.models.folder import mask_identity
from fedlora.models.language_model import LanguageModel
from fedlora.models.layers import dense_weight
from fedlora.models.masks import identity
from fedlora.prune.prune import Pruning, prune
from fedlora.techniques.spp.payload import MaskedScale
from tests.fedlora.models.networks import NETWORKS, wrap
from tests.fedlora.prune.text import batches

LORA_ALPHA = 6.0


def pruned(
    name: str = "llama",
    pattern: str = "0.5",
    dtype: torch.dtype = torch.float64,
    targets: str | tuple[str, ...] = "all-linear",
) -> LanguageModel:
    """A random model pruned by Wanda, as a spec loads it."""
    model = wrap(NETWORKS[name]().to(dtype), targets)
    masks = prune(model.network, list(model.layers), Pruning(pattern=pattern), batches())
    model.info = replace(model.info, mask=identity(masks))
    return model


def reopened(
    folder: Path,
    name: str = "llama",
    targets: str | tuple[str, ...] = "all-linear",
    split: bool = False,
) -> LanguageModel:
    """A pruned model in a folder, as a spec with these targets loads it."""
    kind = type(NETWORKS[name]())
    model = wrap(kind.from_pretrained(folder), targets, split)
    model.info, model.folder = replace(model.info, mask=mask_identity(folder)), folder
    return model


def scale(model: LanguageModel, rank: int = 4, *, zero: bool = False, seed: int = 1) -> MaskedScale:
    """Random alpha and beta of one rank; ``zero``: beta = 0, alpha as it starts."""
    g = torch.Generator().manual_seed(seed)
    alpha, beta = {}, {}
    for m in model.info.modules:
        drawn = torch.randn(rank, m.d_in, generator=g, dtype=torch.float64)
        alpha[m.path] = initial_a(seed, m, rank).double() if zero else 0.5 * drawn
        beta[m.path] = (0 if zero else 0.5) * torch.randn(m.d_out, generator=g, dtype=torch.float64)
    blocks = {m.path: rank for m in model.info.modules}
    return MaskedScale(model.info.mask, LORA_ALPHA, blocks, alpha, beta)


def zeros(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {p: dense_weight(x.base) == 0 for p, x in model.layers.items()}
