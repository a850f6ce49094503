"""What SDPA is called with: the bias in the queries' dtype, and on CUDA only the kernels that handle a mask rightly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from nai_t5_core.model.attention import sdpa

# Before, SDPA asks the driver what it can do, and cannot be compiled with a choice of kernels.
since_2_6 = pytest.mark.skipif(torch.__version__ < "2.6", reason=f"torch {torch.__version__} asks a CUDA driver")

KERNELS: dict[str, Callable[[], bool]] = {
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "math": torch.backends.cuda.math_sdp_enabled,
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
}


def allowed_kernels() -> set[str]:
    return {name for name, is_enabled in KERNELS.items() if is_enabled()}


class Calls(TorchFunctionMode):
    """Keeps the bias of every SDPA call, the dtypes, and the kernels it may choose from."""

    def __init__(self) -> None:
        super().__init__()
        self.biases: list[Tensor] = []
        self.dtypes: list[set[torch.dtype]] = []
        self.kernels: list[set[str]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.biases.append(kwargs["attn_mask"])
            self.dtypes.append({tensor.dtype for tensor in (*args, kwargs["attn_mask"])})
            self.kernels.append(allowed_kernels())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["v1.1", "umt5"])
@torch.no_grad()
def test_bias_and_mask_have_the_dtype_of_the_queries(kind: str, dtype: torch.dtype) -> None:
    config = TOY_CONFIGS[kind]
    stack = build_stack(config, random_state(config), dtype)
    mask = padding_mask([9, 12, 3], 12)
    mask[1, 4] = 0
    ids = torch.ones(3, 12, dtype=torch.long)
    with Calls() as calls:
        stack(ids, mask)
        stack(ids, mask[:, None] * mask[:, :, None])
    assert calls.dtypes == [{dtype}] * (3 * config.num_layers + config.num_layers)


@pytest.mark.parametrize("length", [9, 12, 16, 45, 64])
@pytest.mark.parametrize("layout", ["right", "left", "holes", "empty", "dense", "none"])
@pytest.mark.parametrize("padding", ["exact", "skip", "attend"])
@torch.no_grad()
def test_a_bias_lies_in_memory_as_torchs_kernels_for_cuda_read_it(layout: str, padding: Any, length: int) -> None:
    """A row of another width is copied in every call, one that begins elsewhere fails, and other strides are slow."""
    config = TOY_CONFIGS["umt5"]
    stack = build_stack(config, random_state(config))
    stack.attention = "sdpa"
    mask = padding_mask([length - 3, length, 3], length)
    if layout == "left":
        mask = mask.flip(1)
    elif layout == "holes":
        mask[1, 4] = 0
    elif layout == "empty":
        mask[1] = 0
    elif layout == "dense":
        mask = mask[:, None] * mask[:, :, None]
    with Calls() as calls:
        stack(torch.ones(3, length, dtype=torch.long), None if layout == "none" else mask, padding=padding)
    assert calls.biases
    for bias in calls.biases:
        *others, last = bias.stride()
        assert last == 1 and bias.storage_offset() % 8 == 0
        assert all(stride % 8 == 0 for stride in others), (tuple(bias.shape), bias.stride())


def attend(device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """SDPA of two documents of three tokens."""
    q, k, v = (torch.zeros(2, 4, 3, 16, device=device, dtype=dtype) for _ in range(3))
    return sdpa(q, k, v, torch.zeros(2, 4, 3, 3, device=device, dtype=dtype), scale=1.0)


@since_2_6
def test_on_cuda_the_kernel_is_never_cudnn_or_flash() -> None:
    """Tensors without memory suffice: what is asked is which kernels torch may choose from."""
    before = allowed_kernels()
    with FakeTensorMode(), Calls() as calls:
        assert attend("cuda", torch.float16).device.type == "cuda"
    assert calls.kernels == [{"efficient", "math"}]
    assert allowed_kernels() == before


def test_on_the_cpu_nothing_is_chosen() -> None:
    with Calls() as calls:
        attend("cpu")
    assert calls.kernels == [allowed_kernels()]


@since_2_6
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_compiles_as_one_graph(device: str) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with FakeTensorMode():
        out = torch.compile(attend, fullgraph=True, backend=keep)(device)
    assert out.shape == (2, 4, 3, 16) and len(graphs) == 1
    names = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert any("scaled_dot_product_attention" in name for name in names)
    assert any("sdpa_kernel" in name for name in names) == (device == "cuda")
