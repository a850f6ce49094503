"""The drop-in class takes weights from loaded models and from files, and gives them back."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import encoder_part, write_file
from conftest import TOY_CONFIGS, random_state, write_hf_folder
from hf_toys import MASK, V1_1_IDS, assert_near, hf_model, ids_for
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from nai_t5_core.bench.stress import stress_state
from nai_t5_core.facts.config import T5Config
from nai_t5_core.float16.guard import ScaleTightenedWarning
from nai_t5_core.model.encoder import Layout
from nai_t5_core.weights import ranges
from nai_t5_core.weights.convert import convert
from nai_t5_core.weights.formats import CheckpointError
from nai_t5_core.weights.load import load_encoder

pytest.importorskip("transformers")

from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel


@pytest.fixture
def reference(config: T5Config) -> nn.Module:
    return hf_model(config)


@pytest.fixture
def v1_1() -> NAIT5EncoderModel:
    return NAIT5EncoderModel.from_hf(hf_model(TOY_CONFIGS["v1.1"]))


# ---------------------------------------------------------------------------------------------------------------------
# From a loaded model, and back
# ---------------------------------------------------------------------------------------------------------------------


def test_release_and_give_back(config: T5Config, reference: nn.Module) -> None:
    ids = ids_for(config)
    expected = reference(ids, MASK)[0].detach()
    ours = NAIT5EncoderModel.from_hf(reference, release=True)
    assert {parameter.device.type for parameter in reference.parameters()} == {"meta"}
    assert_near(ours(ids, MASK)[0], expected)
    ours.give_back(reference)
    assert_near(reference(ids, MASK)[0], expected)
    assert reference.encoder.embed_tokens.weight is reference.shared.weight  # type: ignore[union-attr]


def test_separate_layout_gives_the_very_tensors_back() -> None:
    reference = hf_model(TOY_CONFIGS["v1.1"], dtype=torch.bfloat16)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in reference.state_dict().items()}
    ours = NAIT5EncoderModel.from_hf(reference, layout="separate", release=True)
    assert ours.dtype == torch.bfloat16
    for name in ("shared.weight", "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"):
        assert ours.state_dict()[name].data_ptr() == before[name][0], "shared, not copied"
    ours.give_back(reference)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, before[name][1])


def test_weights_are_never_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """While ours are made, theirs go: at no time are there more than the weights and what is being made."""
    reference = hf_model(TOY_CONFIGS["v1.1"])
    # Of the memory itself, which a view keeps when the parameter is gone. Norms are kept in float32 and shared.
    memory = {StorageWeakRef(p.untyped_storage()): p.nbytes for p in reference.parameters() if p.ndim == 2}

    def alive() -> int:
        return sum(nbytes for storage, nbytes in memory.items() if not storage.expired())

    total = alive()
    made, peak = 0, 0
    real = ranges.cook

    def counting(*arguments: Any) -> Tensor:
        nonlocal made, peak
        tensor = real(*arguments)
        made += tensor.nbytes
        peak = max(peak, made + alive())
        return tensor

    monkeypatch.setattr(ranges, "cook", counting)
    ours = NAIT5EncoderModel.from_hf(reference, torch.float64, release=True)
    largest = max(tensor.nbytes for tensor in ours.state_dict().values())
    # In twice the precision, so that nothing is shared: half of what was made has replaced as many numbers of theirs.
    assert made > 1.8 * total and not alive()
    assert peak <= made + largest


@pytest.mark.parametrize("layout", ["fused", "separate"])
def test_weights_are_given_back_without_holding_them_twice(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = hf_model(TOY_CONFIGS["v1.1"])
    expected = reference(V1_1_IDS, MASK)[0].detach()
    ours = NAIT5EncoderModel.from_hf(reference, layout=layout, release=True)
    alive = {id(p): p.nbytes for p in ours.stack.encoder.block.parameters()}
    for parameter in ours.stack.encoder.block.parameters():
        weakref.finalize(parameter, alive.pop, id(parameter))
    del parameter
    blocks = len(ours.stack.encoder.block)
    kept: list[int] = []
    real = type(reference).load_state_dict

    def counting(model: Any, state: Any, **options: Any) -> Any:
        if any(name.startswith("encoder.block.") for name in state):
            kept.append(sum(alive.values()))
        return real(model, state, **options)

    monkeypatch.setattr(type(reference), "load_state_dict", counting)
    ours.give_back(reference, release=True)
    total = kept[0]
    assert not alive and len(kept) == blocks
    assert all(held <= total * (blocks - done) / blocks * 1.01 for done, held in enumerate(kept))
    assert_near(reference(V1_1_IDS, MASK)[0], expected)


def test_the_source_keeps_its_config_and_weights(config: T5Config, reference: nn.Module) -> None:
    before, weights = reference.config.to_dict(), {k: v.clone() for k, v in reference.state_dict().items()}
    ours = NAIT5EncoderModel.from_hf(reference)
    ours.config.vocab_size = 5
    assert reference.config.to_dict() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in reference.state_dict().items())
    assert ours.config.model_type == reference.config.model_type and ours.config.d_model == config.d_model
    assert not ours.training


def test_models_that_are_no_loaded_t5_are_refused() -> None:
    meta = hf_model(TOY_CONFIGS["v1.1"]).to("meta")
    with pytest.raises(CheckpointError, match=r"weights on the meta device, such as shared\.weight"):
        NAIT5EncoderModel.from_hf(meta)
    damaged = hf_model(TOY_CONFIGS["v1.1"])
    damaged.encoder.block[1].layer[0].SelfAttention.q.weight = nn.Parameter(torch.zeros(3, 3))  # type: ignore
    damaged.encoder.block[0].layer[0].SelfAttention.adapter = nn.Linear(2, 2)  # type: ignore
    with pytest.raises(CheckpointError, match="2 faults") as error:
        NAIT5EncoderModel.from_hf(damaged)
    assert "block.1.layer.0.SelfAttention.q.weight has shape [3, 3]" in str(error.value)
    assert "tensors that no T5 has: encoder.block.0.layer.0.SelfAttention.adapter.weight" in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# From files, and into them
# ---------------------------------------------------------------------------------------------------------------------


def test_from_a_folder_a_subfolder_and_a_file(config: T5Config, kind: str, tmp_path: Path) -> None:
    state = random_state(config)
    expected = hf_model(config)(ids_for(config), MASK)[0]
    write_hf_folder(tmp_path / "pipe" / "text_encoder_2", config, state)
    native = tmp_path / "native.safetensors"
    convert(tmp_path / "pipe" / "text_encoder_2", native)
    models = [
        NAIT5EncoderModel.from_pretrained(tmp_path / "pipe" / "text_encoder_2"),
        NAIT5EncoderModel.from_pretrained(str(tmp_path / "pipe"), subfolder="text_encoder_2", layout="separate"),
        NAIT5EncoderModel.from_pretrained(native, torch_dtype=torch.float32),
    ]
    if kind != "ul2":  # its activation is in config.json alone
        file = write_file(tmp_path / "alone.safetensors", encoder_part(state))
        models.append(NAIT5EncoderModel.from_pretrained(file, device_map={"": "cpu"}))
    for model in models:
        assert not model.training
        assert_near(model(ids_for(config), MASK)[0], expected)
        assert model.config.model_type == ("umt5" if kind == "umt5" else "t5")


def test_dtype_argument(v1_1_folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    convert(v1_1_folder, half, dtype="bfloat16")
    assert NAIT5EncoderModel.from_pretrained(half).dtype == torch.bfloat16
    assert NAIT5EncoderModel.from_pretrained(half, dtype=None).dtype == torch.float32
    assert NAIT5EncoderModel.from_pretrained(half, dtype="float16").dtype == torch.float16
    assert NAIT5EncoderModel.from_pretrained(v1_1_folder, torch_dtype=torch.float16).dtype == torch.float16


def test_what_cannot_be_loaded_is_said(v1_1_folder: Path) -> None:
    load_it = NAIT5EncoderModel.from_pretrained
    with pytest.raises(CheckpointError, match=r"has no model\.fp16\.safetensors; leave out variant"):
        load_it(v1_1_folder, variant="fp16")
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        load_it(v1_1_folder, dtype="int8")
    state = random_state(TOY_CONFIGS["v1.1"])
    del state["encoder.block.1.layer.0.SelfAttention.k.weight"]
    with pytest.raises(CheckpointError, match=r"SelfAttention\.k\.weight is missing"):
        load_it(write_hf_folder(v1_1_folder / "bad", TOY_CONFIGS["v1.1"], state))


@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_save_and_load(
    config: T5Config, reference: nn.Module, layout: Any, variant: str | None, tmp_path: Path
) -> None:
    ids = ids_for(config)
    ours = NAIT5EncoderModel.from_hf(reference, layout=layout)
    ours.save_pretrained(tmp_path / "native", variant=variant)
    again = NAIT5EncoderModel.from_pretrained(tmp_path / "native", variant=variant)
    assert_near(again(ids, MASK)[0], ours(ids, MASK)[0])
    assert again.config.model_type == ours.config.model_type
    assert_near(load_encoder(tmp_path / "native", "float32")(ids, MASK), ours(ids, MASK)[0])

    ours.save_pretrained(tmp_path / "theirs", save_format="transformers", variant=variant)
    theirs = type(reference).from_pretrained(tmp_path / "theirs", variant=variant)  # type: ignore[attr-defined]
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], rtol=1e-6, atol=1e-7)
    assert_near(NAIT5EncoderModel.from_pretrained(tmp_path / "theirs", variant=variant)(ids)[0], reference(ids)[0])


def test_scales_survive_saving(tmp_path: Path) -> None:
    config = TOY_CONFIGS["v1.1"]
    ours = NAIT5EncoderModel.from_hf(hf_model(config, stress_state(config, "feed_forward_out")), torch.float16)
    with pytest.warns(ScaleTightenedWarning):
        expected = ours(V1_1_IDS, MASK)[0]
    ours.save_pretrained(tmp_path / "native")
    again = NAIT5EncoderModel.from_pretrained(tmp_path / "native")
    assert again.stack.scales == ours.stack.scales and not again.stack.scales.is_one
    assert torch.equal(again(V1_1_IDS, MASK)[0], expected)


def test_what_cannot_be_saved_is_said(v1_1: NAIT5EncoderModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allowed: native, transformers"):
        v1_1.save_pretrained(tmp_path, save_format="gguf")  # type: ignore[arg-type]
    v1_1.save_pretrained(tmp_path / "nothing", is_main_process=False)
    assert not (tmp_path / "nothing").exists()
