"""Replacing and restoring a pipeline's T5: offloading, moving, saving, sharing, and what cannot be done."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

pytest.importorskip("diffusers")

import diffusers
from conftest import random_state
from test_diffusers_families import assert_same
from toy_offloading import CPU, OFFLOADS, cpu_has_one_name, hooks_of, offload_model, offload_sequentially
from toy_pipelines import PROMPT, T5, Toy, make, text_encoder

from nai_t5_core.backends.choose import prepack, why_not_prepack
from nai_t5_core.bench.stress import stress_state
from nai_t5_core.diffusers.adapter import replace_text_encoder, restore_text_encoder
from nai_t5_core.float16.guard import ScaleTightenedWarning
from nai_t5_core.hf import NAIT5EncoderModel
from nai_t5_core.weights.formats import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")
__all__ = ["cpu_has_one_name"]  # a fixture for every test here

# ---------------------------------------------------------------------------------------------------------------------
# Replacing and restoring
# ---------------------------------------------------------------------------------------------------------------------


def test_policy_can_be_given_and_shows() -> None:
    toy = make("wan")
    assert replace_text_encoder(toy.pipe, padding="trim", extra_pad=2) is toy.pipe
    assert "fused, torch.float32, padding=trim, extra_pad=2" in repr(toy.encoder)
    ours = toy.encoder
    replace_text_encoder(toy.pipe)
    assert toy.encoder is ours and (ours.padding, ours.extra_pad) == ("skip", 0)


def test_dtype_and_training_mode() -> None:
    toy = make("pixart-sigma")
    toy.encoder.train()
    replace_text_encoder(toy.pipe, dtype=torch.bfloat16)
    assert toy.encoder.dtype == torch.bfloat16 and toy.encoder.training
    restore_text_encoder(toy.pipe)
    assert toy.encoder.dtype == torch.float32 and toy.encoder.training


def test_the_old_encoder_holds_no_values_meanwhile() -> None:
    toy = make("pixart-sigma")
    old = toy.encoder
    before = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    replace_text_encoder(toy.pipe, layout="separate")
    assert all(parameter.is_meta for parameter in old.parameters())
    assert restore_text_encoder(toy.pipe) is toy.pipe
    assert toy.encoder is old
    assert all(torch.equal(tensor, before[name]) for name, tensor in old.state_dict().items())


def test_restoring_can_take_ours_apart() -> None:
    toy = make("pixart-sigma")
    old, image = toy.encoder, toy.run()
    ours = replace_text_encoder(toy.pipe).text_encoder
    restore_text_encoder(toy.pipe, release=True)
    assert toy.encoder is old and not any(parameter.is_meta for parameter in old.parameters())
    assert all(parameter.is_meta for parameter in ours.stack.encoder.block.parameters())
    assert_same(toy.run(), image, 1e-4)


@pytest.mark.parametrize("layout", ["fused", "separate"])
def test_prepacked_by_hand(layout: Any, tmp_path: Path) -> None:
    """Packed weights are the same numbers: they are saved, and they come back."""
    toy = make("pixart-sigma")
    old, image = toy.encoder, toy.run()
    before = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    replace_text_encoder(toy.pipe, layout=layout)
    if missing := why_not_prepack(toy.encoder.stack):
        pytest.skip(missing)
    prepack(toy.encoder.stack)
    for _ in range(2):
        assert_same(toy.run(), image, 1e-4)
    assert "kernels' panels" in repr(toy.encoder) or "oneDNN's order" in repr(toy.encoder)
    toy.encoder.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 1]])
    assert_same(NAIT5EncoderModel.from_pretrained(tmp_path)(ids)[0], toy.encoder(ids)[0], 1e-5)
    restore_text_encoder(toy.pipe)
    assert toy.encoder is old
    assert all(torch.allclose(tensor, before[name], rtol=1e-6, atol=0) for name, tensor in old.state_dict().items())


def test_restoring_twice_or_too_early() -> None:
    toy = make("pixart-sigma")
    with pytest.raises(ValueError, match=r"has no encoder of ours; it has text_encoder, vae, transformer"):
        restore_text_encoder(toy.pipe)
    replace_text_encoder(toy.pipe)
    restore_text_encoder(toy.pipe)
    with pytest.raises(ValueError, match="has no encoder of ours"):
        restore_text_encoder(toy.pipe)
    toy.encoder = NAIT5EncoderModel.from_hf(text_encoder())
    with pytest.raises(ValueError, match=r"text_encoder did not replace a model .* save_format='transformers'"):
        restore_text_encoder(toy.pipe)


def test_pipelines_without_a_t5_are_told() -> None:
    toy = make("sd3")
    toy.pipe.text_encoder_3 = None
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline has no T5 text encoder loaded; it has"):
        replace_text_encoder(toy.pipe)


def test_offloading_survives_a_replacement_that_fails() -> None:
    toy = make("pixart-sigma")
    toy.encoder.shared.bias = torch.nn.Parameter(torch.zeros(1))
    offload_model(toy.pipe)
    with pytest.raises(CheckpointError, match=r"tensors that no T5 has: shared\.bias$"):
        replace_text_encoder(toy.pipe)
    assert hooks_of(toy.encoder) == {"CpuOffload"}
    assert not any(parameter.is_meta for parameter in toy.encoder.parameters())


def test_what_is_left_behind_is_freed() -> None:
    toy = make("pixart-sigma")
    replace_text_encoder(toy.pipe)
    from nai_t5_core.diffusers import adapter as diffusers_adapter

    assert toy.encoder in diffusers_adapter._REPLACED
    size = len(diffusers_adapter._REPLACED)
    del toy
    gc.collect()
    assert len(diffusers_adapter._REPLACED) < size


@pytest.mark.parametrize("outlier", ["hidden", "attention_out"])
def test_float16_gives_a_picture_where_theirs_gives_none(outlier: Any) -> None:
    """PixArt with an encoder that overflows float16; the rest of the pipeline in float32."""
    toy = make("pixart-sigma")
    state = stress_state(T5, outlier)
    toy.encoder.load_state_dict({**state, "encoder.embed_tokens.weight": state["shared.weight"]})
    image = toy.run()
    half = copy.deepcopy(toy.encoder).half()
    for block in half.encoder.block:  # as transformers keeps them
        block.layer[-1].DenseReluDense.wo.float()
    plain, toy.encoder = toy.encoder, half
    toy.pipe.transformer.half()
    assert not toy.run().isfinite().all()
    toy.encoder = plain
    with pytest.warns(ScaleTightenedWarning):
        ours = replace_text_encoder(toy.pipe, dtype=torch.float16) and toy.run()
    assert toy.encoder.dtype == torch.float16 and ours.isfinite().all()
    if not float16_pictures_are_right():
        pytest.skip(f"in float16 torch {torch.__version__} computes another picture on this CPU, whatever the encoder")
    assert (ours.float() - image).abs().mean() < 0.1 * image.abs().mean()


def float16_pictures_are_right() -> bool:
    """Whether the toy, all of it transformers' and diffusers' own, has the same picture in float16 as in float32."""
    toy = make("pixart-sigma")
    image = toy.run()
    toy.pipe.transformer.half(), toy.encoder.half()
    return bool((toy.run().float() - image).abs().mean() < 0.1 * image.abs().mean())


# ---------------------------------------------------------------------------------------------------------------------
# Moving and offloading. The CPU stands for the accelerator, and the meta device or a spy for what is not there.
# ---------------------------------------------------------------------------------------------------------------------

FAMILIES = ("pixart-sigma", "wan", "flux")


@pytest.fixture(params=FAMILIES)
def toy(request: pytest.FixtureRequest) -> Toy:
    return make(request.param)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_ours(toy: Toy, offload: Any) -> None:
    image = toy.run()
    replace_text_encoder(toy.pipe)
    offload(toy.pipe)
    if offload is offload_sequentially:
        assert all(parameter.is_meta for parameter in toy.encoder.parameters())
    assert_same(toy.run(), image, 1e-4)
    assert_same(toy.run(), image, 1e-4)


@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_replacing_under_offloading_keeps_it(toy: Toy, offload: Any, layout: Any) -> None:
    image = toy.run()
    offload(toy.pipe)
    before = hooks_of(toy.encoder)
    assert before
    replace_text_encoder(toy.pipe, layout=layout)
    assert isinstance(toy.encoder, NAIT5EncoderModel) and hooks_of(toy.encoder) == before
    assert_same(toy.run(), image, 1e-4)
    restore_text_encoder(toy.pipe)
    assert not isinstance(toy.encoder, NAIT5EncoderModel) and hooks_of(toy.encoder) == before
    assert_same(toy.run(), image, 1e-4)


def test_hooks_of_others_are_not_touched() -> None:
    from accelerate import cpu_offload

    toy = make("pixart-sigma")
    cpu_offload(toy.encoder, CPU)
    with pytest.raises(ValueError, match="not by the pipeline; remove them first"):
        replace_text_encoder(toy.pipe)


@pytest.mark.parametrize("options", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}])
def test_group_offloading_from_disk(toy: Toy, options: dict[str, Any], tmp_path: Path) -> None:
    """Between calls the weights are uninitialised memory, so a weight that is read out of turn is noticed."""
    from diffusers.hooks import apply_group_offloading

    image = toy.run()
    replace_text_encoder(toy.pipe)
    apply_group_offloading(toy.encoder, CPU, CPU, offload_to_disk_path=str(tmp_path), **options)
    assert any(tmp_path.iterdir())
    with torch.no_grad():
        for parameter in toy.encoder.parameters():
            parameter.fill_(torch.nan)
    assert_same(toy.run(), image, 1e-4)
    with pytest.raises(ValueError, match="offloaded to disk in groups"):
        restore_text_encoder(toy.pipe)


def test_hidden_states_under_sequential_offloading() -> None:
    from accelerate import cpu_offload

    model = NAIT5EncoderModel.from_hf(text_encoder())
    ids = torch.tensor([[5, 6, 7, 1]])
    expected = model(ids, output_hidden_states=True).hidden_states
    cpu_offload(model, CPU)
    assert_same(model(ids, output_hidden_states=True).hidden_states, expected, 1e-5)


def test_moving_and_casting(toy: Toy) -> None:
    replace_text_encoder(toy.pipe)
    image = toy.run()
    toy.pipe.to(torch.float64)
    assert toy.encoder.dtype == toy.pipe.dtype == torch.float64
    toy.pipe.to(torch.float32).to("cpu")
    assert_same(toy.run(), image, 1e-4)
    toy.encoder.to(torch.bfloat16)
    assert toy.encoder.dtype == torch.bfloat16
    toy.pipe.to("meta")
    assert toy.encoder.device.type == "meta"


def test_compiled_component() -> None:
    toy = make("pixart-sigma")
    image = toy.run()
    replace_text_encoder(toy.pipe)
    toy.encoder = torch.compile(toy.encoder, backend="eager")
    assert_same(toy.run(), image, 1e-4)
    restore_text_encoder(toy.pipe)
    assert_same(toy.run(), image, 1e-4)


def test_components_and_from_pipe() -> None:
    toy = make("pixart-alpha")
    image = toy.run()
    replace_text_encoder(toy.pipe)
    again = diffusers.PixArtAlphaPipeline(**toy.pipe.components)
    assert again.text_encoder is toy.encoder
    other = diffusers.PixArtAlphaPipeline.from_pipe(toy.pipe)
    assert other.text_encoder is toy.encoder
    toy.pipe = other
    other.set_progress_bar_config(disable=True)
    assert_same(toy.run(), image, 1e-4)


def test_pipelines_can_be_copied_and_pickled() -> None:
    toy = make("pixart-sigma")
    replace_text_encoder(toy.pipe)
    image = toy.run()
    for copied in (copy.deepcopy(toy.pipe), pickle.loads(pickle.dumps(toy.pipe))):
        toy.pipe = copied
        assert toy.encoder.padding == "skip"
        assert_same(toy.run(), image, 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "safe"), [(None, True), ("fp16", True), (None, False), ("fp16", False)])
def test_pipelines_are_saved_and_loaded(toy: Toy, variant: str | None, safe: bool, tmp_path: Path) -> None:
    """Also as diffusers' own tests save them: the text encoder is a safetensors file in any case."""
    image = toy.run()
    replace_text_encoder(toy.pipe)
    toy.pipe.save_pretrained(tmp_path, variant=variant, safe_serialization=safe)
    toy.pipe = type(toy.pipe).from_pretrained(tmp_path, variant=variant)
    toy.pipe.set_progress_bar_config(disable=True)
    assert isinstance(toy.encoder, NAIT5EncoderModel) and toy.encoder.padding == "exact"
    assert_same(toy.run(), image, 1e-4)
    half = type(toy.pipe).from_pretrained(tmp_path, variant=variant, torch_dtype=torch.bfloat16)
    assert getattr(half, toy.component).dtype == torch.bfloat16


