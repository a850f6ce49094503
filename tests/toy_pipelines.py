"""Real pipeline classes of diffusers around tiny random parts, one for each way that a family uses its T5.

Every weight of the denoisers is redrawn, because many of them begin at zero and would let nothing of a prompt through.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from checkpoints import spiece_model
from conftest import random_state
from diffusers import schedulers as _schedulers
from torch import nn
from torch.nn.functional import interpolate
from transformers import ByT5Tokenizer, CLIPTextConfig, PreTrainedTokenizerFast

from nai_t5_core.config import T5Config, config_to_hf
from nai_t5_core.tokenizer import sentencepiece_to_tokenizer_json

WIDTH = 32  # of the text embeddings
VOCABULARY = 4096  # of the tokenizer in the embedded model
T5 = T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_heads=4, num_layers=2)
UMT5 = T5.model_copy(update={"bias_per_layer": True})
BYT5 = T5.model_copy(update={"vocab_size": 384})

PROMPT, NEGATIVE = "a red fox on a green hill", "blurred"


@dataclass
class Toy:
    """A pipeline, what to call it with, and where its T5 is."""

    pipe: Any
    call: dict[str, Any]
    component: str = "text_encoder"
    encode: dict[str, Any] = field(default_factory=dict)
    """What `encode_prompt` must be told beyond the prompts."""

    def run(self, **other: Any) -> torch.Tensor:
        """The latents (or samples) of a run of two steps."""
        settings = {"num_inference_steps": 2, "output_type": "latent", "return_dict": False} | self.call | other
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(self.pipe(generator=generator, **settings)[0])

    @property
    def encoder(self) -> Any:
        return getattr(self.pipe, self.component)

    @encoder.setter
    def encoder(self, module: nn.Module) -> None:
        setattr(self.pipe, self.component, module)

    @property
    def tokenizer(self) -> Any:
        return getattr(self.pipe, self.component.replace("text_encoder", "tokenizer"))

    def encode_arguments(self, prompt: str | list[str], **other: Any) -> dict[str, Any]:
        """What the pipeline's own `encode_prompt` takes for these prompts, negative ones among it if it takes them."""
        arguments = {"prompt": prompt, **self.encode, **other}
        count = 1 if isinstance(prompt, str) else len(prompt)
        derived = {"negative_prompt": NEGATIVE if isinstance(prompt, str) else [NEGATIVE] * count, "batch_size": count}
        taken = inspect.signature(self.pipe.encode_prompt).parameters
        return {name: value for name, value in derived.items() if name in taken} | arguments

    @torch.no_grad()
    def encode_prompt(self, prompt: str | list[str], **other: Any) -> list[Any]:
        """All that the pipeline's own `encode_prompt` gives, in order."""
        given = self.pipe.encode_prompt(**self.encode_arguments(prompt, **other))
        return list(given) if isinstance(given, tuple) else [given]


def text_encoder(config: T5Config = T5, seed: int = 0) -> Any:
    """A tiny T5 of transformers whose outputs are of order one."""
    values = config_to_hf(config)
    model_class = getattr(transformers, values.pop("architectures")[0])
    model = model_class(model_class.config_class(**values))
    model.load_state_dict(random_state(config, seed), strict=False)
    model.tie_weights()
    return model.eval()


@cache
def _tokenizer_json() -> bytes:
    return sentencepiece_to_tokenizer_json(spiece_model())


def tokenizer(limit: int = 512) -> Any:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(_tokenizer_json().decode())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=limit,
        model_input_names=["input_ids", "attention_mask"],
    )


