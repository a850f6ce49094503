"""Which encoder computes a caption set: every choice of loading is one of a set, and is in its settings."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pyarrow")

from conftest import TOY_CONFIGS, random_state
from toy_captions import ENCODER, captions, made, order, planned, write_captions
from toy_quantised import float8_by_rows, quantised, write_quantised

from nai_t5_core import TextEncoder
from nai_t5_core.backends.kernels.build import missing_for
from nai_t5_core.backends.kernels.sets import SETS
from nai_t5_core.backends.products import ONEDNN
from nai_t5_core.backends.quantised.projections import QuantisedLinear
from nai_t5_core.cli import app
from nai_t5_core.datasets.encoder_choice import EncoderChoice
from nai_t5_core.datasets.reading import EmbeddingDataset
from nai_t5_core.prompts.choices import Choices
from nai_t5_core.weights.examine import find_tokenizer_for

TEXTS = captions(20)
PRODUCTS = [instructions.name for instructions in SETS if missing_for(instructions) is None]
if ONEDNN.missing(torch.device("cpu"), torch.float32) is None:
    PRODUCTS.append("onednn")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_captions(tmp_path / "captions.jsonl", TEXTS)


@pytest.fixture
def quantised_encoder(tmp_path: Path) -> EncoderChoice:
    tokenizer = find_tokenizer_for(None)
    config = TOY_CONFIGS["v1.1"].model_copy(update={"vocab_size": tokenizer.vocab_size})
    weights = write_quantised(tmp_path / "t5.safetensors", quantised(random_state(config), float8_by_rows))
    kind, content = tokenizer.serialized()
    (tmp_path / kind).write_bytes(content)
    return EncoderChoice(str(weights), "bfloat16", "cpu", tokenizer=str(tmp_path / kind))


def test_every_choice_of_loading_is_one_of_a_set() -> None:
    """The layout and whether weights are prepacked are for who goes on to change the model; offloaded layers, for who
    has a diffusion model beside the encoder.
    """
    assert {field.name for field in fields(Choices)} - {field.name for field in fields(EncoderChoice)} == {
        *("layout", "optimize", "offload")
    }


@pytest.mark.skipif(len(PRODUCTS) < 2, reason="this processor has one way to compute products")
@pytest.mark.parametrize("products", PRODUCTS)
def test_what_multiplies_is_that_which_was_chosen_and_is_in_the_settings(
    products: Any, file: Path, tmp_path: Path
) -> None:
    encoder = replace(ENCODER, dtype="float32", products=products)
    dataset = EmbeddingDataset(made(order(encoder=encoder), tmp_path / "set", file).path)
    expected = TextEncoder.from_pretrained(dtype="float32", device="cpu", products=products)
    for name, text in list(TEXTS.items())[:3]:
        states = expected.encode([text], "wan").unpadded()[0].bfloat16()
        torch.testing.assert_close(dataset[name][0], states, rtol=2**-7, atol=2**-8)
    other = next(one for one in PRODUCTS if one != products)
    with pytest.raises(ValueError, match=r"encoder\.backend is '.*' there and '.*' now"):
        planned(order(encoder=replace(encoder, products=other)), tmp_path / "set", file)


def test_unpacked_weights_are_another_encoder(quantised_encoder: EncoderChoice, file: Path, tmp_path: Path) -> None:
    encoder = replace(quantised_encoder, unpack=True)
    for choice, expected in ((encoder, False), (quantised_encoder, True)):
        modules = choice.load().stack.modules()
        assert any(isinstance(module, QuantisedLinear) for module in modules) == expected
    made(order(encoder=encoder), tmp_path / "set", file)
    with pytest.raises(ValueError, match=r"encoder\.backend is '.*' there and '.*quantised weights.*' now"):
        planned(order(encoder=quantised_encoder), tmp_path / "set", file)


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "products that are none": ({"products": "abacus"}, r"unknown products 'abacus'; allowed: auto, kernels"),
    "products on a GPU": ({"products": "onednn", "device": "cuda"}, r"products='onednn' is for models .* on the CPU"),
    "8 bits, compiled": ({"quantize": "int8", "compile": True}, r"quantize and compile exclude each other"),
    "a quantisation that is none": ({"quantize": "int2"}, r"quantize='int2'; allowed"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_loaded_is_refused_before_anything_is_planned(case: str, file: Path, tmp_path: Path) -> None:
    arguments, expected = IMPOSSIBLE[case]
    if arguments.get("device") == "cuda" and not torch.cuda.is_available():
        expected = r"cuda"
    with pytest.raises(ValueError, match=expected):
        planned(order(encoder=replace(ENCODER, **arguments)), tmp_path / "set", file)
    assert not (tmp_path / "set").exists()


def test_the_command_takes_them(quantised_encoder: EncoderChoice, file: Path, tmp_path: Path) -> None:
    """A set that the command has made is one of the same choices in Python, and goes on there."""
    command = ["precompute", str(file), "--id", "id", "--out", str(tmp_path / "set"), "--family", "wan"]
    command += ["--model", str(quantised_encoder.source), "--tokenizer", str(quantised_encoder.tokenizer)]
    app([*command, "--device", "cpu", "--dtype", "bfloat16", "--unpack", "--products", "onednn"], standalone_mode=False)
    same = replace(order(), encoder=replace(quantised_encoder, unpack=True, products="onednn"))
    _, plan = planned(replace(same, keeping=type(same.keeping)()), tmp_path / "set", file)
    assert plan.edition == 1
