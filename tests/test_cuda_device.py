"""What users do, on a CUDA device: run with ``pytest -m cuda``."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, random_state
from hf_toys import MASK, V1_1_IDS, assert_near, hf_model
from toy_loras import toy_lora

from nai_t5_core.backends.compiled import compile_stack
from nai_t5_core.backends.cuda.measured_card import MeasuredCard
from nai_t5_core.backends.cuda.runner import CudaRunner
from nai_t5_core.bench.doctor import DoctorSettings, choosing, first_encode, memory, numbers, own_kernels
from nai_t5_core.bench.doctor.model import weight_bytes
from nai_t5_core.bench.doctor.patient import Patient
from nai_t5_core.bench.peers import own_t5
from nai_t5_core.facts.config import named_config
from nai_t5_core.facts.families import family_names
from nai_t5_core.float16.guard import NotFiniteError, ScaleTightenedWarning, encode_guarded
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.prompts.text_encoder import TextEncoder

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

CONFIG = TOY_CONFIGS["v1.1"]
PROMPTS = ["a red cat", "", "two dogs play with a ball in the park, soft light, 35mm film", "a fox"]


def embedded(**options: Any) -> TextEncoder:
    return TextEncoder.from_pretrained(device="cuda", dtype="float16", **options)


@pytest.fixture(scope="module")
def exact() -> TextEncoder:
    return TextEncoder.from_pretrained(device="cpu", dtype="float64")


@pytest.mark.parametrize("family", [None, *family_names()])
@pytest.mark.parametrize("optimize", [True, False])
def test_every_family_is_encoded_as_on_the_cpu(exact: TextEncoder, family: Any, optimize: bool) -> None:
    encoder = embedded(optimize=optimize)
    assert ("kernels for CUDA" in repr(encoder)) == optimize
    found, expected = encoder.encode(PROMPTS, family), exact.encode(PROMPTS, family)
    assert found.hidden_states.is_cuda and found.attention_mask.is_cuda
    assert torch.equal(found.attention_mask.cpu(), expected.attention_mask)
    assert_near(found.hidden_states.double().cpu(), expected.hidden_states, 5e-3)


@pytest.mark.parametrize("by_kernels", [True, False])
def test_float16_that_overflows_is_tightened_and_exact(by_kernels: bool) -> None:
    state = random_state(CONFIG)
    state["encoder.block.1.layer.1.DenseReluDense.wo.weight"] *= 5e4
    stack = build_stack(CONFIG, state, torch.float16).cuda()
    expected = build_stack(CONFIG, state, torch.float64)(V1_1_IDS, MASK)
    # By these products, which round what is added to the residual; those that do not have nothing that overflows.
    stack.runner = CudaRunner(products="torch") if by_kernels else None
    with pytest.warns(ScaleTightenedWarning):
        found = encode_guarded(stack, V1_1_IDS, MASK)
    assert_near(found.double().cpu(), expected, 5e-3)
    assert_near(encode_guarded(stack, V1_1_IDS, MASK).double().cpu(), expected, 5e-3)


@pytest.mark.parametrize("by_kernels", [True, False])
def test_a_damaged_weight_is_named(by_kernels: bool) -> None:
    stack = build_stack(CONFIG, random_state(CONFIG), torch.float16).cuda()
    stack.encoder.block[1].layer[0].SelfAttention.o.weight.data[3, 3] = float("nan")  # type: ignore[union-attr, index]
    stack.runner = CudaRunner() if by_kernels else None
    with pytest.raises(NotFiniteError, match=r"block\.1"):
        encode_guarded(stack, V1_1_IDS, MASK)


def test_live_loras_come_and_go() -> None:
    encoder = embedded()
    before = encoder.encode(PROMPTS).hidden_states
    loras = LiveLoras(encoder)
    loras.add(toy_lora(encoder.stack.config), 0.5)
    assert "not the kernels" in repr(encoder)
    assert not torch.allclose(encoder.encode(PROMPTS).hidden_states, before, atol=1e-2)
    loras.clear()
    assert torch.equal(encoder.encode(PROMPTS).hidden_states, before)


def test_encoders_can_be_copied_after_use() -> None:
    encoder = embedded()
    before = encoder.encode(PROMPTS).hidden_states
    assert torch.equal(copy.deepcopy(encoder.stack)(*_batch(encoder)), encoder.stack(*_batch(encoder)))
    assert torch.equal(encoder.encode(PROMPTS).hidden_states, before)


def _batch(encoder: TextEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = encoder.tokenizer(PROMPTS)
    return torch.tensor(tokens.input_ids), torch.tensor(tokens.attention_mask)


def test_threads_and_streams_do_not_meet() -> None:
    encoder = embedded()
    expected = [encoder.encode([prompt]).hidden_states for prompt in PROMPTS]
    wrong = []

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                found = encoder.encode([PROMPTS[number]]).hidden_states
                torch.cuda.current_stream().synchronize()
                if not torch.equal(found, expected[number]):
                    wrong.append(number)

    with ThreadPoolExecutor() as threads:
        list(threads.map(work, range(4)))  # raises what a thread raises
    assert wrong == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_a_second_device(exact: TextEncoder) -> None:
    """While the first is the current one, and after a move from one to the other."""
    encoder = TextEncoder.from_pretrained(dtype="float16", device="cuda:1")
    found = encoder.encode(PROMPTS).hidden_states
    assert found.device == torch.device("cuda", 1)
    expected = exact.encode(PROMPTS).hidden_states
    assert_near(found.double().cpu(), expected, 1e-2)
    encoder.stack.to("cuda:0")
    moved = encoder.encode(PROMPTS).hidden_states
    assert moved.device == torch.device("cuda", 0)
    assert_near(moved.double().cpu(), expected, 1e-2)


def test_what_the_doctor_measures_is_valid_and_right() -> None:
    found = choosing.measure_choice(Patient(DoctorSettings(device="cuda")))
    assert found["wrong"] == []
    measured = MeasuredCard.model_validate_json(json.dumps(found["measured"]))
    assert measured.attention and measured.card == torch.cuda.get_device_name()


@pytest.mark.parametrize(
    "check", [numbers.check_stacks, numbers.check_masks, numbers.check_generation, own_kernels.check]
)
def test_the_doctor_finds_nothing_wrong(check: Callable[[Patient], dict[str, Any]]) -> None:
    found = check(Patient(DoctorSettings(device="cuda")))
    assert found["wrong"] == [] and found["checked"] > 0


def test_the_first_encode_of_a_fresh_process_is_soon() -> None:
    """Without reading weights, with kernels that an earlier process has left on the disk."""
    first_encode.in_a_fresh_process("t5-v1_1-base", "cuda", 1)
    times = first_encode.in_a_fresh_process("t5-v1_1-base", "cuda", 1)
    assert times["start_seconds"] + times["first_seconds"] <= first_encode.MOST_SECONDS
    assert times["second_seconds"] < 0.1


def test_what_an_encoder_takes_of_the_card() -> None:
    """Its weights, and no second copy of them while it is loaded."""
    found = memory.measure(Patient(DoctorSettings(device="cuda", model="t5-v1_1-large")))
    in_16_bits, in_8_bits = weight_bytes(named_config("t5-v1_1-large"))
    for kind, weights in (("float16", in_16_bits), ("int8", in_8_bits)):
        if each := found["kinds"].get(kind):
            assert weights <= each["kept_bytes"] < 1.02 * weights + (8 << 20)
            assert each["most_at_load"] <= memory.MOST_AT_LOAD * each["kept_bytes"] + (64 << 20)
            assert each["most_while_encoding"] < each["kept_bytes"] + (128 << 20)
            assert "kernels for CUDA" in each["by"]


@pytest.mark.parametrize("record_at", [1, 2, 3])
def test_results_are_the_same_before_and_after_a_graph_is_recorded(record_at: int) -> None:
    encoder = embedded()
    expected = encoder.encode(PROMPTS).hidden_states
    encoder.stack.runner = CudaRunner(record_at=record_at)
    for _ in range(4):
        assert torch.equal(encoder.encode(PROMPTS).hidden_states, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_in_tiles_are_right_on_the_device(dtype: torch.dtype) -> None:
    """Every tile that is tried, with the sizes of a T5-XXL's layer, against products in float32."""
    from nai_t5_core.backends.cuda.card import card_of
    from nai_t5_core.backends.cuda.tiles import tile_candidates, tiled

    card = card_of(torch.device("cuda"))
    assert card is not None
    if card.is_amd:
        pytest.skip("products in tiles are for NVIDIA's cards")
    x, weight = torch.randn(500, 4096, device="cuda"), torch.randn(4096, 4096, device="cuda") / 64
    exact = x.to(dtype).double() @ weight.to(dtype).double().t()
    for kind in ("plain", "gated", "summed"):
        for tile in tile_candidates(kind, card.capability == (9, 0)):  # type: ignore[arg-type]
            gated = kind == "gated"
            epilogue: tuple[Any, bool] = ("relu", True) if gated else (None, False)
            found = tiled(x.to(dtype), weight.to(dtype), tile, torch.float32, *epilogue).sum(0)
            gates, up = exact.chunk(2, -1)
            assert_near(found.double(), gates.relu() * up if gated else exact, 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The drop-in class
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v1.1", "v1.0", "umt5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_drop_in_class_is_made_and_given_back_on_the_device(kind: str, dtype: torch.dtype) -> None:
    from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel

    theirs: Any = hf_model(TOY_CONFIGS[kind], dtype=dtype).cuda()
    ids, mask = V1_1_IDS.cuda(), MASK.cuda()
    with torch.no_grad():
        expected = theirs(ids, mask)[0]
        ours = NAIT5EncoderModel.from_hf(theirs, release=True)
        assert ours.device.type == "cuda"
        assert ("kernels for CUDA" in repr(ours)) == (dtype == torch.float16)
        assert_near(ours(ids, mask)[0], expected, 1e-5 if dtype == torch.float32 else 1e-2)
        ours.give_back(theirs)
        assert_near(theirs(ids, mask)[0], expected, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("mode", ["cpu_offload", "cpu_offload_with_hook"])
def test_the_drop_in_class_is_offloaded(mode: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel

    ours = NAIT5EncoderModel.from_hf(hf_model(CONFIG, dtype=torch.float16))
    with torch.no_grad():
        expected = copy.deepcopy(ours).double()(V1_1_IDS, MASK)[0]
        getattr(accelerate, mode)(ours, torch.device("cuda", 0))
        found = ours(V1_1_IDS.cuda(), MASK.cuda())[0]
    assert found.is_cuda
    assert_near(found.double().cpu(), expected, 1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Generation, and what torch compiles
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v1.1", "v1.0", "umt5"])
@pytest.mark.parametrize("beams", [1, 4])
def test_texts_are_those_of_the_cpu(kind: str, beams: int) -> None:
    state = random_state(TOY_CONFIGS[kind])
    here, there = (own_t5(TOY_CONFIGS[kind], state, torch.float32).to(device) for device in ("cpu", "cuda"))
    options: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 20}
    expected = here.generate(V1_1_IDS, MASK, **options)
    assert torch.equal(there.generate(V1_1_IDS.cuda(), MASK.cuda(), **options).cpu(), expected)
    assert torch.equal(there.generate(V1_1_IDS.cuda(), MASK.cuda(), fixed_shapes=True, **options).cpu(), expected)


def test_a_compiled_decoder_gives_the_same_text() -> None:
    state = random_state(CONFIG)
    model = own_t5(CONFIG, state, torch.float32).cuda()
    expected = model.generate(V1_1_IDS.cuda(), MASK.cuda(), max_new_tokens=12, fixed_shapes=True)
    model.decoder.compile()
    found = model.generate(V1_1_IDS.cuda(), MASK.cuda(), max_new_tokens=12, fixed_shapes=True)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_compiled_encoder_is_as_exact(mode: str | None) -> None:
    state = random_state(CONFIG)
    expected = build_stack(CONFIG, state, torch.float64)(V1_1_IDS, MASK)
    stack = compile_stack(build_stack(CONFIG, state, torch.float16).cuda(), mode=mode, buckets=(128,))
    with torch.no_grad():
        for _ in range(3):
            assert_near(stack(V1_1_IDS, MASK).double().cpu(), expected, 5e-3)


def test_gradients_are_recorded_after_a_call_in_inference_mode() -> None:
    stack = build_stack(CONFIG, random_state(CONFIG)).cuda()
    with torch.inference_mode():
        stack(V1_1_IDS, MASK)
    stack.requires_grad_(True)
    stack(V1_1_IDS, MASK).sum().backward()
    assert all(parameter.grad is not None for parameter in stack.parameters())
