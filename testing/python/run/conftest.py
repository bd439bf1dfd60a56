"""What the tests of models of transformers share: folders of tiny ones."""

import pytest

import tiny_models
from tiny_models import UINT4


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """``tiny(architecture, formats)``: a folder, made once."""
    made = {}

    def make(name="llama", formats=(UINT4,)):
        key = (name, repr(formats))
        if key not in made:
            made[key] = tiny_models.make(tmp_path_factory.mktemp("model") / "folder", name, formats)
        return made[key]

    return make


@pytest.fixture
def dense(tmp_path):
    """``dense(architecture)``: a dense model in float32, and its folder."""

    def make(name="llama"):
        model = tiny_models.dense(name).float()
        model.save_pretrained(tmp_path / "dense")
        return model, tmp_path / "dense"

    return make
