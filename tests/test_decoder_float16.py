"""A decoder in float16: calibration finds its scales, and generation never goes on with a value that is not finite."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import spiece_model
from conftest import TOY_CONFIGS, write_hf_folder
from typer.testing import CliRunner

from nai_t5_core.bench.peers import own_t5, transformers_t5
from nai_t5_core.bench.stress import Outlier, outliers_of, stress_state, write_stress_checkpoint
from nai_t5_core.cli import app
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import StackScales, unscaled
from nai_t5_core.float16.generation_guard import generate_guarded
from nai_t5_core.float16.guard import NotFiniteError, ScaleTightenedWarning
from nai_t5_core.generation.t5 import T5
from nai_t5_core.model.encoder import LAYOUTS, Layout
from nai_t5_core.weights.calibrate import calibrate
from nai_t5_core.weights.calibration_report import Calibration
from nai_t5_core.weights.examine import find_tokenizer_for
from nai_t5_core.weights.load import load_t5
from nai_t5_core.weights.scales_file import read_decoder_scales, read_scales, write_scales

PROMPTS = ["a cat", "two dogs and a red house on the hill", "", "one one one one one one"]
IDS = torch.randint(3, 4096, (3, 9), generator=torch.Generator().manual_seed(9))
MASK = torch.arange(9)[None, :] < torch.tensor([9, 2, 6])[:, None]
TEXTS = torch.randint(3, 4096, (3, 7), generator=torch.Generator().manual_seed(4))


def config_of(kind: str) -> T5Config:
    """A toy with the vocabulary of the tokenizer that the tests have."""
    return TOY_CONFIGS[kind].model_copy(update={"vocab_size": 4096})


def folder_with(folder: Path, config: T5Config, state: dict[str, torch.Tensor]) -> Path:
    write_hf_folder(folder, config, state)
    (folder / "spiece.model").write_bytes(spiece_model())
    return folder


def calibrated(tmp_path: Path, outlier: Outlier, kind: str = "v1.1") -> tuple[Path, Calibration]:
    config = config_of(kind)
    folder = folder_with(tmp_path / outlier, config, stress_state(config, outlier, stack="decoder"))
    return folder, calibrate(folder, PROMPTS)


def error_at_tokens(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The largest error of each token, NaN where it is not finite."""
    return (logits.double() - expected).abs().amax(-1)


def errors_of_rounding(config: T5Config, state: dict[str, torch.Tensor], expected: torch.Tensor) -> torch.Tensor:
    """What half a unit of float16 in every weight does to each token in float64: the most of eight draws.

    Behind an attention with large outliers, that can change what a token attends to.
    """
    generator = torch.Generator().manual_seed(0)

    def shaken(weight: torch.Tensor) -> torch.Tensor:
        noise = 2 * torch.rand(weight.shape, dtype=torch.float64, generator=generator) - 1
        return weight.double() * (1 + noise * 2**-11)

    states = [{name: shaken(weight) for name, weight in state.items()} for _ in range(8)]
    logits = [own_t5(config, shaken_state, torch.float64)(IDS, MASK, TEXTS).logits for shaken_state in states]
    return torch.stack([error_at_tokens(each, expected) for each in logits]).amax(0)


@pytest.mark.parametrize("outlier", outliers_of("decoder"))
@torch.no_grad()
def test_calibrated_float16_is_finite_and_plain_float16_is_not(tmp_path: Path, kind: str, outlier: Outlier) -> None:
    config = config_of(kind)
    if outlier == "hidden" and not config.can_scale_hidden:
        pytest.skip("no factor passes through this activation")
    folder, found = calibrated(tmp_path, outlier, kind)
    assert found.beyond() == []
    assert found.decoder_scales is not None
    state = stress_state(config, outlier, stack="decoder")
    expected = own_t5(config, state, torch.float64)(IDS, MASK, TEXTS).logits
    allowed = 5 * errors_of_rounding(config, state, expected)
    for layout in LAYOUTS:
        model = load_t5(folder, "float16", "cpu", layout, scales=found.scales, decoder_scales=found.decoder_scales)
        assert (error_at_tokens(model(IDS, MASK, TEXTS).logits, expected) <= allowed).all()
    if outlier not in ("large_norm", "small_norm"):
        assert not own_t5(config, state, torch.float16)(IDS, MASK, TEXTS).logits.isfinite().all()
    if outlier in ("feed_forward_out", "hidden", "attention_out", "cross_attention_out"):
        assert getattr(found.decoder_scales.layers[1], outlier) < 1
        assert found.scales.is_one


