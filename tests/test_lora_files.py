"""LoRA files of every trainer: read as what they mean, or refused with their faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import encoder_part
from conftest import TOY_CONFIGS, build_stack, random_state
from lora_oracle import KINDS, MASK, V1_1, assert_near, ids_for, ours, reference, v1_1_stack
from safetensors.torch import save_file
from toy_loras import ALL_STYLES, ALPHA, RANK, dotted, kohya, projections, toy_lora, write_style

from nai_t5_core.bench.peers import transformers_encoder
from nai_t5_core.lora.files import read_lora
from nai_t5_core.lora.loras import Loras
from nai_t5_core.weights.formats import CheckpointError


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
