"""The pack in a running server, through its HTTP interface: nothing of ComfyUI is imported here."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_file
from comfy_toys import error
from conftest import random_state

from comfy_nai_t5.embeddings import load_conditioning
from nai_t5_core import TextEncoder
from nai_t5_core.config import named_config

COMFYUI = os.environ.get("COMFYUI_PATH")
if not COMFYUI:
    pytest.skip("COMFYUI_PATH is not set: give a ComfyUI checkout to run these", allow_module_level=True)

aiohttp = pytest.importorskip("aiohttp", reason="ComfyUI needs aiohttp, and so does listening to it")

ROOT = Path(__file__).parent.parent.parent
EMBEDDED = "embedded tiny model (random weights, to try the nodes with)"


# Stands for a diffusion model where only the text encoder's side of a node is of interest.
NO_MODEL = """
class NoModel:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "give", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def give(self):
        return (None,)

NODE_CLASS_MAPPINGS = {"NoModel": NoModel}
"""


class Server:
    """A ComfyUI with its folders in a scratch directory, and this repository in ``custom_nodes``."""

    def __init__(self, base: Path) -> None:
        self.base = base
        for folder in ("custom_nodes", "models/text_encoders", "input", "output", "temp", "user"):
            (base / folder).mkdir(parents=True)
        (base / "custom_nodes" / "comfy-nai-t5").symlink_to(ROOT, target_is_directory=True)
        (base / "custom_nodes" / "no_model.py").write_text(NO_MODEL)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        options = ["--cpu", "--port", str(port), "--disable-auto-launch", "--base-directory", str(base)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.log = base / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "main.py", *options], cwd=COMFYUI, stdout=log, stderr=log, env=environment
            )
        deadline = time.monotonic() + 480
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

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path) as reply:
            content = reply.read()
        return json.loads(content) if reply.headers["Content-Type"].startswith("application/json") else content.decode()

    def run(self, prompt: dict[str, Any], client: str = "") -> dict[str, Any]:
        """Runs a workflow in API format; returns its history entry. ``client`` names a websocket that listens."""
        data = json.dumps({"prompt": prompt, **({"client_id": client} if client else {})}).encode()
        request = urllib.request.Request(self.url + "/prompt", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            number = json.loads(reply.read())["prompt_id"]
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

        async def listen() -> tuple[list[dict[str, Any]], str]:
            warnings, shown = [], b""
            url = f"{self.url.replace('http', 'ws')}/ws?clientId=watcher"
            async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
                running = asyncio.create_task(asyncio.to_thread(self.run, prompt, "watcher"))
                while not running.done():
                    with suppress(asyncio.TimeoutError):
                        message = await socket.receive(timeout=0.5)
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("comfyui"))
    yield running
    running.stop()


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def load(name: str = EMBEDDED, family: str = "auto", dtype: str = "float32", weights: str = "file") -> dict[str, Any]:
    return node("NAILoadT5", t5_name=name, family=family, dtype=dtype, weights=weights, device="default")


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


def test_nodes_are_there_with_their_help(server: Server) -> None:
    info = server.get("/object_info")
    ours = {name for name in info if name.startswith("NAI")}
    assert len(ours) == 8 and all(info[name]["description"] for name in ours)
    for name in ours:
        for required in ("required", "optional"):
            for entry, (kind, *options) in info[name]["input"].get(required, {}).items():
                assert kind in ("CLIP", "CONDITIONING") or options[0].get("tooltip"), (name, entry)
        assert server.get(f"/extensions/comfy-nai-t5/docs/{name}.md").startswith("# ")
    assert f"Cannot import {server.base}" not in server.log.read_text()


def test_the_bundled_workflow_that_needs_no_file(server: Server) -> None:
    workflow = json.loads((ROOT / "example_workflows" / "t5_try_it.json").read_text(encoding="utf-8"))
    prompt = from_editor(workflow, server.get("/object_info"))
    outputs = server.succeed(prompt)
    counter = next(number for number, each in prompt.items() if each["class_type"] == "NAIT5TokenCount")
    text = prompt[counter]["inputs"]["text"].replace("(", "").replace(":1.2)", "")
    # A weight splits the text, and a piece that begins a word is another than one within it: one token more at most.
    count = TextEncoder.from_pretrained(dtype="float32").count([text])[0]
    told = int(outputs[counter]["text"][0].split()[0])
    assert count <= told <= count + 2
    assert server.conditioning("fox")["attention_mask"].sum() == min(16, told)
    assert any("images" in output for output in outputs.values())


@pytest.mark.parametrize("path", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_no_bundled_workflow_lacks_a_node(path: Path, server: Server) -> None:
    assert from_editor(json.loads(path.read_text(encoding="utf-8")), server.get("/object_info"))


def test_encode_equals_the_library(server: Server) -> None:
    server.succeed(
        {
            "1": load(),
            "2": node("CLIPTextEncode", clip=["1", 0], text="two dogs on a sofa"),
            "3": node("NAISaveT5Embedding", conditioning=["2", 0], name="dogs", note=""),
        }
    )
    expected = TextEncoder.from_pretrained(dtype="float32").encode(["two dogs on a sofa"]).hidden_states
    assert error(server.conditioning("dogs")["cond"], expected) < 1e-5


def test_an_embedding_comes_back(server: Server) -> None:
    encode = node("NAIT5Encode", clip=["1", 0], text="a\nlonger line", max_length=0, pad_to=0, line_by_line=True)
    server.succeed(
        {"1": load(), "2": encode, "3": node("NAISaveT5Embedding", conditioning=["2", 0], name="lines", note="two")}
    )
    outputs = server.succeed(
        {
            "1": node("NAILoadT5Embedding", name="lines"),
            "2": node("NAISaveT5Embedding", conditioning=["1", 0], name="again", note=""),
            "3": node("PreviewAny", source=["1", 1]),
        }
    )
    first, second = server.conditioning("lines"), server.conditioning("again")
    assert first["cond"].shape[0] == 2 and torch.equal(first["cond"], second["cond"])
    assert outputs["3"]["text"] == ["two"]


def test_ours_equals_stock_at_the_size_of_stable_audio(server: Server) -> None:
    """ComfyUI's own loader, its own text nodes, a file of the real size with random weights."""
    state = {name: tensor.half() for name, tensor in random_state(named_config("t5-base").encoder_only()).items()}
    write_file(server.base / "models" / "text_encoders" / "t5_base.safetensors", state)
    prompt = {
        "1": node("CLIPLoader", clip_name="t5_base.safetensors", type="stable_audio", device="default"),
        "2": load("t5_base.safetensors", "stable_audio"),
        "3": node("NAIReplaceT5", clip=["1", 0], dtype="float32"),
        "4": node("NAIReplaceT5", clip=["1", 0], dtype="bfloat16"),
    }
    names = {"1": "stock", "2": "loaded", "3": "replaced", "4": "bfloat16"}
    for source, name in names.items():
        prompt[f"{source}0"] = node("CLIPTextEncode", clip=[source, 0], text="slow (piano:1.3), rain")
        prompt[f"{source}1"] = node("NAISaveT5Embedding", conditioning=[f"{source}0", 0], name=name, note="")
    server.succeed(prompt)
    expected = server.conditioning("stock")
    assert expected["cond"].shape == (1, 128, 768)
    for name, limit in (("loaded", 1e-4), ("replaced", 1e-4), ("bfloat16", 3e-2)):
        assert error(server.conditioning(name)["cond"], expected["cond"]) < limit


