"""Which files the loaders offer, and what they say of one that they cannot read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_file
from comfy_toys import V1_1, require_comfyui, toy_file
from toy_gguf import gguf

from comfy_nai_t5.choices import Settings

require_comfyui()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's folder of text encoders, with files of both kinds."""
    import folder_paths

    known = {**folder_paths.folder_names_and_paths, "text_encoders": ([str(tmp_path)], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    for name in ("t5.safetensors", "T5.GGUF", "t5.gguf", "sub/t5.gguf", "notes.txt", ".git/t5.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def offered(node: Any) -> dict[str, list[str]]:
    inputs = {entry.id: entry for entry in node.define_schema().inputs}
    return {name: inputs[name].options for name in ("t5_name", "clip_l", "clip_g", "llama") if name in inputs}


def test_gguf_files_are_offered_for_the_t5_alone(folder: Path) -> None:
    import folder_paths

    from comfy_nai_t5 import nodes

    before = dict(folder_paths.folder_names_and_paths)
    t5 = sorted(["t5.safetensors", "T5.GGUF", "t5.gguf", str(Path("sub", "t5.gguf"))])
    for node in (nodes.LoadT5, nodes.ReportPrecision):
        assert offered(node) == {"t5_name": [nodes.EMBEDDED, *t5]}
    others = [nodes.NONE, "t5.safetensors"]
    assert offered(nodes.LoadClipT5) == {"t5_name": t5, "clip_l": others, "clip_g": others, "llama": others}
    assert folder_paths.folder_names_and_paths == before, "what ComfyUI knows of folders is its own"


def test_gguf_files_elsewhere_are_not_offered_for_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other nodes may have made ComfyUI list them."""
    import folder_paths

    from comfy_nai_t5 import nodes

    paths = folder_paths.folder_names_and_paths["text_encoders"][0]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", (paths, {".safetensors", ".gguf"}))
    assert offered(nodes.LoadClipT5)["clip_l"] == [nodes.NONE, "t5.safetensors"]


@pytest.mark.parametrize("name", ["llama.gguf", "llama"])
@pytest.mark.parametrize("late", [False, True])
def test_other_encoders_in_gguf_are_refused(name: str, late: bool, tmp_path: Path) -> None:
    """Before anything is read, wherever they stand among the files."""
    from comfy_nai_t5.late import late_with_clip
    from comfy_nai_t5.loaders import load_with_clip

    writer = gguf.GGUFWriter(tmp_path / name, "llama")
    writer.add_tensor("blk.0.attn_q.weight", torch.zeros(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = [write_file(tmp_path / "clip.safetensors", {"text_model.x": torch.zeros(2)}), toy_file(tmp_path, V1_1)]
    load = late_with_clip if late else load_with_clip
    told = f"{re.escape(str(tmp_path / name))} is a GGUF file and holds no T5; .*: choose a safetensors file"
    for paths in ([tmp_path / name, *files], [*files, tmp_path / name]):
        with pytest.raises(ValueError, match=told):
            load(paths, "hidream", Settings("float32", cache="on" if late else "off"))
