"""The nodes: a schema and a few lines onto the library each.

The library is imported when a node runs, so that the server does not wait for it when it starts.
"""

from __future__ import annotations

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.utils import ProgressBar
from comfy_api.latest import ComfyExtension, io, ui

from comfy_nai_t5 import embeddings, encode
from comfy_nai_t5.choices import DTYPES, WEIGHTS
from comfy_nai_t5.families import AUTO, FAMILIES, JOINT_FAMILIES

CATEGORY = "text encoders/T5"
EMBEDDED = "embedded tiny model (random weights, to try the nodes with)"
NONE = "none"
EMBEDDING_FOLDER = "t5_embeddings"

_DTYPE_TIP = (
    "What is computed in. auto: float16 on a GPU; on a CPU bfloat16 where it is fast, else float32. float16 is kept in "
    "range by scales, and nothing is clipped. ComfyUI's own T5 computes in float32."
)
_WEIGHTS_TIP = (
    "How the weights are kept in memory. auto: as computed in, unless the file's own form is smaller. file: as they "
    "are in the file. float8: half the memory of float16; each layer is cast as it is used. Scaled float8 files stay "
    "as they are whatever is chosen."
)


def _schema(**entries: Any) -> io.Schema:
    """A schema without the entries that an older server does not know."""
    known = {field.name for field in fields(io.Schema)}
    return io.Schema(category=CATEGORY, **{name: value for name, value in entries.items() if name in known})


def _files() -> list[str]:
    return list(folder_paths.get_filename_list("text_encoders"))


def _path(name: str) -> str | None:
    return None if name == EMBEDDED else str(folder_paths.get_full_path_or_raise("text_encoders", name))


