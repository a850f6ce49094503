"""A server that is started again: what it has encoded before costs it neither the T5's file nor its memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import spiece_tensor, write_file
from comfy_server import Server, node
from conftest import random_state
from timing_server import memory_of

from nai_t5_core.facts.config import named_config

COMFYUI = os.environ.get("COMFYUI_PATH")
if not COMFYUI:
    pytest.skip("COMFYUI_PATH is not set: give a ComfyUI checkout to run these", allow_module_level=True)

FILE = "umt5-base.safetensors"
LOADER, ENCODE, COUNTS, SAVE = "1", "2", "3", "4"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folders of a server with a T5 of 0.57 GB, and a cache of its own."""
    folder = tmp_path_factory.mktemp("cache")
    state = {name: tensor.half() for name, tensor in random_state(named_config("umt5-base").encoder_only()).items()}
    state["spiece_model"] = spiece_tensor()
    write_file(folder / "models" / "text_encoders" / FILE, state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder


def workflow(text: str, seed: int, cache: str = "on") -> dict[str, Any]:
    """The seed stands for whatever else in a workflow was changed."""
    how = {"dtype": "bfloat16", "weights": "auto", "device": "default", "cache": cache}
    return {
        LOADER: node("NAILoadT5", t5_name=FILE, family="ace", **how),
        ENCODE: node("CLIPTextEncode", clip=[LOADER, 0], text=text),
        COUNTS: node("NAIT5Cache", cache="on", conditioning=[ENCODE, 0]),
        SAVE: node("NAISaveT5Embedding", conditioning=[COUNTS, 0], name="kept", note=str(seed)),
    }


def test_a_restart_does_not_load_what_was_encoded_before(base: Path) -> None:
    size = (base / "models" / "text_encoders" / FILE).stat().st_size
    grown, saved = [], []
    for start, told in enumerate(
        ("0 hits (0 from memory, 0 from disk), 1 misses", "1 hits (0 from memory, 1 from disk), 0")
    ):
        server = Server(COMFYUI, base, *([] if start == 0 else [None]))
        try:
            before = memory_of(server, "VmRSS")
            assert server.succeed(workflow("a cat", seed=start))[COUNTS]["text"][0].startswith(told)
            grown.append((memory_of(server, "VmRSS") - before) / size)
            saved.append(server.conditioning("kept")["cond"])
            if start == 1:
                # The same prompt with a changed seed, an edited one that comes back, and a new one.
                server.succeed(workflow("a cat", seed=7))
                assert (memory_of(server, "VmRSS") - before) / size < 0.3
                counts = server.succeed(workflow("a dog", seed=7))[COUNTS]["text"][0]
                assert "1 misses" in counts
                assert (memory_of(server, "VmRSS") - before) / size > 0.7
        finally:
            server.stop()
    assert grown[0] > 0.7 and grown[1] < 0.2
    assert saved[0].equal(saved[1])
