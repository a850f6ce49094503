"""The interface between a block and its runner, which computes the block faster than its modules would.

A block's modules can always compute it. A block with a runner still calls its modules where other software hooks into
one or has replaced one, where gradients are recorded, or where a compiler or a dispatch mode of torch sees the
operations. This file has the checks for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class BlockRunner(Protocol):
    """What computes a block in place of its modules. The block holds its runner, which keeps no reference to it.

    Attributes:
        name: what it is, in words.
        lending: which backend computes the block while a live LoRA stands beside its weights, and which afterwards;
            None where this runner can compute a block with a LoRA.
    """

    lending: Lending | None

    @property
    def name(self) -> str: ...

    def __call__(self, block: Block, residual: Tensor, *attends_and_dtype: Any) -> Tensor | None:
        """As the block's own call; None where the block's modules have to be called."""
        ...

    def attends(self, block: Block, dtype: torch.dtype) -> bool:
        """Whether the runner computes attention, too, in inference. Nothing is built or computed to find out."""
        ...

    def forget(self) -> None:
        """Lets go of what was found out about the block's weights, which were moved or cast."""
        ...


class Backend(Protocol):
    """A way to compute blocks: it binds them to runners.

    Attributes:
        name: what users call it.
    """

    name: str

    def missing(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """What this machine lacks for a model in this dtype on this device, as a sentence; None if nothing known.

        Nothing is compiled and no process is started.
        """
        ...

    def refuses(self, block: Block, dtype: torch.dtype) -> str | None:
        """Why it cannot compute this block, as a sentence; None if it can."""
        ...

    def bind(self, block: Block, dtype: torch.dtype) -> None:
        """Makes this backend compute a block, which :meth:`refuses` accepts, from now on."""
        ...


@dataclass(frozen=True)
class Lending:
    """Two backends: one that computes a block for a while, and the one that computes it again afterwards.

    Attributes:
        to: the backend that computes the block meanwhile.
        back: the block's own backend.
    """

    to: Backend
    back: Backend


class Block(nn.Module):
    """A layer: sublayers that attend to something, then the feed-forward.

    Attributes:
        layer: the sublayers, each with its norm.
        runner: what computes the block in place of the modules, where it can; None: the modules always do.
    """

    layer: nn.ModuleList
    runner: BlockRunner | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Block:
        super()._apply(fn, recurse)
        if self.runner is not None:
            self.runner.forget()
        return self

    def forward(self, residual: Tensor, *attends_and_dtype: Any) -> Tensor:
        """[…, d_model] residual to residual, changed in place in inference.

        Args:
            residual: in float32, or float64 in a float64 model.
            attends_and_dtype: the attention function of each sublayer but the last, and then the compute dtype.
        """
        if self.runner is not None:
            out = self.runner(self, residual, *attends_and_dtype)
            if out is not None:
                return out
        return self.by_modules(residual, *attends_and_dtype)

    def by_modules(self, residual: Tensor, *attends_and_dtype: Any) -> Tensor:
        """As :meth:`forward`, always by the block's modules."""
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


class ModulesRecord:
    """A record of modules and their weights, which tells whether any was replaced since; cheap enough for every call.

    It does not notice changed values of a weight.

    Args:
        modules: the modules to watch. They are kept alive, so a module that holds this object must not be among them.
        members: dictionaries of named modules or parameters of further modules.
    """

    def __init__(self, modules: Iterable[nn.Module], members: Sequence[dict[str, Any]] = ()) -> None:
        self._modules = list(modules)
        self._attributes = [module.__dict__ for module in self._modules]
        self._hooks = [module._forward_hooks for module in self._modules]
        self._hooks += [module._forward_pre_hooks for module in self._modules]
        self._scaled = [found for found in self._attributes if "scale" in found or "out_scale" in found]
        # Modules and parameters, by name. Empty tables are left out: whatever adds members to a module without any
        # changes its class, which is compared as well.
        tables = [*members, *(table for found in self._modules for table in (found._modules, found._parameters))]
        self._sizes = [(table, len(table)) for table in tables if table]
        self._members = [(table, name, member) for table in tables for name, member in table.items()]
        # Tensors of other classes may have no data_ptr.
        self._weights = [weight for table in tables for weight in table.values() if type(weight) is nn.Parameter]
        self._state = None if self._is_watched else self._present_state()

    @property
    def is_same(self) -> bool:
        """Whether modules, weights, the weights' addresses and the scales are as they were; values are not compared.

        False while a module has hooks or a replaced forward, and always if one had when this record was made.
        """
        return not self._is_watched and self._has_its_members and self._present_state() == self._state

    # Plain loops, here and below: they take a third of the time of calls within maps and comprehensions.
    @property
    def _is_watched(self) -> bool:
        if any(self._hooks):
            return True
        for found in self._attributes:  # noqa: SIM110
            if "forward" in found:  # of its own, which replaces that of its class
                return True
        return False

    @property
    def _has_its_members(self) -> bool:
        for table, size in self._sizes:
            if len(table) != size:
                return False
        for table, name, member in self._members:  # noqa: SIM110
            if table.get(name) is not member:
                return False
        return True

    def _present_state(self) -> tuple[Any, ...]:
        return (
            list(map(type, self._modules)),
            [(found.get("scale"), found.get("out_scale")) for found in self._scaled],
            [weight.data_ptr() for weight in self._weights],
        )


def is_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether other software has put hooks on these modules, or replaced the forward of one."""
    return any(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__ for module in modules)


def torch_is_needed() -> bool:
    """Whether operations must be torch's own now: gradients are recorded, or a compiler or dispatch mode sees them."""
    return torch.is_grad_enabled() or operations_are_watched()


def operations_are_watched() -> bool:
    """Whether torch has to see operations: it traces or transforms them, or a dispatch mode counts or changes them."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
