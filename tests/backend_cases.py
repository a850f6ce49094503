"""Every backend that a block can be bound to. What is entered here is tested by all of test_backends.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, random_state
from torch import Tensor

from nai_t5_core.backends.choose import prepack, quantize_int8, run_in_place
from nai_t5_core.backends.held import ByModules
from nai_t5_core.backends.kernels.build import missing_for, prepare_kernels
from nai_t5_core.backends.kernels.runners import INT8_KERNELS, KERNELS, KernelsBackend
from nai_t5_core.backends.kernels.sets import AVX2_VNNI, SETS, InstructionSet
from nai_t5_core.backends.products import INT8_ONEDNN, ONEDNN
from nai_t5_core.backends.quantised.kernels import BY_QUANTISED_WEIGHTS, QuantisedKernels, runner_of_quantised
from nai_t5_core.backends.quantised.kinds import QuantisedWeight
from nai_t5_core.backends.quantised.packing import pack, unpacked
from nai_t5_core.backends.quantised.projections import QuantisedLinear
from nai_t5_core.backends.quantised.runner import QuantisedBackend
from nai_t5_core.backends.quantised.single import KernelProduct
from nai_t5_core.model.encoder import Layout, T5EncoderStack

CONFIG = TOY_CONFIGS["v1.1"].encoder_only()
FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class BackendCase:
    """A way to compute blocks.

    Attributes:
        name: what its runner says, without whether weights are in panels yet; empty where there is no runner.
        bind: makes a stack, in place, be computed by it.
        missing: why this machine cannot test it, for a dtype; None where it can.
        holds_weights: whether it takes the weights out of their modules.
        is_fixed: whether they are then for the CPU and one dtype.
        rounding: of its numbers against those of the same dtype by torch, relative to the largest.
        attends: whether attention is its own.
        multiplies: whether its products are the kernels'.
        widens: whether it computes in float32 from weights in 16 bits, for which float16 has no range to leave.
    """

    name: str
    bind: Callable[[T5EncoderStack], T5EncoderStack]
    missing: Callable[[torch.dtype], str | None]
    holds_weights: bool = True
    is_fixed: bool = True
    in_8_bits: bool = False
    attends: bool = False
    multiplies: bool = False
    widens: bool = False
    dtypes: tuple[torch.dtype, ...] = FLOATS

    @property
    def tolerance(self) -> dict[torch.dtype, float]:
        """How far hidden states may be from exact ones, relative to the largest."""
        return dict.fromkeys(FLOATS, 0.3) if self.in_8_bits else {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def by_modules(stack: T5EncoderStack) -> T5EncoderStack:
    """Module by module, by torch."""
    block: Any
    for block in stack.encoder.block:
        block.runner = None
    return stack


def _missing(backend: Any) -> Callable[[torch.dtype], str | None]:
    def missing(dtype: torch.dtype) -> str | None:
        found: str | None = backend.missing(torch.device("cpu"), dtype)
        return found or (prepare_kernels(backend.instructions) if isinstance(backend, KernelsBackend) else None)

    return missing


def _cases_of(instructions: InstructionSet) -> dict[str, BackendCase]:
    """In place, in panels, and in 8 bits."""
    title, name = f"{instructions.title} kernels", instructions.name
    choice: Any = name
    own = {"attends": True, "multiplies": True, "widens": torch.float16 in instructions.stored}
    return {
        f"{name} in place": BackendCase(
            title,
            lambda stack: run_in_place(stack, choice),
            lambda dtype: missing_for(instructions) or prepare_kernels(instructions),
            holds_weights=False,
            is_fixed=False,
            **own,
        ),
        name: BackendCase(title, lambda stack: prepack(stack, choice), _missing(KERNELS[name]), **own),
        f"int8 {name}": BackendCase(
            f"{title}, in 8 bits",
            lambda stack: quantize_int8(stack, choice),
            _missing(INT8_KERNELS[name]),
            in_8_bits=True,
            **own,
        ),
    }


Packing = Callable[[Tensor], QuantisedWeight]


class ByTorch(KernelProduct):
    """Leaves every product to torch."""

    def __call__(self, *_: Any) -> None:
        return None


def by(
    packing: Packing, instructions: InstructionSet | None = None, in_blocks: bool = True
) -> Callable[[T5EncoderStack], T5EncoderStack]:
    """Keeps the weights of projections quantised; computed by the kernels for this set, or else by torch.

    Not ``in_blocks``, the kernels compute products and nothing more.
    """

    def bind(stack: T5EncoderStack) -> T5EncoderStack:
        block: Any
        for block in stack.encoder.block:
            QuantisedBackend(packing).bind(block, stack.dtype)
            runner_of_quantised(block, instructions)
            is_whole = instructions is not None and in_blocks
            block.runner = QuantisedKernels(instructions) if is_whole else ByModules(BY_QUANTISED_WEIGHTS)
            for part in block.modules():
                if isinstance(part, QuantisedLinear) and instructions is None:
                    part.product = ByTorch()
        return stack

    return bind


def _quantised_cases_of(instructions: InstructionSet) -> dict[str, BackendCase]:
    """Weights as they are, and in blocks of a GGUF file, read by the kernels."""
    title, name = f"{instructions.title} kernels, {BY_QUANTISED_WEIGHTS}", instructions.name
    cases = {}
    for label, packing in (("quantised, without loss", unpacked), ("quantised", partial(pack, kind="int8"))):
        own = {"is_fixed": False, "in_8_bits": packing is not unpacked, "multiplies": True}
        missing = _missing(KERNELS[name])
        cases[f"{label} {name}"] = BackendCase(
            title,
            by(packing, instructions),
            missing,
            attends=True,
            widens=torch.float16 in instructions.stored,
            **own,
        )
        one_by_one = by(packing, instructions, in_blocks=False)
        cases[f"{label} {name}, one by one"] = BackendCase(BY_QUANTISED_WEIGHTS, one_by_one, missing, **own)
    return cases


CASES = {
    "torch": BackendCase("", by_modules, lambda dtype: None, holds_weights=False, is_fixed=False),
    "oneDNN": BackendCase("oneDNN", lambda stack: prepack(stack, "onednn"), _missing(ONEDNN)),
    "int8 oneDNN": BackendCase(
        "oneDNN, in 8 bits", lambda stack: quantize_int8(stack, "onednn"), _missing(INT8_ONEDNN), in_8_bits=True
    ),
    "quantised, without loss": BackendCase("quantised weights", by(unpacked), lambda dtype: None, is_fixed=False),
    "quantised": BackendCase(
        "quantised weights", by(partial(pack, kind="int8")), lambda dtype: None, is_fixed=False, in_8_bits=True
    ),
}
for each in SETS:
    # AVX2-VNNI is AVX2 but for products in 8 bits.
    CASES |= {name: case for name, case in _cases_of(each).items() if each is not AVX2_VNNI or case.in_8_bits}
    CASES |= _quantised_cases_of(each) if each is not AVX2_VNNI else {}


def bound(case: BackendCase, layout: Layout = "fused", dtype: torch.dtype = torch.float32, **state: Tensor) -> Any:
    """A toy encoder by that backend, or a skip that says why not; ``state`` replaces tensors of the checkpoint."""
    if missing := case.missing(dtype):
        pytest.skip(missing)
    if case.attends and not case.holds_weights and layout == "separate":
        pytest.skip("in place the kernels read joined weights, which the separate layout has not")
    stack = by_modules(build_stack(CONFIG, {**random_state(CONFIG), **state}, dtype, layout)).requires_grad_(False)
    return case.bind(stack)


def runner_names(stack: Any) -> set[str]:
    """What computes the blocks, without how it does and whether weights are in panels yet."""
    runners = [block.runner for block in stack.encoder.block]
    names = ["" if runner is None else runner.name for runner in runners]
    names = [name.removesuffix(", in panels").removesuffix(", to be in panels") for name in names]
    return {name.removesuffix(", in float32") for name in names}
