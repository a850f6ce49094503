"""Python in fresh processes, which print what they measured as one line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# The folder that the child was started in must not decide which modules it imports.
START = """
import json, sys, time
started = time.perf_counter()
arguments = json.loads(sys.argv[1])
sys.path = [path for path in sys.path if path]
if arguments["package"] not in sys.path:
    sys.path.insert(0, arguments["package"])
import torch
if arguments["threads"]:
    torch.set_num_threads(arguments["threads"])
ids = torch.tensor([arguments["ids"]], dtype=torch.long)
"""


def run_child(code: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the child printed, with ``total``: seconds from its start to that line."""
    arguments = {**arguments, "package": str(Path(__file__).resolve().parents[2])}
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    with tempfile.TemporaryFile("w+") as complaints:
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True, env=env) as child:
            assert child.stdout is not None
            line = child.stdout.readline()
            seconds = time.perf_counter() - started
        if child.returncode != 0 or not line:
            complaints.seek(0)
            raise RuntimeError(f"a benchmark process failed ({child.returncode}): {complaints.read()[-2000:]}")
    return {"total": seconds, **json.loads(line)}
