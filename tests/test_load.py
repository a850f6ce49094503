"""Loading: every kind of source gives the same encoder, and every fault is told before a weight is read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from backend_cases import by_modules
from checkpoints import (
    State,
    encoder_part,
    prefixed,
    scaled_float8,
    spiece_model,
    spiece_tensor,
    write_file,
    write_shards,
)
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state, write_hf_folder
from torch import Tensor

from nai_t5_core.facts.config import T5Config, config_to_hf
from nai_t5_core.model.encoder import LAYOUTS, Layout, T5EncoderStack
from nai_t5_core.tokenizer import ByteTokenizer, SentencePieceTokenizer
from nai_t5_core.weights.convert import convert
from nai_t5_core.weights.examine import ModelSource, examine, find_tokenizer, find_tokenizer_for
from nai_t5_core.weights.formats import Checkpoint, CheckpointError, open_checkpoint
from nai_t5_core.weights.hub import find_model
from nai_t5_core.weights.load import load, load_encoder

V1_1 = TOY_CONFIGS["v1.1"]
MASK = padding_mask([9, 4, 1], 9)
IDS = torch.randint(0, 96, (3, 9), generator=torch.Generator().manual_seed(3))
# A file with everything that Flux has, as ComfyUI saves it.
COMFY = "text_encoders.t5xxl.transformer."
OTHER_PARTS = {
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2),
    "text_encoders.clip_l.logit_scale": torch.tensor(1.0),
    "vae.decoder.conv_in.weight": torch.zeros(2, 2, 3, 3),
}


def on_cpu(source: ModelSource, layout: Layout = "fused", subfolder: str = "") -> T5EncoderStack:
    return load_encoder(source, torch.float32, "cpu", layout, subfolder)


@torch.no_grad()
def output(stack: T5EncoderStack) -> Tensor:
    """By its modules, whose numbers are the same wherever the weights are."""
    return by_modules(stack)(IDS, MASK)


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def bin_folder(folder: Path, state: State, config: T5Config = V1_1) -> Path:
    folder.mkdir()
    torch.save(dict(state), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    return folder


def bin_file(path: Path, state: State, **options: bool) -> Path:
    torch.save(dict(state), path, **options)
    return path


def embedding_copy_only(path: Path, state: State) -> Path:
    state = encoder_part(state)
    return write_file(path, {"encoder.embed_tokens.weight": state.pop("shared.weight"), **state})


SOURCES: dict[str, Callable[[Path, State], Path]] = {
    "safetensors file": lambda path, state: write_file(path / "t5.safetensors", state),
    "the encoder alone": lambda path, state: write_file(path / "t5.safetensors", encoder_part(state)),
    "folder with config.json": lambda path, state: write_hf_folder(path / "hf", V1_1, dict(state)),
    "folder without config.json": lambda path, state: write_file(path / "hf" / "model.safetensors", state).parent,
    "folder with a file of its own name": lambda path, state: write_file(path / "hf" / "t5.safetensors", state).parent,
    "sharded folder": lambda path, state: write_shards(path / "hf", state).parent,
    "index of shards": lambda path, state: write_shards(path / "hf", state),
    "pytorch_model.bin": lambda path, state: bin_folder(path / "hf", state),
    "pytorch_model.bin before 2020": lambda path, state: bin_file(
        path / "old.bin", state, _use_new_zipfile_serialization=False
    ),
    "sharded pytorch_model.bin": lambda path, state: write_shards(path / "hf", state, kind="bin").parent,
    "state_dict inside": lambda path, state: bin_file(path / "train.pt", {"state_dict": dict(state)}),
    "safetensors called .bin": lambda path, state: write_file(path / "t5.bin", state),
    "PyTorch called .safetensors": lambda path, state: bin_file(path / "t5.safetensors", state),
    "no suffix": lambda path, state: write_file(path / "t5", state),
    "all of Flux in one file": lambda path, state: write_file(
        path / "flux.safetensors", prefixed(encoder_part(state), COMFY) | OTHER_PARTS
    ),
    "embed_tokens without shared": lambda path, state: embedding_copy_only(path / "t5.safetensors", state),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_encoder(tmp_path: Path, source: str, layout: Layout) -> None:
    state = random_state(V1_1)
    stack = on_cpu(SOURCES[source](tmp_path, state), layout)
    assert torch.equal(output(stack), output(build_stack(V1_1, state, layout=layout)))
    assert (stack.layout, stack.config, stack.training) == (layout, V1_1.encoder_only(), False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_kind_of_model(tmp_path: Path, config: T5Config, layout: Layout) -> None:
    state = random_state(config)
    stack = on_cpu(write_hf_folder(tmp_path, config, state), layout)
    assert torch.equal(output(stack), output(build_stack(config, state, layout=layout)))
    assert stack.config == config.encoder_only()


def test_file_of_a_whole_model_is_read_as_its_folder(tmp_path: Path) -> None:
    """The activation of UL2 stands in config.json alone."""
    config = TOY_CONFIGS["ul2"]
    folder = write_hf_folder(tmp_path, config, random_state(config))
    (folder / "spiece.model").write_bytes(spiece_model())
    assert on_cpu(folder / "model.safetensors").config.activation == "silu"
    assert find_tokenizer_for(folder / "model.safetensors").serialized() == ("sentencepiece", spiece_model())


def test_single_file_goes_before_the_index_of_an_absent_form(tmp_path: Path) -> None:
    """As the hub's folders have it when only safetensors were downloaded."""
    folder = write_hf_folder(tmp_path, V1_1, random_state(V1_1))
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"shared.weight": "absent.bin"}}')
    assert examine(folder).faults == []


