"""The modules of a model whose weights stay quantised, made of an examined checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from nai_t5_core.backends.mps import kept_off_mps
from nai_t5_core.backends.quantised.forms import QuantisedForm
from nai_t5_core.backends.quantised.kernels import runner_of_quantised
from nai_t5_core.backends.quantised.kinds import WEIGHT, Plain, QuantisedWeight
from nai_t5_core.backends.quantised.projections import QuantisedEmbedding, QuantisedLinear
from nai_t5_core.model.block import Block
from nai_t5_core.model.layers import residual_dtype
from nai_t5_core.weights.examine import Examination
from nai_t5_core.weights.formats import CheckpointError
from nai_t5_core.weights.fuse import Recipe
from nai_t5_core.weights.ranges import refuse_infinities

# Tables of position biases are small, and become numbers when the model is loaded.
_CAN_STAY = re.compile(r"shared|.*(SelfAttention|EncDecAttention|DenseReluDense)\.(qkv|kv|q|k|v|o|wi|wi_0|wi_1|wo)")


def that_stay(recipes: list[Recipe], examination: Examination) -> list[Recipe]:
    """The recipes of the tensors that can stay quantised: one of their originals is."""
    return [
        recipe
        for recipe in recipes
        if _CAN_STAY.fullmatch(recipe.target.removesuffix(".weight"))
        and any(part in examination.quantised for part in recipe.parts)
    ]


def refuse_to_keep(recipes: list[Recipe], examination: Examination, device: torch.device) -> None:
    """Raises a CheckpointError if weights that are to stay quantised cannot lie on a device.

    Nothing is read: dtypes are in the file's header.
    """
    tensors = examination.checkpoint.tensors
    stored = (
        examination.quantised[part] for recipe in recipes for part in recipe.parts if part in examination.quantised
    )
    # What is packed by other programs lies as bytes.
    infos = (tensors[name] for each in stored for name in each.parts.values())
    if reason := kept_off_mps(device, (info.dtype for info in infos if not info.packing)):
        raise CheckpointError(f"{examination.checkpoint.source} cannot be loaded on {device}: {reason}")


def refuse_scales(examination: Examination, names: Iterable[str]) -> None:
    """Raises a CheckpointError that lists the quantised weights whose scales are not finite.

    All are looked at before anything is made of any. Where scales stand among the numbers, the file is read for it,
    which the first encode would do.
    """
    faults = list(_scale_faults(examination, names))
    if faults:
        examination.faults += faults
        examination.refuse_faults()


def _scale_faults(examination: Examination, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        fault = examination.quantised_weight(name).fault() if name in examination.quantised else None
        if fault is not None:
            kind = examination.quantised[name].kind.name
            yield f"{name}, of kind {kind}, is damaged: {fault}; fetch the file again"


def held_modules(
    recipes: list[Recipe], examination: Examination, dtype: torch.dtype, device: torch.device
) -> dict[str, QuantisedLinear | QuantisedEmbedding]:
    """The modules in place of projections and tables, by their paths.

    Raises:
        CheckpointError: a weight exceeds float16.
    """
    made: dict[str, QuantisedLinear | QuantisedEmbedding] = {}
    for recipe in recipes:
        forms = [form.to(device) for form in _forms(recipe, examination, dtype)]
        path = recipe.target.removesuffix(".weight")
        made[path] = QuantisedEmbedding(forms[0], dtype) if path == "shared" else QuantisedLinear(forms, dtype)
        if dtype == torch.float16 and path != "shared":
            refuse_infinities(recipe, made[path].plain(), examination.read)
    return made


def _forms(recipe: Recipe, examination: Examination, dtype: torch.dtype) -> Iterator[QuantisedForm]:
    columns = None if recipe.norm is None else examination.read(recipe.norm).to(residual_dtype(dtype))
    for part, scale in zip(recipe.parts, recipe.scales, strict=True):
        yield QuantisedForm(_weight(part, examination), columns, scale)


def _weight(name: str, examination: Examination) -> QuantisedWeight:
    """The weight as it lies in the file; of one that is not quantised, its numbers."""
    if name in examination.quantised:
        return examination.quantised_weight(name)
    numbers = examination.read(name)
    if numbers.ndim != 2:
        raise CheckpointError(f"{name} has shape {list(numbers.shape)}, and a matrix is needed")
    return QuantisedWeight(Plain(numbers.dtype), (numbers.shape[0], numbers.shape[1]), {WEIGHT: numbers})


def place(model: nn.Module, modules: dict[str, Any]) -> None:
    """Puts modules in their places, and has the blocks that hold them computed in the best way there is."""
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
    for block in model.modules():
        if isinstance(block, Block) and any(isinstance(part, QuantisedLinear) for part in block.modules()):
            block.runner = runner_of_quantised(block)
