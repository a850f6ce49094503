"""How long the first encode of a fresh process takes: imports, kernels that are compiled or found, and CUDA graphs.

``python -m nai_t5_core.bench.doctor.first_encode MODEL DEVICE RECORD_AT`` prints it as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nai_t5_core.bench.doctor.patient import Finding, Patient

TOKENS = 64
# On a warm disk cache, without reading weights.
MOST_SECONDS = 10.0
# A process that hangs is ended: it would go on using the device when the step is over.
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
    seconds = later["import_seconds"] + later["first_seconds"]
    late = f"the first encode of a fresh process took {seconds:.1f} s; at most {MOST_SECONDS:.0f} are asked for"
    return {"times": found, "seconds": round(seconds, 2), "wrong": [late] if seconds > MOST_SECONDS else []}


def in_a_fresh_process(model: str, device: str, record_at: int) -> dict[str, float]:
    """Seconds of importing, of the first encode and of the second, in a process of its own.

    Raises:
        RuntimeError: the process failed, with the last line that it wrote; or it is late.
    """
    command = [sys.executable, "-m", __name__, model, device, str(record_at)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"a fresh process had not encoded after {_PATIENCE:.0f} seconds") from error
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return times


def measured(model: str, device_name: str, record_at: int, started: float) -> dict[str, float]:
    """As :func:`in_a_fresh_process`, in this process, which was ``started`` then; on a CPU the modules encode."""
    import torch

    from nai_t5_core.backends.cuda.runner import CudaRunner
    from nai_t5_core.bench.clock import synchronize
    from nai_t5_core.bench.doctor.model import model_of

    imported = time.perf_counter()
    device = torch.device(device_name)
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
        times.append(round(time.perf_counter() - begun, 3))
    return {"import_seconds": round(imported - started, 3), "first_seconds": times[0], "second_seconds": times[1]}


if __name__ == "__main__":
    began = time.perf_counter()
    print(json.dumps(measured(sys.argv[1], sys.argv[2], int(sys.argv[3]), began)))
