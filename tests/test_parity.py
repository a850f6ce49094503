"""The parity measurement: it passes what is right, and fails what is wrong."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_cases import runner_names
from conftest import TOY_CONFIGS, needs_kernels
from rich.console import Console
from torch import Tensor

from nai_t5_core.backends.choices import backend_of
from nai_t5_core.backends.choose import why_not_prepack
from nai_t5_core.backends.kernels.build import prepare_kernels
from nai_t5_core.backends.kernels.sets import SETS
from nai_t5_core.bench import parity
from nai_t5_core.bench.parity import QUANTILES, measure_parity, random_batch
from nai_t5_core.bench.parity_report import OWN, plot, render
from nai_t5_core.bench.peers import random_state
from nai_t5_core.bench.stress import stress_state
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import LayerScales, StackScales
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.packing import PADDING_POLICIES

pytest.importorskip("transformers", reason="transformers is the reference")

V1_1 = TOY_CONFIGS["v1.1"].encoder_only()
CAN_PREPACK = why_not_prepack(T5EncoderStack(V1_1, dtype=torch.float32)) is None
LENGTHS = (140, 1, 20, 7)


def test_every_kind_passes_in_float32_and_float64(config: T5Config) -> None:
    state = random_state(config)
    report = measure_parity(config, state, ["float32", torch.float64], prompt_lengths=LENGTHS)
    assert report.passed
    names = {item.name for item in report.differences}
    assert {f"{OWN} fused", f"{OWN} separate", "transformers"} <= names
    for layout in ("fused", "separate"):
        checked = {(check.dtype, check.padding) for check in report.policies if check.name == f"{OWN} {layout}"}
        assert checked == {(dtype, padding) for dtype in ("float32", "float64") for padding in PADDING_POLICIES}
    assert max(item.relative for item in report.differences if item.dtype == "float32") < 1e-5
    # Its norms are exact to float32 only, and the reference's are not.
    theirs = next(item for item in report.differences if (item.name, item.dtype) == ("transformers", "float64"))
    assert theirs.relative > 1e-9


def test_quantiles_rise_to_the_largest_difference() -> None:
    pytest.importorskip("nai_t5", reason="a peer to measure")
    state = random_state(V1_1)
    report = measure_parity(V1_1, state, ["bfloat16", "float64"], ["transformers", "nai-t5"], LENGTHS)
    for item in report.differences:
        values = [*item.quantiles.values(), item.largest]
        assert list(item.quantiles) == [str(quantile) for quantile in QUANTILES]
        assert values == sorted(values)
        assert item.relative == item.largest / report.largest_value
    assert [reason.split(":")[0] for reason in report.skipped] == ["nai-t5 in float64"]
    halves = {item.name: item.quantiles["0.5"] for item in report.differences if item.dtype == "bfloat16"}
    # The residual in float32 halves the error of one in bfloat16.
    assert halves[f"{OWN} fused"] < 0.8 * halves["transformers"]


@pytest.mark.parametrize(
    "name",
    [
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder.block.2.layer.0.SelfAttention.k.weight",
        "encoder.block.1.layer.1.layer_norm.weight",
        "encoder.final_layer_norm.weight",
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_damaged_weights_fail(name: str, dtype: str) -> None:
    state = random_state(V1_1)
    damaged = {**state, name: state[name].roll(1, dims=0)}
    report = measure_parity(V1_1, damaged, [dtype], (), LENGTHS, reference_state=state)
    assert not any(check.passed for check in report.policies)
    assert not report.passed


def test_a_small_error_in_one_weight_fails_in_float32() -> None:
    state = random_state(V1_1)
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    damaged = {**state, name: state[name] * 1.001}
    assert not measure_parity(V1_1, damaged, ["float32"], (), LENGTHS, reference_state=state).passed


@pytest.mark.parametrize("padding", PADDING_POLICIES)
def test_a_wrong_padding_policy_fails_alone(padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = T5EncoderStack.forward
    instead = {"attend": "exact", "exact": "skip", "skip": "attend", "trim": "skip"}

    def wrong(self: T5EncoderStack, *args: Any, padding: Any = "exact") -> Tensor:
        return forward(self, *args, padding=instead[padding] if padding == broken else padding)

    broken = padding
    monkeypatch.setattr(T5EncoderStack, "forward", wrong)
    report = measure_parity(V1_1, random_state(V1_1), ["float32"], (), LENGTHS)
    assert {check.padding for check in report.policies if not check.passed} == {padding}


def test_scales_keep_float16_in_range() -> None:
    """A feed-forward output beyond 65504 in one layer, which its scale brings back."""
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    state = random_state(V1_1)
    state[name] = state[name] * 2.0**16
    layers = [LayerScales()] * V1_1.num_layers
    layers[1] = LayerScales(feed_forward_out=2.0**-8)
    scales = StackScales(tuple(layers))
    bare = measure_parity(V1_1, state, ["float16"], (), LENGTHS)
    scaled = measure_parity(V1_1, state, ["float16"], (), LENGTHS, scales=scales)
    assert not bare.passed
    assert scaled.passed, scaled.policies


def test_what_is_not_finite_fails_and_stays_json() -> None:
    state = random_state(V1_1)
    name = "encoder.block.0.layer.0.SelfAttention.o.weight"
    report = measure_parity(V1_1, {**state, name: state[name] * math.inf}, ["float32"], (), LENGTHS)
    assert not report.passed
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["differences"][0]["largest"] is None
    assert values["policies"][0]["passed"] is False


def test_report_for_people_and_programs() -> None:
    messages: list[str] = []
    report = measure_parity(V1_1, random_state(V1_1), ["float32"], prompt_lengths=(5, 5), progress=messages.append)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["passed"] is True
    assert values["prompt_lengths"] == [5, 5]
    assert messages[0] == "reference"
    page = io.StringIO()
    Console(file=page, width=80).print(render(report))
    assert "…" not in page.getvalue()
    for text in (
        "T5 v1.1",
        "prepacked" if CAN_PREPACK else "separate",
        "transformers",
        "0.9999",
        "trim",
        "every padding policy is within its tolerance",
    ):
        assert text in page.getvalue()


def test_layers_show_where_errors_grow_and_where_float16_ends(tmp_path: Path) -> None:
    pytest.importorskip("nai_t5", reason="a peer to measure")
    pytest.importorskip("matplotlib", reason="the plot needs it")
    peers = ("transformers", "nai-t5")
    fine = measure_parity(V1_1, random_state(V1_1), ["float32", "bfloat16"], peers, LENGTHS, per_layer=True)
    assert len(fine.layers) == len(fine.differences)
    for item in fine.layers:
        assert len(item.medians) == len(item.largest) == V1_1.num_layers + 1
        assert item.first_not_finite is None
        assert item.medians[0] < 1e-2 if item.dtype == "bfloat16" else item.medians[0] < 1e-6
        assert max(item.largest) < (0.1 if item.dtype == "bfloat16" else 1e-4)
    picture = tmp_path / "errors.png"
    plot(fine, picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"

    over = measure_parity(
        V1_1, stress_state(V1_1, "feed_forward_out", layer=1), ["float16"], peers, LENGTHS, per_layer=True
    )
    places = {item.name: item.first_not_finite for item in over.layers}
    # transformers clamps, and keeps this product in float32.
    assert places["transformers"] is None
    assert places[f"{OWN} fused"] == places["nai-t5"] == "layer 1"
    assert json.loads(json.dumps(over.to_dict(), allow_nan=False))["layers"][0]["first_not_finite"] == "layer 1"
    page = io.StringIO()
    Console(file=page, width=120).print(render(over))
    assert "first not finite" in page.getvalue()


@needs_kernels
@pytest.mark.parametrize("products", ["kernels", *(each.name for each in SETS), "onednn"])
def test_what_is_named_is_measured(products: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the dtypes that it computes; the others are told."""
    named = [backend_of(products), backend_of(products, "int8")]
    for backend in named:
        missing = backend.missing(torch.device("cpu"), torch.float32)
        if missing or (products != "onednn" and (missing := prepare_kernels(backend.instructions))):  # type: ignore[union-attr]
            pytest.skip(str(missing))
    computed: list[tuple[torch.dtype, str]] = []
    really = parity._policy_run

    def seen(stack: Any, *others: Any) -> Any:
        computed.extend((stack.dtype, name) for name in runner_names(stack) if stack.layout == "fused")
        return really(stack, *others)

    monkeypatch.setattr(parity, "_policy_run", seen)
    report = measure_parity(V1_1, random_state(V1_1), ["float32", "float64"], (), LENGTHS, int8=True, products=products)
    assert report.passed
    assert {backend.name for backend in named} <= {name for dtype, name in computed if dtype == torch.float32}
    skipped = [reason.split(": ")[:2] for reason in report.skipped]
    assert skipped == [[f"{OWN} {kind} in float64", f"products={products!r}"] for kind in ("prepacked", "int8")]


def test_arguments_are_checked() -> None:
    state = random_state(V1_1)
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        measure_parity(V1_1, state, ["int8"])
    with pytest.raises(ValueError, match="unknown products 'sse'; allowed: auto, kernels, amx"):
        measure_parity(V1_1, state, products="sse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown peers \['keras'\]"):
        measure_parity(V1_1, state, against=["keras"])
    with pytest.raises(ValueError, match="must be float64 or float32"):
        measure_parity(V1_1, state, reference_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"prompt lengths \[3, 0\]"):
        measure_parity(V1_1, state, prompt_lengths=[3, 0])
    with pytest.raises(ValueError, match=r"prompt lengths \[\]"):
        measure_parity(V1_1, state, prompt_lengths=[])


def test_random_batch_pads_on_the_right() -> None:
    config = TOY_CONFIGS["umt5"].model_copy(update={"pad_token_id": 3})
    ids, mask = random_batch(config, (4, 1), 6)
    assert mask.sum(dim=1).tolist() == [4, 1]
    assert (ids[~mask] == 3).all()
    assert torch.equal(ids, random_batch(config, (4, 1), 6)[0])
    assert not torch.equal(ids, random_batch(config, (4, 1), 6, seed=1)[0])
