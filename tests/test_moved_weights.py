"""What computed a model does not hold the weights that it had before it was moved."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from checkpoints import encoder_part
from conftest import build_stack, random_state
from offload_toys import WIDE
from toy_quantised import READ, quantised, write_quantised

from nai_t5_core.backends.choose import run_in_place
from nai_t5_core.backends.kernels.build import why_not_kernels
from nai_t5_core.backends.offload.weights import weights_of
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.weights.load import load_encoder


def made(kind: str, folder: Path) -> T5EncoderStack:
    if kind == "plain":
        return run_in_place(build_stack(WIDE, random_state(WIDE)).eval())
    state = quantised(encoder_part(random_state(WIDE)), READ[kind][1])
    return load_encoder(write_quantised(folder / "t5.safetensors", state), "float32", "cpu")


def alive() -> set[int]:
    """Where the tensors of the CPU lie that are not small. Those of a compiler that pretends lie nowhere."""
    found = (each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter))
    tensors = (each for each in found if each.device.type == "cpu")
    return {tensor.data_ptr() for tensor in tensors if tensor.layout is torch.strided and tensor.nbytes >= 1 << 14}


@pytest.mark.parametrize("kind", ["plain", *READ])
def test_weights_are_let_go_when_they_are_moved(kind: str, tmp_path: Path) -> None:
    """Else a model that was tried on the CPU would be in its memory for as long as it is on the card."""
    if why_not_kernels() is not None:
        pytest.skip("no kernels here")
    stack = made(kind, tmp_path)
    with torch.no_grad():
        stack(torch.tensor([[3, 9, 1]]))
    blocks = [weight.data_ptr() for block in stack.encoder.block for weight in weights_of(block)]
    assert len(alive().intersection(blocks)) >= 4 * len(stack.encoder.block)
    stack.to("meta")
    gc.collect()
    assert not alive().intersection(blocks)
