"""What commands print never fails: not on an encoding, nor on what looks like markup, pictures or fields."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import embedded_taken_apart, write_file
from rich.console import Console
from safetensors.torch import load_file

from nai_t5_core.cli import main, terminal

# As on Windows in Western Europe and in Japan, and where nobody set a language.
ENCODINGS = ["cp1252", "cp932", "ascii", "utf-8"]
MARKUP = "[/x] [bold]b[/bold] :cat: {task} 100% [link=x]"
PROMPTS = ["a → 🦊 “日本” é", MARKUP, "lone \udcff surrogate", "a" * 200]


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def run(monkeypatch: pytest.MonkeyPatch, encoding: str, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command whose streams have this encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, newline="") for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["nai-t5", *map(str, arguments)])
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as ended:
            main()
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding))  # type: ignore[attr-defined]
    code = ended.value.code
    return code if isinstance(code, int) else 0, *texts  # type: ignore[return-value]


def in_encoding(text: str, encoding: str) -> str:
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("as_json", [False, True])
def test_prompts_of_any_text(encoding: str, as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--json"] if as_json else []
    status, out, err = run(monkeypatch, encoding, "count", *PROMPTS, *options)
    assert (status, err) == (0, "")
    if as_json:
        assert [row["prompt"] for row in json.loads(out)["prompts"]] == PROMPTS
    else:
        assert in_encoding("🦊", encoding) in out and "[/x]" in out and ":cat:" in out and "{task}" in out
    status, out, _ = run(monkeypatch, encoding, "encode", *PROMPTS, "--device", "cpu", *options)
    assert status == 0 and ("surrogate" in out)
    status, out, _ = run(monkeypatch, encoding, "generate", *PROMPTS[:2], "--max-new-tokens", 2, *options)
    assert status == 0
    if not as_json:
        assert out.startswith(in_encoding(PROMPTS[0], encoding)) and MARKUP in out


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_paths_of_any_name(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "[x] → {d} :cat:"
    odd.mkdir()
    monkeypatch.chdir(odd)
    shown = in_encoding(str(odd), encoding)
    small = ["--size", "t5-v1_1-small"]
    status, out, err = run(monkeypatch, encoding, "stress", "[/x] d", "--outlier", "none", *small)
    assert status == 2 and err.startswith("error: unknown outlier 'none'")
    folder = embedded_taken_apart(odd / "[/x] d")
    file = odd / "[bold]out.safetensors"
    status, out, err = run(monkeypatch, encoding, "convert", folder, file)
    assert status == 0 and out.startswith(f"{shown}/[bold]out.safetensors: "), err
    status, out, err = run(monkeypatch, encoding, "inspect", file)
    assert status == 0 and "[bold]out" in out.replace("\n", ""), err
    status, out, err = run(monkeypatch, encoding, "encode", "a cat", "--model", file, "--out", odd / "[/x].safetensors")
    assert status == 0 and f"wrote {shown}/[/x].safetensors" in out, err
    status, _, err = run(monkeypatch, encoding, "encode", "a cat", "--model", odd / "[/none]")
    assert status == 2 and err.startswith("error: ") and "[/none]" in err


def test_stress_writes_folders_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def write_small(folder: Path, *_: Any, **__: Any) -> Path:
        written.append(folder)
        return folder

    monkeypatch.setattr("nai_t5_core.bench.stress.write_stress_checkpoint", write_small)
    status, out, err = run(monkeypatch, "utf-8", "stress", "[/x] d")
    assert (status, err) == (0, "") and out.startswith("wrote [/x] d: t5-v1_1-small, hidden overflows")
    assert written == [Path("[/x] d")]


def test_names_in_files_are_shown_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {**load_file(embedded_taken_apart(tmp_path) / "model.safetensors"), "vae.[/red] :cat: é→": torch.zeros(1)}
    file = write_file(tmp_path / "all" / "t5.safetensors", state)
    (file.parent / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    _, out, err = run(monkeypatch, "cp1252", "inspect", file)
    assert r"vae.[/red] :cat: é\u2192" in out + err


@pytest.mark.parametrize("text", [MARKUP, "→ 🦊"])
def test_bars_and_spinners_show_texts_as_they_are(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ENCODINGS:
        stream = io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace")
        screen = Console(file=stream, force_terminal=True, width=200, markup=False, emoji=False, legacy_windows=False)
        monkeypatch.setattr(terminal, "err", screen)
        with terminal.working(text):
            pass
        with terminal.status("begin") as tell:
            tell(text)
        with terminal.bytes_bar(text) as progress:
            progress(1, 2)
        with terminal.counting(text) as progress:
            progress(1, 2)
        stream.flush()
        shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", stream.buffer.getvalue().decode(encoding))  # type: ignore[attr-defined]
        assert shown.count(in_encoding(text, encoding)) >= 4


def test_no_output_goes_by_markup() -> None:
    """Texts of others would be read as markup wherever one of ours is."""
    folder = Path(terminal.__file__).parent
    assert terminal.out._markup is False and terminal.err._markup is False
    for file in folder.glob("*.py"):
        assert not re.search(r"from_markup|\[/?(red|green|bold|yellow)\]|\[/\]", file.read_text(encoding="utf-8")), file
