"""Every keyword that transformers' classes take: it does what it says, changes nothing, or is refused by name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS
from hf_toys import MASK, V1_1_IDS, hf_model

from nai_t5_core.model.precision import resolve_device
from nai_t5_core.weights.formats import CheckpointError

pytest.importorskip("transformers")

import transformers

from nai_t5_core.diffusers import drop_in_keywords as hf_keywords
from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel

# A value of each that software really gives.
NEUTRAL_VALUES: dict[str, Any] = {
    "_commit_hash": "0" * 40,
    "_fast_init": True,
    "_from_auto": True,
    "_from_pipeline": "text-generation",
    "adapter_name": "default",
    "allow_all_kernels": False,
    "attn_implementation": "sdpa",
    "disable_mmap": True,
    "generation_config": None,
    "low_cpu_mem_usage": True,
    "max_memory": {0: "10GB"},
    "mirror": "tuna",
    "offload_buffers": True,
    "offload_folder": "somewhere",
    "offload_state_dict": True,
    "resume_download": True,
    "tqdm_class": None,
    "trust_remote_code": True,
    "use_safetensors": True,
    "user_agent": {"a": "b"},
    "weights_only": True,
}
REFUSED_VALUES: dict[str, Any] = {
    "adapter_kwargs": {"subfolder": "lora"},
    "config": transformers.T5Config(),
    "device_mesh": object(),
    "distributed_config": object(),
    "experts_implementation": "eager",
    "from_flax": True,
    "from_tf": True,
    "fusion_config": {"a": True},
    "gguf_file": "model.gguf",
    "ignore_mismatched_sizes": True,
    "kernel_config": object(),
    "key_mapping": {"a": "b"},
    "load_in_4bit": True,
    "load_in_8bit": True,
    "output_attentions": True,
    "output_loading_info": True,
    "proxies": {"https": "localhost:1"},
    "quantization_config": {"bits": 8},
    "state_dict": {"a": torch.zeros(1)},
    "tp_plan": "auto",
    "tp_size": 2,
    "use_flash_attention_2": True,
    "use_kernels": True,
}
SAVING_VALUES: dict[str, Any] = {
    "commit_message": "add",
    "create_pr": False,
    "ignore_metadata_errors": True,
    "max_shard_size": "5GB",
    "private": True,
    "repo_id": "someone/model",
    "safe_serialization": False,
    "save_function": torch.save,
    "save_original_format": True,
    "save_peft_format": False,
    "token": "secret",
    "use_auth_token": "secret",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved bfloat16 model: another dtype than the default of torch."""
    path = tmp_path_factory.mktemp("saved") / "model"
    NAIT5EncoderModel.from_hf(hf_model(TOY_CONFIGS["v1.1"]), torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return NAIT5EncoderModel.from_pretrained(folder)(V1_1_IDS, MASK)[0]


def _taken_by_transformers(method: Any) -> set[str]:
    """Names in a method's signature, and those that its body takes out of the other keywords."""
    named = {
        name
        for name, parameter in inspect.signature(method).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    return named | set(re.findall(r"[^_]kwargs\.pop\(\s*\"(\w+)\"", inspect.getsource(method))) - {"self"}


def test_the_values_are_those_of_every_keyword() -> None:
    assert NEUTRAL_VALUES.keys() == hf_keywords.NEUTRAL_IN_LOADING
    assert REFUSED_VALUES.keys() == hf_keywords.REFUSED_IN_LOADING.keys()
    assert SAVING_VALUES.keys() == hf_keywords.NEUTRAL_IN_SAVING


def test_all_keywords_of_the_installed_transformers_are_known() -> None:
    loading = _taken_by_transformers(transformers.PreTrainedModel.from_pretrained)
    known = {*hf_keywords.NEUTRAL_IN_LOADING, *hf_keywords.REFUSED_IN_LOADING, *hf_keywords.HUB_KEYWORDS}
    assert loading - known - set(inspect.signature(NAIT5EncoderModel.from_pretrained).parameters) == set()
    assert len(loading) > 25
    saving = _taken_by_transformers(transformers.PreTrainedModel.save_pretrained)
    known = {*hf_keywords.NEUTRAL_IN_SAVING, *hf_keywords.REFUSED_IN_SAVING}
    assert saving - known - set(inspect.signature(NAIT5EncoderModel.save_pretrained).parameters) == set()


# ---------------------------------------------------------------------------------------------------------------------
# from_pretrained
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEUTRAL_VALUES)
@torch.no_grad()
def test_neutral_keywords_change_nothing(name: str, folder: Path, expected: torch.Tensor) -> None:
    model = NAIT5EncoderModel.from_pretrained(folder, **{name: NEUTRAL_VALUES[name]})
    assert torch.equal(model(V1_1_IDS, MASK)[0], expected)


@pytest.mark.parametrize("name", REFUSED_VALUES)
def test_what_is_not_done_is_refused_by_name(name: str, folder: Path, tmp_path: Path) -> None:
    """Before anything is looked for: there is no such model."""
    with pytest.raises(ValueError, match=rf"^{name}=.* is not done by from_pretrained: \w+") as error:
        NAIT5EncoderModel.from_pretrained(tmp_path / "absent", **{name: REFUSED_VALUES[name]})
    assert not isinstance(error.value, CheckpointError)
    for nothing in (None, False):
        assert NAIT5EncoderModel.from_pretrained(folder, **{name: nothing}).dtype == torch.bfloat16


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_of_others_is_refused(implementation: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"attn_implementation='{implementation}': attention is chosen by itself"):
        NAIT5EncoderModel.from_pretrained(tmp_path / "absent", attn_implementation=implementation)


@pytest.mark.parametrize(("name", "hint"), [("low_cpu_mem_usag", "did you mean 'low_cpu_mem_usage'"), ("qwertz", "")])
def test_unknown_keywords_are_a_type_error(name: str, hint: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"from_pretrained\(\) has no keyword '{name}'.*{hint}"):
        NAIT5EncoderModel.from_pretrained(tmp_path / "absent", **{name: 1})
    with pytest.raises(TypeError, match=rf"save_pretrained\(\) has no keyword '{name}'"):
        NAIT5EncoderModel.from_pretrained(folder).save_pretrained(tmp_path / "saved", **{name: 1})
    assert not (tmp_path / "saved").exists()


DTYPES: list[tuple[dict[str, Any], torch.dtype]] = [
    ({}, torch.bfloat16),
    ({"dtype": "auto"}, torch.bfloat16),
    ({"dtype": None}, torch.float32),
    ({"dtype": "float16"}, torch.float16),
    ({"dtype": torch.float32}, torch.float32),
    ({"torch_dtype": torch.float16}, torch.float16),
    ({"torch_dtype": "auto"}, torch.bfloat16),
]


@pytest.mark.parametrize(("keywords", "dtype"), DTYPES)
def test_dtype(keywords: dict[str, Any], dtype: torch.dtype, folder: Path) -> None:
    assert NAIT5EncoderModel.from_pretrained(folder, **keywords).dtype == dtype


@pytest.mark.parametrize(
    "device_map",
    [None, "cpu", torch.device("cpu"), {"": "cpu"}, {"": torch.device("cpu")}, {"shared": "cpu", "encoder": "cpu"}],
)
def test_device_maps_of_one_device(device_map: Any, folder: Path, expected: torch.Tensor) -> None:
    model = NAIT5EncoderModel.from_pretrained(folder, device_map=device_map)
    assert model.device.type == "cpu"
    with torch.no_grad():
        assert torch.equal(model(V1_1_IDS, MASK)[0], expected)


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_device_maps_that_choose_take_the_accelerator_or_the_cpu(device_map: str, folder: Path) -> None:
    model = NAIT5EncoderModel.from_pretrained(folder, device_map=device_map)
    assert {parameter.device for parameter in model.parameters()} == {resolve_device("auto")}


@pytest.mark.parametrize("device_map", [{"shared": "cpu", "encoder": "disk"}, {"": "disk"}, "disk", {}, 1.5])
def test_device_maps_that_spread_are_refused(device_map: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the whole model goes to one device, such as"):
        NAIT5EncoderModel.from_pretrained(tmp_path / "absent", device_map=device_map)


@torch.no_grad()
def test_settings_of_the_config(folder: Path) -> None:
    model = NAIT5EncoderModel.from_pretrained(folder, output_hidden_states=True, return_dict=False)
    last, states = model(V1_1_IDS, MASK)
    assert len(states) == TOY_CONFIGS["v1.1"].num_layers + 1 and torch.equal(states[-1], last)


def test_the_argument_has_the_name_that_it_has_in_transformers(folder: Path) -> None:
    assert NAIT5EncoderModel.from_pretrained(pretrained_model_name_or_path=folder).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# The hub
# ---------------------------------------------------------------------------------------------------------------------

HUB: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"cache_dir": "/elsewhere"}, {"cache_dir": "/elsewhere"}),
    ({"token": "secret"}, {"token": "secret"}),
    ({"token": False}, {"token": False}),
    ({"use_auth_token": "secret"}, {"token": "secret"}),
    ({"revision": "refs/pr/1"}, {"revision": "refs/pr/1"}),
    ({"force_download": True}, {"force_download": True}),
    ({"local_files_only": False}, {}),
]


