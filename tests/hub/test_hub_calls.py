"""Loading out of the Hub's cache: an index of weights names files of its own repository only."""

import json
import shutil
from inspect import signature

import pytest
import tiny
from diffusers import ModelMixin
from transformers import AutoModel, ProcessorMixin

from omni_video_hf.hub.hub_calls import check_place
from omni_video_hf.models.connectors import OmniVideoAdapter
from omni_video_hf.models.modeling_omni_video import OmniVideoForConditionalGeneration
from omni_video_hf.processing.processing_omni_video import OmniVideoProcessor

NAME, COMMIT = "lab/model", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny.model().save_pretrained(folder)
    return folder


@pytest.fixture
def cached(saved, tmp_path):
    """The options that find a copy of the model as the Hub's client has downloaded it, and its folder."""
    entry = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    folder = entry / "snapshots" / COMMIT
    shutil.copytree(saved, folder)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(COMMIT)
    return {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}, folder


def redirect(index, name):
    content = json.loads(index.read_text())
    first = min(content["weight_map"])
    content["weight_map"][first] = name
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name", ["../../../models--lab--other/secret.safetensors", "/etc/passwd", "C:\\x.safetensors"]
)
def test_an_index_on_the_hub_names_no_file_outside_its_repository(cached, name):
    options, folder = cached
    redirect(folder / "model.safetensors.index.json", name)
    with pytest.raises(ValueError, match=r"index\.json: names the file .* outside of lab/model"):
        OmniVideoForConditionalGeneration.from_pretrained(NAME, **options)
    with pytest.raises(ValueError, match="outside of lab/model"):
        AutoModel.from_pretrained(NAME, trust_remote_code=True, **options)


@pytest.mark.parametrize("kind", ["safetensors.index", "safetensors.index.fp16", "bin.index"])
def test_every_kind_of_index_is_looked_at(cached, kind):
    options, folder = cached
    stem = "pytorch_model" if kind.startswith("bin") else "diffusion_pytorch_model"
    index = folder / "adapter" / f"{stem}.{kind}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"marker_embeds": "../../x.safetensors"}}))
    options |= {"subfolder": "adapter"} | ({"variant": "fp16"} if "fp16" in kind else {})
    for place in (NAME, folder):
        with pytest.raises(ValueError, match="names the file"):
            OmniVideoAdapter.from_pretrained(place, **options)


def test_a_good_repository_loads_and_an_absent_one_is_left_to_the_library(cached):
    options, _ = cached
    loaded = OmniVideoForConditionalGeneration.from_pretrained(NAME, **options)
    assert loaded.adapter is not None
    check_place("lab/absent", options)
    with pytest.raises(OSError, match="in the cached files"):
        OmniVideoForConditionalGeneration.from_pretrained("lab/absent", **options)


def test_methods_keep_the_signatures_that_the_libraries_read():
    """diffusers passes a component only what the signature of its `save_pretrained` names."""
    for cls, base in ((OmniVideoAdapter, ModelMixin), (OmniVideoProcessor, ProcessorMixin)):
        for name in ("save_pretrained", "push_to_hub"):
            assert signature(getattr(cls, name)) == signature(getattr(base, name))
            assert getattr(cls, name).is_hub_call
    assert "variant" in signature(OmniVideoForConditionalGeneration.save_pretrained).parameters
