"""Loading and converting a whole T5: whatever the source, the same model, with the head that it really has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import encoder_part, spiece_model, write_file, write_shards
from conftest import TOY_CONFIGS, padding_mask, random_state, write_hf_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import nai_t5_core
from nai_t5_core.bench.peers import own_t5
from nai_t5_core.facts.config import T5Config, config_to_hf
from nai_t5_core.facts.scales import StackScales, published_scales, unscaled
from nai_t5_core.generation.t5 import T5
from nai_t5_core.model.encoder import LAYOUTS, Layout
from nai_t5_core.weights.convert import convert
from nai_t5_core.weights.examine import examine
from nai_t5_core.weights.formats import CheckpointError
from nai_t5_core.weights.fuse import unfuse
from nai_t5_core.weights.load import load_encoder, load_t5, load_whole

V1_1 = TOY_CONFIGS["v1.1"]
MASK = padding_mask([9, 4, 1], 9)
IDS = torch.randint(0, 96, (3, 9), generator=torch.Generator().manual_seed(3))
TEXTS = torch.randint(0, 96, (3, 7), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits(model: T5) -> Tensor:
    return model(IDS, MASK, decoder_input_ids=TEXTS).logits


def on_cpu(source: Path, layout: Layout = "fused", dtype: torch.dtype = torch.float32) -> T5:
    return load_t5(source, dtype, "cpu", layout)


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folder(tmp_path: Path, config: T5Config, layout: Layout) -> None:
    state = random_state(config)
    model = on_cpu(write_hf_folder(tmp_path / "hf", config, state), layout)
    assert torch.equal(logits(model), logits(own_t5(config, state, torch.float32, layout)))
    assert not model.training and model.config == config


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(tmp_path: Path, kind: str) -> None:
    state = random_state(V1_1)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config_to_hf(V1_1)))
    write_shards(tmp_path / "hf", state, kind)
    assert torch.equal(logits(on_cpu(tmp_path / "hf")), logits(own_t5(V1_1, state, torch.float32)))


@pytest.mark.parametrize("name", ["v1.0", "v1.1"])
def test_one_file_without_a_config(tmp_path: Path, name: str) -> None:
    config = TOY_CONFIGS[name]
    state = random_state(config)
    model = on_cpu(write_file(tmp_path / "t5.safetensors", state))
    assert torch.equal(logits(model), logits(own_t5(config, state, torch.float32)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_converted(tmp_path: Path, config: T5Config, dtype: str, layout: Layout) -> None:
    """Bit for bit the original where the file is taken as it is; else to the rounding of taking it apart."""
    folder = write_hf_folder(tmp_path / "hf", config, random_state(config))
    done = convert(folder, tmp_path / "own.safetensors", dtype)
    original, converted = (load_t5(source, dtype, "cpu", layout) for source in (folder, done.out))
    assert converted.config == config and converted.dtype == original.dtype
    expected, found = logits(original), logits(converted)
    if layout == "fused":
        assert torch.equal(found, expected)
    else:
        tolerance = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}[dtype]
        assert float((found - expected).abs().max() / expected.abs().max()) <= tolerance
    assert torch.equal(load_encoder(done.out, dtype, "cpu")(IDS), load_encoder(folder, dtype, "cpu")(IDS))


def test_embedded_model() -> None:
    loaded = load_whole(None, torch.float32, "cpu")
    assert loaded.tokenizer is not None
    tokens = loaded.tokenizer(["a cat", "two dogs on a sofa"])
    ids, mask = torch.tensor(tokens.input_ids), torch.tensor(tokens.attention_mask)
    texts = loaded.model.generate(ids, mask, num_beams=3, max_new_tokens=6)
    assert texts.shape[0] == 2 and 1 <= texts.shape[1] <= 6
    assert loaded.model.lm_head.weight is loaded.model.shared.weight


def test_exported() -> None:
    assert nai_t5_core.T5 is T5 and nai_t5_core.load_t5 is load_t5


# ---------------------------------------------------------------------------------------------------------------------
# The head
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("class_name", ["T5", "MT5", "UMT5"])
@torch.no_grad()
def test_saved_by_transformers(tmp_path: Path, class_name: str, said: bool, with_head: bool) -> None:
    """Whatever its config was told, with a head of its own or without: as transformers loads it again."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    is_old = int(transformers.__version__.split(".")[0]) < 5
    if is_old and said and with_head:
        pytest.skip("before 5.0 transformers puts the embeddings in place of a head that the file has")
    values = config_to_hf(V1_1) | {"tie_word_embeddings": said}
    values.pop("model_type"), values.pop("architectures")
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{class_name}ForConditionalGeneration")
    model = model_class(getattr(transformers, f"{class_name}Config")(**values))
    if with_head:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(96, 64))
    model.save_pretrained(tmp_path)
    # Under SDPA the decoder of transformers 5.17's UMT5 sees tokens that follow.
    reference = model_class.from_pretrained(tmp_path, attn_implementation="eager").eval()
    expected = reference(input_ids=IDS, attention_mask=MASK, decoder_input_ids=TEXTS).logits
    written = json.loads((tmp_path / "config.json").read_text())
    if class_name == "UMT5" and with_head and "scale_decoder_outputs" not in written and not is_old:
        # From 5.0 to 5.23 it scales the outputs of every UMT5, also of those that were trained without.
        expected = expected * 8
    found = logits(on_cpu(tmp_path))
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5


