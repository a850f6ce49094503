"""What of the node pack can be tested without ComfyUI."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import spiece_tensor

from comfy_nai_t5.checkpoint import read_checkpoint, sentencepiece_tensor
from comfy_nai_t5.embeddings import describe, load_conditioning, save_conditioning, save_core_conditioning
from comfy_nai_t5.encode import encode, encode_lines, tokenize
from comfy_nai_t5.families import FAMILIES, JOINT_FAMILIES, check_joint, family_for, server_config
from comfy_nai_t5.report import precision_report
from nai_t5_core.facts.config import config_from_hf, named_config

ROOT = Path(__file__).parent.parent
PACK = ROOT / "comfy_nai_t5"
NODES = re.findall(r'node_id="(\w+)"', (PACK / "nodes.py").read_text(encoding="utf-8"))


def imports_of(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The pack as ComfyUI finds it
# ---------------------------------------------------------------------------------------------------------------------


def test_the_library_does_not_know_the_pack() -> None:
    for path in (ROOT / "nai_t5_core").rglob("*.py"):
        assert not imports_of(path) & {"comfy_nai_t5", "comfy", "comfy_api", "folder_paths"}, path


def test_importing_the_root_imports_nothing() -> None:
    code = (
        "import importlib.util, sys; before = set(sys.modules)\n"
        f"spec = importlib.util.spec_from_file_location('/a/custom_nodes/pack', {str(ROOT / '__init__.py')!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert callable(module.comfy_entrypoint)\n"
        "sys.exit(any(name.split('.')[0] in ('torch', 'comfy_nai_t5', 'nai_t5_core') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd="/", check=False).returncode == 0


def test_every_node_has_a_help_page_and_no_page_is_left_over() -> None:
    assert len(NODES) == len(set(NODES)) == 9
    web = re.search(r'WEB_DIRECTORY = "(.*)"', (ROOT / "__init__.py").read_text(encoding="utf-8"))
    assert web is not None
    assert {page.stem for page in (ROOT / web[1] / "docs").glob("*.md")} == set(NODES)


def test_requirements_are_what_the_nodes_need_and_leave_torch_alone() -> None:
    """Those of the library but for its command line's, and what plots the precision report."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {line for line in lines if line and not line.startswith("#")}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    core, plot = (
        re.search(rf"^{name} = \[(.*?)\]", project, re.MULTILINE | re.DOTALL) for name in ("dependencies", "plot")
    )
    assert core is not None and plot is not None
    wanted = set(re.findall(r'"(.+?)"', core[1] + plot[1]))
    assert required == {line for line in wanted if not line.startswith(("torch", "typer", "tomli"))}


# ---------------------------------------------------------------------------------------------------------------------
# Families
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "family"),
    [
        ("t5-11b", "cosmos"),
        ("t5-base", "stable_audio"),
        ("umt5-xxl", "wan"),
        ("umt5-base", "ace"),
        ("pile-t5-xl", "auraflow"),
        ("byt5-small", "t5"),
        ("t5-v1_1-small", "t5"),
    ],
)
def test_a_family_is_known_by_its_t5(size: str, family: str) -> None:
    assert family_for(named_config(size)).name == family


def test_menus_keep_their_order() -> None:
    """A workflow keeps what was chosen by name; a new node gets the first."""
    alone = ["pixart", "chroma", "ltxv", "mochi", "cogvideox", "cosmos", "wan", "auraflow", "stable_audio", "ace"]
    assert [name for name in FAMILIES if name in (*alone, "t5")] == [*alone, "t5"] and [*FAMILIES][-1] == "t5"
    assert [name for name in JOINT_FAMILIES if name in ("flux", "sd3", "hidream")] == ["flux", "sd3", "hidream"]


def test_xxl_is_the_encoder_of_several() -> None:
    with pytest.raises(ValueError, match="several families; choose one of pixart, chroma, ltxv, mochi, cogvideox"):
        family_for(named_config("t5-v1_1-xxl"))
    assert family_for(named_config("t5-v1_1-xxl"), "mochi").name == "mochi"


def test_a_t5_that_a_family_cannot_use() -> None:
    with pytest.raises(ValueError, match=r"Wan was trained with a UMT5 of width 4096; this file holds a T5 v1\.0"):
        family_for(named_config("t5-base"), "wan")
    with pytest.raises(ValueError, match="unknown family 'sana'; known: auto, pixart"):
        family_for(named_config("t5-base"), "sana")
    assert family_for(named_config("t5-base"), "t5") is FAMILIES["t5"]


