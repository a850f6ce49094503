"""Configs: published sizes, config.json both ways, and sizes read from the shapes of tensors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import TOY_CONFIGS
from pydantic import ValidationError

from nai_t5_core.facts.config import (
    NAMED_CONFIGS,
    T5Config,
    config_from_hf,
    config_to_hf,
    decoder_tensors,
    encoder_tensors,
    named_config,
)
from nai_t5_core.weights.inferred_config import infer_config

_SEQ2SEQ = {"is_encoder_decoder": True, "relative_attention_num_buckets": 32, "layer_norm_epsilon": 1e-6}
_GATED = {**_SEQ2SEQ, "model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# As the config.json files on the hub have them.
PUBLISHED: dict[str, dict[str, Any]] = {
    # Written before num_decoder_layers, feed_forward_proj and tie_word_embeddings existed.
    "t5-base": _SEQ2SEQ
    | {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12, "num_layers": 12},
    "t5-11b": _SEQ2SEQ
    | {"vocab_size": 32128, "d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_heads": 128, "num_layers": 24},
    "t5-v1_1-xxl": _GATED
    | {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 24},
    "mt5-xl": _GATED
    | {"vocab_size": 250112, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_heads": 32, "num_layers": 24}
    | {"model_type": "mt5", "num_decoder_layers": 24},
    "umt5-xxl": _GATED
    | {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 24}
    | {"model_type": "umt5", "num_decoder_layers": 24},
    "byt5-small": _GATED
    | {"vocab_size": 384, "d_model": 1472, "d_kv": 64, "d_ff": 3584, "num_heads": 6, "num_layers": 12}
    | {"num_decoder_layers": 4},
    "flan-ul2": _GATED
    | {"vocab_size": 32128, "d_model": 4096, "d_kv": 256, "d_ff": 16384, "num_heads": 16, "num_layers": 32}
    | {"num_decoder_layers": 32, "feed_forward_proj": "gated-silu"},
    "pile-t5-xl": _GATED
    | {"vocab_size": 32128, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_heads": 32, "num_layers": 24}
    | {"model_type": "umt5", "pad_token_id": 1, "eos_token_id": 2},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_size_is_the_published_one(name: str) -> None:
    assert config_from_hf(PUBLISHED[name]) == named_config(name)
    # flan-t5 and t5-v1_1 have the same dimensions, and the first in the table gives its name to both.
    assert named_config(name).size_name == name


def test_parameters_of_xxl() -> None:
    """The known size of the encoder that Flux and SD3 use."""
    shapes = encoder_tensors(named_config("t5-v1_1-xxl"))
    assert sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes.values()) == 4_762_310_656


KINDS = {
    "t5-small": "T5 v1.0",
    "flan-t5-xl": "T5 v1.1",
    "mt5-base": "mT5",
    "umt5-xl": "UMT5",
    "byt5-xxl": "ByT5",
    "pile-t5-large": "Pile-T5",
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_kind(name: str, kind: str) -> None:
    assert named_config(name).kind == kind


def test_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(ValueError, match=r"'t5-v1.1-xxl'; did you mean 't5-v1_1-xxl'\?.*byt5-small"):
        named_config("t5-v1.1-xxl")


@pytest.mark.parametrize("config", [*TOY_CONFIGS.values(), *NAMED_CONFIGS.values()])
def test_config_json_and_back(config: T5Config) -> None:
    for variant in (config, config.encoder_only(), config.model_copy(update={"scale_qk": True})):
        assert config_from_hf(json.loads(json.dumps(config_to_hf(variant)))) == variant


def test_transformers_reads_our_config_json(config: T5Config) -> None:
    """Its model then has exactly the tensors that we expect, and its own config.json leads back to ours."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    hf = config_to_hf(config)
    model_class = getattr(transformers, hf["architectures"][0])
    with torch.device("meta"):
        model = model_class(model_class.config_class(**hf))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    assert shapes == encoder_tensors(config) | decoder_tensors(config)
    written = json.loads(model.config.to_json_string())
    back = config_from_hf(written)
    # transformers 5 writes tie_word_embeddings=true into every file, whatever it was given, and what it was given as
    # scale_decoder_outputs, but only for the class T5 and, since 5.24, for UMT5.
    scales_outputs = written.get("scale_decoder_outputs")
    assert scales_outputs in (None, config.tie_word_embeddings)
    assert back.scale_decoder_outputs == scales_outputs
    given = {"tie_word_embeddings": config.tie_word_embeddings, "scale_decoder_outputs": None}
    assert back.model_copy(update=given) == config


def test_sizes_from_shapes(kind: str) -> None:
    """Everything but the activation and the dropout stands in the shapes."""
    config = TOY_CONFIGS[kind]
    told: dict[str, Any] = {"activation": "gelu_new"} if config.gated else {"activation": "relu"}
    told |= {"dropout_rate": 0.1}
    # A bias for each layer beside a small vocabulary is Pile-T5, whose special tokens are Llama's.
    told |= {"pad_token_id": 1, "eos_token_id": 2} if kind == "umt5" else {}
    whole = encoder_tensors(config) | decoder_tensors(config)
    assert infer_config(whole) == config.model_copy(update=told)
    assert infer_config(encoder_tensors(config)) == config.encoder_only().model_copy(update=told)


def test_decoder_of_another_depth() -> None:
    config = TOY_CONFIGS["byt5"]
    assert (config.num_layers, config.num_decoder_layers) == (4, 2)
    assert infer_config(encoder_tensors(config) | decoder_tensors(config)).num_decoder_layers == 2


HF = config_to_hf(TOY_CONFIGS["v1.1"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "llama"}, "model_type='llama', which is no T5 .allowed: t5, mt5, umt5"),
        ({"d_model": None}, "not usable: d_model"),
        ({"num_heads": 0}, "not usable: num_heads: .*greater than 0"),
        ({"num_layers": "many"}, "not usable: num_layers"),
        ({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj='gated-tanh'; known are relu"),
        ({"feed_forward_proj": "double-relu"}, "feed_forward_proj='double-relu'; known are relu"),
        ({"relative_attention_num_buckets": 30}, "num_buckets=30 .*multiple of 4"),
        ({"relative_attention_max_distance": 8}, "max_distance=8 do not fit"),
    ],
)
def test_unusable_config_json(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        config_from_hf({**HF, **change})
    assert "\n" not in str(caught.value)


def test_absent_sizes_are_listed_together() -> None:
    with pytest.raises(ValueError, match="lacks d_kv, d_ff"):
        config_from_hf({name: value for name, value in HF.items() if name not in ("d_kv", "d_ff")})


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("shared.weight", None, "shared.weight is absent"),
        ("shared.weight", (96,), r"shared.weight has shape \[96\]; two dimensions"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", (63, 64), "63 rows, which 4 heads"),
    ],
)
def test_shapes_that_tell_no_sizes(name: str, shape: tuple[int, ...] | None, expected: str) -> None:
    shapes = encoder_tensors(TOY_CONFIGS["v1.1"])
    changed = {key: value for key, value in shapes.items() if key != name} | ({name: shape} if shape else {})
    with pytest.raises(ValueError, match=expected):
        infer_config(changed)


def test_config_is_frozen_and_closed() -> None:
    config = TOY_CONFIGS["v1.1"]
    with pytest.raises(ValidationError, match="frozen"):
        config.d_model = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        T5Config(**config.model_dump(), n_layers=3)
