"""What tests of weights in 8 bits on CUDA share: projections and small encoders of every kind that the kernels read."""

from __future__ import annotations

import copy
from typing import Any

import torch
from conftest import TOY_CONFIGS, random_state
from cuda_toys import DEVICE, draw
from torch import Tensor

from nai_t5_core.backends.cuda.int8 import quantise_block
from nai_t5_core.backends.quantised.kinds import WEIGHT, QuantisedWeight
from nai_t5_core.backends.quantised.packing import pack
from nai_t5_core.backends.quantised.projections import QuantisedForm, QuantisedLinear
from nai_t5_core.backends.quantised.scaled import SCALE, Scaled
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import StackScales
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.weights.fuse import fused_recipes


def _float8(weight: Tensor, dtype: torch.dtype, by_row: bool | None) -> QuantisedWeight:
    """By row, by weight, or (None) without a scale."""
    name = str(dtype).removeprefix("torch.")
    shape = (weight.shape[0], weight.shape[1])
    if by_row is None:
        return QuantisedWeight(Scaled(name, dtype), shape, {WEIGHT: weight.to(dtype)})
    largest = weight.abs().amax(1, keepdim=True) if by_row else weight.abs().amax()
    scale = largest / torch.finfo(dtype).max
    return QuantisedWeight(Scaled(name, dtype), shape, {WEIGHT: (weight / scale).to(dtype), SCALE: scale})


def _int8_with_unit(weight: Tensor) -> QuantisedWeight:
    """As bitsandbytes keeps it: the scale of a row is its largest number."""
    largest = weight.abs().amax(1)
    values = (weight / largest[:, None] * 127).round().to(torch.int8)
    kind = Scaled("LLM.int8()", torch.int8, unit=1 / 127)
    return QuantisedWeight(kind, (weight.shape[0], weight.shape[1]), {WEIGHT: values, SCALE: largest})


# The toys of other tests, with rows that are whole blocks of 32.
CONFIGS = {kind: config.model_copy(update={"d_ff": 96}) for kind, config in TOY_CONFIGS.items()}
# From a weight [rows, columns] in float32.
KINDS = {
    "int8": lambda weight: pack(weight, "int8"),
    "int8 with a unit": _int8_with_unit,
    "float8": lambda weight: pack(weight, "float8"),
    "float8 by row": lambda weight: _float8(weight, torch.float8_e4m3fn, True),
    "float8 without a scale": lambda weight: _float8(weight, torch.float8_e4m3fn, None),
    "e5m2": lambda weight: _float8(weight, torch.float8_e5m2, True),
    "Q8_0": lambda weight: pack(weight, "q8_0"),
}


def linear_of(kind: str, *shapes: tuple[int, int], norm: bool = False, dtype: torch.dtype = torch.float16) -> Any:
    """A projection of several forms, each with a scale of its own, on the device."""
    columns = draw(shapes[0][1], seed=9).abs().cpu() + 0.5 if norm else None
    forms = []
    for number, shape in enumerate(shapes):
        weight = draw(*shape, seed=number + 1).cpu() * shape[1] ** -0.5
        forms.append(QuantisedForm(KINDS[kind](weight), columns, 0.5**number))
    return QuantisedLinear([form.to(torch.device(DEVICE)) for form in forms], dtype)


def exact_weight(linear: QuantisedLinear) -> Tensor:
    """[out_features, in_features] float64: what the bytes stand for, with the norm's weight."""
    return torch.cat([form.original().double() for form in linear.forms])


def quantised_stack(
    kind: str, config: T5Config | None = None, dtype: torch.dtype = torch.float16, scales: StackScales | None = None
) -> T5EncoderStack:
    """A small encoder whose projections are of a kind; "int8 by us" is what ``quantize="int8"`` makes."""
    from cuda_toys import stack_of

    config = (config or CONFIGS["v1.1"]).encoder_only()
    stack: Any = stack_of(config, dtype, scales, device="cpu")
    if kind == "int8 by us":
        for block in stack.encoder.block:
            quantise_block(block, dtype, torch.device(DEVICE))
        return stack.to(DEVICE)
    state = random_state(config)
    for recipe in fused_recipes(config, stack.scales):
        path = recipe.target.removesuffix(".weight")
        if path.rpartition(".")[2] not in ("qkv", "o", "wi", "wo"):
            continue
        columns = None if recipe.norm is None else state[recipe.norm]
        forms = [
            QuantisedForm(KINDS[kind](state[part]), columns, scale)
            for part, scale in zip(recipe.parts, recipe.scales, strict=True)
        ]
        owner, _, name = path.rpartition(".")
        setattr(stack.get_submodule(owner), name, QuantisedLinear(forms, dtype))
    return stack.to(DEVICE)


def exact_of_quantised(stack: T5EncoderStack) -> T5EncoderStack:
    """The same numbers, unpacked, in float64 on the CPU."""
    from nai_t5_core.model.layers import NoInit

    exact: Any = copy.deepcopy(stack).cpu()
    for module in list(exact.modules()):
        for name, child in module.named_children():
            if isinstance(child, QuantisedLinear):
                plain = NoInit.Linear(child.in_features, child.out_features, bias=False, device="meta")
                plain.weight = torch.nn.Parameter(exact_weight(child), requires_grad=False)
                setattr(module, name, plain)
    for block in exact.encoder.block:
        block.runner = None
    exact.runner = None
    return exact.double()