@torch.no_grad()
def test_transformers_without_its_clamps_fails_where_ours_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="a peer")
    folder, found = calibrated(tmp_path, "cross_attention_out")
    theirs = transformers_t5(
        config_of("v1.1"), stress_state(config_of("v1.1"), "cross_attention_out", stack="decoder"), torch.float16
    )
    theirs.half()
    monkeypatch.setattr(torch, "clamp", lambda values, **_: values)
    assert not theirs(input_ids=IDS, attention_mask=MASK, decoder_input_ids=TEXTS).logits.isfinite().all()
    ours = load_t5(folder, "float16", "cpu", scales=found.scales, decoder_scales=found.decoder_scales or "auto")
    assert ours(IDS, MASK, TEXTS).logits.isfinite().all()


@torch.no_grad()
def test_maxima_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    """Streaming one layer at a time sees what the model does when it reads the prompts behind the start token."""
    folder, found = calibrated(tmp_path, "cross_attention_out", kind)
    model = load_t5(folder, "float32", "cpu", layout="separate")
    seen: dict[str, list[float]] = {name: [] for name in ("cross_attention_out", "cross_k", "feed_forward_out", "q")}

    def note(name: str) -> Any:
        return lambda _, __, out: seen[name].append(float(out.abs().max()))

    for block in model.decoder.block:
        attention, cross, dense = block.layer[0].SelfAttention, block.layer[1].EncDecAttention, block.layer[2]
        attention.q.register_forward_hook(note("q"))
        cross.o.register_forward_hook(note("cross_attention_out"))
        cross.k.register_forward_hook(note("cross_k"))
        dense.DenseReluDense.wo.register_forward_hook(note("feed_forward_out"))
    tokens = find_tokenizer_for(folder)(PROMPTS, 512)
    ids = torch.tensor(tokens.input_ids)
    model.decode(model.shift_right(ids), model.read(ids, torch.tensor(tokens.attention_mask)))
    assert found.decoder is not None
    for name, values in seen.items():
        assert values == pytest.approx([layer.maxima[name] for layer in found.decoder.layers], rel=1e-4), name


def test_texts_of_ones_own_and_the_encoder_alone(tmp_path: Path) -> None:
    folder, found = calibrated(tmp_path, "hidden")
    assert found.decoder is not None
    others = calibrate(folder, PROMPTS, texts=["a", "b", "c", "d"]).decoder
    assert others is not None
    assert others.layers[2].maxima["q"] != found.decoder.layers[2].maxima["q"]
    done: list[tuple[int, int]] = []
    alone = calibrate(folder, PROMPTS, encoder_only=True, progress=lambda *step: done.append(step))
    assert alone.decoder is None and alone.scales == found.scales and done == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match="1 texts for 4 prompts"):
        calibrate(folder, PROMPTS, texts=["a"])


# ---------------------------------------------------------------------------------------------------------------------
# The guard
# ---------------------------------------------------------------------------------------------------------------------