def _devices() -> list[str]:
    return ["default", "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def _dtype_input() -> io.Combo.Input:
    return io.Combo.Input("dtype", options=list(DTYPES), default="auto", tooltip=_DTYPE_TIP)


def _load_inputs() -> list[Any]:
    tip = "Where the encoder runs. default: where ComfyUI puts text encoders."
    return [
        _dtype_input(),
        io.Combo.Input("weights", options=list(WEIGHTS), default="auto", tooltip=_WEIGHTS_TIP),
        io.Combo.Input("device", options=_devices(), default="default", optional=True, tooltip=tip),
    ]


class LoadT5(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            node_id="NAILoadT5",
            display_name="Load T5 (NAI)",
            description="Loads a T5 that is a model's only text encoder. Every node that takes a CLIP takes it.",
            search_aliases=["t5xxl", "umt5", "load clip", "text encoder loader"],
            inputs=[
                io.Combo.Input(
                    "t5_name",
                    options=[EMBEDDED, *_files()],
                    tooltip="A T5 of any kind, found by its content: T5 v1.0 and v1.1, FLAN, UMT5, Pile-T5, mT5, ByT5; "
                    "float32, float16, bfloat16, float8, scaled float8; one file or the first of its shards.",
                ),
                io.Combo.Input(
                    "family",
                    options=[AUTO, *FAMILIES],
                    default=AUTO,
                    tooltip="The diffusion model that reads the conditioning: decides on lengths, masks, padding. "
                    "auto: known by the T5 itself where only one family uses it. t5: none, without padding.",
                ),
                *_load_inputs(),
            ],
            outputs=[io.Clip.Output(display_name="CLIP")],
        )

    @classmethod
    def execute(cls, t5_name: str, family: str, dtype: str, weights: str, device: str = "default") -> io.NodeOutput:
        from comfy_nai_t5.loaders import load_t5

        return io.NodeOutput(load_t5(_path(t5_name), family, dtype, weights, device))


class LoadClipT5(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        others = [
            io.Combo.Input(name, options=[NONE, *_files()], default=NONE, tooltip=tip)
            for name, tip in (
                ("clip_l", "CLIP-L: Flux needs it; SD3 and HiDream may have it."),
                ("clip_g", "CLIP-G: for SD3 and HiDream."),
                ("llama", "Llama 3.1: for HiDream."),
            )
        ]
        return _schema(
            node_id="NAILoadClipT5",
            display_name="Load CLIP + T5 (NAI)",
            description="Loads the text encoders of Flux, SD3 or HiDream. Only the T5 is ours, the others ComfyUI's.",
            search_aliases=["dual clip loader", "triple clip loader", "flux", "sd3", "hidream", "t5xxl"],
            inputs=[
                io.Combo.Input("t5_name", options=_files(), tooltip="The T5 v1.1 XXL of the model, in any dtype."),
                io.Combo.Input("family", options=list(JOINT_FAMILIES), tooltip="The model they belong to."),
                *others,
                *_load_inputs(),
            ],
            outputs=[io.Clip.Output(display_name="CLIP")],
        )

    @classmethod
    def execute(
        cls,
        t5_name: str,
        family: str,
        clip_l: str,
        clip_g: str,
        llama: str,
        dtype: str,
        weights: str,
        device: str = "default",
    ) -> io.NodeOutput:
        from comfy_nai_t5.loaders import load_with_clip

        names = [name for name in (clip_l, clip_g, llama, t5_name) if name != NONE]
        paths = [str(folder_paths.get_full_path_or_raise("text_encoders", name)) for name in names]
        return io.NodeOutput(load_with_clip(paths, family, dtype, weights, device))


class ReplaceT5(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            node_id="NAIReplaceT5",
            display_name="Replace T5 (NAI)",
            description="Puts our encoder in the place of the T5 of a loaded CLIP, on the same weights: nothing is "
            "read or copied, and LoRA, offloading and float8 go on as they were.",
            search_aliases=["accelerate t5", "speed up text encoder", "t5xxl"],
            inputs=[io.Clip.Input("clip", tooltip="From any loader or checkpoint."), _dtype_input()],
            outputs=[io.Clip.Output(display_name="CLIP")],
        )

    @classmethod
    def execute(cls, clip: Any, dtype: str) -> io.NodeOutput:
        from comfy_nai_t5.clip import with_our_t5

        return io.NodeOutput(with_our_t5(clip, dtype))


def _text_inputs() -> list[Any]:
    return [
        io.Clip.Input("clip", tooltip="Any CLIP with a T5."),
        io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip="The prompt; (words:1.2) as usual."),
        io.Int.Input(
            "max_length",
            default=0,
            min=0,
            max=8192,
            tooltip="The most tokens for the T5, end token included; what is beyond is cut off and told. 0: no limit.",
        ),
    ]


class EncodeT5(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            node_id="NAIT5Encode",
            display_name="T5 Encode",
            description="Encodes a prompt as CLIP Text Encode does, and tells how many tokens it has and what was cut.",
            search_aliases=["clip text encode", "prompt", "t5 prompt"],
            inputs=[
                *_text_inputs(),
                io.Int.Input(
                    "pad_to",
                    default=0,
                    min=0,
                    max=8192,
                    tooltip="The fewest rows of the T5's part. 0: as many as the family has.",
                ),
                io.Boolean.Input(
                    "line_by_line",
                    default=False,
                    tooltip="Every line that is not empty is a prompt of its own; the conditioning is a batch.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="CONDITIONING"),
                io.Int.Output(display_name="tokens", tooltip="Tokens of the longest prompt, before cutting."),
                io.String.Output(display_name="cut off", tooltip="What max_length cut off; empty where nothing was."),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, text: str, max_length: int, pad_to: int, line_by_line: bool) -> io.NodeOutput:
        if line_by_line:
            lines = [line for line in text.splitlines() if line.strip()]
            conditioning, tokens = encode.encode_lines(clip, lines, max_length, pad_to)
        else:
            conditioning, one = encode.encode(clip, text, max_length, pad_to)
            tokens = [one]
        cut = "\n".join(each.cut_text for each in tokens if each.cut_text)
        return io.NodeOutput(conditioning, max(each.count for each in tokens), cut)


class CountTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            node_id="NAIT5TokenCount",
            display_name="T5 Token Count",
            description="Counts the tokens of a prompt without encoding it.",
            search_aliases=["token counter", "prompt length", "tokenize"],
            inputs=_text_inputs(),
            outputs=[
                io.Int.Output(display_name="tokens"),
                io.Int.Output(display_name="over", tooltip="How many tokens are beyond max_length; 0 where it fits."),
                io.String.Output(display_name="cut off"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, clip: Any, text: str, max_length: int) -> io.NodeOutput:
        tokens = encode.tokenize(clip, text, max_length)
        over = max(0, tokens.count - max_length) if max_length else 0
        told = f"{tokens.count} tokens, {tokens.rows} rows" + (f"; cut off: {tokens.cut_text}" if over else "")
        return io.NodeOutput(tokens.count, over, tokens.cut_text, ui=ui.PreviewText(told))


class ReportPrecision(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            node_id="NAIT5PrecisionReport",
            display_name="T5 Precision Report",
            description="Runs a T5 over test prompts in float32, layer by layer, and shows its largest values beside "
            "float16's range, with the scales that keep it inside. Takes minutes for the largest models.",
            search_aliases=["calibrate", "float16", "overflow", "nan"],
            inputs=[
                io.Combo.Input("t5_name", options=[EMBEDDED, *_files()], tooltip="A T5 file that has its tokenizer."),
                io.Float.Input(
                    "headroom",
                    default=4.0,
                    min=1.0,
                    max=64.0,
                    tooltip="How many times larger than seen a value may become before float16 overflows.",
                ),
            ],
            outputs=[io.Image.Output(display_name="plot"), io.String.Output(display_name="table")],
        )

    @classmethod
    def execute(cls, t5_name: str, headroom: float) -> io.NodeOutput:
        from comfy_nai_t5.report import precision_report

        bar = ProgressBar(1)
        table, image = precision_report(_path(t5_name), headroom, bar.update_absolute)
        return io.NodeOutput(image, table)


class SaveEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            node_id="NAISaveT5Embedding",
            display_name="Save T5 Embedding",
            description="Writes a conditioning with its mask to a file, to be used later without the text encoder.",
            search_aliases=["save conditioning", "cache prompt"],
            inputs=[
                io.Conditioning.Input("conditioning"),
                io.String.Input("name", default="prompt", tooltip=f"The file's name, under output/{EMBEDDING_FOLDER}."),
                io.String.Input("note", default="", multiline=True, tooltip="Kept in the file: the prompt, the model."),
            ],
            outputs=[io.String.Output(display_name="file")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, conditioning: list[Any], name: str, note: str) -> io.NodeOutput:
        path = _embedding_path(name)
        embeddings.save_conditioning(conditioning, path, note=note)
        return io.NodeOutput(path.name, ui=ui.PreviewText(f"{path.name}\n{embeddings.describe(conditioning)}"))


class LoadEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            node_id="NAILoadT5Embedding",
            display_name="Load T5 Embedding",
            description="Reads a conditioning that Save T5 Embedding wrote.",
            search_aliases=["load conditioning", "cached prompt"],
            inputs=[io.String.Input("name", default="prompt", tooltip=f"A file under output/{EMBEDDING_FOLDER}.")],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING"), io.String.Output(display_name="note")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        path = _embedding_path(name)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        path = _embedding_path(name)
        if not path.is_file():
            found = ", ".join(sorted(file.stem for file in path.parent.glob("*.safetensors"))) or "none"
            raise ValueError(f"there is no embedding {path.name}; there are: {found}")
        conditioning, facts = embeddings.load_conditioning(path)
        return io.NodeOutput(conditioning, facts.get("note", ""))


def _embedding_path(name: str) -> Path:
    """The file of an embedding.

    Raises:
        ValueError: the name leads out of the folder.
    """
    stem = name.removesuffix(".safetensors")
    if not stem or stem != Path(stem).name or stem.startswith("."):
        raise ValueError(f"{name!r} is no file name; give one without folders")
    return Path(folder_paths.get_output_directory()) / EMBEDDING_FOLDER / f"{stem}.safetensors"


class Extension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadT5,
            LoadClipT5,
            ReplaceT5,
            EncodeT5,
            CountTokens,
            ReportPrecision,
            SaveEmbedding,
            LoadEmbedding,
        ]
