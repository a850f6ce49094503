"""Two processes that share a model give what one process gives: outputs, texts, losses, gradients and weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, random_state
from safetensors.torch import load_file
from sharded_worker import KINDS, toy_rows
from toy_training import config_in, read_config, toml, write_data

from nai_t5_core.backends.sharding import part_of, shard, whole
from nai_t5_core.bench.peers import own_t5
from nai_t5_core.model.encoder import LAYOUTS, Layout
from nai_t5_core.training import checkpoints
from nai_t5_core.training.loop import train
from nai_t5_core.weights.load import load_whole

pytest.importorskip("torch.distributed.fsdp", reason="torch has to be built with distributed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="fully_shard came with torch 2.6"),
]
HERE = Path(__file__).parent
RUNS = {
    "exact": {},
    "rounded": {"precision": "bfloat16", "gradient_checkpointing": True, "accumulation": 2},
}


def torchrun(*arguments: object) -> str:
    """Two processes of a program; what they wrote."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=HERE, capture_output=True, text=True, timeout=540, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def written(folder: Path, name: str, out: str, **values: Any) -> Path:
    path = folder / name
    path.write_text(toml(out=out, **values))
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two processes have left what they found, and their training runs."""
    folder = write_data(tmp_path_factory.mktemp("shared"))
    for name, values in RUNS.items():
        written(folder, f"{name}.toml", name, **values)
    adafactor = toml(out="adafactor").replace("[optimizer]", '[optimizer]\nkind = "adafactor"')
    (folder / "adafactor.toml").write_text(adafactor)
    torchrun("sharded_worker.py", folder, *(f"{name}.toml" for name in RUNS), "adafactor.toml")
    return folder


@pytest.fixture(scope="module")
def found(shared: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(shared / "found.pt", weights_only=True)
    return content


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shared_encoder_gives_the_same(found: dict[str, Any], kind: str, layout: Layout) -> None:
    config = TOY_CONFIGS[kind]
    ids, mask, _ = toy_rows(config)
    stack = build_stack(config, random_state(config), layout=layout)
    with torch.no_grad():
        torch.testing.assert_close(found[kind][f"encoder {layout}"], stack(ids, mask), rtol=1e-5, atol=1e-5)
        half = build_stack(config, random_state(config), torch.bfloat16, layout)(ids, mask)
        assert float((found[kind][f"bfloat16 {layout}"] - half).abs().max() / half.abs().max()) <= 0.02
        wanted = stack.hidden_states(ids, mask)[1]
        torch.testing.assert_close(found[kind][f"layers {layout}"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shared_t5_gives_the_same_texts_loss_and_gradients(found: dict[str, Any], kind: str, layout: Layout) -> None:
    config, seen = TOY_CONFIGS[kind], found[kind]
    ids, mask, labels = toy_rows(config)
    model = own_t5(config, random_state(config), torch.float32, layout).requires_grad_(True)
    assert torch.equal(seen[f"texts {layout}"], model.generate(ids, mask, num_beams=2, max_new_tokens=5))
    assert torch.equal(seen[f"streamed {layout}"], model.generate(ids, mask, max_new_tokens=5))
    loss = model(ids, mask, labels=labels).loss
    assert loss is not None
    loss.backward()
    assert float(seen[f"loss {layout}"]) == pytest.approx(loss.item(), rel=1e-6)
    gradients = seen[f"gradients {layout}"]
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        largest = float(weight.grad.abs().max())
        assert float((gradients[name] - weight.grad).abs().max()) <= 1e-5 * largest, name
    # Nothing is held by both; an odd number of rows leaves one more to the first.
    assert 0.45 < seen[f"own share {layout}"] < 0.55


def test_two_processes_train_as_one(shared: Path, found: dict[str, Any]) -> None:
    alone = train(config_in(write_data(shared / "alone")))
    losses = [report["loss"] for report in found["reports"]["exact.toml"]]
    assert losses == pytest.approx([report.loss for report in alone.reports], rel=1e-5)
    norms = [report["gradient_norm"] for report in found["reports"]["exact.toml"]]
    assert norms == pytest.approx([report.gradient_norm for report in alone.reports], rel=1e-4)
    targets = [report["targets"] for report in found["reports"]["exact.toml"]]
    assert targets == [report.targets for report in alone.reports]
    theirs = load_file(alone.hf_folder / "model.safetensors")
    ours = load_file(shared / "exact" / "hf" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert float((ours[name] - tensor).abs().max()) <= 1e-3 * float(tensor.abs().max()), name
    assert load_whole(shared / "exact" / "model.safetensors").tokenizer is not None


def test_two_processes_train_in_bfloat16_with_float32_weights(shared: Path, found: dict[str, Any]) -> None:
    alone = train(config_in(write_data(shared / "alone-rounded"), **RUNS["rounded"]))
    losses = [report["loss"] for report in found["reports"]["rounded.toml"]]
    # The first step has the same weights, rounded alike; then Adam makes much of the rounding of small gradients.
    assert losses[0] == pytest.approx(alone.reports[0].loss, rel=1e-3)
    assert losses == pytest.approx([report.loss for report in alone.reports], rel=0.05)
    weights = torch.load(shared / "rounded" / checkpoints.NAME, weights_only=True)["model"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert not torch.equal(weights["shared.weight"], weights["shared.weight"].bfloat16().float())


def test_adafactor_is_refused(found: dict[str, Any]) -> None:
    assert "Adafactor cannot train a model that is spread" in found["reports"]["adafactor.toml"]


def test_the_command_shares_a_run_that_one_process_began(shared: Path) -> None:
    """Three steps alone, then two processes to the end; the curve is that of a run that was never stopped."""
    folder = write_data(shared / "command")

    class StoppedError(Exception):
        pass

    def stop(report: Any, _: int) -> None:
        if report.step == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(config_in(folder), progress=stop)
    printed = torchrun("-m", "nai_t5_core.cli", "train", folder / "train.toml", "--resume", "--json")
    # One of them speaks.
    report = json.loads(printed)
    assert report["steps"] == 6
    whole_run = train(read_config(written(folder, "whole.toml", "whole")))
    logged = [json.loads(line)["loss"] for line in Path(report["log"]).read_text().splitlines()]
    assert logged == pytest.approx([item.loss for item in whole_run.reports], rel=1e-5)


def test_what_cannot_be_shared_is_refused() -> None:
    config = TOY_CONFIGS["v1.1"]
    with pytest.raises(ValueError, match="there is no process group; start the program with torchrun"):
        shard(build_stack(config, random_state(config)))


def test_a_tensor_that_is_not_shared_is_whole() -> None:
    tensor = torch.ones(3)
    assert whole(tensor) is tensor and part_of(tensor, tensor) is tensor
