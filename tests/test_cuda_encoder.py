"""Encoders run by the kernels for CUDA, eagerly and from graphs, against the same encoders by torch."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from cuda_toys import CAN_OVERLAP, DEVICE, DTYPES, HAS_GPU, HERE, ONE_ROUNDING, error, exact_of, stack_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nai_t5_core.backends.cuda.device_refusals import missing_triton
from nai_t5_core.backends.cuda.encoder import cuda_encoder
from nai_t5_core.backends.cuda.refusals import refuses
from nai_t5_core.backends.cuda.runner import CudaRunner
from nai_t5_core.facts.scales import LayerScales, StackScales
from nai_t5_core.float16.guard import NotFiniteError, guard, rescale
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.packing import PADDING_POLICIES, PaddingPolicy

if missing := missing_triton():
    pytest.skip(missing, allow_module_level=True)

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no GPU here")

KINDS = ("v1.0", "v1.1", "umt5", "ul2")
# Left-padded, without a real token, full, and padded as usual.
MASK = padding_mask([0, 0, 11, 4], 11)
MASK[0, 7:] = 1
IDS = torch.randint(0, 96, MASK.shape, generator=torch.Generator().manual_seed(5))
SCALES = StackScales((LayerScales(1, 0.5, 0.25), LayerScales(0.5, 0.25, 1), LayerScales(0.125, 0.5, 0.5)), 0.5)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def assert_as_exact(found: Tensor, stack: T5EncoderStack, exact: T5EncoderStack, **batch: Any) -> None:
    """As near to float64 as the stack itself on the CPU."""
    expected = exact(**batch)
    assert found.shape == expected.shape
    assert found.dtype == stack.dtype
    assert error(found, expected) < 1.3 * error(copy.deepcopy(stack).cpu()(**batch), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", PADDING_POLICIES)
def test_the_encoder_is_as_exact_as_the_stack(kind: str, padding: PaddingPolicy) -> None:
    stack, exact = stack_of(TOY_CONFIGS[kind]), exact_of(TOY_CONFIGS[kind])
    found = cuda_encoder(stack, eager=True).encode(IDS, MASK, padding)
    assert_as_exact(found.hidden, stack, exact, input_ids=IDS, attention_mask=MASK, padding=padding)
    assert int(found.finite) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("products", HERE)
def test_scaled_encoders_and_extra_pads(kind: str, products: Any) -> None:
    stack, exact = stack_of(TOY_CONFIGS[kind], scales=SCALES), exact_of(TOY_CONFIGS[kind])
    found = cuda_encoder(stack, eager=True, products=products)(IDS, MASK, "trim", 2)
    assert_as_exact(found, stack, exact, input_ids=IDS, attention_mask=MASK, padding="trim", extra_pad=2)


def test_no_mask_and_a_long_prompt() -> None:
    stack, exact = stack_of(TOY_CONFIGS["v1.1"]), exact_of(TOY_CONFIGS["v1.1"])
    ids = torch.randint(0, 96, (1, 140), generator=torch.Generator().manual_seed(1))
    assert_as_exact(cuda_encoder(stack, eager=True)(ids), stack, exact, input_ids=ids)


def test_what_the_table_cannot_say_is_left_to_the_stack() -> None:
    stack = stack_of(TOY_CONFIGS["v1.1"])
    encoder = cuda_encoder(stack, eager=True)
    holes = MASK.clone()
    holes[2, 3] = 0
    for mask in (holes, MASK[:, None] * MASK[:, :, None]):
        found = encoder.encode(IDS, mask)
        assert torch.equal(found.hidden, stack(IDS, mask))
        assert int(found.finite) == 1


@pytest.mark.parametrize("padding", PADDING_POLICIES)
def test_batches_without_a_token(padding: PaddingPolicy) -> None:
    stack = stack_of(TOY_CONFIGS["v1.1"])
    encoder = cuda_encoder(stack, eager=True)
    for ids, mask in ((IDS[:0], None), (IDS[:, :0], None), (IDS[:0], MASK[:0])):
        assert torch.equal(encoder(ids, mask, padding), stack(ids, mask, padding=padding))
    if padding in ("skip", "trim"):
        nothing = torch.zeros_like(MASK)
        assert torch.equal(encoder(IDS, nothing, padding), stack(IDS, nothing, padding=padding))


def test_inputs_that_the_stack_refuses_are_refused() -> None:
    encoder = cuda_encoder(stack_of(TOY_CONFIGS["v1.1"]), eager=True)
    for ids, mask, options, message in (
        (IDS[0], None, {}, "batch, length"),
        (IDS + 96, None, {}, "outside the vocabulary"),
        (IDS, MASK[:, 1:], {}, "must be equal"),
        (IDS, MASK, {"padding": "none"}, "unknown padding policy"),
        (IDS, MASK, {"padding": "trim", "extra_pad": -1}, "extra_pad"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder(ids, mask, **options)


def changed_in_place(stack: Any) -> None:
    stack.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(-1)
    stack.encoder.block[1].layer[1].DenseReluDense.wo.weight.mul_(2)
    stack.encoder.final_layer_norm.weight.mul_(3)


def replaced(stack: Any) -> None:
    attends = stack.encoder.block[0].layer[0].SelfAttention
    attends.relative_attention_bias.weight = nn.Parameter(attends.relative_attention_bias.weight.flip(0).contiguous())
    attends.qkv.weight = nn.Parameter(attends.qkv.weight.flip(0).contiguous())
    stack.shared.weight = nn.Parameter(stack.shared.weight.flip(0).contiguous())


def rescaled(stack: Any) -> None:
    rescale(stack, 1, LayerScales(0.25, 0.5, 0.5))
    changed_in_place(stack)


CHANGES = (changed_in_place, replaced, rescaled)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(change: Any) -> None:
    stack, exact = stack_of(TOY_CONFIGS["umt5"]), exact_of(TOY_CONFIGS["umt5"])
    encoder = cuda_encoder(stack, eager=True)
    before = encoder(IDS, MASK)
    for one in (stack, exact):
        change(one)
    found = encoder(IDS, MASK)
    assert error(found, before.double()) > 0.1
    assert_as_exact(found, stack, exact, input_ids=IDS, attention_mask=MASK)


def test_inference_tensors_do_not_count_their_changes() -> None:
    with torch.inference_mode():
        stack = stack_of(TOY_CONFIGS["v1.1"])
        encoder = cuda_encoder(stack, eager=True)
        encoder(IDS, MASK)
        changed_in_place(stack)
        assert_as_exact(
            encoder(IDS, MASK), stack, copy.deepcopy(stack).cpu().double(), input_ids=IDS, attention_mask=MASK
        )


@pytest.mark.parametrize("padding", PADDING_POLICIES)
def test_a_result_that_is_not_finite_is_noted(padding: PaddingPolicy) -> None:
    stack = stack_of(TOY_CONFIGS["v1.1"])
    stack.shared.weight[7] = float("inf")
    encoder = cuda_encoder(stack, eager=True)
    for ids, expected in ((IDS.clamp(min=8), 1), (IDS.clamp(max=7), 0)):
        found = encoder.encode(ids, MASK, padding)
        assert int(found.finite) == expected == int(found.hidden.isfinite().all())


def test_a_stack_looks_once_and_leaves_the_rest_to_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = stack_of(TOY_CONFIGS["v1.1"])
    encoder = cuda_encoder(stack, eager=True)
    stack.guard, stack.runner, looks = guard, CudaRunner(eager=True), []
    examine = type(encoder)._examine
    monkeypatch.setattr(type(encoder), "_examine", lambda self: looks.append(self) or examine(self))
    assert torch.equal(stack(IDS, MASK, padding="skip"), encoder.encode(IDS, MASK, "skip").hidden)
    assert len(looks) == 2 and stack.describe_attention() == "auto: kernels for CUDA"
    hook = stack.encoder.block[0].register_forward_hook(lambda *_: None)
    assert encoder.encode_unless_refused(IDS, MASK) is None
    reason = "a EncoderBlock of the model has hooks, or another forward"
    assert stack.describe_attention() == f"auto: sdpa (not the kernels for CUDA: {reason})"
    by_modules = stack(IDS, MASK)
    stack.runner = None
    assert torch.equal(by_modules, stack(IDS, MASK))
    stack.runner = CudaRunner(eager=True)
    hook.remove()
    stack.encoder.block[1].layer[0].SelfAttention.o.weight.data[3, 3] = float("nan")
    with pytest.raises(NotFiniteError, match=r"block\.1"):
        stack(IDS, MASK)


@pytest.mark.parametrize("padding", PADDING_POLICIES)
def test_the_drop_in_class(padding: PaddingPolicy) -> None:
    pytest.importorskip("transformers", reason="the drop-in class is one of its models")
    from hf_toys import hf_model

    from nai_t5_core.hf import NAIT5EncoderModel

    config = TOY_CONFIGS["v1.1"]
    model = NAIT5EncoderModel.from_hf(hf_model(config, random_state(config), torch.float16)).to(DEVICE)
    model.stack.runner, model.padding = CudaRunner(eager=True), padding
    assert "T5 v1.1, fused, torch.float16, kernels for CUDA, padding=" in repr(model)
    assert model.stack.runner.refusal(model.stack) is None
    exact = exact_of(config)(IDS, MASK, padding=padding)
    ids, mask = IDS.to(DEVICE), MASK.to(DEVICE)
    found = model(ids, mask).last_hidden_state
    model.stack.runner = None
    assert found.shape == exact.shape and error(found, exact) < 1.3 * error(model(ids, mask).last_hidden_state, exact)


def test_a_stack_and_its_runner_go_together() -> None:
    stack = stack_of(TOY_CONFIGS["v1.1"])
    stack.runner = CudaRunner(eager=True)
    gone = weakref.ref(stack)
    stack(IDS, MASK)
    del stack
    assert gone() is None


def with_hook(stack: Any) -> None:
    stack.encoder.block[1].layer[1].DenseReluDense.register_forward_hook(lambda *_: None)


def with_subclass(stack: Any) -> None:
    class Linear(nn.Linear):
        pass

    stack.encoder.block[2].layer[0].SelfAttention.o = Linear(64, 64, bias=False).half()


def with_other_dtype(stack: Any) -> None:
    stack.encoder.block[2].layer[0].SelfAttention.o.float()


def with_transposed_weight(stack: Any) -> None:
    linear = stack.encoder.block[0].layer[0].SelfAttention.o
    linear.weight = nn.Parameter(linear.weight.t())


TAMPERED = {with_hook: "hooks", with_subclass: "computes on its own", with_other_dtype: "float32"}
TAMPERED[with_transposed_weight] = "contiguous"


@pytest.mark.parametrize("tamper", TAMPERED)
def test_tampered_models_are_refused_before_and_after(tamper: Any) -> None:
    stack = stack_of(TOY_CONFIGS["v1.1"])
    encoder = cuda_encoder(stack, eager=True)
    tamper(stack)
    assert TAMPERED[tamper] in str(refuses(stack))
    with pytest.raises(ValueError, match=TAMPERED[tamper]):
        encoder(IDS)
    with pytest.raises(ValueError, match=TAMPERED[tamper]):
        cuda_encoder(stack, eager=True)


def test_what_cannot_run_is_refused() -> None:
    config = TOY_CONFIGS["v1.1"]
    assert refuses(stack_of(config)) is None
    assert "float32" in str(refuses(stack_of(config, torch.float32)))
    assert "separate" in str(refuses(build_stack(config, random_state(config), torch.float16, "separate")))
    for d_kv in (8, 48):
        assert f"heads of size {d_kv}" in str(refuses(stack_of(config.model_copy(update={"d_kv": d_kv}))))
    assert "on meta" in str(refuses(T5EncoderStack(config, device="meta", dtype=torch.float16)))
    with torch.enable_grad():
        assert "gradients" in str(refuses(stack_of(config)))
        with pytest.raises(ValueError, match="gradients"):
            cuda_encoder(stack_of(config), eager=True)(IDS)
    with FlopCounterMode(display=False):
        assert "mode" in str(refuses(stack_of(config)))
    if not CAN_OVERLAP:
        with pytest.raises(ValueError, match=r"capability 9\.0"):
            cuda_encoder(stack_of(config), eager=True, products="triton-overlapping")
    with pytest.raises(ValueError, match="unknown products"):
        cuda_encoder(stack_of(config), products="own")  # type: ignore[arg-type]
    if not HAS_GPU:
        with pytest.raises(ValueError, match="eager=True"):
            cuda_encoder(stack_of(config))


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs
# ---------------------------------------------------------------------------------------------------------------------


def batches() -> Iterator[dict[str, Any]]:
    """Of many shapes: tokens in several buckets and beyond, documents beyond the room of a bucket, ids on a device."""
    generator = torch.Generator().manual_seed(3)
    yield {"input_ids": torch.randint(0, 96, (1, 1100), generator=generator)}
    for batch, length in ((1, 1), (1, 16), (1, 17), (3, 40), (20, 6), (1, 300), (2, 1), (7, 77), (1, 9)):
        ids = torch.randint(0, 96, (batch, length), generator=generator)
        ends = torch.randint(0, length + 1, (batch, 1), generator=generator)
        mask = (torch.arange(length)[None] < ends).long()
        yield {"input_ids": ids}
        yield {"input_ids": ids.to(DEVICE), "attention_mask": mask.flip(1)}
        for padding in PADDING_POLICIES:
            yield {"input_ids": ids, "attention_mask": mask, "padding": padding, "extra_pad": batch % 3}


@lru_cache
def expectations(kind: str, dtype: torch.dtype) -> list[tuple[Tensor, float]]:
    """What is exact for every batch, and how far from that a result may be, by the error of the stack on the CPU."""
    exact, on_cpu = exact_of(TOY_CONFIGS[kind]), stack_of(TOY_CONFIGS[kind], dtype, device="cpu")
    found = []
    for batch in batches():
        batch["input_ids"] = batch["input_ids"].cpu()
        expected = exact(**batch)
        found.append((expected, 1.3 * error(on_cpu(**batch), expected) + ONE_ROUNDING[dtype]))
    return found


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("products", HERE)
def test_graphs_equal_the_stack_for_batches_of_many_shapes(kind: str, dtype: torch.dtype, products: Any) -> None:
    stack = stack_of(TOY_CONFIGS[kind], dtype)
    encoder, eager = cuda_encoder(stack, products=products), cuda_encoder(stack, eager=True, products=products)
    found = [encoder.encode(**batch) for batch in batches()]
    again = [encoder(**batch) for batch in batches()]
    assert encoder.graphs is not None
    assert len(encoder.graphs.sizes) >= 6
    for batch, first, second, (expected, limit) in zip(batches(), found, again, expectations(kind, dtype), strict=True):
        assert torch.equal(first.hidden, second)
        assert int(first.finite) == 1
        for hidden in (first.hidden, eager(**batch)):
            assert hidden.shape == expected.shape
            assert error(hidden, expected) < limit


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("under", [torch.no_grad, torch.inference_mode])
def test_graphs_see_changed_weights(change: Any, under: Any) -> None:
    with under():
        stack, exact = stack_of(TOY_CONFIGS["umt5"]), exact_of(TOY_CONFIGS["umt5"])
        encoder = cuda_encoder(stack)
        before = encoder(IDS, MASK)
        for one in (stack, exact):
            change(one)
        found = encoder(IDS, MASK)
        assert error(found, before.double()) > 0.1
        assert_as_exact(found, stack, exact, input_ids=IDS, attention_mask=MASK)


@pytest.mark.cuda
@needs_gpu
def test_graphs_recorded_in_inference_mode_run_outside_of_it_and_the_other_way_round() -> None:
    stack = stack_of(TOY_CONFIGS["v1.1"])
    for first, second in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        encoder = cuda_encoder(stack)
        with first():
            expected = encoder(IDS, MASK).cpu()
        with second():
            assert torch.equal(encoder(IDS, MASK).cpu(), expected)


@pytest.mark.cuda
@needs_gpu
def test_graphs_note_what_is_not_finite_in_the_rows_that_count_alone() -> None:
    stack = stack_of(TOY_CONFIGS["v1.1"])
    stack.shared.weight[7] = float("inf")
    encoder = cuda_encoder(stack)
    bad, good = torch.full((1, 30), 7), torch.full((1, 20), 8)
    # The good row is shorter: rows behind it are still those of the bad one.
    notes = [encoder.encode(ids).finite for ids in (good, bad, good, bad, good)]
    assert [int(note) for note in notes] == [1, 0, 1, 0, 1]


@pytest.mark.cuda
@needs_gpu
def test_calls_from_several_streams_and_threads_do_not_meet() -> None:
    stack = stack_of(TOY_CONFIGS["v1.1"])
    encoder = cuda_encoder(stack)
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 96, (1, length), generator=generator) for length in (20, 30, 60, 200)]
    expected = [encoder(ids) for ids in prompts]
    torch.cuda.synchronize()
    wrong = []

    def call(index: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(encoder(prompts[index]), expected[index]):
                    wrong.append(index)

    with ThreadPoolExecutor() as threads:
        list(threads.map(call, range(len(prompts))))  # raises what a thread raises
    assert wrong == []
