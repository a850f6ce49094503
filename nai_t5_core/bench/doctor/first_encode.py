"""How long the first encode of a fresh process takes: imports, kernels that are compiled or found, and CUDA graphs.

``python -m nai_t5_core.bench.doctor.first_encode STARTED MODEL DEVICE RECORD_AT`` prints it as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

from nai_t5_core.bench.doctor.fresh_process import end_with_parent, found_in_a_fresh_process

if TYPE_CHECKING:
    from nai_t5_core.bench.doctor.patient import Finding, Patient

TOKENS = 64
# On a warm disk cache, without reading weights.
MOST_SECONDS = 10.0
_PATIENCE = 48.0


def time_first_encodes(patient: Patient) -> Finding:
    """In three processes, one after the other: the first may compile kernels, the others find them on the disk.

    ``graph at the second call`` has its first encode launched kernel by kernel.
    """
    found = {
        name: in_a_fresh_process(patient.model.name, str(patient.device), record_at)
        for name, record_at in (("the first process", 1), ("a later one", 1), ("graph at the second call", 2))
    }
    later = found["a later one"]
    seconds = later["start_seconds"] + later["first_seconds"]
    return {"times": found, "seconds": seconds}


def in_a_fresh_process(model: str, device: str, record_at: int) -> dict[str, float]:
    """Seconds until a process is ready, of the first encode and of the second.

    Raises:
        RuntimeError: see :func:`nai_t5_core.bench.doctor.fresh_process.found_in_a_fresh_process`.
    """
    return found_in_a_fresh_process(__name__, model, device, str(record_at), patience=_PATIENCE)


def measured(started: float, model: str, device_name: str, record_at: int) -> dict[str, float]:
    """As :func:`in_a_fresh_process`, in this process, which was ``started`` then; on a CPU the modules encode.

    It is ready when all is imported and the device was waited for, which begins the driver's part. What makes random
    weights is not counted.
    """
    import torch

    from nai_t5_core.backends.cuda.runner import CudaRunner
    from nai_t5_core.bench.clock import synchronize
    from nai_t5_core.bench.doctor.model import model_of

    device = torch.device(device_name)
    synchronize(device)
    ready = time.time()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    stack = model_of(model, dtype, device).stack
    stack.runner = CudaRunner(record_at=record_at)
    ids = torch.arange(TOKENS)[None] % stack.config.vocab_size
    synchronize(device)
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        with torch.no_grad():
            stack(ids)
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return {"start_seconds": ready - started, "first_seconds": times[0], "second_seconds": times[1]}


if __name__ == "__main__":
    end_with_parent()
    print(json.dumps(measured(float(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))))
