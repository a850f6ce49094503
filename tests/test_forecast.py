"""What will compute an encoder is told before it is loaded, and is what computes it then."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_cases import runner_names
from checkpoints import spiece_model
from conftest import TOY_CONFIGS, random_state, write_hf_folder

from nai_t5_core.backends.choose import why_not_int8
from nai_t5_core.backends.forecast import forecast
from nai_t5_core.backends.kernels.runners import KernelsInPlace
from nai_t5_core.backends.quantised.forecast import forecast_quantised
from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import LayerScales, unscaled
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.weights.load import load_encoder

CPU = torch.device("cpu")
# Two layers of a plain and an odd kind: gated, and with heads of an odd width, which the kernels do not know.
ODD = TOY_CONFIGS["v1.1"].model_copy(update={"d_kv": 15, "num_layers": 2, "num_decoder_layers": 0})
REQUESTS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "not optimised": {"optimize": False},
    "separate": {"layout": "separate"},
    "separate, not optimised": {"layout": "separate", "optimize": False},
    "scaled": {"scales": unscaled(2).with_layer(1, LayerScales(feed_forward_out=0.5))},
    "8 bits": {"quantize": "int8"},
}
# Of runners that are called otherwise than what is told.
WORDS = {"": "torch", "oneDNN, in 8 bits": "8 bits by oneDNN"}


@pytest.fixture(scope="module", params=["even", "odd"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[T5Config, Path]:
    config = ODD if request.param == "odd" else ODD.model_copy(update={"d_kv": 16})
    folder = write_hf_folder(tmp_path_factory.mktemp(request.param), config, random_state(config))
    (folder / "spiece.model").write_bytes(spiece_model())
    return config, folder


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_was_told_computes(name: str, dtype: torch.dtype, model: tuple[T5Config, Path]) -> None:
    config, folder = model
    arguments = REQUESTS[name]
    if name == "8 bits" and (reason := why_not_int8(load_encoder(folder, dtype))):
        pytest.skip(reason)
    if name == "scaled" and dtype != torch.float16:
        # Blocks of one encoder may then be computed in two ways, and the words are those of the slower.
        arguments = {**arguments, "scales": unscaled(2)}
    told = forecast(config, CPU, dtype, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = TextEncoder.from_pretrained(folder, dtype, "cpu", **arguments)
    block: Any = encoder.stack.encoder.block[0]
    computing = runner_names(encoder.stack)
    if isinstance(block.runner, KernelsInPlace) and not block.attends_by_itself(dtype):
        computing = {""}
    assert {f"cpu, {WORDS.get(runner, runner)}" for runner in computing} == {told}


def test_words_differ_where_another_computes() -> None:
    config = TOY_CONFIGS["v1.1"].encoder_only()
    cuda = torch.device("cuda")
    told = {
        forecast(config, CPU, torch.float32),
        forecast(config, CPU, torch.float32, compile=True),
        forecast(config, CPU, torch.float32, compile=True, attention="sdpa"),
        forecast(config, CPU, torch.float64),
        forecast(config, cuda, torch.float16),
        forecast(config, cuda, torch.float16, optimize=False),
        forecast(config, cuda, torch.float16, compile=True),
        forecast(config, cuda, torch.float16, quantize="int8"),
        forecast(config, cuda, torch.float16, quantize="int8", optimize=False),
        forecast(config, torch.device("mps"), torch.float16),
    }
    assert len(told) == 10


def test_words_differ_where_quantised_weights_are_read_by_kernels() -> None:
    config = TOY_CONFIGS["v1.1"].encoder_only()
    read, unread = [[GGML_KINDS["Q8_0"]]] * 3, [[GGML_KINDS["Q8_0"]], [GGML_KINDS["Q4_K"]], []]
    told = [
        forecast_quantised(config, torch.device("cuda"), torch.float16, kinds, **how)
        for kinds, how in ((read, {}), (unread, {}), (read, {"optimize": False}), (read, {"attention": "sdpa"}))
    ]
    assert told == [
        "cuda, quantised weights, auto, kernels where they can",
        "cuda, quantised weights, auto",
        "cuda, quantised weights, auto",
        "cuda, quantised weights, sdpa",
    ]
