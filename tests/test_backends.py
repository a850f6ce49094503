"""What holds of a model holds of it by every backend: the guard, LoRA, saving, copies, reports, gradients and hooks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from backend_cases import CASES, CONFIG, BackendCase, bound, by_modules, runner_names
from conftest import build_stack, padding_mask, random_state
from test_lora_live import toy_lora
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nai_t5_core.backends.held import HeldLinear
from nai_t5_core.backends.kernels.calls import counted
from nai_t5_core.float16.guard import NotFiniteError, ScaleTightenedWarning, encode_guarded
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.lora.loras import Loras
from nai_t5_core.model.encoder import LAYOUTS, Layout
from nai_t5_core.model.layers import CastingOps

IDS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(3))
MASK = padding_mask([12, 5, 1], 12)
# Until every weight is packed that is packed by a later call.
CALLS = 3

pytestmark = [
    pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys()),
    pytest.mark.parametrize("layout", LAYOUTS),
]
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def last_of(stack: Any, calls: int = CALLS) -> Tensor:
    """The hidden states of the last of some calls, without gradients."""
    with torch.no_grad():
        return [stack(IDS, MASK) for _ in range(calls)][-1]


def reference(*loras: Any, **state: Tensor) -> Tensor:
    """In float64 by torch, with these LoRAs and strengths merged."""
    stack = by_modules(build_stack(CONFIG, {**random_state(CONFIG), **state}, torch.float64))
    merged = Loras(stack)
    for lora, strength in loras:
        merged.add(lora, strength)
    return last_of(stack, 1)


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    rows = MASK.bool()
    difference = (found.double() - expected)[rows].abs().max()
    assert float(difference) <= tolerance * float(expected[rows].abs().max())


@every_dtype
def test_it_computes_the_encoder_and_says_so(case: BackendCase, layout: Layout, dtype: torch.dtype) -> None:
    stack = bound(case, layout, dtype)
    assert runner_names(stack) == {case.name}
    assert_near(last_of(stack), reference(), case.tolerance[dtype])
    # In panels, or to be: weights are there by now.
    printed = {block.extra_repr().removesuffix(", in panels") for block in stack.encoder.block}
    widening = ", in float32" if case.widens and dtype != torch.float32 else ""
    assert printed == {case.name + widening}
    assert all(f"EncoderBlock(\n        {name}" in repr(stack) for name in printed if name)
    assert stack.describe_attention() == ("auto: kernels" if case.attends else "auto: sdpa")
    with counted() as by_kernels:
        last_of(stack, 1)
    assert (by_kernels.flops > 0) == case.multiplies
    assert any(isinstance(module, nn.Linear) for module in stack.modules()) != case.holds_weights


def test_weights_that_stay_on_the_cpu_say_so(case: BackendCase, layout: Layout) -> None:
    """What moves embeddings and norms to an accelerator at every call finds no parameters of these."""
    if not case.is_fixed:
        pytest.skip("its weights can be moved")
    held = [module for module in bound(case, layout).modules() if isinstance(module, HeldLinear)]
    assert held
    for linear in held:
        with pytest.raises(ValueError, match="is prepacked or quantised for the CPU, and was called on meta"):
            linear(torch.empty(2, linear.in_features, device="meta"))


def test_a_call_elsewhere_says_so(case: BackendCase, layout: Layout) -> None:
    """As under software that moves nothing but parameters."""
    if not case.is_fixed:
        pytest.skip("its weights can be moved")
    stack = bound(case, layout)
    block = stack.encoder.block[0]
    last_of(stack)
    for layer in block.layer:
        layer.layer_norm.to("meta")
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="is prepacked or quantised for the CPU, and was called on meta"),
    ):
        block(torch.empty(4, CONFIG.d_model, device="meta"), None, torch.float32)


@every_dtype
def test_projections_that_cast_their_input_are_taken(case: BackendCase, layout: Layout, dtype: torch.dtype) -> None:
    """As a stand-in for transformers' encoder has them; and one of them may be in a dtype of its own."""
    stack = bound(CASES["torch"], layout, dtype)
    for module in stack.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = CastingOps.Linear
    stack.encoder.block[1].layer[1].DenseReluDense.wo.float()
    if missing := case.missing(dtype):
        pytest.skip(missing)
    assert_near(last_of(case.bind(stack)), reference(), case.tolerance[dtype])
    assert runner_names(stack) == {case.name} or not case.holds_weights
    assert any(isinstance(module, nn.Linear) for module in stack.modules()) == (not case.holds_weights)


