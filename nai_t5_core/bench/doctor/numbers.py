"""Small models on the device, compared with the same models in float64 on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.choose import prepack, quantize_int8, why_not_int8, why_not_prepack
from nai_t5_core.backends.mps import missing_on_mps
from nai_t5_core.bench.doctor.patient import Finding, Patient
from nai_t5_core.bench.parity import TOLERANCE_INT8, TOLERANCES
from nai_t5_core.bench.peers import own_encoder, own_t5, random_state
from nai_t5_core.facts.config import T5Config
from nai_t5_core.model.attention_choice import AttentionChoice
from nai_t5_core.model.encoder import LAYOUTS, T5EncoderStack
from nai_t5_core.model.packing import PADDING_POLICIES, PaddingPolicy

_SMALL: dict[str, Any] = {
    "vocab_size": 512, "d_model": 128, "d_kv": 64, "d_ff": 320, "num_heads": 2, "num_layers": 2,
    "num_decoder_layers": 2,
}  # fmt: skip

# One config for each kind of T5 that is computed differently.
SMALL_CONFIGS = {
    "v1.1": T5Config(**_SMALL),
    "v1.0": T5Config(**_SMALL, gated=False, activation="relu", tie_word_embeddings=True),
    "umt5": T5Config(**_SMALL, bias_per_layer=True),
}

_LENGTHS = (40, 1, 77, 96)


@dataclass(frozen=True)
class Question:
    """A batch and its expected output in float64; ``mask`` is None, [batch, length], or [batch, query, key]."""

    name: str
    ids: Tensor
    mask: Tensor | None
    padding: PaddingPolicy

    def ask(self, stack: T5EncoderStack) -> Tensor:
        """Hidden states [batch, length, d_model] in float64 on the CPU."""
        with torch.no_grad():
            return stack(self.ids, self.mask, padding=self.padding).double().cpu()

    def on(self, device: torch.device) -> Question:
        """This question with ids and mask on a device."""
        return replace(self, ids=self.ids.to(device), mask=None if self.mask is None else self.mask.to(device))


def _mask(name: str, length: int) -> Tensor | None:
    """The mask of this name for prompts of :data:`_LENGTHS` tokens."""
    counts = torch.tensor(_LENGTHS)[:, None]
    places = torch.arange(length)[None, :]
    right = places < counts
    left = places >= length - counts
    if name == "none":
        return None
    if name == "right":
        return right
    if name == "left":
        return left
    if name == "holes":
        return right & (places % 5 != 3)
    if name == "empty":
        return right & (torch.arange(len(_LENGTHS))[:, None] != 1)
    return (right[:, None, :] & right[:, :, None]) | torch.eye(length, dtype=torch.bool)


_MASKS = ("none", "right", "left", "holes", "empty", "dense")


def questions(config: T5Config, length: int) -> Iterator[Question]:
    """Every mask, with every padding policy where the mask has pads to treat."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(config.vocab_size, (len(_LENGTHS), length), generator=generator)
    for name in _MASKS:
        policies = ("exact",) if name in ("none", "dense") else PADDING_POLICIES
        for policy in policies:
            yield Question(f"{name} mask, {policy}", ids, _mask(name, length), policy)


def check_stacks(patient: Patient) -> Finding:
    """Every kind, layout, dtype and backend on one length; see :func:`check_masks` for other lengths."""
    wrong, errors = list[str](), dict[str, float]()
    for kind, config in SMALL_CONFIGS.items():
        state = random_state(config)
        exact = own_encoder(config, state, torch.float64, "separate")
        asked = list(questions(config, 96))
        answers = [question.ask(exact) for question in asked]
        for name, stack, tolerance in _forms(config, state, patient.device):
            found = [difference(question.ask(stack), answer) for question, answer in zip(asked, answers, strict=True)]
            errors[f"{kind}, {name}"] = max(found)
            wrong += [
                f"{kind}, {name}, {question.name}: off by {error:.2g} of the largest value (limit {tolerance:g})"
                for question, error in zip(asked, found, strict=True)
                if not error <= tolerance
            ]
    return {"checked": len(errors) * len(asked), "largest_errors": errors, "wrong": wrong}


def check_masks(patient: Patient) -> Finding:
    """Lengths around multiples of 8 and 64, by SDPA, in half precision, with inputs on the CPU and on the device."""
    wrong, checked, worst = list[str](), 0, 0.0
    config = SMALL_CONFIGS["v1.1"]
    state = random_state(config)
    exact = own_encoder(config, state, torch.float64, "separate")
    dtype = torch.float16 if patient.device.type != "cpu" else torch.bfloat16
    stack = _placed(own_encoder(config, state, dtype), patient.device, "sdpa")
    devices = {torch.device("cpu"), patient.device}
    for length in (97, 101, 104, 128, 200):
        for question in questions(config, length):
            answer = question.ask(exact)
            for asked in map(question.on, devices):
                error = difference(asked.ask(stack), answer)
                checked, worst = checked + 1, max(worst, error)
                if not error <= TOLERANCES[dtype]:
                    wrong.append(f"length {length}, {question.name}, ids on {asked.ids.device}: off by {error:.2g}")
    return {"checked": checked, "largest_error": worst, "wrong": wrong}