@pytest.mark.parametrize(("keywords", "options"), HUB)
def test_the_hub_is_asked_as_told(
    keywords: dict[str, Any], options: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = dict.fromkeys(("cache_dir", "token", "revision"))
    asked = {**nothing, "force_download": False, "local_files_only": False} | options

    def list_repo_files(repo: str, *, revision: Any, token: Any) -> list[str]:
        assert (repo, revision, token) == ("someone/model", asked["revision"], asked["token"])
        return ["config.json", "model.safetensors"]

    def snapshot_download(repo: str, *, allow_patterns: list[str], **given: Any) -> str:
        assert repo == "someone/model" and given == asked
        return str(folder)

    monkeypatch.setattr("huggingface_hub.list_repo_files", list_repo_files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert NAIT5EncoderModel.from_pretrained("someone/model", **keywords).dtype == torch.bfloat16


def _unreachable(*_: object, **__: object) -> None:
    raise ConnectionResetError


def test_local_files_only_reads_the_cache_and_asks_nobody(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(folder)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: pytest.fail("asked the hub"))
    load = NAIT5EncoderModel.from_pretrained
    assert load("someone/model", cache_dir=tmp_path, local_files_only=True).dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match=r"nor in the hub's cache, and local_files_only=True keeps from asking"):
        load("someone/absent", cache_dir=tmp_path, local_files_only=True)


def test_force_download_takes_nothing_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.list_repo_files", _unreachable)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("took the cache"))
    with pytest.raises(CheckpointError, match=r"cannot be reached \(ConnectionResetError\); without force_download"):
        NAIT5EncoderModel.from_pretrained("someone/model", force_download=True)


# ---------------------------------------------------------------------------------------------------------------------
# save_pretrained
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAVING_VALUES)
@torch.no_grad()
def test_neutral_keywords_save_the_same(name: str, folder: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    NAIT5EncoderModel.from_pretrained(folder).save_pretrained(tmp_path, **{name: SAVING_VALUES[name]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(NAIT5EncoderModel.from_pretrained(tmp_path)(V1_1_IDS, MASK)[0], expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [("push_to_hub", True), ("state_dict", {"a": torch.zeros(1)}), ("distributed_checkpoint", True)],
)
def test_what_is_not_saved_is_refused_by_name(name: str, value: Any, folder: Path, tmp_path: Path) -> None:
    model = NAIT5EncoderModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=rf"^{name}=.* is not done by save_pretrained: \w+"):
        model.save_pretrained(tmp_path / "saved", **{name: value})
    assert not (tmp_path / "saved").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; give a folder"):
        model.save_pretrained(tmp_path / "file")
