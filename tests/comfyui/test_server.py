"""The pack in a running server, through its HTTP interface: nothing of ComfyUI is imported here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import embedded_taken_apart, spiece_model, write_file
from comfy_server import ROOT, WORKFLOWS, Server, from_editor, node
from comfy_toys import FUSED, KERNELS, error
from conftest import random_state

from nai_t5_core import TextEncoder
from nai_t5_core.facts.config import named_config

COMFYUI = os.environ.get("COMFYUI_PATH")
if not COMFYUI:
    pytest.skip("COMFYUI_PATH is not set: give a ComfyUI checkout to run these", allow_module_level=True)

EMBEDDED = "embedded tiny model (to try the nodes with)"

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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "no_model.py").write_text(NO_MODEL)
    running = Server(COMFYUI, base)
    yield running
    running.stop()


def load(name: str = EMBEDDED, family: str = "auto", dtype: str = "float32", weights: str = "file") -> dict[str, Any]:
    return node("NAILoadT5", t5_name=name, family=family, dtype=dtype, weights=weights, device="default")


def test_nodes_are_there_with_their_help(server: Server) -> None:
    info = server.get("/object_info")
    ours = {name for name in info if name.startswith("NAI")}
    assert len(ours) == 9 and all(info[name]["description"] for name in ours)
    for name in ours:
        for required in ("required", "optional"):
            for entry, (kind, *options) in info[name]["input"].get(required, {}).items():
                assert kind in ("CLIP", "CONDITIONING") or options[0].get("tooltip"), (name, entry)
        assert server.read(f"/extensions/comfy-nai-t5/docs/{name}.md").startswith(b"# ")
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


def test_a_prompt_that_is_kept_comes_from_the_cache(server: Server) -> None:
    """Of two loaders, of which the second need not load."""
    shown = []
    for turn, device in enumerate(("default", "cpu")):
        loader = load()
        loader["inputs"] |= {"device": device, "cache": "memory only"}
        outputs = server.succeed(
            {
                "1": loader,
                "2": node("CLIPTextEncode", clip=["1", 0], text="two dogs in the cache"),
                "3": node("NAIT5Cache", cache="memory only", conditioning=["2", 0]),
                "4": node("NAISaveT5Embedding", conditioning=["3", 0], name=f"kept{turn}", note=""),
            }
        )
        shown.append(outputs["3"]["text"][0])
    assert shown[0].startswith("0 hits (0 from memory, 0 from disk), 1 misses\nmemory: 1 embeddings")
    assert shown[1].startswith("1 hits (1 from memory, 0 from disk), 1 misses")
    first, second = (server.conditioning(f"kept{turn}")["cond"] for turn in range(2))
    assert torch.equal(first, second)


def test_encode_equals_the_library(server: Server, tmp_path: Path) -> None:
    server.succeed(
        {
            "1": load(),
            "2": node("CLIPTextEncode", clip=["1", 0], text="two dogs on a sofa"),
            "3": node("NAISaveT5Embedding", conditioning=["2", 0], name="dogs", note=""),
        }
    )
    ours = TextEncoder.from_pretrained(embedded_taken_apart(tmp_path), dtype="float32")
    expected = ours.encode(["two dogs on a sofa"]).hidden_states
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


def test_a_gguf_file(server: Server) -> None:
    """It is among the choices, though ComfyUI itself lists none, and runs as it lies."""
    pytest.importorskip("gguf")
    from toy_gguf import write_gguf

    config = named_config("umt5-small").encoder_only().model_copy(update={"num_layers": 1, "vocab_size": 4096})
    folder = server.base / "models" / "text_encoders"
    write_gguf(folder / "umt5-Q8_0.gguf", random_state(config), "Q8_0", spiece_model(), config=config)
    choices = server.get("/object_info/NAILoadT5")["NAILoadT5"]["input"]["required"]["t5_name"]
    assert "umt5-Q8_0.gguf" in json.dumps(choices)
    outputs = server.succeed(count(name="umt5-Q8_0.gguf", family="t5"))
    layout = f"{FUSED}, quantised weights" if KERNELS else "its weights stay quantised"
    assert layout in json.dumps(outputs)


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
        ("text.safetensors", "neither safetensors, nor a PyTorch or GGUF file"),
        ("cut.gguf", "cut.gguf is no T5"),
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
        (
            {"dtype": "float16", "weights": "float8_e4m3fn", "layout": "fused"},
            "its weights are kept in float8_e4m3fn and cast to float16",
        ),
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
    prompt["3"] = node("SetClipHooks", clip=["1", 0], apply_to_conds=True, schedule_clip=False, hooks=["4", 0])
    prompt["4"] = node("CreateHookLora", lora_name="other.safetensors", strength_model=1, strength_clip=1)
    prompt["2"]["inputs"]["clip"] = ["3", 0]
    warnings, _ = server.watch(prompt)
    (warning,) = warnings
    assert warning["node"] == "3" and warning["text"].startswith("The LoRA of a hook changes nothing")


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


def test_an_endless_prompt_is_told(server: Server) -> None:
    prompt = {"1": load(), "2": node("CLIPTextEncode", clip=["1", 0], text="cat " * 100_000)}
    prompt["3"] = node("NAISaveT5Embedding", conditioning=["2", 0], name="long", note="")
    assert "the prompt has 100,001 tokens, and 8,192 are the most that are computed together" in server.fail(prompt)
    server.succeed(count("still here"))