def check_attention(attention: AttentionChoice, device: torch.device, dtype: torch.dtype) -> Finding:
    """One kind of T5 with one choice of attention, over the masks that every attention takes."""
    config = SMALL_CONFIGS["v1.1"]
    state = random_state(config)
    exact = own_encoder(config, state, torch.float64, "separate")
    stack = _placed(own_encoder(config, state, dtype), device, attention)
    asked = [question for question in questions(config, 300) if not question.name.startswith("dense")]
    errors = {question.name: difference(question.ask(stack), question.ask(exact)) for question in asked}
    wrong = [
        f"{attention}, {name}: off by {error:.2g}" for name, error in errors.items() if not error <= TOLERANCES[dtype]
    ]
    return {"checked": len(errors), "largest_error": max(errors.values()), "wrong": wrong}


def _forms(
    config: T5Config, state: dict[str, Tensor], device: torch.device
) -> Iterator[tuple[str, T5EncoderStack, float]]:
    """Name, model and tolerance of every layout and backend of ours that runs here."""
    for dtype in _computed_on(device, torch.float32, torch.bfloat16, torch.float16, torch.float64):
        name = str(dtype).removeprefix("torch.")
        for layout in LAYOUTS:
            stack = own_encoder(config, state, dtype, layout)
            yield f"{name}, {layout}", _placed(stack, device, "auto"), TOLERANCES[dtype]
        if device.type != "cpu":
            continue
        yield f"{name}, sdpa", _placed(own_encoder(config, state, dtype), device, "sdpa"), TOLERANCES[dtype]
        if why_not_prepack(own_encoder(config, state, dtype)) is None:
            yield f"{name}, prepacked", prepack(own_encoder(config, state, dtype)), TOLERANCES[dtype]
        if why_not_int8(own_encoder(config, state, dtype)) is None:
            yield f"{name}, int8", quantize_int8(own_encoder(config, state, dtype)), TOLERANCE_INT8


def _computed_on(device: torch.device, *dtypes: torch.dtype) -> list[torch.dtype]:
    return [dtype for dtype in dtypes if missing_on_mps(device, dtype) is None]


def _placed(stack: T5EncoderStack, device: torch.device, attention: AttentionChoice) -> T5EncoderStack:
    stack.attention = attention
    return stack.to(device)


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference relative to the largest wanted value; NaN stays NaN, other shapes give infinity."""
    if found.shape != wanted.shape:
        return math.inf
    return float((found - wanted).abs().max() / wanted.abs().max())


# ---------------------------------------------------------------------------------------------------------------------
# Generation, and sums
# ---------------------------------------------------------------------------------------------------------------------


def check_generation(patient: Patient) -> Finding:
    """Greedy texts and beams in float32 on the device are those of the CPU; half precisions give finite logits."""
    wrong, checked = list[str](), 0
    for kind, config in SMALL_CONFIGS.items():
        state = random_state(config)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(2, config.vocab_size, (3, 20), generator=generator)
        mask = torch.arange(20)[None, :] < torch.tensor([20, 7, 12])[:, None]
        here = own_t5(config, state, torch.float32)
        there = own_t5(config, state, torch.float32).to(patient.device)
        for beams in (1, 4):
            wanted = here.generate(ids, mask, num_beams=beams, max_new_tokens=16)
            found = there.generate(ids.to(patient.device), mask.to(patient.device), num_beams=beams, max_new_tokens=16)
            checked += 1
            if not torch.equal(found.cpu(), wanted):
                wrong.append(f"{kind}, float32, {beams} beams: other tokens than on the CPU")
        labels = ids[:, :11]
        exact = own_t5(config, state, torch.float64)(ids, mask, labels=labels)[0].detach()
        for dtype in _computed_on(patient.device, torch.bfloat16, torch.float16):
            model = own_t5(config, state, dtype).to(patient.device)
            with torch.no_grad():
                logits = model(*(x.to(patient.device) for x in (ids, mask)), labels=labels.to(patient.device))[0]
            error = difference(logits.double().cpu(), exact)
            checked += 1
            if not error <= TOLERANCES[dtype]:
                wrong.append(f"{kind}, {str(dtype).removeprefix('torch.')}, logits: off by {error:.2g}")
    return {"checked": checked, "wrong": wrong}


def check_sums(patient: Patient) -> Finding:
    """The root mean square error of a sum of 10240 products, as in an XXL's last projection, against float64.

    In float16 torch allows its libraries to add partial sums in float16; our encoder does not (``encoder``).
    """
    device, found = patient.device, dict[str, Any]()
    for rows in (16, 64, 512):
        a = torch.randn(rows, 10240, device=device)
        b = torch.randn(4096, 10240, device=device) / 101.0
        for dtype in (torch.float16, torch.bfloat16):
            left, right = a.to(dtype), b.to(dtype)
            exact = left.double() @ right.double().t()
            name = str(dtype).removeprefix("torch.")
            rounded = _root_mean_square(exact.to(dtype).double() - exact)
            found[f"{rows} rows, {name}"] = {"rounding alone": rounded}
            for allowed in (True, False):
                error = _root_mean_square(_product(left, right, allowed).double() - exact)
                found[f"{rows} rows, {name}"][f"reduced sums {'allowed' if allowed else 'forbidden'}"] = error
    return {"errors": found}


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _product(left: Tensor, right: Tensor, reduced: bool) -> Tensor:
    settings = torch.backends.cuda.matmul
    before = settings.allow_fp16_reduced_precision_reduction, settings.allow_bf16_reduced_precision_reduction
    settings.allow_fp16_reduced_precision_reduction = settings.allow_bf16_reduced_precision_reduction = reduced
    try:
        return left @ right.t()
    finally:
        settings.allow_fp16_reduced_precision_reduction, settings.allow_bf16_reduced_precision_reduction = before