SINCE_5 = {"tie_word_embeddings": True, "transformers_version": "5.23.0"}
SINCE_5_24 = {"tie_word_embeddings": True, "transformers_version": "5.24.0"}


@pytest.mark.parametrize(
    ("model_type", "written", "head", "scaled"),
    [
        # transformers 4: what is tied is scaled. Its .bin files hold a tied head, its safetensors do not.
        ("umt5", {"tie_word_embeddings": False, "transformers_version": "4.57.1"}, "own", False),
        ("umt5", {"tie_word_embeddings": True, "transformers_version": "4.57.1"}, "none", True),
        ("umt5", {"tie_word_embeddings": True, "transformers_version": "4.57.1"}, "copy", True),
        ("mt5", {"tie_word_embeddings": False, "transformers_version": "4.57.1"}, "own", False),
        ("mt5", {"tie_word_embeddings": True, "transformers_version": "4.57.1"}, "none", True),
        # From 5.0 to 5.23, UMT5 and mT5 are "tied" whatever they were; the published ones have a head.
        ("umt5", SINCE_5, "own", False),
        ("umt5", SINCE_5, "none", True),
        ("mt5", SINCE_5, "own", False),
        ("mt5", SINCE_5, "none", False),
        ("t5", SINCE_5 | {"scale_decoder_outputs": False}, "own", False),
        ("t5", SINCE_5 | {"scale_decoder_outputs": True}, "none", True),
        # Since 5.24, UMT5's files tell it, as T5's do.
        ("umt5", SINCE_5_24 | {"scale_decoder_outputs": False}, "own", False),
        ("umt5", SINCE_5_24 | {"scale_decoder_outputs": False}, "none", False),
        ("umt5", SINCE_5_24 | {"scale_decoder_outputs": True}, "own", True),
        ("umt5", SINCE_5_24 | {"scale_decoder_outputs": True}, "none", True),
        ("mt5", SINCE_5_24, "own", False),
        ("mt5", SINCE_5_24, "none", False),
    ],
)
def test_head_of_every_generation(
    tmp_path: Path, model_type: str, written: dict[str, Any], head: str, scaled: bool
) -> None:
    """Scaled as the release of transformers that wrote the file computes it, or as the published model was trained."""
    config = TOY_CONFIGS["umt5" if model_type == "umt5" else "v1.1"].model_copy(
        update={"tie_word_embeddings": head != "own", "scale_decoder_outputs": scaled}
    )
    state = random_state(config)
    expected = logits(own_t5(config, state, torch.float32))
    if head == "copy":
        state["lm_head.weight"] = state["shared.weight"].clone()
    folder = write_hf_folder(tmp_path / "hf", config, state)
    values = {name: value for name, value in config_to_hf(config).items() if name != "scale_decoder_outputs"}
    (folder / "config.json").write_text(json.dumps(values | {"model_type": model_type} | written))
    assert torch.equal(logits(on_cpu(folder)), expected)
    assert torch.equal(logits(on_cpu(convert(folder, tmp_path / "own.safetensors").out)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_a_copy_of_the_embedding_is_no_head(tmp_path: Path, dtype: torch.dtype) -> None:
    """The published v1.0 files have one."""
    config = TOY_CONFIGS["v1.0"]
    state = {name: tensor.to(dtype) for name, tensor in random_state(config).items()}
    copied = state | {"lm_head.weight": state["shared.weight"].clone()}
    loaded = load_whole(write_hf_folder(tmp_path / "hf", config, copied), torch.float32, "cpu")
    assert loaded.report.ignored == {"lm_head.weight": "a copy of the embedding, shared.weight"}
    assert loaded.model.config == config and loaded.model.lm_head.weight is loaded.model.shared.weight
    assert torch.equal(logits(loaded.model), logits(own_t5(config, state, torch.float32)))


def test_a_head_beside_a_config_that_denies_it(tmp_path: Path) -> None:
    """As transformers 5: it is used, and the outputs are scaled as the config says. Also after converting."""
    config = TOY_CONFIGS["v1.0"]
    state = random_state(config) | {"lm_head.weight": random_state(V1_1)["lm_head.weight"]}
    folder = write_hf_folder(tmp_path / "hf", config, state)
    untied = config.model_copy(update={"tie_word_embeddings": False, "scale_decoder_outputs": True})
    expected = logits(own_t5(untied, state, torch.float32))
    assert torch.equal(logits(on_cpu(folder)), expected)
    done = convert(folder, tmp_path / "own.safetensors")
    assert examine(done.out).config == untied
    assert torch.equal(logits(on_cpu(done.out)), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Float16
# ---------------------------------------------------------------------------------------------------------------------


def small_v1_1() -> T5Config:
    """As deep and as wide as T5 v1.1 small, whose scales are known, with a small vocabulary."""
    return nai_t5_core.named_config("t5-v1_1-small").model_copy(update={"vocab_size": 1000 + 96})


def test_published_scales_are_taken_and_kept(tmp_path: Path) -> None:
    config = small_v1_1()
    assert config.size_name == "t5-v1_1-small"
    folder = write_hf_folder(tmp_path / "hf", config, random_state(config))
    done = convert(folder, tmp_path / "own.safetensors", "float16")
    with safe_open(done.out, "pt") as file:
        kept = StackScales.from_json(file.metadata()["decoder_scales"])
    assert kept == published_scales(config, "decoder")
    original, converted = (on_cpu(source, dtype=torch.float16) for source in (folder, done.out))
    assert original.decoder_scales == converted.decoder_scales == kept
    block: Any = converted.decoder.block[4]
    assert [block.layer[index].out_scale for index in range(3)] == [0.5, 0.5, 0.5]
    assert torch.equal(logits(original), logits(converted))
    # Powers of two are taken back exactly, but for numbers that became subnormal.
    back = dict(unfuse(config, load_file(done.out).__getitem__, converted.encoder_stack.scales, kept))
    name = "decoder.block.4.layer.1.EncDecAttention.o.weight"
    torch.testing.assert_close(back[name], random_state(config)[name].half().float(), rtol=0, atol=2**-24)


def test_an_embedding_beyond_float16(tmp_path: Path) -> None:
    """Its scale is taken back where the embedding is read, and where a tied head reads it."""
    config = TOY_CONFIGS["v1.0"]
    state = random_state(config)
    state["shared.weight"][5, 3] = 1e5
    folder = write_hf_folder(tmp_path / "hf", config, state)
    model = on_cpu(folder, dtype=torch.float16)
    assert model.encoder_stack.scales.embedding == 0.5
    # Not the token itself, whose row is an outlier of its own.
    with torch.no_grad():
        ids, texts = IDS.where(IDS != 5, 6), TEXTS.where(TEXTS != 5, 6)
        expected = on_cpu(folder, dtype=torch.float64)(ids, MASK, decoder_input_ids=texts).logits
        found = model(ids, MASK, decoder_input_ids=texts).logits.double()
    others = torch.arange(96) != 5
    difference = (found - expected)[..., others].abs().max()
    assert float(difference / expected[..., others].abs().max()) <= 0.02


# ---------------------------------------------------------------------------------------------------------------------
# Reports and faults
# ---------------------------------------------------------------------------------------------------------------------


def test_report(tmp_path: Path) -> None:
    state = random_state(V1_1)
    report = load_whole(write_hf_folder(tmp_path / "hf", V1_1, state), torch.float32, "cpu").report
    assert sorted(report.used) == sorted(state) and report.ignored == {}
    assert f"{len(state)} tensors used, 0 ignored, none missing; fused layout" in str(report)


def test_tokenizer_comes_along(tmp_path: Path) -> None:
    config = V1_1.model_copy(update={"vocab_size": 4096})
    folder = write_hf_folder(tmp_path / "hf", config, random_state(config))
    (folder / "spiece.model").write_bytes(spiece_model())
    done = convert(folder, tmp_path / "own.safetensors")
    for source in (folder, done.out):
        tokenizer = load_whole(source, torch.float32, "cpu").tokenizer
        assert tokenizer is not None and tokenizer.vocab_size == 4096


def test_an_encoder_alone_is_refused(tmp_path: Path, v1_1_folder: Path) -> None:
    encoder = write_file(tmp_path / "encoder.safetensors", encoder_part(random_state(V1_1)))
    converted = convert(v1_1_folder, tmp_path / "own.safetensors", encoder_only=True).out
    for source in (encoder, converted):
        with pytest.raises(CheckpointError, match="has no decoder: it is the encoder alone, which cannot generate"):
            load_t5(source)


def test_faults_of_both_stacks_are_told_together(tmp_path: Path) -> None:
    state = random_state(V1_1)
    del state["encoder.block.1.layer.0.SelfAttention.q.weight"]
    del state["decoder.block.2.layer.1.EncDecAttention.v.weight"]
    state["lm_head.weight"] = torch.zeros(95, 64)
    folder = write_hf_folder(tmp_path / "hf", V1_1, state)
    with pytest.raises(CheckpointError, match="3 faults") as caught:
        load_t5(folder)
    for part in ("block.1.layer.0.SelfAttention.q", "EncDecAttention.v", "lm_head.weight has shape"):
        assert part in str(caught.value)


def test_a_head_of_another_shape_beside_a_tied_config(tmp_path: Path) -> None:
    config = TOY_CONFIGS["v1.0"]
    folder = write_hf_folder(tmp_path / "hf", config, random_state(config) | {"lm_head.weight": torch.zeros(95, 64)})
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \[95, 64\]"):
        load_t5(folder)


def test_other_mistakes(v1_1_folder: Path) -> None:
    with pytest.raises(ValueError, match="unknown layout 'joined'"):
        load_t5(v1_1_folder, layout="joined")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decoder_scales of 8 layers for a decoder of 3"):
        load_t5(v1_1_folder, decoder_scales=unscaled(8))
    save_file({"x": torch.zeros(1)}, v1_1_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is no T5"):
        load_t5(v1_1_folder)
