"""Weights between transformers' models and our encoders.

A loaded transformers model is examined like any checkpoint, and its weights can be let go one by one while ours are
made of them, so that memory never holds both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.backends.held import HeldLinear, is_in_8_bits
from nai_t5_core.backends.quantised.projections import QuantisedEmbedding
from nai_t5_core.diffusers.drop_in_products import refuse_impossible, refuse_products_for
from nai_t5_core.diffusers.model_blocks import block_kind, holds_blocks, shape_of
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.layers import CastingOps
from nai_t5_core.model.precision import DTYPES
from nai_t5_core.prompts.choices import Choices
from nai_t5_core.weights.examine import Examination, examine_checkpoint
from nai_t5_core.weights.formats import Checkpoint, CheckpointError, TensorInfo
from nai_t5_core.weights.fuse import fused_recipes, separate_recipes, unfuse
from nai_t5_core.weights.load import assemble, refuse_before_assembly


@dataclass
class _LoadedModel(Checkpoint):
    """A transformers model in memory, as a checkpoint."""

    config: dict[str, Any] = field(default_factory=dict)

    def hf_config(self) -> dict[str, Any]:
        return self.config


_BLOCK = re.compile(r"encoder\.block\.[0-9]+")

# What can be read: the state of such a model has the tensors that such a file has.
_READABLE = "bitsandbytes"
# What transformers says of a model that it has loaded from such a file, unpacked or in blocks.
_GGUF = "gguf"
# The packages whose modules stand in the place of torch's where weights are quantised, and what they are called.
_QUANTISERS = {
    "torchao": "torchao",
    "optimum": "optimum-quanto",
    "bitsandbytes": "bitsandbytes",
    "hqq": "HQQ",
    "awq": "AutoAWQ",
    "gptqmodel": "GPTQModel",
    "auto_gptq": "AutoGPTQ",
    "compressed_tensors": "compressed-tensors",
    "eetq": "EETQ",
    "aqlm": "AQLM",
}


def refuse_quantised(model: nn.Module) -> None:
    """Refuses a model whose weights are neither plain numbers nor quantised in a way that is read here.

    Raises:
        CheckpointError: says with what it is quantised, and what to do.
    """
    found = _quantised_part(model)
    if found is not None:
        raise CheckpointError(
            f"{type(model).__name__} is {found}, and that is not read here: load it unquantised, or undo it with its "
            "dequantize(); ours can be quantised afterwards, with layout='separate'"
        )


def _quantised_part(model: nn.Module) -> str | None:
    """With what the first part is quantised that is: a module or tensor of another class than torch's own."""
    if getattr(model, "is_quantized", False):
        method: Any = getattr(model, "quantization_method", None)
        library = str(getattr(method, "value", method))
        if not library.startswith(_READABLE) and library != _GGUF:
            return f"quantised with {library}, as its config says"
    for name, module in model.named_modules():
        package = type(module).__module__
        if package.partition(".")[0] == _READABLE or holds_blocks(module):
            continue
        if package.startswith("torch.ao.") or package.partition(".")[0] in _QUANTISERS:
            return f"quantised with {_library(type(module))} ({name} is a {type(module).__name__})"
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for tensor_name, tensor in own:
            kind = type(tensor)
            if kind not in (Tensor, nn.Parameter):
                return f"quantised or spread out with {_library(kind)} ({name}.{tensor_name} is a {kind.__name__})"
    return None


def _library(kind: type) -> str:
    return _QUANTISERS.get(kind.__module__.partition(".")[0], kind.__module__)


