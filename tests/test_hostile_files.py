"""Files that declare what is not there, or are nested deeply: one clear error, soon, in little memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import encoder_part, write_file
from conftest import TOY_CONFIGS, random_state, write_hf_folder
from fuzz_readers import readers
from hostile import in_little, other_header
from safetensors.torch import save_file

from comfy_nai_t5.embeddings import load_conditioning, save_conditioning
from nai_t5_core.facts.config import config_to_hf
from nai_t5_core.lora.files import read_lora
from nai_t5_core.tokenizer import (
    tokenizer_json_to_sentencepiece,
)
from nai_t5_core.training.config import read_config
from nai_t5_core.weights.formats import CheckpointError
from nai_t5_core.weights.load import load_encoder, load_t5

V1_1 = TOY_CONFIGS["v1.1"]


# ---------------------------------------------------------------------------------------------------------------------
# Nesting
# ---------------------------------------------------------------------------------------------------------------------

DEEP = b"[" * 100_000 + b"]" * 100_000
# As deep as a parser may still read, and deeper than what shows or writes the result can go.
MIDDLING = b"[" * 300 + b"]" * 300


@pytest.mark.parametrize("nested", [DEEP, MIDDLING], ids=["deep", "middling"])
@pytest.mark.parametrize(
    ("reader", "begin", "end"),
    [
        ("config.json", b'{"model_type": ', b"}"),
        ("index.json", b'{"weight_map": ', b"}"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": ', b"}"),
        ("tokenizer_config.json beside a json", b'{"extra_ids": ', b"}"),
        ("added_tokens.json", b'{"a": ', b"}"),
        ("special_tokens_map.json", b'{"pad_token": ', b"}"),
        ("adapter_config.json", b'{"lora_alpha": ', b"}"),
        ("float16 scales", b'{"layers": ', b"}"),
        ("training config", b"steps = ", b"\n"),
        ("training pairs", b'{"input": ', b"}"),
        ("training losses", b'{"step": ', b"}\n"),
    ],
)
def test_deep_nesting(reader: str, begin: bytes, end: bytes, nested: bytes, tmp_path: Path) -> None:
    readers()[reader].write(tmp_path, begin + nested + end)
    with in_little(), pytest.raises(ValueError, match="nested in more than 100 levels"):
        readers()[reader].read(tmp_path)


@pytest.mark.parametrize("nested", [DEEP, MIDDLING], ids=["deep", "middling"])
def test_deep_nesting_that_a_parser_in_rust_refuses(nested: bytes, tmp_path: Path) -> None:
    readers()["tokenizer.json"].write(tmp_path, b'{"model": ' + nested + b"}")
    with in_little(), pytest.raises(ValueError, match=r"tokenizer\.json' is no T5 tokenizer"):
        readers()["tokenizer.json"].read(tmp_path)
    with pytest.raises(ValueError, match="nested in more than 100 levels"):
        tokenizer_json_to_sentencepiece(b'{"model": ' + nested + b"}")


@pytest.mark.parametrize("nested", [DEEP, MIDDLING], ids=["deep", "middling"])
def test_deep_nesting_in_headers(nested: bytes, tmp_path: Path) -> None:
    text = nested.decode()
    saved = save_conditioning([[torch.ones(1, 2, 4), {}]], tmp_path / "saved.safetensors")
    other_header(saved, entries=text)
    with pytest.raises(ValueError, match=r"saved.safetensors is damaged \(lists and objects are nested"):
        load_conditioning(saved)
    name = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_{}.weight"
    lora = {name.format("A"): torch.ones(2, 64), name.format("B"): torch.ones(64, 2)}
    save_file(lora, tmp_path / "lora.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match=r"header of .*lora.safetensors is not readable JSON: .*nested"):
        read_lora(tmp_path / "lora.safetensors")
    native = {"format": "nai-t5", "format_version": "1", "config": text}
    save_file({"shared.weight": torch.ones(2, 2)}, tmp_path / "own.safetensors", native)
    with pytest.raises(CheckpointError, match=r"own.safetensors has a damaged header"):
        load_encoder(tmp_path / "own.safetensors")
    # Notes of ComfyUI on quantisation say nothing where they are damaged.
    save_file(encoder_part(random_state(V1_1)), tmp_path / "t5.safetensors", {"_quantization_metadata": text})
    load_encoder(tmp_path / "t5.safetensors", "float32", "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that a file declares
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 10**9}, "config.json is not usable: num_layers: .*less than or equal to 1000"),
        ({"num_decoder_layers": 10**9}, "num_decoder_layers: .*less than or equal to 1000"),
        ({"num_layers": 900}, r"[\d]+ faults"),
        ({"relative_attention_max_distance": 10**12}, "relative_attention_max_distance: .*less than or equal to"),
        ({"relative_attention_max_distance": 10**400}, "relative_attention_max_distance: "),
        ({"vocab_size": 10**12}, r"shared.weight has shape \[96, 64\], but config.json asks for \[1000000000000, 64\]"),
        ({"d_model": 10**12, "d_ff": 10**12}, "asks for"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon: .*finite"),
        ({"num_layers": "many"}, "num_layers: .*integer"),
        ({"num_heads": [4]}, "num_heads: .*integer"),
        ({"feed_forward_proj": {"a": [1]}}, "feed_forward_proj="),
    ],
    ids=str,
)
def test_numbers_in_a_config(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path, V1_1, random_state(V1_1))
    (folder / "config.json").write_text(json.dumps({**config_to_hf(V1_1), **change}))
    with in_little(), pytest.raises(CheckpointError, match=message) as caught:
        load_t5(folder, "float32", "cpu")
    assert len(str(caught.value)) < 20_000


def test_layers_of_our_own_file(tmp_path: Path) -> None:
    readers()["our own"].write(tmp_path, readers()["our own"].content)
    file = tmp_path / "own.safetensors"
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])["__metadata__"]
    other_header(file, config=json.dumps({**json.loads(header["config"]), "num_layers": 10**9}))
    with in_little(), pytest.raises(CheckpointError, match=r"damaged header: .*less than or equal to 1000"):
        load_encoder(file)
    scales = {**json.loads(header["encoder_scales"]), "layers": [{}]}
    other_header(file, config=header["config"], encoder_scales=json.dumps(scales))
    with pytest.raises(CheckpointError, match="scales for 1 layers, and its encoder has 2; convert the original again"):
        load_encoder(file)


def test_layers_of_a_training_run(tmp_path: Path) -> None:
    reader = readers()["training config"]
    for old, new, message in (
        (b"num_layers = 2", b"num_layers = 1000000000", "num_layers: .*less than or equal to 1000"),
        (b"rows = 3", b"rows = 1000000000", "data.0.rows: .*less than or equal to 100000"),
        (b"max_length = 20", b"max_length = 1000000000", "data.0.max_length: .*less than or equal to 8192"),
        (b"learning_rate = 0.01", b"learning_rate = inf", "learning_rate: .*finite"),
        (b"seed = 3", b"seed = " + b"9" * 40, "seed: .*"),
        (b'out = "run"', b'out = "~nobody-of-this-name/x"', None),
    ):
        assert old in reader.content
        reader.write(tmp_path, reader.content.replace(old, new))
        if message is None:
            assert read_config(tmp_path / "train.toml").out == tmp_path / "~nobody-of-this-name/x"
            continue
        with in_little(), pytest.raises(ValueError, match=message):
            read_config(tmp_path / "train.toml")


@pytest.mark.parametrize("number", ["999999999", "9" * 5000, "٣" * 30, "1000"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_block_numbers(number: str, stack: str, tmp_path: Path) -> None:
    state = random_state(V1_1)
    state[f"{stack}.block.{number}.layer.0.layer_norm.weight"] = torch.ones(64)
    file = write_file(tmp_path / "t5.safetensors", state)
    message = rf"a tensor of {stack}.block.{number[:20]} among its {len(state)}, which are too few for that many layers"
    with in_little(), pytest.raises(CheckpointError, match=message) as caught:
        load_encoder(file, "float32", "cpu")
    assert len(str(caught.value)) < 1000


def test_block_numbers_of_a_lora(tmp_path: Path) -> None:
    name = "lora_te2_encoder_block_999999999_layer_0_SelfAttention_q.lora_{}.weight"
    save_file(
        {name.format("up"): torch.ones(64, 2), name.format("down"): torch.ones(2, 64)}, tmp_path / "l.safetensors"
    )
    with in_little():
        lora = read_lora(tmp_path / "l.safetensors")
    assert list(lora.changes) == ["encoder.block.999999999.layer.0.SelfAttention.q.weight"]