@pytest.mark.slow
def test_a_saved_pipeline_loads_in_a_new_process(tmp_path: Path) -> None:
    """The folder says where our class is; diffusers wants its module to be imported already."""
    toy = make("wan")
    replace_text_encoder(toy.pipe)
    toy.pipe.save_pretrained(tmp_path)
    expected = toy.encoder(torch.tensor([[5, 6, 1]]))[0]
    code = f"""
import torch
import nai_t5_core.hf
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r})
torch.save(pipe.text_encoder(torch.tensor([[5, 6, 1]]))[0], {str(tmp_path / "out.pt")!r})
print(type(pipe.text_encoder).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "NAIT5EncoderModel" in done.stdout, done.stderr
    assert_same(torch.load(tmp_path / "out.pt"), expected.detach(), 1e-6)


def test_diffusers_says_what_to_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From 0.42 on it imports no module that a folder names; a pipeline with its T5 restored needs none of ours."""
    toy = make("pixart-sigma")
    image = toy.run()
    replace_text_encoder(toy.pipe)
    toy.pipe.save_pretrained(tmp_path / "ours")
    restore_text_encoder(toy.pipe)
    toy.pipe.save_pretrained(tmp_path / "theirs")
    monkeypatch.delitem(sys.modules, "nai_t5_core.hf")
    if Version(diffusers.__version__) >= Version("0.42"):
        with pytest.raises(ValueError, match=r"import nai_t5_core\.hf before calling `from_pretrained`"):
            diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    else:
        ours = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours").text_encoder
        assert type(ours).__name__ == "NAIT5EncoderModel"
    toy.pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "theirs")
    toy.pipe.set_progress_bar_config(disable=True)
    assert type(toy.encoder).__module__.startswith("transformers.")
    assert_same(toy.run(), image, 1e-4)


