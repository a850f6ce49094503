"""Imports point one way: a file imports only from its own row of the design, or from a lower one."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "nai_t5_core"

ROWS = [
    # 0: no torch
    "config inferred_config families prompt_chunks scales text_cleaning tokenizer",
    # 1: what a processor computes
    "kernels",
    # 2: mathematics
    "layers fixed_weights attention kernel_block attention_choice flex packing encoder_block encoder "
    "decoder_attention decoder compile_limit model compiled_steps decoding token_scores generation_options beam_search "
    "generation t5",
    # 3: weights
    "shards pytorch_files formats quantised keymaps neighbours fuse precision hub native examine load conversion "
    "maxima plain_twin guard scales_file lora_changes lora_merge lora_keys lora_files lora_set lora",
    # 4: use
    "optimize packed_block lent_block int8_linear int8_block int8 compiled sharding lora_tables lora_live "
    "generation_guard "
    "calibration_report calibrate stress "
    "cuda text_encoder textual_inversion peers comfyui_peer parity parity_report decoder_peers decoder_parity "
    "bench roofline doctor cli row_memory hf_keywords hf_weights hf diffusers_adapter diffusers_outputs "
    "diffusers_requests diffusers_prompts training",
]
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names.split()}


def _modules() -> list[Path]:
    """The files of the package, and of the folders in it that hold code."""
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def _name(path: Path) -> str:
    """What a file belongs to: a folder of code counts as one module."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            parts = (node.module or "").split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return names


def test_every_module_has_a_row() -> None:
    assert {_name(path) for path in _modules()} == set(ROW_OF)


def test_imports_point_down() -> None:
    wrong = [
        f"{_name(path)} imports {name}"
        for path in _modules()
        for name in _imports_of(path)
        if ROW_OF[name] > ROW_OF[_name(path)]
    ]
    assert wrong == []


def test_model_files_hold_mathematics_only() -> None:
    forbidden = {"os", "pathlib", "json", "logging", "safetensors", "huggingface_hub", "warnings"}
    for name in ROWS[2].split():
        tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
        imported = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & forbidden, name


def test_the_ground_and_the_command_need_no_torch() -> None:
    modules = [f"nai_t5_core.{name}" for name in ROWS[0].split()] + ["nai_t5_core", "nai_t5_core.cli"]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
