"""The parity measurement of the decoder: it passes what is right, and fails what is wrong."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TOY_CONFIGS, write_hf_folder
from rich.console import Console
from typer.testing import CliRunner

from nai_t5_core.bench.decoder_parity import measure_decoder_parity
from nai_t5_core.bench.parity import measure_parity
from nai_t5_core.bench.parity_report import OWN, plot, render
from nai_t5_core.bench.peers import random_state
from nai_t5_core.bench.stress import stress_state
from nai_t5_core.cli import app
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import LayerScales, unscaled

pytest.importorskip("transformers", reason="transformers is the reference")

V1_1 = TOY_CONFIGS["v1.1"]
LENGTHS = (20, 1, 7)


def test_every_kind_is_exact(config: T5Config) -> None:
    found = measure_decoder_parity(
        config, random_state(config), ["float32", torch.float64], prompt_lengths=LENGTHS, text_length=12
    )
    for items in (found.hidden, found.logits):
        ours = {(item.name, item.dtype): item for item in items if item.name.startswith(OWN)}
        assert len(ours) == 4 and all(item.passed for item in ours.values())
        assert max(item.relative for item in ours.values() if item.dtype == "float64") < 1e-12
        assert max(item.relative for item in ours.values() if item.dtype == "float32") < 1e-5


def test_half_precision_beside_both_peers() -> None:
    pytest.importorskip("nai_t5", reason="a peer to measure")
    state = random_state(V1_1, outliers=True)
    found = measure_decoder_parity(V1_1, state, ["bfloat16", "float32"], ["transformers", "nai-t5"], LENGTHS, 12)
    assert found.skipped == ()
    for items in (found.hidden, found.logits):
        of = {(item.name, item.dtype): item for item in items}
        # It is the same model: in float32 all agree.
        assert of["nai-t5", "float32"].relative < 1e-4 and of["transformers", "float32"].relative < 1e-4
        for name in ("transformers", "nai-t5"):
            assert of[f"{OWN} fused", "bfloat16"].quantiles["0.5"] < 1.1 * of[name, "bfloat16"].quantiles["0.5"]
    tied = measure_decoder_parity(
        TOY_CONFIGS["v1.0"], random_state(TOY_CONFIGS["v1.0"]), ["float32"], ["nai-t5"], LENGTHS, 3
    )
    assert tied.skipped == ("decoder of nai-t5 in float32: nai-t5 has no tied output head",)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.block.1.layer.1.EncDecAttention.k.weight",
        "decoder.block.2.layer.2.DenseReluDense.wi_1.weight",
        "decoder.final_layer_norm.weight",
    ],
)
def test_damaged_weights_fail(name: str) -> None:
    state = random_state(V1_1)
    damaged = {**state, name: state[name].roll(1, dims=0)}
    found = measure_decoder_parity(V1_1, damaged, ["float32"], (), LENGTHS, 12, reference_state=state)
    assert not any(item.passed for item in (*found.hidden, *found.logits))


def test_scales_keep_a_decoder_in_range() -> None:
    state = stress_state(V1_1, "cross_attention_out", stack="decoder")
    scales = unscaled(3).with_layer(1, LayerScales(cross_attention_out=2.0**-10))
    bare = measure_decoder_parity(V1_1, state, ["float16"], (), LENGTHS, 12)
    scaled = measure_decoder_parity(V1_1, state, ["float16"], (), LENGTHS, 12, decoder_scales=scales)
    assert not any(item.passed for item in bare.hidden)
    assert all(item.passed for item in (*scaled.hidden, *scaled.logits))


def test_report_and_plot_have_the_decoder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs it")
    state = random_state(V1_1)
    report = measure_parity(V1_1, state, ["float32"], prompt_lengths=LENGTHS)
    found = measure_decoder_parity(V1_1, state, ["float32"], prompt_lengths=LENGTHS, text_length=5)
    whole = replace(report, decoder_hidden=found.hidden, logits=found.logits)
    assert whole.passed
    page = io.StringIO()
    Console(file=page, width=100).print(render(whole))
    for text in ("decoder's hidden states", "the same of the logits", "and the decoder are within their tolerances"):
        assert text in page.getvalue()
    values = json.loads(json.dumps(whole.to_dict(), allow_nan=False))
    assert len(values["logits"]) == len(values["decoder_hidden"]) == 3
    plot(whole, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes()[:4] == b"\x89PNG"
    failed = replace(whole, logits=tuple(replace(item, tolerance=0.0) for item in found.logits))
    assert failed.failures == [f"{item.name} float32 logits" for item in found.logits]


def test_command_measures_a_whole_model(tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path / "model", V1_1, random_state(V1_1))
    result = CliRunner().invoke(app, ["parity", str(folder), "--decoder", "--dtypes", "float32", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {item["name"] for item in report["logits"]} == {f"{OWN} fused", f"{OWN} separate", "transformers"}
    without = CliRunner().invoke(app, ["parity", str(folder), "--dtypes", "float32", "--json"])
    assert json.loads(without.stdout)["logits"] == []


def test_arguments_are_checked() -> None:
    state = random_state(V1_1)
    with pytest.raises(ValueError, match="there is no decoder to measure"):
        measure_decoder_parity(V1_1.encoder_only(), state)
    with pytest.raises(ValueError, match=r"unknown peers \['keras'\]"):
        measure_decoder_parity(V1_1, state, against=["keras"])
    with pytest.raises(ValueError, match="text_length=0"):
        measure_decoder_parity(V1_1, state, text_length=0)
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        measure_decoder_parity(V1_1, state, ["int8"])
