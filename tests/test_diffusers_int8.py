"""Our encoder in 8 bits in a pipeline: near the original, never saved in its place, and undone to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from backend_cases import runner_names
from test_diffusers_families import assert_same
from toy_loras import toy_lora
from toy_offloading import CPU, OFFLOADS, cpu_has_one_name, hooks_of
from toy_pipelines import NEGATIVE, PROMPT, T5, Toy, make, text_encoder

from nai_t5_core.backends.choose import quantize_int8
from nai_t5_core.backends.kernels import build
from nai_t5_core.backends.kernels.build import nearest_set, prepare_kernels, why_not_kernels
from nai_t5_core.backends.kernels.calls import counted
from nai_t5_core.backends.kernels.runners import INT8_KERNELS, best
from nai_t5_core.backends.products import INT8_ONEDNN
from nai_t5_core.diffusers.adapter import replace_text_encoder, restore_text_encoder
from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel
from nai_t5_core.diffusers.encode_prompt import encode_prompt
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.model.encoder import LAYOUTS

MISSING = INT8_ONEDNN.missing(CPU, torch.float32)
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]
__all__ = ["cpu_has_one_name"]  # a fixture for every test here

IDS = torch.randint(3, 4096, (3, 20), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([20, 11, 2])[:, None] > torch.arange(20)
# Of hidden states against float32, relative to the largest: a unit of 8 bits is 1/127 of the largest of a row.
NEAR = {torch.float32: 0.03, torch.bfloat16: 0.04}


@pytest.fixture(params=["kernels", "oneDNN"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes in 8 bits: the kernels, or oneDNN as on a processor that does it better."""
    if request.param == "oneDNN":
        monkeypatch.setattr("nai_t5_core.backends.choose.better_than_kernels", lambda: "this test")
    elif missing := why_not_kernels() or prepare_kernels():
        pytest.skip(missing)
    return str(request.param)


@pytest.fixture(autouse=True)
def meta_is_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is none, tensors without values stand for what is on one; diffusers asks for torch's module of it."""
    monkeypatch.setattr(torch, "meta", torch.cpu, raising=False)


def hidden(encoder: Any) -> Tensor:
    """Of the last of some calls, when everything is in the order that a later one puts it in; zeros at pads."""
    with torch.no_grad():
        states: Tensor = [encoder(IDS, MASK)[0] for _ in range(3)][-1]
    return states * MASK[..., None]


def distance(found: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found.double() - exact.double()).abs().max() / exact.double().abs().max())


def assert_in_8_bits(ours: Any, exact: Tensor, by: str) -> None:
    """It computes in 8 bits, by these products, near what is exact, and says so."""
    with counted() as by_kernels:
        found = hidden(ours)
    assert 1e-4 < distance(found, exact) < NEAR[ours.dtype]
    name = f"{nearest_set().title} kernels" if by == "kernels" else by
    assert runner_names(ours.stack) == {f"{name}, in 8 bits"} and (by_kernels.flops > 0) == (by == "kernels")
    assert f"{ours.dtype}, 8 bits, padding=" in repr(ours)


# ---------------------------------------------------------------------------------------------------------------------
# There and back
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("name", ["pixart-sigma", "sd3", "wan"])
def test_a_pipelines_encoder_in_8_bits_and_back(name: str, dtype: torch.dtype, layout: Any, by: str) -> None:
    toy = make(name)
    old, image, exact = toy.encoder, toy.run(), hidden(toy.encoder)
    before = copy.deepcopy(old.state_dict())
    assert replace_text_encoder(toy.pipe, dtype, layout=layout, quantize="int8") is toy.pipe
    ours = toy.encoder
    assert isinstance(ours, NAIT5EncoderModel) and ours.dtype == dtype
    assert_in_8_bits(ours, exact, by)
    if dtype == torch.float32:  # that of the toy's other parts
        assert torch.isfinite(toy.run()).all() and not torch.equal(toy.run(), image)
    restore_text_encoder(toy.pipe)
    assert toy.encoder is old and torch.equal(toy.run(), image)
    assert all(torch.equal(tensor, before[name]) for name, tensor in old.state_dict().items())
    assert torch.equal(hidden(old), exact)


