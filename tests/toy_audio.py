"""Tiny pipelines that make sound."""

from __future__ import annotations

import diffusers
import torch
import transformers
from diffusers import schedulers
from toy_parts import (
    NEGATIVE,
    PROMPT,
    UMT5,
    VOCABULARY,
    WEAK_GUIDANCE,
    WIDTH,
    Toy,
    drawn,
    t5_tokenizer,
    text_encoder,
    tokenizer,
)


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
        schedulers.CosineDPMSolverMultistepScheduler(solver_order=2, prediction_type="v_prediction", sigma_data=1.0),
    )
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE}
    return Toy(pipe, call, beyond={"device": "cpu", "do_classifier_free_guidance": True})


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
        t5_tokenizer(77),
        t5_tokenizer(77),
        transformers.ClapFeatureExtractor(),
        drawn(unet),
        schedulers.DDIMScheduler(),
        vocoder.eval(),
    )
    call = {"prompt": [PROMPT, "a fox"], "negative_prompt": [NEGATIVE] * 2, "audio_length_in_s": 0.1, **WEAK_GUIDANCE}
    encode = {"device": "cpu", "num_waveforms_per_prompt": 1, "do_classifier_free_guidance": True}
    return Toy(pipe, call, "text_encoder_2", encode)


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
    return Toy(pipe, call, beyond={"device": "cpu"})
