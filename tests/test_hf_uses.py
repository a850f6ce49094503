"""What other software does with a model, it does with the drop-in class."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS
from hf_toys import MASK, V1_1_IDS, assert_near, encode_in_a_process, hf_model, ids_for
from torch import nn
from torch._dynamo.testing import CompileCounter
from toy_loras import toy_lora

from nai_t5_core.facts.config import T5Config

pytest.importorskip("transformers")

from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel
from nai_t5_core.diffusers.row_memory import RowMemory
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.lora.loras import Loras


@pytest.fixture
def v1_1() -> NAIT5EncoderModel:
    return NAIT5EncoderModel.from_hf(hf_model(TOY_CONFIGS["v1.1"]))


# ---------------------------------------------------------------------------------------------------------------------


def test_embeddings_can_be_read_resized_and_replaced(v1_1: NAIT5EncoderModel, tmp_path: Path) -> None:
    before = v1_1(V1_1_IDS)[0]
    v1_1.resize_token_embeddings(98, mean_resizing=False)
    assert v1_1.config.vocab_size == v1_1.get_input_embeddings().weight.shape[0] == 98
    assert torch.equal(v1_1(V1_1_IDS)[0], before)
    with torch.no_grad():
        v1_1.get_input_embeddings().weight[97] = v1_1.get_input_embeddings().weight[5]
    assert torch.equal(v1_1(torch.tensor([[97, 7, 1]]))[0], v1_1(torch.tensor([[5, 7, 1]]))[0])
    v1_1.save_pretrained(tmp_path)
    assert torch.equal(
        NAIT5EncoderModel.from_pretrained(tmp_path)(torch.tensor([[97]]))[0], v1_1(torch.tensor([[97]]))[0]
    )


def test_copies_are_independent(v1_1: NAIT5EncoderModel) -> None:
    v1_1.padding = "skip"
    expected = v1_1(V1_1_IDS, MASK)[0]
    for other in (copy.deepcopy(v1_1), pickle.loads(pickle.dumps(v1_1))):
        assert torch.equal(other(V1_1_IDS, MASK)[0], expected)
        assert other.padding == "skip"
        with torch.no_grad():
            other.shared.weight.zero_()
        assert not other(V1_1_IDS, MASK)[0].any()
        assert torch.equal(v1_1(V1_1_IDS, MASK)[0], expected)


@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_compiled(v1_1: NAIT5EncoderModel, padding: Any) -> None:
    """With the backend that only traces: what is checked is that the model can be traced, piece by piece."""
    compiled = torch.compile(v1_1, backend="eager")
    v1_1.padding = padding
    with torch.no_grad():
        assert_near(compiled(V1_1_IDS, MASK)[0], v1_1(V1_1_IDS, MASK)[0])
        assert_near(compiled(V1_1_IDS[:2])[0], v1_1(V1_1_IDS[:2])[0])


@pytest.mark.parametrize(("kind", "layout"), [("v1.1", "fused"), ("v1.1", "separate"), ("umt5", "fused")])
@torch.no_grad()
def test_compiled_as_one_graph(config: T5Config, layout: Any) -> None:
    """Which serves every mask: nothing of it is read while tracing, holes and empty prompts among it."""
    torch.compiler.reset()
    model = NAIT5EncoderModel.from_hf(hf_model(config), layout=layout)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    ids = ids_for(config)
    holes = MASK * (torch.arange(12) != 3)
    empty = MASK * torch.tensor([1, 0, 1, 1])[:, None]
    for mask in (MASK, MASK.flip(1), holes, empty, torch.zeros_like(MASK)):
        assert_near(compiled(ids, mask)[0], model(ids, mask)[0])
    assert counter.frame_count == 1
    states = compiled(ids, MASK, output_hidden_states=True).hidden_states
    for state, expected in zip(states, model(ids, MASK, output_hidden_states=True).hidden_states, strict=True):
        assert_near(state, expected)


@torch.no_grad()
def test_a_compiled_model_still_tells_what_is_wrong(v1_1: NAIT5EncoderModel) -> None:
    """An id outside the vocabulary by the embedding, since reading the ids would end the graph."""
    torch.compiler.reset()
    compiled = torch.compile(v1_1, backend="eager", fullgraph=True)
    with pytest.raises(IndexError, match="index out of range"):
        compiled(V1_1_IDS + 96, MASK)
    with pytest.raises(ValueError, match=r"the mask has shape \[4, 11\]"):
        torch.compile(v1_1, backend="eager")(V1_1_IDS, MASK[:, 1:])


@pytest.mark.slow
def test_several_processes(v1_1: NAIT5EncoderModel, tmp_path: Path) -> None:
    """Two load one folder at the same time, and a model goes to another process."""
    v1_1.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = v1_1(V1_1_IDS, MASK)[0]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for result in pool.map(encode_in_a_process, [tmp_path, tmp_path, v1_1], timeout=500):
            assert_near(torch.from_numpy(result), expected, 1e-6)


@pytest.mark.parametrize("layout", ["fused", "separate"])
def test_layerwise_casting(layout: Any) -> None:
    """Projections stored in 8 bits and computed in float32; transformers' own T5 cannot do that."""
    hooks = pytest.importorskip("diffusers.hooks")
    eight_bits = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    ours = NAIT5EncoderModel.from_hf(hf_model(TOY_CONFIGS["v1.1"]), layout=layout)
    rounded = copy.deepcopy(ours)
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(module.weight.to(torch.float8_e4m3fn).float())
    expected = rounded(V1_1_IDS, MASK)[0]
    assert (expected - ours(V1_1_IDS, MASK)[0]).abs().max() > 1e-2
    everywhere, outputs = copy.deepcopy(ours), []
    hooks.apply_layerwise_casting(ours, **eight_bits, skip_modules_classes=(nn.Embedding,))
    assert {module.weight.dtype for module in ours.modules() if isinstance(module, nn.Linear)} == {torch.float8_e4m3fn}
    assert ours.dtype == torch.float32
    for _ in range(2):
        assert torch.equal(ours(V1_1_IDS, MASK)[0], expected)
    for model, loras in ((rounded, Loras(rounded)), (ours, LiveLoras(ours))):
        loras.add(toy_lora(TOY_CONFIGS["v1.1"]))
        outputs.append(model(V1_1_IDS, MASK)[0])
    assert_near(outputs[1], outputs[0])
    hooks.apply_layerwise_casting(everywhere, **eight_bits)
    with pytest.raises(
        ValueError, match=r"stored in torch\.float8_e4m3fn.*skip_modules_classes=\(torch\.nn\.Embedding,\)"
    ):
        everywhere(V1_1_IDS, MASK)


