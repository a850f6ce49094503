"""Types of tensors, and what stands among them in PyTorch files: judged where they are needed."""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import tarfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import State, encoder_part, prefixed, write_file
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from torch import Tensor

from nai_t5_core.facts.config import config_to_hf
from nai_t5_core.model.encoder import Layout, T5EncoderStack
from nai_t5_core.weights.examine import ModelSource, examine
from nai_t5_core.weights.formats import CheckpointError
from nai_t5_core.weights.load import load, load_encoder
from nai_t5_core.weights.safetensors_files import DTYPE_NAMES

V1_1 = TOY_CONFIGS["v1.1"]
IDS = torch.randint(0, 96, (3, 9), generator=torch.Generator().manual_seed(3))
MASK = padding_mask([9, 4, 1], 9)
# From torch 2.6 on, all classes in a pickle of the newer form are found without reading it.
KNOWS_ALL_CLASSES = hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint")


def on_cpu(source: ModelSource, layout: Layout = "fused", subfolder: str = "") -> T5EncoderStack:
    return load_encoder(source, torch.float32, "cpu", layout, subfolder)


@torch.no_grad()
def output(stack: T5EncoderStack) -> Tensor:
    out: Tensor = stack(IDS, MASK)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes elsewhere in the file
# ---------------------------------------------------------------------------------------------------------------------
# The format's types, each with its bits.
TYPES = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "U16": 16,
    "U32": 32,
    "U64": 64,
    "C64": 64,
}


def write_raw(path: Path, state: State, more: Mapping[str, str]) -> Path:
    """A safetensors file with tensors [2, 4] of further types, which torch may not have."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in state.items():
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += content
    for name, kind in more.items():
        header[name] = {"dtype": kind, "shape": [2, 4], "data_offsets": [len(data), len(data) + TYPES.get(kind, 8)]}
        data += bytes(TYPES.get(kind, 8))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("kind", TYPES)
def test_types_elsewhere_do_no_harm(tmp_path: Path, kind: str) -> None:
    state = encoder_part(random_state(V1_1))
    name = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight_scale"
    file = write_raw(tmp_path / "flux.safetensors", prefixed(state, "text_encoders.t5xxl.transformer."), {name: kind})
    loaded = load(file, "float32", "cpu")
    assert torch.equal(output(loaded.stack), output(build_stack(V1_1, state)))
    assert loaded.report.ignored.keys() == {name}


@pytest.mark.parametrize("kind", TYPES)
def test_types_of_a_weight_are_judged(tmp_path: Path, kind: str) -> None:
    state = encoder_part(random_state(V1_1))
    name = "encoder.block.1.layer.0.SelfAttention.k.weight"
    del state[name]
    file = write_raw(tmp_path / "t5.safetensors", state, {name: kind})
    if kind == "F8_E4M3FNUZ":  # can be read, but has the wrong shape
        expected = rf"1 fault:.*{name} has shape \[2, 4\]"
    elif kind not in DTYPE_NAMES.values():  # of fewer than 8 bits, or newer than this torch
        expected = rf"1 fault:.*{name} is a tensor of type {kind}, which cannot be read"
    else:
        expected = rf"{name} is torch\.\w+: a weight of this type can be read only with its scales beside it"
    with pytest.raises(CheckpointError, match=f"(?s){expected}"):
        on_cpu(file)


def test_a_type_that_the_package_does_not_know(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "t5.safetensors", encoder_part(random_state(V1_1)), {"other": "F3_NEW"})
    with pytest.raises(CheckpointError, match=r"of type F3_NEW, which the installed package safetensors does not know"):
        examine(file)


@pytest.mark.parametrize("shape", ["list", "column"])
def test_a_scale_for_every_row(tmp_path: Path, shape: str) -> None:
    state = encoder_part(random_state(V1_1))
    name, norm = "encoder.block.1.layer.1.DenseReluDense.wo", "encoder.block.1.layer.1.layer_norm"
    scales = torch.rand(64) + 0.5
    small = (state[f"{name}.weight"] / scales[:, None]).to(torch.float8_e4m3fn)
    stored = {
        **state,
        f"{name}.weight": small,
        f"{name}.weight_scale": scales if shape == "list" else scales[:, None],
        f"{norm}.weight_scale": torch.tensor([2.0]),
    }
    weights = on_cpu(write_file(tmp_path / "t5.safetensors", stored), "separate").state_dict()
    assert torch.equal(weights[f"{name}.weight"], small.float() * scales[:, None])
    assert torch.equal(weights[f"{norm}.weight"], state[f"{norm}.weight"] * 2)


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch files
# ---------------------------------------------------------------------------------------------------------------------
STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a number among the tensors": lambda state: {"epoch": 3, **state},
    "None among the tensors": lambda state: {**state, "encoder.cache": None},
    "a tensor without values": lambda state: {**state, "encoder.cache": torch.empty(2, device="meta")},
    "a text and a list": lambda state: {**state, "version": "1", "sizes": [1, 2]},
    "under model": lambda state: {"model": state, "epoch": 3, "lr": 1e-4},
    "beside an optimizer": lambda state: {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]},
    },
    "Lightning": lambda state: {"state_dict": {**state, "step": 7}, "loss": torch.tensor(0.3), "ema": dict(state)},
}


TOLD = {
    "a number among the tensors": {"epoch": "no tensor, but a number"},
    "None among the tensors": {"encoder.cache": "no tensor, but None"},
    "a tensor without values": {"encoder.cache": "a tensor without values (it was saved from the device meta)"},
    "a text and a list": {"version": "no tensor, but a text", "sizes": "no tensor, but a list"},
    "Lightning": {"step": "no tensor, but a number"},
}


@pytest.mark.parametrize("case", STATES)
def test_states_with_other_things_among_them(tmp_path: Path, case: str) -> None:
    state = encoder_part(random_state(V1_1))
    torch.save(STATES[case](state), tmp_path / "t5.pt")
    loaded = load(tmp_path / "t5.pt", "float32", "cpu")
    assert torch.equal(output(loaded.stack), output(build_stack(V1_1, state)))
    assert loaded.report.ignored == TOLD.get(case, {})


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "no tensor, but None"), (torch.empty(64, device="meta"), "a tensor without values")],
    ids=["None", "meta"],
)
def test_no_values_in_place_of_a_weight(tmp_path: Path, value: Any, message: str) -> None:
    state: dict[str, Any] = encoder_part(random_state(V1_1))
    state["encoder.final_layer_norm.weight"] = value
    torch.save(state, tmp_path / "t5.pt")
    with pytest.raises(CheckpointError, match=rf"1 fault:\n  - encoder.final_layer_norm.weight is {message}"):
        on_cpu(tmp_path / "t5.pt")


def test_several_states_in_one_file(tmp_path: Path) -> None:
    state = encoder_part(random_state(V1_1))
    torch.save({"ema": dict(state), "online": dict(state)}, tmp_path / "t5.pt")
    with pytest.raises(CheckpointError, match="several dictionaries of tensors, under 'ema', 'online'; save the one"):
        on_cpu(tmp_path / "t5.pt")


@pytest.mark.parametrize("new_form", [True, False])
def test_a_pickled_model(tmp_path: Path, new_form: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.T5EncoderModel(transformers.T5Config(**config_to_hf(V1_1)))
    torch.save(model, tmp_path / "t5.pt", _use_new_zipfile_serialization=new_form)
    with pytest.raises(CheckpointError, match=r"torch.save\(model.state_dict\(\), …\) or model.save_pretr") as caught:
        on_cpu(tmp_path / "t5.pt")
    assert "transformers.models.t5.modeling_t5.T5" in str(caught.value)
    # Of the older form, and by an older torch, only the first class is known: it is none of torch's own.
    assert ("a whole model" in str(caught.value)) == (new_form and KNOWS_ALL_CLASSES)
    assert "\x1b" not in str(caught.value) and "fetch" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("torchao.dtypes.affine_quantized_tensor", "torchao"),
        ("optimum.quanto.tensor.weights.qbytes", "quanto"),
        ("bitsandbytes.nn.modules", "bitsandbytes"),
        ("hqq.core.quantize", "HQQ"),
    ],
)
def test_pickled_weights_of_a_quantiser(
    tmp_path: Path, module: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their tensors are classes of the libraries' own, which a pickle names by their modules."""
    weight_class = type("Weight", (), {"__module__": module})
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    sys.modules[module].Weight = weight_class  # type: ignore[attr-defined]
    torch.save({"encoder.block.0.layer.0.SelfAttention.q.weight": weight_class()}, tmp_path / "t5.pt")
    with pytest.raises(CheckpointError, match=f"holds weights that {kind} has quantised, which cannot be read; use a"):
        on_cpu(tmp_path / "t5.pt")


