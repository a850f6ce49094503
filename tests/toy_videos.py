"""Tiny pipelines that make videos, and Cosmos' images of one frame."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers import schedulers
from torch import nn
from torch.nn.functional import interpolate
from toy_parts import (
    BYT5,
    QUOTE,
    T5,
    UMT5,
    WEAK_GUIDANCE,
    WIDTH,
    Toy,
    drawn,
    flow,
    qwen_sizes,
    short_square,
    square,
    text_encoder,
    tiny_vae,
    tokenizer,
    wan_vae,
)
from transformers import ByT5Tokenizer


def _wan_transformer(model_class: Any) -> Any:
    return drawn(
        model_class(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=WIDTH,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
    )


def _film(size: int = 16, frames: int = 5, **other: Any) -> dict[str, Any]:
    return short_square(size, num_frames=frames, **other)


def wan() -> Toy:
    transformer = _wan_transformer(diffusers.WanTransformer3DModel)
    pipe = diffusers.WanPipeline(tokenizer(), text_encoder(UMT5), wan_vae(), flow(), transformer)
    return Toy(pipe, _film())


def skyreels_v2() -> Toy:
    transformer = _wan_transformer(diffusers.SkyReelsV2Transformer3DModel)
    scheduler = schedulers.UniPCMultistepScheduler(flow_shift=8.0, use_flow_sigmas=True)
    pipe = diffusers.SkyReelsV2Pipeline(tokenizer(), text_encoder(UMT5), transformer, wan_vae(), scheduler)
    return Toy(pipe, _film())


def helios() -> Toy:
    transformer = diffusers.HeliosTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_dim=(4, 4, 4),
        has_multi_term_memory_patch=True,
        guidance_cross_attn=True,
        zero_history_timestep=True,
        is_amplify_history=False,
    )
    scheduler = schedulers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    pipe = diffusers.HeliosPipeline(tokenizer(), text_encoder(UMT5), wan_vae(), scheduler, drawn(transformer))
    return Toy(pipe, _film(frames=9))


def _ltx_parts() -> dict[str, Any]:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
        num_layers=1,
        caption_channels=WIDTH,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    return {
        "scheduler": flow(),
        "vae": vae.eval(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "transformer": drawn(transformer),
    }


def ltx_video() -> Toy:
    pipe = diffusers.LTXPipeline(**_ltx_parts())
    return Toy(pipe, _film(32, 9))


def ltx_condition() -> Toy:
    pipe = diffusers.LTXConditionPipeline(**_ltx_parts())
    image = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return Toy(pipe, _film(32, 9, image=image))


def mochi(force_zeros: bool = False) -> Toy:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=WIDTH,
        time_embed_dim=4,
        max_sequence_length=40,
    )
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    pipe = diffusers.MochiPipeline(
        flow(),
        vae.eval(),
        text_encoder(),
        tokenizer(),
        drawn(transformer),
        force_zeros_for_empty_prompt=force_zeros,
    )
    return Toy(pipe, _film(frames=7))


def _stand_in_for_torchvision() -> None:
    """The one function that Cosmos takes from torchvision, where that is not installed; it resizes no text."""
    from diffusers.models.transformers import transformer_cosmos

    if not hasattr(transformer_cosmos, "transforms"):
        resize = SimpleNamespace(resize=lambda image, size, interpolation: interpolate(image, size, mode=interpolation))
        modes = SimpleNamespace(NEAREST="nearest")
        transformer_cosmos.transforms = SimpleNamespace(functional=resize, InterpolationMode=modes)


class _NoGuard(nn.Module):
    """In place of a safety model of many gigabytes."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def cosmos2() -> Toy:
    _stand_in_for_torchvision()
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        extra_pos_embed_type="learnable",
    )
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    plain = T5.model_copy(update={"gated": False, "activation": "relu"})
    pipe = diffusers.Cosmos2TextToImagePipeline(
        text_encoder(plain), tokenizer(), drawn(transformer), wan_vae(), scheduler, _NoGuard()
    )
    return Toy(pipe, short_square(32))


def cogvideox() -> Toy:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=WIDTH,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=40,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    pipe = diffusers.CogVideoXPipeline(
        tokenizer(), text_encoder(), vae.eval(), drawn(transformer), schedulers.DDIMScheduler()
    )
    return Toy(pipe, _film(frames=8))


def latte() -> Toy:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    )
    pipe = diffusers.LattePipeline(
        tokenizer(), text_encoder(), tiny_vae(), drawn(transformer), schedulers.DDIMScheduler()
    )
    return Toy(pipe, square(8, video_length=1, clean_caption=False, **WEAK_GUIDANCE))


def allegro() -> Toy:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=WIDTH,
    )
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    vae.enable_tiling()
    pipe = diffusers.AllegroPipeline(
        tokenizer(), text_encoder(), vae.eval(), drawn(transformer), schedulers.DDIMScheduler()
    )
    return Toy(pipe, _film(frames=8, clean_caption=False))


def hunyuanvideo_1_5() -> Toy:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=WIDTH,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    qwen = transformers.Qwen2_5_VLTextModel(transformers.Qwen2_5_VLTextConfig(**qwen_sizes()))
    chat = tokenizer(2048)
    chat.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    pipe = diffusers.HunyuanVideo15Pipeline(
        qwen.eval(),
        chat,
        drawn(transformer),
        vae.eval(),
        schedulers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder(BYT5),
        ByT5Tokenizer(),
        diffusers.ClassifierFreeGuidance(guidance_scale=1.5),
    )
    return Toy(pipe, {"prompt": QUOTE, "height": 16, "width": 16, "num_frames": 9}, "text_encoder_2")