def test_what_was_loaded_is_told(server: Server) -> None:
    encode = node("CLIPTextEncode", clip=["1", 0], text="a")
    _, shown = server.watch(
        {
            "1": load(dtype="float16"),
            "2": encode,
            "3": node("NAISaveT5Embedding", conditioning=["2", 0], name="a", note=""),
        }
    )
    assert "t5: T5 v1.1 of 3 layers, float16, fused layout" in shown


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def count(text: str = "", **choices: Any) -> dict[str, Any]:
    return {"1": load(**choices), "2": node("NAIT5TokenCount", clip=["1", 0], text=text, max_length=0)}


def test_files_that_are_no_t5(server: Server) -> None:
    folder = server.base / "models" / "text_encoders"
    toy = random_state(named_config("t5-v1_1-small").encoder_only().model_copy(update={"num_layers": 1}))
    clip_l = {f"text_model.encoder.layers.{i}.mlp.fc1.weight": torch.zeros(2, 2) for i in range(12)}
    write_file(folder / "clip_l.safetensors", clip_l)
    write_file(folder / "vae.safetensors", {"decoder.up.0.weight": torch.zeros(2, 2)})
    whole = write_file(folder / "whole.safetensors", toy).read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-1000])
    (folder / "text.safetensors").write_bytes(b"not a model at all")
    (folder / "cut.gguf").write_bytes(b"GGUF" + b"\x03" + bytes(200))
    server.get("/object_info/NAILoadT5")  # as the front end does when the page is loaded: new files become choices
    for name, message in (
        ("clip_l.safetensors", "is no T5: it looks like a CLIP"),
        ("vae.safetensors", "is no T5: it looks like a VAE"),
        ("cut.safetensors", "is a damaged safetensors file"),
        ("text.safetensors", "neither safetensors, nor a PyTorch file"),
    ):
        assert message in server.fail(count(name=name))
    fault = server.fail(count(name="whole.safetensors", family="mochi"))
    assert "Mochi was trained with a T5 v1.1 of width 4096; this file holds a T5 v1.1 of width 512" in fault
    both = node(
        "NAILoadClipT5",
        t5_name="clip_l.safetensors",
        family="flux",
        clip_l="clip_l.safetensors",
        clip_g="none",
        llama="none",
        dtype="float32",
        weights="file",
    )
    assert "none of these files holds a T5; choose" in server.fail({**count(), "1": both})
    server.succeed(count("still here"))


