"""Tiny pipelines that make images."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers import schedulers
from PIL import Image
from toy_parts import (
    BYT5,
    PROMPT,
    QUOTE,
    T5,
    UMT5,
    VOCABULARY,
    WEAK_GUIDANCE,
    WIDTH,
    Toy,
    clip,
    drawn,
    flow,
    llama,
    qwen_sizes,
    short_square,
    square,
    text_encoder,
    tiny_vae,
    tokenizer,
)
from transformers import ByT5Tokenizer


def flux() -> Toy:
    pipe = diffusers.FluxPipeline(**_flux_parts(4))
    return Toy(pipe, {"prompt": PROMPT, "height": 8, "width": 8, "max_sequence_length": 48}, "text_encoder_2")


def visualcloze() -> Toy:
    """One example of a task, and a query whose second image is to be made."""
    pipe = diffusers.VisualClozeGenerationPipeline(**_flux_parts(12), resolution=32)
    picture = Image.fromarray((torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy())
    task = "from [IMAGE1] to [IMAGE2]"
    call = {"prompt": PROMPT, "task_prompt": task, "image": [[picture, picture], [picture, None]], "output_type": "pt"}
    encode = {"layout_prompt": "two rows", "task_prompt": task}
    return Toy(pipe, {**call, "max_sequence_length": 128}, "text_encoder_2", encode, "content_prompt")


def _flux_parts(channels: int) -> dict[str, Any]:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    return {
        "scheduler": flow(),
        "vae": tiny_vae(1),
        "text_encoder": clip(False),
        "tokenizer": tokenizer(77),
        "text_encoder_2": text_encoder(),
        "tokenizer_2": tokenizer(),
        "transformer": drawn(transformer),
    }


def sd3() -> Toy:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=WIDTH,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        drawn(transformer),
        flow(),
        tiny_vae(),
        clip(True),
        tokenizer(77),
        clip(True),
        tokenizer(77),
        text_encoder(),
        tokenizer(),
    )
    return Toy(pipe, short_square(8), "text_encoder_3", {"prompt_2": None, "prompt_3": None})


def hidream() -> Toy:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[WIDTH, 16],
        text_emb_dim=2 * WIDTH,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    pipe = diffusers.HiDreamImagePipeline(
        flow(),
        tiny_vae(),
        clip(True, positions=128),
        tokenizer(77),
        clip(True, positions=128),
        tokenizer(77),
        text_encoder(),
        tokenizer(),
        llama(),
        tokenizer(),
        drawn(transformer),
    )
    # The pipeline scales every image to this size, in latents; its own makes thousands of rows.
    pipe.default_sample_size = 16
    return Toy(pipe, short_square(16), "text_encoder_3")


def chroma() -> Toy:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    pipe = diffusers.ChromaPipeline(flow(), tiny_vae(1), text_encoder(), tokenizer(), drawn(transformer))
    return Toy(pipe, short_square(8))


def auraflow() -> Toy:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=WIDTH,
        joint_attention_dim=WIDTH,
        out_channels=4,
        pos_embed_max_size=256,
    )
    pipe = diffusers.AuraFlowPipeline(tokenizer(), text_encoder(UMT5), tiny_vae(), drawn(transformer), flow())
    return Toy(pipe, short_square(16))


def bria() -> Toy:
    transformer = diffusers.BriaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=None,
        axes_dims_rope=[0, 4, 4],
    )
    pipe = diffusers.BriaPipeline(drawn(transformer), flow(), tiny_vae(), text_encoder(), tokenizer())
    return Toy(pipe, short_square(16))


def pixart_alpha() -> Toy:
    return _pixart(diffusers.PixArtAlphaPipeline)


def pixart_sigma() -> Toy:
    return _pixart(diffusers.PixArtSigmaPipeline)


def _pixart(pipeline_class: Any) -> Toy:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
    )
    pipe = pipeline_class(tokenizer(), text_encoder(), tiny_vae(), drawn(transformer), schedulers.DDIMScheduler())
    return Toy(pipe, short_square(8, use_resolution_binning=False, clean_caption=False))


def hunyuandit() -> Toy:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=16,
        hidden_size=24,
        activation_fn="gelu-approximate",
    )
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40
        )
    )
    pipe = diffusers.HunyuanDiTPipeline(
        tiny_vae(),
        bert.eval(),
        tokenizer(77),
        drawn(transformer),
        schedulers.DDPMScheduler(),
        None,
        None,
        requires_safety_checker=False,
        text_encoder_2=text_encoder(T5.model_copy(update={"vocab_size": 120_000})),
        tokenizer_2=tokenizer(256),
    )
    encode = {"text_encoder_index": 1, "device": "cpu", "dtype": torch.float32}
    return Toy(pipe, square(16, use_resolution_binning=False), "text_encoder_2", encode)


def deepfloyd_if() -> Toy:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=[8, 16],
        down_block_types=["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
        in_channels=3,
        out_channels=6,
        cross_attention_dim=WIDTH,
        encoder_hid_dim=WIDTH,
        attention_head_dim=4,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        norm_num_groups=4,
    )
    scheduler = schedulers.DDPMScheduler(variance_type="learned_range")
    pipe = diffusers.IFPipeline(
        tokenizer(), text_encoder(), drawn(unet), scheduler, None, None, None, requires_safety_checker=False
    )
    return Toy(pipe, square(8, output_type="pt", clean_caption=False, **WEAK_GUIDANCE))


def kandinsky3() -> Toy:
    unet = diffusers.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=WIDTH,
    )
    movq = diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=8)
    pipe = diffusers.Kandinsky3Pipeline(
        tokenizer(), text_encoder(), drawn(unet), schedulers.DDPMScheduler(), movq.eval()
    )
    return Toy(pipe, square(16, **WEAK_GUIDANCE), beyond={"_cut_context": True})


def cogview3plus() -> Toy:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    pipe = diffusers.CogView3PlusPipeline(
        tokenizer(), text_encoder(), tiny_vae(), drawn(transformer), schedulers.CogVideoXDDIMScheduler()
    )
    return Toy(pipe, short_square(16))


def hunyuanimage() -> Toy:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=16,
        text_embed_2_dim=WIDTH,
        rope_axes_dim=(4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        scaling_factor=0.5,
        spatial_compression_ratio=8,
        sample_size=128,
    )
    vision = {"depth": 1, "out_hidden_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    torch.manual_seed(0)
    qwen = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=qwen_sizes(), vision_config=vision)
    )
    pipe = diffusers.HunyuanImagePipeline(
        flow(),
        vae.eval(),
        qwen.eval(),
        tokenizer(2048),
        text_encoder(BYT5),
        ByT5Tokenizer(),
        drawn(transformer),
        diffusers.ClassifierFreeGuidance(guidance_scale=1.5),
        diffusers.ClassifierFreeGuidance(guidance_scale=1.5),
    )
    return Toy(pipe, {"prompt": QUOTE, "height": 16, "width": 16}, "text_encoder_2")


def glm_image() -> Toy:
    """Without its language model, whose tokens are given."""
    transformer = diffusers.GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=128,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = diffusers.GlmImagePipeline(
        ByT5Tokenizer(), None, text_encoder(BYT5), None, vae.eval(), drawn(transformer), flow()
    )
    call = {
        "prompt": "says 'HELLO' and \"a\" and 'fox'",
        "height": 32,
        "width": 32,
        "prior_token_ids": torch.arange(4)[None],
        "max_sequence_length": 64,
    }
    return Toy(pipe, call)
