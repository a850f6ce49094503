"""Files of ComfyUI's own Save Conditioning and Load Conditioning, and ours in their form: each reads the other's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_toys import conditioning, require_comfyui
from safetensors import safe_open

from comfy_nai_t5.embeddings import load_conditioning, save_core_conditioning

require_comfyui()

import comfy_extras.nodes_cond as nodes_cond  # noqa: E402
import folder_paths  # noqa: E402

if not hasattr(nodes_cond, "SaveConditioning"):
    pytest.skip("this ComfyUI has no Save Conditioning; it came after 0.29", allow_module_level=True)


def _encoded() -> dict[str, Any]:
    from comfy_nai_t5.loaders import load_t5

    return conditioning(load_t5(None, "t5"), "a photo of a cat")


def _masked(states: torch.Tensor) -> list[Any]:
    """As Conditioning (Set Mask) and others leave it."""
    return [[states, {"mask": torch.rand(1, 8, 8), "set_area_to_bounds": False, "mask_strength": 0.75}]]


CASES: dict[str, dict[str, Any]] = {
    "nothing else": {},
    "pooled": {"pooled_output": torch.randn(1, 768), "guidance": 3.5},
    "a mask": _masked(torch.zeros(1))[0][1],
    "masks of tokens": {"attention_mask": torch.tensor([[1, 1, 0]]), "pooled_output": torch.randn(1, 8).bfloat16()},
    "lists": {"reference_latents": [torch.randn(1, 4, 2, 2), torch.randn(1, 4, 3, 2)], "steps": 7},
    "eleven of a list": {"reference_latents": [torch.full((1,), float(index)) for index in range(11)]},
    "numbers and texts": {"start_percent": 0.0, "end_percent": 0.5, "prompt_type": "ein Hund ☃", "strength": 1},
    "a view": {"pooled_output": torch.randn(4, 8).T[:, :2]},
}


@pytest.fixture(params=CASES)
def saved(request: pytest.FixtureRequest) -> list[Any]:
    """A conditioning of one entry."""
    return [[torch.randn(1, 3, 64).bfloat16(), dict(CASES[request.param])]]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    """Both have the same tensors, bit for bit, under the same names, and the same options."""
    ((states, options),), ((wanted, others),) = found, expected
    assert states.equal(wanted) and states.dtype == wanted.dtype and options.keys() == others.keys()
    for name, other in others.items():
        pairs = (
            list(zip(options[name], other, strict=True))
            if isinstance(other, list | tuple)
            else [(options[name], other)]
        )
        for one, two in pairs:
            if isinstance(two, torch.Tensor):
                assert one.equal(two) and one.dtype == two.dtype, name
            else:
                assert one == two and type(one) is type(two), name


def core_saves(given: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(folder))
    nodes_cond.SaveConditioning.execute(given, "core")
    (path,) = folder.glob("core_*.safetensors")
    return path


def core_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda folder, name: str(path.parent / name))
    return list(nodes_cond.ConditioningLoader.execute(path.name).args[0])


def test_comfyui_reads_ours(saved: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_core_conditioning(saved, tmp_path / "ours.safetensors", note="a note")
    assert_same(core_loads(path, monkeypatch), saved)


def test_we_read_comfyuis(saved: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, facts = load_conditioning(core_saves(saved, tmp_path, monkeypatch))
    assert_same(found, saved)
    assert facts == {}


def test_both_write_the_same(saved: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = (save_core_conditioning(saved, tmp_path / "ours.safetensors"), core_saves(saved, tmp_path, monkeypatch))
    told = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            told.append((set(file.keys()), json.loads(file.metadata()["conditioning_options"])))
    assert told[0] == told[1]


def test_what_a_clip_gives_goes_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = _encoded()
    given = [[out.pop("cond"), {name: value for name, value in out.items() if value is not None}]]
    assert_same(load_conditioning(core_saves(given, tmp_path, monkeypatch))[0], given)
    assert_same(core_loads(save_core_conditioning(given, tmp_path / "ours.safetensors"), monkeypatch), given)


def test_tuples_of_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [[torch.randn(1, 3, 64), {"unions": (torch.randn(2), torch.randn(3))}]]
    for path in (
        save_core_conditioning(given, tmp_path / "ours.safetensors"),
        core_saves(given, tmp_path, monkeypatch),
    ):
        for found in (load_conditioning(path)[0], core_loads(path, monkeypatch)):
            assert_same(found, given)


@pytest.mark.parametrize("count", [0, 2])
def test_both_refuse_several_entries(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [[torch.zeros(1, 3, 64), {}]] * count
    with pytest.raises(ValueError, match=f"this conditioning has {count}"):
        save_core_conditioning(given, tmp_path / "ours.safetensors")
    with pytest.raises(ValueError, match="single"):
        core_saves(given, tmp_path, monkeypatch)
