"""What an encode from weights in 8 bits asks of a CUDA device by our kernels, counted on a pretended one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from byte_toys import CONFIGS, quantised_stack
from cuda_toys import HAS_GPU, stack_of
from pretended_cuda import CUDA, PretendedCuda
from test_offload_counts import PretendedMover, brought
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nai_t5_core.backends.choose import encode_on_cuda
from nai_t5_core.backends.cuda.card import Card
from nai_t5_core.backends.cuda.device_refusals import missing_triton
from nai_t5_core.backends.cuda.encoder import cuda_encoder
from nai_t5_core.backends.cuda.runner import CudaRunner
from nai_t5_core.backends.offload.offload import offload_layers
from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.backends.quantised.kinds import QuantisedWeight
from nai_t5_core.backends.quantised.projections import QuantisedEmbedding, QuantisedForm, QuantisedLinear
from nai_t5_core.backends.quantised.scaled import Scaled
from nai_t5_core.facts.config import T5Config
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.layers import NoInit, RMSNorm

if missing := missing_triton():
    pytest.skip(missing, allow_module_level=True)
if HAS_GPU:
    pytest.skip("a GPU is here, and none need be pretended", allow_module_level=True)

from nai_t5_core.backends.cuda import (
    byte_kernels,
    byte_products,
    byte_weight,
    encoder,
    int8,
    int8_products,
    kernels,
    products,
    refusals,
)
from nai_t5_core.backends.offload import kernels as layer_by_layer

KERNELS = [
    *((kernels, name) for name in ("attend", "add_norm", "gate")),
    *((byte_kernels, name) for name in ("round_rows", "number_sums", "gate_in_bytes")),
    *((byte_products, name) for name in ("multiply_bytes", "unpack_bytes")),
    (int8_products, "multiply_int8"),
    (products, "multiply"),
]
# Up to 128 tokens a layer is four products, two sums with their norms, and attention. From unpacked weights, gating is
# by itself, and each projection is unpacked. With both sides in 8 bits, what attention reads and gives has a kernel; of
# up to 128 tokens what attention and the gate give.
LAUNCHES = {
    ("int8 by us", "auto", 64): 7,
    ("Q8_0", "auto", 64): 7,
    ("float8", "auto", 64): 7,
    ("int8 by us", "torch", 64): 8 + 4,
    ("int8 by us", "8-bit", 64): 7 + 2,
    ("int8 by us", "auto", 256): 8 + 2,
    ("Q8_0", "auto", 256): 8 + 4,
    ("int8 by us", "8-bit", 256): 8 + 2,
    ("float8 by row", "8-bit", 256): 8 + 1,
    ("Q8_0", "8-bit", 256): 8 + 4,
    (None, "triton", 64): 7,
}


class Counted:
    """A Triton kernel that does nothing on the pretended device but be counted."""

    def __init__(self, device: PretendedCuda, name: str) -> None:
        self.device, self.name = device, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            assert all(size > 0 for size in grid)
            assert all(isinstance(tensor, FakeTensor) for tensor in arguments if isinstance(tensor, Tensor))
            self.launch(**constants)

        return launch

    def launch(self, **constants: Any) -> None:
        self.device.launches[self.name] += 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedCuda]:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(encoder, "card_of", lambda _: Card("a card that converts float8", "sm_90"))
    monkeypatch.setattr(encoder, "_current", lambda _: nullcontext())
    # Its parameters are no plain ones.
    monkeypatch.setattr(refusals, "_module_obstacles", lambda *_: iter(()))
    monkeypatch.setattr(encoder, "refuses_now", lambda: None)  # the mode that counts is one of torch's
    with torch.no_grad(), PretendedCuda() as pretended:
        for module, name in KERNELS:
            monkeypatch.setattr(module, name, Counted(pretended, name))
        yield pretended


def put(device: PretendedCuda, kind: str | None, layers: int) -> Any:
    """A small encoder on the device, with a table in 16 bits."""
    config = CONFIGS["v1.1"].model_copy(update={"num_layers": layers})
    stack: Any = stack_of(config, device="cpu") if kind is None else quantised_stack(kind, config)
    device.put(stack)
    for module in stack.modules():
        if isinstance(module, QuantisedLinear):
            module.forms = tuple(form.to(CUDA) for form in module.forms)
    return stack


@pytest.mark.parametrize(("kind", "choice", "tokens"), LAUNCHES)
def test_an_encode(device: PretendedCuda, kind: str | None, choice: Any, tokens: int) -> None:
    assert launches_of_a_layer(device, kind, choice, tokens) == LAUNCHES[kind, choice, tokens]


def test_int8_is_unpacked_for_many_tokens_where_nothing_was_measured(
    device: PretendedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "card_of", lambda _: Card("another card that converts float8", "sm_89"))
    assert launches_of_a_layer(device, "int8 by us", "auto", 256) == 8 + 4


def test_all_launches_of_int8_overlap_where_they_are_to(device: PretendedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not, between others that do, would wait for them all."""
    encode = cuda_encoder(put(device, "int8 by us", 3), eager=True, products="8-bit")
    asked: list[tuple[str, Any]] = []
    launch = Counted.launch

    def noted(self: Counted, **constants: Any) -> None:
        asked.append((self.name, constants.get("overlaps")))
        launch(self, **constants)

    monkeypatch.setattr(Counted, "launch", noted)
    for tokens, overlapping in ((64, {True}), (100, {False})):
        encode._products.int8_overlapping_rows = 64  # type: ignore[attr-defined]
        asked.clear()
        encode.encode(torch.ones(1, tokens, dtype=torch.long))
        assert {overlaps for _, overlaps in asked} == overlapping
        assert {name for name, _ in asked} == {"multiply_int8", "round_rows", "add_norm", "attend"}


