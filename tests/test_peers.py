"""The other implementations built from our weights: right answers, shared tensors, and refusals that say why."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, padding_mask, write_hf_folder

from nai_t5_core.bench.kinds_against import against_table, measure_against_llama_cpp
from nai_t5_core.bench.peer_list import PEERS, build_peer
from nai_t5_core.bench.peers import (
    exact_norms,
    hf_state,
    nai_t5_encoder,
    own_encoder,
    random_state,
    transformers_encoder,
)
from nai_t5_core.facts.config import T5Config, encoder_tensors
from nai_t5_core.weights.convert import convert
from nai_t5_core.weights.examine import examine

V1_1 = TOY_CONFIGS["v1.1"]


def test_random_weights_exercise_the_model(config: T5Config) -> None:
    """Outputs of order one, that change when the bias, a query or a feed-forward is taken away."""
    config = config.encoder_only()
    state = random_state(config)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == encoder_tensors(config)
    ids = torch.arange(40)[None]
    out = own_encoder(config, state, torch.float32)(ids)
    assert 0.7 < out.std() < 1.4
    for part in ("relative_attention_bias", ".q.", ".wo."):
        without = {name: tensor * (part not in name) for name, tensor in state.items()}
        changed = own_encoder(config, without, torch.float32)(ids)
        assert (changed - out).abs().mean() > 0.05, part


def test_random_weights_follow_the_seed_and_the_dtype() -> None:
    first, again, other = random_state(V1_1), random_state(V1_1), random_state(V1_1, seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["shared.weight"], other["shared.weight"])
    halves = random_state(V1_1, dtype=torch.bfloat16)
    assert all(torch.equal(halves[name], first[name].bfloat16()) for name in first)


def test_outliers_are_large_and_do_no_harm() -> None:
    plain, large = random_state(V1_1), random_state(V1_1, outliers=True)
    ratio = large["shared.weight"].abs().mean(dim=0).max() / plain["shared.weight"].abs().mean(dim=0).max()
    assert ratio > 100
    ids = torch.arange(30)[None]
    exact = own_encoder(V1_1, large, torch.float64)(ids)
    found = own_encoder(V1_1, large, torch.float32)(ids)
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("name", PEERS)
def test_peers_agree_with_ours_and_leave_the_weights_alone(name: str, config: T5Config) -> None:
    module = {"llama-cpp-python": "llama_cpp"}.get(name, name.replace("-", "_"))
    pytest.importorskip(module, reason="a peer of the benchmark")
    state = random_state(config, seed=2)
    before = {key: tensor.clone() for key, tensor in state.items()}
    ids = torch.randint(config.vocab_size, (3, 150), generator=torch.Generator().manual_seed(0))
    mask = padding_mask([150, 1, 40], 150)
    ours = own_encoder(config, state, torch.float32)
    if name in ("nai-t5", "llama-cpp-python") and config.activation == "silu":
        with pytest.raises(ValueError, match="no gated silu"):
            build_peer(name, config, state, torch.float32)
        return
    peer = build_peer(name, config, state, torch.float32)
    # llama.cpp looks up GELU in a table of float16.
    is_rough = name == "llama-cpp-python" and config.gated
    tolerance = (1e-3 if is_rough else 1e-5) * ours(ids).abs().max()
    assert (peer(ids, mask) - ours(ids, mask))[mask.bool()].abs().max() < tolerance
    assert (peer(ids) - ours(ids)).abs().max() < tolerance
    assert peer.version[0].isdigit()
    assert all(torch.equal(before[key], state[key]) for key in state)


def test_transformers_shares_the_given_tensors() -> None:
    pytest.importorskip("transformers", reason="the peer under test")
    state = random_state(V1_1.encoder_only())
    model: Any = transformers_encoder(V1_1, state, torch.float32)
    pointers = {tensor.data_ptr() for tensor in state.values()}
    assert {parameter.data_ptr() for parameter in model.parameters()} == pointers
    assert not model.training
    # transformers 4 has none for T5.
    assert model.config._attn_implementation == ("sdpa" if model._supports_sdpa else "eager")


def test_float16_keeps_wo_in_float32_as_from_pretrained_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the peer under test")
    state = random_state(V1_1)
    folder = write_hf_folder(tmp_path / "hf", V1_1, state)
    theirs = transformers.T5EncoderModel.from_pretrained(folder, torch_dtype=torch.float16)
    ours = transformers_encoder(V1_1, state, torch.float16)
    assert {name: tensor.dtype for name, tensor in ours.state_dict().items()} == {
        name: tensor.dtype for name, tensor in theirs.state_dict().items()
    }


def test_exact_norms_lift_the_float32_limit() -> None:
    pytest.importorskip("transformers", reason="the peer under test")
    state = random_state(V1_1)
    ids = torch.arange(30)[None]
    ours = own_encoder(V1_1, state, torch.float64)(ids)

    def error(model: Any) -> float:
        with torch.no_grad():
            return float((model(ids).last_hidden_state - ours).abs().max() / ours.abs().max())

    model = transformers_encoder(V1_1, state, torch.float64)
    assert 1e-9 < error(model) < 1e-5
    assert error(exact_norms(model)) < 1e-13
    with pytest.raises(ValueError, match="variance_epsilon"):
        exact_norms(model)


def test_nai_t5_says_what_it_cannot_do() -> None:
    pytest.importorskip("nai_t5", reason="the peer under test")
    state = random_state(V1_1)
    with pytest.raises(ValueError, match="no float64"):
        nai_t5_encoder(V1_1, state, torch.float64)
    far = V1_1.model_copy(update={"relative_attention_max_distance": 64})
    with pytest.raises(ValueError, match="max_distance=64"):
        nai_t5_encoder(far, state, torch.float32)


def test_refusals_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_state(V1_1)
    with pytest.raises(ValueError, match="unknown peer 'keras'; allowed: transformers, nai-t5, openvino"):
        build_peer("keras", V1_1, state, torch.float32)

    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    for name in PEERS:
        with pytest.raises(ValueError, match=r'pip install "comfy-nai-t5\[(bench|openvino|llama-cpp)\]"'):
            build_peer(name, V1_1, state, torch.float32)


def test_hf_state_of_original_and_of_converted_file(tmp_path: Path) -> None:
    state = random_state(V1_1.encoder_only())
    folder = write_hf_folder(tmp_path / "hf", V1_1.encoder_only(), state)
    convert(folder, tmp_path / "own.safetensors")
    original = hf_state(examine(folder))
    converted = hf_state(examine(tmp_path / "own.safetensors"))
    assert set(original) == set(converted) == set(state)
    for name, tensor in state.items():
        assert torch.equal(original[name], tensor), name
        torch.testing.assert_close(converted[name], tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16", "Q8_0", "Q4_0", "Q4_K"])
def test_llama_cpp_reads_what_ours_reads(kind: str) -> None:
    """The same file, whose projections and table are in a kind; llama.cpp rounds activations as well."""
    pytest.importorskip("llama_cpp", reason="a peer of the benchmark")
    pytest.importorskip("gguf", reason="it writes the file")
    sizes = {"d_model": 256, "d_kv": 64, "d_ff": 512, "num_heads": 4, "num_layers": 3}
    rows = measure_against_llama_cpp(T5Config(vocab_size=1000, **sizes), [kind], torch.float32, (5, 70), 1)
    assert [(row.kind, row.tokens) for row in rows] == [(kind, 5), (kind, 70)]
    limit = {"F32": 1e-3, "F16": 3e-3, "BF16": 2e-2}.get(kind, 6e-2)
    assert all(0 < row.difference < limit and row.ours > 0 and row.theirs > 0 for row in rows)
    assert [cells[:2] for cells in against_table(rows)[0].rows] == [(kind, "5"), (kind, "70")]


def test_llama_cpp_says_what_it_cannot_do() -> None:
    pytest.importorskip("llama_cpp", reason="a peer of the benchmark")
    config = V1_1.encoder_only()
    state = random_state(config)
    with pytest.raises(ValueError, match="float32, bfloat16 and float16, not in"):
        build_peer("llama-cpp-python", config, state, torch.float64)
    far = config.model_copy(update={"relative_attention_max_distance": 64})
    with pytest.raises(ValueError, match="no relative_attention_max_distance=64"):
        build_peer("llama-cpp-python", far, state, torch.float32)
    peer = build_peer("llama-cpp-python", config, state, torch.float32)
    with pytest.raises(ValueError, match="mask their ends"):
        peer(torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 1]]))
    with pytest.raises(ValueError, match="leave --per-layer out"):
        peer.residuals(torch.tensor([[5, 6, 7]]))
