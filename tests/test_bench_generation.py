"""The benchmark of generation on a toy: complete, finite, and the same texts from everybody. No absolute times."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_cases import runner_names
from conftest import TOY_CONFIGS, build_stack, random_state
from typer.testing import CliRunner

from nai_t5_core.backends.choices import backend_of
from nai_t5_core.backends.choose import prepack, quantize_int8, why_not_int8
from nai_t5_core.bench.parity_report import OWN
from nai_t5_core.bench.speed import (
    GENERATION_CASES,
    GenerationReport,
    bench_generation,
    generation,
    generation_cases_named,
    generation_markdown,
)
from nai_t5_core.bench.speed.variants import INT8, OWN_COMPILED
from nai_t5_core.cli import app
from nai_t5_core.model.attention import aligned
from nai_t5_core.model.attention_choice import missing_for_flex

V1_1 = TOY_CONFIGS["v1.1"].model_copy(update={"vocab_size": 512, "num_layers": 1, "num_decoder_layers": 1})
MISSING = missing_for_flex(torch.device("cpu"))
CAN_QUANTIZE = why_not_int8(build_stack(V1_1, random_state(V1_1))) is None
NEW_TOKENS, PROMPT_LENGTH = 12, 9


def small_bench(**arguments: Any) -> GenerationReport:
    arguments = {"dtype": "float32", "device": "cpu", "repeats": 2, "int8": CAN_QUANTIZE, **arguments}
    return bench_generation(V1_1, prompt_length=PROMPT_LENGTH, new_tokens=NEW_TOKENS, **arguments)


@pytest.fixture(scope="module")
def report() -> GenerationReport:
    pytest.importorskip("transformers", reason="a peer to measure")
    return small_bench()


def test_every_case_is_measured_and_all_write_the_same(report: GenerationReport) -> None:
    assert [result.case for result in report.cases] == list(GENERATION_CASES)
    for result in report.cases:
        names = [timing.name for timing in result.timings]
        assert names == [OWN, *([INT8] if CAN_QUANTIZE else []), "transformers"]
        own, peer = result.timings[0], result.timings[-1]
        assert own.ratio.median == own.same_texts == peer.same_texts == 1
        for timing in result.timings:
            spreads = (timing.seconds, timing.ratio, timing.tokens_per_second)
            assert all(math.isfinite(value) and value > 0 for spread in spreads for value in (spread.low, spread.high))
            # The fastest round writes the most in a second.
            rates, seconds = timing.tokens_per_second, timing.seconds
            for tokens in (rates.high * seconds.low, rates.low * seconds.high):
                assert tokens == pytest.approx(result.case.prompts * NEW_TOKENS)


def test_the_cache_is_as_large_as_its_shapes_and_little_of_it_is_used(report: GenerationReport) -> None:
    for result in report.cases:
        memory, case = result.memory, result.case
        per_token = 2 * V1_1.num_decoder_layers * V1_1.inner_dim * 4
        slots = case.beams * (NEW_TOKENS + 1)
        assert memory.computed == per_token * case.prompts * slots
        # Attention reads them in whole runs.
        assert memory.allocated == per_token * case.prompts * aligned(slots)
        assert memory.prompts == per_token * case.prompts * PROMPT_LENGTH
        # The last token is not read again, so that it is never written.
        assert memory.written <= per_token * case.prompts * case.beams * NEW_TOKENS
        if case.beams == 1:
            assert memory.written == per_token * case.prompts * NEW_TOKENS
        else:
            assert memory.written < 0.8 * memory.allocated


def test_pages_and_json(report: GenerationReport) -> None:
    page = generation_markdown(report)
    for text in (OWN, "transformers", *(case.name for case in GENERATION_CASES)):
        assert text in page
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [result["case"]["slug"] for result in values["cases"]] == [case.slug for case in GENERATION_CASES]
    assert (values["new_tokens"], values["dtype"], values["repeats"]) == (NEW_TOKENS, "float32", 2)


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=f"nothing can be compiled here: {MISSING}")
def test_ours_also_compiled() -> None:
    compiled = small_bench(compiled=True, against=(), int8=False, repeats=1)
    names = {result.case.slug: [timing.name for timing in result.timings] for result in compiled.cases}
    assert names == {case.slug: [OWN, OWN_COMPILED] for case in GENERATION_CASES}
    assert all(timing.same_texts == 1 for result in compiled.cases for timing in result.timings)


def test_ctranslate2_writes_the_same() -> None:
    pytest.importorskip("ctranslate2", reason="a peer to measure")
    report = small_bench(against=("ctranslate2",), cases=generation_cases_named(["greedy", "greedy-8"]), repeats=1)
    for result in report.cases:
        texts = {timing.name: timing.same_texts for timing in result.timings}
        assert texts["ctranslate2"] == 1 and ("ctranslate2, int8" in texts) == CAN_QUANTIZE
    assert report.versions["ctranslate2"][0].isdigit()


@pytest.mark.parametrize("products", ["kernels", "avx2", "onednn"])
def test_what_is_named_computes_the_encoder(products: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for quantize in (None, "int8"):
        backend: Any = backend_of(products, quantize)  # type: ignore[arg-type]
        if missing := backend.missing(torch.device("cpu"), torch.float32):
            pytest.skip(missing)
    ready: list[Any] = []
    for change in (prepack, quantize_int8):
        name, really = change.__name__, change

        def seen(*arguments: Any, really: Any = really) -> Any:
            ready.append(really(*arguments))
            return ready[-1]

        monkeypatch.setattr(generation, name, seen)
    report = small_bench(against=(), int8=True, repeats=1, cases=generation_cases_named(["greedy"]), products=products)
    assert report.cases[0].timings[0].same_texts == 1
    assert [runner_names(model) for model in ready] == [
        {backend_of(products, quantize).name}  # type: ignore[arg-type]
        for quantize in (None, "int8")
    ]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"unknown peers \['keras'\]; allowed: transformers, ctranslate2"):
        small_bench(against=("keras",))
    with pytest.raises(ValueError, match=r"unknown cases \['fast'\]; allowed: beams, greedy, greedy-8"):
        generation_cases_named(["fast"])
    with pytest.raises(ValueError, match="unknown products 'sse'; allowed: auto, kernels, amx"):
        small_bench(products="sse")
    with pytest.raises(ValueError, match=r"products='avx2' is not possible: the kernels for AVX2 are .*float64 on cpu"):
        small_bench(products="avx2", dtype="float64")
    with pytest.raises(ValueError, match="repeats=0"):
        small_bench(repeats=0)
    with pytest.raises(ValueError, match="did you mean 't5-v1_1-base'"):
        bench_generation("t5-v1_1-bas")


def test_the_command(tmp_path: Path) -> None:
    page = tmp_path / "generation.md"
    sizes = ["--prompt-length", "4", "--new-tokens", "3", "--repeats", "1", "--threads", "1"]
    options = ["--against", "", "--cases", "greedy", "--markdown", str(page), "--json"]
    found = CliRunner().invoke(app, ["bench-generate", "t5-v1_1-small", *sizes, *options])
    assert found.exit_code == 0, found.output
    values = json.loads(found.stdout)
    assert [result["case"]["slug"] for result in values["cases"]] == ["greedy"]
    assert "greedy, 1 prompt" in page.read_text(encoding="utf-8")
