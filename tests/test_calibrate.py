"""Calibration finds the outliers, and the scales it chooses keep float16 finite and accurate."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import spiece_model
from conftest import TOY_CONFIGS, build_stack, write_hf_folder

from nai_t5_core.bench.peer_list import build_peer
from nai_t5_core.bench.stress import OUTLIERS, Outlier, stress_state, write_stress_checkpoint
from nai_t5_core.cli import app
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import FLOAT16_MAX, StackScales
from nai_t5_core.float16.guard import ScaleTightenedWarning, encode_guarded
from nai_t5_core.float16.maxima import LayerMaxima
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.weights.calibrate import calibrate
from nai_t5_core.weights.calibration_report import Calibration, plot
from nai_t5_core.weights.chosen import SlowDtypeWarning
from nai_t5_core.weights.convert import convert
from nai_t5_core.weights.examine import find_tokenizer_for
from nai_t5_core.weights.load import load_encoder
from nai_t5_core.weights.scales_file import write_scales

PROMPTS = ["a cat", "two dogs and a red house on the hill", "", "one one one one one one"]


def stress_folder(folder: Path, config: T5Config, outlier: Outlier) -> Path:
    write_hf_folder(folder, config.encoder_only(), stress_state(config.encoder_only(), outlier))
    (folder / "spiece.model").write_bytes(spiece_model())
    return folder


def config_of(kind: str) -> T5Config:
    """A toy with the vocabulary of the tokenizer that the tests have."""
    return TOY_CONFIGS[kind].encoder_only().model_copy(update={"vocab_size": 4096})


def calibrated(tmp_path: Path, outlier: Outlier, kind: str = "v1.1") -> tuple[Path, Calibration]:
    folder = stress_folder(tmp_path / outlier, config_of(kind), outlier)
    return folder, calibrate(folder, PROMPTS)


@pytest.mark.parametrize("outlier", OUTLIERS)
@torch.no_grad()
def test_calibrated_float16_is_finite_and_plain_float16_is_not(tmp_path: Path, kind: str, outlier: Outlier) -> None:
    config = config_of(kind)
    if outlier == "hidden" and not config.can_scale_hidden:
        pytest.skip("no factor passes through this activation")
    folder, found = calibrated(tmp_path, outlier, kind)
    assert found.beyond() == []
    ids = torch.randint(3, config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(9))
    state = stress_state(config, outlier)
    expected = build_stack(config.encoder_only(), state, torch.float64)(ids)
    stack = load_encoder(folder, "float16", "cpu", scales=found.scales)
    out = stack(ids)
    assert torch.isfinite(out).all()
    assert float((out.double() - expected).abs().max() / expected.abs().max()) <= 0.02
    if outlier not in ("large_norm", "small_norm"):
        plain = build_stack(config.encoder_only(), state, torch.float16)
        assert not torch.isfinite(plain(ids)).all()


@pytest.mark.parametrize("outlier", ["feed_forward_out", "attention_out", "hidden", "embedding"])
@torch.no_grad()
def test_peers_in_plain_float16_fail_where_ours_does_not(
    tmp_path: Path, outlier: Outlier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers without its clamps and its one product in float32, and nai-t5 without scales."""
    pytest.importorskip("transformers", reason="a peer")
    pytest.importorskip("nai_t5", reason="a peer")
    config = config_of("v1.1").encoder_only()
    state = stress_state(config, outlier)
    ids = torch.randint(3, config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(9))

    folder, found = calibrated(tmp_path, outlier)
    assert torch.isfinite(load_encoder(folder, "float16", "cpu", scales=found.scales)(ids)).all()
    assert not torch.isfinite(build_peer("nai-t5", config, state, torch.float16)(ids)).all()
    theirs = build_peer("transformers", config, state, torch.float16)
    theirs.model.half()
    monkeypatch.setattr(torch, "clamp", lambda values, **_: values)
    assert not torch.isfinite(theirs(ids)).all()


def test_scales_leave_the_headroom_and_no_more(tmp_path: Path) -> None:
    _, found = calibrated(tmp_path, "feed_forward_out")
    scaled = found.encoder.scaled_maximum(1, "feed_forward_out")
    assert FLOAT16_MAX / 8 < scaled <= FLOAT16_MAX / 4
    assert found.scales.layers[0].feed_forward_out == 1
    assert found.scales.layers[1].attention_out == 1


def test_maxima_are_those_of_the_reference(tmp_path: Path) -> None:
    """Streaming one layer at a time sees what the whole model does."""
    folder, found = calibrated(tmp_path, "feed_forward_out")
    stack = load_encoder(folder, "float32", "cpu", layout="separate")
    seen: list[float] = []
    for block in stack.encoder.block:
        block.layer[1].DenseReluDense.wo.register_forward_hook(lambda _, __, out: seen.append(float(out.abs().max())))
    tokens = find_tokenizer_for(folder)(PROMPTS, 512)
    with torch.no_grad():
        stack(torch.tensor(tokens.input_ids), torch.tensor(tokens.attention_mask), padding="skip")
    assert seen == pytest.approx([layer.maxima["feed_forward_out"] for layer in found.encoder.layers], rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0**-6, 2.0**-20])
def test_lost_share_counts_what_float16_loses(scale: float) -> None:
    """Against a cast of the scaled values; a value that rounds up to the least number there is may count as lost."""
    values = torch.exp2(torch.rand(20_000, generator=torch.Generator().manual_seed(1)) * 60 - 45)
    seen = LayerMaxima()
    seen.add_exponents(values, 1.0)
    half = (values * scale).clamp(max=FLOAT16_MAX).half().float()
    subnormal, zero = seen.lost_share(scale)
    assert zero == pytest.approx(float((half == 0).float().mean()), abs=0.01)
    assert subnormal == pytest.approx(float(((half > 0) & (half < 2.0**-14)).float().mean()), abs=0.01)


