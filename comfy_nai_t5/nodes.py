"""The nodes: a schema and a few lines onto the library each.

What only some nodes need is imported when they run.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import folder_paths
from comfy.utils import ProgressBar
from comfy_api.latest import ComfyExtension, io, ui

from comfy_nai_t5 import embeddings, encode
from comfy_nai_t5.choices import CACHES, Settings
from comfy_nai_t5.families import AUTO, FAMILIES, JOINT_FAMILIES, joint_titles
from comfy_nai_t5.node_inputs import (
    EMBEDDED,
    computing_inputs,
    dtype_input,
    loading_inputs,
    other_files,
    path_of,
    schema,
    t5_files,
    text_inputs,
)
from comfy_nai_t5.telling import show, warn

NONE = "none"
EMBEDDING_FOLDER = "t5_embeddings"
# Of a saved embedding.
FORMS = ["ours", "ComfyUI's"]


def _loaded(clip: Any) -> io.NodeOutput:
    """A CLIP of ours, and in words what its T5 is; as text on the node too."""
    from comfy_nai_t5.clip import describe

    told = describe(clip)
    show(told)
    return io.NodeOutput(clip, ui=ui.PreviewText(told))


class LoadT5(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="NAILoadT5",
            display_name="Load T5 (NAI)",
            description="Loads a T5 that is a model's only text encoder. Every node that takes a CLIP takes it.",
            search_aliases=["t5xxl", "umt5", "load clip", "text encoder loader"],
            inputs=[
                io.Combo.Input(
                    "t5_name",
                    options=[EMBEDDED, *t5_files()],
                    tooltip="A T5 of any kind, found by its content: T5 v1.0 and v1.1, FLAN, UMT5, Pile-T5, mT5, ByT5; "
                    "float32, float16, bfloat16, float8, scaled float8, GGUF; one file or the first of its shards.",
                ),
                io.Combo.Input(
                    "family",
                    options=[AUTO, *FAMILIES],
                    default=AUTO,
                    tooltip="The diffusion model that reads the conditioning: decides on lengths, masks, padding. "
                    "auto: known by the T5 itself where only one family uses it. t5: none, without padding.",
                ),
                *loading_inputs(),
            ],
            outputs=[io.Clip.Output(display_name="CLIP")],
        )

    @classmethod
    def execute(cls, t5_name: str, family: str, **settings: Any) -> io.NodeOutput:
        from comfy_nai_t5.late import late_t5
        from comfy_nai_t5.loaders import load_t5

        chosen = Settings(**settings)
        load = load_t5 if chosen.cache == "off" else late_t5
        return _loaded(load(path_of(t5_name), family, chosen))


class LoadClipT5(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        others = [
            io.Combo.Input(name, options=[NONE, *other_files()], default=NONE, tooltip=tip)
            for name, tip in (
                ("clip_l", "CLIP-L: Flux needs it; SD3 and HiDream may have it."),
                ("clip_g", "CLIP-G: for SD3 and HiDream."),
                ("llama", "Llama 3.1: for HiDream."),
            )
        ]
        return schema(
            node_id="NAILoadClipT5",
            display_name="Load CLIP + T5 (NAI)",
            description=f"Loads the text encoders of {joint_titles('or')}. Only the T5 is ours, the others ComfyUI's.",
            search_aliases=["dual clip loader", "triple clip loader", *JOINT_FAMILIES, "t5xxl"],
            inputs=[
                io.Combo.Input("t5_name", options=t5_files(), tooltip="The T5 v1.1 XXL of the model, in any dtype."),
                io.Combo.Input("family", options=list(JOINT_FAMILIES), tooltip="The model they belong to."),
                *others,
                *loading_inputs(),
            ],
            outputs=[io.Clip.Output(display_name="CLIP")],
        )

    @classmethod
    def execute(cls, t5_name: str, family: str, clip_l: str, clip_g: str, llama: str, **settings: Any) -> io.NodeOutput:
        from comfy_nai_t5.late import late_with_clip
        from comfy_nai_t5.loaders import load_with_clip

        names = [name for name in (clip_l, clip_g, llama, t5_name) if name != NONE]
        paths = [folder_paths.get_full_path_or_raise("text_encoders", name) for name in names]
        chosen = Settings(**settings)
        load = load_with_clip if chosen.cache == "off" else late_with_clip
        return _loaded(load(paths, family, chosen))


class ReplaceT5(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="NAIReplaceT5",
            display_name="Replace T5 (NAI)",
            description="Puts our encoder in the place of every T5 of a loaded CLIP, on the same weights: nothing is "
            "read or copied, and LoRA, offloading and float8 go on as they were.",
            search_aliases=["accelerate t5", "speed up text encoder", "t5xxl", "byt5"],
            inputs=[
                io.Clip.Input("clip", tooltip="From any loader or checkpoint."),
                dtype_input(),
                *computing_inputs(),
            ],
            outputs=[io.Clip.Output(display_name="CLIP")],
        )

    @classmethod
    def execute(cls, clip: Any, **settings: Any) -> io.NodeOutput:
        from comfy_nai_t5.clip import with_our_t5

        return _loaded(with_our_t5(clip, Settings(**settings)))


class EncodeT5(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="NAIT5Encode",
            display_name="T5 Encode",
            description="Encodes a prompt as CLIP Text Encode does, and tells how many tokens it has and what was cut.",
            search_aliases=["clip text encode", "prompt", "t5 prompt"],
            inputs=[
                *text_inputs(),
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
        if cut:
            warn(f"The prompt is too long for {_limit(max_length)} and this was cut off: {cut!r}; shorten it.")
        return io.NodeOutput(conditioning, max(each.count for each in tokens), cut)


def _limit(max_length: int) -> str:
    return f"max_length={max_length}" if max_length else "this model family"


class CountTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="NAIT5TokenCount",
            display_name="T5 Token Count",
            description="Counts the tokens of a prompt without encoding it.",
            search_aliases=["token counter", "prompt length", "tokenize"],
            inputs=text_inputs(),
            outputs=[
                io.Int.Output(display_name="tokens"),
                io.Int.Output(display_name="over", tooltip="How many tokens were cut off; 0 where all fit."),
                io.String.Output(display_name="cut off"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, clip: Any, text: str, max_length: int) -> io.NodeOutput:
        tokens = encode.tokenize(clip, text, max_length)
        told = f"{tokens.count} tokens, {tokens.rows} rows" + (f"; cut off: {tokens.cut_text}" if tokens.over else "")
        show(told)
        return io.NodeOutput(tokens.count, tokens.over, tokens.cut_text, ui=ui.PreviewText(told))


class ReportPrecision(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="NAIT5PrecisionReport",
            display_name="T5 Precision Report",
            description="Runs a T5 over test prompts in float32, layer by layer, and shows its largest values beside "
            "float16's range, with the scales that keep it inside. Takes minutes for the largest models.",
            search_aliases=["calibrate", "float16", "overflow", "nan"],
            inputs=[
                io.Combo.Input("t5_name", options=[EMBEDDED, *t5_files()], tooltip="A T5 file that has its tokenizer."),
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
        table, image = precision_report(path_of(t5_name), headroom, bar.update_absolute)
        return io.NodeOutput(image, table)


class SaveEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="NAISaveT5Embedding",
            display_name="Save T5 Embedding",
            description="Writes a conditioning with its mask to a file, to be used later without the text encoder.",
            search_aliases=["save conditioning", "cache prompt"],
            inputs=[
                io.Conditioning.Input("conditioning"),
                io.String.Input("name", default="prompt", tooltip=f"The file's name, under output/{EMBEDDING_FOLDER}."),
                io.String.Input("note", default="", multiline=True, tooltip="Kept in the file: the prompt, the model."),
                io.Combo.Input(
                    "form",
                    options=FORMS,
                    default=FORMS[0],
                    optional=True,
                    tooltip="ours: any number of entries. ComfyUI's: one entry, for ComfyUI's own Load Conditioning.",
                ),
            ],
            outputs=[io.String.Output(display_name="file")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, conditioning: list[Any], name: str, note: str, form: str = FORMS[0]) -> io.NodeOutput:
        path = embeddings.embedding_path(_embedding_folder(), name)
        save = embeddings.save_conditioning if form == FORMS[0] else embeddings.save_core_conditioning
        save(conditioning, path, note=note)
        return io.NodeOutput(path.name, ui=ui.PreviewText(f"{path.name}\n{embeddings.describe(conditioning)}"))


class LoadEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="NAILoadT5Embedding",
            display_name="Load T5 Embedding",
            description="Reads a conditioning that Save T5 Embedding wrote, or ComfyUI's own Save Conditioning.",
            search_aliases=["load conditioning", "cached prompt"],
            inputs=[io.String.Input("name", default="prompt", tooltip=f"A file under output/{EMBEDDING_FOLDER}.")],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING"), io.String.Output(display_name="note")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        path = embeddings.embedding_path(_embedding_folder(), name)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        path = embeddings.embedding_path(_embedding_folder(), name)
        conditioning, facts = embeddings.load_conditioning(path)
        return io.NodeOutput(conditioning, facts.get("note", ""))


class ShowCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="NAIT5Cache",
            display_name="T5 Cache",
            description="Shows how many embeddings came from the cache since ComfyUI began, and how much it holds.",
            search_aliases=["cache hits", "embedding cache", "cached prompt"],
            inputs=[
                io.Combo.Input("cache", options=list(CACHES[1:]), tooltip="Which cache, as chosen in the loaders."),
                io.Conditioning.Input(
                    "conditioning", optional=True, tooltip="Passed on, so that this is shown after it was encoded."
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="CONDITIONING"),
                io.Int.Output(display_name="hits"),
                io.Int.Output(display_name="misses"),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return time.time()  # it is never what it was

    @classmethod
    def execute(cls, cache: str, conditioning: list[Any] | None = None) -> io.NodeOutput:
        from comfy_nai_t5.clip_cache import describe_store, store_for

        store = store_for(cache)
        told = describe_store(store)
        show(told)
        return io.NodeOutput(conditioning, store.counts.hits, store.counts.misses, ui=ui.PreviewText(told))


def _embedding_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / EMBEDDING_FOLDER


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
            ShowCache,
        ]
