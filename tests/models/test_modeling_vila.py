import json
import shutil

import golden
import pytest
import tiny
import torch
from golden import VILA, VILA_EXPECTED, relative_error
from safetensors.torch import load_file

from conversion.key_maps import PROJECTOR_RULES, rename
from omni_video_hf import VilaConfig, VilaForConditionalGeneration
from omni_video_hf.models.modeling_vila import merge_patches

CASES = [
    (name, key.removesuffix(".input_ids"))
    for name, expected in VILA_EXPECTED.items()
    for key in expected
    if key.endswith(".input_ids")
]
MAX_LENGTH = 400  # tokenizer_model_max_length of the golden checkpoint


@pytest.fixture(scope="module")
def vila():
    """The golden checkpoints, odd and even grid, as our models."""
    models = {}
    for name in VILA_EXPECTED:
        folder = VILA / name
        config = VilaConfig(
            text_config=json.loads((folder / "llm" / "config.json").read_text()),
            vision_config=json.loads((folder / "vision_tower" / "config.json").read_text()),
            image_token_id=160,
        )
        weights = {}
        for key, tensor in load_file(folder / "llm" / "model.safetensors").items():
            weights[key if key.startswith("lm_head") else f"model.language_model.{key.removeprefix('model.')}"] = (
                tensor
            )
        for key, tensor in load_file(folder / "vision_tower" / "model.safetensors").items():
            weights[f"model.vision_tower.{key.removeprefix('vision_model.')}"] = tensor
        projector, unknown = rename(load_file(folder / "mm_projector" / "model.safetensors"), PROJECTOR_RULES)
        assert not unknown
        weights |= {f"model.multi_modal_projector.{key}": tensor for key, tensor in projector.items()}
        models[name] = VilaForConditionalGeneration(config).eval()
        result = models[name].load_state_dict(weights, strict=False)
        assert not result.missing_keys
        # Behind the selected hidden state: upstream computes and ignores these.
        assert all(".head." in key or ".layers.2." in key for key in result.unexpected_keys)
    return models