@torch.no_grad()
def test_a_prompt_beyond_the_calibration_is_mended_by_the_guard(tmp_path: Path) -> None:
    """Scales chosen on quiet prompts, then embeddings far larger: told once, and finite."""
    config = config_of("v1.1").encoder_only()
    folder, found = calibrated(tmp_path, "feed_forward_out")
    loose = found.scales.with_layer(1, found.scales.layers[0])
    stack = load_encoder(folder, "float16", "cpu", scales=loose)
    ids = torch.randint(3, config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(9))
    with pytest.warns(UserWarning, match=r"layer 1: feed_forward_out reaches .*scale 1 tightened to"):
        out = encode_guarded(stack, ids)
    assert torch.isfinite(out).all()


def test_tightened_scales_are_saved_and_read_again(tmp_path: Path) -> None:
    """Loose scales, one warning, a file; with that file the same prompts warn no more and give the same values."""
    folder, found = calibrated(tmp_path, "feed_forward_out")
    loose = found.scales.with_layer(1, found.scales.layers[0])
    saved = tmp_path / "scales.json"
    encoder = TextEncoder.from_pretrained(folder, "float16", "cpu", scales=loose)
    with pytest.warns(ScaleTightenedWarning, match=r"save them with save_scales"):
        first = encoder.encode(PROMPTS).hidden_states
    encoder.save_scales(saved)
    again = TextEncoder.from_pretrained(folder, "float16", "cpu", scales=saved)
    assert again.stack.scales.layers[1].feed_forward_out < 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Weights below float16's normal range were rounded before scaling in the one case, and after it in the other.
        torch.testing.assert_close(again.encode(PROMPTS).hidden_states, first, rtol=2**-10, atol=2**-20)
    written = tmp_path / "own.safetensors"
    convert(folder, written, "float16", encoder_only=True, scales=saved)
    assert load_encoder(written, "float16", "cpu").scales == encoder.stack.scales


def test_a_file_that_holds_no_scales_is_named(tmp_path: Path) -> None:
    folder, found = calibrated(tmp_path, "hidden")
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"layers": 3}')
    for path in (wrong, tmp_path / "absent.json"):
        with pytest.raises(ValueError, match=rf"{path.name} cannot be read as float16 scales"):
            load_encoder(folder, "float16", "cpu", scales=path)
    short = tmp_path / "short.json"
    write_scales(short, StackScales(found.scales.layers[:1]))
    with pytest.raises(ValueError, match=r"scales of 1 layers for a model of 3 layers"):
        load_encoder(folder, "float16", "cpu", scales=short)


def test_float16_on_a_cpu_says_once_that_others_are_faster(tmp_path: Path) -> None:
    folder, _ = calibrated(tmp_path, "hidden")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for dtype in ("float16", "float16", "float32", "auto"):
            load_encoder(folder, dtype, "cpu")
    assert [item.category for item in seen] == [SlowDtypeWarning]


def test_command_writes_scales_and_plot(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    pytest.importorskip("matplotlib", reason="the plot needs it")
    folder = stress_folder(tmp_path / "model", config_of("v1.1"), "feed_forward_out")
    written, picture = tmp_path / "own.safetensors", tmp_path / "maxima.png"
    arguments = ["calibrate", str(folder), "--out", str(written), "--plot", str(picture), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["layers"][1]["scales"]["feed_forward_out"] < 1
    assert picture.read_bytes()[:4] == b"\x89PNG"
    stack = load_encoder(written, "float16", "cpu")
    assert stack.scales.layers[1].feed_forward_out == report["layers"][1]["scales"]["feed_forward_out"]
    assert torch.isfinite(stack(torch.randint(3, 96, (1, 8)))).all()


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    folder, found = calibrated(tmp_path, "embedding")
    with pytest.raises(ValueError, match=r"headroom=0.5; it must be at least 1"):
        calibrate(folder, PROMPTS, headroom=0.5)
    small = stress_folder(tmp_path / "small", TOY_CONFIGS["v1.1"], "hidden")
    with pytest.raises(ValueError, match=r"token id \d+, the model has 96 tokens; the tokenizer belongs to another"):
        calibrate(small, PROMPTS)
    with pytest.raises(ValueError, match="unknown outlier 'flood'"):
        stress_state(TOY_CONFIGS["v1.1"], "flood")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layer=9; the encoder has layers 0 to 2"):
        stress_state(TOY_CONFIGS["v1.1"], "hidden", layer=9)
    with pytest.raises(OSError, match="No such file"):
        plot(found, tmp_path / "absent" / "x.png")


def test_a_stress_checkpoint_overflows_until_it_is_calibrated(tmp_path: Path) -> None:
    folder = write_stress_checkpoint(tmp_path / "model", config_of("v1.1"), "feed_forward_out")
    with pytest.warns(ScaleTightenedWarning, match=r"layer 1: feed_forward_out"):
        TextEncoder.from_pretrained(folder, "float16", "cpu").encode(["a cat"])
    found = calibrate(folder, ["a cat"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScaleTightenedWarning)
        TextEncoder.from_pretrained(folder, "float16", "cpu", scales=found.scales).encode(["a cat"])
    with pytest.raises(ValueError, match="vocab_size=96; the tokenizer has 4096 tokens"):
        write_stress_checkpoint(tmp_path / "small", TOY_CONFIGS["v1.1"], "feed_forward_out")
    with pytest.raises(ValueError, match="unknown outlier 'flood'"):
        write_stress_checkpoint(tmp_path / "flood", config_of("v1.1"), "flood")  # type: ignore[arg-type]
