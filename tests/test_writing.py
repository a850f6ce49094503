"""What is written is whole or not there: after a kill at any moment, on a full disk, and with two writers at once.

Writers run in forked processes, which a signal or a limit ends without harm to the tests.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TOY_CONFIGS, random_state, write_hf_folder
from toy_training import config_in, run_of, write_data

from nai_t5_core.bench.stress import write_stress_checkpoint
from nai_t5_core.cli.prompts import encode as encode_command
from nai_t5_core.facts.scales import unscaled
from nai_t5_core.training.config import TrainConfig, read_config
from nai_t5_core.training.export import write_hf
from nai_t5_core.training.loop import train
from nai_t5_core.training.start import first_model
from nai_t5_core.weights.calibrate import calibrate
from nai_t5_core.weights.convert import convert
from nai_t5_core.weights.formats import CheckpointError
from nai_t5_core.weights.scales_file import write_scales
from nai_t5_core.weights.whole_files import alone_in, replacing, write_whole

resource = pytest.importorskip("resource", reason="processes are limited and forked on Unix alone")

FORKED = multiprocessing.get_context("fork")
V1_1 = TOY_CONFIGS["v1.1"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    config_in(write_data(folder / "training"))
    return write_hf_folder(folder, V1_1, random_state(V1_1))


def training_config(source: Path) -> TrainConfig:
    return read_config(source / "training" / "train.toml")


def converted(source: Path, out: Path) -> None:
    convert(source, out / "model.safetensors", "bfloat16")


def calibrated(source: Path, out: Path) -> None:
    found = calibrate(None, ["a cat"], encoder_only=True)
    write_scales(out / "scales.json", found.scales)
    convert(None, out / "model.safetensors", "float16", True, scales=found.scales)


def scales_saved(source: Path, out: Path) -> None:
    write_scales(out / "scales.json", unscaled(200))


def encoded(source: Path, out: Path) -> None:
    encode_command(["a cat", "two dogs"] * 8, write=out / "prompts.safetensors", as_json=True)


def saved(source: Path, out: Path, save_format: Any) -> None:
    from nai_t5_core.hf import NAIT5EncoderModel

    NAIT5EncoderModel.from_pretrained(source).save_pretrained(out, save_format=save_format)


def saved_natively(source: Path, out: Path) -> None:
    saved(source, out, "native")


def saved_for_transformers(source: Path, out: Path) -> None:
    saved(source, out, "transformers")


def checkpoint_saved(source: Path, out: Path) -> None:
    run = run_of(training_config(source))
    run.save(out / "checkpoint.pt")


def exported(source: Path, out: Path) -> None:
    model, tokenizer = first_model(training_config(source))
    write_hf(model, tokenizer, out)


def stressed(source: Path, out: Path) -> None:
    write_stress_checkpoint(out, V1_1.model_copy(update={"vocab_size": 4096}), "hidden")


Writer = Callable[[Path, Path], None]
WRITERS: list[Writer] = [
    *(converted, calibrated, scales_saved, encoded, saved_natively, saved_for_transformers),
    *(checkpoint_saved, exported, stressed),
]
every_writer = pytest.mark.parametrize("write", WRITERS)


def in_a_process(call: Callable[[], None]) -> Any:
    """Started in a copy of this process, whose exit status is 0, or 2 for an error that a command reports."""

    def run() -> None:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - until it ends
        status = 0
        try:
            call()
        except (ValueError, OSError):
            status = 2
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            status = 1
        os._exit(status)

    process = FORKED.Process(target=run)
    process.start()
    return process


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def written_once(write: Writer, source: Path, folder: Path) -> dict[str, bytes]:
    out = folder / "expected"
    out.mkdir()
    write(source, out)
    return contents(out)


@every_writer
def test_a_kill_tears_no_file_and_its_rest_is_removed_by_the_next_run(
    write: Writer, source: Path, tmp_path: Path, record_property: Any
) -> None:
    expected = written_once(write, source, tmp_path)
    out, generator = tmp_path / "out", random.Random(0)
    out.mkdir()

    def again_and_again() -> None:
        while True:
            write(source, out)

    left = 0
    for _ in range(8):
        process = in_a_process(again_and_again)
        time.sleep(generator.uniform(0.001, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = contents(out)
        unfinished = {name for name in found if name.endswith(".nai-t5.part")}
        left += len(unfinished)
        assert all(found[name] == expected[name] for name in found.keys() - unfinished)
    write(source, out)
    assert contents(out) == expected
    record_property(f"8 kills of {write.__name__}, files that were left and removed", left)


@every_writer
def test_a_full_disk_is_an_error_and_leaves_what_was_there(write: Writer, source: Path, tmp_path: Path) -> None:
    expected = written_once(write, source, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    for name in expected:
        write_whole(out / name, "as before")
    largest = max(map(len, expected.values()))

    def limited(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        write(source, out)

    for limit in {0, 1, largest // 2, largest - 1} - {largest}:
        process = in_a_process(lambda limit=limit: limited(limit))
        process.join()
        assert process.exitcode == (0 if largest <= limit else 2)
        found = contents(out)
        assert found.keys() == expected.keys()
        assert all(found[name] in (b"as before", expected[name]) for name in found)


@every_writer
def test_two_writers_at_once_leave_one_whole_file(write: Writer, source: Path, tmp_path: Path) -> None:
    expected = written_once(write, source, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    for _ in range(4):
        processes = [in_a_process(lambda: write(source, out)) for _ in range(2)]
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        assert contents(out) == expected


def test_the_file_of_one_of_two_different_writers_stays(source: Path, tmp_path: Path) -> None:
    dtypes = ("float32", "bfloat16")
    whole = []
    for dtype in dtypes:
        convert(source, tmp_path / f"{dtype}.safetensors", dtype)
        whole.append((tmp_path / f"{dtype}.safetensors").read_bytes())
    out = tmp_path / "out"
    out.mkdir()
    for _ in range(8):
        processes = [
            in_a_process(lambda dtype=dtype: convert(source, out / "model.safetensors", dtype) and None)
            for dtype in dtypes
        ]
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        assert contents(out)["model.safetensors"] in whole
        assert len(contents(out)) == 1


def test_what_is_being_written_is_not_removed(tmp_path: Path) -> None:
    abandoned = tmp_path / "other.json.0123abcd.nai-t5.part"
    abandoned.write_text("half")
    others = [tmp_path / name for name in ("mine.part", "model.safetensors.part", "a.0123abcd.part", "x.nai-t5.part")]
    for other in others:
        other.write_text("somebody's")
    with replacing(tmp_path / "slow.json") as partial:
        partial.write_text("slow")
        process = in_a_process(lambda: write_whole(tmp_path / "quick.json", "quick"))
        process.join()
        assert process.exitcode == 0
        assert not abandoned.exists()
        write_whole(tmp_path / "slow.json", "quick")
    assert (tmp_path / "slow.json").read_text() == "slow"
    assert (tmp_path / "quick.json").read_text() == "quick"
    assert {path.name for path in tmp_path.iterdir()} == {"slow.json", "quick.json", *(other.name for other in others)}


def test_what_is_written_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "ours", "")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_device_and_a_folder_are_not_replaced(source: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(OSError, match=r"fifo is there and is no file; give another name to write to"):
        write_scales(fifo, unscaled(2))
    with pytest.raises(CheckpointError, match=r"fifo is there and is no file; give another name to write to"):
        convert(source, fifo, "float32")
    with pytest.raises(OSError, match="is there and is no file"):
        write_whole(tmp_path, "")
    assert fifo.is_fifo() and [path.name for path in tmp_path.iterdir()] == ["fifo"]


def test_two_runs_do_not_train_in_one_folder(tmp_path: Path) -> None:
    config = config_in(write_data(tmp_path))
    config.out.mkdir()
    with alone_in(config.out):
        for resume in (False, True):
            if resume:
                run_of(config).save(config.out / "checkpoint.pt")
            before = contents(config.out)
            with pytest.raises(ValueError, match=r"another run is writing in .*; wait for its end, or give another"):
                train(config, resume=resume)
            assert contents(config.out) == before
    assert len(train(config, resume=True).reports) == 6


def test_training_goes_on_after_kills(tmp_path: Path) -> None:
    """At any moment, the export included: the run that goes on ends with the model of one that was never killed."""
    whole = train(config_in(write_data(tmp_path / "whole"), checkpoint_every=1))
    config, generator = config_in(write_data(tmp_path / "killed"), checkpoint_every=1), random.Random(1)
    for _ in range(8):
        resume = (config.out / "checkpoint.pt").exists()
        process = in_a_process(lambda resume=resume: train(config, resume=resume) and None)
        time.sleep(generator.uniform(0.02, 0.4))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    resumed = train(config, resume=(config.out / "checkpoint.pt").exists())
    assert resumed.reports == whole.reports
    assert resumed.file.read_bytes() == whole.file.read_bytes()
    assert not [name for name in contents(config.out) if name.endswith(".part")]


def test_a_checkpoint_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    """torch itself raises a RuntimeError then, which the command does not take for a fault of the input."""
    run = run_of(config_in(write_data(tmp_path)))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        run.save(tmp_path / "checkpoint.pt")

    process = in_a_process(limited)
    process.join()
    assert process.exitcode == 2