def launches_of_a_layer(device: PretendedCuda, kind: str | None, choice: Any, tokens: int) -> float:
    launches = []
    for layers in (1, 3):
        encode = cuda_encoder(put(device, kind, layers), eager=True, products=choice)
        ids = torch.ones(1, tokens, dtype=torch.long)
        for _ in range(2):
            device.reset()
            found = encode.encode(ids)
            assert found.hidden.shape == (1, tokens, 64)
            bool(found.finite)
        launches.append(device.launches.total())
        assert dict(device.waits) == {"_local_scalar_dense": 1}, "the host waits for more than the check"
        # Ids, the number of tokens, and the table of documents, which graphs get in one copy.
        assert dict(device.copies) == {("cpu", "cuda"): 3}
        assert device.float32_products == 0
    return (launches[1] - launches[0]) / 2


# As of a resident one of as many tokens.
FROM_THE_HOST = [how for how in LAUNCHES if how[0] in ("int8 by us", "Q8_0", "float8") and how[1] == "auto"]


@pytest.mark.parametrize(("kind", "choice", "tokens"), FROM_THE_HOST)
def test_an_encode_with_layers_from_the_host(
    device: PretendedCuda, kind: str, choice: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "_momentary", lambda: iter(()))
    monkeypatch.setattr(layer_by_layer, "card_of", encoder.card_of)
    launches = []
    for layers in (3, 5):
        stack: Any = quantised_stack(kind, CONFIGS["v1.1"].model_copy(update={"num_layers": layers}))
        mover = PretendedMover(device)
        offload: Any = offload_layers(stack).offload
        offload.start(stack, mover)
        for module in stack.encoder.modules():
            if isinstance(module, (torch.nn.Embedding, RMSNorm)) and id(module.weight) not in brought(stack):
                device.put(module)
        encode: Any = stack.runner._encoder_of(stack)
        for _ in range(2):
            device.reset()
            found = encode.encode(torch.ones(1, tokens, dtype=torch.long))
            assert found.hidden.shape == (1, tokens, 64)
            bool(found.finite)
        launches.append(device.launches.total())
        # One for each layer; the rows of the table; and the number of tokens with the table of documents.
        assert dict(device.copies) == {("cpu", "cuda"): layers + 2}
        assert dict(device.waits) == {"_local_scalar_dense": 1}, "the host waits for more than the check"
        assert len(mover.buffers) == 2 and device.float32_products == 0
        kept = sum(form.weight.nbytes for form in forms_of(stack))
        assert kept / layers <= mover.buffers[0] < kept / layers + 256 * 20
    assert (launches[1] - launches[0]) / 2 == LAUNCHES[kind, choice, tokens]