def test_random_model_from_a_config() -> None:
    config = hf_model(TOY_CONFIGS["v1.1"]).config
    torch.manual_seed(0)
    model = NAIT5EncoderModel(config)
    torch.manual_seed(0)
    again = NAIT5EncoderModel(config)
    assert torch.equal(model(V1_1_IDS)[0], again(V1_1_IDS)[0])
    assert 0.1 < model(V1_1_IDS)[0].std() < 10
    with torch.device("meta"):
        assert NAIT5EncoderModel(config).device.type == "meta"


def test_peft_adapters() -> None:
    """In the separate layout, where every projection is a module under the name that adapters know."""
    peft = pytest.importorskip("peft")
    reference = hf_model(TOY_CONFIGS["v1.1"])
    ours = NAIT5EncoderModel.from_hf(reference, layout="separate")
    for model in (reference, ours):
        torch.manual_seed(0)
        targets = ["q", "v", "wi_0", "wo"]
        model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))  # type: ignore[operator]
    assert_near(ours(V1_1_IDS, MASK)[0], reference(V1_1_IDS, MASK)[0])
    ours.disable_adapters()
    assert_near(ours(V1_1_IDS, MASK)[0], hf_model(TOY_CONFIGS["v1.1"])(V1_1_IDS, MASK)[0])


def test_rows_can_be_remembered(v1_1: NAIT5EncoderModel) -> None:
    memory = RowMemory()
    out = v1_1(V1_1_IDS, MASK)[0]
    memory.add(V1_1_IDS, MASK, out)
    marked = RowMemory()
    marked.add(V1_1_IDS, MASK, out + 1)
    with v1_1.remembering(marked):
        assert torch.equal(v1_1(V1_1_IDS[[2, 0]], MASK[[2, 0]].bool())[0], out[[2, 0]] + 1)
        assert_near(v1_1(V1_1_IDS)[0], v1_1.stack(V1_1_IDS))
        assert not torch.equal(v1_1(V1_1_IDS, MASK.flip(0))[0], out + 1)
    assert torch.equal(v1_1(V1_1_IDS, MASK)[0], out)
    assert len(memory) == 4 and memory.find(V1_1_IDS, None) is None


def test_absent_transformers_is_told() -> None:
    code = "import sys; sys.modules['transformers'] = None; import nai_t5_core.diffusers.drop_in"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "pip install 'comfy-nai-t5[transformers]'" in done.stderr
