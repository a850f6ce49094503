"""A restart of the server: what its text encoder nodes take with a cache, and with ComfyUI's own loader.

``COMFYUI_PATH=… PYTHONPATH=.:tests python tests/comfyui/timing_cache.py`` prints a table.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from checkpoints import spiece_tensor, write_file
from comfy_server import Server, node
from conftest import random_state
from timing_server import FILE, SIZES, memory_of, node_seconds

_PROMPT = "slow piano over soft rain, a warm cello in the distance, tape hiss, 70 beats a minute, melancholic, stereo"
_LOADER, _ENCODE, _SAVE = "1", "2", "3"


def _prompt(loader: dict[str, Any], seed: int) -> dict[str, Any]:
    """A workflow; the seed stands for whatever else in it was changed."""
    return {
        _LOADER: loader,
        _ENCODE: node("CLIPTextEncode", clip=[_LOADER, 0], text=_PROMPT),
        _SAVE: node("NAISaveT5Embedding", conditioning=[_ENCODE, 0], name="timed", note=str(seed)),
    }


def main() -> None:
    size = SIZES["ace"]
    how = {"dtype": "bfloat16", "weights": "auto", "device": "default"}
    ways = {
        "stock": node("CLIPLoader", clip_name=FILE, type=size.family, device="default"),
        "Load T5": node("NAILoadT5", t5_name=FILE, family=size.family, **how),
        "Load T5, cache": node("NAILoadT5", t5_name=FILE, family=size.family, cache="on", **how),
    }
    state = {name: tensor.half() for name, tensor in random_state(size.config).items()}
    state["spiece_model"] = spiece_tensor()
    print("| way | what | load | encode | memory before | memory after |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        shutil.copytree(Path.home() / ".cache" / "comfy-nai-t5", f"{folder}/cache/comfy-nai-t5")
        shutil.rmtree(f"{folder}/cache/comfy-nai-t5/embeddings", ignore_errors=True)
        for way, loader in ways.items():
            base = Path(folder) / way.replace(" ", "-")
            write_file(base / "models" / "text_encoders" / FILE, state)
            for start in ("first start", "after a restart"):
                server = Server(os.environ["COMFYUI_PATH"], base, *([] if start == "first start" else [None]))
                try:
                    _time_prompts(server, loader, way, start)
                    time.sleep(1)  # a server that is killed writes nothing more
                finally:
                    server.stop()


def _time_prompts(server: Server, loader: dict[str, Any], way: str, start: str) -> None:
    """The same prompt twice, the second time with another seed; a node that need not run takes no time."""
    for seed in range(2):
        before = memory_of(server, "VmRSS")
        seconds = node_seconds(server, _prompt(loader, seed))
        after = memory_of(server, "VmRSS")
        times = (f"{seconds.get(each, 0.0) * 1e3:.0f} ms" for each in (_LOADER, _ENCODE))
        what = start if seed == 0 else "another seed"
        print(f"| {way} | {what} | {' | '.join(times)} | {before / 1e9:.2f} GB | {after / 1e9:.2f} GB |", flush=True)


if __name__ == "__main__":
    main()