def test_passed_to_from_pretrained(toy: Toy, tmp_path: Path) -> None:
    """In place of a component that the folder says is transformers' own."""
    image = toy.run()
    toy.pipe.save_pretrained(tmp_path)
    ours = NAIT5EncoderModel.from_pretrained(tmp_path, subfolder=toy.component)
    toy.pipe = type(toy.pipe).from_pretrained(tmp_path, **{toy.component: ours})
    toy.pipe.set_progress_bar_config(disable=True)
    assert toy.encoder is ours
    assert_same(toy.run(), image, 1e-4)


def test_saved_for_transformers(tmp_path: Path) -> None:
    toy = make("pixart-sigma")
    toy.pipe.save_pretrained(tmp_path)
    replace_text_encoder(toy.pipe)
    image = toy.run()
    toy.encoder.save_pretrained(tmp_path / "text_encoder", save_format="transformers")
    toy.pipe = diffusers.PixArtSigmaPipeline.from_pretrained(tmp_path)
    toy.pipe.set_progress_bar_config(disable=True)
    assert type(toy.encoder).__name__ == "T5EncoderModel"
    assert_same(toy.run(), image, 1e-4)


def test_modular_pipelines_take_it() -> None:
    from diffusers.modular_pipelines.wan.encoders import WanTextEncoderStep

    toy = make("wan")
    blocks = WanTextEncoderStep()
    results = []
    for _ in range(2):
        pipe = blocks.init_pipeline()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe.update_components(text_encoder=toy.encoder, tokenizer=toy.tokenizer)
        state = pipe(prompt=PROMPT, negative_prompt="", max_sequence_length=40)
        results.append(state.get("prompt_embeds"))
        replace_text_encoder(toy.pipe)
    assert_same(results[1], results[0], 1e-5)


def test_toys_are_no_trivial_models() -> None:
    """Outputs of order one, so that an encoder that ignored its mask or its bias would be noticed."""
    assert random_state(T5)["shared.weight"].std() > 0.9
    with torch.no_grad():
        out = text_encoder()(torch.tensor([[5, 6, 7, 1]]))[0]
    assert 0.3 < out.std() < 3