def drawn(model: nn.Module, seed: int = 7) -> Any:
    """The model with every matrix redrawn and every vector moved a little, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.add_(noise * 0.1)
    return model.eval()


def _vae(channels: int = 4) -> Any:
    sizes = {"block_out_channels": (4,), "latent_channels": channels, "norm_num_groups": 1}
    return diffusers.AutoencoderKL(**sizes, shift_factor=0.1).eval()


def _wan_vae() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def _clip(with_projection: bool, positions: int = 77) -> Any:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=WIDTH,
        max_position_embeddings=positions,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    kind = transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel
    return kind(config).eval()


def _flow() -> Any:
    return _schedulers.FlowMatchEulerDiscreteScheduler()


# ---------------------------------------------------------------------------------------------------------------------
# One function for each way
# ---------------------------------------------------------------------------------------------------------------------


def make(name: str) -> Toy:
    """The toy of a family, quiet; the test is skipped where a package is missing that the pipeline itself needs."""
    if name in _NEEDS:
        pytest.importorskip(_NEEDS[name], reason=f"diffusers' own {name} pipeline needs {_NEEDS[name]}")
    toy = TOYS[name]()
    toy.pipe.set_progress_bar_config(disable=True)
    return toy


_NEEDS = {"stable-audio": "torchsde", "skyreels-v2": "ftfy", "helios": "ftfy"}


def flux() -> Toy:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = diffusers.FluxPipeline(
        _flow(), _vae(1), _clip(False), tokenizer(77), text_encoder(), tokenizer(), drawn(transformer)
    )
    call = {"prompt": PROMPT, "height": 8, "width": 8, "max_sequence_length": 48}
    return Toy(pipe, call, "text_encoder_2", {"max_sequence_length": 48})


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
        _flow(),
        _vae(),
        _clip(True),
        tokenizer(77),
        _clip(True),
        tokenizer(77),
        text_encoder(),
        tokenizer(),
    )
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": 8, "width": 8, "max_sequence_length": 48}
    return Toy(pipe, call, "text_encoder_3", {"prompt_2": None, "prompt_3": None, "max_sequence_length": 48})


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
    pipe = diffusers.ChromaPipeline(_flow(), _vae(1), text_encoder(), tokenizer(), drawn(transformer))
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": 8, "width": 8, "max_sequence_length": 48}
    return Toy(pipe, call, encode={"max_sequence_length": 48})


def _pixart_transformer() -> Any:
    return drawn(
        diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=WIDTH,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
        )
    )


def pixart_alpha() -> Toy:
    pipe = diffusers.PixArtAlphaPipeline(
        tokenizer(), text_encoder(), _vae(), _pixart_transformer(), _schedulers.DDIMScheduler()
    )
    return Toy(pipe, _pixart_call(), encode={"max_sequence_length": 40})


def pixart_sigma() -> Toy:
    pipe = diffusers.PixArtSigmaPipeline(
        tokenizer(), text_encoder(), _vae(), _pixart_transformer(), _schedulers.DDIMScheduler()
    )
    return Toy(pipe, _pixart_call(), encode={"max_sequence_length": 40})


def _pixart_call() -> dict[str, Any]:
    return {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "height": 8,
        "width": 8,
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": 40,
    }


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
        _vae(),
        bert.eval(),
        tokenizer(77),
        drawn(transformer),
        _schedulers.DDPMScheduler(),
        None,
        None,
        requires_safety_checker=False,
        text_encoder_2=text_encoder(T5.model_copy(update={"vocab_size": 120_000})),
        tokenizer_2=tokenizer(256),
    )
    call = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "height": 16,
        "width": 16,
        "use_resolution_binning": False,
    }
    encode = {"text_encoder_index": 1, "device": "cpu", "dtype": torch.float32}
    return Toy(pipe, call, "text_encoder_2", encode)


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


def _video_call(**other: Any) -> dict[str, Any]:
    shape = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 40}
    return {"prompt": PROMPT, "negative_prompt": NEGATIVE, **shape, **other}


def wan() -> Toy:
    transformer = _wan_transformer(diffusers.WanTransformer3DModel)
    pipe = diffusers.WanPipeline(tokenizer(), text_encoder(UMT5), _wan_vae(), _flow(), transformer)
    return Toy(pipe, _video_call(), encode={"max_sequence_length": 40})


def skyreels_v2() -> Toy:
    transformer = _wan_transformer(diffusers.SkyReelsV2Transformer3DModel)
    scheduler = _schedulers.UniPCMultistepScheduler(flow_shift=8.0, use_flow_sigmas=True)
    pipe = diffusers.SkyReelsV2Pipeline(tokenizer(), text_encoder(UMT5), transformer, _wan_vae(), scheduler)
    return Toy(pipe, _video_call(), encode={"max_sequence_length": 40})


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
        "scheduler": _flow(),
        "vae": vae.eval(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "transformer": drawn(transformer),
    }


def ltx_video() -> Toy:
    pipe = diffusers.LTXPipeline(**_ltx_parts())
    return Toy(pipe, _video_call(height=32, width=32, num_frames=9), encode={"max_sequence_length": 40})


def ltx_condition() -> Toy:
    pipe = diffusers.LTXConditionPipeline(**_ltx_parts())
    image = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return Toy(pipe, _video_call(height=32, width=32, num_frames=9, image=image), encode={"max_sequence_length": 40})


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
        _flow(),
        vae.eval(),
        text_encoder(),
        tokenizer(),
        drawn(transformer),
        force_zeros_for_empty_prompt=force_zeros,
    )
    return Toy(pipe, _video_call(num_frames=7), encode={"max_sequence_length": 40})


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
    scheduler = _schedulers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    plain = T5.model_copy(update={"gated": False, "activation": "relu"})
    pipe = diffusers.Cosmos2TextToImagePipeline(
        text_encoder(plain), tokenizer(), drawn(transformer), _wan_vae(), scheduler, _NoGuard()
    )
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": 32, "width": 32, "max_sequence_length": 40}
    return Toy(pipe, call, encode={"max_sequence_length": 40})


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
    pipe = diffusers.AuraFlowPipeline(tokenizer(), text_encoder(UMT5), _vae(), drawn(transformer), _flow())
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": 16, "width": 16, "max_sequence_length": 40}
    return Toy(pipe, call, encode={"max_sequence_length": 40})


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
        tokenizer(), text_encoder(), vae.eval(), drawn(transformer), _schedulers.DDIMScheduler()
    )
    return Toy(pipe, _video_call(num_frames=8), encode={"max_sequence_length": 40})


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
        tokenizer(), text_encoder(), _vae(), drawn(transformer), _schedulers.CogVideoXDDIMScheduler()
    )
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": 16, "width": 16, "max_sequence_length": 40}
    return Toy(pipe, call, encode={"max_sequence_length": 40})


def stable_audio() -> Toy:
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    transformer = diffusers.StableAudioDiTModel(
        sample_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    projection = StableAudioProjectionModel(text_encoder_dim=WIDTH, conditioning_dim=4, min_value=0, max_value=32)
    pipe = diffusers.StableAudioPipeline(
        vae.eval(),
        text_encoder(),
        drawn(projection),
        tokenizer(40),
        drawn(transformer),
        _schedulers.CosineDPMSolverMultistepScheduler(solver_order=2, prediction_type="v_prediction", sigma_data=1.0),
    )
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE}
    return Toy(pipe, call, encode={"device": "cpu", "do_classifier_free_guidance": True})


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
    pipe = diffusers.LattePipeline(tokenizer(), text_encoder(), _vae(), drawn(transformer), _schedulers.DDIMScheduler())
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": 8, "width": 8, "video_length": 1}
    return Toy(pipe, {**call, "clean_caption": False}, encode={})


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
        tokenizer(), text_encoder(), vae.eval(), drawn(transformer), _schedulers.DDIMScheduler()
    )
    call = _video_call(num_frames=8, clean_caption=False)
    return Toy(pipe, call, encode={"max_sequence_length": 40})


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
    pipe = diffusers.BriaPipeline(drawn(transformer), _flow(), _vae(), text_encoder(), tokenizer())
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": 16, "width": 16, "max_sequence_length": 40}
    return Toy(pipe, call, encode={"max_sequence_length": 40})


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
        tokenizer(), text_encoder(), drawn(unet), _schedulers.DDPMScheduler(), movq.eval()
    )
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": 16, "width": 16}
    return Toy(pipe, call, encode={"_cut_context": True})


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
    scheduler = _schedulers.DDPMScheduler(variance_type="learned_range")
    pipe = diffusers.IFPipeline(
        tokenizer(), text_encoder(), drawn(unet), scheduler, None, None, None, requires_safety_checker=False
    )
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": 8, "width": 8, "output_type": "pt"}
    return Toy(pipe, {**call, "clean_caption": False}, encode={})


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
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
        )
    )
    pipe = diffusers.HiDreamImagePipeline(
        _flow(),
        _vae(),
        _clip(True, positions=128),
        tokenizer(77),
        _clip(True, positions=128),
        tokenizer(77),
        text_encoder(),
        tokenizer(),
        llama.eval(),
        tokenizer(),
        drawn(transformer),
    )
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": 16, "width": 16, "max_sequence_length": 40}
    return Toy(pipe, call, "text_encoder_3", {"max_sequence_length": 40})


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
    scheduler = _schedulers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    pipe = diffusers.HeliosPipeline(tokenizer(), text_encoder(UMT5), _wan_vae(), scheduler, drawn(transformer))
    return Toy(pipe, _video_call(num_frames=9), encode={"max_sequence_length": 40})


def longcat_audiodit() -> Toy:
    transformer = diffusers.LongCatAudioDiTTransformer(
        dit_dim=64, dit_depth=2, dit_heads=4, dit_text_dim=WIDTH, latent_dim=8, text_conv=False
    )
    vae = diffusers.LongCatAudioDiTVae(
        in_channels=1,
        channels=16,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=8,
        encoder_latent_dim=16,
        downsampling_ratio=2,
        sample_rate=24000,
    )
    pipe = diffusers.LongCatAudioDiTPipeline(vae.eval(), text_encoder(UMT5), tokenizer(), drawn(transformer))
    call = {"prompt": [PROMPT, "a fox"], "audio_duration_s": 0.1, "guidance_scale": 1.0}
    return Toy(pipe, call, encode={"device": "cpu"})


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
    qwen = transformers.Qwen2_5_VLTextModel(
        transformers.Qwen2_5_VLTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            rope_scaling=_qwen_rope(),
        )
    )
    chat = tokenizer(2048)
    chat.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    pipe = diffusers.HunyuanVideo15Pipeline(
        qwen.eval(),
        chat,
        drawn(transformer),
        vae.eval(),
        _schedulers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder(BYT5),
        ByT5Tokenizer(),
        diffusers.ClassifierFreeGuidance(guidance_scale=1.5),
    )
    call = {"prompt": 'a sign says "HELLO"', "height": 16, "width": 16, "num_frames": 9}
    return Toy(pipe, call, "text_encoder_2", {})


def _qwen_rope() -> dict[str, Any]:
    return {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}


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
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "rope_scaling": _qwen_rope()}
    text = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, **heads}
    torch.manual_seed(0)
    qwen = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config={"depth": 1, "out_hidden_size": 16, **sizes})
    )
    pipe = diffusers.HunyuanImagePipeline(
        _flow(),
        vae.eval(),
        qwen.eval(),
        tokenizer(2048),
        text_encoder(BYT5),
        ByT5Tokenizer(),
        drawn(transformer),
        diffusers.ClassifierFreeGuidance(guidance_scale=1.5),
        diffusers.ClassifierFreeGuidance(guidance_scale=1.5),
    )
    return Toy(pipe, {"prompt": 'a sign says "HELLO"', "height": 16, "width": 16}, "text_encoder_2", {})


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
        ByT5Tokenizer(), None, text_encoder(BYT5), None, vae.eval(), drawn(transformer), _flow()
    )
    call = {
        "prompt": "says 'HELLO' and \"a\" and 'fox'",
        "height": 32,
        "width": 32,
        "prior_token_ids": torch.arange(4)[None],
        "max_sequence_length": 64,
    }
    return Toy(pipe, call, encode={"max_sequence_length": 64})


def _t5_tokenizer(limit: int) -> Any:
    """The same as an object of T5's own class, which AudioLDM 2 looks for."""
    with TemporaryDirectory() as folder:
        tokenizer(limit).save_pretrained(folder)
        return transformers.T5Tokenizer.from_pretrained(folder, model_max_length=limit)


