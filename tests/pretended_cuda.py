"""A CUDA device where there is none: its tensors have shapes, dtypes and strides, and no values.

Operations on the CPU are computed as ever. Of those on the device, launches, copies and waits are counted, and tensors
of two devices in one operation are an error, as they are on a card.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

CUDA = torch.device("cuda", 0)

# Operations that give another view of the same memory, or memory without contents: no kernel runs for them.
_NO_LAUNCH = {
    *("view", "_unsafe_view", "_reshape_alias", "as_strided", "expand", "permute", "t", "transpose", "unsqueeze"),
    *("squeeze", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "detach", "alias", "lift_fresh"),
    *("device", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}
# Operations whose result the host needs before it can go on.
_WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"}
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


class _Calls(TorchFunctionMode):
    """What torch's Python functions do on a card, where their own code would need a torch that was built for CUDA."""

    def __init__(self, device: PretendedCuda) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.pin_memory:
            self.device.pinned.append(args[0])
            return args[0]
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == self.device.device.type:
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if not (args and isinstance(args[0], FakeTensor)):
            return function(*args, **kwargs)
        if function is Tensor.__getitem__:
            part, places = _basic_part(*args)
            return part if places is None else torch.ops.aten.index.Tensor(part, places)
        if function is Tensor.__setitem__:
            part, places = _basic_part(*args[:2])
            if places is None:
                return self.device.copied(part, args[2]) if isinstance(args[2], Tensor) else part.fill_(args[2])
            return torch.ops.aten.index_put_(part, places, torch.as_tensor(args[2]))
        if function is Tensor.copy_:
            return self.device.copied(*args, **kwargs)
        if function is Tensor.__invert__:
            return torch.ops.aten.bitwise_not(args[0])
        if function is Tensor.contiguous and not args[0].is_contiguous():
            return torch.ops.aten.clone(args[0], memory_format=torch.contiguous_format)
        if function is F.rms_norm:
            self.device.launches["rms_norm"] += 1
            return torch.empty_like(args[0])
        if function is F.scaled_dot_product_attention:
            self.device.attend(*args[:3], kwargs["attn_mask"])
            return torch.empty_like(args[0].transpose(1, 2)).transpose(1, 2)
        return function(*args, **kwargs)


def _basic_part(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None] | None]:
    """The view that numbers, slices, None and … select, and the places that tensors select in it, if there are any."""
    index = index if isinstance(index, tuple) else (index,)
    taken = sum(item is not None and item is not ... for item in index)
    taken += sum(item.ndim - 1 for item in index if isinstance(item, Tensor) and item.dtype == torch.bool)
    places: list[Tensor | None] = []
    dim = 0
    for item in index:
        if item is None:
            tensor = tensor.unsqueeze(dim)
        elif item is ...:
            skipped = tensor.ndim - dim - taken
            places += [None] * skipped
            dim += skipped
            continue
        elif isinstance(item, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, item.start, item.stop, item.step or 1)
        elif isinstance(item, int):
            tensor = tensor.select(dim, item)
            taken -= 1
            continue
        else:
            places.append(torch.as_tensor(item))
            taken -= 1
            dim += places[-1].ndim if places[-1].dtype == torch.bool else 1
            continue
        places.append(None)
        taken -= item is not None
        dim += 1
    return tensor, places if any(place is not None for place in places) else None


class PretendedCuda(TorchDispatchMode):
    """Counts what a card would have to do.

    Attributes:
        launches: kernels, by the operation that launches them.
        copies: between host and device, as ("cpu", "cuda") or the other way round.
        moved: the bytes of each of these copies.
        waits: of the host for the device, by what it waits for.
        pinned: tensors of the host whose copies need not be waited for.
        float32_products: products of float32 matrices.
        answers: what the device says, in turn, for each bool that the host reads: whether a result is finite, whether
            every text has ended, or whether a mask shows a token.
    """

    def __init__(self, device: torch.device = CUDA) -> None:
        super().__init__()
        self.device = device
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._calls = _Calls(self)
        self.answers: Iterator[bool] = itertools.repeat(True)
        self.reset()

    def reset(self) -> None:
        self.launches: Counter[str] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.moved: list[int] = []
        self.waits: Counter[str] = Counter()
        self.pinned: list[Tensor] = []
        self.float32_products = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        on_device = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        target = kwargs.get("device")
        goes_there = target is not None and torch.device(target).type == self.device.type
        if not on_device and not goes_there:
            return operation(*args, **kwargs)
        # In inference mode operations that consist of others arrive whole.
        if operation.namespace == "aten" and operation.has_kernel_for_dispatch_key(_COMPOSITE):
            super().__enter__()
            try:
                return operation.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
        if name in ("_to_copy", "copy_") and (moved := self._moved(args, kwargs)) is not None:
            return moved
        self._refuse_mixture(name, tensors)
        if name in _WAITS:
            self.waits[name] += 1
            if name == "_local_scalar_dense":
                return next(self.answers) if args[0].dtype == torch.bool else 0
        if name not in _NO_LAUNCH:
            self.launches[name] += 1
        if name in _PRODUCTS and any(tensor.dtype == torch.float32 for tensor in on_device):
            self.float32_products += 1
        with self.fakes:
            return operation(*args, **kwargs)

    def _moved(self, args: Any, kwargs: Any) -> Any:
        """The result of a copy from one device to the other; None of a copy on the device."""
        source = args[1] if len(args) > 1 else args[0]
        into = args[0].device if len(args) > 1 else torch.device(kwargs.get("device") or source.device)
        if into.type == source.device.type:
            return None
        self.copies[source.device.type, into.type] += 1
        self.moved.append(source.nbytes)
        is_pinned = any(source is tensor for tensor in self.pinned)
        if into.type == "cpu" or not (is_pinned and kwargs.get("non_blocking", False)):
            self.waits["copy"] += 1
        if len(args) > 1:
            return args[0]
        dtype = kwargs.get("dtype") or source.dtype
        if into.type == "cpu":
            values = torch.ones(source.shape, dtype=dtype)  # as of a mask that hides nothing
            return values.apply_(lambda _: next(self.answers)) if dtype == torch.bool else values
        with self.fakes:
            return torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=self.device)

    def copied(self, into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """``into``, without values: torch's own copy asks for a real device."""
        if self._moved((into, source), {"non_blocking": non_blocking}) is None:
            self.launches["copy_"] += 1
        return into

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
        """A call of SDPA: its fused kernel for CUDA asks for one dtype, and for a bias in aligned rows."""
        self.launches["attention"] += 1
        given = [q, k, v] + ([] if bias is None else [bias])
        self._refuse_mixture("attention", given)
        assert len({tensor.dtype for tensor in given}) == 1
        if bias is not None:
            assert bias.stride(-1) == 1
            assert not any(stride % 8 for stride in (*bias.stride()[:-1], bias.storage_offset()))

    @staticmethod
    def _refuse_mixture(name: str, tensors: list[Tensor]) -> None:
        # A number may come from the host, as may the places of an index.
        if any(not isinstance(tensor, FakeTensor) and tensor.ndim for tensor in tensors):
            raise RuntimeError(f"tensors of cuda:0 and of the cpu meet in {name}")

    def __enter__(self) -> PretendedCuda:
        self._calls.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *fault: Any) -> None:
        super().__exit__(*fault)
        self._calls.__exit__(*fault)

    def put(self, model: nn.Module) -> nn.Module:
        """Moves a model's parameters and buffers to the device."""
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        with self.fakes:
                            moved = torch.empty_strided(
                                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device
                            )
                        table[name] = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
        return model
