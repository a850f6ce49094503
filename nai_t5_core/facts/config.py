"""The config of a T5: sizes, kind of feed-forward, and which layers have a relative position bias of their own.

Imports no torch, so that a command's help, a token count or a listing answers at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nai_t5_core.facts.nested_text import shown

Activation = Literal["relu", "gelu_new", "gelu", "silu"]
Shape = tuple[int, ...]

# Hugging Face spells one activation in several ways; all of the left column are the tanh form of GELU.
_ACTIVATION_NAMES: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "silu": "silu",
    "swish": "silu",
}
# Vocabulary sizes: ByT5's, the largest taken for a ByT5 with added tokens, and that of the smallest T5 of word pieces.
_BYT5_TOKENS, _MOST_BYT5_TOKENS, _PIECES = 384, 2_048, 32_000
# Tables and names are made for so many before they are held against what is in a file. The largest T5 has 36 layers and
# a distance of 128.
MOST_LAYERS, MOST_DISTANCE = 1_000, 1_000_000
_MODEL_TYPES = ("t5", "mt5", "umt5")


class T5Config(BaseModel):
    """Sizes and kind of one T5. Frozen; field names are those of Hugging Face's ``config.json`` where it has one.

    ``num_decoder_layers = 0`` means that there is no decoder. ``bias_per_layer`` is UMT5's and Pile-T5's layout: every
    layer has its own relative position bias, while T5 shares that of the first layer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    vocab_size: int = Field(gt=0)
    d_model: int = Field(gt=0)
    d_kv: int = Field(gt=0)
    d_ff: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_layers: int = Field(gt=0, le=MOST_LAYERS)
    num_decoder_layers: int = Field(default=0, ge=0, le=MOST_LAYERS)

    gated: bool = True
    activation: Activation = "gelu_new"
    bias_per_layer: bool = False
    relative_attention_num_buckets: int = Field(default=32, gt=0)
    relative_attention_max_distance: int = Field(default=128, gt=0, le=MOST_DISTANCE)
    layer_norm_epsilon: float = Field(default=1e-6, gt=0)
    # Whether q·k is divided by √d_kv. The published models were trained without; for training from scratch.
    scale_qk: bool = False
    tie_word_embeddings: bool = False
    # Whether hidden states are divided by √d_model before the output head; None: if the head is tied.
    scale_decoder_outputs: bool | None = None
    dropout_rate: float = Field(default=0.1, ge=0, lt=1)

    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    @model_validator(mode="after")
    def _check_buckets(self) -> T5Config:
        # Each direction has half of the buckets, of which again half are for single distances.
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets % 4 or distance <= buckets // 4:
            raise ValueError(
                f"relative_attention_num_buckets={buckets} and relative_attention_max_distance={distance} do not fit: "
                "the number of buckets must be a multiple of 4 and the distance above a quarter of it"
            )
        return self

    @property
    def inner_dim(self) -> int:
        """Width of q, of k and of v, over all heads."""
        return self.num_heads * self.d_kv

    @property
    def kind(self) -> str:
        """The common name of this kind of T5, such as ``"T5 v1.1"``."""
        if self._reads_bytes:
            return "ByT5"
        if self.bias_per_layer:
            return "UMT5" if self.vocab_size > 100_000 else "Pile-T5"
        if not self.gated:
            return "T5 v1.0"
        return "mT5" if self.vocab_size > 100_000 else "T5 v1.1"

    @property
    def _reads_bytes(self) -> bool:
        # 256 bytes, 3 special tokens and 125 sentinels; added tokens, such as for colours and fonts, may follow.
        # Vocabularies of word pieces are larger, but a published size is recognised with any number of tokens.
        if not self.gated or self.bias_per_layer or self.vocab_size < _BYT5_TOKENS:
            return False
        sizes = (self.d_model, self.d_kv, self.d_ff, self.num_heads, self.num_layers)
        if any(sizes == published[:5] for published in _SIZES_BYT5.values()):
            return self.vocab_size < _PIECES
        is_published = any(sizes == published[:5] for published in _SIZES_GATED.values())
        return self.vocab_size == _BYT5_TOKENS or (self.vocab_size < _MOST_BYT5_TOKENS and not is_published)

    @property
    def size_name(self) -> str | None:
        """Name of the published size with these dimensions, or None."""
        dims = _dimensions(self)
        return next((name for name, config in NAMED_CONFIGS.items() if _dimensions(config) == dims), None)

    @property
    def can_scale_hidden(self) -> bool:
        """Whether the feed-forward's output is proportional to a factor on its (up) in-projection."""
        return self.gated or self.activation == "relu"

    @property
    def head_scale(self) -> float:
        """What the decoder's hidden states are multiplied by before the output head."""
        is_scaled = self.tie_word_embeddings if self.scale_decoder_outputs is None else self.scale_decoder_outputs
        return float(self.d_model**-0.5) if is_scaled else 1.0

    def encoder_only(self) -> T5Config:
        return self.model_copy(update={"num_decoder_layers": 0})

    def with_layers(self, layers: int | None) -> T5Config:
        """With fewer layers, in the decoder as well if it has more; None leaves all.

        Raises:
            ValueError: fewer than one, or more than there are.
        """
        if layers is None:
            return self
        if not 1 <= layers <= self.num_layers:
            raise ValueError(f"layers={layers}; allowed: from 1 to the {self.num_layers} that this size has")
        return self.model_copy(
            update={"num_layers": layers, "num_decoder_layers": min(layers, self.num_decoder_layers)}
        )


