"""Nodes in a running server: how long each takes, by the events that the front end gets, and the server's memory."""

from __future__ import annotations

import json
import statistics
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints import spiece_tensor, write_file
from comfy_server import Server, node
from conftest import random_state

from nai_t5_core.facts.config import T5Config, named_config

_PROMPT = "slow piano over soft rain, a {} cello in the distance, tape hiss, 70 beats a minute, melancholic, stereo"
_EDITS = ("quiet", "warm", "dark", "lonely", "bright", "bowed", "second", "faint", "muted", "gentle")
FILE = "t5.safetensors"


@dataclass(frozen=True)
class Size:
    title: str
    family: str
    config: T5Config
    has_tokenizer: bool


SIZES = {
    "stable-audio": Size("Stable Audio (T5-base)", "stable_audio", named_config("t5-base").encoder_only(), False),
    "ace": Size("ACE-Step (UMT5-base)", "ace", named_config("umt5-base").encoder_only(), True),
}

_LOADER = "1"
_CLIP = "2"
_ENCODE = "3"
_SAVE = "4"


def _stock(family: str) -> dict[str, Any]:
    loader = node("CLIPLoader", clip_name=FILE, type=family, device="default")
    return {_LOADER: loader, _ENCODE: node("CLIPTextEncode", clip=[_LOADER, 0])}


def _replaced(family: str, layout: str) -> dict[str, Any]:
    replace = node("NAIReplaceT5", clip=[_LOADER, 0], dtype="bfloat16", layout=layout)
    return {**_stock(family), _CLIP: replace, _ENCODE: node("CLIPTextEncode", clip=[_CLIP, 0])}


def _loaded(family: str, layout: str) -> dict[str, Any]:
    how = {"dtype": "bfloat16", "weights": "auto", "device": "default", "layout": layout}
    loader = node("NAILoadT5", t5_name=FILE, family=family, **how)
    return {_LOADER: loader, _ENCODE: node("CLIPTextEncode", clip=[_LOADER, 0])}


WAYS: dict[str, Callable[[str], dict[str, Any]]] = {
    "stock": _stock,
    "Replace T5, bfloat16": partial(_replaced, layout="auto"),
    "Replace T5, bfloat16, packed": partial(_replaced, layout="packed"),
    "Load T5, bfloat16": partial(_loaded, layout="auto"),
    "Load T5, bfloat16, packed": partial(_loaded, layout="packed"),
}


@dataclass(frozen=True)
class NodeTimes:
    """Seconds of nodes, and bytes of resident memory."""

    load: float
    first: float
    edits: tuple[float, ...]
    resident: int
    peak: int

    def cells(self) -> str:
        low, high = min(self.edits) * 1e3, max(self.edits) * 1e3
        edits = f"{statistics.median(self.edits) * 1e3:.0f} ms ({low:.0f}–{high:.0f})"
        memory = (f"{size / 1e9:.2f} GB" for size in (self.resident, self.peak))
        return " | ".join((f"{self.load:.2f} s", f"{self.first * 1e3:.0f} ms", edits, *memory))


def time_way(checkout: Path, base: Path, size: Size, way: str, rounds: int) -> NodeTimes:
    """Starts a server of its own, loads a file in float16, encodes, and edits the prompt so many times."""
    state = {name: tensor.half() for name, tensor in random_state(size.config).items()}
    if size.has_tokenizer:
        state["spiece_model"] = spiece_tensor()
    write_file(base / "models" / "text_encoders" / FILE, state)
    del state
    server = Server(checkout, base)
    try:
        resident = memory_of(server, "VmRSS")
        runs = []
        for edit in _EDITS[: rounds + 1]:
            prompt = WAYS[way](size.family)
            prompt[_ENCODE]["inputs"]["text"] = _PROMPT.format(edit)
            prompt[_SAVE] = node("NAISaveT5Embedding", conditioning=[_ENCODE, 0], name="timed", note="")
            runs.append(node_seconds(server, prompt))
        load = runs[0][_LOADER] + runs[0].get(_CLIP, 0.0)
        first, *edits = (run[_ENCODE] for run in runs)
        return NodeTimes(load, first, tuple(edits), resident, memory_of(server, "VmHWM"))
    finally:
        server.stop()


def node_seconds(server: Server, prompt: dict[str, Any]) -> dict[str, float]:
    """Runs a workflow; returns the seconds of each node that was executed, the time of the events at this end."""
    import websocket

    client = uuid.uuid4().hex
    connection = websocket.create_connection(f"{server.url.replace('http', 'ws')}/ws?clientId={client}", timeout=300)
    try:
        number = server.post(prompt, client)
        seconds: dict[str, float] = {}
        running, since = None, 0.0
        while True:
            message = connection.recv()
            now = time.perf_counter()
            event = json.loads(message) if isinstance(message, str) else {}
            facts = event.get("data", {})
            if facts.get("prompt_id") != number:
                continue
            if event["type"] == "execution_error":
                raise RuntimeError(facts["exception_message"])
            if event["type"] != "executing":
                continue
            if running is not None:
                seconds[running] = now - since
            running, since = facts["node"], now
            if running is None:
                return seconds
    finally:
        connection.close()


def memory_of(server: Server, field: str) -> int:
    """Bytes, from the system's own account."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) * 1024
