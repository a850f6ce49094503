"""Loading, measured in fresh processes: time from process start to the first embedding, and peak memory.

Child processes run the code below with ``python -c`` and print one line of JSON. The files have just been written and
are in the system's page cache, so that the program is measured and not the disk.
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nai_t5_core.backends.choose import why_not_prepack
from nai_t5_core.bench.children import START, run_child
from nai_t5_core.bench.peers import State
from nai_t5_core.bench.speed.results import ColdStart, LoadingReport, LoadMemory, Spread
from nai_t5_core.facts.config import T5Config, config_to_hf
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.layers import NoInit
from nai_t5_core.weights.convert import convert
from nai_t5_core.weights.formats import write_safetensors
from nai_t5_core.weights.fuse import fused_recipes

PEAK_FACTOR = 1.15
_TOKENS = 32
_MEMORY_RUNS = 3
_IMPORT_TORCH = "import torch"
_TINY = T5Config(vocab_size=8, d_model=8, d_kv=8, d_ff=8, num_heads=1, num_layers=1)
_METHODS = {
    True: "VmHWM, reset before the load, minus the resident size then",
    False: "ru_maxrss, which cannot be reset here, minus the resident size before the load: a peak below that of the "
    "imports does not show",
}

_DONE = """
print("{}", flush=True)
"""

_OWN = """
import nai_t5_core.prompts.text_encoder
from nai_t5_core.weights.load import load_encoder
from nai_t5_core.backends.choose import why_not_prepack, prepack

def load():
    stack = load_encoder(arguments["source"], arguments["dtype"], "cpu")
    return prepack(stack) if arguments["prepack"] and why_not_prepack(stack) is None else stack

def embed(model):
    return model(ids)
"""

_TRANSFORMERS = """
import transformers
model_class = getattr(transformers, arguments["architecture"])
keyword = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"

def load():
    return model_class.from_pretrained(arguments["source"], **{keyword: getattr(torch, arguments["dtype"])})

def embed(model):
    return model(input_ids=ids).last_hidden_state
"""

_TIMED = """
imported = time.perf_counter()
model = load()
loaded = time.perf_counter()
with torch.no_grad():
    embed(model).float().sum().item()
done = time.perf_counter()
print(json.dumps({"imports": imported - started, "load": loaded - imported, "first": done - loaded}), flush=True)
"""

# Anonymous memory has no high-water mark of its own, so a thread looks at it every millisecond.
_WEIGHED = """
import resource, threading
from pathlib import Path

def resident():
    pages = [int(field) for field in Path("/proc/self/statm").read_text().split()]
    return pages[1] * resource.getpagesize(), (pages[1] - pages[2]) * resource.getpagesize()

def high_water():
    if not can_reset:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

def watch():
    while True:
        highest[0] = max(highest[0], resident()[1])
        time.sleep(0.001)

def peaks():
    return {"peak": high_water() - before, "anonymous": max(highest[0], resident()[1]) - anonymous_before}

# What the first product sets up once (threads, kernels) is no part of the weights.
small = torch.ones(64, 64, dtype=getattr(torch, arguments["dtype"]))
torch.nn.functional.linear(small, small)
try:
    Path("/proc/self/clear_refs").write_text("5")
    can_reset = True
except OSError:
    can_reset = False
before, anonymous_before = resident()
highest = [0]
threading.Thread(target=watch, daemon=True).start()
model = load()
at_load = peaks()
with torch.no_grad():
    embed(model).float().sum().item()