def test_files_of_families_with_several_encoders() -> None:
    xxl = named_config("t5-v1_1-xxl")
    for family, files in (("flux", 2), ("sd3", 3), ("hidream", 4)):
        check_joint(family, files, xxl)
    with pytest.raises(ValueError, match="hidream takes 1 or 2 or 4 text encoder files and 3 were given"):
        check_joint("hidream", 3, xxl)
    with pytest.raises(ValueError, match="none of these files holds a T5"):
        check_joint("flux", 2, None)
    with pytest.raises(ValueError, match=r"sd3 was trained with a T5 v1\.1, and this file holds a UMT5"):
        check_joint("sd3", 1, named_config("umt5-xxl"))


def test_a_server_that_is_too_old_for_a_family() -> None:
    # There is no ComfyUI here at all.
    if "comfy" not in sys.modules:
        with pytest.raises(ValueError, match="does not know Mochi; update it"):
            FAMILIES["mochi"].classes()


def test_sizes_in_comfyui_words() -> None:
    words = server_config(named_config("umt5-xxl"))
    assert words["model_type"] == "umt5" and words["is_gated_act"] and words["d_ff"] == 10240
    assert server_config(named_config("t5-base"))["dense_act_fn"] == "relu"
    assert config_from_hf({**words, "feed_forward_proj": "gated-gelu"}).bias_per_layer


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_the_embedded_checkpoint() -> None:
    checkpoint = read_checkpoint(None)
    assert checkpoint.config.num_decoder_layers == 0 and checkpoint.state["shared.weight"].ndim == 2
    assert checkpoint.tokenizer is not None
    assert torch.equal(sentencepiece_tensor(checkpoint.tokenizer), spiece_tensor())


def test_conditioning_survives_its_file(tmp_path: Path) -> None:
    conditioning = [
        [torch.randn(2, 3, 4), {"pooled_output": None, "attention_mask": torch.ones(2, 3), "guidance": 3.5}],
        [torch.randn(1, 5, 4, dtype=torch.bfloat16), {"pooled_output": torch.randn(1, 8)}],
    ]
    path = save_conditioning(conditioning, tmp_path / "a" / "prompt.safetensors", note="ein Hund")
    loaded, facts = load_conditioning(path)
    assert facts == {"note": "ein Hund"}
    for (states, extras), (expected, wanted) in zip(loaded, conditioning, strict=True):
        assert torch.equal(states, expected) and states.dtype == expected.dtype
        assert extras.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(extras[name], value) if isinstance(value, torch.Tensor) else extras[name] == value
    assert describe(loaded) == "[2, 3, 4] float32, attention_mask [2, 3]\n[1, 5, 4] bfloat16, pooled_output [1, 8]"


def test_conditioning_survives_a_file_of_comfyuis_own_form(tmp_path: Path) -> None:
    from safetensors import safe_open

    extras = {
        "pooled_output": torch.randn(1, 8),
        "guidance": 3.5,
        "nothing": None,
        "references": [torch.randn(1, 2), torch.randn(1, 3)],
    }
    conditioning = [[torch.randn(1, 3, 4), extras]]
    path = save_core_conditioning(conditioning, tmp_path / "prompt.safetensors", note="ein Hund")
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"conditioning", "pooled_output", "references.0", "references.1"}
        assert json.loads(file.metadata()["conditioning_options"]) == {"guidance": 3.5, "nothing": None}
    ((states, loaded),), facts = load_conditioning(path)
    assert facts == {"note": "ein Hund"} and torch.equal(states, conditioning[0][0])
    assert loaded.keys() == extras.keys() and (loaded["guidance"], loaded["nothing"]) == (3.5, None)
    assert torch.equal(loaded["pooled_output"], extras["pooled_output"])
    assert all(torch.equal(*pair) for pair in zip(loaded["references"], extras["references"], strict=True))