def test_what_a_device_holds(device: PretendedCuda) -> None:
    """Laying out makes nothing that stays but bytes of the file, and the encode nothing but scales."""
    for kind in ("int8 by us", "Q8_0", "float8 by row"):
        stack = put(device, kind, 2)
        before = sum(form.weight.nbytes for form in forms_of(stack))
        encode_on_cuda(stack)
        assert isinstance(stack.runner, CudaRunner)
        tensors = {}
        for form in forms_of(stack):
            for tensor in (form.joined, form.block_scales, *form.weight.parts.values()):
                if tensor is not None:
                    tensors[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        assert sum(tensors.values()) == before


def forms_of(stack: Any) -> list[Any]:
    return [form for module in stack.modules() if isinstance(module, QuantisedLinear) for form in module.forms]


def test_weights_go_to_the_device_one_by_one(device: PretendedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the host's memory: what comes is 16 bits of a few rows at a time, and what stays is 8 bits."""
    monkeypatch.setattr(int8, "_AT_A_TIME", 1000)
    stack: Any = stack_of(CONFIGS["v1.1"], device="cpu")
    sizes = [linear.weight.nbytes for linear in stack.modules() if isinstance(linear, torch.nn.Linear)]
    for block in stack.encoder.block:
        int8.quantise_block(block, torch.float16, CUDA)
    weights = [moved for moved in device.moved if moved != 4 * 64]  # without the weights of norms
    assert sum(weights) == sum(sizes) and max(weights) <= 2000
    assert sum(form.weight.parts["weight"].nbytes for form in forms_of(stack)) == sum(sizes) / 2
    assert all(form.joined.device == CUDA for form in forms_of(stack))


def test_a_t5_xxl_fits_into_5_gigabytes() -> None:
    """All that stays, on the meta device, beside a projection that is unpacked and the activations of 512 tokens."""
    config = T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_heads=64, num_layers=24, vocab_size=32128, num_decoder_layers=0
    )
    stack: Any = T5EncoderStack(config, ops=NoInit, device="meta", dtype=torch.float16)
    weights: Any = []
    for block in stack.encoder.block:
        int8.quantise_block(block, torch.float16, torch.device("meta"))
        attention, dense = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
        weights += map(byte_weight.weight_of, (attention.qkv, attention.o, dense.wi, dense.wo))
    runs = [(weight, run) for weight in weights for run in byte_products.column_runs(weight)]
    plain = sum(tensor.nbytes for tensor in (*stack.parameters(), *stack.buffers()))
    held = sum(form.weight.nbytes for form in forms_of(stack)) + sum(4 * weight.shape[0] for weight in weights)
    unpacked = max(2 * (run.stop - run.start) * weight.shape[1] for weight, run in runs)
    # Residual, normed input, and gate and up, at the product that needs the most.
    activations = 512 * (4096 * (4 + 2) + 20480 * 2)
    assert len(runs) == 24 * 10 and unpacked == 2 * 20480 * 4096 / 4
    assert plain + held + unpacked + activations < 5.0e9
    # While it is quantised: the table of embeddings is not there yet, and some rows of a projection are, in float32.
    assert held + int8._AT_A_TIME * (2 + 3 * 4) < 5.0e9


@pytest.mark.parametrize("kind", [*GGML_KINDS, "float8_e4m3fn", "float8_e5m2", "int8"])
def test_rows_of_a_quantised_table_are_made_on_the_device(device: PretendedCuda, kind: str) -> None:
    """Constants are there after the first call: CUDA graphs cannot have copies from the host, nor waits."""
    if kind in GGML_KINDS:
        described = GGML_KINDS[kind]
        size = (50, 512 // described.block * described.size)
        weight = QuantisedWeight(described, (50, 512), {"weight": torch.zeros(size, dtype=torch.uint8)})
    else:
        dtype = getattr(torch, kind)
        parts = {"weight": torch.zeros(50, 512).to(dtype), "weight_scale": torch.ones(50)}
        weight = QuantisedWeight(Scaled(kind, dtype), (50, 512), parts)
    table = QuantisedEmbedding(QuantisedForm(weight), torch.float16)
    device.put(table)
    table.form = table.form.to(CUDA)
    ids = torch.ones(5, dtype=torch.int32, device="cuda")
    table(ids)
    device.reset()
    assert table(ids).shape == (5, 512)
    assert not device.copies and not device.waits
