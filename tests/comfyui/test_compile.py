"""Load T5's compile, with the real compiler in a real ComfyUI: one graph for prompts of any length up to a bucket's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfy_toys import V1_0, assert_equal_conditioning, conditioning, require_comfyui, toy_family, toy_file
from torch._dynamo.utils import counters

from comfy_nai_t5.choices import Settings
from nai_t5_core.model.attention_choice import missing_for_flex

require_comfyui()
MISSING = missing_for_flex(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=f"nothing can be compiled here: {MISSING}")
def test_compiled_equals_uncompiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy_nai_t5 import families
    from comfy_nai_t5.loaders import load_t5

    monkeypatch.setitem(families.FAMILIES, "cosmos", toy_family("cosmos"))
    path = toy_file(tmp_path, V1_0)
    compiled, plain = (load_t5(path, "cosmos", Settings("float32", compile=choice)) for choice in (True, False))
    counters.clear()
    for words in (1, 5, 20, 60, 0, 33):  # all of them within the first bucket
        text = "(a:1.2) " + "photo " * words
        assert_equal_conditioning(conditioning(compiled, text), conditioning(plain, text), 1e-5)
        assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert compiled.cond_stage_model.t5xxl.transformer.stack.describe_attention() == "auto: flex, compiled"