def _dimensions(config: T5Config) -> tuple[int | bool, ...]:
    return (
        config.d_model,
        config.d_kv,
        config.d_ff,
        config.num_heads,
        config.num_layers,
        config.gated,
        config.bias_per_layer,
        config.vocab_size > 100_000,
        config.kind == "ByT5",
    )


# d_model, d_kv, d_ff, heads, encoder layers, decoder layers
_SIZES_V1_0 = {
    "t5-small": (512, 64, 2048, 8, 6, 6),
    "t5-base": (768, 64, 3072, 12, 12, 12),
    "t5-large": (1024, 64, 4096, 16, 24, 24),
    "t5-3b": (1024, 128, 16384, 32, 24, 24),
    "t5-11b": (1024, 128, 65536, 128, 24, 24),
}
_SIZES_GATED = {
    "small": (512, 64, 1024, 6, 8, 8),
    "base": (768, 64, 2048, 12, 12, 12),
    "large": (1024, 64, 2816, 16, 24, 24),
    "xl": (2048, 64, 5120, 32, 24, 24),
    "xxl": (4096, 64, 10240, 64, 24, 24),
}
_SIZES_BYT5 = {
    "small": (1472, 64, 3584, 6, 12, 4),
    "base": (1536, 64, 3968, 12, 18, 6),
    "large": (1536, 64, 3840, 16, 36, 12),
    "xl": (2560, 64, 6720, 32, 36, 12),
    "xxl": (4672, 64, 12352, 64, 36, 12),
}


def _sized(dims: tuple[int, int, int, int, int, int], vocab_size: int, **kind: Any) -> T5Config:
    d_model, d_kv, d_ff, heads, layers, decoder_layers = dims
    return T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=d_kv,
        d_ff=d_ff,
        num_heads=heads,
        num_layers=layers,
        num_decoder_layers=decoder_layers,
        **kind,
    )


NAMED_CONFIGS: dict[str, T5Config] = {
    **{
        name: _sized(dims, 32128, gated=False, activation="relu", tie_word_embeddings=True)
        for name, dims in _SIZES_V1_0.items()
    },
    **{f"t5-v1_1-{size}": _sized(dims, 32128) for size, dims in _SIZES_GATED.items()},
    **{f"flan-t5-{size}": _sized(dims, 32128) for size, dims in _SIZES_GATED.items()},
    **{f"mt5-{size}": _sized(dims, 250112) for size, dims in _SIZES_GATED.items()},
    **{f"umt5-{size}": _sized(dims, 256384, bias_per_layer=True) for size, dims in _SIZES_GATED.items()},
    **{f"byt5-{size}": _sized(dims, 384) for size, dims in _SIZES_BYT5.items()},
    **{
        f"pile-t5-{size}": _sized(dims, 32128, bias_per_layer=True, pad_token_id=1, eos_token_id=2)
        for size, dims in _SIZES_GATED.items()
        if size != "small"
    },
    "flan-ul2": _sized((4096, 256, 16384, 16, 32, 32), 32128, activation="silu"),
}


