"""Pipelines of diffusers on a CUDA device whose T5 is ours: run with ``pytest -m cuda``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from test_diffusers_families import assert_same
from toy_loras import toy_lora
from toy_offloading import OFFLOADS
from toy_pipelines import T5, UMT5, Toy, make, text_encoder

from nai_t5_core.diffusers.adapter import replace_text_encoder, restore_text_encoder
from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel
from nai_t5_core.float16.guard import encode_guarded
from nai_t5_core.lora.live import LiveLoras

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
    pytest.mark.filterwarnings("ignore"),
]

GPU = torch.device("cuda", 0)
CONFIGS = {"flux": T5, "pixart-sigma": T5, "wan": UMT5}
# Of pictures in float32: a GPU sums in another order, and the toys make much of it.
NEAR = 1e-3


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def picture(toy: Toy) -> torch.Tensor:
    return toy.run().cpu()


def embeddings(model: Any) -> torch.Tensor:
    """Of the tokens of a prompt and a padded one, in float64 on the CPU."""
    ids = torch.randint(3, model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 20, [1] * 7 + [0] * 13])
    with torch.no_grad():
        found = model(ids.to(GPU), mask.to(GPU))[0]
    assert found.device == GPU
    return found.double().cpu()[mask != 0]


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_to_the_device(family: str, offload: Any) -> None:
    toy = make(family)
    expected = picture(toy)
    replace_text_encoder(toy.pipe)
    offload(toy.pipe, GPU)
    assert_same(picture(toy), expected, NEAR)
    assert_same(picture(toy), expected, NEAR)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_replacing_under_offloading_to_the_device(family: str, offload: Any) -> None:
    toy = make(family)
    expected = picture(toy)
    offload(toy.pipe, GPU)
    replace_text_encoder(toy.pipe)
    assert isinstance(toy.encoder, NAIT5EncoderModel)
    assert_same(picture(toy), expected, NEAR)
    restore_text_encoder(toy.pipe)
    assert not isinstance(toy.encoder, NAIT5EncoderModel)
    assert_same(picture(toy), expected, NEAR)


def test_the_kernels_come_with_the_device_and_go_with_it(family: str) -> None:
    """From the CPU to the GPU and back, and given back to transformers there."""
    toy = make(family)
    toy.encoder = text_encoder(CONFIGS[family].model_copy(update={"d_kv": 16}))  # the kernels' smallest heads
    expected = embeddings(copy.deepcopy(toy.encoder).double().to(GPU))
    toy.pipe.to(GPU)
    replace_text_encoder(toy.pipe, dtype=torch.float16)
    ours = toy.encoder
    assert "kernels for CUDA" in repr(ours)
    assert_same(embeddings(ours), expected, 1e-2)
    toy.pipe.to("cpu")
    assert "kernels for CUDA" not in repr(ours)
    toy.pipe.to(GPU)
    assert "kernels for CUDA" in repr(ours)
    assert_same(embeddings(ours), expected, 1e-2)
    restore_text_encoder(toy.pipe)
    assert not isinstance(toy.encoder, NAIT5EncoderModel) and toy.encoder.device == GPU
    assert_same(embeddings(toy.encoder), expected, 1e-2)


@pytest.mark.parametrize("offload", [None, *OFFLOADS])
def test_live_loras(family: str, offload: Any) -> None:
    toy = make(family)
    lora = toy_lora(CONFIGS[family])
    plain = picture(toy)
    replace_text_encoder(toy.pipe)
    loras = LiveLoras(toy.encoder)
    loras.add(lora, 0.8)
    changed = picture(toy)
    assert (changed - plain).abs().max() > 0.01 * plain.abs().max(), "the LoRA makes no difference"
    toy.pipe.to(GPU) if offload is None else offload(toy.pipe, GPU)
    assert_same(picture(toy), changed, NEAR)
    loras.clear()
    assert_same(picture(toy), plain, NEAR)


def test_the_guard_under_offloading(family: str) -> None:
    """It names the damaged weight, wherever the weight lies at that moment."""
    toy = make(family)
    replace_text_encoder(toy.pipe, dtype=torch.float16)
    toy.encoder.stack.encoder.block[0].layer[0].SelfAttention.o.weight.data[3, 3] = float("nan")
    toy.pipe.to(GPU)
    with pytest.raises(ValueError, match=r"block\.0"):
        encode_guarded(toy.encoder.stack, torch.tensor([[5, 6, 7, 1]]))