def audioldm2() -> Toy:
    from diffusers.pipelines.audioldm2 import AudioLDM2ProjectionModel

    unet = diffusers.AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, 16, WIDTH), (None, 16, WIDTH)),
    )
    vae = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
    )
    small = {"intermediate_size": 16, "num_hidden_layers": 1, "projection_dim": 8}
    text = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_attention_heads": 1, "pad_token_id": 1, **small}
    patches = {"patch_size": 2, "patch_stride": 2, "patch_embed_input_channels": 4, "num_mel_bins": 8, "spec_size": 8}
    audio = {"hidden_size": 192, "window_size": 4, "depths": [1, 1], "num_attention_heads": [1, 1], **patches, **small}
    torch.manual_seed(0)
    clap = transformers.ClapModel(transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=16))
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_head=1, n_layer=1, vocab_size=100, n_positions=99)
    )
    gpt.config.max_new_tokens = 8
    vocoder = transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=8,
            upsample_initial_channel=16,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3, 7],
            resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
            normalize_before=False,
        )
    )
    projection = AudioLDM2ProjectionModel(text_encoder_dim=16, text_encoder_1_dim=WIDTH, langauge_model_dim=16)
    pipe = diffusers.AudioLDM2Pipeline(
        vae.eval(),
        clap.eval(),
        text_encoder(),
        drawn(projection),
        gpt.eval(),
        _t5_tokenizer(77),
        _t5_tokenizer(77),
        transformers.ClapFeatureExtractor(),
        drawn(unet),
        _schedulers.DDIMScheduler(),
        vocoder.eval(),
    )
    call = {"prompt": [PROMPT, "a fox"], "negative_prompt": [NEGATIVE] * 2, "audio_length_in_s": 0.1}
    encode = {"device": "cpu", "num_waveforms_per_prompt": 1, "do_classifier_free_guidance": True}
    return Toy(pipe, call, "text_encoder_2", encode)


TOYS: dict[str, Callable[[], Toy]] = {
    "flux": flux,
    "sd3": sd3,
    "cogvideox": cogvideox,
    "cogview3plus": cogview3plus,
    "ltx-video": ltx_video,
    "hidream": hidream,
    "deepfloyd-if": deepfloyd_if,
    "chroma": chroma,
    "hunyuandit": hunyuandit,
    "pixart-alpha": pixart_alpha,
    "pixart-sigma": pixart_sigma,
    "allegro": allegro,
    "latte": latte,
    "ltx-condition": ltx_condition,
    "mochi": mochi,
    "cosmos": cosmos2,
    "auraflow": auraflow,
    "wan": wan,
    "skyreels-v2": skyreels_v2,
    "helios": helios,
    "bria": bria,
    "kandinsky3": kandinsky3,
    "stable-audio": stable_audio,
    "longcat-audiodit": longcat_audiodit,
    "audioldm2": audioldm2,
    "hunyuanimage": hunyuanimage,
    "hunyuanvideo-1.5": hunyuanvideo_1_5,
    "glm-image": glm_image,
}
