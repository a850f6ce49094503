"""Toy models of every kind, and where the shared test data is."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nai_t5_core.backends.choose import run_in_place
from nai_t5_core.backends.kernels.build import missing_for, missing_for_kernels
from nai_t5_core.backends.kernels.sets import SETS, InstructionSet
from nai_t5_core.facts.config import T5Config, config_to_hf, decoder_tensors, encoder_tensors
from nai_t5_core.model.encoder import Layout, T5EncoderStack
from nai_t5_core.model.layers import NoInit
from nai_t5_core.weights.fuse import cook, fused_recipes, separate_recipes

# Triton, where there is one, is told before it is first imported that it has no GPU to compile for.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Toys gain nothing from more, and threads that wait for each other on a busy machine take several times longer: each
# process that shares the tests has one, and so has each program that a test starts.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# What is imported to test is a million objects, and python's default looks through all of them every few seconds of a
# compilation. Tests that want to see something freed collect it themselves.
gc.set_threshold(50_000, 20, 20)

# Built by the process that collects the tests, before others that share them start, so that each finds them built.
needs_kernels = pytest.mark.skipif(bool(missing_for_kernels()), reason=f"no kernels here: {missing_for_kernels()}")


def set_param(instructions: InstructionSet, *more: Any, name: str = "") -> Any:
    """A parameter of tests that need the kernels for this instruction set."""
    missing = missing_for(instructions)
    marks = pytest.mark.skipif(bool(missing), reason=f"no kernels for {instructions.title}: {missing}")
    return pytest.param(instructions, *more, marks=marks, id=instructions.name + name)


every_set = pytest.mark.parametrize("instructions", [set_param(instructions) for instructions in SETS])

_TOY = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 80, "num_heads": 4, "num_layers": 3}

# One toy of each kind that the encoder has to be right for.
TOY_CONFIGS = {
    "v1.0": T5Config(
        **_TOY, gated=False, activation="relu", num_decoder_layers=3, tie_word_embeddings=True, dropout_rate=0.0
    ),
    "v1.1": T5Config(**_TOY, num_decoder_layers=3),
    "umt5": T5Config(**_TOY, num_decoder_layers=3, bias_per_layer=True),
    "byt5": T5Config(**{**_TOY, "vocab_size": 384, "num_layers": 4}, num_decoder_layers=2),
    "ul2": T5Config(**{**_TOY, "d_kv": 32}, num_decoder_layers=3, activation="silu"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exactness-prompts",
        type=int,
        default=64,
        metavar="N",
        help="prompts for each setting that generation is compared with transformers in",
    )
    parser.addoption(
        "--fresh-encoders",
        type=int,
        default=60,
        metavar="N",
        help="new encoders that threads share, of all backends together",
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What tests have counted, for a person to read."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties:
                terminalreporter.write_line(f"{name}: {value}")


def random_state(config: T5Config, seed: int = 0) -> dict[str, Tensor]:
    """Weights under Hugging Face names, float32, drawn so that norms, bias and attention all matter to the output."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in (encoder_tensors(config) | decoder_tensors(config)).items():
        if "layer_norm" in name:
            state[name] = 0.5 + torch.rand(shape, generator=generator)
        elif "bias" in name or name == "shared.weight":
            state[name] = torch.randn(shape, generator=generator)
        else:
            spread = config.d_kv**-0.25 if name.endswith((".q.weight", ".k.weight")) else 1.0
            state[name] = torch.randn(shape, generator=generator) * spread * shape[1] ** -0.5
    return state


def build_stack(
    config: T5Config, state: dict[str, Tensor], dtype: torch.dtype = torch.float32, layout: Layout = "fused"
) -> T5EncoderStack:
    """Our encoder from Hugging Face tensors, by the recipes that loading uses."""
    config = config.encoder_only()
    recipes = fused_recipes(config) if layout == "fused" else separate_recipes(config)
    stack = T5EncoderStack(config, layout, NoInit, device="meta", dtype=dtype)
    stack.load_state_dict({recipe.target: cook(recipe, state.__getitem__, dtype) for recipe in recipes}, assign=True)
    return run_in_place(stack.eval())


def write_hf_folder(folder: Path, config: T5Config, state: dict[str, Tensor]) -> Path:
    """A Hugging Face folder with config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})  # without which transformers 4 reads none
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    return folder


def padding_mask(lengths: list[int], length: int) -> Tensor:
    """[batch, length] int64, ones at the first ``lengths[i]`` places of row i."""
    return (torch.arange(length)[None, :] < torch.tensor(lengths)[:, None]).long()


@pytest.fixture(params=list(TOY_CONFIGS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(kind: str) -> T5Config:
    return TOY_CONFIGS[kind]


@pytest.fixture
def v1_1_folder(tmp_path: Path) -> Path:
    """A complete v1.1 model in the Hugging Face layout, without a tokenizer."""
    config = TOY_CONFIGS["v1.1"]
    return write_hf_folder(tmp_path / "v1_1", config, random_state(config))
