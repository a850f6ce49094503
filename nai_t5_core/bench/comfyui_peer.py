"""ComfyUI's own T5 encoder, imported from a checkout and built from the same weights as ours, to compare with."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.bench.peer_list import Implementation, Peer
from nai_t5_core.bench.peers import State
from nai_t5_core.facts.config import T5Config, encoder_tensors

COMFYUI = "comfyui"

_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh", "relu": "relu"}


def comfyui_peer(checkout: Path, config: T5Config, state: State, dtype: torch.dtype, device: torch.device) -> Peer:
    """ComfyUI's encoder as ComfyUI runs it: in float32, to which each weight of another dtype is cast when it is used.

    The tensors of ``state`` that have the right dtype are shared. The checkout stays on ``sys.path``, at its end, since
    its modules import others when they run.

    Args:
        dtype: of the stored weights.
        device: where it will run; ComfyUI must know before it is imported.

    Raises:
        ValueError: ComfyUI does not support the config or dtype, or :func:`import_comfyui` fails.
    """
    t5, ops = import_comfyui(checkout, device)
    _refuse(config, dtype)
    model: nn.Module = t5.T5(_config_dict(config), dtype, torch.device("meta"), ops.manual_cast)
    tensors = {name: state[name].to(dtype) for name in encoder_tensors(config)}
    model.load_state_dict(tensors, assign=True)
    model.eval().requires_grad_(False)
    implementation = Implementation(
        build=lambda *_: model, forward=_forward, layers=lambda built: built.encoder.block, residual=_residual
    )
    return Peer(COMFYUI, _version(checkout), model, implementation)


def _refuse(config: T5Config, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        raise ValueError("ComfyUI's T5 computes in float32: a comparison in float64 would compare two things")
    if config.activation not in _ACTIVATIONS:
        raise ValueError(f"ComfyUI's T5 has no {config.activation}; it has {' and '.join(_ACTIVATIONS)}")
    fixed = {
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "scale_qk": False,
    }
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ValueError(f"ComfyUI's T5 ignores {name}={getattr(config, name)}: it is always {value}")


def _config_dict(config: T5Config) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "dense_act_fn": _ACTIVATIONS[config.activation],
        "is_gated_act": config.gated,
        "model_type": "umt5" if config.bias_per_layer else "t5",
    }


def import_comfyui(checkout: Path, device: torch.device) -> tuple[Any, Any]:
    """The modules with the T5 and with the layer classes, imported into this process.

    Raises:
        ValueError: no checkout there, a dependency is missing, or another checkout was imported before.
    """
    checkout = checkout.resolve()
    source = checkout / "comfy" / "text_encoders" / "t5.py"
    if not source.is_file():
        raise ValueError(f"{checkout} is no checkout of ComfyUI: it has no comfy/text_encoders/t5.py")
    if str(checkout) not in sys.path:
        sys.path.append(str(checkout))
    try:
        if device.type == "cpu":
            # Without this flag its import looks for a GPU, and fails where there is none.
            importlib.import_module("comfy.cli_args").args.cpu = True
        t5, ops = (importlib.import_module(name) for name in ("comfy.text_encoders.t5", "comfy.ops"))
    except ImportError as error:
        raise ValueError(
            f"ComfyUI cannot be imported from {checkout} ({error}); install what its requirements.txt lists into this "
            "environment, or run from ComfyUI's own"
        ) from error
    found = Path(str(t5.__file__)).resolve()
    if found != source:
        raise ValueError(f"comfy was imported from {found} and not from {checkout}; use a fresh process for each")
    return t5, ops


def _version(checkout: Path) -> str:
    file = checkout / "comfyui_version.py"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    match = re.search(r'__version__\s*=\s*"([^"]+)"', text)
    return match[1] if match else "of unknown version"


def _forward(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    hidden: Tensor = model(ids, None if mask is None else mask.long(), dtype=torch.float32)[0]
    return hidden


def _residual(value: Any) -> Tensor:
    """The residual from a layer's output, copied since ComfyUI's layers change it in place."""
    residual: Tensor = value[0] if isinstance(value, tuple) else value
    return residual.clone()
