"""How much of a card an encoder takes: while it is loaded from a file, when it is there, and while it encodes.

``python -m nai_t5_core.bench.doctor.memory STARTED SOURCE DEVICE DTYPE [int8]`` prints it as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from nai_t5_core.bench.doctor.fresh_process import end_with_parent, found_in_a_fresh_process

if TYPE_CHECKING:
    from nai_t5_core.bench.doctor.patient import Finding, Patient

LENGTHS = (64, 512)
# What the card gives while it is loaded, as a multiple of what stays. A second copy would be 2.
MOST_AT_LOAD = 1.15
_PATIENCE = 70.0


def measure(patient: Patient) -> Finding:
    """The timed model as ``TextEncoder`` loads it, in the dtype that suits and in 8 bits, each in a fresh process."""
    from nai_t5_core.backends.choices import missing_for_int8

    name = str(patient.dtype).removeprefix("torch.")
    where = (str(patient.device), name)
    can_quantise = not missing_for_int8(patient.device, patient.dtype) and patient.model.quantised_bytes is None
    with TemporaryDirectory(prefix="nai-t5-doctor-") as folder:
        source = patient.model.on_disk(Path(folder))
        kinds = {name: in_a_fresh_process(source, *where)}
        if can_quantise:
            kinds["int8"] = in_a_fresh_process(source, *where, "int8")
    return {"model": patient.model.name, "kinds": kinds}


def in_a_fresh_process(source: str, device: str, *dtype_and_quantise: str) -> dict[str, float]:
    """Bytes and seconds, see :func:`measured`.

    Raises:
        RuntimeError: see :func:`nai_t5_core.bench.doctor.fresh_process.found_in_a_fresh_process`.
    """
    return found_in_a_fresh_process(__name__, source, device, *dtype_and_quantise, patience=_PATIENCE)


def measured(source: str, device_name: str, dtype: str, quantize: Literal["int8"] | None = None) -> dict[str, Any]:
    """What the device gives to tensors: the most while an encoder is loaded, what stays, and the most while it encodes.

    ``reserved_bytes`` is what torch has taken of the device for all that, with what it keeps for later.
    """
    import torch

    from nai_t5_core.float16.guard import encode_guarded
    from nai_t5_core.prompts.choices import Choices
    from nai_t5_core.prompts.loading import finish, load_chosen

    device = torch.device(device_name)
    how = Choices(dtype, device, quantize=quantize)
    # Statistics exist once torch has started on the device.
    torch.cuda.init()
    torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    stack = finish(load_chosen(source, "", how).stack, how)
    torch.cuda.synchronize(device)
    found: dict[str, Any] = {
        "load_seconds": time.perf_counter() - started,
        "most_at_load": torch.cuda.max_memory_allocated(device),
        "kept_bytes": torch.cuda.memory_allocated(device),
    }
    torch.cuda.reset_peak_memory_stats(device)
    for length in LENGTHS:
        for _ in range(2):
            encode_guarded(stack, torch.arange(length)[None] % stack.config.vocab_size)
    found["most_while_encoding"] = torch.cuda.max_memory_allocated(device)
    found["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return {**found, "by": stack.describe_attention()}


if __name__ == "__main__":
    end_with_parent()
    _, file, device_type, dtype_name, *kind = sys.argv[1:]
    print(json.dumps(measured(file, device_type, dtype_name, "int8" if kind else None)))
