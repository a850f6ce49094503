"""The memory that quantised files take in ComfyUI, and what is moved of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfy_toys import require_comfyui
from pretended_cuda import CUDA, PretendedCuda
from test_quantised import GGUF_KINDS, OTHER_KINDS, load, write_kind

from comfy_nai_t5.choices import Settings

require_comfyui()


@pytest.mark.parametrize("kind", [*GGUF_KINDS, *OTHER_KINDS])
def test_sizes_are_those_of_the_bytes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ComfyUI is told it needs for the model."""
    path = write_kind(tmp_path, kind)
    clip = load(path, monkeypatch, Settings("float32", "file"))
    assert 0.95 * path.stat().st_size < clip.patcher.model_size() <= path.stat().st_size
    loaded = clip.load_model()
    assert loaded.loaded_size() == clip.patcher.model_size()


@pytest.mark.parametrize("kind", ["Q8_0", "int8"])
def test_memory_holds_the_bytes_of_the_file(kind: str) -> None:
    """After the load, during encodes, and with a LoRA on every projection."""
    command = [sys.executable, str(Path(__file__).parent / "memory.py"), "t5-v1_1-large", kind, "--layers", "6"]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **paths})
    assert done.returncode == 0, done.stderr
    shares = json.loads(done.stdout.splitlines()[-1])
    assert shares["size, MB"] > 100
    assert all(shares[step] < 1.05 for step in ("load", "encode", "LoRA")), shares
    assert shares["encode"] > 0.5, "it was not the file that was measured"


def test_tables_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come to ids on another device, not the table, which ComfyUI may have offloaded."""
    from comfy_nai_t5.quantised import QuantisedEmbedding
    from nai_t5_core.backends.quantised.ggml import GGML_KINDS
    from nai_t5_core.backends.quantised.kinds import WEIGHT, QuantisedWeight

    blocks = torch.zeros(50, 2 * 34, dtype=torch.uint8)
    table = QuantisedEmbedding(QuantisedWeight(GGML_KINDS["Q8_0"], (50, 64), {WEIGHT: blocks}))
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    with torch.no_grad(), PretendedCuda() as device:
        ids = torch.tensor([[3, 49, 3]]).to(CUDA)
        device.reset()
        rows = table(ids, torch.bfloat16)
        assert (rows.device, rows.dtype, tuple(rows.shape)) == (CUDA, torch.bfloat16, (1, 3, 64))
        assert sum(device.moved) == ids.nbytes + rows.nbytes
    assert table.weight.device.type == "cpu"
