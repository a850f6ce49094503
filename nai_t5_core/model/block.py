"""The contract between a block and what computes it in another way than module by module.

A block is made of modules, and these can always compute it. A runner stands beside them and computes the same faster.
Where the modules have to be called, since other software hooks into them or has replaced one, gradients are recorded,
or a compiler or a mode of torch's watches every operation, the block calls them. All of that is decided here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class BlockRunner(Protocol):
    """What computes a block in place of its modules. It holds no reference to the block, which holds it.

    Attributes:
        name: what it is, in words.
        lending: what is done with the block while something lies beside its weights; None where that needs nothing.
    """

    lending: Lending | None

    @property
    def name(self) -> str: ...

    def __call__(self, block: Block, residual: Tensor, *attends_and_dtype: Any) -> Tensor | None:
        """As the block's own call; None where its modules have to be called."""
        ...

    def attends(self, block: Block, dtype: torch.dtype) -> bool:
        """Whether attention, too, is its own in inference. Nothing is built or computed to find out."""
        ...


class Backend(Protocol):
    """A way to compute a block.

    Attributes:
        name: what users call it.
    """

    name: str

    def missing(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """What this machine lacks for a model in this dtype on this device, as a sentence; None if nothing is known of.

        Nothing is compiled and no process is started.
        """
        ...

    def refuses(self, block: Block, dtype: torch.dtype) -> str | None:
        """What about a block it cannot compute, as a sentence; None if nothing."""
        ...

    def bind(self, block: Block, dtype: torch.dtype) -> None:
        """Has a block, which it does not refuse, computed by it from now on."""
        ...


@dataclass(frozen=True)
class Lending:
    """A block is computed by another backend for a while, and then by its own again.

    Attributes:
        to: that other.
        back: its own.
    """

    to: Backend
    back: Backend


class Block(nn.Module):
    """A layer: sublayers that attend to something, then the feed-forward.

    Attributes:
        layer: the sublayers, each with its norm.
        runner: what computes the block instead, where it can.
    """

    layer: nn.ModuleList
    runner: BlockRunner | None = None

    def forward(self, residual: Tensor, *attends_and_dtype: Any) -> Tensor:
        """[…, d_model] residual to residual, changed in place in inference.

        Args:
            residual: in float32, or float64 in a float64 model.
            attends_and_dtype: for each sublayer but the last what it attends by, and then the compute dtype.
        """
        if self.runner is not None:
            out = self.runner(self, residual, *attends_and_dtype)
            if out is not None:
                return out
        return self.by_modules(residual, *attends_and_dtype)

    def by_modules(self, residual: Tensor, *attends_and_dtype: Any) -> Tensor:
        """The same, module by module."""
        *attends, dtype = attends_and_dtype
        *attending, feed_forward = self.layer
        for sublayer, attend in zip(attending, attends, strict=True):
            residual = sublayer(residual, attend, dtype)
        out: Tensor = feed_forward(residual, dtype)
        return out

    def attends_by_itself(self, dtype: torch.dtype) -> bool:
        """Whether the runner computes attention, too, in inference."""
        return self.runner is not None and self.runner.attends(self, dtype)

    def extra_repr(self) -> str:
        return "" if self.runner is None else self.runner.name


# Of a module's attributes: whether its call was replaced.
_HAS_FORWARD = methodcaller("__contains__", "forward")


class Seen:
    """Modules as they were looked at, and whether they still are what was seen: cheap enough for every call.

    Of the values of weights it knows nothing.

    Args:
        modules: what is kept, so not those that keep this.
        members: of other modules, which they have by name.
    """

    def __init__(self, modules: Iterable[nn.Module], members: Sequence[dict[str, Any]] = ()) -> None:
        self._modules = list(modules)
        self._attributes = [module.__dict__ for module in self._modules]
        self._hooks = [module._forward_hooks for module in self._modules]
        self._hooks += [module._forward_pre_hooks for module in self._modules]
        self._scaled = [found for found in self._attributes if "scale" in found or "out_scale" in found]
        # Modules and parameters, by name. What gives members to a module that has none changes its class as well.
        tables = [*members, *(table for found in self._modules for table in (found._modules, found._parameters))]
        self._members = [table for table in tables if table]
        # Tensors of other classes may have no place to ask for.
        self._weights = [weight for table in tables for weight in table.values() if type(weight) is nn.Parameter]
        self._state = None if self._is_watched else self._present_state()

    @property
    def is_same(self) -> bool:
        """Whether all modules, weights and scales are the same, the weights at the same place with any values.

        False while other software watches the modules, and where it did so when they were looked at.
        """
        return not self._is_watched and self._present_state() == self._state

    @property
    def _is_watched(self) -> bool:
        return any(self._hooks) or any(map(_HAS_FORWARD, self._attributes))

    def _present_state(self) -> tuple[Any, ...]:
        return (
            list(map(type, self._modules)),
            [(found.get("scale"), found.get("out_scale")) for found in self._scaled],
            [id(member) for table in self._members for member in table.values()],
            [weight.data_ptr() for weight in self._weights],
        )


def is_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether other software wants to know of calls of these modules, or has put its own in place of their calls."""
    return any(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__ for module in modules)


def torch_is_needed() -> bool:
    """Whether operations must be torch's now: gradients are recorded, a compiler traces them, or a mode counts them."""
    return torch.is_grad_enabled() or operations_are_watched()


def operations_are_watched() -> bool:
    """Whether a compiler traces operations, or a mode of torch's counts or changes them."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
