"""Quantised files stay quantised where they are loaded, and give what their unpacked weights give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backend_cases import by_modules
from checkpoints import encoder_part, prefixed, spiece_model, write_file
from conftest import padding_mask, random_state, write_hf_folder
from test_load_names import wan_named
from toy_gguf import gguf, gguf_name, write_gguf
from toy_loras import toy_lora, toy_tables
from toy_quantised import READ, Tensors, quantised, write_quantised

from comfy_nai_t5.checkpoint import read_checkpoint
from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.backends.quantised.projections import QuantisedEmbedding, QuantisedLinear, stays_quantised
from nai_t5_core.facts.config import T5Config
from nai_t5_core.float16.guard import encode_guarded
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.lora.loras import Loras
from nai_t5_core.model.encoder import LAYOUTS, Layout, T5EncoderStack
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.prompts.textual_inversion import add_embeddings
from nai_t5_core.weights.examine import examine
from nai_t5_core.weights.formats import CheckpointError, open_checkpoint
from nai_t5_core.weights.load import load_encoder, load_t5

# Rows of whole blocks of any kind.
CONFIG = T5Config(
    vocab_size=96, d_model=256, d_kv=64, d_ff=512, num_heads=4, num_layers=2, num_decoder_layers=0, gated=True
)
UMT5 = CONFIG.model_copy(update={"bias_per_layer": True})
IDS, MASK = torch.arange(18).reshape(2, 9) + 3, padding_mask([9, 4], 9)
SAFETENSORS = pytest.mark.parametrize("name", READ)
EVERY = pytest.mark.parametrize("name", [*READ, *GGML_KINDS])


def state_of(name: str, config: T5Config = CONFIG) -> Tensors:
    torch.manual_seed(0)
    return quantised(encoder_part(random_state(config)), READ[name][1])


def file_of(name: str, folder: Path) -> Path:
    if name in GGML_KINDS:
        return write_gguf(folder / "t5.gguf", encoder_part(random_state(CONFIG)), name)
    return write_quantised(folder / "t5.safetensors", state_of(name))


def kinds_in(stack: T5EncoderStack) -> set[str]:
    linears = [module for module in stack.modules() if isinstance(module, QuantisedLinear)]
    return {form.weight.kind.name for linear in linears for form in linear.forms}


@EVERY
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_gives_what_the_unpacked_weights_give(tmp_path: Path, name: str, layout: Layout) -> None:
    file = file_of(name, tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        ours = load_encoder(file, dtype, "cpu", layout)
        meant = by_modules(load_encoder(file, dtype, "cpu", layout, unpack=True))
        assert kinds_in(ours) == {READ[name][0] if name in READ else name}
        assert isinstance(ours.shared, QuantisedEmbedding) == (name in GGML_KINDS)
        assert stays_quantised(ours) and not stays_quantised(meant)
        assert (ours.dtype, ours.device) == (meant.dtype, meant.device)
        found, expected = ours.state_dict(), meant.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        with torch.no_grad():
            difference = (ours(IDS, MASK) - meant(IDS, MASK)).abs().max()
        assert float(difference) <= 100 * torch.finfo(dtype).eps


@SAFETENSORS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_plain_weight_beside_quantised_ones_stays_what_it_is(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Norms and scales are multiplied into the rows of a call, and into nothing else."""
    state, plain = state_of(name), "encoder.block.0.layer.0.SelfAttention.k"
    state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{plain}.")}
    state[f"{plain}.weight"] = random_state(CONFIG)[f"{plain}.weight"].to(dtype)
    norm = "encoder.block.0.layer.0.layer_norm.weight"
    state[norm] = torch.linspace(0.5, 2, CONFIG.d_model)
    file = write_quantised(tmp_path / "t5.safetensors", state)
    stack = load_encoder(file, "float32", "cpu")
    attention: Any = stack.encoder.block[0].layer[0]
    with torch.no_grad():
        first = stack(IDS, MASK)
        for scale in (1.0, 0.5):
            attention.SelfAttention.qkv.multiply_rows(scale, 0)
            weights = [attention.SelfAttention.qkv.plain() for _ in range(2)]
            assert torch.equal(*weights)
            own = state[f"{plain}.weight"].float() * state[norm] * scale
            inner = CONFIG.num_heads * CONFIG.d_kv
            assert torch.equal(weights[0][inner : 2 * inner], own)
        attention.SelfAttention.qkv.multiply_rows(2.0, 0)
        assert torch.equal(stack(IDS, MASK), first)


