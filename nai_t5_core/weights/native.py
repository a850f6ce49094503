"""Our own checkpoint: one safetensors file with fused tensors, config and tokenizer. Loading it is a map and an assign.

Header metadata: ``format`` = "nai-t5", ``format_version``, ``config`` (JSON), ``source`` (its name) and
``source_sha256`` (of the originals' names, dtypes, shapes and bytes), and ``encoder_scales``, ``decoder_scales`` (JSON)
where the weights are scaled. The tokenizer is a uint8 tensor.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import PurePath
from typing import Literal

from pydantic import ValidationError

from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import StackScales
from nai_t5_core.tokenizer import TOKENIZER_TENSORS
from nai_t5_core.weights.formats import Checkpoint, CheckpointError
from nai_t5_core.weights.fuse import Recipe
from nai_t5_core.weights.keymaps import KeyMap

FORMAT = "nai-t5"
# A file whose original tensors are quantised, see :mod:`nai_t5_core.weights.convert_quantised`.
QUANTISED_FORMAT = "nai-t5 quantised"
FORMAT_VERSION = 1


def is_native(checkpoint: Checkpoint) -> bool:
    return checkpoint.metadata.get("format") == FORMAT


def is_quantised(checkpoint: Checkpoint) -> bool:
    return checkpoint.metadata.get("format") == QUANTISED_FORMAT


def read_config(checkpoint: Checkpoint) -> T5Config:
    """The config in the header.

    Raises:
        CheckpointError: the file was written by a newer version, or its header is damaged.
    """
    version = checkpoint.metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{checkpoint.source} has format version {version or 'none'}, this program reads {FORMAT_VERSION}; "
            "update the program or convert the original again"
        )
    try:
        return T5Config.model_validate_json(checkpoint.metadata.get("config", ""))
    except ValidationError as error:
        raise CheckpointError(f"{checkpoint.source} has a damaged header: {error.errors()[0]['msg']}") from error


def keymap(checkpoint: Checkpoint, expected: Collection[str]) -> KeyMap:
    """Every tensor under its own name."""
    tokenizer = next((name for name in TOKENIZER_TENSORS if name in checkpoint.tensors), None)
    names = {name: name for name in checkpoint.tensors if name not in TOKENIZER_TENSORS}
    return KeyMap(
        names=names,
        ignored={} if tokenizer is None else {tokenizer: "a tokenizer"},
        unknown=[name for name in names if name not in expected],
        tokenizer=tokenizer,
    )


def read_scales(checkpoint: Checkpoint, stack: Literal["encoder", "decoder"] = "encoder") -> StackScales | None:
    """The scales that a stack's weights hold; None where nothing is scaled.

    Raises:
        CheckpointError: the header is damaged.
    """
    text = checkpoint.metadata.get(f"{stack}_scales")
    try:
        return None if text is None else StackScales.from_json(text)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.source} has a damaged header: {error}") from error


def header(
    config: T5Config,
    source: str,
    source_sha256: str,
    scales: StackScales | None,
    decoder_scales: StackScales | None = None,
) -> dict[str, str]:
    """The metadata that this module and ``inspect`` read."""
    return {
        **({"encoder_scales": scales.to_json()} if scales else {}),
        **({"decoder_scales": decoder_scales.to_json()} if decoder_scales else {}),
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(config.model_dump(exclude_none=True)),
        # Not the whole path: such files are passed on, and the folders of a machine are nobody's business.
        "source": PurePath(source).name,
        "source_sha256": source_sha256,
    }


def quantised_header(config: T5Config, source: str, source_sha256: str) -> dict[str, str]:
    """The metadata of a file whose original tensors are quantised."""
    return {**header(config, source, source_sha256, None), "format": QUANTISED_FORMAT}


def stored(recipes: list[Recipe]) -> list[Recipe]:
    """Recipes for tensors that are fused already: each is read as it is."""
    return [Recipe(recipe.target, (recipe.target,), recipe.shape, in_float32=recipe.in_float32) for recipe in recipes]
