"""Caption sets in trainers' files: names and contents as their readers want them.

``upstream_trainers.py`` calls these readers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow")

import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.torch import load_file
from toy_captions import captions, made, order, planned, with_a_damaged_row, write_captions
from toy_clip import write_clip

from nai_t5_core.cli import app
from nai_t5_core.datasets.exports import FORMATS, export
from nai_t5_core.datasets.exports.clip import ClipEncoder
from nai_t5_core.datasets.reading import EmbeddingDataset
from nai_t5_core.datasets.recipe import Feeding
from nai_t5_core.weights.examine import find_tokenizer_for

TEXTS = {"img/fox.png": "a red fox", "img/dogs.v2": "two old dogs sleep in warm snow"}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EmbeddingDataset]:
    place = tmp_path_factory.mktemp("sets")
    file = write_captions(place / "a.jsonl", TEXTS)
    families = ("wan", "pixart-sigma", "ltx-condition", "ltx-video", "auraflow", "flux", "sd3", "chroma")
    return {family: EmbeddingDataset(made(order(family), place / family, file).path) for family in families}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    pytest.importorskip("transformers")
    return {
        family: write_clip(tmp_path_factory.mktemp(f"clip-{family}"), both=family == "sd3")
        for family in ("flux", "sd3")
    }


def padded(dataset: EmbeddingDataset, name: str) -> torch.Tensor:
    return dataset.batch([name], pad_to=dataset.plan.recipe.feeding.max_length)[0][0]


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_musubi_wan(sets: dict[str, EmbeddingDataset], tmp_path: Path) -> None:
    assert export(sets["wan"].folder.path, "musubi-wan", tmp_path) == 2
    assert names(tmp_path) == {"fox_wan_te.safetensors", "dogs.v2_wan_te.safetensors"}
    with safe_open(tmp_path / "fox_wan_te.safetensors", "pt") as file:
        assert file.metadata() == {"architecture": "wan", "caption1": "a red fox", "format_version": "1.0.1"}
        assert file.get_tensor("varlen_t5_bfloat16").equal(sets["wan"]["img/fox.png"][0])


def test_fastvideo(sets: dict[str, EmbeddingDataset], tmp_path: Path) -> None:
    export(sets["wan"].folder.path, "fastvideo", tmp_path)
    (file,) = tmp_path.iterdir()
    rows = pq.read_table(file).to_pylist()
    assert {row["id"]: row["caption"] for row in rows} == TEXTS
    for row in rows:
        states = torch.frombuffer(bytearray(row["text_embedding_bytes"]), dtype=torch.float32)
        assert row["text_embedding_dtype"] == "float32"
        assert states.view(row["text_embedding_shape"]).equal(sets["wan"][row["id"]][0].float())


def test_pixart(sets: dict[str, EmbeddingDataset], tmp_path: Path) -> None:
    export(sets["pixart-sigma"].folder.path, "pixart", tmp_path)
    assert names(tmp_path) == {"img_fox.npz", "img_dogs.v2.npz"}
    read = np.load(tmp_path / "img_fox.npz")
    states, count = sets["pixart-sigma"]["img/fox.png"]
    assert read["caption_feature"].shape == (1, 300, 128) and read["caption_feature"].dtype == np.float16
    assert read["attention_mask"].shape == (1, 300) and read["attention_mask"].sum() == count
    assert torch.from_numpy(read["caption_feature"][0, :count]).equal(states.half())


def test_ltx(sets: dict[str, EmbeddingDataset], tmp_path: Path) -> None:
    export(sets["ltx-condition"].folder.path, "ltx", tmp_path)
    places = {".precomputed/conditions/img/fox.pt", ".precomputed/conditions/img/dogs.v2.pt"}
    assert names(tmp_path) == places
    read = torch.load(tmp_path / ".precomputed/conditions/img/fox.pt", weights_only=True)
    assert read["prompt_embeds"].equal(padded(sets["ltx-condition"], "img/fox.png"))
    assert read["prompt_attention_mask"].sum() == sets["ltx-condition"]["img/fox.png"][1]


SIMPLETUNER = {
    "wan": ("wan", {"prompt_embeds": [1, 512, 128], "attention_masks": [1, 512]}),
    "pixart-sigma": ("pixart_sigma", {"prompt_embeds": [1, 300, 128], "attention_mask": [300]}),
    "ltx-video": ("ltxvideo", {"prompt_embeds": [1, 128, 128], "attention_masks": [1, 128]}),
    "auraflow": ("auraflow", {"prompt_embeds": [1, 256, 128], "prompt_attention_mask": [1, 256]}),
    "flux": (
        "flux",
        {
            "prompt_embeds": [1, 512, 128],
            "pooled_prompt_embeds": [32],
            "time_ids": [1, 512, 3],
            "attention_masks": [1, 512],
        },
    ),
    "chroma": ("chroma", {"prompt_embeds": [1, 512, 128], "attention_masks": [1, 512]}),
    "sd3": ("sd3", {"prompt_embeds": [1, 77 + 256, 128], "pooled_prompt_embeds": [56]}),
}


@pytest.mark.parametrize("family", SIMPLETUNER)
def test_simpletuner(family: str, sets: dict[str, EmbeddingDataset], clips: dict[str, str], tmp_path: Path) -> None:
    export(sets[family].folder.path, "simpletuner", tmp_path, clips.get(family))
    named, shapes = SIMPLETUNER[family]
    assert names(tmp_path) == {f"{hashlib.md5(text.encode()).hexdigest()}-{named}.pt" for text in TEXTS.values()}
    read = torch.load(tmp_path / f"{hashlib.md5(b'a red fox').hexdigest()}-{named}.pt", weights_only=True)
    assert {name: list(tensor.shape) for name, tensor in read.items()} == shapes
    assert read["prompt_embeds"][0, -sets[family].plan.recipe.feeding.max_length :].equal(
        padded(sets[family], "img/fox.png")
    )


# By its own code, from the caption and the name of the architecture.
AI_TOOLKIT = {None: "wcwfzVlhmfDayEBbWYIg8A", "wan22_5b": "bK4oiBZDv2lIYhVlAOqxSg"}


@pytest.mark.parametrize("arch", AI_TOOLKIT)
def test_ai_toolkit(arch: str | None, sets: dict[str, EmbeddingDataset], tmp_path: Path) -> None:
    export(sets["wan"].folder.path, "ai-toolkit", tmp_path, space=arch)
    file = tmp_path / "img" / "_t_e_cache" / f"fox_{AI_TOOLKIT[arch]}.safetensors"
    assert load_file(file)["text_embed"].equal(padded(sets["wan"], "img/fox.png")[None])


def test_sd_scripts_flux(sets: dict[str, EmbeddingDataset], clips: dict[str, str], tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    export(sets["flux"].folder.path, "sd-scripts-flux", tmp_path, clips["flux"])
    assert names(tmp_path) == {"img/fox_flux_te.npz", "img/dogs.v2_flux_te.npz"}
    read = np.load(tmp_path / "img/fox_flux_te.npz")
    assert torch.from_numpy(read["t5_out"]).equal(padded(sets["flux"], "img/fox.png").float())
    assert (read["txt_ids"] == 0).all() and read["txt_ids"].shape == (512, 3)
    assert read["t5_attn_mask"].sum() == sets["flux"]["img/fox.png"][1] and read["t5_attn_mask"].dtype == np.int64
    assert not read["apply_t5_attn_mask"]
    model = CLIPTextModel.from_pretrained(clips["flux"], subfolder="text_encoder").eval()
    tokenizer = ClipEncoder(clips["flux"], both=False)._parts[0][0]
    tokens = tokenizer("a red fox", padding="max_length", max_length=77, return_tensors="pt").input_ids
    torch.testing.assert_close(torch.from_numpy(read["l_pooled"]), model(tokens).pooler_output[0].detach())


def test_sd_scripts_flux_of_chroma(sets: dict[str, EmbeddingDataset], tmp_path: Path) -> None:
    """It has no CLIP; its mask is the tokenizer's, and the model reads one pad more by itself."""
    export(sets["chroma"].folder.path, "sd-scripts-flux", tmp_path)
    assert names(tmp_path) == {"img/fox_flux_te.npz", "img/dogs.v2_flux_te.npz"}
    read = np.load(tmp_path / "img/fox_flux_te.npz")
    assert torch.from_numpy(read["t5_out"]).equal(padded(sets["chroma"], "img/fox.png").float())
    assert read["apply_t5_attn_mask"] and read["t5_attn_mask"].sum() == sets["chroma"]["img/fox.png"][1] - 1
    assert read["l_pooled"].shape == (77, 1) and not read["l_pooled"].any()


