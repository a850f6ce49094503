"""ComfyUI's T5 as a peer. What needs a real checkout takes it from COMFYUI_PATH."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TOY_CONFIGS, padding_mask

from nai_t5_core.bench.comfyui_peer import comfyui_peer, import_comfyui
from nai_t5_core.bench.peers import own_encoder, random_state
from nai_t5_core.facts.config import T5Config

CPU = torch.device("cpu")
V1_1 = TOY_CONFIGS["v1.1"].encoder_only()


@pytest.fixture
def checkout() -> Path:
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH is not set: give a ComfyUI checkout, its requirements installed, to run this")
    return Path(path)


def test_it_agrees_with_ours_and_leaves_the_weights_alone(checkout: Path, config: T5Config) -> None:
    config = config.encoder_only()
    state = random_state(config, seed=2)
    if config.activation == "silu":
        with pytest.raises(ValueError, match="ComfyUI's T5 has no silu; it has gelu_new and relu"):
            comfyui_peer(checkout, config, state, torch.float32, CPU)
        return
    before = {key: tensor.clone() for key, tensor in state.items()}
    ids = torch.randint(config.vocab_size, (3, 150), generator=torch.Generator().manual_seed(0))
    mask = padding_mask([150, 1, 40], 150)
    ours = own_encoder(config, state, torch.float32)
    peer = comfyui_peer(checkout, config, state, torch.float32, CPU)
    tolerance = 1e-5 * ours(ids).abs().max()
    assert (peer(ids, mask) - ours(ids, mask))[mask.bool()].abs().max() < tolerance
    assert (peer(ids) - ours(ids)).abs().max() < tolerance
    assert peer.version[0].isdigit()
    assert {tensor.data_ptr() for tensor in peer.model.parameters()} <= {tensor.data_ptr() for tensor in state.values()}
    assert all(torch.equal(before[key], state[key]) for key in state)


def test_it_computes_in_float32_whatever_its_weights_are(checkout: Path) -> None:
    halves = random_state(V1_1, dtype=torch.bfloat16)
    peer = comfyui_peer(checkout, V1_1, halves, torch.bfloat16, CPU)
    ids = torch.arange(30)[None]
    exact = own_encoder(V1_1, halves, torch.float32)(ids)
    assert peer(ids).dtype == torch.float32
    assert (peer(ids) - exact).abs().max() < 1e-5 * exact.abs().max()


def test_its_residuals_are_those_of_ours(checkout: Path) -> None:
    state = random_state(V1_1)
    ids = torch.arange(30)[None]
    ours = own_encoder(V1_1, state, torch.float32).hidden_states(ids, final_norm=False)
    theirs = comfyui_peer(checkout, V1_1, state, torch.float32, CPU).residuals(ids)
    assert len(theirs) == len(ours)
    for expected, found in zip(ours, theirs, strict=True):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_float64_and_settings_that_it_ignores_are_refused(checkout: Path) -> None:
    state = random_state(V1_1)
    with pytest.raises(ValueError, match="computes in float32"):
        comfyui_peer(checkout, V1_1, state, torch.float64, CPU)
    far = V1_1.model_copy(update={"relative_attention_max_distance": 64})
    with pytest.raises(ValueError, match="ignores relative_attention_max_distance=64: it is always 128"):
        comfyui_peer(checkout, far, state, torch.float32, CPU)


def test_another_checkout_in_the_same_process_is_refused(checkout: Path, tmp_path: Path) -> None:
    import_comfyui(checkout, CPU)
    with pytest.raises(ValueError, match="use a fresh process for each"):
        import_comfyui(_broken_checkout(tmp_path), CPU)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no checkout of ComfyUI: it has no comfy/text_encoders/t5\.py"):
        import_comfyui(tmp_path, CPU)


def test_a_missing_dependency_is_named(tmp_path: Path) -> None:
    """In a process of its own, since what is imported stays."""
    code = (
        "import sys, torch; from pathlib import Path; from nai_t5_core.bench.comfyui_peer import import_comfyui\n"
        "try: import_comfyui(Path(sys.argv[1]), torch.device('cpu'))\n"
        "except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(_broken_checkout(tmp_path))]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent).stdout
    assert "No module named 'a_package_that_nobody_has'" in said
    assert "requirements.txt" in said


def _broken_checkout(folder: Path) -> Path:
    """One whose T5 needs what is not installed."""
    text_encoders = folder / "comfy" / "text_encoders"
    text_encoders.mkdir(parents=True)
    (folder / "comfy" / "cli_args.py").write_text("class args: pass\n")
    (text_encoders / "t5.py").write_text("import a_package_that_nobody_has\n")
    return folder
