"""Weights beyond a dtype's range are refused at load, with what holds them, and no class returns what is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, padding_mask, random_state, write_hf_folder
from torch import Tensor

from nai_t5_core.float16.guard import NotFiniteError
from nai_t5_core.hf import NAIT5EncoderModel
from nai_t5_core.model.encoder import LAYOUTS, Layout
from nai_t5_core.weights.convert import convert
from nai_t5_core.weights.formats import CheckpointError
from nai_t5_core.weights.load import load_encoder, load_t5

CONFIG = TOY_CONFIGS["v1.1"]
IDS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(3))
MASK = padding_mask([12, 5, 1], 12)
NAMES = [
    "encoder.block.1.layer.0.SelfAttention.k.weight",
    "encoder.block.1.layer.0.SelfAttention.o.weight",
    "encoder.block.2.layer.1.DenseReluDense.wi_1.weight",
    "encoder.block.2.layer.1.DenseReluDense.wo.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
]
every_weight = pytest.mark.parametrize("name", NAMES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def with_number(folder: Path, name: str, number: float, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint with one number of a weight replaced."""
    state: dict[str, Tensor] = {key: tensor.to(dtype) for key, tensor in random_state(CONFIG).items()}
    state[name].view(-1)[5] = number
    return write_hf_folder(folder, CONFIG, state)


LOADERS = {
    "load_encoder": lambda source, dtype, layout: load_encoder(source, dtype, "cpu", layout),
    "load_t5": lambda source, dtype, layout: load_t5(source, dtype, "cpu", layout),
    "the drop-in class": lambda source, dtype, layout: NAIT5EncoderModel.from_pretrained(
        source, dtype=dtype, layout=layout
    ),
    "convert": lambda source, dtype, layout: convert(source, source / "own.safetensors", dtype),
}


@every_layout
@every_weight
@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_weights_beyond_float16_are_refused_and_told_what_holds_them(
    load: Any, name: str, layout: Layout, stored: torch.dtype, tmp_path: Path
) -> None:
    source = with_number(tmp_path, name, 1e6, stored)
    block = name.rpartition(".block.")[2].partition(".")[0]
    expected = (
        rf"encoder\.block\.{block}\..* has values that are not finite in torch\.float16: they reach [\d.]+e\+0\d, and "
        r"it ends at 65504; use bfloat16 or float32"
    )
    with pytest.raises(CheckpointError, match=expected):
        load(source, "float16", layout)
    assert not (source / "own.safetensors").exists()
    for dtype in ("bfloat16", "float32"):
        load(source, dtype, layout)


@every_weight
def test_damage_is_told_from_size(name: str, tmp_path: Path) -> None:
    source = with_number(tmp_path, name, float("nan"))
    for layout in LAYOUTS:
        with pytest.raises(CheckpointError, match=rf"float16: the weights are damaged, {name} holds NaN or infinity"):
            load_encoder(source, "float16", "cpu", layout)


def test_float64_beyond_float32_is_refused(tmp_path: Path) -> None:
    source = with_number(tmp_path, NAMES[1], 1e300, torch.float64)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(CheckpointError, match=r"they reach 1e\+300, and it ends at 3\.\d+e\+38; use float64"):
            load_encoder(source, dtype, "cpu")
    assert load_encoder(source, "float64", "cpu").dtype == torch.float64


def test_weights_that_lie_in_the_file_as_they_are_used_are_not_read(tmp_path: Path) -> None:
    """Which would take as long as reading the whole file: what is not finite there is the guard's."""
    source = with_number(tmp_path, NAMES[1], float("inf"), torch.float16)
    stack = load_encoder(source, "float16", "cpu", "separate")
    with pytest.raises(NotFiniteError, match=f"{NAMES[1]} holds values that are not finite; the weights are damaged"):
        stack(IDS, MASK)


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wants_states", [False, True])
@torch.no_grad()
def test_the_drop_in_class_returns_nothing_that_is_not_finite(
    dtype: torch.dtype, layout: Layout, wants_states: bool, tmp_path: Path
) -> None:
    """Whatever the cause: damaged weights, given embeddings, or a residual beyond the range."""
    model = NAIT5EncoderModel.from_pretrained(with_number(tmp_path, NAMES[3], 0.5), dtype=dtype, layout=layout)
    states = {"output_hidden_states": wants_states}
    assert model(IDS, MASK, **states).last_hidden_state.isfinite().all()
    embeddings = model.stack.embed(IDS)
    embeddings[0, 2, 3] = float("nan")
    with pytest.raises(NotFiniteError, match="inputs_embeds holds values that are not finite"):
        model(inputs_embeds=embeddings, attention_mask=MASK, **states)
    model.encoder.block[1].layer[1].DenseReluDense.wo.weight[3, 5] = float("inf")
    with pytest.raises(NotFiniteError, match=r"block\.1\.layer\.1\.DenseReluDense\.wo\.weight holds values"):
        model(IDS, MASK, **states)


@pytest.mark.parametrize(("dtype", "advice"), [("float32", "float64"), ("bfloat16", "float64")])
@torch.no_grad()
def test_what_exceeds_a_wide_dtype_is_told_what_holds_it(dtype: str, advice: str, tmp_path: Path) -> None:
    state = random_state(CONFIG)
    for name in NAMES[2:4]:
        state[name] = state[name] * 1e25
    stack = load_encoder(write_hf_folder(tmp_path, CONFIG, state), dtype, "cpu", "separate")
    with pytest.raises(NotFiniteError, match=f"exceeds torch.{dtype}.* use {advice}"):
        stack(IDS, MASK)
