"""Whole runs: they resume exactly, export what they trained, and the command runs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import spiece_model
from toy_training import config_in, curve, run_of, toml, write_data

from nai_t5_core.cli import main
from nai_t5_core.tokenizer import Tokenizer, tokenizer_from_bytes
from nai_t5_core.training import checkpoints, losses
from nai_t5_core.training.batches import Batches
from nai_t5_core.training.config import read_config
from nai_t5_core.training.loop import train
from nai_t5_core.weights.load import load_whole


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_from_bytes("sentencepiece", spiece_model())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with texts, pairs and a tokenizer."""
    return write_data(tmp_path)


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resuming_gives_the_same_curve(folder: Path, kind: str, precision: str) -> None:
    (folder / "train.toml").write_text(
        toml(precision=precision).replace("[optimizer]", f'[optimizer]\nkind = "{kind}"')
    )
    config = read_config(folder / "train.toml")
    unbroken = run_of(config)
    expected = curve(unbroken, 6)
    broken = run_of(config)
    assert curve(broken, 3) == expected[:3]
    broken.save(folder / "checkpoint.pt")
    resumed = run_of(config)
    resumed.resume(folder / "checkpoint.pt")
    assert resumed.step == 3
    assert curve(resumed, 3) == expected[3:]
    weights = zip(unbroken.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_an_interrupted_run_goes_on(folder: Path) -> None:
    whole = train(config_in(folder, out="whole"))

    class StoppedError(Exception):
        pass

    def interrupt(report: losses.StepReport, steps: int) -> None:
        if report.step == 5:
            raise StoppedError

    config = config_in(folder)
    with pytest.raises(StoppedError):
        train(config, progress=interrupt)
    log = config.out / losses.NAME
    # Steps 4 and 5 lie behind the checkpoint, and a line is cut short.
    assert len(losses.read_losses(log)) == 5
    log.write_text(log.read_text() + '{"step"')
    with pytest.raises(ValueError, match="holds a run already; go on with --resume"):
        train(config)
    resumed = train(config, resume=True)
    assert resumed.reports == whole.reports == losses.read_losses(log)
    assert [report.step for report in resumed.reports] == [1, 2, 3, 4, 5, 6]
    assert resumed.file.read_bytes() == whole.file.read_bytes()


def test_a_checkpoint_is_written_whole_or_not_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(config_in(folder))
    path = folder / "checkpoint.pt"
    run.save(path)
    before = path.read_bytes()
    run.advance()

    def full_disk(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoints.torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        run.save(path)
    assert path.read_bytes() == before and [*path.parent.glob("*.part")] == []


def test_checkpoints_that_do_not_fit(folder: Path) -> None:
    run, path = run_of(config_in(folder)), folder / "checkpoint.pt"
    with pytest.raises(ValueError, match="there is no run to go on with"):
        run.resume(path)
    run.save(path)
    with pytest.raises(ValueError, match=r"another config .seed was 3 and is 4"):
        run_of(config_in(folder, seed=4)).resume(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is no checkpoint of a training run, or is damaged"):
        run.resume(path)


@pytest.mark.parametrize("tied", [True, False])
def test_exports_are_the_trained_model(folder: Path, tokenizer: Tokenizer, tied: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    config = config_in(folder)
    assert config.model.sizes is not None
    sizes = config.model.sizes.model_copy(update={"tie_word_embeddings": tied})
    config = config.model_copy(update={"model": config.model.model_copy(update={"sizes": sizes}), "steps": 4})
    trained = train(config)
    reference = transformers.T5ForConditionalGeneration.from_pretrained(trained.hf_folder).eval()
    ours = load_whole(trained.file, torch.float32, "cpu")
    batch = Batches(config.data, tokenizer, config.seed)(0)
    with torch.no_grad():
        expected = reference(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
        found = ours.model(batch.input_ids, batch.attention_mask, labels=batch.labels)
    assert float((found.logits - expected.logits).abs().max() / expected.logits.abs().max()) < 1e-5
    assert ours.tokenizer is not None and ours.tokenizer.encode("a red cup") == tokenizer.encode("a red cup")
    assert transformers.AutoTokenizer.from_pretrained(trained.hf_folder)("a red cup").input_ids == tokenizer.encode(
        "a red cup"
    )
    # The trained weights and not the first ones.
    assert found.loss is not None and float(found.loss) < trained.reports[0].loss


def test_a_run_from_weights_begins_where_they_are(folder: Path) -> None:
    trained = train(config_in(folder))
    before = {file: file.read_bytes() for file in (trained.file, trained.hf_folder / "model.safetensors")}
    for source in before:
        config = config_in(folder, out=f"more-{source.stem}-{source.parent.name}")
        model = config.model.model_copy(update={"sizes": None, "tokenizer": None, "source": str(source)})
        further = train(config.model_copy(update={"model": model, "seed": 3}))
        assert further.reports[0].loss < trained.reports[0].loss
    assert before == {file: file.read_bytes() for file in before}


def test_the_running_mean_is_that_of_the_neighbours() -> None:
    assert losses.running_mean([1.0, 2.0, 6.0, 3.0], share=0.25) == [1.5, 3.0, 11 / 3, 4.5]
    assert losses.running_mean([5.0, 1.0]) == [5.0, 1.0]


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["nai-t5", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="it draws the plot")
    (folder / "train.toml").write_text(toml(steps=40, log_every=10))
    picture = folder / "losses.png"
    assert run_command(monkeypatch, folder / "train.toml", "--plot", picture, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 40 and report["loss"] < 0.4 * report["first_loss"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    logged = [json.loads(line) for line in Path(report["log"]).read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, 10, 20, 30, 40]
    assert run_command(monkeypatch, folder / "train.toml") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert run_command(monkeypatch, folder / "train.toml", "--resume") == 0
    assert "40 steps, loss" in capsys.readouterr().out
    assert run_command(monkeypatch, folder / "absent.toml") == 2
    assert "absent.toml cannot be read as TOML" in capsys.readouterr().err
