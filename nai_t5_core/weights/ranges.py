"""Whether the numbers of a checkpoint are within the range of the dtype that they are loaded in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nai_t5_core.model.precision import advice_on, is_finite, keeps_finite, largest_finite
from nai_t5_core.weights.formats import CheckpointError
from nai_t5_core.weights.fuse import Recipe, Workbench, cook

Read = Callable[[str], Tensor]


def cook_within_range(recipe: Recipe, read: Read, dtype: torch.dtype, workbench: Workbench | None = None) -> Tensor:
    """The tensor of a recipe, looked at where it has become something that its originals may exceed.

    A tensor that is taken from the file as it lies there is not read for this.

    Raises:
        CheckpointError: see :func:`refuse_infinities`.
    """
    read_dtypes = set()

    def reading(name: str) -> Tensor:
        original = read(name)
        read_dtypes.add(original.dtype)
        return original

    tensor = cook(recipe, reading, dtype, workbench)
    is_product = tensor.dtype == torch.float16 and not recipe.is_plain
    if is_product or any(_is_narrower(tensor.dtype, original) for original in read_dtypes):
        refuse_infinities(recipe, tensor, read)
    return tensor


def refuse_infinities(recipe: Recipe, tensor: Tensor, read: Read) -> None:
    """Refuses a tensor that is not finite; what the guard would find later, it could not mend.

    Rows of the embedding may be anything in the file, since most prompts use few of them; the guard tells who does.

    Raises:
        CheckpointError: it is not; the message says whether the weights are damaged, or which dtypes hold them.
    """
    if is_finite(tensor):
        return
    if recipe.target == "shared.weight" and keeps_finite(read("shared.weight"), tensor):
        return
    raise CheckpointError(
        f"{recipe.target} has values that are not finite in {tensor.dtype}: {_cause(recipe, tensor, read)}"
    )


def _cause(recipe: Recipe, tensor: Tensor, read: Read) -> str:
    for name in recipe.originals:
        original = read(name)
        wide_enough = original.float() if original.dtype.itemsize == 1 else original
        if recipe.target != "shared.weight" and not is_finite(wide_enough):
            return f"the weights are damaged, {name} holds NaN or infinity; fetch them again"
    largest = largest_finite(cook(recipe, read, torch.float64))
    end = torch.finfo(tensor.dtype).max
    return f"they reach {largest:.3g}, and it ends at {end:.5g}; {advice_on(largest)}"


def _is_narrower(dtype: torch.dtype, original: torch.dtype) -> bool:
    """Whether numbers of the original may exceed it by more than a rounding, as bfloat16 is exceeded by float32."""
    if not (dtype.is_floating_point and original.is_floating_point):
        return False
    return torch.finfo(original).max > 2 * torch.finfo(dtype).max
