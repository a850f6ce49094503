"""A finished model spread over several processes by torch's own FSDP2, for training and for inference.

Every process holds a part of each weight. The weights of one block at a time are gathered when it computes, and freed
when it is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nai_t5_core.model.decoder import DecoderBlock
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.encoder_block import EncoderBlock
from nai_t5_core.model.fixed_weights import has_fixed_weights
from nai_t5_core.model.layers import RMSNorm
from nai_t5_core.model.t5 import T5Model

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Model = TypeVar("Model", bound=T5EncoderStack | T5Model)

# Cross-attention's projections of the encoder's hidden states.
_KEYS_VALUES = ("k", "v", "kv")
# Methods beside forward that compute with the model's weights; none calls another of them.
_ENTRIES = ("generate", "stream", "hidden_states")


def shard(model: Model, mesh: DeviceMesh | None = None, compute_dtype: torch.dtype | None = None) -> Model:
    """Spreads a model's weights over the processes of ``mesh``, block by block; returns the same model.

    All processes call this with equal weights, and must afterwards call the model equally often, each with its own
    inputs, since each waits for the others in every block. So generation must take the same number of steps in all,
    such as with the same prompts. Gradients are the mean over the processes.

    Args:
        model: on the CPU or on the mesh's device; its parameters become DTensors, so make the optimizer afterwards.
        mesh: one-dimensional; by default all processes, on the accelerator if there is one.
        compute_dtype: gather weights in this dtype, while the parts, norms and gradients keep the model's own. For
            training; by default everything is computed in the model's dtype.

    Raises:
        ValueError: torch is older than 2.6, there is no process group, or the weights are prepacked or in 8 bits.
    """
    fully_shard, policy_class, register_entry = _torchs_own()
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("there is no process group; start the program with torchrun, or call init_process_group first")
    if has_fixed_weights(model):
        raise ValueError("prepacked or 8-bit weights cannot be spread over processes; load them with optimize=False")
    # Activations are not cast: the residual and the inputs of norms are float32 whatever the compute dtype.
    own_dtype = next(model.parameters()).dtype
    rounded = policy_class(param_dtype=compute_dtype, reduce_dtype=own_dtype, cast_forward_inputs=False)
    for norms in _norms(model):
        fully_shard(norms, mesh=mesh, mp_policy=policy_class(cast_forward_inputs=False))
    for unit in _units(model):
        fully_shard(unit, mesh=mesh, mp_policy=rounded)
    for entry in _ENTRIES:
        if hasattr(model, entry):
            register_entry(model, entry)
    return model


def _norms(model: nn.Module) -> Iterator[list[RMSNorm]]:
    """Norms with a weight, which is float32 unlike all other weights; the norms of a block are gathered together."""
    module: Any
    for module in model.modules():
        if isinstance(module, EncoderBlock | DecoderBlock):
            own = [layer.layer_norm for layer in module.layer]
            if norms := [norm for norm in own if isinstance(norm, RMSNorm)]:
                yield norms
        elif hasattr(module, "final_layer_norm"):
            yield [module.final_layer_norm]


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """Modules whose weights are gathered together, inner before outer: first those called before their block."""
    module: Any
    for module in model.modules():
        if hasattr(module, "relative_attention_bias"):
            yield module.relative_attention_bias
        if hasattr(module, "EncDecAttention"):
            yield from (child for name, child in module.EncDecAttention.named_children() if name in _KEYS_VALUES)
    yield from (module for module in model.modules() if isinstance(module, EncoderBlock | DecoderBlock))
    yield model


def _torchs_own() -> tuple[Any, Any, Any]:
    try:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    except ImportError as error:
        raise ValueError(f"torch {torch.__version__} has no fully_shard; sharding needs 2.6 or newer") from error
    return fully_shard, MixedPrecisionPolicy, register_fsdp_forward_method


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes, which must all call this; any other tensor as it is."""
    gather = getattr(tensor, "full_tensor", None)
    out: Tensor = tensor if gather is None else gather()
    return out


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, equal in all processes, sharded as ``like`` is; as it is where ``like`` is not sharded."""
    placements = getattr(like, "placements", None)
    if placements is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(like.device), mesh, placements)
