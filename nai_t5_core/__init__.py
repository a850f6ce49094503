"""The T5 text encoder for image and video diffusion models: faster, more exact and easier.

Everything a user needs is here; all else in the package may change. Names are imported when they are first used, so
that ``import nai_t5_core`` costs nothing and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nai_t5_core.config import T5Config, named_config
    from nai_t5_core.conversion import convert
    from nai_t5_core.encoder import T5EncoderStack
    from nai_t5_core.families import Family, family, family_names
    from nai_t5_core.formats import CheckpointError
    from nai_t5_core.generation_options import GenerationOptions
    from nai_t5_core.load import load_encoder, load_t5
    from nai_t5_core.lora import Loras
    from nai_t5_core.lora_files import Lora, read_lora
    from nai_t5_core.lora_live import LiveLoras
    from nai_t5_core.optimize import prepack
    from nai_t5_core.t5 import T5
    from nai_t5_core.text_encoder import PromptEmbeddings, TextEncoder
    from nai_t5_core.textual_inversion import add_embeddings
    from nai_t5_core.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "T5",
    "CheckpointError",
    "Family",
    "GenerationOptions",
    "LiveLoras",
    "Lora",
    "Loras",
    "PromptEmbeddings",
    "T5Config",
    "T5EncoderStack",
    "TextEncoder",
    "Tokenizer",
    "add_embeddings",
    "convert",
    "family",
    "family_names",
    "load_encoder",
    "load_t5",
    "load_tokenizer",
    "named_config",
    "prepack",
    "read_lora",
]

_HOME = {
    "CheckpointError": "formats",
    "Family": "families",
    "GenerationOptions": "generation_options",
    "LiveLoras": "lora_live",
    "Lora": "lora_files",
    "Loras": "lora",
    "PromptEmbeddings": "text_encoder",
    "T5": "t5",
    "T5Config": "config",
    "T5EncoderStack": "encoder",
    "TextEncoder": "text_encoder",
    "Tokenizer": "tokenizer",
    "add_embeddings": "textual_inversion",
    "convert": "conversion",
    "family": "families",
    "family_names": "families",
    "load_encoder": "load",
    "load_t5": "load",
    "load_tokenizer": "tokenizer",
    "named_config": "config",
    "prepack": "optimize",
    "read_lora": "lora_files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
