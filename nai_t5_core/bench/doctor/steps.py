"""The steps of an examination, cheap ones first. Each is independent of the others and returns values for JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nai_t5_core.bench.doctor.patient import Finding, Patient


# The step that comes first wherever there is a device to try.
TRIAL = "device"


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: what a command line calls it.
        title: what it does, in words.
        run: the function that does it, in a process that may be stopped at any time.
        deadline: seconds after which it is stopped.
        only_full: whether it runs with ``--full`` only.
        devices: the types of device that it runs on.
    """

    name: str
    title: str
    run: Callable[[Patient], Finding]
    deadline: float
    only_full: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda", "mps")


def all_steps() -> tuple[Step, ...]:
    """Every step, in order."""
    # Imported only here: these import torch.
    from nai_t5_core.bench.doctor import (
        ceilings,
        choosing,
        cpu_products,
        eight_bits,
        first_encode,
        graphs,
        int8_inputs,
        machine,
        memory,
        numbers,
        offload,
        own_kernels,
        peers,
        speed,
    )

    return (
        Step(TRIAL, "whether the device computes", machine.try_device, 60, devices=("cuda", "mps")),
        Step("machine", "what the machine is", machine.describe, 60),
        Step("ceilings", "copies and products, as fast as the machine does them", ceilings.measure, 60),
        Step("numbers", "a small model of each kind against float64", numbers.check_stacks, 120),
        Step("masks", "masks that begin or end at odd places", numbers.check_masks, 60),
        Step("generation", "generation against float32 on the CPU", numbers.check_generation, 60),
        Step("kernels", "our kernels for CUDA against float64", own_kernels.check, 120, devices=("cuda",)),
        Step("8-bits", "weights in 8 bits by our kernels for CUDA", eight_bits.check, 120, devices=("cuda",)),
        Step("sums", "float16 sums of many products", numbers.check_sums, 30, devices=("cuda",)),
        Step("speed", "our encoder at typical lengths", speed.measure_lengths, 120),
        Step("batches", "our encoder with many prompts", speed.measure_batches, 60),
        Step("int8", "our encoder with weights in 8 bits", speed.measure_int8, 60, devices=("cpu",)),
        Step("cpu-products", "what multiplies on this processor", cpu_products.compare, 90, devices=("cpu",)),
        Step("launches", "what one encode has the device do", speed.count_launches, 60, devices=("cuda",)),
        Step(
            "first-encode",
            "the first encode of a fresh process",
            first_encode.time_first_encodes,
            150,
            devices=("cuda",),
        ),
        Step("choice", "what is fastest on this card", choosing.measure_choice, 150, devices=("cuda",)),
        Step(
            "int8-choice",
            "what is fastest with weights in int8",
            int8_inputs.measure_int8_choice,
            120,
            devices=("cuda",),
        ),
        Step("8-bit-speed", "weights in 8 bits, in graphs", eight_bits.time_eight_bits, 90, True, ("cuda",)),
        Step("offload", "layers from the host's memory, beside the bus", offload.measure, 120, True, ("cuda",)),
        Step("transformers", "transformers beside ours", peers.time_transformers, 90, True),
        Step("nai-t5", "nai-t5 beside ours", peers.time_nai_t5, 60, True),
        Step("peers-compiled", "transformers, compiled", peers.time_compiled_transformers, 150, True, ("cuda",)),
        Step("nai-t5-compiled", "nai-t5 by flex, compiled", peers.time_compiled_nai_t5, 120, True, ("cuda",)),
        Step("memory", "what an encoder takes of the card", memory.measure, 150, True, ("cuda",)),
        Step(
            "kernel-speed", "our kernels for CUDA, eager and in graphs", own_kernels.time_kernels, 90, True, ("cuda",)
        ),
        Step("8-bit-products", "products from weights in 8 bits", own_kernels.time_byte_products, 150, True, ("cuda",)),
        Step("flex", "flex attention: right, and from where on faster", graphs.check_flex, 150, True, ("cuda",)),
        Step("products", "the bare products of a layer", speed.measure_products, 60, True, ("cuda",)),
        Step("compiled", "ours, compiled with CUDA graphs", graphs.time_compiled_short, 150, True, ("cuda",)),
        Step("compiled-512", "the same, for 512 tokens", graphs.time_compiled_long, 150, True, ("cuda",)),
    )