def named_config(name: str) -> T5Config:
    """The config of a published size, such as ``"t5-v1_1-xxl"``.

    Raises:
        ValueError: the name is unknown; the message lists the known ones and the closest.
    """
    if name in NAMED_CONFIGS:
        return NAMED_CONFIGS[name]
    close = difflib.get_close_matches(name, NAMED_CONFIGS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"unknown model size {name!r}; {hint}known: {', '.join(NAMED_CONFIGS)}")


def config_from_hf(hf: Mapping[str, Any]) -> T5Config:
    """Reads the dictionary of a Hugging Face ``config.json`` of a T5, mT5, UMT5 (Pile-T5) or ByT5.

    Raises:
        ValueError: the file describes something else, lacks a size, or holds a value out of range.
    """
    model_type = hf.get("model_type", "t5")
    if model_type not in _MODEL_TYPES:
        raise ValueError(
            f"config.json has model_type={shown(model_type)}, which is no T5 (allowed: {', '.join(_MODEL_TYPES)}); "
            "give the folder or file of the T5 text encoder"
        )
    sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers")
    absent = [name for name in sizes if name not in hf]
    if absent:
        raise ValueError(f"config.json lacks {', '.join(absent)}; it is not a complete T5 config")
    gated, activation = _feed_forward_kind(str(hf.get("feed_forward_proj", "relu")))
    optional = (
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
        "layer_norm_epsilon",
        "scale_qk",
        "dropout_rate",
        "pad_token_id",
        "eos_token_id",
        "decoder_start_token_id",
    )
    decoder_layers = hf.get("num_decoder_layers")
    decoder_layers = hf["num_layers"] if decoder_layers is None else decoder_layers
    is_encoder_only = hf.get("architectures") in (["T5EncoderModel"], ["MT5EncoderModel"], ["UMT5EncoderModel"])
    try:
        return T5Config(
            **{name: hf[name] for name in sizes},
            **{name: hf[name] for name in optional if hf.get(name) is not None},
            num_decoder_layers=0 if is_encoder_only else decoder_layers,
            # Tied is transformers' default, on which the files of v1.0 rely.
            tie_word_embeddings=hf.get("tie_word_embeddings", True),
            scale_decoder_outputs=_scales_outputs(hf),
            gated=gated,
            activation=activation,
            bias_per_layer=model_type == "umt5",
        )
    except ValidationError as error:
        raise ValueError(f"config.json is not usable: {_one_line(error)}") from error


def config_to_hf(config: T5Config) -> dict[str, Any]:
    """The inverse of :func:`config_from_hf`: a ``config.json`` dictionary that transformers reads."""
    if config.bias_per_layer:
        model_type, class_name = "umt5", "UMT5"
    elif config.kind == "mT5":
        model_type, class_name = "mt5", "MT5"
    else:
        model_type, class_name = "t5", "T5"
    architecture = "ForConditionalGeneration" if config.num_decoder_layers else "EncoderModel"
    if config.gated and config.activation == "gelu":
        raise ValueError("config.json has no name for a gate with exact GELU: 'gated-gelu' means the tanh form")
    values = config.model_dump(
        exclude={"gated", "activation", "bias_per_layer", "num_decoder_layers", "scale_qk"}, exclude_none=True
    )
    activation = "gelu" if config.gated and config.activation == "gelu_new" else config.activation
    return {
        **values,
        "model_type": model_type,
        "architectures": [class_name + architecture],
        "feed_forward_proj": f"gated-{activation}" if config.gated else activation,
        "num_decoder_layers": config.num_decoder_layers or config.num_layers,
        "is_encoder_decoder": bool(config.num_decoder_layers),
        "use_cache": bool(config.num_decoder_layers),
        **({"scale_qk": True} if config.scale_qk else {}),
    }