def test_the_old_encoder_keeps_its_weights() -> None:
    toy = make("pixart-sigma")
    old = toy.encoder
    places = [parameter.data_ptr() for parameter in old.parameters()]
    replace_text_encoder(toy.pipe, quantize="int8")
    restore_text_encoder(toy.pipe)
    assert [parameter.data_ptr() for parameter in old.parameters()] == places


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("is_first", [True, False])
def test_offloading_on_the_cpu(offload: Any, is_first: bool) -> None:
    """Where it hooks into every projection, these multiply with their rounded weights one by one: as near."""
    toy = make("pixart-sigma")
    image, old, exact = toy.run(), toy.encoder, hidden(toy.encoder)
    steps = [lambda: offload(toy.pipe), lambda: replace_text_encoder(toy.pipe, quantize="int8")]
    for step in steps if is_first else reversed(steps):
        step()
    assert "8 bits" in repr(toy.encoder) and hooks_of(toy.encoder)
    assert 1e-4 < distance(hidden(toy.encoder), exact) < NEAR[torch.float32]
    assert torch.isfinite(toy.run()).all()
    restore_text_encoder(toy.pipe)
    assert toy.encoder is old and torch.equal(toy.run(), image)


def test_prompts_are_encoded_before_the_call(by: str) -> None:
    toy = make("wan")
    replace_text_encoder(toy.pipe, quantize="int8")
    call = {name: value for name, value in toy.call.items() if name not in ("prompt", "negative_prompt")}
    expected = toy.run()
    encoded = encode_prompt(toy.pipe, PROMPT, negative_prompt=NEGATIVE, **toy.encode)
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "output_type": "latent", "return_dict": False} | call
    settings.pop("max_sequence_length", None)
    assert_same(torch.as_tensor(toy.pipe(**encoded, generator=generator, **settings)[0]), expected, 1e-3)


def test_a_second_time_sets_the_policy_alone() -> None:
    toy = make("wan")
    replace_text_encoder(toy.pipe, quantize="int8", padding="trim")
    ours = toy.encoder
    for quantize in ("int8", None):
        replace_text_encoder(toy.pipe, quantize=quantize)
        assert toy.encoder is ours and ours.padding == "skip" and "8 bits" in ours.extra_repr()


# ---------------------------------------------------------------------------------------------------------------------
# The encoder itself
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", NEAR)
def test_loaded_and_made_in_8_bits(dtype: torch.dtype, layout: Any, by: str, tmp_path: Path) -> None:
    theirs = text_encoder()
    exact = hidden(theirs)
    theirs.save_pretrained(tmp_path)
    loaded = NAIT5EncoderModel.from_pretrained(tmp_path, dtype=dtype, layout=layout, quantize="int8")
    made = NAIT5EncoderModel.from_hf(theirs, dtype, layout, quantize="int8")
    for ours in (loaded, made):
        assert_in_8_bits(ours, exact, by)
    assert torch.equal(hidden(loaded), hidden(made)) and torch.equal(hidden(theirs), exact)
    released = NAIT5EncoderModel.from_hf(theirs, dtype, layout, release=True, quantize="int8")
    assert torch.equal(hidden(released), hidden(made)) and all(weight.is_meta for weight in theirs.parameters())
    with pytest.raises(ValueError, match="are in 8 bits, and its originals cannot be had of it"):
        released.give_back(theirs)


def test_a_model_of_ours_quantised_by_hand(by: str) -> None:
    """Its projections cast their inputs, as a stand-in's do, and are taken like any other."""
    exact = hidden(text_encoder())
    ours = NAIT5EncoderModel.from_hf(text_encoder())
    quantize_int8(ours.stack)
    assert_in_8_bits(ours, exact, by)


