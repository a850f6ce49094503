"""Files of ``nai-t5 export`` read by the trainers' own code. Run by hand:

    python tests/upstream_trainers.py CHECKOUTS

CHECKOUTS is a folder with work trees called musubi-tuner, sd-scripts, FastVideo, PixArt-sigma, SimpleTuner,
LTX-Video-Trainer, ai-toolkit and diffusion-pipe; trainers whose work tree is not there are passed over, and told. Their
reading functions are called as they are. What these modules import beside that and is not installed (cv2, torchvision,
…) is replaced by mocks, and so is what they would read beside texts.

What is read is compared with what transformers' T5 gives for ids, lengths and masks as the trainer's own encoding has
them, in float32: the difference is bfloat16's rounding.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
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

from examples.diffusion_pipe_captions import reader
from nai_t5_core.datasets.compute import Engine, make_shards, to_make
from nai_t5_core.datasets.encoder_choice import EncoderChoice
from nai_t5_core.datasets.exports import export
from nai_t5_core.datasets.recipe import Feeding
from nai_t5_core.datasets.run import Order
from nai_t5_core.tokenizer import Tokenizer
from nai_t5_core.weights.examine import find_tokenizer_for

CAPTIONS = {"img/fox.png": "a red fox in the snow", "img/dog.png": "two dogs", "img/cat.png": "a cat on a mat, asleep"}
# bfloat16 keeps 8 bits; the encoder computes in float32.
LARGEST_DIFFERENCE = 2**-7


class _Mock(ModuleType):
    """A module whose names are classes, so that others can be derived from them, and that decorate by doing nothing."""

    __path__ = __all__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Anything,), {})


class _AnythingsClass(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _Anything(metaclass=_AnythingsClass):
    """Takes anything, has no items, and decorates by doing nothing."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        """Keeps none of it."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return arguments[0] if arguments and callable(arguments[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class _Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a mock for each module of packages that are not installed, and of the work tree's own where it has none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package = name.partition(".")[0]
        installed = package in sys.modules and not isinstance(sys.modules[package], _Mock)
        if (installed or ("." not in name and self._is_there(package))) and not (self._folder / package).is_dir():
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def _is_there(self, package: str) -> bool:
        return importlib.machinery.PathFinder.find_spec(package) is not None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Mock(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """A mock is complete."""


@contextmanager
def imported_from(folder: Path) -> Iterator[None]:
    """Modules of a work tree, and mocks for those that are not there."""
    missing = _Missing(folder)
    sys.path.insert(0, str(folder))
    sys.meta_path.append(missing)
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.meta_path.remove(missing)
        own = {path.stem for path in folder.iterdir()}
        for name in [
            name for name, module in sys.modules.items() if isinstance(module, _Mock) or name.partition(".")[0] in own
        ]:
            del sys.modules[name]


class Exported:
    """A set of one family and its files in a format, beside what transformers gives."""

    def __init__(self, folder: Path, to: str, family: str) -> None:
        self.folder = folder / to / family
        self.out = self.folder / "out"
        self.out.mkdir(parents=True)
        self.length = Feeding.choose(family).max_length
        clip = write_clip(self.folder, both=family == "sd3") if family in ("flux", "sd3") else None
        self.model, tokenizer = write_model(self.folder)
        rows = [json.dumps({"id": name, "caption": caption}) for name, caption in CAPTIONS.items()]
        (self.folder / "captions.jsonl").write_text("\n".join(rows))
        choice = EncoderChoice(str(self.model), "float32", "cpu", tokenizer=str(tokenizer))
        order = Order(choice, Feeding.choose(family))
        order = Order(choice, order.feeding, columns=type(order.columns)("caption", "id"))
        planner = order.planner(self.folder / "set")
        plan = planner.plan([self.folder / "captions.jsonl"])
        engine = Engine()
        make_shards(planner.folder, plan, choice, to_make(planner.folder, plan, engine), engine, lambda progress: None)
        export(self.folder / "set", to, self.out, clip)
        self._theirs = {
            (caption, mask): self._encode(caption, mask) for caption in CAPTIONS.values() for mask in (0, 1)
        }

    def theirs(self, caption: str, with_mask: bool) -> tuple[Tensor, int]:
        """The padded states of transformers, [length, d_model], and the number of tokens."""
        return self._theirs[caption, with_mask]

    def _encode(self, caption: str, with_mask: int) -> tuple[Tensor, int]:
        from transformers import T5EncoderModel

        model = T5EncoderModel.from_pretrained(self.model, dtype=torch.float32).eval()
        batch = find_tokenizer_for(None)([caption], self.length, pad_to=self.length)
        mask = torch.tensor(batch.attention_mask) if with_mask else None
        with torch.no_grad():
            return model(torch.tensor(batch.input_ids), mask).last_hidden_state[0], batch.token_counts[0]

    def check(self, read: Tensor, caption: str, with_mask: bool, rows: int | None = None) -> None:
        """Compares what was read; with a mask the rows of pads are zeros, or are not there."""
        expected, tokens = self.theirs(caption, with_mask)
        if with_mask:
            assert not read[tokens:].any(), "rows of pads are not zeros"
            read, expected = read[:tokens], expected[:tokens]
        assert read.shape == expected.shape, (read.shape, expected.shape)
        difference = (read.float() - expected).norm() / expected.norm()
        assert difference < LARGEST_DIFFERENCE, f"differs by {difference:.4f}"


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
    own_names = {"wan": "wan", "pixart-sigma": "pixart_sigma", "ltx-video": "ltxvideo", "auraflow": "auraflow"}
    all_made = {family: Exported(folder, "simpletuner", family) for family in (*own_names, "flux", "sd3")}
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
                with_mask = family in ("wan", "pixart-sigma", "auraflow")
                made.check(states[77:] if family == "sd3" else states, caption, with_mask)


def sd_scripts(tree: Path, folder: Path) -> None:
    all_made = {kind: Exported(folder, f"sd-scripts-{kind.lower()}", kind.lower()) for kind in ("Flux", "Sd3")}
    for kind, made in all_made.items():
        family = kind.lower()
        with imported_from(tree):
            # It imports what transformers has no more, and has no part in reading texts.
            sys.modules["library.train_util"] = _Mock("library.train_util")
            module = __import__(f"library.strategy_{family}", fromlist=["*"])
            strategy = getattr(module, f"{kind}TextEncoderOutputsCachingStrategy")(True, 1, False)
            for name, caption in CAPTIONS.items():
                file = strategy.get_outputs_npz_path(str(made.out / name))
                assert strategy.is_disk_cached_outputs_expected(file)
                read = [torch.from_numpy(part) for part in strategy.load_outputs_npz(file)]
                made.check(read[1], caption, with_mask=False)
                assert read[-1].sum() == made.theirs(caption, False)[1]


def diffusion_pipe(tree: Path, folder: Path) -> None:
    """It has no files to write for it: ``examples/diffusion_pipe_captions.py`` is called in the place of its T5."""
    made = Exported(folder, "musubi-wan", "wan")
    read = reader(str(made.folder / "set"))
    # A default of one of its arguments asks for the GPU.
    with imported_from(tree), patch.object(torch.cuda, "current_device", lambda: 0):
        # Sizes and prompts, for which a package is needed.
        sys.modules["models.wan.configs"] = _Mock("models.wan.configs")
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


TRAINERS: dict[str, Callable[[Path, Path], None]] = {
    "musubi-tuner": musubi_tuner,
    "FastVideo": fastvideo,
    "PixArt-sigma": pixart_sigma,
    "LTX-Video-Trainer": ltx_video_trainer,
    "ai-toolkit": ai_toolkit,
    "SimpleTuner": simpletuner,
    "sd-scripts": sd_scripts,
    "diffusion-pipe": diffusion_pipe,
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
