"""What of a block is brought to a device, how it is laid together, and the block with its weights elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from nai_t5_core.backends.quantised.projections import QuantisedLinear

Module = TypeVar("Module", bound=nn.Module)

# Gives a tensor that stands for a weight at another place, or the weight itself.
Place = Callable[[Tensor], Tensor]

# Every weight begins at a multiple, as those that torch allocates by itself do at least.
_ALIGNMENT = 256


def weights_of(block: nn.Module) -> list[Tensor]:
    """What is brought: the weights of the projections, as they are kept, and those of norms that have some.

    The table of the position bias stays on the device: all blocks may share the first one's.
    """
    found = (weight for module in block.modules() for weight in _own_weights(module))
    return list({id(weight): weight for weight in found}.values())  # some share the weight of a norm


def _own_weights(module: nn.Module) -> Iterator[Tensor]:
    if not isinstance(module, nn.Embedding):
        yield from (weight for weight in module._parameters.values() if weight is not None)
    if isinstance(module, QuantisedLinear):
        for form in module.forms:
            yield from form.tensors


def refuse_hooked(block: nn.Module) -> None:
    """Raises a ValueError where other software brings a block's weights, or computes the block in its own way."""
    for name, module in block.named_modules():
        if _has_other_forward(module) or any(weight.is_meta for weight in _own_weights(module)):
            raise ValueError(
                "the encoder brings its layers to the device itself, and other software has replaced the forward of "
                f"{name or 'a layer'} or taken its weights away (accelerate's and diffusers' offloading do so): use "
                "one of the two; remove those hooks, or move the encoder to the CPU before they are set up"
            )


def _has_other_forward(module: nn.Module) -> bool:
    """Whether its forward was replaced; accelerate leaves the class's own in the instance when its hooks go."""
    own = module.__dict__.get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def shadow(module: Module, place: Place) -> Module:
    """A copy of a module that shares everything with it but its weights, which are where ``place`` has them.

    Hooks are called as those of the original. A block is to be called by :meth:`by_modules`, since it shares its
    runner as well.
    """
    other = copy.copy(module)
    own = {name: weight if weight is None else _placed(weight, place) for name, weight in module._parameters.items()}
    children = {name: child if child is None else shadow(child, place) for name, child in module._modules.items()}
    other.__dict__.update(_parameters=own, _modules=children)
    other.__dict__.pop("forward", None)  # that of the original
    if isinstance(other, QuantisedLinear):
        other.forms = tuple(form.placed(place) for form in other.forms)
    return other


def _placed(weight: nn.Parameter, place: Place) -> nn.Parameter:
    there = place(weight)
    return weight if there is weight else nn.Parameter(there, requires_grad=False)


@dataclass(frozen=True)
class Layout:
    """Where each of some weights begins in one piece of memory, and how large that is."""

    starts: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> Layout:
        starts, end = [], 0
        for weight in weights:
            starts.append(-(-end // _ALIGNMENT) * _ALIGNMENT)
            end = starts[-1] + weight.nbytes
        return cls(tuple(starts), end)


def view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """The place of a weight in memory [bytes], as a tensor of its shape and dtype."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


def runs(weights: Sequence[Tensor], layout: Layout) -> list[tuple[int, Tensor]]:
    """The bytes of weights in as few pieces as they lie in: where each piece begins in the layout, and its bytes.

    Weights that lie as the layout has them are one piece, with what is between them.
    """
    first, found = 0, []
    for index in range(1, len(weights) + 1):
        if index == len(weights) or not _lie_together(weights, layout, index):
            end = layout.starts[index - 1] + weights[index - 1].nbytes
            found.append((layout.starts[first], _bytes_from(weights[first], end - layout.starts[first])))
            first = index
    return found


def _lie_together(weights: Sequence[Tensor], layout: Layout, index: int) -> bool:
    """Whether a weight lies behind the one before as the layout has it."""
    before, weight = weights[index - 1], weights[index]
    is_same_memory = before.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    return is_same_memory and (weight.data_ptr() - before.data_ptr() == layout.starts[index] - layout.starts[index - 1])


def _bytes_from(weight: Tensor, nbytes: int) -> Tensor:
    storage = weight.untyped_storage()
    start = weight.data_ptr() - storage.data_ptr()
    return torch.empty(0, dtype=torch.uint8).set_(storage, start, (nbytes,), (1,))


@torch.no_grad()
def lay_together(block: nn.Module, weights: Sequence[Tensor], memory: Tensor) -> None:
    """Has some weights of a block lie in memory [bytes], one behind the other; the memory they had is let go."""
    places: dict[int, Tensor] = {}
    for weight, start in zip(weights, Layout.of(weights).starts, strict=True):
        places[id(weight)] = view(memory, start, weight)
        places[id(weight)].copy_(weight)

    def place(weight: Tensor) -> Tensor:
        return places.get(id(weight), weight)

    for module in block.modules():
        if not isinstance(module, nn.Embedding):
            replace_parameters(module, place)
        if isinstance(module, QuantisedLinear):
            module.forms = tuple(form.placed(place) for form in module.forms)


def replace_parameters(module: nn.Module, place: Place) -> None:
    """Puts the module's own parameters elsewhere; those whom others know stay the same objects."""
    for name, weight in module._parameters.items():
        if weight is None or (there := place(weight)) is weight:
            continue
        if weight.is_inference():  # which takes no other memory
            module._parameters[name] = nn.Parameter(there, requires_grad=False)
        else:
            weight.data = there
