"""The least time of an encode on a device by its data sheet: the larger of the times for arithmetic and for memory.

Nothing here is measured. A real encode takes longer: no kernel reaches the rates of a data sheet, and launches, norms,
bias and softmax are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from nai_t5_core.facts.config import Shape, T5Config

_FLOAT16, _FLOAT32 = 2, 4


@dataclass(frozen=True)
class Device:
    """The rates on a data sheet: dense float16 products summed in float32, and memory bandwidth."""

    name: str
    flops_per_second: float
    bytes_per_second: float


DEVICES = (
    # NVIDIA H100 Tensor Core GPU data sheet, SXM: 1979 TFLOPS with sparsity, half of that dense; 3.35 TB/s.
    Device("H100 SXM", 989.4e12, 3.35e12),
    # NVIDIA Ada GPU architecture whitepaper, table of the RTX 4090: 165.2 TFLOPS FP16 with FP32 accumulate; 1008 GB/s.
    Device("RTX 4090", 165.2e12, 1008e9),
    # NVIDIA's RTX 3060 (12 GB) page: 28 multiprocessors, 1.78 GHz boost, 360 GB/s. NVIDIA's GA102 whitepaper: 512
    # operations per multiprocessor and clock in FP16 with FP32 accumulate. 28 · 1.777 GHz · 512 = 25.5 TFLOPS.
    Device("RTX 3060", 25.5e12, 360e9),
)


@dataclass(frozen=True)
class Work:
    """The operations of one encode, and the bytes that it reads and writes."""

    flops: int
    nbytes: int


@dataclass(frozen=True)
class PaperTime:
    """Seconds of one encode at a device's rates, and which of the two rates decides."""

    seconds: float
    bound_by: Literal["arithmetic", "memory"]

    @classmethod
    def of(cls, work: Work, device: Device) -> PaperTime:
        arithmetic, memory = work.flops / device.flops_per_second, work.nbytes / device.bytes_per_second
        return cls(arithmetic, "arithmetic") if arithmetic > memory else cls(memory, "memory")


@dataclass(frozen=True)
class DeviceEstimate:
    """Paper times of a batch on one device: with all pads computed, and with real tokens only."""

    device: Device
    padded: PaperTime
    ours: PaperTime

    @property
    def ratio(self) -> float:
        return self.padded.seconds / self.ours.seconds


@dataclass(frozen=True)
class Estimate:
    """Paper times of one batch. ``padded`` is the work of encoders that compute pads, ``ours`` that without pads."""

    size: str
    prompt_lengths: tuple[int, ...]
    padded_to: int
    padded: Work
    ours: Work
    devices: tuple[DeviceEstimate, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: operations, bytes, seconds and ratios."""
        report = {**asdict(self), "measured": False}
        report["devices"] = [{**asdict(item), "ratio": item.ratio} for item in self.devices]
        return report


def estimate(config: T5Config, size: str, prompt_lengths: Sequence[int], padded_to: int = 512) -> Estimate:
    """Paper times of one batch in float16 on each of :data:`DEVICES`.

    Raises:
        ValueError: no prompts, or one that is empty or longer than ``padded_to``.
    """
    if not prompt_lengths or min(prompt_lengths) < 1 or max(prompt_lengths) > padded_to:
        raise ValueError(
            f"prompt lengths {list(prompt_lengths)} padded to {padded_to}; each must be 1 … {padded_to}, and there "
            "must be one"
        )
    padded, ours = encoder_work(config, [padded_to] * len(prompt_lengths)), encoder_work(config, prompt_lengths)
    devices = tuple(
        DeviceEstimate(device, PaperTime.of(padded, device), PaperTime.of(ours, device)) for device in DEVICES
    )
    return Estimate(size, tuple(prompt_lengths), padded_to, padded, ours, devices)


def encoder_work(config: T5Config, document_lengths: Sequence[int], weight_bytes: int = _FLOAT16) -> Work:
    """The work of a float16 encode of these documents in one batch; pads that are computed count as tokens.

    ``weight_bytes`` are those of a number of the projections.

    Bytes: every weight once, the inputs and outputs of every product and of attention once, and the float32 residual
    read and written by both sublayers. Logits do not count: a fused attention kernel does not write them to memory.
    """
    tokens = sum(document_lengths)
    products = sum(out_features + in_features for out_features, in_features in projection_shapes(config))
    attention = 4 * config.inner_dim
    residual = 2 * 2 * config.d_model
    per_token = config.num_layers * (_FLOAT16 * (products + attention) + _FLOAT32 * residual)
    weights = weight_bytes * config.num_layers * _layer_weights(config)
    return Work(encoder_flops(config, document_lengths), weights + tokens * per_token)


def encoder_flops(config: T5Config, document_lengths: Sequence[int]) -> int:
    """Floating-point operations of the products and of attention, with each document attending to itself only."""
    attention = sum(4 * length * length * config.inner_dim for length in document_lengths)
    return projection_flops(config, sum(document_lengths)) + config.num_layers * attention


def projection_flops(config: T5Config, tokens: int) -> int:
    """Floating-point operations of the encoder's projections alone."""
    return 2 * tokens * config.num_layers * _layer_weights(config)


def projection_shapes(config: T5Config) -> tuple[Shape, ...]:
    """[out, in] of one layer's projections, in order: q, k and v joined, o, wi (gate and up joined), wo."""
    inner = ((config.d_ff, config.d_model),) * (2 if config.gated else 1)
    attention = ((3 * config.inner_dim, config.d_model), (config.d_model, config.inner_dim))
    return (*attention, *inner, (config.d_model, config.d_ff))


def _layer_weights(config: T5Config) -> int:
    return sum(out_features * in_features for out_features, in_features in projection_shapes(config))
