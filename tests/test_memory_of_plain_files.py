"""Files in 16 and 32 bits: memory holds the weights in the compute dtype once, and nothing needed on the way."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TOY_CONFIGS, random_state
from test_kernels import IDS, exact_and_rounded, needs_kernels

from nai_t5_core.backends.choose import prepack
from nai_t5_core.backends.kernels.weights import KernelWeight
from nai_t5_core.bench.children import START, run_child
from nai_t5_core.bench.gguf_files import write_gguf as write_plain_gguf
from nai_t5_core.facts.config import T5Config, encoder_tensors
from nai_t5_core.weights.formats import write_safetensors

# The weights are small enough that malloc has them in its heap, between what is needed for a moment.
CONFIG = T5Config(
    vocab_size=96, d_model=512, d_kv=64, d_ff=512, num_heads=8, num_layers=24, num_decoder_layers=0, gated=True
)
STATUS = Path("/proc/self/status")

LOADED = """
from pathlib import Path
from nai_t5_core.weights.load import load_encoder

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

load_encoder(arguments["small"], arguments["dtype"], "cpu")  # what the first load imports is no part of the weights
before = own()
stack = load_encoder(arguments["source"], arguments["dtype"], "cpu")
print(json.dumps({"own": own() - before}), flush=True)
"""


def gguf_of(kind: str) -> Callable[[Path, T5Config], Path]:
    def write(folder: Path, config: T5Config) -> Path:
        return write_plain_gguf(folder / f"{config.num_layers}.gguf", config, random_state(config), kind)

    return write


def safetensors_of(dtype: torch.dtype) -> Callable[[Path, T5Config], Path]:
    def write(folder: Path, config: T5Config) -> Path:
        state, path = random_state(config), folder / f"{config.num_layers}.safetensors"
        tensors = {name: state[name].to(dtype) for name in encoder_tensors(config)}
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_safetensors(path, layout, tensors.items(), {"format": "pt"})
        return path

    return write


FILES = {
    "GGUF F16": gguf_of("F16"),
    "GGUF BF16": gguf_of("BF16"),
    "GGUF F32": gguf_of("F32"),
    "float16": safetensors_of(torch.float16),
    "bfloat16": safetensors_of(torch.bfloat16),
    "float32": safetensors_of(torch.float32),
}


@pytest.mark.skipif(
    not STATUS.exists() or "RssAnon:" not in STATUS.read_text(), reason="this system does not tell a process's memory"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", FILES)
def test_a_load_leaves_the_weights_alone(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Whatever dtype they had in the file; those that stay mapped are not counted."""
    small, large = (FILES[kind](tmp_path, CONFIG.model_copy(update={"num_layers": layers})) for layers in (1, 24))
    arguments = {"threads": 1, "ids": [1], "small": str(small), "source": str(large)}
    found = run_child(START + LOADED, {**arguments, "dtype": str(dtype).removeprefix("torch.")})
    weights = 2 * sum(torch.Size(shape).numel() for shape in encoder_tensors(CONFIG).values())
    assert found["own"] < 1.06 * weights


@needs_kernels
@torch.no_grad()
def test_only_one_weight_is_there_twice_while_panels_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    _, stack = exact_and_rounded(TOY_CONFIGS["v1.1"])
    prepack(stack, "kernels")
    stack(IDS)
    held = [block.layer[1].DenseReluDense.wo.forms[0].held for block in stack.encoder.block]
    plain = [weakref.ref(weight.pieces[0].values) for one in held for weight in one.kernels.weights]
    still_there, to_panels = [], KernelWeight.in_panels

    def watched(weight: KernelWeight) -> KernelWeight:
        still_there.append(sum(each() is not None for each in plain))
        return to_panels(weight)

    monkeypatch.setattr(KernelWeight, "in_panels", watched)
    stack(IDS)
    assert still_there == list(range(len(plain), 0, -1))
    assert all(one.kernels.is_in_panels for one in held)
