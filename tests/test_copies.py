"""What users hold is copied and pickled in every form, and says why it is not moved where it cannot be."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state, write_hf_folder
from torch import Tensor
from toy_loras import toy_lora

from nai_t5_core.backends.choose import why_not_int8, why_not_prepack
from nai_t5_core.hf import NAIT5EncoderModel
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.prompts.text_encoder import TextEncoder

CONFIG = TOY_CONFIGS["v1.1"]
IDS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(3))
MASK = padding_mask([12, 5, 1], 12)
_PLAIN = build_stack(CONFIG, random_state(CONFIG))
HELD = {
    "packed": pytest.param({}, marks=pytest.mark.skipif(bool(why_not_prepack(_PLAIN)), reason="packs nothing here")),
    "int8": pytest.param(
        {"quantize": "int8"}, marks=pytest.mark.skipif(bool(why_not_int8(_PLAIN)), reason="no fast products of bytes")
    ),
}
held = pytest.mark.parametrize("options", HELD.values(), ids=HELD)


def through_torch(kept: Any) -> Any:
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda kept: pickle.loads(pickle.dumps(kept)),
    "torch.save": through_torch,
}
every_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


def encode(encoder: TextEncoder) -> Tensor:
    return encoder.encode(["a cat", "two dogs on a sofa"]).hidden_states


@every_copy
@pytest.mark.parametrize("calls", [0, 3])
@pytest.mark.parametrize("options", [*HELD.values(), {"optimize": False}], ids=[*HELD, "plain"])
def test_a_text_encoder_is_copied(options: dict[str, Any], calls: int, copied: Callable[[Any], Any]) -> None:
    encoder = TextEncoder.from_pretrained(dtype="float32", device="cpu", **options)
    for _ in range(calls):
        encode(encoder)
    twin = copied(encoder)
    expected = [encode(encoder) for _ in range(3)][-1]
    assert torch.equal([encode(twin) for _ in range(3)][-1], expected)
    loras = LiveLoras(twin)
    loras.add(toy_lora(twin.stack.config))
    assert torch.equal(encode(copied(twin)), encode(twin))
    assert not torch.equal(encode(twin), expected)
    assert torch.equal(encode(encoder), expected), "a copy has weights of its own"


MOVES: dict[str, Callable[[Any], Any]] = {
    "meta": lambda model: model.to("meta"),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "to_empty": lambda model: model.to_empty(device="meta"),
}


@held
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_held_text_encoder_says_why_it_is_not_moved(options: dict[str, Any], move: Callable[[Any], Any]) -> None:
    encoder = TextEncoder.from_pretrained(dtype="float32", device="cpu", **options)
    expected = [encode(encoder) for _ in range(3)][-1]
    with pytest.raises(ValueError, match=r"prepacked or quantised for the CPU, and cannot be moved or cast to .*load"):
        move(encoder.stack)
    assert torch.equal(encode(encoder), expected)
    assert torch.equal(encode(encoder), encode(TextEncoder(encoder.stack.to("cpu", torch.float32), encoder.tokenizer)))


@held
def test_a_held_text_encoder_takes_no_other_weights(options: dict[str, Any]) -> None:
    encoder = TextEncoder.from_pretrained(dtype="float32", device="cpu", **options)
    with pytest.raises(ValueError, match="takes no other weights; load it anew"):
        encoder.stack.load_state_dict(encoder.stack.state_dict())


@every_copy
@pytest.mark.parametrize("calls", [0, 3])
@torch.no_grad()
def test_the_drop_in_class_is_copied(calls: int, copied: Callable[[Any], Any], tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path, CONFIG, random_state(CONFIG))
    model = NAIT5EncoderModel.from_pretrained(folder, dtype="float32")
    for _ in range(calls):
        model(IDS, MASK)
    twin = copied(model)
    expected = model(IDS, MASK).last_hidden_state
    assert torch.equal(twin(IDS, MASK).last_hidden_state, expected)
    assert twin.stack.encoder is twin.encoder and twin.stack.guard is model.stack.guard
    twin.encoder.block[1].layer[1].DenseReluDense.wo.weight.zero_()
    assert not torch.equal(twin(IDS, MASK).last_hidden_state, expected)
    assert torch.equal(model(IDS, MASK).last_hidden_state, expected)
