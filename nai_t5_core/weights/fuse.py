"""How the tensors of a model are made from those of a Hugging Face checkpoint: as they are, or fused.

A recipe names the originals that are stacked on top of each other and the norm whose weight is multiplied into their
columns. Pure functions on tensors; what is read from where is the caller's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nai_t5_core.facts.config import Shape, T5Config, decoder_tensors, encoder_tensors
from nai_t5_core.facts.scales import StackScales

# Numbers that are multiplied at a time.
_SLICE = 1 << 18
_LAYER_WEIGHT = re.compile(
    r"(?P<stack>encoder|decoder)\.block\.(?P<layer>\d+)\.layer\.\d\.(?P<module>\w+)\.(?P<projection>\w+)\.weight"
)


@dataclass(frozen=True)
class Recipe:
    """One tensor of the model.

    ``parts`` are the originals, stacked along the rows; ``norm`` the norm weight that multiplies their columns, or
    None; ``scales`` the power of two that multiplies each part. ``in_float32`` tensors keep that precision whatever the
    model's dtype.
    """

    target: str
    parts: tuple[str, ...]
    shape: Shape
    norm: str | None = None
    scales: tuple[float, ...] = (1.0,)
    in_float32: bool = False

    def dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.in_float32 else model_dtype

    @property
    def originals(self) -> tuple[str, ...]:
        return self.parts if self.norm is None else (*self.parts, self.norm)

    @property
    def is_plain(self) -> bool:
        """The original itself, at most cast."""
        return len(self.parts) == 1 and self.norm is None and self.scales == (1.0,)


def separate_recipes(config: T5Config, scales: StackScales | None = None) -> list[Recipe]:
    """Every tensor as it is in the checkpoint; of the scales, only the embedding's touches a weight."""
    shapes = encoder_tensors(config) | decoder_tensors(config)
    embedding = scales.embedding if scales else 1.0
    return [
        Recipe(
            name,
            (name,),
            shape,
            scales=(embedding if name == "shared.weight" else 1.0,),
            in_float32="layer_norm" in name,
        )
        for name, shape in shapes.items()
    ]


def fused_recipes(
    config: T5Config, scales: StackScales | None = None, decoder_scales: StackScales | None = None
) -> list[Recipe]:
    """q, k, v (k, v in cross-attention) and gate, up joined, each with the norm before it multiplied in.

    ``scales`` are those of the encoder and of the embedding; both are multiplied into the weights as
    :mod:`nai_t5_core.facts.scales` says.
    """
    return list(_fused(encoder_tensors(config) | decoder_tensors(config), scales, decoder_scales))


def _fused(
    shapes: dict[str, Shape], scales: StackScales | None, decoder_scales: StackScales | None
) -> Iterator[Recipe]:
    taken: set[str] = set()
    for name, shape in shapes.items():
        if name in taken:
            continue
        parts: tuple[str, ...] = (name,)
        target, norm = name, None
        module, _, projection = name.removesuffix(".weight").rpartition(".")
        sublayer = module.rpartition(".")[0]
        before = f"{sublayer}.layer_norm.weight"
        match projection:
            case "q" if "EncDecAttention" in module:
                norm = before
            case "q":
                parts, norm = _siblings(module, "q", "k", "v"), before
                target = f"{module}.qkv.weight"
            case "k":
                # Cross-attention reads the encoder's final hidden states, which no norm of the decoder touches.
                parts, target = _siblings(module, "k", "v"), f"{module}.kv.weight"
            case "wi_0":
                parts, norm = _siblings(module, "wi_0", "wi_1"), before
                target = f"{module}.wi.weight"
            case "wi":
                norm = before
            case "layer_norm":
                target = f"{module}.layer_norm.folded_weight"
        taken.update(parts)
        rows = sum(shapes[part][0] for part in parts)
        factors = tuple(_factor(part, scales, decoder_scales) for part in parts)
        yield Recipe(target, parts, (rows, *shape[1:]), norm, factors, in_float32="layer_norm" in name)


def _factor(name: str, scales: StackScales | None, decoder_scales: StackScales | None) -> float:
    """What an original tensor is multiplied by."""
    if name == "shared.weight":
        return scales.embedding if scales else 1.0
    match = _LAYER_WEIGHT.match(name)
    stack_scales = scales if match and match["stack"] == "encoder" else decoder_scales
    if match is None or stack_scales is None:
        return 1.0
    layer = stack_scales.layers[int(match["layer"])]
    factors = {
        "o": layer.cross_attention_out if match["module"] == "EncDecAttention" else layer.attention_out,
        "wi": layer.hidden,
        "wi_1": layer.hidden,
        "wo": layer.feed_forward_out / layer.hidden,
    }
    return factors.get(match["projection"], 1.0)


