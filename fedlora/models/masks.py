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
from safetensors.torch import save_file
from torch import Tensor, nn

from fedlora.core.errors import ModelError
from fedlora.core.reading import json_in, tensors_in
from fedlora.models.folder import MASKS
from fedlora.models.layers import dense_weight
from fedlora.models.modules import linear_layers

Masks: TypeAlias = Mapping[str, Tensor]
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
    """Fraction of weights that are not zero."""
    total = sum(m.numel() for m in masks.values())
    return sum(int(m.sum()) for m in masks.values()) / max(total, 1)


def check_zeros(masks: Masks, weight: Callable[[str], Tensor], where: str) -> None:
    """Raise a ModelError unless weights are finite, and zero exactly where the masks say.

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
        if unbounded := int((~w.isfinite()).sum()):
            raise ModelError(
                f"{where}: {unbounded} weights of {mask.numel()} of {path} are not finite"
            )


def as_stored(mask: Tensor, weight: Tensor, path: str, where: str) -> Tensor:
    """A mask in the layout of a stored weight, ``[d_out, d_in]`` or turned (``Conv1D``).

    The zeros tell which it is, where the shape does not.

    Args:
        mask: ``[d_out, d_in]``.
        weight: as a file has it.
        path: of the module, for the message.
        where: what the weight is of, for the message.

    Raises:
        ModelError: if the zeros are in neither layout where the mask says, or not all is finite.
    """
    turned = mask.T
    if weight.shape == mask.shape == turned.shape:
        chosen = turned if torch.equal(turned, (weight != 0).cpu()) else mask
    else:
        chosen = turned if weight.shape == turned.shape else mask
    check_zeros({path: chosen}, lambda _: weight, where)
    return chosen


def check_network(masks: Masks, network: nn.Module, where: str) -> None:
    """`check_zeros` of a network's linear layers."""
    layers = linear_layers(network, masks)
    check_zeros(masks, lambda path: dense_weight(layers[path]), where)


def save_masks(masks: Masks, folder: Path) -> str:
    """Write masks beside a model's weights; their identity."""
    name = identity(masks)
    shapes = {p: list(m.shape) for p, m in masks.items()}
    metadata = {"identity": name, "shapes": json.dumps(shapes)}
    save_file({p: pack(m) for p, m in masks.items()}, folder / MASKS, metadata=metadata)
    return name


def load_masks(folder: Path) -> dict[str, Tensor]:
    """The masks in a model folder.

    Raises:
        ModelError: if there are none, or they are not what the file says.
    """
    if not (folder / MASKS).is_file():
        raise ModelError(f"{folder} holds no {MASKS}: it is no pruned model")
    with tensors_in(folder / MASKS, "the masks of a pruned model") as file:
        metadata = file.metadata() or {}
        stated = metadata.get("shapes", "{}")
        shapes = json_in(folder / MASKS, "the masks of a pruned model", text=stated)
        masks = {p: unpack(file.get_tensor(p), tuple(shape)) for p, shape in shapes.items()}
    if identity(masks) != metadata.get("identity"):
        raise ModelError(f"{folder / MASKS}: its masks are not those of its identity")
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
        ModelError: if a masked module has no weight, or zeros that are not where its mask says.
    """
    if absent := sorted(p for p in masks if f"{p}.weight" not in state):
        raise ModelError(
            f"{file}: no weight of {absent[0]}, which has a mask ({len(absent)} of {len(masks)})"
        )
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    turned = []
    for name, tensor in state.items():
        path = name.removesuffix(".weight")
        if path == name or path not in masks:
            tensors[name] = tensor.detach().cpu().contiguous().clone()
            continue
        stored = tensor.detach().cpu()
        mask = as_stored(masks[path], stored, path, str(file))
        if mask is not masks[path]:
            turned.append(name)
        tensors[name + _VALUES], tensors[name + _BITS] = stored[mask], pack(mask.contiguous())
        shapes[name] = list(tensor.shape)
    metadata = {"identity": identity(masks), "shapes": json.dumps(shapes)}
    save_file(tensors, file, metadata=metadata | {"turned": json.dumps(turned)})
    return sum(t.numel() * t.element_size() for t in tensors.values())


def load_sparse(file: Path) -> dict[str, Tensor]:
    """The inverse of `save_sparse`, bit by bit.

    Raises:
        ModelError: if the file is no such file, or its masks are not those of its identity.
    """
    what, masks = "the weights of a pruned model", {}
    with tensors_in(file, what) as opened:
        about = opened.metadata() or {}
        if not {"identity", "shapes", "turned"} <= about.keys():
            raise ModelError(f"{file} is no file of weights without their zeros (save_sparse)")
        whole = [k for k in opened.keys() if not k.endswith((_VALUES, _BITS))]  # noqa: SIM118
        state = {key: opened.get_tensor(key) for key in whole}
        for name, shape in json_in(file, what, text=about["shapes"]).items():
            mask = unpack(opened.get_tensor(name + _BITS), tuple(shape))
            values = opened.get_tensor(name + _VALUES)
            state[name] = torch.zeros(shape, dtype=values.dtype).masked_scatter_(mask, values)
            turned = json.dumps(name) in about["turned"]  # a list of names
            masks[name.removesuffix(".weight")] = mask.T if turned else mask
    if identity(masks) != about["identity"]:
        raise ModelError(f"{file}: its masks are not those of its identity")
    return state