@pytest.mark.parametrize(
    ("conditioning", "told"),
    [
        ([], "this conditioning has 0"),
        ([[torch.zeros(1, 1, 1), {}]] * 2, "this conditioning has 2"),
        ([[torch.zeros(1, 1, 1), {"hooks": object()}]], "cannot be written to a file"),
        ([[torch.zeros(1, 1, 1), {"conditioning": torch.zeros(1)}]], "is called 'conditioning' as well"),
    ],
)
def test_conditioning_that_comfyuis_own_form_cannot_hold(conditioning: list[Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        save_core_conditioning(conditioning, tmp_path / "x.safetensors")


def test_conditioning_that_no_file_can_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be written to a file"):
        save_conditioning([[torch.zeros(1, 1, 1), {"hooks": object()}]], tmp_path / "x.safetensors")


def test_files_that_hold_no_conditioning(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="written neither by Save T5 Embedding nor by Save Conditioning"):
        load_conditioning(tmp_path / "other.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read"):
        load_conditioning(tmp_path / "damaged.safetensors")


def test_the_precision_report() -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    pytest.importorskip("PIL", reason="the plot needs Pillow")
    seen: list[tuple[int, int]] = []
    table, image = precision_report(None, progress=lambda *step: seen.append(step))
    assert "scales" in table and seen[-1][0] == seen[-1][1] > 0
    assert image.ndim == 4 and image.shape[0] == 1 and image.shape[3] == 3
    assert 0 <= float(image.min()) < float(image.max()) <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Cutting and padding, on a CLIP that stands for ComfyUI's
# ---------------------------------------------------------------------------------------------------------------------


class WordTokenizer:
    """A token for every letter; the end token is 1, padding 0."""

    pad_token, end_token = 0, 1

    def __init__(self) -> None:
        self.tokenizer = self

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token) for token in ids)


class StandIn:
    """What of ComfyUI's CLIP is used: tokens of a T5 padded to 8 rows, and a conditioning made of them."""

    def __init__(self, name: str = "t5xxl") -> None:
        self.name = name
        self.tokenizer = type("Tokenizer", (), {f"clip_{name}": WordTokenizer()})()

    def tokenize(self, text: str) -> dict[str, Any]:
        pairs = [*((ord(letter), 1.0) for letter in text), (1, 1.0)]
        return {"l": "CLIP's", self.name: [pairs + [(0, 1.0)] * (8 - len(pairs))]}

    def encode_from_tokens_scheduled(self, tokens: dict[str, Any]) -> list[Any]:
        ids = torch.tensor([[float(token) for token, _ in tokens[self.name][0]]])
        return [[ids[..., None], {"attention_mask": (ids != 0).long(), "pooled_output": None}]]


def ids_of(tokens: Any) -> list[int]:
    return [token for token, _ in tokens.all["t5xxl"][0]]


def test_tokens_as_the_family_has_them() -> None:
    tokens = tokenize(StandIn(), "cat")
    assert (tokens.count, tokens.rows, tokens.cut_text) == (4, 8, "")
    assert ids_of(tokens) == [99, 97, 116, 1, 0, 0, 0, 0] and tokens.all["l"] == "CLIP's"


def test_cutting() -> None:
    tokens = tokenize(StandIn(), "abcdefghijkl", max_length=5)
    assert (tokens.count, tokens.cut_text) == (13, "efghijkl")
    assert ids_of(tokens) == [97, 98, 99, 100, 1, 0, 0, 0]  # the family's 8 rows
    assert ids_of(tokenize(StandIn(), "abcdefghijkl", max_length=5, pad_to=1)) == [97, 98, 99, 100, 1]
    assert tokenize(StandIn(), "abcdefghijkl", max_length=10).rows == 10
    assert tokenize(StandIn(), "abcd", max_length=5).cut_text == ""


@pytest.mark.parametrize(("pad_to", "rows"), [(3, 4), (4, 4), (6, 6), (20, 20)])
def test_padding(pad_to: int, rows: int) -> None:
    tokens = tokenize(StandIn(), "cat", pad_to=pad_to)
    assert tokens.rows == len(ids_of(tokens)) == rows and tokens.count == 4


def test_lines_become_a_batch() -> None:
    (entry,), tokens = encode_lines(StandIn(), ["cat", "a long line of text"])
    states, extras = entry
    assert states.shape == (2, 20, 1) and extras["attention_mask"].sum(dim=1).tolist() == [4, 20]
    assert extras["pooled_output"] is None and [each.count for each in tokens] == [4, 20]


def test_a_prompt_that_would_never_end() -> None:
    assert tokenize(StandIn(), "a" * 100_000).count == 100_001  # counted, as the node for that does
    with pytest.raises(ValueError, match="the prompt has 100,001 tokens, and 8,192 are the most that are c"):
        encode(StandIn(), "a" * 100_000)
    assert encode(StandIn(), "a" * 100_000, max_length=77)[1].rows == 77


def test_nothing_to_encode() -> None:
    with pytest.raises(ValueError, match="no line of text"):
        encode_lines(StandIn(), [])
    with pytest.raises(ValueError, match="tokens for l, g, and none for a T5"):
        tokenize(type("Clip", (), {"tokenize": lambda self, text: {"l": [], "g": []}})(), "cat")
