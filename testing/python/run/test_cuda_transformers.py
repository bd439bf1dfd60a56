"""Models of transformers with quantized layers, on a card."""

import copy
import importlib

import pytest
import torch

import bitblas
import tiny_models
from tiny_models import MIXED, UINT4

transformers = pytest.importorskip("transformers", minversion="5", reason="pip install 'bitblas[transformers]'")
importlib.import_module("bitblas_transformers")

#: As in test_transformers.py; float32 products there are what torch computes with on the card here.
FACTOR = 3.0


def distances(tiny, model, dtype):
    """How far a model and the one with float32 layers are from float64."""
    ids = tiny_models.tokens()
    with torch.inference_mode():
        exact = tiny.exact(ids).logits
        wide = tiny_models.wide(tiny, dtype)(ids).logits.double()
        found = model(ids.to(model.device)).logits.double().cpu()
    return float((found - exact).abs().max()), float((wide - exact).abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device_map", ["cuda", "auto", {"": 0}], ids=str)
def test_loaded_on_a_card(tmp_path, device_map, dtype):
    tiny = tiny_models.make(tmp_path / "folder", "llama", (UINT4,))
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder, device_map=device_map, dtype=dtype)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
    found, wide = distances(tiny, model, dtype)
    assert found <= FACTOR * wide


def test_load_model_takes_the_card_and_saves_for_any(tmp_path):
    tiny = tiny_models.make(tmp_path / "folder", "llama", MIXED)
    model = bitblas.load_model(tiny.folder, dtype=torch.float16)
    assert model.device.type == "cuda"
    model.save_pretrained(tmp_path / "saved")
    again = bitblas.load_model(tmp_path / "saved", device="cpu")
    assert again.device.type == "cpu"
    for each in (model, again, copy.deepcopy(again).to("cuda")):
        found, wide = distances(tiny, each, torch.float16)
        assert found <= FACTOR * wide


def test_generate(tmp_path):
    tiny = tiny_models.make(tmp_path / "folder", "llama", (UINT4,))
    model = bitblas.load_model(tiny.folder, dtype=torch.float32, device="cuda")
    ids = tiny_models.tokens()
    options = {"max_new_tokens": 12, "do_sample": False}
    wanted = copy.deepcopy(tiny.exact).float().generate(ids, attention_mask=torch.ones_like(ids), **options)
    found = model.generate(ids.cuda(), attention_mask=torch.ones_like(ids).cuda(), **options)
    assert torch.equal(found.cpu(), wanted)