def test_float8_without_scales(tmp_path: Path) -> None:
    state = random_state(V1_1)
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in encoder_part(state).items()}
    meant = {name: tensor.float() for name, tensor in small.items()}
    stack = on_cpu(write_file(tmp_path / "fp8.safetensors", small))
    assert torch.equal(output(stack), output(build_stack(V1_1, meant)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_scaled_float8(tmp_path: Path, spelling: str, layout: Layout) -> None:
    stored, meant = scaled_float8(encoder_part(random_state(V1_1)), spelling)
    query = "encoder.block.0.layer.0.SelfAttention.q"
    # What ComfyUI's files have besides: a scale for activations, and since 2026 a note on how it was quantised.
    stored[f"{query}.scale_input"] = torch.tensor(1.0)
    stored[f"{query}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    loaded = load(write_file(tmp_path / "fp8.safetensors", stored), torch.float32, "cpu", layout)
    assert torch.equal(output(loaded.stack), output(build_stack(V1_1, meant, layout=layout)))
    assert f"{query}.{spelling}" in loaded.report.used
    assert loaded.report.ignored.keys() == {"scaled_fp8", f"{query}.scale_input", f"{query}.comfy_quant"}


def test_scale_for_every_row(tmp_path: Path) -> None:
    state = encoder_part(random_state(V1_1))
    name = "encoder.block.1.layer.1.DenseReluDense.wo"
    scales = torch.rand(64, 1) + 0.5
    stored = {**state, f"{name}.weight": state[f"{name}.weight"] / scales, f"{name}.weight_scale": scales}
    stack = on_cpu(write_file(tmp_path / "t5.safetensors", stored), "separate")
    torch.testing.assert_close(stack.state_dict()[f"{name}.weight"], state[f"{name}.weight"])


def test_scale_of_the_embedding_follows_its_copy(tmp_path: Path) -> None:
    state = encoder_part(random_state(V1_1))
    embedding = state.pop("shared.weight")
    state |= {"encoder.embed_tokens.weight": embedding / 2, "encoder.embed_tokens.scale_weight": torch.tensor(2.0)}
    assert torch.equal(on_cpu(write_file(tmp_path / "t5.safetensors", state)).shared.weight, embedding)


@pytest.mark.parametrize("architecture", ["T5EncoderModel", "T5ForConditionalGeneration", "UMT5EncoderModel"])
@torch.no_grad()
def test_saved_by_transformers(tmp_path: Path, architecture: str) -> None:
    transformers = pytest.importorskip("transformers")
    model_class = getattr(transformers, architecture)
    kind = "umt5" if architecture.startswith("UMT5") else "v1.1"
    torch.manual_seed(0)
    hf = model_class(model_class.config_class(**config_to_hf(TOY_CONFIGS[kind]))).eval()
    hf.save_pretrained(tmp_path)
    expected = hf.get_encoder()(IDS, MASK).last_hidden_state
    for layout in LAYOUTS:
        torch.testing.assert_close(output(on_cpu(tmp_path, layout)), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines, tokenizers, the hub
# ---------------------------------------------------------------------------------------------------------------------


def write_pipeline(folder: Path, state: State) -> Path:
    """Flux in the layout of diffusers: CLIP first, then T5."""
    write_file(folder / "text_encoder" / "model.safetensors", {"text_model.encoder.layers.0.q": torch.zeros(1)})
    write_hf_folder(folder / "text_encoder_2", V1_1.encoder_only(), encoder_part(state))
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    (folder / "tokenizer_2" / "spiece.model").write_bytes(spiece_model())
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return folder


def test_pipeline_with_subfolder(tmp_path: Path) -> None:
    state = random_state(V1_1)
    loaded = load(write_pipeline(tmp_path, state), torch.float32, "cpu", subfolder="text_encoder_2")
    assert torch.equal(output(loaded.stack), output(build_stack(V1_1, state)))
    assert loaded.tokenizer is not None and loaded.tokenizer.serialized() == ("sentencepiece", spiece_model())


def test_tokenizer_inside_a_single_file(tmp_path: Path) -> None:
    """Wan's UMT5 file."""
    config = TOY_CONFIGS["umt5"]
    state = encoder_part(random_state(config))
    loaded = load(
        write_file(tmp_path / "umt5.safetensors", state | {"spiece_model": spiece_tensor()}), "float32", "cpu"
    )
    assert loaded.tokenizer is not None and loaded.tokenizer.serialized() == ("sentencepiece", spiece_model())
    assert torch.equal(output(loaded.stack), output(build_stack(config, state)))
    assert loaded.report.ignored == {"spiece_model": "a tokenizer"}


def test_tokenizer_of_another_model_in_the_file_is_not_taken(tmp_path: Path) -> None:
    others = OTHER_PARTS | {"text_encoders.gemma2_2b.spiece_model": torch.zeros(3, dtype=torch.uint8)}
    weights = prefixed(encoder_part(random_state(V1_1)), COMFY) | others
    assert find_tokenizer(examine(write_file(tmp_path / "without.safetensors", weights))) is None
    weights["text_encoders.spiece_model"] = spiece_tensor()
    assert find_tokenizer_for(write_file(tmp_path / "with.safetensors", weights)).serialized()[1] == spiece_model()


def test_tokenizer_that_was_cast_with_the_weights_is_not_taken(tmp_path: Path) -> None:
    weights = encoder_part(random_state(V1_1)) | {"spiece_model": spiece_tensor().to(torch.float16)}
    assert load(write_file(tmp_path / "t5.safetensors", weights), "float32", "cpu").tokenizer is None


def test_damaged_tokenizer_does_not_hinder_the_weights(v1_1_folder: Path) -> None:
    (v1_1_folder / "tokenizer.json").write_text("{")
    assert output(on_cpu(v1_1_folder)).shape == (3, 9, 64)
    with pytest.raises(ValueError, match=r"tokenizer.json.* is no T5 tokenizer"):
        find_tokenizer(examine(v1_1_folder))


def test_byt5_needs_no_tokenizer_file(tmp_path: Path) -> None:
    config = TOY_CONFIGS["byt5"]
    assert isinstance(find_tokenizer_for(write_hf_folder(tmp_path, config, random_state(config))), ByteTokenizer)


def test_embedded_model_is_the_default() -> None:
    loaded = load(dtype="float32", device="cpu")
    assert isinstance(loaded.tokenizer, SentencePieceTokenizer)
    assert loaded.tokenizer.vocab_size == loaded.stack.config.vocab_size
    assert torch.isfinite(output(loaded.stack)).all()


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no way to the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached_repo(cache: Path, repo: str) -> Path:
    """The snapshot folder of a model in the hub's cache."""
    place, commit = cache / f"models--{repo.replace('/', '--')}", "0" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    return place / "snapshots" / commit


def test_hub_id_from_the_cache(hub_cache: Path) -> None:
    state = random_state(V1_1)
    write_hf_folder(cached_repo(hub_cache, "someone/t5-toy"), V1_1, state)
    assert torch.equal(output(on_cpu("someone/t5-toy")), output(build_stack(V1_1, state)))


def test_hub_id_of_a_pipeline_from_the_cache(hub_cache: Path) -> None:
    state = random_state(V1_1)
    write_pipeline(cached_repo(hub_cache, "someone/flux-toy"), state)
    stack = on_cpu("someone/flux-toy", subfolder="text_encoder_2")
    assert torch.equal(output(stack), output(build_stack(V1_1, state)))
    with pytest.raises(CheckpointError, match=r"whole pipeline; give the subfolder .*text_encoder, text_encoder_2"):
        on_cpu("someone/flux-toy")


def test_hub_id_offline_and_not_cached(hub_cache: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"'someone/absent' is neither a local path nor in the hub's cache.*go onl"
    ):
        on_cpu("someone/absent")


FLAT_REPO = ["config.json", "spiece.model", "model.safetensors", "pytorch_model.bin", "tf_model.h5", "onnx/a.json"]
SHARDED = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
PIPELINE_REPO = [
    "model_index.json",
    "flux1-dev.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    *(f"text_encoder_2/{name}" for name in (*SHARDED, "model.fp16-00001-of-00001.safetensors")),
    "tokenizer/vocab.json",
    "tokenizer_2/spiece.model",
]
DOWNLOADED = {
    "one form of the weights": (FLAT_REPO, "", FLAT_REPO[:3]),
    "PyTorch where there is nothing else": (
        ["config.json", "pytorch_model.bin"],
        "",
        ["config.json", "pytorch_model.bin"],
    ),
    "safetensors of any name before PyTorch": (["t5.safetensors", "pytorch_model.bin"], "", ["t5.safetensors"]),
    "GGUF where there is nothing else": (["README.md", "t5-Q8_0.gguf"], "", ["t5-Q8_0.gguf"]),
    "the encoder of a pipeline": (
        PIPELINE_REPO,
        "text_encoder_2",
        ["text_encoder_2/config.json", *(f"text_encoder_2/{name}" for name in SHARDED), "tokenizer_2/spiece.model"],
    ),
}


@pytest.mark.parametrize("case", DOWNLOADED)
def test_what_is_downloaded(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, subfolder, expected = DOWNLOADED[case]
    asked: list[str] = []

    def snapshot_download(repo: str, allow_patterns: list[str], **_: object) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repo, **_: files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_model("someone/model", subfolder) == tmp_path / subfolder
    assert sorted(asked) == sorted(expected)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (PIPELINE_REPO, "whole pipeline; give the subfolder of its T5 text encoder .text_encoder, text_encoder_2."),
        (["a.safetensors", "b.safetensors"], "2 weight files .a.safetensors, b.safetensors.; download one"),
        (["t5-Q4_K.gguf", "t5-Q8_0.gguf"], "2 weight files .t5-Q4_K.gguf, t5-Q8_0.gguf.; download one"),
    ],
)
def test_too_much_is_not_downloaded(files: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repo, **_: files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(CheckpointError, match=expected):
        find_model("someone/model")


def test_failed_connection_without_a_text(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionResetError

    monkeypatch.setattr("huggingface_hub.list_repo_files", fail)
    with pytest.raises(CheckpointError, match=r"the hub cannot be reached \(ConnectionResetError\)"):
        find_model("someone/absent")


# ---------------------------------------------------------------------------------------------------------------------
# What is told
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_report_accounts_for_every_tensor(tmp_path: Path, layout: Layout) -> None:
    state = random_state(V1_1)
    path = write_file(tmp_path / "flux.safetensors", prefixed(state, COMFY) | OTHER_PARTS)
    report = load(path, "float32", "cpu", layout).report
    assert sorted(report.used) == sorted(encoder_part(state))
    used = {COMFY + name for name in report.used}
    assert not used & report.ignored.keys()
    assert used | report.ignored.keys() == open_checkpoint(path).tensors.keys()
    assert report.ignored[f"{COMFY}lm_head.weight"] == "belongs to the decoder"
    assert report.ignored["vae.decoder.conv_in.weight"] == f"not under {COMFY!r}: another part of the file"
    assert (report.kind, report.format, report.dtype, report.layout) == (
        "T5 v1.1",
        "safetensors",
        torch.float32,
        layout,
    )
    assert f"{len(used)} tensors used, {len(report.ignored)} ignored, none missing" in str(report)
    assert "another part of the file" in str(report)


def test_report_of_a_copied_embedding(tmp_path: Path) -> None:
    state = encoder_part(random_state(V1_1))
    state["encoder.embed_tokens.weight"] = state["shared.weight"].clone()
    report = load(write_file(tmp_path / "t5.safetensors", state), "float32", "cpu").report
    assert report.ignored == {"encoder.embed_tokens.weight": "a copy of the embedding, shared.weight"}


def faulty(state: State) -> dict[str, Tensor]:
    """One tensor missing, one misshapen, one surplus, one unknown, one of integers, one scale without its weight."""
    changed = encoder_part(state)
    del changed["encoder.block.1.layer.0.SelfAttention.k.weight"]
    changed["encoder.block.2.layer.1.DenseReluDense.wo.weight"] = torch.zeros(64, 81)
    changed["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"] = torch.zeros(32, 4)
    changed["encoder.block.0.layer.0.SelfAttention.q.bias"] = torch.zeros(64)
    changed["encoder.block.0.layer.0.SelfAttention.v.weight"] = torch.zeros(64, 64, dtype=torch.int8)
    changed["encoder.block.7.layer.0.SelfAttention.v.scale_weight"] = torch.tensor(1.0)
    changed["encoder.block.0.layer.0.SelfAttention.q.scale_weight"] = torch.ones(63)
    return changed


FAULTS = [
    r"encoder.block.1.layer.0.SelfAttention.k.weight is missing (expected [64, 64] according to config.json)",
    r"encoder.block.2.layer.1.DenseReluDense.wo.weight has shape [64, 81], but config.json asks for [64, 80]",
    r"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight is in the file, but config.json describes a "
    "model without it",
    r"tensors that no T5 has: encoder.block.0.layer.0.SelfAttention.q.bias",
    r"encoder.block.0.layer.0.SelfAttention.v.weight is torch.int8: a weight of this type can be read only with its "
    "scales beside it",
    r"encoder.block.7.layer.0.SelfAttention.v.scale_weight is the scale of "
    "encoder.block.7.layer.0.SelfAttention.v.weight, which is not in the file",
    r"encoder.block.0.layer.0.SelfAttention.q.scale_weight has shape [63]; only one scale for a whole weight, or one "
    "for each row, can be read",
]


def test_all_faults_at_once_and_before_a_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_hf_folder(tmp_path, V1_1, faulty(random_state(V1_1)))

    def opened(*arguments: object) -> Checkpoint:
        checkpoint = open_checkpoint(*arguments)  # type: ignore[arg-type]
        checkpoint.read = lambda name: pytest.fail(f"{name} was read")
        return checkpoint

    monkeypatch.setattr("nai_t5_core.weights.examine.open_checkpoint", opened)
    with pytest.raises(CheckpointError) as caught:
        on_cpu(folder)
    first, *listed = str(caught.value).splitlines()
    assert first == f"{folder} cannot be loaded, {len(FAULTS)} faults:"
    assert sorted(listed) == sorted(f"  - {fault}" for fault in FAULTS)


def test_faults_of_our_own_format(tmp_path: Path, v1_1_folder: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    done = convert(v1_1_folder, tmp_path / "own.safetensors", encoder_only=True)
    tensors = load_file(done.out)
    tensors["encoder.surplus.weight"] = tensors.pop("encoder.final_layer_norm.weight")
    with safe_open(done.out, "pt") as file:
        save_file(tensors, tmp_path / "faulty.safetensors", metadata=file.metadata())
    with pytest.raises(CheckpointError, match=r"(?s)2 faults.*final_layer_norm.weight is missing.*encoder.surplus"):
        on_cpu(tmp_path / "faulty.safetensors")


def test_separate_layout_of_our_own_format(tmp_path: Path, v1_1_folder: Path) -> None:
    done = convert(v1_1_folder, tmp_path / "own.safetensors")
    ids = torch.tensor([[5, 6, 7, 1]])
    fused, separate = on_cpu(done.out), on_cpu(done.out, "separate")
    with torch.no_grad():
        assert torch.allclose(fused(ids), separate(ids), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def mapped(path: Path) -> list[range]:
    """The addresses at which this process has mapped a file."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [parts[0].split("-") for parts in lines if parts[5:] == [str(path.resolve())]]
    return [range(int(start, 16), int(stop, 16)) for start, stop in spans]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_format_is_a_view_of_the_file(tmp_path: Path, v1_1_folder: Path, dtype: torch.dtype) -> None:
    """Nothing is copied where the file has the model's dtype; where it has not, every weight is."""
    path = convert(v1_1_folder, tmp_path / "own.safetensors", "float32").out
    stack = load_encoder(path, dtype, "cpu")
    spans = mapped(path)
    tensors = {name: any(tensor.data_ptr() in span for span in spans) for name, tensor in stack.state_dict().items()}
    norms = {name for name in tensors if "layer_norm" in name}
    assert {name for name, is_view in tensors.items() if is_view} == (
        norms if dtype == torch.bfloat16 else tensors.keys()
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("source", ["safetensors file", "pytorch_model.bin"])
def test_separate_layout_is_a_view_of_the_file(tmp_path: Path, source: str) -> None:
    path = SOURCES[source](tmp_path, random_state(V1_1))
    stack = on_cpu(path, "separate")
    spans = mapped(path / "pytorch_model.bin" if path.is_dir() else path)
    assert all(any(tensor.data_ptr() in span for span in spans) for tensor in stack.state_dict().values())