@pytest.mark.parametrize("words", [1, 509, 510, 511, 600])
def test_chromas_masks_at_its_full_length(words: int, tmp_path: Path) -> None:
    """Where a prompt and the pad behind it fill the length, or are cut, the two masks still differ as they should."""
    token = next(word for word in ("a", "fox", "the") if find_tokenizer_for(None).count(f"{word} {word}") == 3)
    file = write_captions(tmp_path / "a.jsonl", {"x": " ".join([token] * words)})
    folder = made(order("chroma"), tmp_path / "set", file).path
    tokens = min(words + 1, 512)
    assert (
        EmbeddingDataset(folder)["x"][1] == min(tokens + 1, 512) and EmbeddingDataset(folder).token_count("x") == tokens
    )
    for to, counted in (("simpletuner", min(tokens + 1, 512)), ("sd-scripts-flux", tokens)):
        export(folder, to, tmp_path / to)
        (written,) = (tmp_path / to).iterdir()
        if to == "simpletuner":
            mask = torch.load(written, weights_only=True)["attention_masks"]
        else:
            mask = torch.from_numpy(np.load(written)["t5_attn_mask"])
        assert mask.sum() == counted


def test_sd_scripts_sd3(sets: dict[str, EmbeddingDataset], clips: dict[str, str], tmp_path: Path) -> None:
    export(sets["sd3"].folder.path, "sd-scripts-sd3", tmp_path, clips["sd3"])
    read = np.load(tmp_path / "img/fox_sd3_te.npz")
    # The sizes of the toys: 32 of the first CLIP, 24 of the second.
    assert read["lg_out"].shape == (77, 56) and read["lg_pooled"].shape == (56,)
    assert read["clip_l_attn_mask"].shape == read["clip_g_attn_mask"].shape == (77,)
    assert read["t5_out"].shape == (256, 128)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another family": ("wan", {"to": "pixart"}, "pixart is for pixart-alpha, pixart-sigma, and this set is of wan"),
    "no such format": ("wan", {"to": "musubi"}, "unknown format 'musubi'; allowed: musubi-wan, fastvideo"),
    "no CLIP": ("flux", {"to": "sd-scripts-flux"}, "holds CLIP's embeddings as well; give --clip PIPELINE"),
    "CLIP that nothing reads": ("wan", {"to": "musubi-wan", "clip": "x"}, "holds no embeddings of CLIP; leave --clip"),
    "no such CLIP": ("flux", {"to": "sd-scripts-flux", "clip": "/nowhere"}, "CLIP cannot be loaded from /nowhere"),
    "an architecture": ("wan", {"to": "musubi-wan", "space": "x"}, "leave --arch out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused(case: str, sets: dict[str, EmbeddingDataset], tmp_path: Path) -> None:
    family, given, expected = REFUSED[case]
    if given.get("clip") == "/nowhere":
        pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=expected):
        export(sets[family].folder.path, out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"a/x.png": "one", "b/x.png": "two"}, "the ids 'a/x.png' and 'b/x.png' would both get the file x_wan_te"),
        ({"../x": "one"}, r"the id '../x' is no path within the folder"),
        ({"/etc/x": "one"}, r"the id '/etc/x' is no path within the folder"),
    ],
)
def test_ids_that_are_no_names_of_files_are_refused(texts: dict[str, str], expected: str, tmp_path: Path) -> None:
    folder = made(order(), tmp_path / "set", write_captions(tmp_path / "a.jsonl", texts)).path
    to = "musubi-wan" if "b/x.png" in texts else "ai-toolkit"
    with pytest.raises(ValueError, match=expected):
        export(folder, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_padding_is_refused(tmp_path: Path) -> None:
    other = replace(order(), feeding=Feeding.choose("wan", padding="attend"))
    folder = made(other, tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS)).path
    with pytest.raises(ValueError, match="reads sets of wan with padding skip or trim, and this one has attend"):
        export(folder, "musubi-wan", tmp_path / "out")


