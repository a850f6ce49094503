"""The pack in a running server, through its HTTP interface: nothing of ComfyUI is imported here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_file
from comfy_server import ROOT, WORKFLOWS, Server, from_editor, node
from comfy_toys import error
from conftest import random_state

from nai_t5_core import TextEncoder
from nai_t5_core.config import named_config

COMFYUI = os.environ.get("COMFYUI_PATH")
if not COMFYUI:
    pytest.skip("COMFYUI_PATH is not set: give a ComfyUI checkout to run these", allow_module_level=True)

EMBEDDED = "embedded tiny model (random weights, to try the nodes with)"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(COMFYUI, tmp_path_factory.mktemp("comfyui"))
    yield running
    running.stop()


def load(name: str = EMBEDDED, family: str = "auto", dtype: str = "float32", weights: str = "file") -> dict[str, Any]:
    return node("NAILoadT5", t5_name=name, family=family, dtype=dtype, weights=weights, device="default")


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


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
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


def test_a_fault_is_told_and_the_server_goes_on(server: Server) -> None:
    (server.base / "models" / "text_encoders" / "broken.safetensors").write_bytes(b"not a model at all")
    for name, family, message in (
        ("broken.safetensors", "auto", "neither safetensors, nor a PyTorch file"),
        (EMBEDDED, "mochi", "Mochi was trained with a T5 v1.1 of width 4096"),
    ):
        entry = server.run(
            {"1": load(name, family), "2": node("NAIT5TokenCount", clip=["1", 0], text="", max_length=0)}
        )
        assert entry["status"]["status_str"] == "error"
        (fault,) = [facts for kind, facts in entry["status"]["messages"] if kind == "execution_error"]
        assert message in fault["exception_message"] and fault["exception_type"].endswith(
            ("ValueError", "CheckpointError")
        )
    server.succeed({"1": load(), "2": node("NAIT5TokenCount", clip=["1", 0], text="still here", max_length=0)})
