"""Converting: the result loads as the original does, says where it comes from, and is whole or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import encoder_part, prefixed, spiece_model, spiece_tensor, write_file, write_shards
from conftest import TOY_CONFIGS, padding_mask, random_state, write_hf_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nai_t5_core.facts.config import T5Config, decoder_tensors
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.weights import formats, safetensors_files
from nai_t5_core.weights.convert import convert
from nai_t5_core.weights.examine import examine
from nai_t5_core.weights.formats import CheckpointError
from nai_t5_core.weights.fuse import fused_recipes, unfuse
from nai_t5_core.weights.load import load

V1_1 = TOY_CONFIGS["v1.1"]
MASK = padding_mask([9, 4, 1], 9)
IDS = torch.randint(0, 96, (3, 9), generator=torch.Generator().manual_seed(3))
DiskUsage = namedtuple("DiskUsage", "total used free")


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# ---------------------------------------------------------------------------------------------------------------------
# The result
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@torch.no_grad()
def test_loads_bit_for_bit_as_the_original(tmp_path: Path, config: T5Config, dtype: str) -> None:
    folder = write_hf_folder(tmp_path / "hf", config, random_state(config))
    done = convert(folder, tmp_path / "own.safetensors", dtype)
    original, converted = (load(source, dtype, "cpu") for source in (folder, done.out))
    assert torch.equal(converted.stack(IDS, MASK), original.stack(IDS, MASK))
    assert converted.stack.config == original.stack.config
    assert (done.dtype, converted.report.dtype) == (original.stack.dtype, original.stack.dtype)
    assert examine(done.out).config == config


def test_every_original_can_be_had_back(tmp_path: Path, config: T5Config) -> None:
    """The decoder and the output head are in the file too."""
    state = random_state(config)
    done = convert(write_hf_folder(tmp_path / "hf", config, state), tmp_path / "own.safetensors")
    back = dict(unfuse(config, load_file(done.out).__getitem__))
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(back[name], tensor, rtol=2**-23, atol=0, msg=name)


def test_encoder_only(tmp_path: Path, v1_1_folder: Path) -> None:
    done = convert(v1_1_folder, tmp_path / "own.safetensors", encoder_only=True)
    tensors = load_file(done.out)
    assert tensors.keys() == {recipe.target for recipe in fused_recipes(V1_1.encoder_only())}
    assert examine(done.out).config == V1_1.encoder_only()
    assert done.tensors == len(tensors)
    assert done.nbytes == sum(tensor.nbytes for tensor in tensors.values())


def test_float8_becomes_bfloat16(tmp_path: Path) -> None:
    """Folding the norms in would round the float8 weights a second time."""
    state = encoder_part(random_state(V1_1))
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    done = convert(write_file(tmp_path / "fp8.safetensors", small), tmp_path / "own.safetensors")
    assert done.dtype == torch.bfloat16
    assert load_file(done.out)["encoder.block.0.layer.0.SelfAttention.qkv.weight"].dtype == torch.bfloat16


def test_auto_keeps_the_dtype_of_most_weights(tmp_path: Path) -> None:
    state = {name: tensor.to(torch.bfloat16) for name, tensor in encoder_part(random_state(V1_1)).items()}
    state["encoder.final_layer_norm.weight"] = state["encoder.final_layer_norm.weight"].float()
    done = convert(write_file(tmp_path / "t5.safetensors", state), tmp_path / "own.safetensors")
    assert done.dtype == torch.bfloat16


def test_header(tmp_path: Path, v1_1_folder: Path) -> None:
    done = convert(v1_1_folder, tmp_path / "own.safetensors")
    metadata = header(done.out)
    assert (metadata["format"], metadata["format_version"], metadata["source"]) == ("nai-t5", "1", v1_1_folder.name)
    assert T5Config(**json.loads(metadata["config"])) == V1_1
    assert metadata["source_sha256"] == done.source_sha256
    assert int(done.source_sha256, 16) and len(done.source_sha256) == 64
    assert (8 + int.from_bytes(done.out.read_bytes()[:8], "little")) % 64 == 0, "the first tensor is not aligned"


def test_progress_reaches_the_whole(tmp_path: Path, v1_1_folder: Path) -> None:
    steps: list[tuple[int, int]] = []
    done = convert(v1_1_folder, tmp_path / "own.safetensors", progress=lambda *step: steps.append(step))
    assert steps == sorted(steps) and len(steps) == done.tensors
    assert steps[-1] == (done.nbytes, done.nbytes)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer inside
# ---------------------------------------------------------------------------------------------------------------------

WITH_TOKENIZER = V1_1.model_copy(update={"vocab_size": 4096, "num_decoder_layers": 0})


@pytest.mark.parametrize("place", ["inside", "beside", "given"])
def test_tokenizer_is_inside_and_used(tmp_path: Path, place: str) -> None:
    state = random_state(WITH_TOKENIZER)
    spiece = tmp_path / ("hf" if place == "beside" else "elsewhere") / "spiece.model"
    spiece.parent.mkdir()
    spiece.write_bytes(spiece_model())
    folder = write_hf_folder(
        tmp_path / "hf", WITH_TOKENIZER, state | ({"spiece_model": spiece_tensor()} if place == "inside" else {})
    )
    done = convert(folder, tmp_path / "own.safetensors", tokenizer=spiece.parent if place == "given" else None)
    assert done.tokenizer == "sentencepiece"
    spiece.unlink()
    assert bytes(load_file(done.out)["spiece_model"].numpy()) == spiece_model()
    encoder = TextEncoder.from_pretrained(done.out, "float32", "cpu")
    assert encoder.count(["a red cat", ""]) == [4, 1]
    assert encoder.encode(["a red cat"]).hidden_states.shape == (1, 4, 64)


def test_tokenizer_json_inside(tmp_path: Path) -> None:
    from nai_t5_core.tokenizer import sentencepiece_to_tokenizer_json

    folder = write_hf_folder(tmp_path / "hf", WITH_TOKENIZER, random_state(WITH_TOKENIZER))
    content = sentencepiece_to_tokenizer_json(spiece_model())
    (folder / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    done = convert(folder, tmp_path / "own.safetensors")
    assert (done.tokenizer, "tokenizer_json" in load_file(done.out)) == ("tokenizer.json", True)
    assert TextEncoder.from_pretrained(done.out, "float32", "cpu").count(["a red cat"]) == [4]


def test_byt5_needs_none(tmp_path: Path) -> None:
    config = TOY_CONFIGS["byt5"]
    done = convert(write_hf_folder(tmp_path / "hf", config, random_state(config)), tmp_path / "own.safetensors")
    assert done.tokenizer == "bytes"
    assert TextEncoder.from_pretrained(done.out, "float32", "cpu").count(["é"]) == [3]


def test_without_a_tokenizer(tmp_path: Path, v1_1_folder: Path) -> None:
    done = convert(v1_1_folder, tmp_path / "own.safetensors")
    assert done.tokenizer is None
    with pytest.raises(ValueError, match=r"own.safetensors comes without a tokenizer; give a spiece.model"):
        TextEncoder.from_pretrained(done.out, "float32", "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Where it comes from
# ---------------------------------------------------------------------------------------------------------------------


def test_hash_is_that_of_the_tensors(tmp_path: Path) -> None:
    """The same for every way to store them and every dtype written; another after the smallest change."""
    state = encoder_part(random_state(V1_1))
    sources = {
        "file": write_file(tmp_path / "t5.safetensors", state),
        "shards": write_shards(tmp_path / "shards", state),
        "prefix": write_file(tmp_path / "comfy.safetensors", prefixed(state, "t5xxl.transformer.")),
    }
    hashes = {name: convert(path, tmp_path / f"{name}.own").source_sha256 for name, path in sources.items()}
    hashes["bfloat16"] = convert(sources["file"], tmp_path / "bfloat16.own", "bfloat16").source_sha256
    assert len(set(hashes.values())) == 1

    weight = state["encoder.block.2.layer.1.DenseReluDense.wo.weight"]
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    changed = convert(write_file(tmp_path / "changed.safetensors", state), tmp_path / "changed.own", "bfloat16")
    assert changed.source_sha256 not in hashes.values()


# ---------------------------------------------------------------------------------------------------------------------
# Refusals, after which everything is as before
# ---------------------------------------------------------------------------------------------------------------------


def refuse(source: Path, out: Path, expected: str, **options: Any) -> None:
    """Converts, expects an error, and that nothing was changed in OUT's folder."""
    before = {path: path.read_bytes() for path in out.parent.iterdir() if path.is_file()}
    with pytest.raises(CheckpointError, match=expected):
        convert(source, out, **options)
    assert {path: path.read_bytes() for path in out.parent.iterdir() if path.is_file()} == before


