"""Live LoRA where merged LoRA cannot be: beside packed, 8-bit, offloaded and compiled weights, which stay untouched."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from checkpoints import encoder_part
from conftest import TOY_CONFIGS, build_stack, random_state
from lora_oracle import (
    KINDS,
    MASK,
    V1_1,
    assert_near,
    assert_same_weights,
    ids_for,
    ours,
    reference,
    scaled_stack,
    snapshot,
    v1_1_stack,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from toy_loras import toy_lora

from nai_t5_core.backends.choose import prepack, quantize_int8, why_not_int8, why_not_prepack
from nai_t5_core.backends.compiled import compile_stack
from nai_t5_core.backends.held import HeldLinear
from nai_t5_core.backends.int8_weight import Int8Product
from nai_t5_core.backends.kernels.build import missing_for
from nai_t5_core.backends.kernels.sets import AVX2, AVX512, InstructionSet
from nai_t5_core.backends.onednn import OneDNNProduct
from nai_t5_core.bench.peers import transformers_encoder
from nai_t5_core.facts.scales import LayerScales
from nai_t5_core.float16.guard import rescale
from nai_t5_core.lora.files import Lora
from nai_t5_core.lora.live import LiveLinear, LiveLoras
from nai_t5_core.lora.loras import Loras
from nai_t5_core.model.attention_choice import missing_for_flex
from nai_t5_core.model.encoder import LAYOUTS, Layout
from nai_t5_core.model.fixed_weights import has_fixed_weights
from nai_t5_core.prompts.text_encoder import TextEncoder

MISSING = missing_for_flex(torch.device("cpu"))

needs_packing = pytest.mark.skipif(
    why_not_prepack(v1_1_stack()) is not None, reason="this machine's oneDNN packs no float32 weights"
)


def tensors_of(stack: nn.Module) -> dict[int, Tensor]:
    return {id(tensor): tensor for tensor in [*stack.parameters(), *stack.state_dict(keep_vars=True).values()]}


# ---------------------------------------------------------------------------------------------------------------------
# Weights stay as they are
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_weight_is_copied_or_changed(layout: Layout) -> None:
    stack = v1_1_stack(layout)
    before, tensors, modules = snapshot(stack), tensors_of(stack), dict(stack.named_modules())
    loras = LiveLoras(stack)
    for number in range(3):
        loras.add(toy_lora(V1_1, number), 0.5, str(number))
    assert tensors_of(stack).keys() == tensors.keys()
    live = [module for module in stack.modules() if isinstance(module, LiveLinear)]
    added = sum(module.down.numel() + module.up.numel() for module in live)
    assert 0 < added < 0.9 * sum(tensor.numel() for tensor in tensors.values())
    loras.remove("1")
    loras.set_strength("0", 0)
    assert_near(ours(stack), reference(V1_1, (toy_lora(V1_1, 2), 0.5)))
    loras.clear()
    assert_same_weights(stack, before)
    assert all(module is modules[name] for name, module in stack.named_modules())
    assert_near(ours(stack), reference(V1_1), 1e-6)


@needs_packing
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights(kind: str, layout: Layout) -> None:
    """Whichever came first; the weights are packed by the second call."""
    config = TOY_CONFIGS[kind]
    first, second = toy_lora(config, 1), toy_lora(config, 2)
    expected = reference(config, (first, 0.7), (second, -0.4))
    stack = prepack(build_stack(config, random_state(config), layout=layout))
    late = prepack(build_stack(config, random_state(config), layout=layout))
    assert_near(ours(late), reference(config))
    early = build_stack(config, random_state(config), layout=layout)
    for model in (stack, late, early):
        loras = LiveLoras(model)
        loras.add(first, 0.1, "first")
        loras.add(second, -0.4, "second")
        loras.set_strength("first", 0.7)
        if model is early:
            prepack(model)
        for _ in range(3):
            assert_near(ours(model), expected)
        held = [module for module in model.modules() if isinstance(module, HeldLinear)]
        assert any(isinstance(module.forms[0], OneDNNProduct) and module.forms[0].is_blocked for module in held)
        loras.clear()
        assert_near(ours(model), reference(config))
        assert not any(isinstance(module, LiveLinear) for module in model.modules())


@needs_packing
@pytest.mark.parametrize("target", ["q", "v", "o", "wi_0", "wi_1", "wo"])
def test_one_packed_projection(target: str) -> None:
    stack, lora = prepack(v1_1_stack()), toy_lora(V1_1, targets=(target,))
    LiveLoras(stack).add(lora)
    for _ in range(3):
        assert_near(ours(stack), reference(V1_1, (lora, 1.0)))


@needs_packing
def test_a_text_encoder_as_it_is_loaded() -> None:
    encoder = TextEncoder.from_pretrained(dtype="float32", device="cpu")
    assert has_fixed_weights(encoder.stack)
    lora = toy_lora(encoder.stack.config)
    merged = TextEncoder.from_pretrained(dtype="float32", device="cpu", loras=[(lora, 0.6)])
    before = encoder.encode(["a cat"]).hidden_states
    loras = LiveLoras(encoder)
    loras.add(lora, 0.6)
    assert_near(encoder.encode(["a cat"]).hidden_states, merged.encode(["a cat"]).hidden_states)
    loras.remove("toy")
    assert_near(encoder.encode(["a cat"]).hidden_states, before, 1e-6)


def test_packed_bfloat16() -> None:
    stack = v1_1_stack(dtype=torch.bfloat16)
    if why_not_prepack(stack) is not None:
        pytest.skip("this machine's oneDNN packs no bfloat16 weights")
    lora = toy_lora(V1_1)
    LiveLoras(prepack(stack)).add(lora)
    for _ in range(3):
        assert_near(ours(stack), reference(V1_1, (lora, 1.0)), 1e-1)  # merged before packing: 6e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_8_bits(layout: Layout, dtype: torch.dtype) -> None:
    """Each product is that of the bytes and the very change beside it; the whole is as near as without LoRA."""
    stack = v1_1_stack(layout, dtype)
    if why_not_int8(stack) is not None:
        pytest.skip("this processor has no VNNI")
    quantize_int8(stack)
    error = (ours(stack).double() - reference(V1_1).double()).abs().mean()
    lora = toy_lora(V1_1)
    LiveLoras(stack).add(lora)
    with_lora = (ours(stack).double() - reference(V1_1, (lora, 1.0)).double()).abs().mean()
    assert with_lora < 2 * error
    live = [module for module in stack.modules() if isinstance(module, LiveLinear)]
    assert len(live) == {"fused": 4, "separate": 7}[layout] * V1_1.num_layers
    assert all(isinstance(module.base, HeldLinear) and isinstance(module.base.forms[0], Int8Product) for module in live)
    x = torch.randn(5, live[0].down.shape[1], generator=torch.Generator().manual_seed(3)).to(dtype)
    change = x @ live[0].down.T @ live[0].up.T
    assert_near(live[0](x) - live[0].base(x), change, 1e-5 if dtype == torch.float32 else 2e-2)


# ---------------------------------------------------------------------------------------------------------------------
# What happens to the model meanwhile
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_tightened_while_live(layout: Layout) -> None:
    stack, untouched = scaled_stack(V1_1, torch.float16, layout), scaled_stack(V1_1, torch.float16, layout)
    lora = toy_lora(V1_1)
    loras = LiveLoras(stack)
    loras.add(lora, 0.7)
    tighter = LayerScales(2.0**-4, 2.0**-5, 2.0**-3)
    for changed in (stack, untouched):
        rescale(changed, 1, tighter)
    assert_near(ours(stack), reference(V1_1, (lora, 0.7)), 2e-2)
    after_rescale = {name: buffer.clone() for name, buffer in stack.named_buffers()}
    loras.set_strength("toy", 0.7)
    assert all(torch.equal(buffer, after_rescale[name]) for name, buffer in stack.named_buffers())
    loras.clear()
    assert_same_weights(stack, untouched.state_dict())


def test_moved_and_cast_while_live() -> None:
    stack, lora = v1_1_stack(), toy_lora(V1_1)
    loras = LiveLoras(stack)
    loras.add(lora)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 1e-1)):
        stack.to(dtype)
        assert {buffer.dtype for name, buffer in stack.named_buffers() if name.endswith(("up", "down"))} == {dtype}
        assert_near(ours(stack), reference(V1_1, (lora, 1.0)), tolerance)
    loras.clear()
    assert_same_weights(stack, v1_1_stack().to(torch.bfloat16).state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_their_loras(duplicate: Any) -> None:
    stack, lora = v1_1_stack(), toy_lora(V1_1)
    loras = LiveLoras(stack)
    loras.add(lora)
    twin = duplicate(stack)
    loras.clear()
    assert_near(ours(twin), reference(V1_1, (lora, 1.0)))
    assert_near(ours(stack), reference(V1_1))


def test_torch_compile_takes_notice() -> None:
    """Of what comes and goes after compiling; strengths alone compile nothing anew."""
    stack, lora = v1_1_stack(), toy_lora(V1_1)
    torch._dynamo.reset()
    compiled = torch.compile(stack, backend="eager")
    assert_near(ours(compiled), reference(V1_1))  # type: ignore[arg-type]
    loras = LiveLoras(stack)
    loras.add(lora)
    assert_near(ours(compiled), reference(V1_1, (lora, 1.0)))  # type: ignore[arg-type]
    counters.clear()
    loras.set_strength("toy", -0.3)
    assert_near(ours(compiled), reference(V1_1, (lora, -0.3)))  # type: ignore[arg-type]
    assert counters["stats"]["unique_graphs"] == 0
    loras.clear()
    assert_near(ours(compiled), reference(V1_1))  # type: ignore[arg-type]


@pytest.mark.skipif(MISSING is not None, reason=f"nothing can be compiled here: {MISSING}")
def test_a_compiled_encoder_takes_notice() -> None:
    stack, lora = v1_1_stack(), toy_lora(V1_1)
    torch._dynamo.reset()
    compile_stack(stack, buckets=(128,), backend="aot_eager")
    assert_near(ours(stack), reference(V1_1))
    loras = LiveLoras(stack)
    loras.add(lora)
    assert_near(ours(stack), reference(V1_1, (lora, 1.0)))
    counters.clear()
    loras.set_strength("toy", 0.2)
    assert_near(ours(stack), reference(V1_1, (lora, 0.2)))
    assert counters["stats"]["unique_graphs"] == 0
    loras.clear()
    assert_near(ours(stack), reference(V1_1))


def test_gradients_pass_through() -> None:
    """Of embeddings, as for the merged model."""
    grads = []
    for kind in (Loras, LiveLoras):
        stack = v1_1_stack()
        kind(stack).add(toy_lora(V1_1))
        embeddings = stack.embed(ids_for(V1_1)).detach().requires_grad_()
        stack(inputs_embeds=embeddings, attention_mask=MASK).square().mean().backward()
        assert embeddings.grad is not None
        grads.append(embeddings.grad)
    assert_near(grads[1], grads[0])


# ---------------------------------------------------------------------------------------------------------------------
# The kernels, which have no place for a LoRA
# ---------------------------------------------------------------------------------------------------------------------


def lending_cases(instructions: InstructionSet, lends_to: str, lends_int8_to: str) -> list[Any]:
    """How weights are put away, what computes them then, and what while there is a LoRA: in 16 or 32 bits and in 8."""
    name, form = instructions.name, f"{instructions.title} kernels"
    skipped = pytest.mark.skipif(bool(missing_for(instructions)), reason=str(missing_for(instructions)))
    changes: list[Any] = [
        (f"{name}-packed", lambda stack: prepack(stack, name), form, lends_to),
        (f"{name}-int8", lambda stack: quantize_int8(stack, name), f"{form}, in 8 bits", lends_int8_to),
    ]
    return [pytest.param(*change, id=own, marks=skipped) for own, *change in changes]


by_kernels = pytest.mark.parametrize(
    ("change", "form", "lent"),
    [
        *lending_cases(AVX512, "oneDNN", "oneDNN, in 8 bits"),
        *lending_cases(AVX2, "torch, in float32", "torch, in float32"),
    ],
)


def forms(stack: Any) -> list[str]:
    """What computes the blocks, without whether weights are in panels yet."""
    return [
        block.runner.name.removesuffix(", in panels").removesuffix(", to be in panels") for block in stack.encoder.block
    ]


@by_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_come_back_to_the_kernels(kind: str, layout: Layout, change: Any, form: str, lent: str) -> None:
    """With the same weights to the bit, whether they were packed before; and blocks without LoRA never leave."""
    config = TOY_CONFIGS[kind]
    lora = toy_lora(config)
    second = Lora("second", {name: x for name, x in lora.changes.items() if ".block.1." in name})
    for calls in (0, 2):
        stack = change(build_stack(config, random_state(config), layout=layout))
        before = change(build_stack(config, random_state(config), layout=layout))
        expected = [ours(before) for _ in range(3)][-1]
        for _ in range(calls):
            ours(stack)
        loras = LiveLoras(stack)
        loras.add(second, 0.5)
        assert forms(stack) == [lent if index == 1 else form for index in range(config.num_layers)]
        with_second = [ours(stack) for _ in range(3)][-1]
        assert not torch.equal(with_second, expected)
        loras.add(lora, 0.5)
        assert set(forms(stack)) == {lent}
        loras.remove("toy")
        assert torch.equal([ours(stack) for _ in range(3)][-1], with_second)
        loras.set_strength("second", 0)
        assert set(forms(stack)) == {form}
        loras.set_strength("second", 0.5)
        loras.clear()
        assert set(forms(stack)) == {form}
        assert all(torch.equal(ours(stack), expected) for _ in range(3))
        assert not any(isinstance(module, nn.Linear) for module in stack.modules())


@by_kernels
@pytest.mark.parametrize("refused", ["another T5", "not finite", "no number", "no such LoRA"])
def test_what_is_refused_leaves_the_kernels_alone(refused: str, change: Any, form: str, lent: str) -> None:
    stack = change(v1_1_stack())
    expected, blocks = ours(stack), list(stack.encoder.block)
    loras = LiveLoras(stack)
    wide = V1_1.model_copy(update={"d_model": 128})
    attempts = {
        "another T5": lambda: loras.add(toy_lora(wide)),
        "not finite": lambda: loras.add(toy_lora(V1_1), 1e39),
        "no number": lambda: loras.add(toy_lora(V1_1), float("nan")),
        "no such LoRA": lambda: loras.set_strength("toy", 0.5),
    }
    with pytest.raises(ValueError):
        attempts[refused]()
    assert list(stack.encoder.block) == blocks and set(forms(stack)) == {form}
    assert loras.strengths == {}
    assert torch.equal(ours(stack), expected)
    loras.add(toy_lora(V1_1), 0.0)
    assert list(stack.encoder.block) == blocks


# ---------------------------------------------------------------------------------------------------------------------
# Beside merged LoRAs, and misuse
# ---------------------------------------------------------------------------------------------------------------------


def test_live_beside_merged() -> None:
    first, second = toy_lora(V1_1, 1, name="first"), toy_lora(V1_1, 2, name="second")
    stack = v1_1_stack()
    merged, live = Loras(stack), LiveLoras(stack)
    merged.add(first, 0.5)
    live.add(second, 0.5)
    assert_near(ours(stack), reference(V1_1, (first, 0.5), (second, 0.5)))
    with pytest.raises(ValueError, match="is packed, quantised or wrapped, and takes no LoRA any more"):
        merged.clear()
    live.clear()
    merged.clear()
    assert_near(ours(stack), reference(V1_1))


def test_one_object_for_each_encoder() -> None:
    stack = v1_1_stack()
    LiveLoras(stack).add(toy_lora(V1_1))
    with pytest.raises(ValueError, match=r"has live LoRAs of another LiveLoras object; use that, or clear\(\)"):
        LiveLoras(stack)


def test_strengths_beyond_the_dtype_change_nothing() -> None:
    stack, lora = v1_1_stack(dtype=torch.float16), toy_lora(V1_1)
    loras = LiveLoras(stack)
    loras.add(lora, 0.5)
    before = ours(stack)
    with pytest.raises(ValueError, match=r"qkv\.weight is not finite in torch\.float16; take a lower strength"):
        loras.set_strength("toy", 1e6)
    assert loras.strengths == {"toy": 0.5}
    assert torch.equal(ours(stack), before)


def test_live_loras_are_not_saved(tmp_path: Any) -> None:
    pytest.importorskip("transformers")
    from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel

    source = transformers_encoder(V1_1.encoder_only(), encoder_part(random_state(V1_1)), torch.float32)
    model = NAIT5EncoderModel.from_hf(source, release=True)
    loras = LiveLoras(model)
    loras.add(toy_lora(V1_1))
    with pytest.raises(
        ValueError, match=r"qkv\.weight has an adapter or live LoRA beside it.*\(12 weights.*call clear\(\)"
    ):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"cannot be had as they are: .*qkv\.weight has an adapter or live LoRA"):
        model.give_back(source)
    loras.clear()
    model.save_pretrained(tmp_path / "out")
    assert_near(ours(NAIT5EncoderModel.from_pretrained(tmp_path / "out").stack), reference(V1_1))
    model.give_back(source)
    with torch.no_grad():
        assert_near(source(ids_for(V1_1), MASK)[0], reference(V1_1))