def examine_model(model: nn.Module) -> Examination:
    """Checks names, sizes and shapes of a loaded transformers T5, as for a file.

    Raises:
        CheckpointError: it is no T5, or its weights are not there (on the meta device, as sequential offloading does).
    """
    name = type(model).__name__
    # Of quantised weights, the bytes: their own classes would unpack them here and there.
    state = {key: tensor.detach().as_subclass(Tensor) for key, tensor in model.state_dict().items()}
    absent = [key for key, tensor in state.items() if tensor.is_meta]
    if absent:
        raise CheckpointError(
            f"{name} has {len(absent)} weights on the meta device, such as {absent[0]}: they are offloaded or were "
            "never loaded; remove its offload hooks first"
        )
    tensors = {key: TensorInfo(tuple(tensor.shape), tensor.dtype, Path(name)) for key, tensor in state.items()}
    for path, module in model.named_modules(remove_duplicate=False):
        if (kind := block_kind(module)) is not None:
            shape = shape_of(state[f"{path}.weight"], kind)
            tensors[f"{path}.weight"] = TensorInfo(shape, torch.float32, Path(name), kind.name)
    config: Any = model.config
    loaded = _LoadedModel(name, "a model in memory", tensors, state.__getitem__, config=config.to_dict())
    loaded.map_blocks = state.__getitem__
    return examine_checkpoint(loaded)


def check_model(model: nn.Module, dtype: torch.dtype | str | None, how: Choices) -> tuple[Examination, torch.dtype]:
    """Everything that can be refused of a model before its weights are taken, and the dtype that ours will have.

    Where float16 might be exceeded, every weight of ours is made once and let go.

    Raises:
        CheckpointError: it is no T5, its weights are quantised, not there, or exceed float16.
        ValueError: a dtype that is no T5's, an unknown layout, scales for another number of layers, or a quantisation
            or products that there are not or that are not possible there.
    """
    refuse_quantised(model)
    source: Any = model
    wanted = DTYPES.get(str(dtype or source.dtype).removeprefix("torch."))
    if wanted is None:
        raise ValueError(f"a T5 cannot compute in {dtype or source.dtype}; give dtype, one of {', '.join(DTYPES)}")
    examination = examine_model(model)
    device = model.get_parameter("shared.weight").device
    refuse_impossible(how, device, wanted)
    refuse_before_assembly(examination, wanted, how.layout, how.scales)
    refuse_products_for(examination, how, device, wanted)
    return examination, wanted


def encoder_from_model(
    model: nn.Module,
    dtype: torch.dtype | str | None,
    how: Choices,
    release: bool,
) -> T5EncoderStack:
    """Our encoder with the weights of a loaded transformers model, on its device; ``dtype`` None is the model's.

    Tensors that need no change are shared with the model (all of them in the separate layout and the same dtype).
    ``release`` takes every weight from the model when it is used: the model is left on the meta device, and
    :func:`give_back` fills it again. One that is quantised keeps its bytes, which are ours as well. What is to
    compute it is only checked: whether it will be possible.

    Raises:
        CheckpointError, ValueError: see :func:`check_model`; the model is as it was then.
    """
    examination, dtype = check_model(model, dtype, how)
    layout, scales = how.layout, how.scales
    embedding: Any = model.get_submodule("shared")
    device = embedding.weight.device
    if not release or examination.quantised:
        # Ours has the bytes of quantised weights, which stay where they are.
        return assemble(examination, dtype, device, layout, scales, CastingOps)[0]
    held = {name: model.get_parameter(full) for name, full in examination.keymap.names.items()}
    # Read through the parameters: a dictionary of the tensors would keep them alive.
    examination.checkpoint.read_only_by(_reader_of(held, examination.keymap.names))

    def let_go(names: tuple[str, ...]) -> None:
        for name in names:
            _empty(model, held.pop(name))

    return assemble(examination, dtype, device, layout, scales, CastingOps, let_go)[0]


def _reader_of(held: Mapping[str, nn.Parameter], names: Mapping[str, str]) -> Callable[[str], Tensor]:
    original = {full: name for name, full in names.items()}
    return lambda full: held[original[full]].detach()


def _empty(model: nn.Module, parameter: nn.Parameter) -> None:
    """Puts a parameter without values in place of one, wherever the model has it or another on the same memory."""
    empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
    for module in model.modules():
        for name, own in module.named_parameters(recurse=False):
            if own is parameter or own.data_ptr() == parameter.data_ptr() != 0:
                setattr(module, name, empty)


