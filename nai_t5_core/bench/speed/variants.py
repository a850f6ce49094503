"""The implementations that are timed: variants of our encoder, and its peers, each eager or compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nai_t5_core.backends.choices import ProductsChoice
from nai_t5_core.backends.choose import encode_on_cuda, prepack, quantize_int8, run_in_place, why_not_prepack
from nai_t5_core.backends.compiled import compile_stack
from nai_t5_core.backends.cuda.runner import CudaRunner
from nai_t5_core.backends.kernels.build import nearest_set, why_not_kernels
from nai_t5_core.backends.kernels.runners import KERNELS
from nai_t5_core.backends.kernels.sets import InstructionSet, named
from nai_t5_core.backends.products import ONEDNN
from nai_t5_core.bench.comfyui_peer import COMFYUI, comfyui_peer, import_comfyui
from nai_t5_core.bench.parity_report import OWN
from nai_t5_core.bench.peer_list import Peer, build_peer
from nai_t5_core.bench.peers import State, own_encoder
from nai_t5_core.bench.speed.cases import Case
from nai_t5_core.facts.config import T5Config
from nai_t5_core.model.encoder import T5EncoderStack

NOT_PREPACKED = f"{OWN}, not prepacked"
BY_TORCH = f"{OWN}, by torch"
BY_ONEDNN = f"{OWN}, oneDNN"
INT8 = f"{OWN}, int8"
COMPILED = ", compiled"
OWN_COMPILED = f"{OWN}{COMPILED}"

# [batch, length] ids and mask to hidden states.
Encode = Callable[[Case, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Wanted:
    """Which implementations to build: peers by name, ComfyUI from a checkout, ours also in 8 bits or by oneDNN only.

    With ``compiled``, each also under torch.compile. ``products`` computes ours, see
    :func:`nai_t5_core.backends.choose.prepack`.
    """

    peers: tuple[str, ...] = ()
    comfyui: Path | None = None
    compiled: bool = False
    int8: bool = False
    onednn: bool = False
    products: ProductsChoice = "auto"


@dataclass(frozen=True)
class Built:
    """Built implementations by name, ours first; versions of the peers; what could not be built, and why.

    ``kernel_dtypes`` has, for each variant of ours that our kernels compute, the dtype of weights that they multiply,
    and ``instructions`` what they compute with. ``computed_in`` is what the model computes in, which is also the dtype
    of the peers: float32 where kernels widen weights in 16 bits. ``can_prepack``: whether oneDNN takes weights in it.
    """

    encoders: dict[str, Encode]
    versions: dict[str, str]
    skipped: tuple[str, ...]
    can_prepack: bool
    kernel_dtypes: Mapping[str, torch.dtype]
    instructions: InstructionSet | None
    computed_in: torch.dtype


def build_variants(
    config: T5Config,
    state: State,
    dtype: torch.dtype,
    device: torch.device,
    wanted: Wanted,
    tell: Callable[[str], None],
) -> Built:
    """Builds everything from one set of weights; tensors are shared where the layouts agree.

    Raises:
        ValueError: compiled variants, 8 bits or products are asked for and not possible here, or ComfyUI cannot be
            imported.
    """
    if wanted.compiled:
        _check_compiler()
    if wanted.comfyui is not None:
        # A named checkout that cannot be used is an error, where other peers are skipped.
        import_comfyui(wanted.comfyui, device)
    tell(f"building {OWN}")
    eager = own_encoder(config, state, dtype).to(device)
    encoders = {name: _own(optimize(_twin(eager))) for name, optimize in _own_variants(eager, wanted).items()}
    instructions = _instructions(eager, wanted)
    computed_in = dtype if instructions is None else instructions.stored[dtype]
    if computed_in != dtype:
        state = {name: tensor.to(computed_in) for name, tensor in state.items()}
    versions, skipped = dict[str, str](), list[str]()
    for name, build in _peer_builders(config, state, computed_in, device, wanted).items():
        tell(f"building {name}")
        try:
            peer = build()
        except ValueError as error:
            skipped.append(f"{name}: {error}")
            continue
        peer.model.to(device)
        versions[name] = peer.version if computed_in == dtype else f"{peer.version} in {computed_in}"
        encoders[name] = _of_peer(peer)
        if wanted.compiled:
            forward = _compiled(peer.implementation.forward)
            compiled = replace(peer, implementation=replace(peer.implementation, forward=forward))
            encoders[f"{name}{COMPILED}"] = _of_peer(compiled)
    can_prepack = ONEDNN.missing(device, computed_in) is None
    kernel_dtypes = {} if instructions is None else {OWN: dtype, **({INT8: torch.int8} if wanted.int8 else {})}
    return Built(encoders, versions, tuple(skipped), can_prepack, kernel_dtypes, instructions, computed_in)


# ---------------------------------------------------------------------------------------------------------------------
# Ours
# ---------------------------------------------------------------------------------------------------------------------

# Makes of a stack something that is called like it.
Optimize = Callable[[T5EncoderStack], Callable[..., Tensor]]


def _own_variants(stack: T5EncoderStack, wanted: Wanted) -> dict[str, Optimize]:
    """How each variant of ours is made from a stack. Each line is a variant; the first is the one of TextEncoder."""
    products = wanted.products
    in_place = partial(run_in_place, products=products if products in KERNELS else "auto")
    variants: dict[str, Optimize] = {OWN: in_place}
    if stack.device.type == "cuda" and CudaRunner().refusal(stack) is None:
        variants = {OWN: encode_on_cuda, BY_TORCH: in_place}
    if products != "auto" or why_not_prepack(stack) is None:
        variants = {OWN: partial(prepack, products=products), NOT_PREPACKED: in_place}
        if wanted.onednn:
            variants[BY_ONEDNN] = partial(prepack, products="onednn")
    if wanted.int8:
        variants[INT8] = partial(_in_8_bits, products=products)
    if wanted.compiled:
        variants[OWN_COMPILED] = compile_stack
    return variants


def _in_8_bits(stack: T5EncoderStack, products: ProductsChoice) -> T5EncoderStack:
    """As :class:`nai_t5_core.TextEncoder` has it: on CUDA the kernels read the weights."""
    return encode_on_cuda(quantize_int8(stack, products))


def _instructions(stack: T5EncoderStack, wanted: Wanted) -> InstructionSet | None:
    """What our kernels compute with; None where they do not."""
    if wanted.products in KERNELS:
        return named(wanted.products)
    if wanted.products == "onednn" or why_not_prepack(stack) is not None:
        return None
    return nearest_set() if wanted.products == "kernels" or why_not_kernels() is None else None


def _twin(stack: T5EncoderStack) -> T5EncoderStack:
    """Another stack on the same tensors, for functions that change a stack's modules."""
    twin = T5EncoderStack(stack.config, stack.layout, scales=stack.scales, device="meta", dtype=stack.dtype)
    twin.load_state_dict(stack.state_dict(), assign=True)
    return twin.eval().requires_grad_(False)


