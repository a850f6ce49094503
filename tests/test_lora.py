"""LoRA on our encoders against the same LoRA on transformers' own, whose weights are neither fused nor scaled."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import encoder_part
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from toy_loras import ALL_STYLES, ALPHA, RANK, dotted, kohya, projections, toy_lora, with_loras, write_style

from nai_t5_core.attention_choice import missing_for_flex
from nai_t5_core.cli import main
from nai_t5_core.compiled import compile_stack
from nai_t5_core.config import T5Config
from nai_t5_core.encoder import LAYOUTS, Layout, T5EncoderStack
from nai_t5_core.formats import CheckpointError
from nai_t5_core.fuse import cook, fused_recipes, separate_recipes
from nai_t5_core.guard import ScaleTightenedWarning, encode_guarded, rescale
from nai_t5_core.layers import NoInit
from nai_t5_core.lora import Loras
from nai_t5_core.lora_files import Lora, LowRankChange, read_lora
from nai_t5_core.optimize import can_prepack, prepack
from nai_t5_core.peers import transformers_encoder
from nai_t5_core.scales import LayerScales, StackScales
from nai_t5_core.text_encoder import TextEncoder

KINDS = ("v1.0", "v1.1", "umt5")
V1_1 = TOY_CONFIGS["v1.1"]
MASK = padding_mask([5, 12, 1, 8], 12)
# Exact powers of two, a different one for each place.
SCALES = StackScales(
    tuple(LayerScales(2.0**-index, 2.0 ** -(index + 1), 0.25 if index else 0.5) for index in range(3)), 0.5
)


def ids_for(config: T5Config) -> Tensor:
    return torch.randint(2, config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def reference(config: T5Config, *loras: tuple[Lora, float], dtype: torch.dtype = torch.float32) -> Tensor:
    """transformers' hidden states with LoRAs added to its weights."""
    pytest.importorskip("transformers", reason="transformers is the oracle")
    model = transformers_encoder(config.encoder_only(), encoder_part(with_loras(random_state(config), *loras)), dtype)
    out: Tensor = model(ids_for(config), MASK)[0]
    return out


@torch.no_grad()
def ours(stack: T5EncoderStack) -> Tensor:
    out: Tensor = stack(ids_for(stack.config), MASK)
    return out