@SAFETENSORS
def test_it_may_have_other_names(tmp_path: Path, name: str) -> None:
    """In a folder, under a prefix, in Wan's names."""
    state = state_of(name)
    folder = write_hf_folder(tmp_path / "hf", CONFIG, state)
    prefix = write_quantised(tmp_path / "flux.safetensors", prefixed(state, "text_encoders.t5xxl.transformer."))
    wan = write_quantised(tmp_path / "wan.safetensors", wan_named(state_of(name, UMT5)))
    for source in (folder, prefix, wan):
        examination = examine(source)
        assert not examination.faults and len(examination.quantised) == 14
        assert kinds_in(load_encoder(source, "float32", "cpu")) == {READ[name][0]}


@SAFETENSORS
def test_values_are_the_kinds(tmp_path: Path, name: str) -> None:
    """What a file's tensors mean is what their kind makes of them, and a whole T5 is read so, too."""
    file = file_of(name, tmp_path)
    examination, raw = examine(file), open_checkpoint(file)
    key = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    stored = examination.quantised[key]
    weight = stored.weight(raw)
    assert weight.shape == (CONFIG.d_model, CONFIG.d_ff)
    assert torch.equal(examination.read(key).float(), weight.kind.unpack(weight.parts, slice(0, CONFIG.d_model)))
    assert {raw.tensors[full].file for full in stored.parts.values()} == {file}


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

QUERY = "encoder.block.1.layer.0.SelfAttention.q"
# Leaves that a kind cannot do without, and what is said without them.
NEEDED = {
    "NVFP4": ("weight_scale", "weight_scale_2"),
    "MXFP8": ("weight_scale",),
    "int8, by weight": ("weight_scale",),
    "NF4": ("weight.absmax", "weight.quant_map", "weight.nested_quant_map"),
    "NF4, not nested": ("weight.absmax", "weight.quant_map"),
}


@pytest.mark.parametrize(("name", "leaf"), [(name, leaf) for name, leaves in NEEDED.items() for leaf in leaves])
def test_a_part_is_missing(tmp_path: Path, name: str, leaf: str) -> None:
    state = state_of(name)
    del state[f"{QUERY}.{leaf}"]
    part = leaf.removeprefix("weight.")
    with pytest.raises(CheckpointError, match=rf"{QUERY}.weight cannot be read as {READ[name][0]}: {part} is missing"):
        load_encoder(write_quantised(tmp_path / "t5.safetensors", state), "float32", "cpu")


@SAFETENSORS
def test_a_part_has_another_length(tmp_path: Path, name: str) -> None:
    """Of every tensor that stands for a weight: a row less, and a number less in each."""
    state = state_of(name)
    parts = [key for key in state if key.startswith(f"{QUERY}.") and "comfy" not in key and "quant_state" not in key]
    parts = [key for key in parts if state[key].ndim and state[key].numel() > 1 and "weight_format" not in key]
    assert parts
    for key in parts:
        for shorter in [state[key][1:], state[key][..., 1:]][: state[key].ndim]:
            if shorter.numel() == 0 or shorter.shape[-1:] == (0,):
                continue
            with pytest.raises(CheckpointError, match=rf"{QUERY}.weight (cannot be read as|has shape)"):
                load_encoder(write_quantised(tmp_path / "t5.safetensors", {**state, key: shorter.clone()}), "float32")


FLOATS = {
    "NVFP4": ("weight_scale_2", "weight_scale"),
    "int8": ("weight_scale",),
    "float8, by rows": ("weight_scale",),
    "float8, in blocks": ("weight_scale_inv",),
    "LLM.int8": ("SCB",),
    "NF4": ("weight.nested_absmax",),
    "NF4, not nested": ("weight.absmax", "weight.quant_map"),
}


@pytest.mark.parametrize(("name", "leaf"), [(name, leaf) for name, leaves in FLOATS.items() for leaf in leaves])
@pytest.mark.parametrize("unpack", [False, True])
def test_a_scale_is_not_finite(tmp_path: Path, name: str, leaf: str, unpack: bool) -> None:
    state = state_of(name)
    scale = state[f"{QUERY}.{leaf}"].float()
    scale.view(-1)[-1] = torch.nan
    state[f"{QUERY}.{leaf}"] = scale.to(state[f"{QUERY}.{leaf}"].dtype)
    file = write_quantised(tmp_path / "t5.safetensors", state)
    message = rf"{QUERY}.weight, of kind {READ[name][0]}, is damaged: .* holds NaN or infinity"
    with pytest.raises(CheckpointError, match=message):
        load_encoder(file, "float32", "cpu", unpack=unpack)


