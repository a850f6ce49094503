"""The encoder from weights in 8 bits by our kernels for CUDA: whether it is right, how fast, and in how much memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from nai_t5_core.backends.choose import quantize_int8
from nai_t5_core.backends.cuda.encoder import ProductsChoice, cuda_encoder
from nai_t5_core.backends.held import HeldLinear
from nai_t5_core.backends.quantised.packing import PackedKind, pack
from nai_t5_core.backends.quantised.runner import QuantisedBackend
from nai_t5_core.bench.clock import timed
from nai_t5_core.bench.doctor.numbers import SMALL_CONFIGS, difference, questions
from nai_t5_core.bench.doctor.own_kernels import finished
from nai_t5_core.bench.doctor.patient import Finding, Patient
from nai_t5_core.bench.doctor.speed import work
from nai_t5_core.bench.parity import TOLERANCES
from nai_t5_core.bench.peers import own_encoder, random_state
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.layers import NoInit

# "int8" is what quantize="int8" makes; the others are as a file has them.
KINDS = ("int8", "q8_0", "float8")
LENGTHS = (16, 64, 128, 256, 512)
# Few rows and more than our kernels take, of which float8 has both sides in 8 bits only for the most.
_CHECKED_LENGTHS = (20, 101, 300)
# Bytes and half precision differ by rounding; activations in 8 bits by what these lose, of the largest value.
TOLERANCE_OF_ACTIVATIONS = {"int8": 0.1, "q8_0": 3e-2, "float8": 0.4}
_TIMED: tuple[ProductsChoice, ...] = ("auto", "8-bit")
# With inputs as they are, whatever was measured on this card, and with inputs in 8 bits.
_CHECKED: tuple[ProductsChoice, ...] = ("triton", "8-bit")


def quantised(stack: T5EncoderStack, kind: str) -> T5EncoderStack:
    """A stack with its projections in a kind, on the device it is on; each original is let go after it was packed."""
    if kind == "int8":
        return quantize_int8(stack)
    packed: PackedKind = "q8_0" if kind == "q8_0" else "float8"
    backend = QuantisedBackend(partial(pack, kind=packed))
    block: Any
    for block in stack.encoder.block:
        backend.bind(block, stack.dtype)
    return stack


def unpacked(stack: T5EncoderStack) -> T5EncoderStack:
    """A stack in float64 on the CPU with the numbers that a quantised one stands for, which is changed for it."""
    for module in list(stack.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, HeldLinear):
                plain: Any = NoInit.Linear(child.in_features, child.out_features, bias=False, device="meta")
                plain.weight = torch.nn.Parameter(torch.cat([form.original() for form in child.forms]), False)
                setattr(module, name, plain)
    block: Any
    for block in stack.encoder.block:
        block.runner = None
    return stack.cpu().double()


@torch.no_grad()
def check(patient: Patient) -> Finding:
    """Every kind of T5 and of bytes, eager and from CUDA graphs, on several lengths in turn, against float64."""
    wrong, errors = list[str](), dict[str, float]()
    checked = 0
    for name, stack, exact in _small(patient):
        kind = name.split(", ")[1]
        asked = [question for length in _CHECKED_LENGTHS for question in questions(exact.config, length)]
        answers = [question.ask(exact) for question in asked]
        for eager in (True, False):
            for choice in _CHECKED:
                encode = cuda_encoder(stack, eager, choice)
                how = f"{name}, {'eager' if eager else 'graphs'}, {choice}"
                limit = TOLERANCES[stack.dtype]
                limit = max(limit, TOLERANCE_OF_ACTIVATIONS[kind]) if choice == "8-bit" else limit
                errors[how] = 0.0
                for question, answer in zip(asked, answers, strict=True):
                    found = encode(question.ids, question.mask, question.padding)
                    error = difference(found.double().cpu(), answer)
                    errors[how], checked = max(errors[how], error), checked + 1
                    if not error <= limit:
                        wrong.append(f"{how}, length {question.ids.shape[1]}, {question.name}: off by {error:.2g}")
    return {"checked": checked, "largest_errors": errors, "wrong": wrong}


def _small(patient: Patient) -> Iterator[tuple[str, T5EncoderStack, T5EncoderStack]]:
    """Small encoders on the device, by name, with the same numbers in float64."""
    for config_name, config in SMALL_CONFIGS.items():
        state = random_state(config)
        for kind in KINDS:
            for dtype in (torch.float16, torch.bfloat16):
                made = [quantised(own_encoder(config, state, dtype).to(patient.device), kind) for _ in range(2)]
                yield f"{config_name}, {kind}, {str(dtype).removeprefix('torch.')}", made[0], unpacked(made[1])


@torch.no_grad()
def time_eight_bits(patient: Patient) -> Finding:
    """The timed model in each kind, from CUDA graphs; every call reads whether its result is finite."""
    times: dict[str, Any] = {}
    memory = {"16 bits": _held(patient.stack)}
    _time(patient, patient.stack, "16 bits", ("auto",), times)
    for kind in KINDS:
        stack = quantised(own_encoder(patient.config, patient.state, patient.dtype), kind)
        _time(patient, stack, kind, _TIMED, times)
        memory[kind] = _held(stack)
    works = {str(length): work(patient, (length,), weight_bytes=1) for length in LENGTHS}
    about = {"model": patient.model.name, "dtype": str(patient.dtype).removeprefix("torch.")}
    return {**about, "times": times, "work": works, "bytes": memory}


def _time(
    patient: Patient, stack: T5EncoderStack, kind: str, choices: tuple[ProductsChoice, ...], times: dict[str, Any]
) -> None:
    for choice in choices:
        encode = cuda_encoder(stack, products=choice)
        for length in LENGTHS:
            call = partial(finished, encode, patient.ids(1, length))
            times.setdefault(str(length), {})[f"{kind}, {choice}"] = timed(call, patient.device)


def _held(stack: T5EncoderStack) -> int:
    """The bytes of all tensors that a model holds."""
    tensors = [*stack.parameters(), *stack.buffers()]
    for module in stack.modules():
        if isinstance(module, HeldLinear):
            tensors += [part for form in module.forms for part in form.weight.parts.values()]  # type: ignore[attr-defined]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
