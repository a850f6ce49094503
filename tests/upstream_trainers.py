"""Files of ``nai-t5 export`` read by the trainers' own code. Run by hand:

    python tests/upstream_trainers.py CHECKOUTS

CHECKOUTS is a folder with work trees called musubi-tuner, sd-scripts, FastVideo, PixArt-sigma, SimpleTuner,
LTX-Video-Trainer, ai-toolkit, diffusion-pipe, and OneTrainer with mgds beside it; trainers whose work tree is not there
are passed over, and told. Their reading functions are called as they are. What these modules import beside that and is
not installed (cv2, torchvision, …) is replaced by mocks, and so is what they would read beside texts.

What is read is compared with what transformers' T5 gives for ids, lengths and masks as the trainer's own encoding has
them, in float32: the difference is bfloat16's rounding.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import accelerate  # noqa: F401 - what is installed finds out what else is, before there are mocks
import diffusers.models.attention_dispatch  # noqa: F401
import peft  # noqa: F401
import torch
import transformers
import typer
from conftest import TOY_CONFIGS, random_state, write_hf_folder
from safetensors.torch import save_file
from torch import Tensor
from toy_clip import write_clip
from trainer_modules import Mock, imported_from

from examples import onetrainer_captions
from examples.diffusion_pipe_captions import reader
from nai_t5_core.datasets.captions import Columns
from nai_t5_core.datasets.compute import Engine, make_shards, to_make
from nai_t5_core.datasets.encoder_choice import EncoderChoice
from nai_t5_core.datasets.exports import export
from nai_t5_core.datasets.recipe import Feeding
from nai_t5_core.datasets.run import Order
from nai_t5_core.facts.padding import PaddingPolicy
from nai_t5_core.tokenizer import Tokenizer
from nai_t5_core.weights.examine import find_tokenizer_for

CAPTIONS = {"img/fox.png": "a red fox in the snow", "img/dog.png": "two dogs", "img/cat.png": "a cat on a mat, asleep"}
# bfloat16 keeps 8 bits; the encoder computes in float32.
LARGEST_DIFFERENCE = 2**-7


class Made:
    """A set of one family, beside what transformers gives."""

    def __init__(
        self, folder: Path, family: str, max_length: int | None = None, padding: PaddingPolicy | None = None
    ) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True)
        feeding = Feeding.choose(family, max_length, padding)
        self.length = feeding.max_length
        self.model, self.tokenizer = write_model(self.folder)
        rows = [json.dumps({"id": name, "caption": caption}) for name, caption in CAPTIONS.items()]
        (self.folder / "captions.jsonl").write_text("\n".join(rows))
        choice = EncoderChoice(str(self.model), "float32", "cpu", tokenizer=str(self.tokenizer))
        planner = Order(choice, feeding, columns=Columns("caption", "id")).planner(self.set)
        plan = planner.plan([self.folder / "captions.jsonl"])
        engine = Engine()
        make_shards(planner.folder, plan, choice, to_make(planner.folder, plan, engine), engine, lambda progress: None)
        self._theirs = {
            (caption, mask): self._encode(caption, mask) for caption in CAPTIONS.values() for mask in (0, 1)
        }

    @property
    def set(self) -> Path:
        return self.folder / "set"

    def theirs(self, caption: str, with_mask: bool) -> tuple[Tensor, int]:
        """The padded states of transformers, [length, d_model], and the number of tokens."""
        return self._theirs[caption, with_mask]

    def _encode(self, caption: str, with_mask: int) -> tuple[Tensor, int]:
        from transformers import T5EncoderModel

        model = T5EncoderModel.from_pretrained(self.model).float().eval()
        batch = find_tokenizer_for(None)([caption], self.length, pad_to=self.length)
        mask = torch.tensor(batch.attention_mask) if with_mask else None
        with torch.no_grad():
            return model(torch.tensor(batch.input_ids), mask).last_hidden_state[0], batch.token_counts[0]

    def check(self, read: Tensor, caption: str, with_mask: bool, with_pads: bool = False) -> None:
        """Compares what was read; with a mask the rows of pads are zeros, or are not there, unless they are kept."""
        expected, tokens = self.theirs(caption, with_mask)
        if with_mask and not with_pads:
            assert not read[tokens:].any(), "rows of pads are not zeros"
            read, expected = read[:tokens], expected[:tokens]
        assert read.shape == expected.shape, (read.shape, expected.shape)
        difference = (read.float() - expected).norm() / expected.norm()
        assert difference < LARGEST_DIFFERENCE, f"differs by {difference:.4f}"


class Exported(Made):
    """A set of one family and its files in a format."""

    def __init__(self, folder: Path, to: str, family: str) -> None:
        super().__init__(folder / to / family, family)
        self.out = self.folder / "out"
        self.out.mkdir()
        clip = write_clip(self.folder, both=family == "sd3") if family in ("flux", "sd3") else None
        export(self.set, to, self.out, clip)


def write_model(folder: Path) -> tuple[Path, Path]:
    """A toy T5 for the ids of the embedded tokenizer, and that tokenizer."""
    tokenizer: Tokenizer = find_tokenizer_for(None)
    config = TOY_CONFIGS["v1.1"].model_copy(update={"vocab_size": tokenizer.vocab_size})
    kind, content = tokenizer.serialized()
    place = folder / ("tokenizer.json" if kind == "tokenizer.json" else "spiece.model")
    model = write_hf_folder(folder / "model", config, random_state(config))
    place.write_bytes(content)
    return model, place


def musubi_tuner(tree: Path, folder: Path) -> None:
    made = Exported(folder, "musubi-wan", "wan")
    latents = folder / "latents.safetensors"
    save_file({"latents_1x2x2_float32": torch.zeros(4, 1, 2, 2)}, latents)
    with imported_from(tree / "src"):
        from musubi_tuner.dataset.bucket import BucketBatchManager  # type: ignore[import-not-found]

        for name, caption in CAPTIONS.items():
            file = made.out / f"{Path(name).stem}_wan_te.safetensors"
            item = SimpleNamespace(latent_cache_path=str(latents), text_encoder_output_cache_path=str(file))
            batch = BucketBatchManager({(2, 2): [item]}, 1)[0]
            made.check(batch["t5"][0], caption, with_mask=True)


def fastvideo(tree: Path, folder: Path) -> None:
    made = Exported(folder, "fastvideo", "wan")
    with imported_from(tree):
        from fastvideo.dataset.dataloader.schema import pyarrow_schema_text_only  # type: ignore[import-not-found]
        from fastvideo.dataset.parquet_dataset_map_style import (  # type: ignore[import-not-found]
            read_row_from_parquet_file,
        )
        from fastvideo.dataset.utils import collate_rows_from_parquet_schema  # type: ignore[import-not-found]

        files = sorted(map(str, made.out.glob("*.parquet")))
        rows = [read_row_from_parquet_file(files, number, [len(CAPTIONS)]) for number in range(len(CAPTIONS))]
        batch = collate_rows_from_parquet_schema(rows, pyarrow_schema_text_only, made.length)
        for place, row in enumerate(rows):
            assert batch["caption_text"][place] == CAPTIONS[row["id"]]
            tokens = made.theirs(CAPTIONS[row["id"]], True)[1]
            assert batch["text_attention_mask"][place].sum() == tokens
            made.check(batch["text_embedding"][place], CAPTIONS[row["id"]], with_mask=True)


def pixart_sigma(tree: Path, folder: Path) -> None:
    made = Exported(folder, "pixart", "pixart-sigma")
    with imported_from(tree):
        from diffusion.data.datasets import InternalData_ms  # type: ignore[import-not-found]

        reader = MagicMock(max_lenth=300, weight_dtype=torch.float32, load_vae_feat=True, load_t5_feat=True)
        reader.real_prompt_ratio, reader.transform = 1.1, None
        reader.aspect_ratio = {"1.0": [2, 2]}
        for name, caption in CAPTIONS.items():
            ending = InternalData_ms.replace_img_ext("_".join(name.rsplit("/", 1)), ".npz")
            reader.txt_feat_samples = [made.out / ending]
            reader.meta_data_clean = [{"height": 2, "width": 2}]
            reader.loader.return_value = torch.zeros(1, 2, 2)
            states, mask = InternalData_ms.InternalDataMSSigma.getdata(reader, 0)[1:3]
            assert mask.sum() == made.theirs(caption, True)[1]
            made.check(states[0], caption, with_mask=True)


def ltx_video_trainer(tree: Path, folder: Path) -> None:
    made = Exported(folder, "ltx", "ltx-condition")
    for name in CAPTIONS:
        latents = made.out / ".precomputed" / "latents" / Path(name).with_suffix(".pt")
        latents.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"latents": torch.zeros(1)}, latents)
    with imported_from(tree / "src"):
        from ltxv_trainer.datasets import PrecomputedDataset  # type: ignore[import-not-found]

        dataset = PrecomputedDataset(str(made.out))
        assert len(dataset) == len(CAPTIONS)
        for number, path in enumerate(dataset.sample_files["text_conditions"]):
            read = dataset[number]["text_conditions"]
            caption = CAPTIONS[str(path.with_suffix(".png"))]
            assert read["prompt_attention_mask"].sum() == made.theirs(caption, True)[1]
            made.check(read["prompt_embeds"], caption, with_mask=True)


def ai_toolkit(tree: Path, folder: Path) -> None:
    all_made = {family: Exported(folder, "ai-toolkit", family) for family in ("wan", "flux")}
    for (family, made), arch in zip(all_made.items(), ("wan21", "flux"), strict=True):
        with imported_from(tree):
            from toolkit.dataloader_mixins import TextEmbeddingFileItemDTOMixin  # type: ignore[import-not-found]
            from toolkit.prompt_utils import PromptEmbeds  # type: ignore[import-not-found]

            for name, caption in CAPTIONS.items():
                item = TextEmbeddingFileItemDTOMixin()
                item.caption, item.path, item.text_embedding_space_version = caption, str(made.out / name), arch
                item.encode_control_in_text_embeddings = item.encode_first_frame_in_text_embeddings = False
                read = PromptEmbeds.load(item.get_text_embedding_path())
                made.check(read.text_embeds[0], caption, with_mask=family == "wan")
                assert (read.pooled_embeds is None) == (family == "wan")


def simpletuner(tree: Path, folder: Path) -> None:
    own_names = {"pixart-sigma": "pixart_sigma", "ltx-video": "ltxvideo"}
    families = ("wan", "auraflow", "chroma", "flux", "sd3", *own_names)
    all_made = {family: Exported(folder, "simpletuner", family) for family in families}
    for family, made in all_made.items():
        named = own_names.get(family, family)
        with imported_from(tree):
            from simpletuner.helpers.caching.text_embeds import TextEmbeddingCache  # type: ignore[import-not-found]
            from simpletuner.helpers.data_backend.local import LocalDataBackend  # type: ignore[import-not-found]

            # What ends its threads, of which none was started.
            TextEmbeddingCache.__del__ = lambda self: None
            cache, backend = TextEmbeddingCache.__new__(TextEmbeddingCache), LocalDataBackend.__new__(LocalDataBackend)
            backend.compress_cache = False
            cache.cache_dir, cache.model_type, cache.data_backend = str(made.out), named, backend
            cache.key_type, cache._requires_path_based_keys = "caption", False
            cache.model = MagicMock(unpack_text_embeddings_from_cache=lambda embeddings: embeddings)
            for caption in CAPTIONS.values():
                read = cache.load_from_cache(cache.hash_prompt_with_path({"prompt": caption}))
                states = read["prompt_embeds"][0]
                with_mask = family in ("wan", "pixart-sigma", "auraflow", "chroma")
                made.check(states[77:] if family == "sd3" else states, caption, with_mask, family == "chroma")
                if family == "chroma":
                    assert read["attention_masks"].sum() == made.theirs(caption, True)[1] + 1


def sd_scripts(tree: Path, folder: Path) -> None:
    kinds = {"flux": "Flux", "sd3": "Sd3", "chroma": "Flux"}
    all_made = {family: Exported(folder, f"sd-scripts-{kind.lower()}", family) for family, kind in kinds.items()}
    for family, made in all_made.items():
        kind, is_chroma = kinds[family], family == "chroma"
        with imported_from(tree):
            # It imports what transformers has no more, and has no part in reading texts.
            sys.modules["library.train_util"] = Mock("library.train_util")
            module = __import__(f"library.strategy_{kind.lower()}", fromlist=["*"])
            caching = getattr(module, f"{kind}TextEncoderOutputsCachingStrategy")
            strategy = caching(True, 1, False, **{"apply_t5_attn_mask": True} if is_chroma else {})
            for name, caption in CAPTIONS.items():
                file = strategy.get_outputs_npz_path(str(made.out / name))
                assert strategy.is_disk_cached_outputs_expected(file)
                read = [torch.from_numpy(part) for part in strategy.load_outputs_npz(file)]
                made.check(read[1], caption, is_chroma, with_pads=True)
                assert read[-1].sum() == made.theirs(caption, False)[1]


def diffusion_pipe(tree: Path, folder: Path) -> None:
    """It has no files to write for it: ``examples/diffusion_pipe_captions.py`` is called in the place of its T5."""
    made = Made(folder / "wan", "wan")
    read = reader(str(made.set))
    # A default of one of its arguments asks for the GPU.
    with imported_from(tree), patch.object(torch.cuda, "current_device", lambda: 0):
        # Sizes and prompts, for which a package is needed.
        sys.modules["models.wan.configs"] = Mock("models.wan.configs")
        from models.wan.wan import WanPipeline  # type: ignore[import-not-found]
        from utils.dataset import DatasetManager  # type: ignore[import-not-found]

        model = WanPipeline.__new__(WanPipeline)
        model.get_vae = model.get_call_vae_fn = lambda *_: lambda *_, **__: None
        model.get_text_encoders = lambda: [None]
        WanPipeline.get_call_text_encoder_fn = lambda self, text_encoder: read
        manager = DatasetManager(model)
        assert manager.te_fn_requires_control_file == [False]
        results = manager.call_text_encoder_fns[0](list(CAPTIONS.values()), [False] * len(CAPTIONS))
        for caption, states, length in zip(
            CAPTIONS.values(), results["text_embeddings"], results["seq_lens"], strict=True
        ):
            assert length == made.theirs(caption, True)[1]
            made.check(states, caption, with_mask=True)


def onetrainer(tree: Path, folder: Path) -> None:
    """As for diffusion-pipe: ``examples/onetrainer_captions.py``, in the pipelines that its loaders make."""
    all_made = {
        ("Flux", "FLUX_DEV_1"): Made(folder / "flux", "flux", 77),
        ("Chroma", "CHROMA_1"): Made(folder / "chroma", "chroma"),
        ("PixArtAlpha", "PIXART_ALPHA"): Made(folder / "pixart", "pixart-alpha"),
        ("StableDiffusion3", "STABLE_DIFFUSION_3"): Made(folder / "sd3", "sd3", 77),
        ("HiDream", "HI_DREAM_FULL"): Made(folder / "hidream", "hidream", 128, "attend"),
    }
    for (kind, model_type), made in all_made.items():
        with imported_from(tree.parent / "mgds" / "src"), imported_from(tree):
            # torch has the module, and it refuses to be imported without TensorBoard.
            sys.modules["torch.utils.tensorboard"] = Mock("torch.utils.tensorboard")
            module = __import__(f"modules.dataLoader.{kind}BaseDataLoader", fromlist=["*"])
            with_mask = kind in ("Chroma", "PixArtAlpha")
            _check_onetrainer(getattr(module, f"{kind}BaseDataLoader"), made, model_type, with_mask)


def _check_onetrainer(loader: Any, made: Made, model_type: str, with_mask: bool) -> None:
    from mgds.LoadingPipeline import LoadingPipeline  # type: ignore[import-not-found]
    from mgds.pipelineModules.EncodeT5Text import EncodeT5Text  # type: ignore[import-not-found]
    from mgds.pipelineModules.Tokenize import Tokenize  # type: ignore[import-not-found]

    def same(prompt: str) -> str:
        return prompt

    tokenizer = transformers.T5TokenizerFast.from_pretrained(made.tokenizer.parent, model_max_length=made.length)
    tokenizers = {f"tokenizer{end}": tokenizer for end in ("", "_1", "_2", "_3", "_4")}
    adding = {f"add_text_encoder{end}_embeddings_to_prompt": same for end in ("", "_1", "_2", "_3", "_4")}
    model, config = MagicMock(**tokenizers, **adding), MagicMock(text_encoder_2_sequence_length=made.length)
    model.transformer.config.llama_layers = [0]
    for number in ("", "_2", "_3", "_4"):
        setattr(config, f"train_text_encoder{number}_or_embedding", lambda: False)
        setattr(config, f"text_encoder{number}_layer_skip", 0)
    # Their own T5 is never called.
    modules = loader._preparation_modules(MagicMock(), config, model)
    encode = next(module for module in modules if isinstance(module, EncodeT5Text))
    tokenize = next(
        module for module in modules if isinstance(module, Tokenize) and encode.tokens_in_name in module.get_outputs()
    )
    tokenize.in_name = "prompt"
    before, EncodeT5Text.get_item = EncodeT5Text.get_item, onetrainer_captions.reader(str(made.set), model_type)
    try:
        first, last = _ends_of_a_pipeline()
        LoadingPipeline(torch.device("cpu"), [first, tokenize, encode, last], 1, 0, MagicMock())
        for number, caption in enumerate(CAPTIONS.values()):
            states = last._get_previous_item(0, encode.hidden_state_out_name, number)
            tokens = made.theirs(caption, with_mask)[1]
            assert states.shape[0] == made.length
            made.check(states[:tokens] if with_mask else states, caption, with_mask)
    finally:
        EncodeT5Text.get_item = before


def _ends_of_a_pipeline() -> tuple[Any, Any]:
    """What gives OneTrainer's pipeline its prompts, and what asks it for items."""
    from mgds.PipelineModule import PipelineModule  # type: ignore[import-not-found]
    from mgds.pipelineModuleTypes.RandomAccessPipelineModule import (  # type: ignore[import-not-found]
        RandomAccessPipelineModule,
    )

    class First(PipelineModule, RandomAccessPipelineModule):  # type: ignore[misc]
        def length(self) -> int:
            return len(CAPTIONS)

        def get_inputs(self) -> list[str]:
            return []

        def get_outputs(self) -> list[str]:
            return ["prompt"]

        def get_item(self, variation: int, index: int, requested_name: str | None = None) -> dict[str, str]:
            return {"prompt": list(CAPTIONS.values())[index]}

    class Last(First):
        def get_outputs(self) -> list[str]:
            return []

    return First(), Last()


TRAINERS: dict[str, Callable[[Path, Path], None]] = {
    "musubi-tuner": musubi_tuner,
    "FastVideo": fastvideo,
    "PixArt-sigma": pixart_sigma,
    "LTX-Video-Trainer": ltx_video_trainer,
    "ai-toolkit": ai_toolkit,
    "SimpleTuner": simpletuner,
    "sd-scripts": sd_scripts,
    "diffusion-pipe": diffusion_pipe,
    "OneTrainer": onetrainer,
}


def main(checkouts: Path) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failed = 0
    for name, check in TRAINERS.items():
        if not (checkouts / name).is_dir():
            print(f"{name}: no work tree in {checkouts}")
            continue
        with TemporaryDirectory() as folder:
            try:
                check(checkouts / name, Path(folder))
                print(f"{name}: reads what was written")
            except Exception as error:
                failed += 1
                traceback.print_exc()
                print(f"{name}: {type(error).__name__}: {error}")
    sys.exit(failed)


if __name__ == "__main__":
    typer.run(main)