def assert_near(values: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert (values.double() - expected.double()).abs().max() <= relative * expected.abs().max()


def scaled_stack(config: T5Config, dtype: torch.dtype, layout: Layout) -> T5EncoderStack:
    """An encoder with float16 scales at every place."""
    config = config.encoder_only()
    recipes = (fused_recipes if layout == "fused" else separate_recipes)(config, SCALES)
    stack = T5EncoderStack(config, layout, NoInit, SCALES, device="meta", dtype=dtype)
    read = random_state(config).__getitem__
    stack.load_state_dict({recipe.target: cook(recipe, read, dtype) for recipe in recipes}, assign=True)
    return stack.eval()


def v1_1_stack(layout: Layout = "fused", dtype: torch.dtype = torch.float32) -> T5EncoderStack:
    return build_stack(V1_1, random_state(V1_1), dtype, layout)


def assert_same_weights(stack: T5EncoderStack, expected: dict[str, Tensor]) -> None:
    state = stack.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []


def snapshot(stack: T5EncoderStack) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stack.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# The same as on the unfused reference
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_projection(kind: str, layout: Layout) -> None:
    config = TOY_CONFIGS[kind]
    stack, lora = build_stack(config, random_state(config), layout=layout), toy_lora(config)
    assert lora.changes.keys() == projections(config).keys()
    Loras(stack).add(lora, 0.7)
    expected = reference(config, (lora, 0.7))
    assert_near(ours(stack), expected)
    plain = reference(config)
    assert (expected - plain).abs().max() > 0.1 * plain.abs().max(), "the LoRA makes no difference"


@pytest.mark.parametrize("target", ["q", "k", "v", "o", "wi_0", "wi_1", "wo"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_projection(target: str, layout: Layout) -> None:
    """Rows at the right place of the fused weight, and no others."""
    stack, lora = v1_1_stack(layout), toy_lora(V1_1, targets=(target,))
    assert len(lora.changes) == V1_1.num_layers
    Loras(stack).add(lora)
    assert_near(ours(stack), reference(V1_1, (lora, 1.0)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_float16_scales(kind: str, layout: Layout) -> None:
    """Scales at every place change nothing: in float32 to its rounding, in float16 to that."""
    config = TOY_CONFIGS[kind]
    lora = toy_lora(config)
    stack = scaled_stack(config, torch.float32, layout)
    Loras(stack).add(lora, 0.7)
    expected = reference(config, (lora, 0.7))
    assert_near(ours(stack), expected)
    half = scaled_stack(config, torch.float16, layout)
    Loras(half).add(lora, 0.7)
    assert_near(ours(half), expected, 2e-2)


def test_bfloat16_and_float64() -> None:
    lora = toy_lora(V1_1)
    expected = reference(V1_1, (lora, 1.0))
    for dtype, tolerance in ((torch.bfloat16, 5e-2), (torch.float64, 1e-5)):
        stack = v1_1_stack(dtype=dtype)
        Loras(stack).add(lora)
        assert stack.encoder.block[0].layer[0].SelfAttention.qkv.weight.dtype == dtype  # type: ignore[union-attr, index]
        assert_near(ours(stack), expected, tolerance)


def test_a_norm_weight_of_zero_stays_zero() -> None:
    """What it hides of the original, it hides of the change."""
    state = random_state(V1_1)
    state["encoder.block.1.layer.0.layer_norm.weight"][:7] = 0
    lora = toy_lora(V1_1, targets=("q", "v"))
    fused, separate = build_stack(V1_1, state), build_stack(V1_1, state, layout="separate")
    for stack in (fused, separate):
        Loras(stack).add(lora)
    assert_near(ours(fused), ours(separate))


def test_the_drop_in_class() -> None:
    pytest.importorskip("transformers")
    from nai_t5_core.hf import NAIT5EncoderModel

    lora = toy_lora(V1_1)
    for layout in LAYOUTS:
        source = transformers_encoder(V1_1.encoder_only(), encoder_part(random_state(V1_1)), torch.float32)
        model = NAIT5EncoderModel.from_hf(source, layout=layout)
        loras = Loras(model)
        loras.add(lora, 0.5)
        with torch.no_grad():
            assert_near(model(ids_for(V1_1), MASK)[0], reference(V1_1, (lora, 0.5)))
            # The separate layout shares its tensors with the source, which must not change.
            assert_near(source(ids_for(V1_1), MASK)[0], reference(V1_1), 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Several, strengths, and out again
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_at_once(layout: Layout) -> None:
    stack = v1_1_stack(layout)
    first, second = toy_lora(V1_1, 1, ("q", "k", "wi_0"), "first"), toy_lora(V1_1, 2, ("k", "wi_1", "o"), "second")
    loras = Loras(stack)
    assert (loras.add(first), loras.add(second, -0.5)) == ("first", "second")
    assert loras.strengths == {"first": 1.0, "second": -0.5}
    assert_near(ours(stack), reference(V1_1, (first, 1.0), (second, -0.5)))
    loras.set_strength("first", 0.25)
    assert_near(ours(stack), reference(V1_1, (first, 0.25), (second, -0.5)))
    loras.remove("second")
    assert_near(ours(stack), reference(V1_1, (first, 0.25)))
    assert repr(loras) == f"Loras(first: 0.25; {6 if layout == 'fused' else 9} weights changed)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unloading_is_exact(layout: Layout, dtype: torch.dtype) -> None:
    """The same tensors as before, whatever was done between; and the same merge whatever went before it."""
    stack = scaled_stack(V1_1, dtype, layout)
    before, parameters = snapshot(stack), dict(stack.named_parameters())
    loras = Loras(stack)
    loras.add(toy_lora(V1_1, 1), 0.3, "a")
    only = snapshot(stack)
    loras.add(toy_lora(V1_1, 2), 1.7, "b")
    for strength in (0.1, -4.0, 0.3):
        loras.set_strength("a", strength)
    loras.remove("b")
    assert_same_weights(stack, only)
    loras.set_strength("a", 0)
    assert_same_weights(stack, before)
    loras.set_strength("a", 1)
    loras.clear()
    assert_same_weights(stack, before)
    assert all(parameter is parameters[name] for name, parameter in stack.named_parameters())
    assert loras.strengths == {}


def test_scales_tightened_while_merged() -> None:
    """The originals come back as the tightening would have left them."""
    stack, untouched = scaled_stack(V1_1, torch.float16, "fused"), scaled_stack(V1_1, torch.float16, "fused")
    lora = toy_lora(V1_1)
    loras = Loras(stack)
    loras.add(lora, 0.7)
    tighter = LayerScales(2.0**-4, 2.0**-5, 2.0**-3)
    for changed in (stack, untouched):
        rescale(changed, 1, tighter)
    assert_near(ours(stack), reference(V1_1, (lora, 0.7)), 2e-2)
    loras.set_strength("toy", 0.2)
    assert_near(ours(stack), reference(V1_1, (lora, 0.2)), 2e-2)
    rescale(stack, 0, tighter)
    rescale(untouched, 0, tighter)
    loras.clear()
    assert_same_weights(stack, untouched.state_dict())


def test_a_lora_that_overflows_float16_is_guarded() -> None:
    stack = v1_1_stack(dtype=torch.float16)
    lora = toy_lora(V1_1, targets=("wo",))
    with pytest.warns(ScaleTightenedWarning):
        loras = Loras(stack)
        loras.add(lora, 30_000.0)
        out = encode_guarded(stack, ids_for(V1_1), MASK)
    assert_near(out, reference(V1_1, (lora, 30_000.0)), 2e-2)
    loras.clear()
    assert_near(ours(stack), reference(V1_1), 2e-2)


def test_cast_while_merged() -> None:
    stack = v1_1_stack()
    loras = Loras(stack)
    loras.add(toy_lora(V1_1))
    stack.to(torch.bfloat16)
    loras.clear()
    assert_same_weights(stack, v1_1_stack().to(torch.bfloat16).state_dict())


@pytest.mark.skipif(
    missing_for_flex(torch.device("cpu")) is not None,
    reason="nothing can be compiled here: torch finds no C++ compiler",
)
def test_a_compiled_encoder_is_not_compiled_anew() -> None:
    stack, lora = v1_1_stack(), toy_lora(V1_1)
    torch._dynamo.reset()
    counters.clear()
    compile_stack(stack, buckets=(128,), backend="aot_eager")
    assert_near(ours(stack), reference(V1_1))
    loras = Loras(stack)
    loras.add(lora)
    assert_near(ours(stack), reference(V1_1, (lora, 1.0)))
    loras.clear()
    assert_near(ours(stack), reference(V1_1))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_copy_is_a_model_of_its_own() -> None:
    stack, lora = v1_1_stack(), toy_lora(V1_1)
    loras = Loras(stack)
    loras.add(lora)
    twin = copy.deepcopy(stack)
    loras.clear()
    assert_near(ours(twin), reference(V1_1, (lora, 1.0)))


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ALL_STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_file_styles(kind: str, style: str, tmp_path: Path) -> None:
    config = TOY_CONFIGS[kind]
    lora, stack = toy_lora(config), build_stack(config, random_state(config))
    Loras(stack).add(write_style(style, lora, tmp_path / "style"), 0.7)
    assert_near(ours(stack), reference(config, (lora, 0.7)))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"SelfAttention.q": 3, "wo": 1}}])
def test_what_peft_saves(options: dict[str, Any], tmp_path: Path) -> None:
    """Its own file and its own live computation, both written by peft."""
    peft = pytest.importorskip("peft")
    model = transformers_encoder(V1_1.encoder_only(), encoder_part(random_state(V1_1)), torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q", "v", "wi_1", "wo"], init_lora_weights=False, **options
    )
    live = peft.get_peft_model(model, config).eval()
    live.save_pretrained(tmp_path)
    stack = v1_1_stack()
    Loras(stack).add(tmp_path)
    with torch.no_grad():
        assert_near(ours(stack), live(ids_for(V1_1), MASK)[0])


def test_what_diffusers_saves(tmp_path: Path) -> None:
    """peft's tensors under diffusers' names and its header, as the training scripts write them."""
    peft, diffusers = pytest.importorskip("peft"), pytest.importorskip("diffusers")
    model = transformers_encoder(V1_1.encoder_only(), encoder_part(random_state(V1_1)), torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["k", "o", "wi_0"], init_lora_weights=False)
    model.add_adapter(config)  # type: ignore[operator]
    tensors = peft.utils.get_peft_model_state_dict(model, adapter_name="default")
    mixin = diffusers.loaders.StableDiffusionLoraLoaderMixin
    mixin.save_lora_weights(
        tmp_path, text_encoder_lora_layers=tensors, text_encoder_lora_adapter_metadata=config.to_dict()
    )
    stack = v1_1_stack()
    Loras(stack).add(tmp_path)
    with torch.no_grad():
        assert_near(ours(stack), model(ids_for(V1_1), MASK)[0])


OTHER_KEYS = {
    "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": "the UNet or transformer",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": "the transformer",
    "transformer.single_transformer_blocks.0.attn.to_q.lora_magnitude_vector": "the transformer",
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight": "the transformer",
    "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": "the UNet or transformer",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": "a CLIP text encoder",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": "a CLIP text encoder",
    "decoder.block.0.layer.0.SelfAttention.q.lora_A.weight": "the T5's decoder",
    "lora_te3_decoder_block_0_layer_1_EncDecAttention_q.lora_down.weight": "the T5's decoder",
    "lora_te1_model_layers_0_self_attn_q_proj.lora_down.weight": "a language model",
    "text_encoders.llama.transformer.model.layers.0.mlp.up_proj.lora_A.weight": "a language model",
    "lycoris_transformer_blocks_0_attn_to_q.lokr_w1": "the transformer",
    "double_blocks.0.img_attn.proj.lora_A.weight": "the transformer",
    "base_model.model.down_blocks.0.proj.lora_A.weight": "the UNet",
    "lora_vae_encoder_conv_in.lora_down.weight": "the VAE",
    "bundle_emb.cat.t5": "textual inversion vectors",
}


def test_keys_of_other_parts_are_listed(tmp_path: Path) -> None:
    others = {name: torch.zeros(2, 2) for name in OTHER_KEYS}
    save_file(kohya(toy_lora(V1_1)) | others, tmp_path / "style.safetensors")
    lora = read_lora(tmp_path / "style.safetensors")
    assert lora.others == OTHER_KEYS
    assert lora.changes.keys() == projections(V1_1).keys()
    assert lora.other_parts()["the T5's decoder"] == 2
    assert repr(lora).startswith("Lora(style: 21 weights of the T5; tensors for other parts: ")
    assert "the transformer (5)" in repr(lora)


Q = "encoder.block.0.layer.0.SelfAttention.q"
FAULTS = {
    "unknown": ({"text_encoder_2.encoder.block.0.layer.0.layer_norm.weight": (64,)}, "layer_norm.weight: not known"),
    "strange": ({"something.else": (2,)}, "something.else: not known"),
    "DoRA": ({f"{Q}.dora_scale": (64,)}, "q.dora_scale: DoRA"),
    "DoRA of peft": ({f"base_model.model.{Q}.lora_magnitude_vector": (64,)}, "magnitude_vector: DoRA"),
    "LoKr": ({f"{Q}.lokr_w1": (2, 2)}, "lokr_w1: LoKr"),
    "embedding": ({"base_model.model.shared.lora_embedding_A": (2, 2)}, "a LoRA of the embedding"),
    "bias": ({f"{Q}.lora_B.bias": (64,)}, "a bias, and T5 has none"),
    "no up": ({f"{Q}.lora_A.weight": (2, 64)}, "lora_A.weight: no factor up beside it"),
    "lone alpha": ({f"{Q}.alpha": ()}, "alpha: no factor up and down beside it"),
    "ranks": ({f"{Q}.lora_A.weight": (2, 64), f"{Q}.lora_B.weight": (64, 3)}, r"\[64, 3\] and \[2, 64\]"),
    "dimensions": ({f"{Q}.lora_A.weight": (2, 8, 8), f"{Q}.lora_B.weight": (64, 2)}, "no common rank"),
    "alphas": (
        {f"{Q}.lora_A.weight": (2, 64), f"{Q}.lora_B.weight": (64, 2), f"{Q}.alpha": (2,)},
        r"shape \[2\], not one number",
    ),
    "two spellings": ({f"{Q}.lora_A.weight": (2, 64), f"{Q}.lora_down.weight": (2, 64)}, "two tensors for one factor"),
    "two encoders": (
        {f"text_encoder.{Q}.lora_A.weight": (2, 64), f"text_encoder_2.{Q}.lora_A.weight": (2, 64)},
        "2 T5 encoders, under 'text_encoder.', 'text_encoder_2.'",
    ),
    "nothing": (
        {"transformer.x.lora_A.weight": (2, 2)},
        "no LoRA for a T5 encoder; it holds tensors for the transformer .1.",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_files(fault: str, tmp_path: Path) -> None:
    shapes, message = FAULTS[fault]
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "faulty.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_lora(tmp_path / "faulty.safetensors")


def test_all_faults_are_listed(tmp_path: Path) -> None:
    save_file({f"odd.{number}": torch.ones(1) for number in range(11)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)odd\.0: not known.*and 3 more"):
        read_lora(tmp_path / "odd.safetensors")


def test_faulty_places(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; give a LoRA file"):
        read_lora(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no adapter \(looked for adapter_model"):
        read_lora(tmp_path)
    tensors = dotted(toy_lora(V1_1), "base_model.model.", "lora_A", "lora_B", fold_scale=False)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"no adapter_config.json beside it, which tells alpha; give alpha="):
        read_lora(tmp_path)
    assert {change.scale for change in read_lora(tmp_path, alpha=ALPHA).changes.values()} == {ALPHA / RANK}
    for config, message in (
        ({"peft_type": "LOHA"}, "is LOHA, which is not supported"),
        ({"peft_type": "LORA", "use_dora": True}, "is DoRA"),
        ([], "holds a JSON list"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            read_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        read_lora(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Misuse
# ---------------------------------------------------------------------------------------------------------------------


def test_a_lora_for_another_t5_changes_nothing() -> None:
    stack = v1_1_stack()
    before = snapshot(stack)
    loras = Loras(stack)
    with pytest.raises(
        ValueError, match=r"(?s)another T5 than this T5 v1.1.*DenseReluDense.wi.weight: the model has no"
    ):
        loras.add(toy_lora(TOY_CONFIGS["v1.0"]))
    odd = Lora("odd", {f"{Q}.weight": LowRankChange(torch.ones(64, 2), torch.ones(2, 32), 1.0)})
    with pytest.raises(ValueError, match=r"a change of shape \[64, 32\] for a weight of shape \[64, 64\]"):
        loras.add(odd)
    assert loras.strengths == {}
    assert_same_weights(stack, before)


def test_names_and_strengths() -> None:
    loras = Loras(v1_1_stack())
    loras.add(toy_lora(V1_1))
    with pytest.raises(ValueError, match="there is a LoRA 'toy' already"):
        loras.add(toy_lora(V1_1))
    with pytest.raises(ValueError, match="there is no LoRA 'toi'; there are: toy"):
        loras.remove("toi")
    with pytest.raises(ValueError, match="strength=nan; it must be a finite number"):
        loras.set_strength("toy", float("nan"))
    assert loras.strengths == {"toy": 1.0}


def test_packed_weights_take_no_lora() -> None:
    stack = v1_1_stack()
    if not can_prepack(stack):
        pytest.skip("this machine's oneDNN packs no float32 weights")
    with pytest.raises(ValueError, match=r"is packed, quantised or wrapped.*optimize=False"):
        Loras(prepack(stack)).add(toy_lora(V1_1))


def test_offloaded_weights_take_no_lora() -> None:
    with pytest.raises(ValueError, match="is offloaded; remove the offload hooks"):
        Loras(v1_1_stack().to("meta")).add(toy_lora(V1_1))


def test_weights_replaced_by_others() -> None:
    stack = v1_1_stack()
    loras = Loras(stack)
    loras.add(toy_lora(V1_1))
    linear: Any = stack.encoder.block[0].layer[0].SelfAttention.o  # type: ignore[union-attr, index]
    linear.weight = nn.Parameter(torch.ones_like(linear.weight))
    with pytest.raises(ValueError, match="was replaced by others after a LoRA was merged"):
        loras.clear()
    assert loras.strengths == {"toy": 1.0}


# ---------------------------------------------------------------------------------------------------------------------
# TextEncoder
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> TextEncoder:
    return TextEncoder.from_pretrained(dtype="float32", device="cpu", optimize=False)


def test_text_encoder(embedded: TextEncoder, tmp_path: Path) -> None:
    """Merged at load, before the weights are packed, and merged later: the same."""
    file = write_style("kohya, third", toy_lora(embedded.stack.config), tmp_path)
    before = embedded.encode(["a cat"]).hidden_states
    loras = Loras(embedded)
    loras.add(file, 0.6)
    later = embedded.encode(["a cat"]).hidden_states
    loras.clear()
    assert torch.equal(embedded.encode(["a cat"]).hidden_states, before)
    assert not torch.allclose(later, before, rtol=0.1)
    packed = TextEncoder.from_pretrained(dtype="float32", device="cpu", loras=[(file, 0.2), (file, 0.4)])
    for _ in range(3):  # weights are packed by the second call
        assert_near(packed.encode(["a cat"]).hidden_states, later)
    assert load_file(file).keys() == kohya(toy_lora(embedded.stack.config)).keys()


def test_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = TextEncoder.from_pretrained(optimize=False).stack.config
    strong = write_style("kohya, third", toy_lora(config, 1, name="strong"), tmp_path)
    weak = write_style("diffusers", toy_lora(config, 2, name="we:ak"), tmp_path)
    part = tmp_path / "part.safetensors"
    save_file(kohya(toy_lora(config, 3)) | {"lora_unet_x.alpha": torch.ones(())}, part)

    def run(*arguments: object) -> Any:
        options = ("--dtype", "float32", "--device", "cpu", "--json")
        monkeypatch.setattr(sys, "argv", ["nai-t5", "encode", "a cat", *map(str, arguments), *options])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return json.loads(captured.out) if not caught.value.code else captured.err

    report = run("--lora", f"{strong}:0.5", "--lora", weak, "--lora", f"{part}:-0.1", "--out", tmp_path / "out")
    assert [(row["name"], row["strength"], row["not_for_t5"]) for row in report["loras"]] == [
        ("strong", 0.5, ""),
        ("we:ak", 1.0, ""),
        ("part", -0.1, "the UNet or transformer (1)"),
    ]
    loras: list[tuple[Any, float]] = [(strong, 0.5), (weak, 1.0), (part, -0.1)]
    expected = TextEncoder.from_pretrained(dtype="float32", device="cpu", loras=loras).encode(["a cat"])
    assert_near(load_file(tmp_path / "out")["hidden_states"], expected.hidden_states, 1e-6)
    assert "none.safetensors does not exist; give a LoRA file" in run("--lora", tmp_path / "none.safetensors:0.5")
    assert "strength=nan; it must be a finite number" in run("--lora", f"{strong}:nan")
