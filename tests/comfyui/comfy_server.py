"""A running ComfyUI with this pack, spoken to through its HTTP interface."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from comfy_nai_t5.embeddings import load_conditioning

ROOT = Path(__file__).parent.parent.parent
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))


class Server:
    """A ComfyUI with its folders in a scratch directory, and a pack in ``custom_nodes``.

    Args:
        checkout: ComfyUI.
        base: where its folders are made.
        pack: a repository, linked into ``custom_nodes``; None where one lies there already.
    """

    def __init__(self, checkout: str | Path, base: Path, pack: Path | None = ROOT) -> None:
        self.base = base
        for folder in ("custom_nodes", "models/text_encoders", "input", "output", "temp", "user"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        if pack is not None:
            (base / "custom_nodes" / "comfy-nai-t5").symlink_to(pack, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        options = ["--cpu", "--port", str(port), "--disable-auto-launch", "--base-directory", str(base)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.log = base / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "main.py", *options], cwd=checkout, stdout=log, stderr=log, env=environment
            )
        deadline = time.monotonic() + 600
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            self.get("/system_stats")
        except OSError:
            return False
        return True

    def read(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path) as reply:
            return bytes(reply.read())

    def get(self, path: str) -> Any:
        """The values of an answer in JSON."""
        return json.loads(self.read(path))

    def post(self, prompt: dict[str, Any], client: str = "") -> str:
        """Queues a workflow in API format; returns its number. Events go to the client's websocket."""
        data = json.dumps({"prompt": prompt, **({"client_id": client} if client else {})}).encode()
        request = urllib.request.Request(self.url + "/prompt", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            return str(json.loads(reply.read())["prompt_id"])

    def run(self, prompt: dict[str, Any], client: str = "") -> dict[str, Any]:
        """Runs a workflow in API format; returns its history entry."""
        number = self.post(prompt, client)
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            history = self.get(f"/history/{number}")
            if number in history:
                return dict(history[number])
            time.sleep(0.2)
        raise RuntimeError(f"the workflow did not end:\n{self.log.read_text()[-3000:]}")

    def succeed(self, prompt: dict[str, Any]) -> dict[str, Any]:
        entry = self.run(prompt)
        assert entry["status"]["status_str"] == "success", entry["status"]
        return dict(entry["outputs"])

    def fail(self, prompt: dict[str, Any]) -> str:
        """Runs a workflow that cannot succeed; returns what the front end shows of it."""
        entry = self.run(prompt)
        assert entry["status"]["status_str"] == "error", entry["status"]
        (fault,) = [facts for kind, facts in entry["status"]["messages"] if kind == "execution_error"]
        return str(fault["exception_message"])

    def watch(self, prompt: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
        """Runs a workflow while a front end listens: the warnings that it was sent, and all texts shown on nodes."""
        import aiohttp  # ComfyUI brings it

        async def listen() -> tuple[list[dict[str, Any]], str]:
            warnings, shown = [], b""
            url = f"{self.url.replace('http', 'ws')}/ws?clientId=watcher"
            async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
                running = asyncio.create_task(asyncio.to_thread(self.run, prompt, "watcher"))
                while True:
                    try:
                        message = await socket.receive(timeout=0.5)
                    except asyncio.TimeoutError:
                        # What was sent during the run may come after its end.
                        if running.done():
                            break
                        continue
                    if message.type == aiohttp.WSMsgType.BINARY:
                        shown += message.data
                    elif message.type == aiohttp.WSMsgType.TEXT:
                        content = json.loads(message.data)
                        warnings += [content["data"]] if content["type"] == "nai-t5.warning" else []
                assert (await running)["status"]["status_str"] == "success"
            return warnings, shown.decode("utf-8", "replace")

        return asyncio.run(listen())

    def conditioning(self, name: str) -> dict[str, Any]:
        (((states, extras),), _) = load_conditioning(self.base / "output" / "t5_embeddings" / f"{name}.safetensors")
        return {"cond": states, **extras}

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node of a workflow in API format."""
    return {"class_type": kind, "inputs": inputs}


def from_editor(workflow: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """A workflow as the editor saves it, in the form that the server runs."""
    links = {number: [str(source), output] for number, source, output, *_ in workflow["links"]}
    prompt = {}
    for each in workflow["nodes"]:
        if each["type"] == "MarkdownNote":
            continue
        assert each["type"] in info, f"the server lacks {each['type']}"
        values, inputs = list(each["widgets_values"]), {}
        for entry in each["inputs"]:
            if "widget" not in entry:
                inputs[entry["name"]] = links[entry["link"]]
                continue
            inputs[entry["name"]] = values.pop(0)
            if entry["name"] == "seed":
                values.pop(0)  # what is done with it after a run
        assert not values, each["type"]
        prompt[str(each["id"])] = node(each["type"], **inputs)
    return prompt