@pytest.fixture(params=["a new file", "over an old file"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "out" / "own.safetensors"
    path.parent.mkdir()
    if request.param == "over an old file":
        path.write_bytes(b"old")
    return path


def test_no_room(out: Path, v1_1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: DiskUsage(10**9, 10**9 - 1000, 1000))
    refuse(v1_1_folder, out, r"own.safetensors needs 0.00 GB and its disk has 0.00 GB free; make room or write elsewh")


def test_disk_that_fills_up(out: Path, v1_1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program's writing is no reason to leave half a file."""
    written = 0

    def tensor_bytes(tensor: torch.Tensor) -> memoryview:
        nonlocal written
        written += 1
        if written == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(tensor)

    real = formats.tensor_bytes
    monkeypatch.setattr(formats, "tensor_bytes", tensor_bytes)
    refuse(v1_1_folder, out, "own.safetensors could not be written: No space left on device; nothing was kept")
    assert written == 5


def test_interrupted(out: Path, v1_1_folder: Path) -> None:
    before = list(out.parent.iterdir())

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(v1_1_folder, out, progress=interrupt)
    assert list(out.parent.iterdir()) == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(out: Path, v1_1_folder: Path) -> None:
    out.parent.chmod(0o500)
    refuse(v1_1_folder, out, "could not be written: Permission denied")
    out.parent.chmod(0o700)


def test_open_is_refused(out: Path, v1_1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for root, for whom the system refuses nothing."""
    real = Path.open

    def refusing(path: Path, mode: str = "r", **options: Any) -> Any:
        if "w" in mode:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, mode, **options)

    monkeypatch.setattr(Path, "open", refusing)
    refuse(v1_1_folder, out, "own.safetensors could not be written: Permission denied; nothing was kept")


def test_absent_folder_and_folder_in_place_of_a_file(tmp_path: Path, v1_1_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the folder .*absent does not exist"):
        convert(v1_1_folder, tmp_path / "absent" / "own.safetensors")
    with pytest.raises(CheckpointError, match="is a folder; give the name of the file to write in it"):
        convert(v1_1_folder, tmp_path)


def test_source_with_faults(tmp_path: Path, out: Path) -> None:
    state = random_state(V1_1)
    del state["encoder.block.1.layer.0.SelfAttention.k.weight"]
    del state["decoder.block.0.layer.1.EncDecAttention.v.weight"]
    folder = write_hf_folder(tmp_path / "hf", V1_1, state)
    refuse(folder, out, r"(?s)2 faults.*SelfAttention.k.weight is missing.*EncDecAttention.v.weight is missing")


def test_decoder_with_faults_can_be_left_out(tmp_path: Path) -> None:
    state = random_state(V1_1)
    del state["decoder.block.0.layer.1.EncDecAttention.v.weight"]
    folder = write_hf_folder(tmp_path / "hf", V1_1, state)
    convert(folder, tmp_path / "own.safetensors", encoder_only=True)
    assert examine(tmp_path / "own.safetensors").faults == []


def test_overflow_in_float16(tmp_path: Path, out: Path) -> None:
    state = encoder_part(random_state(V1_1))
    state["encoder.block.1.layer.1.DenseReluDense.wo.weight"][2, 3] = 70_000
    folder = write_hf_folder(tmp_path / "hf", V1_1.encoder_only(), state)
    expected = r"encoder.block.1.layer.1.DenseReluDense.wo.weight has values that are not finite in torch.float16"
    refuse(folder, out, expected, dtype="float16")
    assert convert(folder, out, "bfloat16").dtype == torch.bfloat16


def test_overflow_of_the_product_with_a_norm(tmp_path: Path, out: Path) -> None:
    """Neither factor is beyond float16, and the fused tensor is."""
    state = encoder_part(random_state(V1_1))
    state["encoder.block.1.layer.1.layer_norm.weight"][3] = 300
    state["encoder.block.1.layer.1.DenseReluDense.wi_1.weight"][2, 3] = 300
    folder = write_hf_folder(tmp_path / "hf", V1_1.encoder_only(), state)
    refuse(folder, out, r"encoder.block.1.layer.1.DenseReluDense.wi.weight has values", dtype="float16")


def test_converted_file_can_be_converted_again(tmp_path: Path, out: Path, v1_1_folder: Path) -> None:
    """To another dtype, and to the same bytes in the same."""
    first = convert(v1_1_folder, tmp_path / "own.safetensors")
    again = convert(first.out, out)
    assert again.source_sha256 == first.source_sha256
    for name, tensor in load_file(first.out).items():
        assert torch.allclose(load_file(again.out)[name], tensor, rtol=1e-6, atol=0), name
    assert convert(first.out, tmp_path / "half.safetensors", "bfloat16").dtype == torch.bfloat16


def test_source_is_not_overwritten(v1_1_folder: Path) -> None:
    source = v1_1_folder / "model.safetensors"
    refuse(v1_1_folder, source, r"model.safetensors is the source itself; write to another file")


@pytest.mark.parametrize(("version", "shown"), [("2", "2"), ("", "none")])
def test_newer_format_is_refused(tmp_path: Path, v1_1_folder: Path, version: str, shown: str) -> None:
    done = convert(v1_1_folder, tmp_path / "own.safetensors")
    newer = tmp_path / "newer.safetensors"
    save_file(load_file(done.out), newer, metadata={**header(done.out), "format_version": version})
    with pytest.raises(CheckpointError, match=f"has format version {shown}, this program reads 1; update the program"):
        load(newer)


def test_damaged_config_in_the_header_is_refused(tmp_path: Path, v1_1_folder: Path) -> None:
    done = convert(v1_1_folder, tmp_path / "own.safetensors")
    save_file(load_file(done.out), tmp_path / "x", metadata={**header(done.out), "config": '{"d_model": 64}'})
    with pytest.raises(CheckpointError, match="has a damaged header: Field required"):
        load(tmp_path / "x")


def test_unknown_dtype(tmp_path: Path, v1_1_folder: Path) -> None:
    with pytest.raises(ValueError, match="unknown dtype 'int8'; allowed: auto, float64, float32, bfloat16, float16"):
        convert(v1_1_folder, tmp_path / "own.safetensors", "int8")


# ---------------------------------------------------------------------------------------------------------------------
# Writing safetensors, to the byte
# ---------------------------------------------------------------------------------------------------------------------


def test_bytes_of_a_file(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([[1, 2]], dtype=torch.uint8), "b": torch.tensor(1.0, dtype=torch.bfloat16)}
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    formats.write_safetensors(tmp_path / "x", layout, tensors.items(), {"k": "v"})
    text = (
        b'{"a":{"dtype":"U8","shape":[1,2],"data_offsets":[0,2]},'
        b'"b":{"dtype":"BF16","shape":[],"data_offsets":[2,4]},"__metadata__":{"k":"v"}}'
    )
    assert (tmp_path / "x").read_bytes() == (184).to_bytes(8, "little") + text.ljust(184) + b"\x01\x02\x80\x3f"


def test_long_metadata(tmp_path: Path) -> None:
    """Metadata that is known beforehand may have any length."""
    formats.write_safetensors(tmp_path / "x", {}, [], {"prompts": "é" * 50_000})
    assert header(tmp_path / "x") == {"prompts": "é" * 50_000}


def test_every_dtype_comes_back(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.zeros(3, 2).to(dtype) for dtype in safetensors_files.DTYPE_NAMES}
    tensors["empty"] = torch.zeros(0, 5)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    formats.write_safetensors(tmp_path / "x", layout, tensors.items(), {})
    back = load_file(tmp_path / "x")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in back.items()} == layout


def test_whole_model_with_its_own_head(tmp_path: Path) -> None:
    """transformers 5 writes tie_word_embeddings=true into every config.json; the head in the file is kept."""
    config = V1_1.model_copy(update={"tie_word_embeddings": True})
    folder = write_hf_folder(tmp_path / "hf", config, random_state(V1_1))
    done = convert(folder, tmp_path / "own.safetensors")
    assert "lm_head.weight" in decoder_tensors(V1_1) and "lm_head.weight" in load_file(done.out)
    assert examine(done.out).config == V1_1