def write_tar(path: Path) -> None:
    """The form of torch's first years, with a first member that begins as pickles do."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as archive:
        for name in ("\x80\x02", "storages", "tensors", "pickle"):
            content = pickle.dumps(0, protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


UNTRUSTED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a later protocol": (
        lambda path: torch.save({"a": torch.zeros(2)}, path, pickle_protocol=4),
        r"cannot be read without running code \(Unsupported operand \d+\); save the weights alone: torch.save",
    ),
    "TorchScript": (
        lambda path: torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(2)), path),
        r"cannot be read without running code \(it is a TorchScript archive\); save the weights alone: torch.save",
    ),
    "a tar archive": (
        write_tar,
        r"cannot be read without running code \(it is a tar archive.*\); save the weights alone: torch.save",
    ),
    "numbers of numpy": (
        lambda path: torch.save({"a": torch.zeros(2), "loss": np.float64(3)}, path),
        rf"holds Python objects \(classes numpy\S+scalar{', numpy.dtype' * KNOWS_ALL_CLASSES}\), and reading those "
        "could run any code; save the",
    ),
}


@pytest.mark.filterwarnings(
    "ignore:Detected pickle protocol", "ignore:'torch.load' received a zip", "ignore:.*torch.jit"
)
@pytest.mark.parametrize("case", UNTRUSTED)
def test_forms_that_torch_does_not_trust(tmp_path: Path, case: str) -> None:
    write, expected = UNTRUSTED[case]
    write(tmp_path / "t5.pt")
    with pytest.raises(CheckpointError, match=expected) as caught:
        on_cpu(tmp_path / "t5.pt")
    assert "trust" not in str(caught.value)
