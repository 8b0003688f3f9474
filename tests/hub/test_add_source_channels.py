import json
import shutil

import pytest
import tiny
import torch
from strangers import expected_outputs, last_json, open_doors, run_stranger

from omni_video_hf import OmniVideoForConditionalGeneration, OmniVideoPipeline, OmniVideoProcessor
from omni_video_hf.hub.add_source_channels import add_source_channels_to
from omni_video_hf.hub.inspection import repository_parts, repository_table

EDITS = {
    "t2i": {},
    "t2v": {},
    "i2i": {"image": torch.zeros(3, 32, 64)},
    "v2v": {"video": torch.zeros(5, 3, 32, 64)},
    "i2v": {"image": torch.zeros(3, 32, 64)},
}


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A repository whose decoder lies in several shards."""
    folder = tmp_path_factory.mktemp("origin") / "repository"
    pipe = tiny.pipeline()
    pipe.save_pretrained(folder)
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    pipe.transformer.save_pretrained(folder / "transformer", max_shard_size="20KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    OmniVideoPipeline.from_pretrained(folder).save_pretrained(folder)
    return folder


def latents(folder, task, **media):
    pipe = OmniVideoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", task=task, generator=generator, output_type="latent", **media).frames


@pytest.fixture(scope="module")
def grown(origin, tmp_path_factory):
    return add_source_channels_to(origin, tmp_path_factory.mktemp("grown") / "repository")


@pytest.mark.parametrize("task", EDITS)
def test_the_copy_generates_bit_for_bit_what_the_original_does(origin, grown, task):
    assert torch.equal(latents(grown, task, **EDITS[task]), latents(origin, task, **EDITS[task]))


def test_both_libraries_load_it_and_it_says_what_it_is(grown):
    model = OmniVideoForConditionalGeneration.from_pretrained(grown)
    assert model.adapter.config.source_conditioning == "both"
    assert model.decoder.config.in_channels == 32
    assert not model.decoder.patch_embedding.weight[:, 16:].any()
    (adapter,) = (part for part in repository_parts(grown) if part.name == "adapter")
    assert adapter.to_dict()["source_conditioning"] == "both"
    assert repository_table(repository_parts(grown), "grown").caption == "source conditioning: both"


def test_the_original_says_what_it_is(origin):
    assert repository_table(repository_parts(origin), "origin").caption == "source conditioning: context"


def test_other_files_are_the_same_and_sizes_are_right(origin, grown):
    for file in origin.rglob("*.safetensors"):
        name = file.relative_to(origin)
        if name.parts[0] != "transformer":
            assert (grown / name).read_bytes() == file.read_bytes()
    index = json.loads((grown / "model.safetensors.index.json").read_text())
    before = json.loads((origin / "model.safetensors.index.json").read_text())
    added = tiny.DECODER["num_attention_heads"] * tiny.DECODER["attention_head_dim"] * 16 * 4 * 4
    assert index["metadata"]["total_size"] == before["metadata"]["total_size"] + added
    modes = {file.stat().st_mode for file in (grown / "transformer").glob("*.safetensors")}
    assert modes == {file.stat().st_mode for file in (origin / "transformer").glob("*.safetensors")}


def test_a_saved_copy_stays_one(grown, tmp_path):
    OmniVideoPipeline.from_pretrained(grown).save_pretrained(tmp_path / "again")
    assert OmniVideoPipeline.from_pretrained(tmp_path / "again").adapter.config.source_conditioning == "both"


def test_nothing_is_written_where_it_cannot_work(origin, grown, tmp_path):
    with pytest.raises(ValueError, match="has source channels already"):
        add_source_channels_to(grown, tmp_path / "twice")
    with pytest.raises(ValueError, match="must be 'channels' or 'both', got 'context'"):
        add_source_channels_to(origin, tmp_path / "context", "context")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        add_source_channels_to(origin, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"lacks adapter/config\.json, transformer/config\.json"):
        add_source_channels_to(tmp_path / "empty", tmp_path / "nothing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_its_own_code_gives_the_same_without_the_package(grown, tmp_path):
    pipe = OmniVideoPipeline.from_pretrained(grown)
    with torch.no_grad():
        pipe.transformer.patch_embedding.weight[:, 16:].normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    pipe.save_pretrained(tmp_path / "trained")
    pipe = OmniVideoPipeline.from_pretrained(tmp_path / "trained")
    model = OmniVideoForConditionalGeneration.from_pretrained(tmp_path / "trained")
    wanted = expected_outputs(pipe, model, OmniVideoProcessor.from_pretrained(tmp_path / "trained"))
    found = last_json(run_stranger(open_doors(tmp_path / "trained"), tmp_path))
    assert found["pipeline"] == wanted["pipeline"]
    assert found["AutoModel"] == wanted["AutoModel"]


def test_a_link_out_of_the_repository_is_not_followed(origin, tmp_path):
    shutil.copytree(origin, tmp_path / "linked")
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "linked" / "notes.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ValueError, match="is a link to"):
        add_source_channels_to(tmp_path / "linked", tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


def test_damaged_repositories_are_refused_by_the_file(origin, tmp_path):
    shutil.copytree(origin, tmp_path / "damaged")
    config = tmp_path / "damaged" / "transformer" / "config.json"
    content = json.loads(config.read_text())
    del content["in_channels"]
    config.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must have whole `in_channels`, got None"):
        add_source_channels_to(tmp_path / "damaged", tmp_path / "grown")
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: cannot be read as JSON"):
        add_source_channels_to(tmp_path / "damaged", tmp_path / "grown")
    assert not (tmp_path / "grown").exists()
