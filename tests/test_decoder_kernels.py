"""A decoder by the kernels: the logits of its modules, for whole texts, step by step and with beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, every_set, random_state
from torch import Tensor

from nai_t5_core.backends.choose import prepack, quantize_int8, why_not_int8, why_not_prepack
from nai_t5_core.backends.compiled import compile_steps
from nai_t5_core.backends.kernels.sets import InstructionSet
from nai_t5_core.bench.peers import own_t5
from nai_t5_core.generation.decoding import Decoding
from nai_t5_core.generation.t5 import T5
from nai_t5_core.model.attention_choice import missing_for_flex
from nai_t5_core.model.encoder import LAYOUTS, Layout

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
TEXTS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(2))
# Relative to the largest logit: sums in another order, one rounding less; and 8 bits.
NEAR = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
NEAR_IN_8_BITS = 0.2
MISSING = missing_for_flex(torch.device("cpu"))


def toy(kind: str, dtype: torch.dtype = torch.float32, layout: Layout = "fused") -> T5:
    config = TOY_CONFIGS[kind].model_copy(update={"num_layers": 1, "num_decoder_layers": 2})
    return own_t5(config, random_state(config), dtype, layout)


def whole(model: T5) -> Tensor:
    return model.logits(model.decode(TEXTS, model.read(IDS, MASK)))


def steps(model: T5) -> Tensor:
    """Five tokens of three beams, whose order changes."""
    decoding = Decoding(model, model.read(IDS, MASK), model.new_cache(2, 3, 6))
    drawn = torch.Generator().manual_seed(3)
    logits = []
    for _ in range(5):
        logits.append(decoding.step(torch.randint(3, 96, (2, 3), generator=drawn)))
        decoding.reorder(torch.randint(0, 3, (2, 3), generator=drawn))
    return torch.stack(logits)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


@every_set
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["v1.0", "v1.1", "umt5"])
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@torch.no_grad()
def test_logits_are_those_of_the_modules(
    instructions: InstructionSet, kind: str, layout: Layout, dtype: torch.dtype
) -> None:
    plain, exact = toy(kind, dtype, layout), toy(kind, torch.float64)
    if why_not_prepack(plain) is not None:
        pytest.skip("this machine packs no such weights")
    name: Any = instructions.name
    packed = prepack(toy(kind, dtype, layout), name)
    assert {block.runner.name.partition(",")[0] for block in packed.decoder.block} == {f"{instructions.title} kernels"}
    for compute in (whole, steps, whole):  # from plain weights, then from panels
        expected = compute(exact)
        assert error(compute(packed), expected) < max(NEAR[dtype], 1.2 * error(compute(plain), expected))


@every_set
@pytest.mark.parametrize("kind", ["v1.0", "v1.1", "umt5"])
@torch.no_grad()
def test_in_8_bits(instructions: InstructionSet, kind: str) -> None:
    exact, model = toy(kind, torch.float64), toy(kind)
    if why_not_int8(model) is not None:
        pytest.skip("no 8 bits here")
    name: Any = instructions.name
    quantised = quantize_int8(model, name)
    assert all(
        block.runner.name.startswith(f"{instructions.title} kernels, in 8 bits") for block in model.decoder.block
    )
    for compute in (whole, steps):
        assert 0 < error(compute(quantised), compute(exact)) < NEAR_IN_8_BITS


@every_set
@torch.no_grad()
def test_a_hooked_module_is_called(instructions: InstructionSet) -> None:
    if why_not_prepack(toy("v1.1")) is not None:
        pytest.skip("this machine packs no such weights")
    name: Any = instructions.name
    model = prepack(toy("v1.1"), name)
    whole(model)  # oneDNN's weights are put in its order at the second call, which may change the last bit
    expected, calls = whole(model), []
    block: Any = model.decoder.block[1]
    hook = block.layer[1].EncDecAttention.q.register_forward_hook(lambda *_: calls.append(1))
    assert error(whole(model), expected) < NEAR[torch.float32] and calls == [1]
    hook.remove()
    assert torch.equal(whole(model), expected) and calls == [1]


@every_set
@torch.no_grad()
def test_gradients_are_recorded_by_the_modules(instructions: InstructionSet) -> None:
    if why_not_prepack(toy("v1.1")) is not None:
        pytest.skip("this machine packs no such weights")
    name: Any = instructions.name
    model = prepack(toy("v1.1"), name)
    whole(model)
    memory = model.read(IDS, MASK)
    with torch.enable_grad():
        residual = torch.randn(2, 7, 64, requires_grad=True)
        plan = model.decoder.block[0]
        assert plan.runner(plan, residual, None, memory.layer(0), torch.float32) is None


@pytest.mark.skipif(MISSING is not None, reason=f"nothing can be compiled here: {MISSING}")
def test_compiled_steps_keep_products_that_a_compiler_sees_through() -> None:
    model = compile_steps(toy("v1.1"), backend="eager")
    if why_not_prepack(model) is not None:
        pytest.skip("this machine packs no such weights")
    assert {block.runner.name for block in prepack(model).decoder.block} == {"oneDNN"}