def _siblings(module: str, *projections: str) -> tuple[str, ...]:
    return tuple(f"{module}.{projection}.weight" for projection in projections)


def originals(recipes: list[Recipe]) -> list[str]:
    """The names of all that goes into some tensors, each once."""
    return list(dict.fromkeys(name for recipe in recipes for name in recipe.originals))


def folded_norm(norm: str) -> str:
    """Where a fused model keeps the norm weight of this name."""
    return norm.replace("layer_norm.weight", "layer_norm.folded_weight")


class Workbench:
    """Where slices of weights are multiplied, one after the other.

    One serves for all weights of a model: memory that is freed between two weights is a hole by then, since something
    small that stays, such as a norm's weight, was put into it. Such holes were 4 % of a model.
    """

    def __init__(self) -> None:
        self._room = torch.empty(0)

    def multiply(self, part: Tensor, factor: Tensor | float, precision: torch.dtype, target: Tensor) -> None:
        """Puts the product, which is taken in a precision and rounded once, into a target of the part's shape."""
        width = max(1, part[0].numel())
        count = max(1, _SLICE // width)
        room = self._of(max(_SLICE, width), precision, part.device)
        for rows, place in zip(part.split(count), target.split(count), strict=True):
            product = room[: rows.numel()].view(rows.shape)
            place.copy_(product.copy_(rows).mul_(factor))

    def _of(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        fits = self._room.numel() >= size and (self._room.dtype, self._room.device) == (dtype, device)
        if not fits:
            self._room = torch.empty(size, dtype=dtype, device=device)
        return self._room


def cook(
    recipe: Recipe, read: Callable[[str], Tensor], model_dtype: torch.dtype, workbench: Workbench | None = None
) -> Tensor:
    """Makes one tensor of the model; products are taken in float32 (float64 in a float64 model) and rounded once.

    Where nothing is to be joined, multiplied or cast, the original itself is returned (perhaps a view of its file).
    """
    dtype = recipe.dtype(model_dtype)
    if recipe.is_plain:
        return read(recipe.parts[0]).to(dtype)
    workbench = workbench or Workbench()
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    norm = None if recipe.norm is None else read(recipe.norm).to(precision)
    out: Tensor | None = None
    row = 0
    for name, scale in zip(recipe.parts, recipe.scales, strict=True):
        part = read(name)
        if out is None:  # on the device of the originals, which may hold a loaded model
            out = torch.empty(recipe.shape, dtype=dtype, device=part.device)
        target = out[row : row + len(part)]
        if norm is None and scale == 1:
            target.copy_(part)
        else:
            workbench.multiply(part, scale if norm is None else norm * scale, precision, target)
        row += len(part)
    assert out is not None, "a recipe has parts"
    return out


def uncook(recipe: Recipe, read: Callable[[str], Tensor], shapes: dict[str, Shape]) -> Iterator[tuple[str, Tensor]]:
    """The inverse: the originals of one fused tensor, by name, in float32 (float64 where the model is).

    ``read`` gives tensors of the fused model by name, ``shapes`` the shapes of the originals. Exact to the rounding of
    one multiplication and one division; columns that a norm weight of zero has wiped out come back as zeros.
    """
    for name in recipe.parts:
        yield name, uncook_part(recipe, name, read, shapes)


def uncook_part(recipe: Recipe, name: str, read: Callable[[str], Tensor], shapes: dict[str, Shape]) -> Tensor:
    """One of the originals that :func:`uncook` gives, without the work for the others."""
    index = recipe.parts.index(name)
    first = sum(shapes[before][0] for before in recipe.parts[:index])
    rows = read(recipe.target)[first : first + shapes[name][0]]
    part = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
    if recipe.norm is not None:
        norm = read(folded_norm(recipe.norm)).to(part.dtype)
        part = torch.where(norm == 0, 0, part / norm)
    return part / recipe.scales[index]


def unfuse(
    config: T5Config,
    read: Callable[[str], Tensor],
    scales: StackScales | None = None,
    decoder_scales: StackScales | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every original tensor of a fused model with these scales, under its Hugging Face name."""
    shapes = encoder_tensors(config) | decoder_tensors(config)
    for recipe in fused_recipes(config, scales, decoder_scales):
        yield from uncook(recipe, read, shapes)