def overflowing(outlier: Outlier, layout: Layout, kind: str = "v1.1") -> T5:
    config = config_of(kind)
    return own_t5(config, stress_state(config, outlier, stack="decoder"), torch.float16, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outlier", ["feed_forward_out", "hidden", "attention_out", "cross_attention_out"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_that_overflows_is_mended(layout: Layout, outlier: Outlier, beams: int) -> None:
    """Refused by generate, mended once, told once; then the same texts as calibrated scales give."""
    model = overflowing(outlier, layout)
    with pytest.raises(ValueError, match="call generate_guarded"):
        model.generate(IDS, MASK, num_beams=beams, max_new_tokens=6)
    with pytest.warns(ScaleTightenedWarning) as told:
        ids = generate_guarded(model, IDS, MASK, num_beams=beams, max_new_tokens=6)
    assert len(told) == 1
    text = str(told[0].message)
    assert f"decoder layer 1: {outlier} reaches" in text and "tightened to" in text
    scale = getattr(model.decoder_scales.layers[1], outlier)
    assert scale < 1
    built = own_t5(
        model.config,
        stress_state(model.config, outlier, stack="decoder"),
        torch.float16,
        layout,
        decoder_scales=model.decoder_scales,
    )
    for (name, mine), other in zip(model.state_dict().items(), built.state_dict().values(), strict=True):
        # What lay below float16's normal range had been rounded to a multiple of 2⁻²⁴ before it was scaled.
        torch.testing.assert_close(mine, other, rtol=0, atol=2**-24 / scale, msg=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScaleTightenedWarning)
        assert torch.equal(generate_guarded(model, IDS, MASK, num_beams=beams, max_new_tokens=6), ids)
    assert torch.equal(built.generate(IDS, MASK, num_beams=beams, max_new_tokens=6), ids)


def test_samples_are_drawn_again_from_the_same_random_numbers() -> None:
    options = {"do_sample": True, "max_new_tokens": 8, "top_k": 50}
    model = overflowing("feed_forward_out", "fused")
    with pytest.warns(ScaleTightenedWarning):
        mended = generate_guarded(model, IDS, MASK, generator=torch.Generator().manual_seed(5), **options)
    assert torch.equal(model.generate(IDS, MASK, generator=torch.Generator().manual_seed(5), **options), mended)


def test_an_encoder_at_fault_is_mended_too() -> None:
    config = config_of("v1.1")
    model = own_t5(config, stress_state(config, "attention_out"), torch.float16)
    with pytest.warns(ScaleTightenedWarning, match=r"overflowed; layer 1: attention_out reaches"):
        generate_guarded(model, IDS, MASK, max_new_tokens=4)
    assert model.encoder_stack.scales.layers[1].attention_out < 1
    assert model.decoder_scales.is_one


@pytest.mark.parametrize(
    ("name", "factor", "message"),
    [
        (
            "decoder.block.2.layer.1.EncDecAttention.v.weight",
            float("nan"),
            r"2.layer.1.EncDecAttention.kv.weight holds",
        ),
        ("decoder.block.0.layer.0.SelfAttention.o.weight", float("inf"), r"0.layer.0.SelfAttention.o.weight holds"),
        ("decoder.final_layer_norm.weight", float("nan"), "decoder.final_layer_norm.weight holds"),
        ("lm_head.weight", float("nan"), "lm_head.weight holds"),
        ("decoder.block.1.layer.1.EncDecAttention.k.weight", 1e5, "decoder layer 1 exceeds .* keys or values"),
        ("decoder.block.1.layer.2.DenseReluDense.wi_0.weight", 6e4, r"decoder layer 1 exceeds .*its gate reaches"),
        ("decoder.final_layer_norm.weight", 1e6, "the decoder's output itself exceeds torch.float16"),
        ("lm_head.weight", 3e4, "the logits exceed torch.float16, though no layer does"),
    ],
)
def test_what_no_scale_can_mend_is_an_error(name: str, factor: float, message: str) -> None:
    config = config_of("v1.1")
    state = stress_state(config, "large_norm", stack="decoder")
    state[name] = state[name] * factor
    model = own_t5(config, state, torch.float16)
    with pytest.raises(NotFiniteError, match=message):
        generate_guarded(model, IDS, MASK, max_new_tokens=4)


def test_bfloat16_that_overflows_is_an_error() -> None:
    config = config_of("v1.1")
    state = stress_state(config, "hidden", stack="decoder")
    state["decoder.block.1.layer.2.DenseReluDense.wo.weight"] *= float("inf")
    with pytest.raises(NotFiniteError, match=r"decoder.block.1.layer.2.DenseReluDense.wo.weight holds"):
        generate_guarded(own_t5(config, state, torch.bfloat16), IDS, MASK, max_new_tokens=4)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_both_stacks_scales_share_a_file(tmp_path: Path) -> None:
    folder, found = calibrated(tmp_path, "cross_attention_out")
    assert found.decoder_scales is not None
    path = tmp_path / "scales.json"
    write_scales(path, found.scales, found.decoder_scales)
    assert read_scales(path) == found.scales and read_decoder_scales(path) == found.decoder_scales
    model = load_t5(folder, "float16", "cpu", scales=path)
    assert model.decoder_scales == found.decoder_scales
    write_scales(path, found.scales)
    assert read_decoder_scales(path) is None
    assert load_t5(folder, "float16", "cpu", scales=path).decoder_scales == unscaled(3)
    path.write_text('{"layers": [], "embedding": 1, "decoder": {"layers": 3}}')
    with pytest.raises(ValueError, match="cannot be read as float16 scales"):
        read_decoder_scales(path)


def test_command_calibrates_converts_and_generates(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs it")
    config = config_of("v1.1")
    folder = folder_with(tmp_path / "model", config, stress_state(config, "cross_attention_out", stack="decoder"))
    written, picture, scales = tmp_path / "own.safetensors", tmp_path / "maxima.png", tmp_path / "scales.json"

    def run(*arguments: object) -> Any:
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    report = run("calibrate", folder, "--out", written, "--plot", picture, "--save-scales", scales)
    chosen = [
        StackScales.from_json(json.dumps({"layers": [row["scales"] for row in report[name]], "embedding": 1.0}))
        for name in ("layers", "decoder_layers")
    ]
    assert chosen[1].layers[1].cross_attention_out < 1
    assert picture.read_bytes()[:4] == b"\x89PNG"
    model = load_t5(written, "float16", "cpu")
    assert (
        [model.encoder_stack.scales, model.decoder_scales]
        == chosen
        == [read_scales(scales), read_decoder_scales(scales)]
    )
    texts = run("generate", "a cat", "--model", written, "--dtype", "float16", "--max-new-tokens", 4)
    assert texts == run(
        "generate", "a cat", "--model", folder, "--dtype", "float16", "--max-new-tokens", 4, "--scales", scales
    ) | {"source": texts["source"]}
    table = CliRunner().invoke(app, ["calibrate", str(folder)], env={"COLUMNS": "160"})
    assert "the same in the decoder" in table.output
    assert "decoder_layers" not in run("calibrate", folder, "--encoder-only")


def test_command_mends_what_overflows(tmp_path: Path) -> None:
    config = config_of("v1.1")
    folder = folder_with(tmp_path / "model", config, stress_state(config, "feed_forward_out", stack="decoder"))
    scales = tmp_path / "scales.json"
    arguments = ["generate", "a cat", "--model", str(folder), "--dtype", "float16", "--max-new-tokens", "4"]
    with pytest.warns(ScaleTightenedWarning, match="decoder layer 1: feed_forward_out"):
        result = CliRunner().invoke(app, [*arguments, "--save-scales", str(scales)])
    assert result.exit_code == 0, result.output
    mended = read_decoder_scales(scales)
    assert mended is not None and mended.layers[1].feed_forward_out < 1


def test_a_stress_checkpoint_of_a_whole_model(tmp_path: Path) -> None:
    folder = write_stress_checkpoint(tmp_path / "model", config_of("v1.1"), "hidden", stack="decoder")
    with pytest.raises(ValueError, match="values that are not finite"):
        load_t5(folder, "float16", "cpu").generate(IDS, MASK, max_new_tokens=3)
    with pytest.raises(ValueError, match="an encoder alone; there is no decoder to overflow"):
        stress_state(config_of("v1.1").encoder_only(), "hidden", stack="decoder")
    with pytest.raises(ValueError, match="unknown outlier 'cross_attention_out'"):
        stress_state(config_of("v1.1"), "cross_attention_out")
