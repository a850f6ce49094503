"""What a new user does: clone into ``custom_nodes``, start, open the bundled workflow, run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from comfy_server import ROOT, Server, from_editor

COMFYUI = os.environ.get("COMFYUI_PATH")
if not COMFYUI:
    pytest.skip("COMFYUI_PATH is not set: give a ComfyUI checkout to run these", allow_module_level=True)
if not (ROOT / ".git").exists():
    pytest.skip("these files are no git repository, and cannot be cloned", allow_module_level=True)


def test_a_fresh_clone_runs_the_bundled_workflow(tmp_path: Path) -> None:
    pack = tmp_path / "custom_nodes" / "comfy-nai-t5"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), str(pack)], check=True)
    server = Server(COMFYUI, tmp_path, pack=None)
    try:
        templates = server.get("/workflow_templates")["comfy-nai-t5"]
        assert "t5_try_it" in templates
        thumbnail = server.read("/api/workflow_templates/comfy-nai-t5/t5_try_it.jpg")
        assert thumbnail.startswith(b"\xff\xd8")
        workflow = server.get("/api/workflow_templates/comfy-nai-t5/t5_try_it.json")
        outputs = server.succeed(from_editor(workflow, server.get("/object_info")))
    finally:
        server.stop()
    assert any("images" in output for output in outputs.values())
    assert server.conditioning("fox")["cond"].isfinite().all()
    changed = subprocess.run(["git", "status", "--short"], cwd=pack, check=True, capture_output=True, text=True).stdout
    assert changed == "", "running must leave no files in the clone"
