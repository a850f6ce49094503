"""What an encode asks of a CUDA device, counted on a pretended one: launches, copies, and waits of the host.

This is the path by torch's operations: the drop-in class, LoRA, masks with holes. The kernels for CUDA have their own
tests, and the doctor counts on a real card.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from hf_toys import hf_model
from pretended_cuda import PretendedCuda
from torch import Tensor

pytest.importorskip("transformers", reason="transformers makes the models of the drop-in class")

from nai_t5_core.bench.peers import own_t5
from nai_t5_core.float16.guard import NotFiniteError, guard
from nai_t5_core.hf import NAIT5EncoderModel
from nai_t5_core.model.encoder import Layout
from nai_t5_core.model.packing import PaddingPolicy

CONFIG = TOY_CONFIGS["v1.1"].encoder_only()
# Four products, two norms with their casts, attention, two sums, and three for the gated activation, rounded once. The
# separate layout has three products more.
LAUNCHES = {"fused": 14, "separate": 17}
# Of a layer for a token: six products, three norms with their casts, two times attention, two writes into the cache,
# three sums, and three for the gated activation.
DECODER_LAUNCHES = 22
LENGTH = 64
knows_modes = pytest.mark.skipif(
    torch.__version__ < "2.6",
    reason=f"in torch {torch.__version__} look-ups in a table of a pretended device reach the driver, and no plain "
    "tensors can be made while one is pretended",
)


def holes() -> Tensor:
    mask = padding_mask([30, 50], LENGTH)
    mask[1, 4] = 0
    return mask


# The mask, the policy, and the groups of documents of one shape.
CASES: dict[str, tuple[Tensor | None, PaddingPolicy, int]] = {
    "one prompt": (None, "exact", 1),
    "pads that are masked": (padding_mask([20], LENGTH), "exact", 1),
    "pads that are skipped": (padding_mask([20], LENGTH), "skip", 1),
    "eight alike": (padding_mask([60] * 8, LENGTH), "skip", 1),
    "five lengths": (padding_mask([5, 9, 60, 30, 31], LENGTH), "skip", 5),
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedCuda]:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    with torch.no_grad(), PretendedCuda() as pretended:
        yield pretended


def encode(device: PretendedCuda, layers: int, layout: Layout, mask: Tensor | None, padding: PaddingPolicy) -> int:
    """The launches of the second encode; the first makes what is kept."""
    config = CONFIG.model_copy(update={"num_layers": layers})
    stack: Any = device.put(build_stack(config, random_state(config), torch.float16, layout))
    stack.guard, stack.attention = guard, "sdpa"
    ids = torch.ones(1 if mask is None else len(mask), LENGTH, dtype=torch.long)
    for _ in range(2):
        device.reset()
        assert stack(ids, mask, padding=padding).shape == (*ids.shape, CONFIG.d_model)
    return device.launches.total()


@pytest.mark.parametrize("layout", LAUNCHES)
@pytest.mark.parametrize("case", CASES)
def test_an_encode(device: PretendedCuda, case: str, layout: Layout) -> None:
    mask, padding, groups = CASES[case]
    few, many = (encode(device, layers, layout, mask, padding) for layers in (1, 3))
    # Another group is another call of attention; their results are joined.
    assert (many - few) / 2 <= LAUNCHES[layout] + (groups if groups > 1 else 0)
    assert dict(device.copies) == {("cpu", "cuda"): 1}
    assert dict(device.waits) == {"_local_scalar_dense": 1}, "the host waits for what is not the check of the result"
    assert device.float32_products == 0


@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_masks_with_holes_go_in_the_one_copy(device: PretendedCuda, padding: PaddingPolicy) -> None:
    encode(device, 1, "fused", holes(), padding)
    assert dict(device.waits) == {"_local_scalar_dense": 1}
    assert dict(device.copies) == {("cpu", "cuda"): 1}


def test_a_row_that_is_not_finite_is_named(device: PretendedCuda) -> None:
    """Ids are on the CPU, and where they lie in the packed row is told on the device."""
    # Neither the result, nor when it is made again, nor the embeddings; then that of each row.
    device.answers = itertools.chain([False] * 3, itertools.repeat(True))
    with pytest.raises(NotFiniteError, match="in rows of tokens that the text has: 1"):
        encode(device, 1, "fused", padding_mask([20], LENGTH), "skip")


@knows_modes
def test_the_drop_in_class(device: PretendedCuda) -> None:
    """Ids and mask are on the device, where pipelines put them; the mask is read once."""
    ids = torch.ones(2, LENGTH, dtype=torch.long, device="cuda")
    mask = torch.ones(2, LENGTH, dtype=torch.long, device="cuda")
    launches = []
    for layers in (1, 3):
        config = CONFIG.model_copy(update={"num_layers": layers})
        model: Any = device.put(NAIT5EncoderModel.from_hf(hf_model(config, dtype=torch.float16)))
        for _ in range(2):
            device.reset()
            model(ids, mask)
        launches.append(device.launches.total())
        assert dict(device.copies) == {("cuda", "cpu"): 1}
        assert dict(device.waits) == {"copy": 1, "_local_scalar_dense": 1}
        assert device.float32_products == 0
    assert (launches[1] - launches[0]) / 2 <= LAUNCHES["fused"]


def generate(device: PretendedCuda, layers: int, tokens: int, **options: Any) -> int:
    """The launches of the second generation for two prompts."""
    config = TOY_CONFIGS["v1.1"].model_copy(update={"num_decoder_layers": layers})
    model: Any = device.put(own_t5(config, random_state(config), torch.float16))
    for _ in range(2):
        device.reset()
        # After each token: are the logits finite, has every text ended?
        device.answers = itertools.cycle((True, False))
        texts = model.generate(torch.ones(2, LENGTH, dtype=torch.long), max_new_tokens=tokens, **options)
        assert texts.shape[0] == 2
    return device.launches.total()


@knows_modes
def test_generation(device: PretendedCuda) -> None:
    launches = {(layers, tokens): generate(device, layers, tokens) for layers in (1, 3) for tokens in (3, 5)}
    # Whether logits are finite and every text has ended is read together.
    assert dict(device.copies) == {("cpu", "cuda"): 1, ("cuda", "cpu"): 5}
    assert dict(device.waits) == {"copy": 5}
    assert device.float32_products == 0
    two_layers = {tokens: launches[3, tokens] - launches[1, tokens] for tokens in (3, 5)}
    assert (two_layers[5] - two_layers[3]) / 4 <= DECODER_LAUNCHES


@pytest.mark.parametrize("mask_on", ["cpu", "cuda"])
def test_the_mask_of_prompts_is_read_once(device: PretendedCuda, mask_on: str) -> None:
    model: Any = device.put(own_t5(TOY_CONFIGS["v1.1"], random_state(TOY_CONFIGS["v1.1"]), torch.float16))
    mask = torch.ones(2, LENGTH, dtype=torch.long, device=mask_on)
    device.reset()
    model.read(torch.ones(2, LENGTH, dtype=torch.long), mask)
    reads = 1 if mask_on == "cuda" else 0
    assert dict(device.waits) == ({"copy": 1} if reads else {})
    # Ids with where they lie, and the mask that cross-attention reads.
    assert device.copies["cpu", "cuda"] == 2 and device.copies["cuda", "cpu"] == reads


def test_tensors_of_two_devices_are_an_error(device: PretendedCuda) -> None:
    with pytest.raises(RuntimeError, match="tensors of cuda:0 and of the cpu meet in add"):
        torch.ones(3) + torch.ones(3, device="cuda")
