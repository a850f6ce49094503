"""GGUF files wherever a model is taken, by the values that the package gguf unpacks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from backend_cases import by_modules
from checkpoints import encoder_part, spiece_model, write_file
from conftest import TOY_CONFIGS, padding_mask, random_state, write_hf_folder
from test_cli import ON_CPU, Run, run  # noqa: F401 - a fixture
from toy_gguf import SPELLINGS, Spelling, gguf, gguf_name, unpacked, write_gguf, write_tensors

from nai_t5_core.facts.config import T5Config
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.weights import gguf_files
from nai_t5_core.weights.convert import convert
from nai_t5_core.weights.examine import examine
from nai_t5_core.weights.formats import CheckpointError, open_checkpoint
from nai_t5_core.weights.load import load, load_encoder, load_t5

V1_1 = TOY_CONFIGS["v1.1"]
# Rows of whole blocks of any kind, which are of up to 256 numbers.
LARGE = T5Config(vocab_size=96, d_model=256, d_kv=64, d_ff=512, num_heads=4, num_layers=2)
WITH_WORDS = V1_1.model_copy(update={"vocab_size": 4096})
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
MATRICES = 2 * 7 + 1
OTHERS = 2 * 2 + 1 + 1


def same_state(path: Path, folder: Path, state: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    """A GGUF file loads as the tensors that the package unpacks do from safetensors, to the bit."""
    meant = write_file(folder / "meant" / "t5.safetensors", unpacked(path, state))
    ours, expected = load_encoder(path, dtype, "cpu"), load_encoder(meant, dtype, "cpu")
    assert ours.config == expected.config
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in ours.state_dict().items())
    ids, mask = torch.arange(18).reshape(2, 9), padding_mask([9, 4], 9)
    unpacked_at_once = load_encoder(path, dtype, "cpu", unpack=True)
    with torch.no_grad():
        assert torch.equal(unpacked_at_once(ids, mask), expected(ids, mask))
        found = ours(ids, mask)
        # The modules, which multiply by a few rows of a weight at a time, sum in another order than the kernels.
        allowed = 100 * torch.finfo(dtype).eps * float(found.abs().max())
        assert torch.allclose(found, by_modules(expected)(ids, mask), rtol=0, atol=allowed)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_unpacked_to_the_bit(kind: str, spelling: Spelling, tmp_path: Path) -> None:
    state = random_state(LARGE)
    same_state(write_gguf(tmp_path / "t5.gguf", state, kind, spelling=spelling), tmp_path, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_blocks_are_rounded_once_to_the_dtype_of_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    state = random_state(LARGE)
    same_state(write_gguf(tmp_path / "t5.gguf", state, "Q8_0"), tmp_path, state, dtype)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_kind_of_t5(config: T5Config, spelling: Spelling, tmp_path: Path) -> None:
    state = encoder_part(random_state(config))
    same_state(write_gguf(tmp_path / "t5.gguf", state, "Q8_0", spelling=spelling), tmp_path, state)


def test_names_are_those_of_llama_cpp(config: T5Config) -> None:
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5, config.num_layers)
    names = random_state(config)
    assert {name: gguf_name(name) for name in names} == {name: theirs.get_name(name, (".weight",)) for name in names}


def test_float64(tmp_path: Path) -> None:
    state = encoder_part(random_state(V1_1))
    writer = gguf.GGUFWriter(path := tmp_path / "t5.gguf", "t5encoder")
    for name, tensor in state.items():
        writer.add_tensor(name, (tensor.double() / 3).numpy())
    write_tensors(writer, {}, "F32")
    read = open_checkpoint(path).read
    assert all(torch.equal(read(name), tensor.double() / 3) for name, tensor in state.items())


def test_large_tensors_are_unpacked_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_state(LARGE)
    path = write_gguf(tmp_path / "t5.gguf", state, "Q4_K")
    whole = open_checkpoint(path).read("token_embd.weight")
    sizes = []
    unpack = gguf.quants.dequantize

    def watched(data: np.ndarray, kind: object) -> np.ndarray:
        sizes.append(data.size)
        return np.asarray(unpack(data, kind))

    gguf_files._kind.cache_clear()
    monkeypatch.setattr("gguf.quants.dequantize", watched)
    monkeypatch.setattr(gguf_files, "_SLICE", 5 * LARGE.d_model)
    checkpoint = open_checkpoint(path)
    sizes.clear()
    assert torch.equal(checkpoint.read("token_embd.weight"), whole)
    assert sizes == [5 * 144] * 19 + [144]
    gguf_files._kind.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# What is told of a file
# ---------------------------------------------------------------------------------------------------------------------


def test_reports_say_how_tensors_are_kept(tmp_path: Path) -> None:
    state = random_state(LARGE)
    path = write_gguf(tmp_path / "t5.gguf", state, "Q4_K")
    loaded = load(path, "float32", "cpu")
    assert loaded.report.format == f"GGUF (tensors in Q4_K: {MATRICES}, F32: {OTHERS})"
    in_blocks = sum(tensor.numel() for name, tensor in state.items() if tensor.ndim == 2 and "relative" not in name)
    in_all = sum(tensor.numel() for tensor in state.values())
    assert loaded.examination.dtypes == {"Q4_K": in_blocks, torch.float32: in_all - in_blocks}
    assert set(loaded.report.used) == set(state) and not loaded.report.ignored


def test_the_config_comes_from_metadata_and_tensors(config: T5Config, tmp_path: Path) -> None:
    odd = {"layer_norm_epsilon": 3e-5, "pad_token_id": 5, "eos_token_id": 7, "decoder_start_token_id": 5}
    config = config.model_copy(update={**odd, "activation": "gelu_new" if config.gated else "relu"})
    path = write_gguf(tmp_path / "t5.gguf", random_state(config), "F16", config=config)
    examination = examine(path)
    assert examination.config == config.model_copy(update={"dropout_rate": 0.1})
    assert examination.config_source == "the tensors and metadata"
    assert not examination.faults
    assert load_t5(path, "float32", "cpu").config == examination.config


def test_a_token_beyond_the_vocabulary_is_none(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "t5.gguf", random_state(V1_1), "F16", config=V1_1.model_copy(update={"pad_token_id": 96})
    )
    assert examine(path).config.pad_token_id == 0


@pytest.mark.parametrize("field", ["num_layers", "num_decoder_layers", "d_model", "d_ff", "num_heads", "d_kv"])
def test_metadata_that_contradict_the_tensors(field: str, tmp_path: Path) -> None:
    told = V1_1.model_copy(update={field: 10**9})
    path = write_gguf(tmp_path / "t5.gguf", random_state(V1_1), "F16", config=told)
    message = f"its metadata say {field}=1000000000 and its tensors {getattr(V1_1, field)}; the file is damaged"
    with pytest.raises(CheckpointError, match=message):
        examine(path)


# ---------------------------------------------------------------------------------------------------------------------
# With a decoder
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_whole_t5(config: T5Config, spelling: Spelling, tmp_path: Path) -> None:
    config = config.model_copy(update={"activation": "gelu_new" if config.gated else "relu"})
    state = random_state(config)
    path = write_gguf(tmp_path / "t5.gguf", state, "Q8_0", spelling=spelling, config=config)
    ours = load_t5(path, "float32", "cpu")
    expected = load_t5(write_hf_folder(tmp_path / "t5", config, unpacked(path, state)), "float32", "cpu")
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in ours.state_dict().items())
    ids, mask = torch.arange(2, 20).reshape(2, 9), padding_mask([9, 4], 9)
    assert torch.equal(*(model.generate(ids, mask, max_new_tokens=6) for model in (ours, expected)))


def test_an_encoder_alone_has_no_decoder(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "t5.gguf", encoder_part(random_state(V1_1)), "Q8_0", config=V1_1)
    assert load_encoder(path, "float32", "cpu").config.num_layers == 3
    with pytest.raises(CheckpointError, match=r"t5\.gguf has no decoder: it is the encoder alone"):
        load_t5(path)


def test_the_bias_of_cross_attention_is_ignored(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(path := tmp_path / "t5.gguf", "t5")
    writer.add_tensor("dec.blk.0.cross_attn_rel_b.weight", np.zeros((32, 4), np.float32))
    write_tensors(writer, random_state(V1_1), "F32")
    examination = examine(path)
    assert not examination.faults
    assert examination.keymap.ignored["dec.blk.0.cross_attn_rel_b.weight"].startswith("left in the published v1.0")


# ---------------------------------------------------------------------------------------------------------------------
# Wherever a model is taken
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_words(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "t5.gguf", random_state(WITH_WORDS), "Q8_0", spiece_model(), config=WITH_WORDS)


@pytest.fixture
def meant(with_words: Path, tmp_path: Path) -> Path:
    """The same T5 as a Hugging Face folder."""
    folder = write_hf_folder(tmp_path / "meant", WITH_WORDS, unpacked(with_words, random_state(WITH_WORDS)))
    (folder / "spiece.model").write_bytes(spiece_model())
    return folder


TEXTS = ["a photo of a cat", "", "two  dogs <extra_id_0>"]


def test_text_encoder(with_words: Path, meant: Path) -> None:
    ours = TextEncoder.from_pretrained(with_words, "float32", "cpu").encode(TEXTS)
    expected = TextEncoder.from_pretrained(meant, "float32", "cpu").encode(TEXTS)
    torch.testing.assert_close(ours.hidden_states, expected.hidden_states, rtol=0, atol=2e-5)
    lent = TextEncoder.from_pretrained(meant / "model.safetensors", "float32", "cpu", tokenizer=with_words)
    assert torch.equal(lent.encode(TEXTS).hidden_states, expected.hidden_states)


@pytest.mark.parametrize("layout", ["fused", "separate"])
def test_the_drop_in_class(with_words: Path, meant: Path, layout: str) -> None:
    pytest.importorskip("transformers")
    from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel

    ids = torch.arange(2, 20).reshape(2, 9)
    models = [
        NAIT5EncoderModel.from_pretrained(path, dtype=torch.float32, layout=layout)  # type: ignore[arg-type]
        for path in (with_words, meant)
    ]
    ours, expected = (model(ids)[0] for model in models)
    assert torch.equal(ours, expected)
    assert models[0].config.num_layers == 3
    assert NAIT5EncoderModel.from_pretrained(with_words).dtype == torch.bfloat16


def test_the_drop_in_class_of_a_pipeline_takes_a_folder(with_words: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel

    folder = tmp_path / "pipeline" / "text_encoder_2"
    folder.mkdir(parents=True)
    with_words.rename(folder / "t5.gguf")
    assert NAIT5EncoderModel.from_pretrained(folder.parent, subfolder="text_encoder_2").config.d_model == 64


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_convert(with_words: Path, meant: Path, tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    done = convert(with_words, tmp_path / "ours.safetensors", dtype)
    assert (done.dtype, done.tokenizer) == (expected, "sentencepiece")
    convert(meant, tmp_path / "expected.safetensors", str(expected).removeprefix("torch."))
    ours, other = (load_t5(tmp_path / f"{name}.safetensors", expected, "cpu") for name in ("ours", "expected"))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in ours.state_dict().items())


def test_the_command(run: Run, with_words: Path, meant: Path, tmp_path: Path) -> None:  # noqa: F811
    report = run("inspect", with_words, "--json").json
    assert report["format"].startswith("GGUF (tensors in Q8_0: ") and report["dtypes"].keys() == {"Q8_0", "float32"}
    assert (report["faults"], report["tokenizer"]) == ([], "sentencepiece, 4096 tokens")
    shown = run("inspect", with_words)
    assert shown.status == 0 and "Q8_0: " in shown.stdout
    for arguments in (["count", *TEXTS, "--model"], ["count", *TEXTS, "--tokenizer"]):
        counts = [run(*arguments, source, "--json").json["prompts"] for source in (with_words, meant)]
        assert counts[0] == counts[1]
    vectors = []
    for source, *options in ((with_words, "--unpack"), (meant,), (with_words,)):
        out = tmp_path / "out.safetensors"
        run("encode", *TEXTS, "--model", source, *ON_CPU, "--dtype", "float32", "--out", out, *options)
        vectors.append(open_checkpoint(out).read("hidden_states"))
    assert torch.equal(*vectors[:2])
    torch.testing.assert_close(vectors[2], vectors[1], rtol=0, atol=2e-5)
    converted = run("convert", with_words, tmp_path / "converted.safetensors", "--encoder-only", "--json").json
    assert (converted["dtype"], converted["tokenizer"]) == ("bfloat16", "sentencepiece")


def test_a_folder_with_one(with_words: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with_words.rename(folder / "t5-Q8_0.gguf")
    assert load_encoder(folder, "float32", "cpu").config.d_model == 64
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match=r"config\.json has model_type='bert', which is no T5"):
        load_encoder(folder)
    (folder / "t5-Q4_0.gguf").write_bytes((folder / "t5-Q8_0.gguf").read_bytes())
    with pytest.raises(CheckpointError, match=r"holds 2 weight files .*t5-Q4_0\.gguf, t5-Q8_0\.gguf\); name one"):
        load_encoder(folder)


def test_where_the_t5_is(with_words: Path, tmp_path: Path) -> None:
    write_file(tmp_path / "transformer" / "model.safetensors", {"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)})
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    with_words.rename(folder / "t5.gguf")
    with pytest.raises(CheckpointError, match="There is a T5 in subfolder='text_encoder' of"):
        load_encoder(tmp_path / "transformer")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5-00001-of-00001.gguf", "t5-00001-of-00002.gguf", "t5"])
def test_the_header_and_not_the_name_tells_a_part(name: str, tmp_path: Path) -> None:
    state = encoder_part(random_state(V1_1))
    same_state(write_gguf(tmp_path / name, state, "F32"), tmp_path, state)


@pytest.mark.parametrize("given", ["the part", "the folder"])
def test_a_part_is_refused(given: str, tmp_path: Path) -> None:
    for part in (1, 2):
        writer = gguf.GGUFWriter(tmp_path / f"t5-0000{part}-of-00002.gguf", "t5encoder")
        writer.add_uint16("split.count", 2)
        write_tensors(writer, encoder_part(random_state(V1_1)), "F32")
    source = tmp_path / "t5-00002-of-00002.gguf" if given == "the part" else tmp_path
    with pytest.raises(CheckpointError, match="is one of 2 parts of a GGUF file; join them with 'llama-gguf-split --m"):
        load_encoder(source)


def test_an_index_may_list_it(tmp_path: Path) -> None:
    state = encoder_part(random_state(V1_1))
    write_gguf(tmp_path / "t5.gguf", state, "Q8_0", spelling="Hugging Face")
    (tmp_path / "t5.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(state, "t5.gguf")}))
    same_state(tmp_path / "t5.gguf", tmp_path, state)
    listed = load_encoder(tmp_path / "t5.index.json", "float32", "cpu").state_dict()
    assert all(
        map(torch.equal, listed.values(), load_encoder(tmp_path / "t5.gguf", "float32", "cpu").state_dict().values())
    )


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (200, "keeps shared.weight as kind 200, which the installed package gguf does not know yet; update it, or use"),
        (25, "keeps shared.weight as I16, which the installed package gguf cannot unpack; update it, or use another"),
        (9, "keeps shared.weight as Q8_1, which the installed package gguf cannot unpack; update it, or use another"),
    ],
)
def test_kinds_that_cannot_be_unpacked(number: int, message: str, tmp_path: Path) -> None:
    """Before a tensor is read."""
    path = write_gguf(tmp_path / "t5.gguf", random_state(V1_1), "F16")
    content = bytearray(path.read_bytes())
    # Behind a tensor's name come the number of dimensions, two sizes, and the kind.
    place = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    content[place : place + 4] = number.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        examine(path)


def test_tensors_beside_the_t5_may_be_of_any_kind(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(path := tmp_path / "all.gguf", "any")
    writer.add_tensor("vae.steps", np.arange(4, dtype=np.int16))
    state = encoder_part(random_state(V1_1))
    write_tensors(writer, state, "F32", "text_encoders.t5xxl.transformer.{}".format)
    loaded = load(path, "float32", "cpu")
    assert loaded.report.ignored == {
        "vae.steps": "not under 'text_encoders.t5xxl.transformer.': another part of the file"
    }


def test_without_the_package(with_words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    message = r"t5\.gguf is a GGUF file, and reading it needs the package gguf: install it with 'python -m pip install"
    for refused in (examine, load_encoder, load_t5, TextEncoder.from_pretrained):
        with pytest.raises(CheckpointError, match=message) as caught:
            refused(with_words)
        assert "comfy-nai-t5[gguf]" in str(caught.value)


def test_float16_that_a_weight_exceeds(tmp_path: Path) -> None:
    state = random_state(LARGE)
    state["encoder.block.0.layer.0.SelfAttention.q.weight"] *= 1e6
    path = write_gguf(tmp_path / "t5.gguf", state, "Q8_0")
    with pytest.raises(CheckpointError, match=r"SelfAttention\.qkv\.weight has values that are not finite in torch"):
        load_encoder(path, "float16", "cpu")
