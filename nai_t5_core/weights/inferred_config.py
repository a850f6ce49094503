"""The config of a T5 from the shapes of its tensors, for files that come without a config.json."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from nai_t5_core.facts.config import Shape, T5Config

# What a header may tell and shapes tell as well.
_SIZES = ("num_layers", "num_decoder_layers", "d_model", "d_ff", "num_heads", "d_kv", "relative_attention_num_buckets")
_LAYER_DIGITS = 6
_TOKENS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")


def infer_config(shapes: Mapping[str, Shape]) -> T5Config:
    """Reads every size that tensors can tell from their shapes; the rest gets the defaults of the published models.

    ``shapes`` maps Hugging Face names to shapes, such as ``{"shared.weight": (32128, 4096), ...}``.

    Raises:
        ValueError: a tensor that sizes are read from is absent or has the wrong number of dimensions.
    """
    first = "encoder.block.0.layer"
    attention = f"{first}.0.SelfAttention"
    gated = f"{first}.1.DenseReluDense.wi_0.weight" in shapes
    vocab_size, d_model = _two_dims(shapes, "shared.weight")
    inner_dim, _ = _two_dims(shapes, f"{attention}.q.weight")
    buckets, num_heads = _two_dims(shapes, f"{attention}.relative_attention_bias.weight")
    _, d_ff = _two_dims(shapes, f"{first}.1.DenseReluDense.wo.weight")
    if num_heads == 0 or inner_dim % num_heads:
        raise ValueError(
            f"{attention}.q.weight has {inner_dim} rows, which {num_heads} heads (columns of "
            "relative_attention_bias) do not divide; the file is damaged or no T5"
        )
    bias_per_layer = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in shapes
    is_pile_t5 = bias_per_layer and vocab_size < 100_000
    return T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=inner_dim // num_heads,
        d_ff=d_ff,
        num_heads=num_heads,
        num_layers=_depth(shapes, "encoder"),
        num_decoder_layers=_depth(shapes, "decoder"),
        gated=gated,
        activation="gelu_new" if gated else "relu",
        bias_per_layer=bias_per_layer,
        relative_attention_num_buckets=buckets,
        # v1.0 is the only kind without a gate, and ties its embeddings.
        tie_word_embeddings=not gated,
        # Pile-T5 was trained with the Llama vocabulary, whose pad and end tokens are others than T5's.
        pad_token_id=1 if is_pile_t5 else 0,
        eos_token_id=2 if is_pile_t5 else 1,
    )


def with_told(config: T5Config, told: Mapping[str, float]) -> T5Config:
    """The config of the tensors with what a header tells beside them, by the fields of a T5Config.

    Raises:
        ValueError: the header has other sizes than the tensors, or a value that no T5 has.
    """
    sizes = {name: value for name, value in told.items() if name in _SIZES}
    if config.num_decoder_layers == 0:  # the encoder alone, of a file that tells of the whole model
        sizes.pop("num_decoder_layers", None)
    found = {name: getattr(config, name) for name in sizes}
    wrong = [f"{name}={sizes[name]} and its tensors {found[name]}" for name in sizes if sizes[name] != found[name]]
    if wrong:
        raise ValueError(f"its metadata say {', '.join(wrong)}; the file is damaged or incomplete, fetch it again")
    # An id beyond the vocabulary means that there is no such token.
    others = {name: value for name, value in told.items() if name not in _SIZES}
    others = {name: value for name, value in others.items() if name not in _TOKENS or 0 <= value < config.vocab_size}
    return T5Config(**{**config.model_dump(), **others})


def _two_dims(shapes: Mapping[str, Shape], name: str) -> Shape:
    shape = shapes.get(name)
    if shape is None:
        raise ValueError(f"{name} is absent, so the sizes of the model cannot be read from the tensors")
    if len(shape) != 2:
        raise ValueError(f"{name} has shape {list(shape)}; two dimensions are needed")
    return shape


def _depth(names: Collection[str], stack: str) -> int:
    """How many layers a stack has. No number is believed that exceeds that of the tensors: a layer has eight."""
    pattern = re.compile(rf"{stack}\.block\.0*(\d+)\.")
    layers = {match[1] for name in names if (match := pattern.match(name))}
    beyond = next((layer for layer in layers if len(layer) > _LAYER_DIGITS or int(layer) >= len(names)), None)
    if beyond is not None:
        raise ValueError(
            f"it has a tensor of {stack}.block.{beyond[:20]} among its {len(names):,}, which are too few for that many "
            "layers; the file is damaged or incomplete, fetch it again"
        )
    return max((int(layer) + 1 for layer in layers), default=0)