def _feed_forward_kind(feed_forward_proj: str) -> tuple[bool, Activation]:
    """``"gated-gelu"`` to (gated, activation). The Google checkpoints say "gated-gelu" and mean the tanh form."""
    parts = feed_forward_proj.split("-")
    gated, name = len(parts) == 2 and parts[0] == "gated", parts[-1]
    if (len(parts) > 1 and not gated) or name not in _ACTIVATION_NAMES:
        raise ValueError(
            f"config.json has feed_forward_proj={shown(feed_forward_proj)}; known are "
            f"{', '.join(_ACTIVATION_NAMES)}, each also with 'gated-' in front"
        )
    if feed_forward_proj == "gated-gelu":
        return True, "gelu_new"
    return gated, _ACTIVATION_NAMES[name]


def _scales_outputs(hf: Mapping[str, Any]) -> bool | None:
    """Whether the model of a file scales the decoder's outputs before the head; None: if the head is tied.

    For mT5, transformers 5 ties every head and scales no outputs, while transformers 4 scales them if the head is tied;
    neither writes which to config.json. transformers 5 writes it for T5, and since 5.24 for UMT5.
    """
    if hf.get("model_type") == "mt5" and str(hf.get("transformers_version", "")).startswith("5."):
        return False
    return hf.get("scale_decoder_outputs")


def _one_line(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())


# ---------------------------------------------------------------------------------------------------------------------
# Tensor names and shapes
# ---------------------------------------------------------------------------------------------------------------------


def encoder_tensors(config: T5Config) -> dict[str, Shape]:
    """Names and shapes of every tensor of the encoder with its embedding, as Hugging Face names them."""
    shapes: dict[str, Shape] = {"shared.weight": (config.vocab_size, config.d_model)}
    for layer in range(config.num_layers):
        block = f"encoder.block.{layer}.layer"
        shapes |= _attention_tensors(config, f"{block}.0.SelfAttention", f"{block}.0.layer_norm")
        if layer == 0 or config.bias_per_layer:
            shapes[f"{block}.0.SelfAttention.relative_attention_bias.weight"] = _bias_shape(config)
        shapes |= _feed_forward_tensors(config, f"{block}.1")
    shapes["encoder.final_layer_norm.weight"] = (config.d_model,)
    return shapes


def decoder_tensors(config: T5Config) -> dict[str, Shape]:
    """Names and shapes of every tensor of the decoder and its output head; empty without a decoder."""
    if config.num_decoder_layers == 0:
        return {}
    shapes: dict[str, Shape] = {}
    for layer in range(config.num_decoder_layers):
        block = f"decoder.block.{layer}.layer"
        shapes |= _attention_tensors(config, f"{block}.0.SelfAttention", f"{block}.0.layer_norm")
        if layer == 0 or config.bias_per_layer:
            shapes[f"{block}.0.SelfAttention.relative_attention_bias.weight"] = _bias_shape(config)
        shapes |= _attention_tensors(config, f"{block}.1.EncDecAttention", f"{block}.1.layer_norm")
        shapes |= _feed_forward_tensors(config, f"{block}.2")
    shapes["decoder.final_layer_norm.weight"] = (config.d_model,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.d_model)
    return shapes


def _bias_shape(config: T5Config) -> Shape:
    return (config.relative_attention_num_buckets, config.num_heads)


def _attention_tensors(config: T5Config, attention: str, norm: str) -> dict[str, Shape]:
    return {
        f"{attention}.q.weight": (config.inner_dim, config.d_model),
        f"{attention}.k.weight": (config.inner_dim, config.d_model),
        f"{attention}.v.weight": (config.inner_dim, config.d_model),
        f"{attention}.o.weight": (config.d_model, config.inner_dim),
        f"{norm}.weight": (config.d_model,),
    }


def _feed_forward_tensors(config: T5Config, layer: str) -> dict[str, Shape]:
    inputs = ("wi_0", "wi_1") if config.gated else ("wi",)
    return {
        **{f"{layer}.DenseReluDense.{name}.weight": (config.d_ff, config.d_model) for name in inputs},
        f"{layer}.DenseReluDense.wo.weight": (config.d_model, config.d_ff),
        f"{layer}.layer_norm.weight": (config.d_model,),
    }