@pytest.mark.parametrize("kind", GGML_KINDS)
def test_the_scale_of_a_block_is_not_finite(tmp_path: Path, kind: str) -> None:
    file = file_of(kind, tmp_path)
    described = GGML_KINDS[kind]
    start = next(t.data_offset for t in gguf.GGUFReader(file).tensors if t.name == gguf_name(f"{QUERY}.weight"))
    content = bytearray(file.read_bytes())
    for place in described.halves:
        damaged = content.copy()
        at = start + 3 * described.size + place
        damaged[at : at + 2] = b"\x00\x7c"
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{QUERY}.weight, of kind {kind}, is damaged: the scale of a block"):
            load_encoder(file, "float32", "cpu")


def test_what_tells_the_blocks_of_bitsandbytes_is_damaged(tmp_path: Path) -> None:
    state = state_of("NF4")
    for text in (b"{", b'{"shape": [256], "blocksize": 64}', b'{"shape": [256, 256], "blocksize": "64"}'):
        state[f"{QUERY}.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
        with pytest.raises(CheckpointError, match="which tells shape and blocks of NF4 of bitsandbytes, can"):
            examine(write_quantised(tmp_path / "t5.safetensors", state))


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    file = file_of("Q8_0", tmp_path)
    examination = examine(file)
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="has become shorter since it was opened"):
        for name in examination.quantised:
            examination.quantised_weight(name)


# ---------------------------------------------------------------------------------------------------------------------
# What a model can do
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Q4_K", "NF4", "int8, rotated"])
def test_a_whole_t5_is_unpacked(tmp_path: Path, name: str) -> None:
    if name in GGML_KINDS:
        config = CONFIG.model_copy(update={"num_decoder_layers": 2})
        file = write_gguf(tmp_path / "whole.gguf", random_state(config), name, config=config)
        assert not stays_quantised(load_t5(file, "float32", "cpu"))


def test_float16_is_kept_in_range(tmp_path: Path) -> None:
    """The guard changes the scales of a projection's rows, and the bytes stay what they are."""
    state = encoder_part(random_state(CONFIG))
    state["encoder.block.1.layer.1.DenseReluDense.wo.weight"] *= 5e4
    file = write_gguf(tmp_path / "t5.gguf", state, "Q8_0")
    exact = by_modules(load_encoder(file, "float32", "cpu", unpack=True))
    for layout in LAYOUTS:
        stack = load_encoder(file, "float16", "cpu", layout)
        with torch.no_grad(), pytest.warns(UserWarning, match="float16 overflowed"):
            found = encode_guarded(stack, IDS, MASK)
        with torch.no_grad():
            meant = exact(IDS, MASK)
        assert float((found - meant).abs().max()) <= 5e-3 * float(meant.abs().max())
        assert stays_quantised(stack)


def test_it_moves_and_is_cast(tmp_path: Path) -> None:
    stack = load_encoder(file_of("Q5_K", tmp_path), "float32", "cpu")
    before = [
        form.weight.parts for module in stack.modules() if isinstance(module, QuantisedLinear) for form in module.forms
    ]
    stack.to(torch.bfloat16)
    assert stack.dtype == torch.bfloat16
    after = [
        form.weight.parts for module in stack.modules() if isinstance(module, QuantisedLinear) for form in module.forms
    ]
    assert all(torch.equal(old["weight"], new["weight"]) for old, new in zip(before, after, strict=True))
    with torch.no_grad():
        assert stack(IDS, MASK).dtype == torch.bfloat16
    stack.to("meta")
    assert stack.device.type == "meta"


def test_bytes_are_mapped_and_not_copied(tmp_path: Path) -> None:
    """A change of the file shows in the model: nothing was read into memory of its own."""
    for name in ("Q8_0", "float8, by rows"):
        file = file_of(name, tmp_path)
        stack = load_encoder(file, "float32", "cpu")
        query = stack.get_submodule("encoder.block.1.layer.0.SelfAttention.qkv").forms[0].weight.parts["weight"]
        before = query.clone()
        with file.open("r+b") as content:
            at = content.read().index(bytes(query.view(torch.uint8).numpy()))
            content.seek(at + 40)
            content.write(b"\x11")
        assert not torch.equal(before.view(torch.uint8), query.view(torch.uint8))


