"""``nai-t5 generate``: texts on stdout, the same for the same seed, and mistakes told in a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import spiece_model
from conftest import TOY_CONFIGS, random_state, write_hf_folder

from nai_t5_core.backends.choose import quantize_int8, why_not_int8
from nai_t5_core.cli import main
from nai_t5_core.weights.load import load_whole

Run = Callable[..., Any]
ON_CPU = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``nai-t5 generate`` and gives (status, stdout, stderr)."""

    def run_command(*arguments: object) -> tuple[int, str, str]:
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(sys, "argv", ["nai-t5", "generate", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run_command


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A toy with the embedded model's vocabulary, and texts that end."""
    config = TOY_CONFIGS["v1.1"].model_copy(update={"vocab_size": 4096})
    state = random_state(config)
    state["lm_head.weight"][1] *= 4
    folder = write_hf_folder(tmp_path / "toy", config, state)
    (folder / "spiece.model").write_bytes(spiece_model())
    return folder


def texts(stdout: str) -> list[list[str]]:
    return [[output["text"] for output in row["outputs"]] for row in json.loads(stdout)["prompts"]]


def test_embedded_model_by_default(run: Run) -> None:
    status, stdout, stderr = run("a cat", "two dogs", "--max-new-tokens", 5, *ON_CPU)
    assert (status, stderr) == (0, "")
    lines = stdout.splitlines()
    assert len(lines) == 4 and lines[0] == "a cat" and lines[2] == "two dogs"
    assert lines[1].startswith("  ") and lines[3].startswith("  ")


def test_json_is_what_the_model_generates(run: Run, model: Path) -> None:
    prompts = ["a cat", "two dogs on a sofa in the rain", "x"]
    options = ("--beams", 3, "--num-return-sequences", 2, "--length-penalty", 0.5, "--early-stopping", "never")
    status, stdout, _ = run(*prompts, "--model", model, "--max-new-tokens", 12, *options, "--json", *ON_CPU)
    assert status == 0
    loaded = load_whole(model, torch.float32, "cpu")
    tokens = loaded.tokenizer(prompts)
    expected = loaded.model.generate(
        torch.tensor(tokens.input_ids),
        torch.tensor(tokens.attention_mask),
        max_new_tokens=12,
        num_beams=3,
        num_return_sequences=2,
        length_penalty=0.5,
        early_stopping="never",
    ).tolist()
    report = json.loads(stdout)
    assert report["source"] == str(model) and [row["prompt"] for row in report["prompts"]] == prompts
    outputs = [output for row in report["prompts"] for output in row["outputs"]]
    assert len(outputs) == 6 and {output["ended"] for output in outputs} == {True, False}
    for output, row in zip(outputs, expected, strict=True):
        assert output["token_ids"] == row[: len(output["token_ids"])]
        assert set(row[len(output["token_ids"]) :]) <= {0}
        assert output["ended"] == (output["token_ids"][-1] == 1)
        assert output["text"] == loaded.tokenizer.decode(output["token_ids"])


def test_eight_bits(run: Run, model: Path) -> None:
    if why_not_int8(load_whole(model, torch.float32, "cpu").model) is not None:
        pytest.skip("this processor has no VNNI")
    call = ("a cat", "two dogs", "--model", model, "--max-new-tokens", 6, "--min-new-tokens", 6, "--json", *ON_CPU)
    status, stdout, stderr = run(*call, "--int8")
    assert (status, stderr) == (0, "")
    ids = [row["outputs"][0]["token_ids"] for row in json.loads(stdout)["prompts"]]
    expected = quantize_int8(load_whole(model, torch.float32, "cpu").model)
    tokens = load_whole(model, torch.float32, "cpu").tokenizer(["a cat", "two dogs"])
    batch = torch.tensor(tokens.input_ids), torch.tensor(tokens.attention_mask)
    assert ids == expected.generate(*batch, max_new_tokens=6, min_new_tokens=6).tolist()


def test_samples_by_seed(run: Run, model: Path) -> None:
    call = ("a cat", "--model", model, "--sample", "--top-p", 0.9, "--temperature", 1.3, "--json", *ON_CPU)
    first, again, other = (texts(run(*call, "--seed", seed)[1]) for seed in (1, 1, 2))
    assert first == again != other


def test_rules_and_lengths(run: Run, model: Path) -> None:
    call = ("a cat", "--model", model, "--json", *ON_CPU)
    limits = ("--min-new-tokens", 9, "--max-new-tokens", 9, "--no-repeat-ngram-size", 1, "--repetition-penalty", 1.5)
    row = json.loads(run(*call, *limits)[1])["prompts"][0]["outputs"][0]["token_ids"]
    assert len(row) == len(set(row)) == 9


def test_prompts_of_a_file(run: Run, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\ntwo dogs\n")
    of_file = run("--file", file, "--model", model, "--json", *ON_CPU)[1]
    given = run("a cat", "two dogs", "--model", model, "--json", *ON_CPU)[1]
    assert texts(of_file) == texts(given)


def test_tokenizer_of_ones_own(run: Run, model: Path, tmp_path: Path) -> None:
    spiece = (model / "spiece.model").rename(tmp_path / "spiece.model")
    status, _, stderr = run("a cat", "--model", model, *ON_CPU)
    assert status == 2 and "comes without a tokenizer" in stderr
    assert run("a cat", "--model", model, "--tokenizer", spiece, *ON_CPU)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: no prompts; give one or more in quotes"),
        (("a", "--sample", "--beams", "2"), "error: do_sample=True goes with num_beams=1"),
        (("a", "--top-p", "7"), "error: top_p=7.0; it must be above 0"),
        (("a", "--num-return-sequences", "2"), "error: num_return_sequences=2 with num_beams=1"),
        (("a", "--model", "no/such/file.safetensors"), "error: no/such/file.safetensors"),
    ],
)
def test_mistakes(run: Run, arguments: tuple[str, ...], message: str) -> None:
    status, stdout, stderr = run(*arguments)
    assert (status, stdout) == (2, "")
    assert stderr.startswith(message) and stderr.count("\n") == 1
