"""The T5 text encoder for image and video diffusion models: faster, more exact and easier.

Everything a user needs is here; all else in the package may change. Names are imported when they are first used, so
that ``import nai_t5_core`` costs nothing and needs no torch.

Errors are one family, whatever a file or an argument holds: a ValueError says what was given, what is allowed and what
to do (:class:`CheckpointError`, of a file of weights, is one), and an OSError that a file cannot be read or written. A
damaged file takes neither seconds nor memory beyond its own size. Beside these there are what the machine lacks (a
compiler, CUDA, a package that is not installed), what torch raises where memory ends, and Python's own TypeError where
an object of a wholly other type is given, such as a number for a list of prompts.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# For type checkers, what _HOME says to Python.
if TYPE_CHECKING:
    from nai_t5_core.backends.choose import prepack as prepack
    from nai_t5_core.backends.choose import quantize_int8 as quantize_int8
    from nai_t5_core.backends.compiled import compile_stack as compile_stack
    from nai_t5_core.backends.compiled import compile_steps as compile_steps
    from nai_t5_core.backends.compiled import warm_up as warm_up
    from nai_t5_core.backends.sharding import shard as shard
    from nai_t5_core.datasets.reading import EmbeddingDataset as EmbeddingDataset
    from nai_t5_core.facts.config import T5Config as T5Config
    from nai_t5_core.facts.config import named_config as named_config
    from nai_t5_core.facts.families import Family as Family
    from nai_t5_core.facts.families import family as family
    from nai_t5_core.facts.families import family_names as family_names
    from nai_t5_core.float16.generation_guard import generate_guarded as generate_guarded
    from nai_t5_core.generation.options import GenerationOptions as GenerationOptions
    from nai_t5_core.generation.t5 import T5 as T5
    from nai_t5_core.lora.files import Lora as Lora
    from nai_t5_core.lora.files import read_lora as read_lora
    from nai_t5_core.lora.live import LiveLoras as LiveLoras
    from nai_t5_core.lora.loras import Loras as Loras
    from nai_t5_core.model.encoder import T5EncoderStack as T5EncoderStack
    from nai_t5_core.prompts.cache.store import Store as Store
    from nai_t5_core.prompts.text_encoder import PromptEmbeddings as PromptEmbeddings
    from nai_t5_core.prompts.text_encoder import TextEncoder as TextEncoder
    from nai_t5_core.prompts.textual_inversion import add_embeddings as add_embeddings
    from nai_t5_core.tokenizer import Tokenizer as Tokenizer
    from nai_t5_core.tokenizer import load_tokenizer as load_tokenizer
    from nai_t5_core.weights.convert import convert as convert
    from nai_t5_core.weights.formats import CheckpointError as CheckpointError
    from nai_t5_core.weights.load import load_encoder as load_encoder
    from nai_t5_core.weights.load import load_t5 as load_t5

_HOME = {
    "CheckpointError": "weights.formats",
    "EmbeddingDataset": "datasets.reading",
    "Family": "facts.families",
    "GenerationOptions": "generation.options",
    "LiveLoras": "lora.live",
    "Lora": "lora.files",
    "Loras": "lora.loras",
    "PromptEmbeddings": "prompts.text_encoder",
    "Store": "prompts.cache.store",
    "T5": "generation.t5",
    "T5Config": "facts.config",
    "T5EncoderStack": "model.encoder",
    "TextEncoder": "prompts.text_encoder",
    "Tokenizer": "tokenizer",
    "add_embeddings": "prompts.textual_inversion",
    "compile_stack": "backends.compiled",
    "compile_steps": "backends.compiled",
    "convert": "weights.convert",
    "family": "facts.families",
    "family_names": "facts.families",
    "generate_guarded": "float16.generation_guard",
    "load_encoder": "weights.load",
    "load_t5": "weights.load",
    "load_tokenizer": "tokenizer",
    "named_config": "facts.config",
    "prepack": "backends.choose",
    "quantize_int8": "backends.choose",
    "read_lora": "lora.files",
    "shard": "backends.sharding",
    "warm_up": "backends.compiled",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
