"""Quantised files that cannot be read are refused by the name of their kind, wherever they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import encoder_part, prefixed, scaled_float8, write_file
from conftest import TOY_CONFIGS, build_stack, random_state, write_hf_folder
from test_load import COMFY, output
from test_load_names import wan_named
from toy_quantised import (
    READ,
    Quantise,
    awq,
    awq_of_nunchaku,
    gptq,
    hqq,
    llm_int8,
    mxfp8,
    note,
    nvfp4,
    nvfp4_of_compressed_tensors,
    quantised,
    quanto_float8,
    quanto_int4,
    quanto_int8,
    torchao,
    w4a4_of_comfyui,
    write_quantised,
)

from comfy_nai_t5.checkpoint import holds_t5, read_checkpoint
from nai_t5_core.weights.examine import examine
from nai_t5_core.weights.formats import CheckpointError
from nai_t5_core.weights.load import load, load_encoder

V1_1 = TOY_CONFIGS["v1.1"].encoder_only()
UMT5 = TOY_CONFIGS["umt5"].encoder_only()

KINDS: dict[str, Quantise] = {
    "NVFP4 without ComfyUI's note, which leaves the order of its numbers open": nvfp4,
    "NVFP4 of compressed-tensors": nvfp4_of_compressed_tensors,
    "MXFP8 without ComfyUI's note, which leaves the order of its scales open": mxfp8,
    "convrot_w4a4 of ComfyUI": w4a4_of_comfyui,
    "quanto": quanto_int8,
    "HQQ": hqq,
    "AWQ": awq,
    "AWQ of Nunchaku": awq_of_nunchaku,
    "GPTQ": gptq,
    "torchao": torchao,
}
OTHER_LAYOUTS: list[tuple[str, Quantise]] = [
    ("quanto", quanto_int4),
    ("quanto", quanto_float8),
]


def refusal(kind: str) -> str:
    return rf"holds a T5 quantised as {kind} \(known by .*\), which cannot be read; use a file "


@pytest.mark.parametrize(("kind", "quantise"), [*KINDS.items(), *OTHER_LAYOUTS])
def test_a_kind_is_refused_by_its_name(tmp_path: Path, kind: str, quantise: Quantise) -> None:
    state = quantised(encoder_part(random_state(V1_1)), quantise)
    file = write_quantised(tmp_path / "t5.safetensors", state)
    with pytest.raises(CheckpointError, match=refusal(kind)) as caught:
        load_encoder(file, "float32", "cpu")
    assert len(str(caught.value).splitlines()) == 1
    assert holds_t5(file)
    with pytest.raises(CheckpointError, match=refusal(kind)):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("order", "told"), [(1, "col32"), (2, "col_turing"), (3, "col_ampere"), (4, "number 4"), (255, "number 255")]
)
def test_int8_in_the_order_of_a_gpu_is_refused(tmp_path: Path, order: int, told: str) -> None:
    """Also where a single weight is."""
    state = quantised(encoder_part(random_state(V1_1)), llm_int8)
    file = write_quantised(tmp_path / "t5.safetensors", state)
    assert load_encoder(file, "float32", "cpu")
    state["encoder.block.1.layer.0.SelfAttention.o.weight_format"] = torch.tensor(order, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=refusal(f"int8 of bitsandbytes in the order {told}")):
        load_encoder(write_quantised(file, state), "float32", "cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_under_other_names(tmp_path: Path, kind: str) -> None:
    """In a folder, in Wan's names, under a prefix."""
    folder = write_hf_folder(tmp_path / "hf", V1_1, quantised(encoder_part(random_state(V1_1)), KINDS[kind]))
    state = quantised(encoder_part(random_state(UMT5)), KINDS[kind])
    wan = write_quantised(tmp_path / "wan.safetensors", wan_named(state))
    flux = write_quantised(tmp_path / "flux.safetensors", prefixed(state, COMFY))
    for source in (folder, wan, flux):
        with pytest.raises(CheckpointError, match=refusal(kind)):
            examine(source)


@pytest.mark.parametrize("quantise", [*KINDS.values(), *(quantise for _, quantise in READ.values())])
def test_another_part_of_the_file_may_be_quantised(tmp_path: Path, quantise: Quantise) -> None:
    state = encoder_part(random_state(V1_1))
    others = quantise("model.diffusion_model.double_blocks.0.img_attn.qkv", torch.randn(64, 64))
    others |= quantise("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", torch.randn(64, 64))
    content = prefixed(state, COMFY) | {name: tensor.contiguous() for name, tensor in others.items()}
    loaded = load(write_quantised(tmp_path / "flux.safetensors", content), "float32", "cpu")
    assert torch.equal(output(loaded.stack), output(build_stack(V1_1, state)))
    assert loaded.report.ignored.keys() == others.keys()


@pytest.mark.parametrize("prefix", ["", COMFY])
def test_what_the_header_says(tmp_path: Path, prefix: str) -> None:
    """Where ComfyUI writes all its notes into the header, and one layer is of a kind that cannot be read."""
    stored, meant = scaled_float8(encoder_part(random_state(V1_1)), "weight_scale")
    del stored["scaled_fp8"]
    modules = [name.removesuffix("_scale").removesuffix(".weight") for name in stored if name.endswith("_scale")]
    layers = {prefix + module: {"format": "float8_e4m3fn"} for module in modules}
    layers |= {"model.diffusion_model.double_blocks.0.img_attn.qkv": {"format": "nvfp4"}}
    text = json.dumps({"format_version": "1.0", "layers": layers})
    file = write_quantised(tmp_path / "t5.safetensors", prefixed(stored, prefix), {"_quantization_metadata": text})
    loaded = load_encoder(file, "float32", "cpu")
    assert torch.equal(output(loaded), output(build_stack(V1_1, meant)))
    layers[prefix + modules[3]] = {"format": "nvfp4"}
    text = json.dumps({"format_version": "1.0", "layers": layers})
    write_quantised(file, prefixed(stored, prefix), {"_quantization_metadata": text})
    with pytest.raises(CheckpointError, match=r"SelfAttention\.o\.weight cannot be read as NVFP4: weight is torch"):
        load_encoder(file, "float32", "cpu")


def test_damaged_notes_say_nothing(tmp_path: Path) -> None:
    state = encoder_part(random_state(V1_1))
    query = "encoder.block.0.layer.0.SelfAttention.q"
    for text in (b"{", b"[]", b'{"format": "float8_e4m3fn"}'):
        content = {**state, f"{query}.comfy_quant": torch.tensor(list(text), dtype=torch.uint8)}
        assert torch.equal(
            output(load_encoder(write_file(tmp_path / "t5.safetensors", content), "float32", "cpu")),
            output(build_stack(V1_1, state)),
        )
    content = {**state, f"{query}.comfy_quant": note(format="something_new")}
    with pytest.raises(CheckpointError, match=refusal("something_new of ComfyUI")):
        examine(write_file(tmp_path / "t5.safetensors", content))