def give_back(stack: T5EncoderStack, model: nn.Module, release: bool = False) -> None:
    """Fills a model that :func:`encoder_from_model` has released: every tensor in the dtype it had, on our device.

    From the separate layout the very tensors come back, unless scales had changed the embedding; from the fused layout
    they are exact to the rounding of one multiplication and one division in their dtype. With ``release`` the stack
    loses each block when the model has it, so that memory never holds both, and is of no use afterwards.

    Raises:
        ValueError: see :func:`refuse_giving_back`.
    """
    refuse_giving_back(stack, model)
    if stack.offload is not None:
        stack.to("cpu")  # where most of its weights are
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    copies = [name for name in dtypes if name.endswith("embed_tokens.weight")]
    state = dict(stack.state_dict())
    for place, tensors in groupby(original_tensors(stack, state), key=lambda item: _block_of(item[0])):
        originals = {name: tensor.to(dtypes[name]) for name, tensor in tensors if name in dtypes}
        if "shared.weight" in originals:
            originals |= dict.fromkeys(copies, originals["shared.weight"])
        model.load_state_dict(originals, strict=False, assign=True)
        if release and place:
            _let_go(stack.get_submodule(place))
            for name in [name for name in state if name.startswith(f"{place}.")]:
                del state[name]
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()


def _block_of(name: str) -> str:
    """The block that a tensor belongs to, such as ``encoder.block.3``; empty for what belongs to none."""
    found = _BLOCK.match(name)
    return found[0] if found else ""


def _let_go(block: nn.Module) -> None:
    """Leaves a block without values."""
    for module in block.modules():
        if isinstance(module, HeldLinear):
            module.forms = ()
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    empty = tensor.detach().to("meta")
                    table[name] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty


def has_values(model: nn.Module) -> bool:
    """Whether a model has kept its weights."""
    return not any(parameter.is_meta for parameter in model.parameters())


def refuse_giving_back(stack: T5EncoderStack, model: nn.Module) -> None:
    """Raises a ValueError where the weights cannot be had, or are no longer those that the model has room for."""
    refuse_wrapped(stack)
    if not has_values(model):
        refuse_8_bits(stack)
    rows, wanted = len(stack.shared.weight), len(model.get_parameter("shared.weight"))
    if rows != wanted:
        raise ValueError(
            f"the embedding table has {rows} rows, and that of the {type(model).__name__} has {wanted}: call "
            f"resize_token_embeddings({wanted}) of ours first"
        )


def refuse_wrapped(stack: T5EncoderStack) -> None:
    """Raises a ValueError where weights have adapters or live LoRAs beside them."""
    recipes = fused_recipes(stack.config) if stack.layout == "fused" else separate_recipes(stack.config)
    present = set(_saved_names(stack))
    absent = [recipe.target for recipe in recipes if recipe.target not in present]
    if absent:
        raise ValueError(
            f"the weights of the encoder cannot be had as they are: {absent[0]} has an adapter or live LoRA beside it "
            f"({len(absent)} weights in all); call clear() of the LiveLoras object, or peft's unload()"
        )


def _saved_names(stack: T5EncoderStack) -> Iterator[str]:
    """The names in the stack's state, for which weights in forms of their own need not be made plain."""
    for path, module in stack.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if isinstance(module, HeldLinear | QuantisedEmbedding):
            yield f"{prefix}weight"
        saved_buffers = module._buffers.keys() - module._non_persistent_buffers_set
        yield from (f"{prefix}{name}" for name in (*module._parameters, *saved_buffers))


def refuse_8_bits(stack: T5EncoderStack) -> None:
    """Raises a ValueError where weights lie in 8 bits: what they stand for is near the originals, and not the same."""
    if is_in_8_bits(stack):
        raise ValueError(
            "the weights of the encoder are in 8 bits, and its originals cannot be had of it: save or give them back "
            "before quantising (an encoder that quantize='int8' has put into a pipeline goes by restore_text_encoder), "
            "or load the model anew without quantize"
        )


def original_tensors(stack: T5EncoderStack, state: dict[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the encoder under its Hugging Face name; float32 where it is taken out of a fused one.

    Args:
        state: the stack's own tensors by name, from which those of a block may be removed once the next is reached.
    """
    state = dict(stack.state_dict()) if state is None else state
    if stack.layout == "fused":
        yield from unfuse(stack.config, state.__getitem__, stack.scales)
        return
    for name in list(state):
        tensor = state[name]
        scale = stack.scales.embedding if name == "shared.weight" else 1.0
        yield name, tensor if scale == 1 else tensor / scale
