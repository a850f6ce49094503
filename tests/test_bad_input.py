"""Every mistake a user makes is a ValueError that names what was given, what is allowed, and what to do."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import encoder_part, prefixed, write_file, write_shards
from conftest import TOY_CONFIGS, build_stack, random_state, write_hf_folder
from hostile import in_little

from nai_t5_core.facts.config import config_to_hf
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.weights.examine import examine
from nai_t5_core.weights.formats import CheckpointError
from nai_t5_core.weights.load import load_encoder

V1_1 = TOY_CONFIGS["v1.1"]


@cache
def encoder() -> TextEncoder:
    return TextEncoder.from_pretrained(dtype="float32", device="cpu", optimize=False)


def encode(prompts: Any = ("a cat",), **options: Any) -> Any:
    return encoder().encode(list(prompts) if isinstance(prompts, tuple) else prompts, **options)


def stack(*arguments: Any, **options: Any) -> Any:
    return build_stack(V1_1, random_state(V1_1))(*arguments, **options)


IDS = torch.zeros(2, 5, dtype=torch.long)

CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "empty list": (lambda: encode([]), "list of prompts is empty: give at least one prompt"),
    "no string": (lambda: encode(["a", 3]), r"prompt 1 is a int \('3'\), not a str"),
    "None among the prompts": (lambda: encode([None]), "prompt 0 is a NoneType"),
    "no string, with a family": (lambda: encode(["a", b"b"], family="flux"), "prompt 1 is a bytes"),
    "plain string": (lambda: encode("a cat"), r"prompts is a str \('a cat'\), not a list: put a single prompt in \[\]"),
    "plain string, with a family": (lambda: encode("a cat", family="flux"), "prompts is a str"),
    "no list": (lambda: encode(7), r"prompts is a int \('7'\), not a list"),
    "too long": (
        lambda: encode(["a cat", "a red cat on a mat"], max_length=4, truncate=False),
        r"prompt 1 has 8 tokens, the limit is 4; shorten it by 'on a mat', raise max_length, or allow truncation",
    ),
    "too long for the family": (
        lambda: encode(["cat " * 600], family="flux", truncate=False),
        r"prompt 0 has 601 tokens, the limit is 512; shorten it by 'cat cat",
    ),
    "unknown family": (lambda: encode(family="fluxx"), r"(?s)'fluxx'.*flux.*pixart-sigma"),
    "beyond the family": (lambda: encode(family="flux", max_length=600), "max_length=600; .* takes at most 512 tokens"),
    "no room for the end": (lambda: encode(max_length=0), "max_length=0 .*must be at least 1"),
    "unknown padding": (lambda: encode(padding="left"), "'left'; allowed: attend, exact, skip, trim"),
    "negative extra_pad": (lambda: encode(padding="skip", extra_pad=-1), "extra_pad=-1; it must be 0 or more"),
    "no length to pad to": (lambda: encode(pad_to="max_length"), "pad_to='max_length' needs a max_length"),
    "no budget": (
        lambda: TextEncoder(encoder().stack, encoder().tokenizer, token_budget=0),
        "token_budget=0; it must be 1 or more",
    ),
    "unknown dtype": (
        lambda: load_encoder(dtype="int4"),
        "unknown dtype 'int4'; allowed: auto, float64, float32, bfloat16, float16",
    ),
    "integer dtype": (lambda: load_encoder(dtype=torch.int8), "unknown dtype torch.int8; allowed: auto, float64"),
    "unknown device": (
        lambda: load_encoder(device="gpu"),
        r"device 'gpu' cannot be used here \(.*\); try 'auto' or 'cpu'",
    ),
    "absent device": (lambda: load_encoder(device="cuda:77"), "device 'cuda:77' cannot be used here"),
    "no device": (lambda: load_encoder(device=1.5), "device '1.5' cannot be used here"),  # type: ignore[arg-type]
    "unknown layout": (lambda: load_encoder(layout="joined"), "'joined'; allowed: fused, separate"),  # type: ignore[arg-type]
    "id too large": (lambda: stack(IDS + 96), "token id 96 is outside the vocabulary of 96 tokens"),
    "negative id": (lambda: stack(IDS - 1), "token id -1 is outside the vocabulary of 96 tokens"),
    "ids of one dimension": (lambda: stack(IDS[0]), r"input_ids must be \[batch, length\]; got shape \[5\]"),
    "mask too short": (lambda: stack(IDS, torch.ones(2, 4)), r"mask has shape \[2, 4\], the tokens have \[2, 5\]"),
    "mask of another batch": (
        lambda: stack(IDS, torch.ones(1, 5)),
        r"mask has shape \[1, 5\], the tokens have \[2, 5\]",
    ),
    "mask of one dimension": (
        lambda: stack(IDS, torch.ones(5, dtype=torch.bool)),
        r"mask has shape \[5\]; allowed: \[2, 5\]",
    ),
    "mask of three dimensions": (
        lambda: stack(IDS, torch.ones(2, 5, 4, dtype=torch.bool)),
        r"mask has shape \[2, 5, 4\]; allowed: \[2, 5\], \[2, 5, 5\]",
    ),
    "no tokenizer there": (
        lambda: TextEncoder.from_pretrained(tokenizer="/absent"),
        "can't read a tokenizer from '/absent'",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_bad_call(case: str) -> None:
    call, expected = CALLS[case]
    encoder()
    with in_little(), pytest.raises(ValueError, match=expected):
        call()


# ---------------------------------------------------------------------------------------------------------------------
# Bad files
# ---------------------------------------------------------------------------------------------------------------------


def damaged(path: Path, change: Callable[[bytes], bytes]) -> Path:
    file = write_file(path / "t5.safetensors", encoder_part(random_state(V1_1)))
    file.write_bytes(change(file.read_bytes()))
    return file


def file_of(path: Path, content: bytes) -> Path:
    file = path / "t5.safetensors"
    file.write_bytes(content)
    return file


def model_of(path: Path, *names: str) -> Path:
    return write_file(path / "other.safetensors", {name: torch.zeros(2, 2) for name in names})


def contradicting(path: Path, **change: Any) -> Path:
    """Weights of the toy v1.1 under a config.json that says something else."""
    folder = write_hf_folder(path / "hf", V1_1, random_state(V1_1))
    (folder / "config.json").write_text(json.dumps({**config_to_hf(V1_1), **change}))
    return folder


def shards_without(path: Path, pattern: str) -> Path:
    index = write_shards(path / "hf", random_state(V1_1))
    for file in index.parent.glob(pattern):
        file.unlink()
    return index.parent


def pickled(path: Path, value: object) -> Path:
    torch.save(value, path / "pytorch_model.bin")
    return path


class Anything:
    """What a pickle may hold and no weight file should."""


DAMAGED = r"t5.safetensors is a damaged safetensors file \([\d,]+ bytes: .*\); fetch it again"
NEITHER = "is neither safetensors, nor a PyTorch or GGUF file, nor a shard index .it begins with .*; it may be dam"

FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "cut in the first bytes": (lambda path: damaged(path, lambda all_: all_[:5]), NEITHER),
    "cut in the header": (lambda path: damaged(path, lambda all_: all_[:1000]), DAMAGED),
    "cut behind the header": (
        lambda path: damaged(path, lambda all_: all_[: 8 + int.from_bytes(all_[:8], "little")]),
        DAMAGED,
    ),
    "cut in the data": (lambda path: damaged(path, lambda all_: all_[: len(all_) // 2]), DAMAGED),
    "cut at the last byte": (lambda path: damaged(path, lambda all_: all_[:-1]), DAMAGED),
    "a byte too many": (lambda path: damaged(path, lambda all_: all_ + b"\0"), DAMAGED),
    "header that is no JSON": (lambda path: damaged(path, lambda all_: all_[:60] + b"\xff" + all_[61:]), DAMAGED),
    "shape that does not fit": (lambda path: damaged(path, lambda all_: all_.replace(b"[96,64]", b"[96,65]")), DAMAGED),
    "impossible header length": (lambda path: damaged(path, lambda all_: b"\xff" * 8 + all_[8:]), DAMAGED),
    "random bytes": (lambda path: file_of(path, random.Random(0).randbytes(5000)), NEITHER),
    "nothing but zeros": (lambda path: file_of(path, bytes(5000)), NEITHER),
    "empty file": (lambda path: file_of(path, b""), NEITHER),
    "a page instead of a file": (lambda path: file_of(path, b"<!doctype html><html>"), NEITHER),
    "GGUF of nothing": (lambda path: file_of(path, b"GGUF\3" + bytes(100)), "is no T5: it begins with nothing"),
    "a cut PyTorch file": (
        lambda path: file_of(path, b"PK\3\4" + bytes(100)),
        "is not a readable PyTorch weight file .*; fetch it again",
    ),
    "a pickle of anything": (
        lambda path: pickled(path, {"model": Anything()}),
        r"holds Python objects \(classes test_bad_input.Anything\), and reading those could run any code; save the wei",
    ),
    "a pickle of no state": (
        lambda path: pickled(path, {"step": 3}),
        "no dictionary of tensors; save the model's state_d",
    ),
    "a pickle with numbers for names": (lambda path: pickled(path, {3: torch.zeros(2)}), "no dictionary of tensors"),
    "JSON": (
        lambda path: file_of(path, b'{ "a": 1 }'),
        "JSON file without a weight_map; give the weight file or its ind",
    ),
    "an index of nothing": (lambda path: file_of(path, b'{ "weight_map": {} }'), "JSON file without a weight_map"),
    "an index of numbers": (
        lambda path: file_of(path, b'{ "weight_map": {"a": 1} }'),
        "is damaged: its weight_map gives",
    ),
    "an index of itself": (lambda path: file_of(path, b'{ "weight_map": {"a": "t5.safetensors"} }'), NEITHER),
    "an index that is cut": (lambda path: file_of(path, b'{ "weight_map": {"a": '), "is not readable JSON"),
    "absent shards": (
        lambda path: shards_without(path, "model-00002*"),
        "lists 3 shards, of which 1 are absent: model-00002-of-00003.safetensors; fetch them again",
    ),
    "CLIP": (
        lambda path: model_of(path, "text_model.encoder.layers.0.self_attn.q_proj.weight", "logit_scale"),
        "is no T5: it looks like a CLIP text encoder, .*; give the file of the T5 text encoder",
    ),
    "OpenCLIP": (
        lambda path: model_of(path, "transformer.resblocks.0.attn.in_proj_weight"),
        "like an OpenCLIP text encod",
    ),
    "UNet": (lambda path: model_of(path, "down_blocks.0.resnets.0.conv1.weight"), "looks like a UNet or VAE"),
    "Flux": (lambda path: model_of(path, "double_blocks.0.img_attn.qkv.weight"), "looks like a diffusion transformer"),
    "Llama": (
        lambda path: model_of(path, "model.layers.0.self_attn.q_proj.weight"),
        "like a decoder-only language model",
    ),
    "LoRA of a transformer": (
        lambda path: model_of(path, "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"),
        "looks like a LoRA",
    ),
    "LoRA of CLIP": (
        lambda path: model_of(path, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight"),
        "looks like a LoRA",
    ),
    "nobody's names": (
        lambda path: model_of(path, "a.weight", "b.weight"),
        "is no T5: it begins with a.weight, b.weight",
    ),
    "two T5s": (
        lambda path: write_file(
            path / "x", prefixed(random_state(V1_1), "t5xxl.") | prefixed(random_state(V1_1), "umt5xxl.")
        ),
        "holds 2 T5 encoders, under 't5xxl.', 'umt5xxl.'",
    ),
    "config with fewer layers": (
        lambda path: contradicting(path, num_layers=2),
        r"(?s)9 faults.*encoder.block.2.layer.0.SelfAttention.q.weight is in the file, but config.json describes",
    ),
    "config with more layers": (
        lambda path: contradicting(path, num_layers=4),
        r"(?s)9 faults.*encoder.block.3.*is missing .expected \[64, 64\] according to config.json",
    ),
    "config with another d_ff": (
        lambda path: contradicting(path, d_ff=81),
        r"(?s)9 faults.*wi_0.weight has shape \[80, 64\], but config.json asks for \[81, 64\]",
    ),
    "config without a gate": (
        lambda path: contradicting(path, feed_forward_proj="relu"),
        r"(?s)wi.weight is missing.*wi_0.weight is in the file, but config.json describes a model without it",
    ),
    "config of a UMT5": (
        lambda path: contradicting(path, model_type="umt5"),
        r"(?s)2 faults.*block.1.layer.0.SelfAttention.relative_attention_bias.weight is missing",
    ),
    "config of another model": (
        lambda path: contradicting(path, model_type="llama"),
        "model_type='llama', which is no T5",
    ),
    "config with bad sizes": (
        lambda path: contradicting(path, d_kv=0),
        "config.json is not usable: d_kv: .*greater than 0",
    ),
    "bias table of no T5": (
        lambda path: write_file(
            path / "x",
            random_state(V1_1)
            | {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": torch.zeros(30, 4)},
        ),
        "relative_attention_num_buckets=30 .*must be a multiple of 4",
    ),
    "missing path": (lambda path: path / "absent", "absent does not exist; give a weight file, a folder, or a hub id"),
    "missing file": (lambda path: Path("absent/t5.safetensors"), "absent/t5.safetensors does not exist"),
    "missing neighbour": (lambda path: Path("../absent"), "absent does not exist"),
    "folder without weights": (
        lambda path: path,
        r"holds no weights \(looked for \*.safetensors, pytorch_model.bin, .* and \*.gguf\); give the folder",
    ),
    "folder of several models": (
        lambda path: (
            [write_file(path / name, {"a": torch.zeros(1)}) for name in ("a.safetensors", "b.safetensors")] and path
        ),
        "holds 2 weight files .* .a.safetensors, b.safetensors.; name one of them",
    ),
    "pipeline without subfolder": (
        lambda path: [(path / "text_encoder_2").mkdir(), (path / "model_index.json").write_text("{}")] and path,
        "is a whole pipeline; give the subfolder of its T5 text encoder .text_encoder_2.",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_file(case: str, tmp_path: Path) -> None:
    make, expected = FILES[case]
    source = make(tmp_path)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_encoder(source, "float32", "cpu")
    assert str(source) in str(caught.value)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_no_permission(what: str, v1_1_folder: Path) -> None:
    locked = v1_1_folder if what == "folder" else v1_1_folder / "model.safetensors"
    locked.chmod(0)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        examine(v1_1_folder / "model.safetensors")
    locked.chmod(0o700)


def test_wrong_subfolder(tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path, V1_1, random_state(V1_1))
    with pytest.raises(CheckpointError, match=r"text_encoder_9 does not exist"):
        load_encoder(folder, subfolder="text_encoder_9")
