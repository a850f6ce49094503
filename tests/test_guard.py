"""The guard finds what is not finite and names it, in whatever form the model computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import encoder_part, spiece_model
from conftest import TOY_CONFIGS, build_stack, needs_kernels, padding_mask, random_state, write_hf_folder
from torch import Tensor
from toy_loras import toy_lora

from nai_t5_core.backends.choose import prepack, quantize_int8, why_not_int8, why_not_prepack
from nai_t5_core.backends.held import HeldLinear
from nai_t5_core.backends.int8_weight import Int8Weight
from nai_t5_core.bench.peers import own_t5
from nai_t5_core.facts.scales import LayerScales
from nai_t5_core.float16.generation_guard import generate_guarded
from nai_t5_core.float16.guard import NotFiniteError, ScaleTightenedWarning, encode_guarded
from nai_t5_core.lora.live import LiveLinear, LiveLoras
from nai_t5_core.lora.loras import Loras
from nai_t5_core.model.encoder import LAYOUTS, Layout, T5EncoderStack
from nai_t5_core.model.plain_twin import plain_twin
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.weights.fuse import fused_recipes, separate_recipes
from nai_t5_core.weights.load import load_encoder

CONFIG = TOY_CONFIGS["v1.1"]
IDS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(3))
MASK = padding_mask([12, 5, 1], 12)
_PLAIN = build_stack(CONFIG, random_state(CONFIG))

needs_onednn = pytest.mark.skipif(
    why_not_prepack(_PLAIN) is not None, reason="this machine's oneDNN packs no float32 weights"
)
needs_bytes = pytest.mark.skipif(why_not_int8(_PLAIN) is not None, reason="this processor has no VNNI")


def unchanged(stack: T5EncoderStack) -> T5EncoderStack:
    return stack


def with_lora(stack: T5EncoderStack) -> T5EncoderStack:
    LiveLoras(stack).add(toy_lora(stack.config))
    return stack


# Every form that an encoder can have here, by what makes it of a plain one.
FORMS: list[Any] = [
    pytest.param(unchanged, id="plain"),
    pytest.param(with_lora, id="live lora"),
    pytest.param(lambda stack: prepack(stack, "onednn"), id="onednn", marks=needs_onednn),
    pytest.param(lambda stack: prepack(stack, "kernels"), id="kernels", marks=[needs_onednn, needs_kernels]),
    pytest.param(lambda stack: quantize_int8(stack, "onednn"), id="int8", marks=needs_bytes),
    pytest.param(lambda stack: quantize_int8(stack, "kernels"), id="int8 kernels", marks=[needs_bytes, needs_kernels]),
    pytest.param(lambda stack: with_lora(prepack(stack)), id="live lora on packed", marks=needs_onednn),
]
DAMAGED = [
    "encoder.block.1.layer.0.SelfAttention.k.weight",
    "encoder.block.1.layer.0.SelfAttention.o.weight",
    "encoder.block.2.layer.1.DenseReluDense.wi_0.weight",
    "encoder.block.2.layer.1.DenseReluDense.wi_1.weight",
    "encoder.block.2.layer.1.DenseReluDense.wo.weight",
    "encoder.block.1.layer.0.layer_norm.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "encoder.final_layer_norm.weight",
    "shared.weight",
]

Form = Callable[[T5EncoderStack], T5EncoderStack]


def named_by(layout: Layout, damaged: str) -> str:
    """The tensor of the model in which a tensor of the checkpoint is."""
    recipes = fused_recipes(CONFIG.encoder_only()) if layout == "fused" else separate_recipes(CONFIG.encoder_only())
    users = [r.target for r in recipes if damaged in r.originals and "folded_weight" not in r.target]
    assert len(users) == 1
    return users[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("damaged", DAMAGED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_a_damaged_tensor_is_named(damaged: str, layout: Layout, form: Form, value: float) -> None:
    """In the first call, before weights are packed, and in those that follow."""
    state = random_state(CONFIG)
    place = (int(IDS[0, 0]), 5) if damaged == "shared.weight" else (5, 3)[: state[damaged].ndim]
    state[damaged][place] = value
    stack = build_stack(CONFIG, state, torch.float32, layout)
    try:
        stack = form(stack)
    except ValueError as error:
        # What a LoRA is multiplied with is damaged, which adding it tells.
        assert damaged.endswith("layer_norm.weight") and "is not finite" in str(error)
        return
    for _ in range(3):
        with pytest.raises(NotFiniteError) as told:
            encode_guarded(stack, IDS, MASK)
        assert str(told.value).startswith(f"{named_by(layout, damaged)} holds values that are not finite")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_twin_has_the_weights(kind: str, layout: Layout, form: Form, dtype: torch.dtype) -> None:
    """To the bit, whether they are packed or not; those in 8 bits, and the sum with a LoRA, to their rounding."""
    config = TOY_CONFIGS[kind].encoder_only()
    original, stack = (build_stack(config, random_state(config), dtype, layout) for _ in range(2))
    stack = form(stack)
    tolerance = 0.0
    if any(isinstance(module, HeldLinear) and isinstance(module.original(), Int8Weight) for module in stack.modules()):
        tolerance = 0.02
    elif any(isinstance(module, LiveLinear) for module in stack.modules()):
        Loras(original).add(toy_lora(config))
        tolerance = 1e-6 if dtype == torch.float32 else 2.0**-7
    expected = dict(original.encoder.block[1].named_parameters())
    for _ in range(3):
        twin = plain_twin(stack.encoder.block[1], layout, config, stack.scales.layers[1], torch.empty(0, dtype=dtype))
        weights = dict(twin.named_parameters())
        assert weights.keys() == expected.keys() - {"layer.0.SelfAttention.relative_attention_bias.weight"}
        for name, weight in weights.items():
            assert weight.dtype == torch.float32
            difference = (weight - expected[name].float()).abs().max()
            assert float(difference) <= tolerance * float(expected[name].abs().max())
        stack(IDS, MASK)


@needs_onednn
@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"dtype": "bfloat16"}, {"dtype": "float16"}])
def test_the_text_encoder_names_it(tmp_path: Path, optimize: bool, options: dict[str, Any]) -> None:
    config = CONFIG.model_copy(update={"vocab_size": 4096})
    state = random_state(config)
    state["encoder.block.1.layer.1.DenseReluDense.wo.weight"][3, 3] = float("nan")
    # As it is loaded where that is float16: of what is cast to it, damage is found before.
    folder = write_hf_folder(tmp_path / "t5", config, {name: tensor.half() for name, tensor in state.items()})
    (folder / "spiece.model").write_bytes(spiece_model())
    if "quantize" in options and why_not_int8(_PLAIN) is not None:
        pytest.skip("this processor has no VNNI")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = TextEncoder.from_pretrained(folder, optimize=optimize, **options)
    for _ in range(3):
        with pytest.raises(NotFiniteError, match=r"block\.1\.layer\.1\.DenseReluDense\.wo\.weight holds values"):
            encoder.encode(["a cat"])


@needs_onednn
@pytest.mark.parametrize("change", [prepack, quantize_int8])
@pytest.mark.parametrize(
    "damaged",
    [
        "encoder.block.1.layer.0.SelfAttention.o.weight",
        "decoder.block.1.layer.0.SelfAttention.o.weight",
        "decoder.block.1.layer.1.EncDecAttention.o.weight",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.final_layer_norm.weight",
        "lm_head.weight",
    ],
)
@torch.no_grad()
def test_generation_names_it(damaged: str, change: Any) -> None:
    state = random_state(CONFIG)
    state[damaged][(0, 3)[: state[damaged].ndim]] = float("nan")
    model = own_t5(CONFIG, state, torch.float32)
    if change is quantize_int8 and why_not_int8(model) is not None:
        pytest.skip("this processor has no VNNI")
    model = change(model)
    with pytest.raises(NotFiniteError, match=damaged.replace(".", r"\.") + " holds values that are not finite"):
        generate_guarded(model, IDS, MASK, max_new_tokens=3)


# ---------------------------------------------------------------------------------------------------------------------
# A stack from load_encoder
# ---------------------------------------------------------------------------------------------------------------------


def overflowing_folder(folder: Path) -> Path:
    state = random_state(CONFIG)
    state["encoder.block.1.layer.1.DenseReluDense.wo.weight"] *= 1e5
    return write_hf_folder(folder, CONFIG, state)


@pytest.mark.filterwarnings("ignore::nai_t5_core.weights.chosen.SlowDtypeWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", ["hidden_states", "forward"])
@torch.no_grad()
def test_a_loaded_stack_is_guarded(tmp_path: Path, layout: Layout, call: str) -> None:
    folder = overflowing_folder(tmp_path / "t5")

    def encode(stack: T5EncoderStack) -> Tensor:
        return stack(IDS, MASK) if call == "forward" else stack.hidden_states(IDS, MASK)[-1]

    expected = encode(load_encoder(folder, "float64", "cpu"))
    stack = load_encoder(folder, "float16", "cpu", layout)
    with pytest.warns(ScaleTightenedWarning, match=r"layer 1: feed_forward_out reaches"):
        out = encode(stack)
    assert float((out.double() - expected).abs().max() / expected.abs().max()) < 0.02
    unguarded = load_encoder(folder, "float16", "cpu", layout)
    unguarded.guard = None
    assert not encode(unguarded).isfinite().all()


def test_the_guard_lets_gradients_through(tmp_path: Path) -> None:
    stack = load_encoder(overflowing_folder(tmp_path / "t5"), "float32", "cpu")
    embeddings = stack.embed(IDS).detach().requires_grad_()
    stack(inputs_embeds=embeddings, attention_mask=MASK).square().mean().backward()
    assert embeddings.grad is not None and embeddings.grad.abs().sum() > 0


@torch.no_grad()
def test_tokens_with_damaged_rows_are_named() -> None:
    state = random_state(CONFIG)
    state["shared.weight"][[7, 50]] = float("nan")
    stack = build_stack(CONFIG, state)
    assert encode_guarded(stack, torch.tensor([[3, 4, 1]])).isfinite().all()
    with pytest.raises(NotFiniteError, match=r"in rows of tokens that the text has: 7, 50$"):
        encode_guarded(stack, torch.tensor([[50, 4, 7], [7, 1, 1]]))


# ---------------------------------------------------------------------------------------------------------------------
# The drop-in class, whose weights may be somewhere else
# ---------------------------------------------------------------------------------------------------------------------


def drop_in(state: dict[str, Tensor], dtype: torch.dtype, layout: Layout) -> Any:
    pytest.importorskip("transformers", reason="the class that ours stands for")
    from nai_t5_core.bench.peers import transformers_encoder
    from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel

    source = transformers_encoder(CONFIG.encoder_only(), encoder_part(state), torch.float32)
    return NAIT5EncoderModel.from_hf(source, dtype, layout)


def in_place(model: Any) -> Any:
    return model


def offloaded(model: Any) -> Any:
    accelerate = pytest.importorskip("accelerate", reason="what offloads")
    return accelerate.cpu_offload(model, torch.device("cpu"))


@pytest.mark.parametrize("put", [in_place, offloaded])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("output_hidden_states", [False, True])
@torch.no_grad()
def test_the_drop_in_class_names_it(
    dtype: torch.dtype, layout: Layout, put: Callable[[Any], Any], output_hidden_states: bool
) -> None:
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    model = drop_in(random_state(CONFIG), dtype, layout)
    model.get_parameter(name)[3, 3] = float("nan")
    model = put(model)
    with pytest.raises(NotFiniteError, match=name + " holds values that are not finite"):
        model(IDS, MASK, output_hidden_states=output_hidden_states)


@pytest.mark.parametrize("put", [in_place, offloaded])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_drop_in_class_is_mended_where_its_weights_are(layout: Layout, put: Callable[[Any], Any]) -> None:
    """The scales of the fused layout belong into weights, which cannot be changed while they are offloaded."""
    state = random_state(CONFIG)
    state["encoder.block.1.layer.1.DenseReluDense.wo.weight"] *= 1e5
    expected = drop_in(state, torch.float32, "fused")(IDS, MASK).last_hidden_state
    model = put(drop_in(state, torch.float16, layout))
    if put is offloaded and layout == "fused":
        with pytest.raises(NotFiniteError, match=r"weights that are offloaded \(such as .*layout='separate'"):
            model(IDS, MASK)
        assert all(scales == LayerScales() for scales in model.stack.scales.layers)
        return
    with pytest.warns(ScaleTightenedWarning, match="layer 1: feed_forward_out reaches"):
        found = model(IDS, MASK).last_hidden_state
    assert float((found.float() - expected).abs().max() / expected.abs().max()) < 0.02
