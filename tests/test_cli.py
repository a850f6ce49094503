"""The command line: results on stdout, everything else on stderr, one line and status 2 for every mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import encoder_part, prefixed, spiece_model, write_file, write_shards
from conftest import TOY_CONFIGS, random_state, write_hf_folder
from safetensors import safe_open
from safetensors.torch import load_file

from nai_t5_core.backends.choices import PRODUCTS_CHOICES
from nai_t5_core.backends.kernels.build import why_not_kernels
from nai_t5_core.cli import main
from nai_t5_core.cli.options import Products
from nai_t5_core.facts.config import T5Config
from nai_t5_core.prompts.text_encoder import TextEncoder

V1_1 = TOY_CONFIGS["v1.1"]
# typer decides on colours when it is imported.
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
ON_CPU = ("--device", "cpu", "--dtype", "float32")


@dataclass
class Result:
    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The one object on stdout."""
        assert self.status == 0, self.stderr
        return json.loads(self.stdout)


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some continuous integration services make rich believe in a terminal."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command as its script does."""

    def run_command(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["nai-t5", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return Result(int(caught.value.code or 0), _COLOURS.sub("", captured.out), _COLOURS.sub("", captured.err))

    return run_command


# ---------------------------------------------------------------------------------------------------------------------
# encode, count
# ---------------------------------------------------------------------------------------------------------------------


def test_encode(run: Run) -> None:
    result = run("encode", "a cat", "two dogs", *ON_CPU)
    assert (result.status, result.stderr) == (0, "")
    assert "TextEncoder(T5 v1.1" in result.stdout and "[2, 3, 128]" in result.stdout
    assert "a cat" in result.stdout and "two dogs" in result.stdout


def test_encode_json(run: Run) -> None:
    report = run("encode", "a cat", "a red cat on a mat", *ON_CPU, "--json").json
    assert (report["shape"], report["dtype"], report["length"]) == ([2, 8, 128], "float32", 8)
    assert [row["tokens"] for row in report["prompts"]] == [3, 8]
    states = TextEncoder.from_pretrained(dtype="float32", device="cpu").encode(["a cat"]).hidden_states[0]
    assert report["prompts"][0]["first_values"] == pytest.approx(states[0, :4].tolist(), rel=1e-4)
    assert report["prompts"][0]["std"] == pytest.approx(states.std(correction=0).item(), rel=1e-4)


def test_encode_to_a_file(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "a [very] cat.safetensors"
    result = run("encode", "A Cat ", "two dogs", "--family", "pixart-sigma", "--out", out, *ON_CPU)
    assert result.status == 0 and f"wrote {out}\n" in result.stdout
    tensors = load_file(out)
    expected = TextEncoder.from_pretrained(dtype="float32", device="cpu").encode(["a cat", "two dogs"], "pixart-sigma")
    assert tensors.keys() == {"hidden_states", "attention_mask"}
    torch.testing.assert_close(tensors["hidden_states"], expected.hidden_states, rtol=1e-5, atol=1e-5)
    assert torch.equal(tensors["attention_mask"], expected.attention_mask)
    assert tensors["hidden_states"].shape == (2, 300, 128)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert (json.loads(metadata["prompts"]), metadata["family"]) == (["A Cat ", "two dogs"], "pixart-sigma")


def test_encode_a_file_of_prompts(run: Run, tmp_path: Path) -> None:
    """One prompt per line, whoever wrote the file; U+2028 is no line end. The result may hold many prompts."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\nein Löwe\u2028und\n\n".encode() + b"two dogs\n" * 3000)
    report = run(
        "encode", "first", "--file", file, "--max-length", 4, "--out", tmp_path / "out", *ON_CPU, "--json"
    ).json
    assert [row["prompt"] for row in report["prompts"]] == ["first", "a cat", "ein Löwe\u2028und", ""] + [
        "two dogs"
    ] * 3000
    assert load_file(tmp_path / "out")["hidden_states"].shape == (3004, 4, 128)


def test_encode_tells_what_was_cut(run: Run) -> None:
    options = ("a red cat on a mat", "--max-length", 4, *ON_CPU)
    result = run("encode", *options)
    assert result.stderr == "cut to 4 tokens: a red cat on a mat; lost: on a mat\n"
    row = run("encode", *options, "--json").json["prompts"][0]
    assert (row["tokens"], row["truncated"], row["cut_text"]) == (4, True, "on a mat")


def test_encode_with_padding(run: Run) -> None:
    assert run("encode", "a cat", "--family", "flux", "--padding", "trim", *ON_CPU, "--json").json["shape"] == [
        1,
        3,
        128,
    ]


def test_json_is_ascii(run: Run) -> None:
    """It passes through terminals of every encoding."""
    result = run("count", "猫 🐈", "--json")
    assert result.stdout.isascii() and result.json["prompts"][0]["prompt"] == "猫 🐈"


def test_count(run: Run) -> None:
    result = run("count", "a cat", "a [bold]red[/bold] cat")
    assert (result.status, result.stderr) == (0, "")
    assert "a cat" in result.stdout and "a [bold]red[/bold] cat" in result.stdout
    assert run("count", "a cat", "", "--json").json == {
        "limit": None,
        "prompts": [{"prompt": "a cat", "tokens": 3, "cut_text": ""}, {"prompt": "", "tokens": 1, "cut_text": ""}],
    }


def test_count_for_a_family(run: Run) -> None:
    report = run("count", "Cat " * 200 + "and the rest", "--family", "pixart-alpha", "--json").json
    assert report["limit"] == 120
    assert report["prompts"][0]["tokens"] == 206 and report["prompts"][0]["cut_text"].endswith("cat and the rest")
    assert "limit 120" in run("count", "a cat", "--family", "pixart-alpha").stdout


def test_count_has_the_limit_that_encode_has(run: Run) -> None:
    counted = run("count", "a cat", "--family", "wan", "--json").json["limit"]
    assert counted == run("encode", "a cat", "--family", "wan", *ON_CPU, "--json").json["length"] == 512


def test_count_with_a_tokenizer(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert run("count", "abc", "--tokenizer", tmp_path, "--json").json["prompts"][0]["tokens"] == 4


# ---------------------------------------------------------------------------------------------------------------------
# inspect, convert
# ---------------------------------------------------------------------------------------------------------------------


def test_inspect_the_embedded_model(run: Run) -> None:
    result = run("inspect")
    assert result.status == 0
    for told in ("T5 v1.1", "nai-t5, fused", "sentencepiece, 4096 tokens", "encoder parameters"):
        assert told in result.stdout


def test_inspect_and_encode_tell_which_attention(run: Run) -> None:
    attention = run("inspect", "--json").json["attention"]
    missing = why_not_kernels()
    assert attention == {
        "cpu": "sdpa" if missing else "kernels in bfloat16 and float32, else sdpa",
        "cuda": "sdpa",
        "cuda, 16 lengths and more": "flex in bfloat16 and float16",
    }
    automatic = "sdpa" if missing else "kernels"
    for choice, told in (([], f"attention=auto: {automatic})"), (["--attention", "sdpa"], "attention=sdpa)")):
        assert run("encode", "a cat", "--device", "cpu", *choice, "--json").json["model"].endswith(told)
    refused = run("encode", "a cat", "--device", "cpu", "--dtype", "float64", "--attention", "flex")
    assert refused.status != 0 and "float64; allowed: float32, bfloat16, float16" in " ".join(refused.stderr.split())


def test_offloading_is_for_cuda(run: Run) -> None:
    refused = run("encode", "a cat", "--device", "cpu", "--offload")
    assert refused.status != 0 and "the device is cpu; give device='cuda'" in " ".join(refused.stderr.split())


def test_inspect_shards(run: Run, tmp_path: Path) -> None:
    folder = write_shards(write_hf_folder(tmp_path, V1_1, {}), random_state(V1_1)).parent
    (folder / "model.safetensors").unlink()
    (folder / "spiece.model").write_bytes(spiece_model())
    report = run("inspect", folder, "--json").json
    assert (report["source"], report["format"]) == (str(folder), "sharded safetensors, 3 files")
    assert T5Config(**report["config"]) == V1_1
    assert (report["kind"], report["size"], report["sizes_from"]) == ("T5 v1.1", "not a published size", "config.json")
    assert report["tokenizer"] == "sentencepiece, 4096 tokens"
    assert report["encoder_parameters"] == sum(map(torch.numel, encoder_part(random_state(V1_1)).values()))
    assert report["encoder_parameters"] + report["decoder_parameters"] == report["dtypes"]["float32"]
    assert (report["faults"], report["ignored"], report["prefix"]) == ([], {}, "none")


def test_inspect_a_part_of_a_larger_file(run: Run, tmp_path: Path) -> None:
    weights = prefixed(encoder_part(random_state(V1_1)), "text_encoders.t5xxl.transformer.")
    path = write_file(tmp_path / "flux [dev].safetensors", weights | {"vae.decoder.conv_in.weight": torch.zeros(1)})
    report = run("inspect", path, "--json").json
    assert (report["prefix"], report["tokenizer"]) == ("text_encoders.t5xxl.transformer.", "none")
    assert report["ignored"] == {
        "vae.decoder.conv_in.weight": "not under 'text_encoders.t5xxl.transformer.': another part of the file"
    }
    result = run("inspect", path)
    assert "ignored vae.decoder.conv_in.weight: not under" in result.stdout
    # The path is the table's title, which is broken anywhere.
    assert "flux[dev]" in "".join(result.stdout.split())


def test_inspect_shows_every_fault(run: Run, tmp_path: Path) -> None:
    state = random_state(V1_1)
    del state["encoder.block.1.layer.0.SelfAttention.k.weight"]
    state["decoder.block.0.layer.1.EncDecAttention.v.weight"] = torch.zeros(64, 65)
    folder = write_hf_folder(tmp_path, V1_1, state)
    result = run("inspect", folder)
    assert result.status == 1
    faults = [line for line in result.stdout.splitlines() if line.startswith("fault ")]
    assert faults == [
        "fault encoder.block.1.layer.0.SelfAttention.k.weight is missing (expected [64, 64] according to config.json)",
        "fault decoder.block.0.layer.1.EncDecAttention.v.weight has shape [64, 65], but config.json asks for [64, 64]",
    ]
    result = run("inspect", folder, "--json")
    assert result.status == 1 and len(json.loads(result.stdout)["faults"]) == 2


def test_inspect_with_a_damaged_tokenizer(run: Run, v1_1_folder: Path) -> None:
    (v1_1_folder / "spiece.model").write_bytes(b"x")
    assert run("inspect", v1_1_folder, "--json").json["tokenizer"].startswith("unreadable: ")


def test_convert_then_inspect_then_encode(run: Run, tmp_path: Path) -> None:
    config = V1_1.model_copy(update={"vocab_size": 4096})
    folder = write_hf_folder(tmp_path / "hf", config, random_state(config))
    (folder / "spiece.model").write_bytes(spiece_model())
    out = tmp_path / f"{'a long name ' * 8}.safetensors"

    result = run("convert", folder, out, "--dtype", "bfloat16", "--encoder-only")
    assert result.status == 0
    assert result.stdout.startswith(f"{out}: ") and result.stdout.endswith("bfloat16\ntokenizer: sentencepiece\n")
    report = run("inspect", out, "--json").json
    assert (report["format"], report["sizes_from"], report["faults"]) == ("nai-t5, fused", "its own header", [])
    assert report["config"]["num_decoder_layers"] == 0 and report["tokenizer"] == "sentencepiece, 4096 tokens"
    assert run("encode", "a cat", "--model", out, *ON_CPU, "--json").json["shape"] == [1, 3, 64]


def test_convert_json(run: Run, tmp_path: Path, v1_1_folder: Path) -> None:
    report = run("convert", v1_1_folder, tmp_path / "own.safetensors", "--json").json
    tensors = load_file(tmp_path / "own.safetensors")
    assert (report["out"], report["dtype"]) == (str(tmp_path / "own.safetensors"), "float32")
    assert (report["tensors"], report["bytes"]) == (len(tensors), sum(tensor.nbytes for tensor in tensors.values()))
    assert report["tokenizer"] is None and len(report["source_sha256"]) == 64


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------

ABSENT = f"/{'absent/' * 20}[t5].safetensors"
MISTAKES: dict[str, tuple[list[str], str]] = {
    "no prompts": (["encode"], "no prompts; give one or more in quotes, or --file with one per line"),
    "no such file of prompts": (["count", "--file", ABSENT], f"{ABSENT} cannot be read as UTF-8 text"),
    "no such model": (
        ["encode", "a", "--model", ABSENT],
        f"{ABSENT} does not exist; give a weight file, a folder, or a hub",
    ),
    "no such model to inspect": (["inspect", ABSENT], f"{ABSENT} does not exist"),
    "no such model to convert": (["convert", ABSENT, "out.safetensors"], f"{ABSENT} does not exist"),
    "no such folder to write in": (["encode", "a", "--out", "/absent/out"], "the folder /absent does not exist"),
    "no such family": (["count", "a", "--family", "fluxx"], "'fluxx'"),
    "no such device": (["encode", "a", "--device", "gpu"], "device 'gpu' cannot be used here"),
    "no such tokenizer": (["count", "a", "--tokenizer", "/absent"], "can't read a tokenizer from '/absent'"),
    "a prompt that is too long": (
        ["encode", "a red cat", "--max-length", "2", "--no-truncate"],
        "prompt 0 has 4 tokens, the limit is 2",
    ),
    **{
        f"products for {command}": (
            [command, *arguments, "--products", "avx2"],
            "products='avx2' is not possible: this processor has no AVX2, or no FMA or F16C beside it; use products=",
        )
        for command, *arguments in (["parity", "--random", "t5-v1_1-xxl"], ["bench-generate", "t5-v1_1-xxl"])
    },
    "a length that is too short": (
        ["encode", "a", "--max-length", "0"],
        "max_length=0 leaves no room for the end token",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_told_in_one_line(run: Run, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, expected = MISTAKES[case]
    if "--products" in arguments:
        monkeypatch.setattr("nai_t5_core.backends.kernels.build._processor_flags", frozenset)
    result = run(*arguments)
    assert (result.status, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert expected in result.stderr


def test_faults_of_a_checkpoint_in_one_line(run: Run, v1_1_folder: Path, tmp_path: Path) -> None:
    config = json.loads((v1_1_folder / "config.json").read_text())
    (v1_1_folder / "config.json").write_text(json.dumps({**config, "d_ff": 81}))
    result = run("convert", v1_1_folder, tmp_path / "own.safetensors")
    assert (result.status, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    shown = r"has shape [80, 64], but config.json asks for [81, 64]; encoder.block.0"
    assert "cannot be loaded, 18 faults: encoder.block.0" in result.stderr and shown in result.stderr
    assert not (tmp_path / "own.safetensors").exists()


@pytest.mark.parametrize(
    "arguments", [["encode", "a", "--dtype", "int4"], ["absent"], ["convert", "one"], ["count", "-x"]]
)
def test_wrong_usage(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.status, result.stdout) == (2, "")
    assert "Usage: nai-t5" in result.stderr and "Traceback" not in result.stderr


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["encode", "--help"]])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    told = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))"
    code = f"{told}; from nai_t5_core.cli import main; main()"
    done = python(code, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage:" in done.stdout and done.stdout.endswith("False\n")


def test_as_a_process_of_its_own() -> None:
    code = "from nai_t5_core.cli import main; main()"
    done = python(code, "encode", "a cat", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["shape"] == [1, 3, 128]
    done = python(code, "inspect", "/absent/t5.safetensors")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: /absent/t5.safetensors does not exist; give a weight file, a folder, or a hub id such as "
        "google/t5-v1_1-xxl\n"
    )


def test_the_command_knows_all_products() -> None:
    assert tuple(choice.value for choice in Products) == PRODUCTS_CHOICES
