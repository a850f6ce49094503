"""Weights of a loaded model that transformers or diffusers keep in the blocks of a GGUF file."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nai_t5_core.backends.quantised.blocks import BlockKind
from nai_t5_core.backends.quantised.ggml import GGML_KINDS

# The modules that hold blocks as bytes [rows, bytes of a row], by their class and the package that it is of.
_OF_TRANSFORMERS = ("transformers", ("GgufLinear", "GgufEmbedding"))
_OF_DIFFUSERS = ("diffusers", ("GGUFLinear",))


def holds_blocks(module: nn.Module) -> bool:
    """Whether a module's weight is in blocks of a kind that is described here."""
    return block_kind(module) is not None


def block_kind(module: nn.Module) -> BlockKind | None:
    """The kind of a module's blocks; None where its weight is in none, or in some of another kind."""
    found: Any = module
    package, name = type(module).__module__.partition(".")[0], type(module).__name__
    if package == _OF_TRANSFORMERS[0] and name in _OF_TRANSFORMERS[1]:
        number = None if getattr(found, "input_permutation", None) is not None else found.ggml_type
    elif package == _OF_DIFFUSERS[0] and name in _OF_DIFFUSERS[1]:
        number = getattr(found.weight, "quant_type", None)
    else:
        return None
    return GGML_KINDS.get(_name(number))


def _name(number: Any) -> str:
    from gguf import GGMLQuantizationType  # these models cannot be loaded without it

    try:
        return str(GGMLQuantizationType(int(number)).name)
    except (TypeError, ValueError):
        return ""


def shape_of(weight: Tensor, kind: BlockKind) -> tuple[int, int]:
    """Rows and columns of the numbers in blocks [rows, bytes of a row]."""
    rows, width = weight.shape
    return rows, width // kind.size * kind.block