def test_choices_that_are_impossible(server: Server) -> None:
    for choices, message in (
        ({"compile": True, "layout": "separate"}, "compile needs joined products; choose the layout auto or fused"),
        ({"dtype": "bfloat16", "layout": "fused"}, "its weights are kept in float16 and cast to bfloat16"),
    ):
        wrong = load()
        wrong["inputs"].update(choices)
        assert message in server.fail({**count(), "1": wrong})
    server.succeed(count("still here"))


def test_a_lora_that_matches_nothing_is_told(server: Server) -> None:
    lora = {f"lora_te_text_model_x.lora_{part}.weight": torch.zeros(4, 4) for part in ("up", "down")}
    (server.base / "models" / "loras").mkdir(exist_ok=True)
    write_file(server.base / "models" / "loras" / "other.safetensors", lora)
    prompt = count("a cat")
    prompt["3"] = node(
        "LoraLoader", model=["4", 0], clip=["1", 0], lora_name="other.safetensors", strength_model=1, strength_clip=1
    )
    prompt["4"] = node("NoModel")
    prompt["2"]["inputs"]["clip"] = ["3", 1]
    warnings, _ = server.watch(prompt)
    (warning,) = warnings
    assert warning["node"] == "3" and warning["text"].startswith("This LoRA changes nothing: none of its keys belongs")
    assert "choose one that was trained for this model" in warning["text"]


def test_a_text_over_the_limit_is_told(server: Server) -> None:
    encode = node("NAIT5Encode", clip=["1", 0], text="one two three four", max_length=3, pad_to=0, line_by_line=False)
    warnings, _ = server.watch(
        {"1": load(), "2": encode, "3": node("NAISaveT5Embedding", conditioning=["2", 0], name="cut", note="")}
    )
    (warning,) = warnings
    assert warning["text"].startswith("The prompt is too long for max_length=3 and this was cut off: ")
    assert server.conditioning("cut")["cond"].shape[1] == 3


def test_an_embedding_of_the_wrong_width_is_told(server: Server) -> None:
    (server.base / "models" / "embeddings").mkdir(exist_ok=True)
    write_file(server.base / "models" / "embeddings" / "wide.safetensors", {"t5": torch.zeros(2, 7)})
    prompt = {"1": load(), "2": node("CLIPTextEncode", clip=["1", 0], text="a embedding:wide cat")}
    prompt["3"] = node("NAISaveT5Embedding", conditioning=["2", 0], name="wide", note="")
    warnings, _ = server.watch(prompt)
    (warning,) = warnings
    assert warning["text"].startswith("An embedding in the prompt is 7 numbers wide, and the T5 takes ")
    assert warning["node"] == "2"


def test_out_of_memory_is_told(server: Server) -> None:
    """A bias of [heads, tokens, tokens] that no machine holds."""
    prompt = {"1": load(), "2": node("CLIPTextEncode", clip=["1", 0], text="cat " * 100_000)}
    prompt["3"] = node("NAISaveT5Embedding", conditioning=["2", 0], name="long", note="")
    fault = server.fail(prompt)
    assert "memory ran out while the T5 encoded 1 × " in fault and "use a shorter prompt" in fault
    server.succeed(count("still here"))
