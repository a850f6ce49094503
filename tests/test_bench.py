"""The benchmark on toys: complete, finite, and comparing the same mathematics. No absolute times."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, every_set, needs_kernels, random_state
from typer.testing import CliRunner

from nai_t5_core.backends.choose import prepack, why_not_prepack
from nai_t5_core.backends.kernels.build import why_not_kernels
from nai_t5_core.backends.kernels.sets import InstructionSet
from nai_t5_core.bench.parity import random_batch
from nai_t5_core.bench.parity_report import OWN
from nai_t5_core.bench.peers import random_state as draw_weights
from nai_t5_core.bench.roofline import encoder_flops
from nai_t5_core.bench.speed import CASES, cases_named, markdown, plot, render, run_bench, timing, variants
from nai_t5_core.bench.speed.cases import Case
from nai_t5_core.bench.speed.flops import count_flops
from nai_t5_core.bench.speed.limits import BareProjections
from nai_t5_core.bench.speed.memory import peak_bytes
from nai_t5_core.bench.speed.results import BenchReport, Spread
from nai_t5_core.bench.speed.variants import COMPILED, INT8, NOT_PREPACKED, Built
from nai_t5_core.cli import app
from nai_t5_core.facts.config import T5Config
from nai_t5_core.model.encoder import T5EncoderStack

V1_1 = TOY_CONFIGS["v1.1"].encoder_only()


def shrunken(case: Case) -> Case:
    """The same kind of batch, small; where nothing is padded, nothing is padded here either."""
    length = min(case.length, 48)
    longest = length if case.padding is None else 40
    return replace(case, prompt_lengths=tuple(min(tokens, longest) for tokens in case.prompt_lengths), length=length)


SMALL_CASES = tuple(map(shrunken, CASES))
CAN_PREPACK = why_not_prepack(T5EncoderStack(V1_1, dtype=torch.float32)) is None
HAS_KERNELS = why_not_kernels() is None


def small_bench(**arguments: Any) -> BenchReport:
    return run_bench(
        V1_1,
        **{"dtype": "float32", "device": "cpu", "repeats": 3, "cases": SMALL_CASES, "with_load": False, **arguments},
    )


@pytest.fixture(scope="module")
def report() -> BenchReport:
    pytest.importorskip("transformers", reason="a peer to measure")
    pytest.importorskip("nai_t5", reason="a peer to measure")
    return small_bench()


def spreads(report: BenchReport) -> list[Spread]:
    found = []
    for result in report.cases:
        for item in result.timings:
            found += [item.seconds, item.ratio, item.tokens_per_second]
        found += [result.guard.seconds, result.guard.share]
        if result.limit is not None:
            found += [result.limit.seconds, result.limit.reached]
        found += [spread for each in result.least for spread in (each.rate, each.seconds, each.reached)]
    return found


def test_every_case_and_implementation_is_measured(report: BenchReport) -> None:
    assert [result.case for result in report.cases] == list(SMALL_CASES)
    own = [OWN, NOT_PREPACKED] if CAN_PREPACK else [OWN]
    for result in report.cases:
        assert [item.name for item in result.timings] == [*own, "transformers", "nai-t5"]
        assert result.timings[0].ratio == Spread(1, 1, 1)
        assert (result.limit is not None) == CAN_PREPACK
        assert [item.name for item in result.least] == ([OWN] if HAS_KERNELS else [])
    for spread in spreads(report):
        assert all(math.isfinite(value) and value > 0 for value in (spread.low, spread.median, spread.high))
        assert spread.low <= spread.high


def test_all_compute_the_same(report: BenchReport) -> None:
    for result in report.cases:
        assert result.timings[0].difference == 0
        assert max(item.difference for item in result.timings) < 1e-5, result.case.name


@every_set
def test_a_set_is_measured_by_name(instructions: InstructionSet) -> None:
    """Its peers are in what it computes in; and the rate of its own instruction is the limit."""
    pytest.importorskip("transformers", reason="a peer to measure")
    made = small_bench(
        peers=("transformers",), cases=SMALL_CASES[:1], dtype="bfloat16", products=instructions.name, int8=True
    )
    stored = instructions.stored[torch.bfloat16]
    assert made.device.endswith(f", {instructions.title} kernels") and made.dtype == "bfloat16"
    assert made.versions["transformers"].endswith(" in torch.float32") == (stored == torch.float32)
    assert [item.name for item in made.cases[0].timings] == [OWN, NOT_PREPACKED, INT8, "transformers"]
    assert [item.name for item in made.cases[0].least] == [OWN, INT8]
    assert max(item.difference for item in made.cases[0].timings) < 0.05


def test_throughput_counts_real_tokens(report: BenchReport) -> None:
    for result in report.cases:
        for item in result.timings:
            tokens = item.tokens_per_second.median * item.seconds.median
            assert tokens == pytest.approx(result.case.real_tokens)


def test_executed_operations_follow_real_tokens_in_ours_and_the_padding_in_others(report: BenchReport) -> None:
    for result in report.cases:
        case = result.case
        padded = encoder_flops(V1_1, [case.length] * len(case.prompt_lengths))
        for item in result.timings:
            if not item.name.startswith(OWN):
                assert item.flops == padded, item.name
            elif case.padding in ("skip", None):
                assert item.flops_ratio == 1, case.name
            else:
                assert 1 < item.flops_ratio < padded / encoder_flops(V1_1, case.prompt_lengths)


def test_memory_of_a_masked_prompt_follows_its_real_tokens(report: BenchReport) -> None:
    padded = next(result for result in report.cases if result.case.slug == "padded")
    own, *others = (item.peak_memory for item in padded.timings if item.name != NOT_PREPACKED)
    result = padded.case.length * V1_1.d_model * 4
    assert own is not None and own > result
    for other in others:
        assert other is not None and other > own


def test_peak_memory_is_what_lives_at_once() -> None:
    numbers = torch.ones(1000)

    def call() -> torch.Tensor:
        first = numbers + 1
        second = first + numbers
        del first
        return second + 1

    assert peak_bytes(call, torch.device("cpu")) == pytest.approx(2 * 4000, abs=64)


def test_json_holds_everything(report: BenchReport) -> None:
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [result["case"]["name"] for result in values["cases"]] == [case.name for case in CASES]
    assert {"seconds", "ratio", "tokens_per_second", "flops", "peak_memory"} < set(values["cases"][0]["timings"][0])
    assert set(values["versions"]) == {"torch", "transformers", "nai-t5"}
    assert (values["dtype"], values["repeats"], values["loading"]) == ("float32", 3, None)
    assert values["threads"] == torch.get_num_threads()


def test_ratio_is_theirs_over_ours() -> None:
    spread = Spread.of_ratio([2.0, 6.0, 4.0], [1.0, 2.0, 4.0])
    assert (spread.median, spread.low, spread.high) == (2.0, 1.0, 3.0)


def test_implementations_the_guard_and_the_limit_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    def encoder(name: str) -> Any:
        def encode(case: Case, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            turns.append(name)
            return torch.ones(*ids.shape, 2)

        return encode

    class Products:
        def __init__(self, *_: Any) -> None:
            """The real one is tested below."""

        def of(self, tokens: int) -> Any:
            return lambda: turns.append(f"products of {tokens}")

    def rate(dtype: torch.dtype, instructions: object) -> float:
        turns.append(f"rate in {dtype}")
        return 1e9

    kernel_dtypes = {OWN: torch.bfloat16, "b": torch.int8}
    built = Built({name: encoder(name) for name in kernel_dtypes}, {}, (), True, kernel_dtypes, None, torch.bfloat16)
    monkeypatch.setattr("nai_t5_core.bench.speed.run.build_variants", lambda *_: built)
    monkeypatch.setattr("nai_t5_core.bench.speed.run.BareProjections", Products)
    monkeypatch.setattr(timing, "register_rate", rate)
    monkeypatch.setattr(timing, "is_finite", lambda out: turns.append("guard"))
    small_bench(cases=SMALL_CASES[:1], repeats=2)
    products = f"products of {SMALL_CASES[0].computed_tokens}"
    rates = ["rate in torch.bfloat16", "rate in torch.int8"]
    assert turns == [*[OWN] * 4, *["b"] * 4, products, *[OWN, "guard", "b", products, *rates] * 2]


def test_own_figures_only_and_peers_that_cannot() -> None:
    case = SMALL_CASES[:1]
    alone = small_bench(peers=(), cases=case)
    assert all(item.name.startswith(OWN) for item in alone.cases[0].timings)
    pytest.importorskip("nai_t5", reason="a peer that has no float64")
    wide = small_bench(peers=("nai-t5",), cases=case, dtype="float64")
    assert [item.name for item in wide.cases[0].timings] == [OWN]
    assert wide.cases[0].limit is None
    assert wide.skipped == ("nai-t5: nai-t5 has no float64: its norms and residual are float32",)
    assert "not measured" in markdown(wide)


def test_no_cases_build_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nai_t5_core.bench.speed.run.build_variants", lambda *_: pytest.fail("an encoder was built"))
    nothing = small_bench(cases=())
    assert nothing.cases == ()
    assert "|" not in markdown(nothing)
    with pytest.raises(ValueError, match="no case was measured"):
        plot(nothing, Path("never.png"))


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    assert small_bench(threads=1, peers=(), cases=SMALL_CASES[:1]).threads == 1
    assert torch.get_num_threads() == before


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown peers"):
        small_bench(peers=("keras",))
    with pytest.raises(ValueError, match="repeats=0"):
        small_bench(repeats=0)
    with pytest.raises(ValueError, match="did you mean 't5-v1_1-small'"):
        run_bench("t5-v1_1-smal")
    with pytest.raises(ValueError, match="is no checkout of ComfyUI"):
        small_bench(comfyui=tmp_path)


def test_fewer_layers_are_those_that_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def noted(config: T5Config, *how: Any, **others: Any) -> Any:
        drawn.append(config.num_layers)
        return draw_weights(config, *how, **others)

    monkeypatch.setattr("nai_t5_core.bench.speed.run.random_state", noted)
    for layers in (None, 1):
        found = small_bench(layers=layers, peers=(), cases=SMALL_CASES[:1], repeats=1)
        assert found.size.endswith("with 1 layers") == (layers == 1)
        assert found.cases[0].timings
    assert drawn == [V1_1.num_layers, 1]


@pytest.mark.parametrize("layers", [0, -1, V1_1.num_layers + 1])
def test_layers_that_there_are_not(layers: int) -> None:
    with pytest.raises(ValueError, match=f"layers={layers}; allowed: from 1 to the {V1_1.num_layers} that"):
        small_bench(layers=layers)


def test_cases_have_names() -> None:
    assert cases_named(["512", "padded"]) == (CASES[5], CASES[0])
    assert cases_named(["none"]) == ()
    assert cases_named([case.slug for case in CASES]) == CASES
    with pytest.raises(ValueError, match=r"unknown cases \['77'\]; allowed: padded, batch-4, .*, or none alone"):
        cases_named(["32", "77"])
    with pytest.raises(ValueError, match="or none alone"):
        cases_named(["none", "32"])


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.slug)
def test_computed_tokens_are_those_of_the_encoder(case: Case) -> None:
    ids, mask = random_batch(V1_1, case.prompt_lengths, case.length)
    stack = build_stack(V1_1, random_state(V1_1))
    asked = {} if case.padding is None else {"attention_mask": mask, "padding": case.padding}
    embeddings, _, _ = stack.prepare(ids, **asked)
    assert len(embeddings) == case.computed_tokens


# ---------------------------------------------------------------------------------------------------------------------
# Operations and limits
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not CAN_PREPACK, reason="oneDNN does not take this model here")
@pytest.mark.parametrize("kind", ["v1.0", "v1.1"])
def test_packed_products_are_counted_like_plain_ones(kind: str) -> None:
    config = TOY_CONFIGS[kind].encoder_only()
    stack = build_stack(config, random_state(TOY_CONFIGS[kind]))
    ids, mask = random_batch(config, (9, 30), 48)
    with torch.no_grad():
        plain = count_flops(lambda: stack(ids, mask, padding="skip"))
        packed = prepack(stack)
        packed(ids, mask)
        packed(ids, mask)
        assert "in panels" in repr(packed) or "oneDNN's order" in repr(packed)
        assert "to be in" not in repr(packed)
        assert count_flops(lambda: packed(ids, mask, padding="skip")) == plain == encoder_flops(config, (9, 30))


@needs_kernels
def test_the_least_time_is_that_of_all_operations_at_the_rate_of_their_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 1e9, torch.int8: 4e9}
    monkeypatch.setattr(timing, "register_rate", lambda dtype, _: rates[dtype])
    found = small_bench(int8=True, peers=(), cases=SMALL_CASES[1:2]).cases[0]
    lengths = SMALL_CASES[1].prompt_lengths
    attention = V1_1.num_layers * sum(4 * tokens**2 * V1_1.inner_dim for tokens in lengths)
    projections = encoder_flops(V1_1, lengths) - attention
    least = {item.name: item for item in found.least}
    assert least[OWN].seconds.median == pytest.approx((projections + attention) / 1e9)
    assert least[INT8].seconds.median == pytest.approx(projections / 4e9 + attention / 1e9)
    for item in found.timings:
        if item.name in least:
            reached = least[item.name].seconds.median / item.seconds.median
            assert least[item.name].reached.median == pytest.approx(reached)


@pytest.mark.skipif(not CAN_PREPACK, reason="oneDNN does not take this model here")
@pytest.mark.parametrize("kind", ["v1.0", "v1.1"])
def test_the_limit_does_the_work_of_the_projections_with_weights_of_their_size(kind: str) -> None:
    config = TOY_CONFIGS[kind].encoder_only()
    projections = BareProjections(config, torch.float32)
    weights = [weight for layer in projections.layers for weight in layer]
    wanted = sum(
        parameter.numel()
        for name, parameter in build_stack(config, random_state(TOY_CONFIGS[kind])).named_parameters()
        if parameter.ndim == 2 and "bias" not in name and "shared" not in name
    )
    assert sum(weight.numel() for weight in weights) == wanted
    assert len({id(weight) for weight in weights}) == len(weights)
    attention = config.num_layers * 4 * 20 * 20 * config.inner_dim
    assert count_flops(projections.of(20)) == encoder_flops(config, [20]) - attention


# ---------------------------------------------------------------------------------------------------------------------
# Compiled
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_variants_stand_beside_the_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend that runs what was captured, since C++ code takes minutes to build."""
    pytest.importorskip("transformers", reason="a peer to compile")
    if not hasattr(torch.compiler, "set_stance"):
        pytest.skip("torch 2.5 cannot run compiled code eagerly, which the count of operations needs")
    captured: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        captured.append(graph)
        return graph.forward

    real_compile = torch.compile

    @wraps(real_compile)
    def compile_with_backend(call: Any, **options: Any) -> Any:
        return real_compile(call, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compile_with_backend)
    compiled = small_bench(compiled=True, peers=("transformers",), cases=SMALL_CASES[:1], repeats=1)
    timings = {item.name: item for item in compiled.cases[0].timings}
    assert {OWN + COMPILED, "transformers", "transformers" + COMPILED} < set(timings)
    assert max(item.difference for item in timings.values()) < 1e-5
    assert timings["transformers" + COMPILED].flops == timings["transformers"].flops
    assert timings[OWN + COMPILED].flops is None
    assert len(captured) > 2


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(call: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nmore lines")

    monkeypatch.setattr(variants.torch, "compile", no_compiler)
    wanted = r"C\+\+ compiler|torch 2.6"
    with pytest.raises(ValueError, match=wanted):
        small_bench(compiled=True)


# ---------------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------------


def test_pages_for_people(report: BenchReport) -> None:
    from rich.console import Console

    narrow, page = io.StringIO(), io.StringIO()
    Console(file=narrow, width=80).print(render(report))
    assert "…" not in narrow.getvalue()
    assert all(line.rstrip().endswith("│") for line in narrow.getvalue().splitlines() if line.startswith("│"))
    Console(file=page, width=250).print(render(report))
    for text in (OWN, "transformers", "nai-t5", *(case.name for case in CASES)):
        assert text in page.getvalue()
        assert text in markdown(report)
    names = len(report.cases[0].timings)
    tables = [part.splitlines() for part in markdown(report).split("\n\n") if part.startswith("|")]
    after_cases = 4 if HAS_KERNELS else 2
    wanted = [2 + len(CASES), *[2 + names] * len(CASES), *[2 + len(CASES)] * after_cases]
    assert [len(lines) for lines in tables] == wanted
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1


def test_the_plot_shows_every_case(report: BenchReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs it")
    plot(report, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs it")
    page, picture = tmp_path / "bench.md", tmp_path / "bench.png"
    options = ["--against=", "--cases", "32", "--no-load", "--repeats", "1", "--threads", "1", "--json"]
    files = ["--markdown", str(page), "--plot", str(picture)]
    found = CliRunner().invoke(app, ["bench", "t5-v1_1-small", *options, *files])
    assert found.exit_code == 0, found.output
    values = json.loads(found.stdout)
    assert [result["case"]["slug"] for result in values["cases"]] == ["32"]
    assert "| 32 tokens |" in page.read_text(encoding="utf-8")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_refuses_what_it_cannot_draw() -> None:
    found = CliRunner().invoke(app, ["bench", "--cases", "none", "--plot", "x.png"])
    assert "nothing to draw" in str(found.exception)
