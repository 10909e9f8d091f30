"""Masks of a pruned model: their identity, their place on disk, and whether the zeros agree.

A mask is a bool tensor ``[d_out, d_in]`` per module path, true where a weight is not zero. Whatever
is trained on a pruned base means nothing on another mask, so its identity goes wherever that goes.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedlora.models.folder import ModelError
from fedlora.models.layers import dense_weight
from fedlora.prune.activations import linear_layers

Masks: TypeAlias = Mapping[str, Tensor]
FILE = "masks.safetensors"
_VALUES, _BITS = "/values", "/bits"


def pack(mask: Tensor) -> Tensor:
    """Eight positions per byte, row-major: ``[ceil(d_out d_in / 8)]`` uint8."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`."""
    count = int(np.prod(shape))
    flat = np.unpackbits(bits.cpu().numpy(), count=count).astype(bool)
    return torch.from_numpy(flat).view(shape)


def identity(masks: Masks) -> str:
    """Hash of which weights of which modules are not zero; the order of modules does not matter."""
    digest = hashlib.sha256()
    for path in sorted(masks):
        digest.update(f"{path}\0{tuple(masks[path].shape)}\0".encode())
        digest.update(pack(masks[path]).numpy().tobytes())
    return digest.hexdigest()[:16]


def density(masks: Masks) -> float:
    """Share of weights that are not zero."""
    total = sum(m.numel() for m in masks.values())
    return sum(int(m.sum()) for m in masks.values()) / max(total, 1)


def check_zeros(masks: Masks, weight: Callable[[str], Tensor], where: str) -> None:
    """Raise a ModelError unless weights are zero exactly where the masks say.

    Args:
        masks: by module path.
        weight: of a module, ``[d_out, d_in]``.
        where: what the weights are of, for the message.
    """
    for path, mask in masks.items():
        w = weight(path)
        if w.shape != mask.shape:
            raise ModelError(
                f"{where}: {path} is {list(w.shape)}, its mask {list(mask.shape)}: the mask is of "
                "another model"
            )
        nonzero = (w != 0).cpu()
        filled, lost = int((nonzero & ~mask).sum()), int((mask & ~nonzero).sum())
        if filled or lost:
            raise ModelError(
                f"{where}: the zeros of {path} are not where its mask says: {filled} weights of "
                f"{mask.numel()} that should be zero are not, {lost} that should not be are zero"
            )


def check_network(masks: Masks, network: nn.Module, where: str) -> None:
    """`check_zeros` of a network's linear layers."""
    layers = linear_layers(network, masks)
    check_zeros(masks, lambda path: dense_weight(layers[path]), where)


def save_masks(masks: Masks, folder: Path) -> str:
    """Write masks beside a model's weights; their identity."""
    name = identity(masks)
    shapes = {p: list(m.shape) for p, m in masks.items()}
    metadata = {"identity": name, "shapes": json.dumps(shapes)}
    save_file({p: pack(m) for p, m in masks.items()}, folder / FILE, metadata=metadata)
    return name


def mask_identity(folder: Path) -> str:
    """Of the masks in a model folder; empty: it has none. Reads a header."""
    if not (folder / FILE).is_file():
        return ""
    with safe_open(folder / FILE, framework="pt") as file:
        return str((file.metadata() or {}).get("identity", ""))


def load_masks(folder: Path) -> dict[str, Tensor]:
    """The masks in a model folder.

    Raises:
        ModelError: if there are none, or they are not what the file says.
    """
    if not (folder / FILE).is_file():
        raise ModelError(f"{folder} holds no {FILE}: it is no pruned model")
    with safe_open(folder / FILE, framework="pt") as file:
        metadata = file.metadata() or {}
        shapes = json.loads(metadata.get("shapes", "{}"))
        masks = {p: unpack(file.get_tensor(p), tuple(shape)) for p, shape in shapes.items()}
    if identity(masks) != metadata.get("identity"):
        raise ModelError(f"{folder / FILE}: its masks are not those of its identity")
    return masks


def save_sparse(state: Mapping[str, Tensor], masks: Masks, file: Path) -> int:
    """Write weights without their zeros: per masked module its other values and one bit per weight.

    Args:
        state: tensors by name as the model's files have them; weights of masked modules are
            ``<path>.weight [d_out, d_in]``, or ``[d_in, d_out]`` (Conv1D).
        masks: by module path.
        file: to write.

    Returns:
        Bytes of all tensors: of a masked weight, ``nnz`` values and ``ceil(d_out d_in / 8)``.

    Raises:
        ModelError: if a weight's zeros are not where its mask says.
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in state.items():
        path = name.removesuffix(".weight")
        if path == name or path not in masks:
            tensors[name] = tensor.detach().cpu().contiguous().clone()
            continue
        mask = masks[path] if tensor.shape == masks[path].shape else masks[path].T
        stored = tensor.detach().cpu()
        check_zeros({path: mask}, lambda _, w=stored: w, str(file))  # type: ignore[misc]
        tensors[name + _VALUES], tensors[name + _BITS] = stored[mask], pack(mask.contiguous())
        shapes[name] = list(tensor.shape)
    metadata = {"identity": identity(masks), "shapes": json.dumps(shapes)}
    save_file(tensors, file, metadata=metadata)
    return sum(t.numel() * t.element_size() for t in tensors.values())


def load_sparse(file: Path) -> dict[str, Tensor]:
    """The inverse of `save_sparse`, bit by bit."""
    with safe_open(file, framework="pt") as opened:
        shapes = json.loads((opened.metadata() or {})["shapes"])
        found = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    state = {k: t for k, t in found.items() if not k.endswith((_VALUES, _BITS))}
    for name, shape in shapes.items():
        values = found[name + _VALUES]
        weight = torch.zeros(shape, dtype=values.dtype)
        weight[unpack(found[name + _BITS], tuple(shape))] = values
        state[name] = weight
    return state