@every_dtype
def test_hidden_states_of_every_layer(case: BackendCase, layout: Layout, dtype: torch.dtype) -> None:
    stack = bound(case, layout, dtype)
    out = last_of(stack)
    with torch.no_grad():
        states = stack.hidden_states(IDS, MASK)
    assert len(states) == CONFIG.num_layers + 1
    assert torch.equal(states[-1], out)


@pytest.mark.parametrize("calls", [0, CALLS])
def test_the_guard_names_a_damaged_weight(case: BackendCase, layout: Layout, calls: int) -> None:
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    damaged = random_state(CONFIG)[name].clone()
    damaged[3, 5] = float("nan")
    stack = bound(case, layout, **{name: damaged})
    if calls:
        last_of(stack, calls)
    with pytest.raises(NotFiniteError, match=f"{name} holds values that are not finite".replace(".", r"\.")):
        encode_guarded(stack, IDS, MASK)


def test_float16_is_tightened_or_refused(case: BackendCase, layout: Layout) -> None:
    """Refused before anything is changed; where it is taken, the guard keeps it in range, unless nothing leaves it."""
    if case.missing(torch.float32):
        pytest.skip(str(case.missing(torch.float32)))
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    state = random_state(CONFIG)
    state[name] = state[name] * 5e4
    stack = by_modules(build_stack(CONFIG, state, torch.float16, layout))
    before = last_of(stack, 1)
    if case.widens and not (case.attends and not case.holds_weights and layout == "separate"):
        case.bind(stack)
        assert stack.describe_attention() == "auto: kernels" and not before.isfinite().all()
        assert_near(
            encode_guarded(stack, IDS, MASK), reference(**{name: state[name]}), max(5e-3, case.tolerance[torch.float32])
        )
        return
    if case.is_fixed:
        with pytest.raises(ValueError, match=r"a model in torch\.float16 on cpu"):
            case.bind(stack)
        assert runner_names(stack) == {""}
        assert torch.allclose(last_of(stack, 1), before, rtol=0, atol=0, equal_nan=True)
        return
    case.bind(stack)
    assert stack.describe_attention() == "auto: sdpa" and not before.isfinite().all()
    with pytest.warns(ScaleTightenedWarning, match=r"layer 1: feed_forward_out"):
        found = encode_guarded(stack, IDS, MASK)
    assert_near(found, reference(**{name: state[name]}), 5e-2 if case.in_8_bits else 5e-3)


@every_dtype
@pytest.mark.parametrize("calls", [0, CALLS])
def test_live_loras_come_change_and_go(case: BackendCase, layout: Layout, dtype: torch.dtype, calls: int) -> None:
    stack, lora = bound(case, layout, dtype), toy_lora(CONFIG)
    expected = last_of(bound(case, layout, dtype))
    if calls:
        last_of(stack, calls)
    loras = LiveLoras(stack)
    loras.add(lora, 0.2, "style")
    assert_near(last_of(stack), reference((lora, 0.2)), case.tolerance[dtype])
    loras.set_strength("style", 0.7)
    changed = last_of(stack)
    assert_near(changed, reference((lora, 0.7)), case.tolerance[dtype])
    assert not torch.equal(changed, expected)
    loras.remove("style")
    assert runner_names(stack) == {case.name}
    assert torch.equal(last_of(stack), expected)


@every_dtype
def test_merged_loras(case: BackendCase, layout: Layout, dtype: torch.dtype) -> None:
    """Before a backend takes the weights; afterwards they are refused, and nothing is changed."""
    lora = toy_lora(CONFIG)
    if missing := case.missing(dtype):
        pytest.skip(missing)
    stack = by_modules(build_stack(CONFIG, random_state(CONFIG), dtype, layout))
    merged = Loras(stack)
    merged.add(lora, 0.7)
    case.bind(stack)
    assert_near(last_of(stack), reference((lora, 0.7)), case.tolerance[dtype])
    if not case.holds_weights:
        merged.clear()
        assert_near(last_of(stack), reference(), case.tolerance[dtype])
        return
    expected = last_of(stack)
    for refused in (lambda: Loras(stack).add(lora), merged.clear):
        with pytest.raises(ValueError, match="is packed, quantised or wrapped, and takes no LoRA any more"):
            refused()
    assert torch.equal(last_of(stack), expected)


