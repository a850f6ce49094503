"""What tiny pipelines are made of: a T5 with outputs of order one, a tokenizer, redrawn denoisers, and the like."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
import transformers
from checkpoints import spiece_model
from conftest import random_state
from diffusers import schedulers
from torch import nn

from nai_t5_core.facts.config import T5Config, config_to_hf
from nai_t5_core.tokenizer import sentencepiece_to_tokenizer_json

WIDTH = 32  # of the text embeddings
VOCABULARY = 4096  # of the tokenizer in the embedded model
T5 = T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_heads=4, num_layers=2)
UMT5 = T5.model_copy(update={"bias_per_layer": True})
BYT5 = T5.model_copy(update={"vocab_size": 384})

# For toys that multiply the rounding of an embedding by hundreds with the guidance that is their default.
WEAK_GUIDANCE = {"guidance_scale": 1.5}

PROMPT, NEGATIVE, QUOTE = "a red fox on a green hill", "blurred", 'a sign says "HELLO"'


def square(size: int, **other: Any) -> dict[str, Any]:
    """A call for an image of so many pixels each way."""
    return {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": size, "width": size, **other}


def short_square(size: int, **other: Any) -> dict[str, Any]:
    """The same with fewer tokens than the pipeline takes by default."""
    return square(size, max_sequence_length=40, **other)


@dataclass
class Toy:
    """A pipeline, what to call it with, and where its T5 is."""

    pipe: Any
    call: dict[str, Any]
    component: str = "text_encoder"
    beyond: dict[str, Any] = field(default_factory=dict)
    """What `encode_prompt` must be told beyond the prompts and what the call is told."""
    prompt_name: str = "prompt"

    def run(self, **other: Any) -> torch.Tensor:
        """The latents (or samples) of a run of two steps."""
        settings = {"num_inference_steps": 2, "output_type": "latent", "return_dict": False} | self.call | other
        if "prompt" in settings:
            settings[self.prompt_name] = settings.pop("prompt")
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

    @property
    def encode(self) -> dict[str, Any]:
        """What `encode_prompt` is told beside the prompts."""
        taken = inspect.signature(self.pipe.encode_prompt).parameters
        shared = {name: self.call[name] for name in ("max_sequence_length", "clean_caption") if name in self.call}
        return {name: value for name, value in shared.items() if name in taken} | self.beyond

    def encode_arguments(self, prompt: str | list[str], **other: Any) -> dict[str, Any]:
        """What `encode_prompt` takes for these prompts, negative ones among it if it takes them."""
        count = 1 if isinstance(prompt, str) else len(prompt)
        derived = {"negative_prompt": NEGATIVE if isinstance(prompt, str) else [NEGATIVE] * count, "batch_size": count}
        taken = inspect.signature(self.pipe.encode_prompt).parameters
        arguments = {name: value for name, value in derived.items() if name in taken} | {"prompt": prompt}
        for name, value in (self.encode | other).items():
            is_text = name.endswith("_prompt") and isinstance(value, str)
            arguments[name] = [value] * count if is_text and isinstance(prompt, list) else value
        return arguments

    @torch.no_grad()
    def encode_prompt(self, prompt: str | list[str], **other: Any) -> list[Any]:
        """All that the pipeline's own `encode_prompt` gives, in order."""
        arguments = self.encode_arguments(prompt, **other)
        given = self.pipe.encode_prompt(**{self.prompt_name: arguments.pop("prompt")}, **arguments)
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
    return transformers.PreTrainedTokenizerFast(
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


def t5_tokenizer(limit: int) -> Any:
    """The same as an object of T5's own class, which AudioLDM 2 looks for."""
    with TemporaryDirectory() as folder:
        tokenizer(limit).save_pretrained(folder)
        return transformers.T5Tokenizer.from_pretrained(folder, model_max_length=limit)


def tiny_vae(channels: int = 4) -> Any:
    sizes = {"block_out_channels": (4,), "latent_channels": channels, "norm_num_groups": 1}
    return diffusers.AutoencoderKL(**sizes, shift_factor=0.1).eval()


def wan_vae() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def clip(with_projection: bool, positions: int = 77) -> Any:
    config = transformers.CLIPTextConfig(
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


def llama() -> Any:
    """HiDream's fourth text encoder."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def flow() -> Any:
    return schedulers.FlowMatchEulerDiscreteScheduler()


def qwen_sizes() -> dict[str, Any]:
    """Of the first text encoder of Hunyuan's newer pipelines."""
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "rope_scaling": rope}
    return {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, **heads}