LENGTHS = {
    ("wan", "ai-toolkit"): 512,
    ("wan", "simpletuner"): 512,
    ("pixart-sigma", "pixart"): 300,
    ("ltx-condition", "ltx"): 256,
    ("wan", "musubi-wan"): None,
    ("wan", "fastvideo"): None,
}


@pytest.mark.parametrize(("family", "to"), LENGTHS)
def test_padded_files_have_the_trainers_length(family: str, to: str, tmp_path: Path) -> None:
    other = replace(order(), feeding=Feeding.choose(family, max_length=100))
    folder = made(other, tmp_path / "set", write_captions(tmp_path / "a.jsonl", TEXTS)).path
    own = LENGTHS[family, to]
    if own is None:
        assert export(folder, to, tmp_path / "out") == 2
        return
    with pytest.raises(ValueError, match=f"{to} pads captions of {family} to {own} tokens, and .* --max-length 100;"):
        export(folder, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_set_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    folder = made(order(), tmp_path / "set", write_captions(tmp_path / "a.jsonl", captions(5))).path
    planned(order(), folder, write_captions(tmp_path / "b.jsonl", TEXTS))
    with pytest.raises(ValueError, match="1 of 7 samples are not encoded yet"):
        export(folder, "musubi-wan", tmp_path / "out")


def test_a_set_with_failures_is_refused(tmp_path: Path) -> None:
    encoder, word = with_a_damaged_row(tmp_path)
    file = write_captions(tmp_path / "a.jsonl", {"good": "two dogs", "bad": word})
    folder = made(order(encoder=encoder), tmp_path / "set", file).path
    with pytest.raises(ValueError, match="1 of 2 samples have failed; nai-t5 precompute status lists them"):
        export(folder, "musubi-wan", tmp_path / "out")


def test_the_command_knows_every_format(
    sets: dict[str, EmbeddingDataset], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app(
        ["export", str(sets["wan"].folder.path), "--to", "musubi-wan", "--out", str(tmp_path), "--json"],
        standalone_mode=False,
    )
    assert json.loads(capsys.readouterr().out) == {"samples": 2, "out": str(tmp_path)}
    app(["export", "--help"], standalone_mode=False)
    told = capsys.readouterr().out
    assert all(name in told for name in FORMATS)
