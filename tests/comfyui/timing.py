"""Times ComfyUI's own T5 and ours, and prints Markdown. ComfyUI's requirements must be installed.

    COMFYUI_PATH=… PYTHONPATH=.:tests python tests/comfyui/timing.py modules
    COMFYUI_PATH=… PYTHONPATH=.:tests python tests/comfyui/timing.py server
    COMFYUI_PATH=… PYTHONPATH=.:tests python tests/comfyui/timing.py card

``modules``: what CLIP Text Encode computes, at T5-large size, both in one process and in turn. ``server``: whole nodes
in a running server, with files of the sizes that Stable Audio and ACE-Step have; needs websocket-client.
``card``: both in newer ComfyUI's dynamic memory, on an NVIDIA card and in turn.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from timing_card import HEAD, allocate_as_comfyui, time_on_card
from timing_modules import CASES, time_case
from timing_server import SIZES, WAYS, time_way

from nai_t5_core.facts.config import named_config


def modules(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    config = named_config(options.size).encoder_only()
    stored = getattr(torch, options.file)
    print("| | length | stock | ours | times faster | each prompt | difference |\n|---|---|---|---|---|---|---|")
    for name in options.only or CASES:
        with tempfile.TemporaryDirectory() as folder:
            result = time_case(CASES[name], config, Path(folder), options.rounds, options.layout, stored)
        print(f"| {CASES[name].title} | {CASES[name].length} | {result.cells()} |", flush=True)


def server(options: argparse.Namespace) -> None:
    print(
        "| | load | first encode | encode after an edit | resident before | at its peak |\n|---|---|---|---|---|---|",
    )
    for size in options.only or SIZES:
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                result = time_way(Path(os.environ["COMFYUI_PATH"]), Path(folder), SIZES[size], way, options.rounds)
            print(f"| {SIZES[size].title}, {way} | {result.cells()} |", flush=True)


def card(options: argparse.Namespace) -> None:
    allocate_as_comfyui()
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    with tempfile.TemporaryDirectory() as folder:
        for line in time_on_card(named_config(options.size).encoder_only(), Path(folder), options.rounds):
            print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command, names in ((modules, CASES), (server, SIZES)):
        one = commands.add_parser(command.__name__)
        one.set_defaults(command=command)
        one.add_argument("--only", nargs="+", choices=names, help="not all of them")
        one.add_argument("--rounds", type=int, default=5, help="that count, for each prompt")
        if command is modules:
            one.add_argument("--threads", type=int, default=2)
            one.add_argument("--layout", default="auto", help="of ours: auto, packed or int8")
            one.add_argument("--file", default="float16", choices=("float16", "float8_e4m3fn"), help="its dtype")
            one.add_argument("--size", default="t5-v1_1-large", help="width, depth and heads")
    one = commands.add_parser("card")
    one.set_defaults(command=card)
    one.add_argument("--rounds", type=int, default=20, help="that count, for each prompt")
    one.add_argument("--size", default="t5-v1_1-xl", help="of the T5")
    options = parser.parse_args()
    if "COMFYUI_PATH" not in os.environ:
        parser.error("COMFYUI_PATH is not set: give a ComfyUI checkout")
    options.command(options)


if __name__ == "__main__":
    main()