print(json.dumps({"load": at_load, "first": peaks(), "can_reset": can_reset}), flush=True)
"""


@dataclass(frozen=True)
class _Contender:
    """A way to load: code that defines ``load`` and ``embed``, and its arguments."""

    name: str
    code: str
    arguments: dict[str, Any]
    is_timed: bool = True


def measure_loading(
    config: T5Config,
    state: State,
    dtype: torch.dtype,
    threads: int | None = None,
    repeats: int = 5,
    progress: Callable[[str], None] | None = None,
) -> LoadingReport:
    """Writes the weights to a temporary folder, in the Hugging Face layout and converted, and loads them on the CPU.

    Contenders take turns, after one round that does not count. transformers takes part where it is installed.

    Raises:
        CheckpointError: the disk has too little room.
        RuntimeError: a child process failed; the message has the end of its output.
    """
    tell = progress or (lambda _: None)
    config = config.encoder_only()
    starts: dict[str, list[dict[str, float]]] = {}
    weighed: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="nai-t5-bench-") as folder:
        tell("writing the weights")
        contenders = _contenders(Path(folder), config, state, dtype, threads)
        alone = _Contender(_IMPORT_TORCH, "", {"threads": threads, "ids": []})
        for number in range(repeats + 1):
            tell(f"cold starts, round {number} of {repeats}")
            for item in [alone, *(item for item in contenders if item.is_timed)]:
                measured = run_child(START + item.code + (_TIMED if item.code else _DONE), item.arguments)
                starts.setdefault(item.name, []).append(measured)
        for number in range(_MEMORY_RUNS if Path("/proc/self/statm").exists() else 0):
            tell(f"memory, round {number + 1} of {_MEMORY_RUNS}")
            for item in contenders:
                weighed.setdefault(item.name, []).append(run_child(START + item.code + _WEIGHED, item.arguments))
    return _report(config, dtype, {name: runs[1:] for name, runs in starts.items()}, weighed)


def _contenders(
    folder: Path, config: T5Config, state: State, dtype: torch.dtype, threads: int | None
) -> list[_Contender]:
    """Writes the files, and lists which contender loads which file."""
    converted = folder / "converted.safetensors"
    hf = _write_hf_folder(folder / "hf", config, state, dtype)
    convert(hf, converted)
    ids = [2 + index % (config.vocab_size - 2) for index in range(_TOKENS)]
    common = {"threads": threads, "ids": ids, "dtype": str(dtype).removeprefix("torch.")}
    packs = why_not_prepack(T5EncoderStack(_TINY, ops=NoInit, device="cpu", dtype=dtype)) is None
    contenders = []
    for title, source in (("converted file", converted), ("Hugging Face folder", hf)):
        arguments = {**common, "source": str(source)}
        for prepacks in (True, False) if packs else (False,):
            name = f"comfy-nai-t5, {title}{', not prepacked' if packs and not prepacks else ''}"
            contenders.append(_Contender(name, _OWN, {**arguments, "prepack": prepacks}, prepacks or not packs))
    if importlib.util.find_spec("transformers") is not None:
        architecture = config_to_hf(config)["architectures"][0]
        arguments = {**common, "source": str(hf), "architecture": architecture}
        contenders.append(_Contender("transformers", _TRANSFORMERS, arguments))
    return contenders


def _write_hf_folder(folder: Path, config: T5Config, state: State, dtype: torch.dtype) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)), encoding="utf-8")
    layout = {name: (dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    tensors = ((name, tensor.to(dtype)) for name, tensor in state.items())
    write_safetensors(folder / "model.safetensors", layout, tensors, {"format": "pt"})
    return folder


def _report(
    config: T5Config,
    dtype: torch.dtype,
    starts: dict[str, list[dict[str, float]]],
    weighed: dict[str, list[dict[str, Any]]],
) -> LoadingReport:
    recipes = fused_recipes(config)
    weights = sum(recipe.dtype(dtype).itemsize * math.prod(recipe.shape) for recipe in recipes)
    work_space = 4 * max(math.prod(recipe.shape) for recipe in recipes if recipe.norm is not None)
    limit = int(PEAK_FACTOR * weights) + work_space
    can_reset = all(run["can_reset"] for runs in weighed.values() for run in runs)
    imports = Spread.of([run["total"] for run in starts.pop(_IMPORT_TORCH)])
    cold_starts = tuple(
        ColdStart(
            name,
            Spread.of([run["total"] for run in runs]),
            {phase: statistics.median(run[phase] for run in runs) for phase in ("imports", "load", "first")},
        )
        for name, runs in starts.items()
    )
    memory = tuple(LoadMemory(name, **_median_peaks(runs), limit=limit) for name, runs in weighed.items())
    return LoadingReport(imports, cold_starts, memory, _METHODS[can_reset] if memory else "", weights, work_space)


def _median_peaks(runs: list[dict[str, Any]]) -> dict[str, int]:
    return {
        f"{figure}{suffix}": int(statistics.median(run[moment][figure] for run in runs))
        for moment, suffix in (("load", ""), ("first", "_first"))
        for figure in ("peak", "anonymous")
    }