def expand(row: torch.Tensor, mask: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One placeholder a token instead of one -200 an image."""
    repeats = torch.where(row == -200, tokens, 1)
    return torch.where(row == -200, 160, row).repeat_interleave(repeats), mask.repeat_interleave(repeats)


@pytest.mark.parametrize(("name", "case"), CASES)
@torch.no_grad()
def test_hidden_states_are_upstreams(vila, name, case):
    model, expected = vila[name], VILA_EXPECTED[name]
    pairs = zip(expected[f"{case}.input_ids"], expected[f"{case}.attention_mask"], strict=True)
    rows = [expand(ids, mask, model.config.image_seq_length) for ids, mask in pairs]
    limit = MAX_LENGTH if case == "image_truncated" else None
    ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in rows], batch_first=True)[:, :limit]
    mask = torch.nn.utils.rnn.pad_sequence([mask for _, mask in rows], batch_first=True)[:, :limit]
    images = int((ids == 160).sum()) // model.config.image_seq_length
    pixels = expected["pixel_values"][:images] if images else None

    output = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, output_hidden_states=True)
    hidden, wanted = output.hidden_states[-1], expected[f"{case}.last_hidden"]
    kept, wanted_kept = mask.bool(), expected[f"{case}.out_attention_mask"].bool()
    if not images:  # upstream keeps masked positions of text and removes those of prompts with images
        kept, wanted_kept = torch.ones_like(kept), torch.ones_like(wanted_kept)
    assert relative_error(hidden[kept], wanted[wanted_kept]) < 1e-4
    if f"{case}.logits" in expected:
        assert relative_error(output.logits[kept], expected[f"{case}.logits"][wanted_kept]) < 1e-4
    if f"{case}.inputs_embeds" in expected and images:
        features = output.image_hidden_states.flatten(0, 1)
        assert relative_error(features, expected["image_features"][:images].flatten(0, 1)) < 1e-4


@pytest.mark.parametrize("name", list(VILA_EXPECTED))
@torch.no_grad()
def test_vision_path(vila, name):
    expected = VILA_EXPECTED[name]
    features = vila[name].get_image_features(expected["pixel_values"])
    assert relative_error(features.last_hidden_state, expected["vision_features"]) < 1e-4
    assert relative_error(features.pooler_output, expected["image_features"]) < 1e-4
    assert torch.equal(merge_patches(expected["vision_features"]), expected["downsampled"])


@pytest.mark.parametrize(
    ("side", "blocks"),
    [
        (3, [[1, 2, 4, 5], [7, 8, 0, 0], [3, 0, 6, 0], [9, 0, 0, 0]]),
        (4, [[1, 2, 5, 6], [9, 10, 13, 14], [3, 4, 7, 8], [11, 12, 15, 16]]),
    ],
)
def test_merge_runs_column_by_column(side, blocks):
    patches = torch.arange(1.0, side * side + 1)[None, :, None]
    assert merge_patches(patches).int().tolist() == [blocks]


def test_merge_of_the_released_grid():
    merged = merge_patches(torch.arange(1.0, 730)[None, :, None])[0].int().tolist()
    assert [merged[index] for index in (0, 1, 13, 14, 195)] == [
        [1, 2, 28, 29],
        [55, 56, 82, 83],
        [703, 704, 0, 0],
        [3, 4, 30, 31],
        [729, 0, 0, 0],
    ]
    with pytest.raises(ValueError, match="728"):
        merge_patches(torch.zeros(1, 728, 2))


@pytest.mark.parametrize("name", list(VILA_EXPECTED))
def test_greedy_answer_with_and_without_left_padding(vila, name):
    model, expected = vila[name], VILA_EXPECTED[name]
    ids, mask = expand(
        expected["two_images.input_ids"][0], expected["two_images.attention_mask"][0], model.config.image_seq_length
    )
    arguments = {
        "pixel_values": expected["pixel_values"],
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
    }
    for padding in (0, 3):
        padded = torch.nn.functional.pad(ids, (padding, 0))[None]
        padded_mask = torch.nn.functional.pad(mask, (padding, 0))[None]
        output = model.generate(input_ids=padded, attention_mask=padded_mask, **arguments)
        assert torch.equal(output[:, padded.shape[1] :], expected["two_images.greedy_ids"])
    uncached = model.generate(input_ids=ids[None], attention_mask=mask[None], use_cache=False, **arguments)
    assert torch.equal(uncached[:, len(ids) :], expected["two_images.greedy_ids"])


def test_placeholders_are_counted_against_features(vila):
    model = vila["checkpoint"]
    pixels = VILA_EXPECTED["checkpoint"]["pixel_values"]
    ids = torch.tensor([[160] * 4 + [5, 6, 7]])
    with pytest.raises(ValueError, match=r"4 tokens.* 8 features"):
        model(input_ids=ids, pixel_values=pixels)
    with pytest.raises(ValueError, match=r"4 image tokens.*0 features"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_tower_ends_at_the_selected_layer():
    for layer, kept in ((-2, 2), (-1, 3), (0, 0), (1, 1)):
        config = VilaConfig(
            text_config=dict(tiny.TEXT),
            vision_config=dict(tiny.VISION),
            vision_feature_layer=layer,
            image_token_id=160,
        )
        tower = VilaForConditionalGeneration(config).model.vision_tower
        assert len(tower.encoder.layers) == kept
        assert not hasattr(tower, "head")


def test_save_and_load(vila, tmp_path):
    model = vila["checkpoint"]
    inputs = tiny.mllm_inputs()
    model.save_pretrained(tmp_path)
    loaded = VilaForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    loaded_buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffer, loaded_buffers[name]) for name, buffer in model.named_buffers())
    shutil.rmtree(tmp_path)


def test_golden_prompt_cases_are_all_covered():
    assert {case for _, case in CASES} >= {"prompt_vid_gen", "prompt_vid_edit", "prompt_img_edit", "batch_padded"}
    assert golden.PROMPTS["prompts"]