def test_a_text_encoder_keeps_them(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"vocab_size": 4096})
    file = write_gguf(tmp_path / "t5.gguf", encoder_part(random_state(config)), "Q8_0", tokenizer=spiece_model())
    kept = TextEncoder.from_pretrained(file, "bfloat16", "cpu")
    assert stays_quantised(kept.stack)
    unpacked = TextEncoder.from_pretrained(file, "bfloat16", "cpu", unpack=True)
    assert not stays_quantised(unpacked.stack)
    found, meant = (encoder.encode(["a cat", ""]).hidden_states for encoder in (kept, unpacked))
    torch.testing.assert_close(found, meant, rtol=0, atol=0.1)


def test_live_loras(tmp_path: Path) -> None:
    """On projections, tables and norms; they come and go."""
    file = file_of("Q8_0", tmp_path)
    exact = load_encoder(file, "float64", "cpu", unpack=True)
    merged = Loras(exact)
    for layout in LAYOUTS:
        stack = load_encoder(file, "float32", "cpu", layout)
        live = LiveLoras(stack)
        with torch.no_grad():
            before = stack(IDS, MASK)
            for lora in (toy_lora(CONFIG), toy_tables(CONFIG)):
                merged.add(lora, 0.7, lora.name)
                live.add(lora, 0.7, lora.name)
                meant, found = by_modules(exact)(IDS, MASK), stack(IDS, MASK)
                assert not torch.equal(found, before)
                torch.testing.assert_close(found.double(), meant, rtol=0, atol=1e-4)
            live.clear()
            merged.clear()
            assert torch.equal(stack(IDS, MASK), before)
        with pytest.raises(ValueError, match=r"takes no LoRA any more; use LiveLoras, or load .* with unpack=True"):
            Loras(stack).add(toy_lora(CONFIG))


def test_merging_says_that_it_rounds(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"vocab_size": 4096})
    file = write_gguf(tmp_path / "t5.gguf", encoder_part(random_state(config)), "Q8_0", tokenizer=spiece_model())
    lora = toy_lora(config)
    with pytest.warns(UserWarning, match=r"they are unpacked, and the sum is rounded to torch\.bfloat16"):
        merged = TextEncoder.from_pretrained(file, "bfloat16", "cpu", loras=[(lora, 0.5)])
    assert not stays_quantised(merged.stack)
    live = TextEncoder.from_pretrained(file, "float32", "cpu")
    LiveLoras(live).add(lora, 0.5)
    found, meant = (encoder.encode(["a cat"]).hidden_states.float() for encoder in (merged, live))
    torch.testing.assert_close(found, meant, rtol=0, atol=0.1)


def test_textual_inversion(tmp_path: Path) -> None:
    """A new row stands behind a table that stays quantised."""
    config = CONFIG.model_copy(update={"vocab_size": 4096})
    file = write_gguf(tmp_path / "t5.gguf", encoder_part(random_state(config)), "Q8_0", tokenizer=spiece_model())
    vectors = torch.randn(2, config.d_model)
    for unpack in (False, True):
        encoder = TextEncoder.from_pretrained(file, "float32", "cpu", unpack=unpack, optimize=False)
        before = encoder.encode(["a cat"]).hidden_states
        add_embeddings(encoder, write_file(tmp_path / "new.safetensors", {"new": vectors}), token="<new>", key="new")
        assert torch.equal(encoder.encode(["a cat"]).hidden_states, before)
        ids = torch.tensor([[4096, 5, 4097]])
        assert torch.equal(encoder.stack.embed(ids)[0, [0, 2]], vectors)
        assert encoder.stack.config.vocab_size == 4098 and stays_quantised(encoder.stack) != unpack


@pytest.mark.parametrize("name", [name for name, (kind, _) in READ.items() if not kind.startswith("float8")])
def test_comfyui_gets_them_unpacked(tmp_path: Path, name: str) -> None:
    file = file_of(name, tmp_path)
    examination, given = examine(file), read_checkpoint(file, unpack=True)
    assert given.weight_dtype == torch.float16 and not given.model_options
    assert given.state.keys() == encoder_part(random_state(CONFIG)).keys()
    for key in examination.quantised:
        assert torch.equal(given.state[key], examination.read(key).half())