def _own(call: Callable[..., Tensor]) -> Encode:
    def encode(case: Case, ids: Tensor, mask: Tensor) -> Tensor:
        return call(ids, None) if case.padding is None else call(ids, mask, padding=case.padding)

    return encode


# ---------------------------------------------------------------------------------------------------------------------
# Peers
# ---------------------------------------------------------------------------------------------------------------------


def _peer_builders(
    config: T5Config, state: State, dtype: torch.dtype, device: torch.device, wanted: Wanted
) -> dict[str, Callable[[], Peer]]:
    def named(name: str) -> Callable[[], Peer]:
        return lambda: build_peer(name, config, state, dtype)

    builders = {name: named(name) for name in wanted.peers}
    if (checkout := wanted.comfyui) is not None:
        builders[COMFYUI] = lambda: comfyui_peer(checkout, config, state, dtype, device)
    return builders


def _of_peer(peer: Peer) -> Encode:
    return lambda case, ids, mask: peer(ids, None if case.padding is None else mask)


# ---------------------------------------------------------------------------------------------------------------------
# Compiling
# ---------------------------------------------------------------------------------------------------------------------


def _compiled(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled for each shape separately, which gives the fastest code."""
    return torch.compile(call, dynamic=False)


def _check_compiler() -> None:
    if not hasattr(torch.compiler, "set_stance"):
        raise ValueError(f"compiled variants need torch 2.6 or newer; this is {torch.__version__}")
    try:
        torch.compile(torch.sin)(torch.ones(2))
    except RuntimeError as error:
        cause = str(error).strip().splitlines()[0]
        raise ValueError(
            f"torch cannot compile here ({cause}); install a C++ compiler, or leave compiling out"
        ) from error