@every_dtype
@pytest.mark.parametrize("calls", [0, CALLS])
def test_saved_weights_are_the_models(case: BackendCase, layout: Layout, dtype: torch.dtype, calls: int) -> None:
    stack = bound(case, layout, dtype)
    plain = by_modules(build_stack(CONFIG, random_state(CONFIG), dtype, layout))
    if calls:
        last_of(stack, calls)
    saved, original = stack.state_dict(), plain.state_dict()
    assert saved.keys() == original.keys()
    if not case.in_8_bits:
        assert all(torch.equal(saved[name], original[name]) for name in original)
    plain.load_state_dict(saved)
    assert_near(last_of(plain), reference(), case.tolerance[dtype])


@every_dtype
@pytest.mark.parametrize("calls", [0, CALLS])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda stack: pickle.loads(pickle.dumps(stack))])
def test_copies_compute_the_same(
    case: BackendCase, layout: Layout, dtype: torch.dtype, calls: int, copied: Any
) -> None:
    stack = bound(case, layout, dtype)
    if calls:
        last_of(stack, calls)
    twin = copied(stack)
    expected = last_of(stack)
    assert runner_names(twin) == {case.name}
    assert torch.equal(last_of(twin), expected)
    del stack
    assert torch.equal(last_of(twin), expected)


@pytest.mark.parametrize("calls", [0, CALLS])
def test_gradients_are_torchs(case: BackendCase, layout: Layout, calls: int) -> None:
    """Those of what the encoder reads: weights that are held are not trained."""
    stack = bound(case, layout)
    if calls:
        last_of(stack, calls)
    plain = by_modules(build_stack(CONFIG, random_state(CONFIG), torch.float64, layout))
    found = []
    for model in (stack, plain):
        embeddings = model.embed(IDS).detach().requires_grad_()
        model(inputs_embeds=embeddings, attention_mask=MASK).square().sum().backward()
        found.append(embeddings.grad)
    assert_near(found[0], found[1], 0.3 if case.in_8_bits else 1e-4)


@pytest.mark.parametrize("calls", [0, CALLS])
def test_hooks_are_called(case: BackendCase, layout: Layout, calls: int) -> None:
    """On every module, and what they give in place of a result is taken."""
    stack = bound(case, layout)
    expected = last_of(stack)
    if calls:
        last_of(stack, calls)
    for name, module in [*stack.encoder.block[1].named_modules()]:
        if isinstance(module, nn.ModuleList | nn.Embedding):
            continue
        heard: list[Any] = []
        handle = module.register_forward_hook(lambda *call, into=heard: into.append(call))
        assert_near(last_of(stack, 1), reference(), case.tolerance[torch.float32])
        assert len(heard) == 1, name
        handle.remove()
        handle = module.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
        assert not torch.equal(last_of(stack, 1), expected), name
        handle.remove()
    assert torch.equal(last_of(stack), expected)


def test_a_module_in_anothers_place_is_called(case: BackendCase, layout: Layout) -> None:
    """As adapters put themselves around projections."""

    class Zeros(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(self.base(x))

    stack = bound(case, layout)
    expected = last_of(stack)
    zero = torch.zeros(CONFIG.d_model, CONFIG.d_ff)
    without = reference(**{"encoder.block.1.layer.1.DenseReluDense.wo.weight": zero})
    dense = stack.encoder.block[1].layer[1].DenseReluDense
    base = dense.wo
    dense.wo = Zeros(base)
    assert_near(last_of(stack), without, case.tolerance[torch.float32])
    dense.wo = base
    assert torch.equal(last_of(stack), expected)


@pytest.mark.parametrize("calls", [0, CALLS])
def test_operations_are_counted(case: BackendCase, layout: Layout, calls: int) -> None:
    stack = bound(case, layout)
    if calls:
        last_of(stack, calls)
    plain = by_modules(build_stack(CONFIG, random_state(CONFIG), torch.float32, layout))
    flops = []
    for model in (stack, plain):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(IDS, MASK)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


def test_prompts_come_out_the_same_whatever_is_beside_them(case: BackendCase, layout: Layout) -> None:
    stack = bound(case, layout)
    together = last_of(stack)
    for row, length in enumerate(MASK.sum(dim=1).tolist()):
        with torch.no_grad():
            alone = stack(IDS[row : row + 1, :length])
        assert float((together[row, :length] - alone[0]).abs().max()) <= 1e-5 * float(together.abs().max())
