"""Adapter configs and saved embeddings that hold something else than they should."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS
from fuzz_readers import readers
from hostile import in_little, other_header
from safetensors.torch import save_file

from comfy_nai_t5.embeddings import load_conditioning, save_conditioning
from nai_t5_core.facts.config import T5Config
from nai_t5_core.lora.files import read_lora
from nai_t5_core.weights.formats import CheckpointError

V1_1 = TOY_CONFIGS["v1.1"]

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"alpha_pattern": 7}, "adapter config of .* has alpha_pattern = 7: .*dictionary"),
        ({"alpha_pattern": {"q": "x"}}, r"has alpha_pattern.q = 'x': .*number"),
        ({"alpha_pattern": {"q": None}}, r"has alpha_pattern.q = None: .*number"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern '\(', which cannot be used \(error: unclosed group\); give the"),
        ({"alpha_pattern": {"(?=a)a": 1}}, "look-around.* is not supported.; give the names of modules instead"),
        ({"alpha_pattern": {"(a{999}){999}": 1}}, "counts are not supported"),
        ({"alpha_pattern": {r"(\w+)" * 300 + str(i): 1 for i in range(9)}}, "has 9 long patterns in alpha_pattern"),
        ({"lora_alpha": "four"}, "has lora_alpha = 'four': .*number"),
        ({"lora_alpha": float("nan")}, "has lora_alpha = nan: .*finite"),
        ({"lora_alpha": 1e300}, "has an alpha of 1e.300 for encoder"),
        ({"use_rslora": [1]}, r"has use_rslora = .1.: .*boolean"),
        ({"peft_type": 3}, "has peft_type = 3: .*string"),
        ([], "adapter_config.json is not readable JSON: it holds a JSON list, and an object is needed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_adapter_configs(config: object, message: str, tmp_path: Path) -> None:
    readers()["adapter_config.json"].write(tmp_path, json.dumps(config).encode())
    with in_little(), pytest.raises(CheckpointError, match=message):
        read_lora(tmp_path)


def test_alpha_patterns_that_never_end_elsewhere(tmp_path: Path) -> None:
    """What takes a backtracking engine longer than the universe is old; a usual pattern still counts."""
    endless = dict.fromkeys((r"(\w+\.?)+!", "(.*)*(.*)*(.*)*!", "(a|aa|.)+(e|.)*x!"), 1)
    config = {"lora_alpha": 8, "alpha_pattern": {**endless, r".*\.(k|q)": 6}}
    readers()["adapter_config.json"].write(tmp_path, json.dumps(config).encode())
    with in_little():
        lora = read_lora(tmp_path)
    (change,) = lora.changes.values()
    assert getattr(change, "scale", None) == 3.0  # 6 over the rank of 2


@pytest.mark.parametrize("dtype", [torch.complex64])
def test_factors_that_are_no_real_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    name = "lora_te2_encoder_block_0_layer_0_SelfAttention_q.lora_{}.weight"
    factors = {"up": torch.ones(64, 2, dtype=dtype), "down": torch.ones(2, 64)}
    save_file({name.format(role): value for role, value in factors.items()}, tmp_path / "l.safetensors")
    with pytest.raises(CheckpointError, match=r"lora_up.weight: torch.complex64, and real numbers are needed"):
        read_lora(tmp_path / "l.safetensors")


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (4.0, "no tensor, but a number"),
        (None, "no tensor, but None"),
        (torch.empty((), device="meta"), "without values"),
    ],
    ids=["number", "None", "meta"],
)
def test_an_alpha_that_is_no_tensor_is_not_passed_over(alpha: Any, message: str, tmp_path: Path) -> None:
    """The LoRA would have another strength without it."""
    module = "lora_te2_encoder_block_0_layer_0_SelfAttention_q"
    factors = {f"{module}.lora_down.weight": torch.ones(4, 64), f"{module}.lora_up.weight": torch.ones(64, 4)}
    torch.save({**factors, f"{module}.alpha": alpha}, tmp_path / "lora.pt")
    with pytest.raises(CheckpointError, match=rf"{module}.alpha: .*{message}"):
        read_lora(tmp_path / "lora.pt")
    torch.save({**factors, "epoch": 3}, tmp_path / "lora.pt")
    assert len(read_lora(tmp_path / "lora.pt").changes) == 1


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (None, "is damaged"),
        ("", "is damaged"),
        ("null", "its header has no list of entries"),
        ("7", "its header has no list of entries"),
        ("{}", "its header has no list of entries"),
        ("[7]", "its header has no list of entries"),
        ("[{}, null]", "its header has no list of entries"),
        ("[{}, {}, {}]", "it has no tensor 2.cond"),
        ('[{"a": ', "is damaged"),
    ],
)
def test_entries_of_a_saved_embedding(entries: Any, message: str, tmp_path: Path) -> None:
    states = torch.arange(8.0).reshape(1, 2, 4)
    path = save_conditioning([[states, {"strength": 2}], [states, {}]], tmp_path / "saved.safetensors")
    loaded, _ = load_conditioning(path)
    assert [extras for _, extras in loaded] == [{"strength": 2}, {}]
    assert all(torch.equal(found, states) for found, _ in loaded)  # which shared their tensor
    other_header(path, entries=entries)
    with pytest.raises(ValueError, match=r"saved.safetensors is damaged \(.*\); save the embedding again") as caught:
        load_conditioning(path)
    assert message in str(caught.value)


def test_the_limits_leave_room_for_every_published_model() -> None:
    assert T5Config(**{**V1_1.model_dump(), "num_layers": 36, "relative_attention_max_distance": 1024}).num_layers == 36


def test_a_full_disk_leaves_the_embedding_that_was_there(tmp_path: Path) -> None:
    """In a process that may write no more than 4,096 bytes into a file."""
    path = save_conditioning([[torch.ones(1, 2, 4), {}]], tmp_path / "saved.safetensors", note="before")
    before = path.read_bytes()
    program = f"""
import resource, signal
from pathlib import Path
import torch
from comfy_nai_t5.embeddings import save_conditioning
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_conditioning([[torch.ones(1, 512, 64), {{}}]], Path({str(path)!r}))
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert re.search(r"saved.safetensors cannot be written \(.*\); make room, or choose another name", run.stdout), run
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