@pytest.mark.parametrize("save_format", ["native", "transformers"])
def test_8_bits_are_not_saved_for_the_model(save_format: Any, tmp_path: Path) -> None:
    ours = NAIT5EncoderModel.from_hf(text_encoder(), quantize="int8")
    with pytest.raises(
        ValueError, match="are in 8 bits, and its originals cannot be had of it: save or give them back"
    ):
        ours.save_pretrained(tmp_path / "folder", save_format=save_format)
    assert not (tmp_path / "folder").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def _nothing(_: Toy) -> None:
    pass


def _in_float16(toy: Toy) -> None:
    toy.encoder.half()


def _ours_already(toy: Toy) -> None:
    replace_text_encoder(toy.pipe)


def _offload_elsewhere(toy: Toy) -> None:
    toy.pipe.enable_model_cpu_offload(device="meta")


def _groups_elsewhere(toy: Toy) -> None:
    toy.pipe.enable_group_offload(torch.device("meta"), CPU, offload_type="leaf_level")


# What is done to the pipeline, what replace_text_encoder is told beside, and what it says.
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "value": (_nothing, {"quantize": "int4"}, "quantize='int4'; allowed: None, 'int8'"),
    "nothing": (_nothing, {"quantize": ""}, "quantize=''; allowed: None, 'int8'"),
    "value where ours is": (_ours_already, {"quantize": "int4"}, "quantize='int4'; allowed: None, 'int8'"),
    "float16": (_nothing, {"dtype": torch.float16}, r"float16 on cpu; 8 bits are for float32 and bfloat16 on the CPU"),
    "float64": (_nothing, {"dtype": "float64"}, r"float64 on cpu; 8 bits are for float32 and bfloat16 on the CPU"),
    "own float16": (_in_float16, {}, r"float16 on cpu; 8 bits are for float32 and bfloat16 on the CPU"),
    "layout": (_nothing, {"layout": "tight"}, "unknown layout 'tight'"),
    "ours": (_ours_already, {}, r"text_encoder is ours already, and not in 8 bits; call restore_text_encoder\(pipe\)"),
    "offload": (_offload_elsewhere, {}, "8 bits are computed on the CPU, and the pipeline's offloading has .* on meta"),
    "groups": (_groups_elsewhere, {}, "8 bits are computed on the CPU, and the pipeline's offloading has .* on meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(case: str) -> None:
    prepare, told, message = REFUSED[case]
    toy = make("pixart-sigma")
    prepare(toy)
    encoder, hooks = toy.encoder, hooks_of(toy.encoder)
    before = {name: (tensor, tensor.clone()) for name, tensor in encoder.state_dict(keep_vars=True).items()}
    with pytest.raises(ValueError, match=message):
        replace_text_encoder(toy.pipe, **{"quantize": "int8", **told})
    assert toy.encoder is encoder and hooks_of(encoder) == hooks
    for name, tensor in encoder.state_dict(keep_vars=True).items():
        assert tensor is before[name][0] and torch.equal(tensor, before[name][1])


@pytest.mark.parametrize("make_ours", ["replace", "from_hf", "from_pretrained"])
def test_a_processor_without_products_of_bytes(make_ours: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for check in ("_is_vnni_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: False)
    monkeypatch.setattr(build, "_processor_flags", frozenset)
    toy = make("pixart-sigma")
    old = toy.encoder
    ways = {
        "replace": lambda: replace_text_encoder(toy.pipe, quantize="int8"),
        "from_hf": lambda: NAIT5EncoderModel.from_hf(old, release=True, quantize="int8"),
        # It is told before the checkpoint is looked for.
        "from_pretrained": lambda: NAIT5EncoderModel.from_pretrained(tmp_path / "nothing", quantize="int8"),
    }
    with pytest.raises(ValueError, match=r"to int8: this processor has no fast products of bytes \(AVX512-VNNI or AMX"):
        ways[make_ours]()
    assert toy.encoder is old and not any(weight.is_meta for weight in old.parameters())


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"quantize": "int4"}, "quantize='int4'; allowed: None, 'int8'"),
        (
            {"quantize": "int8", "device_map": "cuda", "dtype": torch.bfloat16},
            "for models of diffusers on the CPU, and",
        ),
        ({"quantize": "int8", "device_map": "meta"}, "8 bits are for float32 and bfloat16 on the CPU"),
        ({"quantize": "int8", "dtype": torch.float16}, "8 bits are for float32 and bfloat16 on the CPU"),
        ({"load_in_8bit": True}, "load_in_8bit=True is not done by from_pretrained: .* quantize='int8' for 8 bits"),
    ],
)
def test_loading_refuses_before_the_checkpoint_is_looked_for(
    told: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nai_t5_core.diffusers.drop_in.resolve_device", torch.device)
    with pytest.raises(ValueError, match=message):
        NAIT5EncoderModel.from_pretrained(tmp_path / "nothing", **told)


def test_a_checkpoint_in_float16_wants_another_dtype(tmp_path: Path) -> None:
    text_encoder().half().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model in torch\.float16 on cpu to int8: .* 8 bits are for float32 and bf"):
        NAIT5EncoderModel.from_pretrained(tmp_path, quantize="int8")
    assert "8 bits" in repr(NAIT5EncoderModel.from_pretrained(tmp_path, dtype=torch.bfloat16, quantize="int8"))


@pytest.mark.parametrize("move", [{"dtype": torch.bfloat16}, {"device": "meta"}])
def test_it_cannot_be_moved_or_cast(move: dict[str, Any]) -> None:
    toy = make("pixart-sigma")
    replace_text_encoder(toy.pipe, quantize="int8")
    exact = hidden(toy.encoder)
    for whole in (toy.encoder, toy.pipe):
        with pytest.raises(ValueError, match="is prepacked or quantised for the CPU, and cannot be moved or cast"):
            whole.to(*move.values())
    assert torch.equal(hidden(toy.encoder), exact)


def test_offloading_to_another_device_is_told_when_it_moves_the_encoder() -> None:
    toy = make("pixart-sigma")
    replace_text_encoder(toy.pipe, quantize="int8")
    toy.pipe.enable_model_cpu_offload(device="meta")
    with pytest.raises(ValueError, match=r"quantised for the CPU, and cannot be moved or cast to .* on meta"):
        toy.run()


def test_what_is_beside_the_weights_or_more_than_they_were_is_not_dropped() -> None:
    toy = make("pixart-sigma")
    replace_text_encoder(toy.pipe, quantize="int8")
    ours = toy.encoder
    loras = LiveLoras(ours)
    loras.add(toy_lora(T5))
    with pytest.raises(ValueError, match="has an adapter or live LoRA beside it"):
        restore_text_encoder(toy.pipe)
    loras.clear()
    ours.resize_token_embeddings(T5.vocab_size + 8, mean_resizing=False)
    with pytest.raises(ValueError, match="has 4104 rows, and that of the T5EncoderModel has 4096"):
        restore_text_encoder(toy.pipe)
    assert toy.encoder is ours


def test_quantised_by_hand_what_was_taken_over_does_not_come_back() -> None:
    """Then nobody has the originals any more."""
    toy = make("pixart-sigma")
    replace_text_encoder(toy.pipe)
    quantize_int8(toy.encoder.stack)
    with pytest.raises(ValueError, match="are in 8 bits, and its originals cannot be had of it"):
        restore_text_encoder(toy.pipe)


def test_the_kernels_in_8_bits_are_preferred_where_they_run() -> None:
    if missing := why_not_kernels() or best(INT8_KERNELS).missing(CPU, torch.float32) or prepare_kernels():
        pytest.skip(missing)
    name = best(INT8_KERNELS).name
    assert runner_names(NAIT5EncoderModel.from_hf(text_encoder(), quantize="int8").stack) == {name}
