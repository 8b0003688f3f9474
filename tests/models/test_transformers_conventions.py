"""What trainers, `generate` and tools around transformers expect of every model that answers in text."""

import types
from pathlib import Path

import pytest
import tiny
import torch
from other_mllms import LLAVA, QWEN, other_inputs
from transformers.modeling_outputs import BaseModelOutputWithPooling

from omni_video_hf import OmniVideoForConditionalGeneration, VilaForConditionalGeneration
from omni_video_hf.models.modeling_vila import VilaModel

IMAGE = 160  # the placeholder's id, behind the 160 ids of the vocabulary


@pytest.fixture(scope="module", params=["vila", "omni", "mllm component"])
def model(request: pytest.FixtureRequest) -> OmniVideoForConditionalGeneration | VilaForConditionalGeneration:
    if request.param == "mllm component":
        return tiny.model(adapter_config=None, decoder_config=None)
    whole = tiny.model()
    return whole.mllm if request.param == "vila" else whole


@pytest.fixture
def text() -> dict[str, torch.Tensor]:
    return tiny.mllm_inputs(images=0)


# --- labels -----------------------------------------------------------------------------------------------------


def test_labels_that_are_a_copy_of_the_ids_learn_no_placeholder(model) -> None:
    inputs = tiny.mllm_inputs()
    labels = inputs["input_ids"].clone()
    wanted = model(**inputs, labels=labels.masked_fill(labels == IMAGE, -100)).loss
    assert torch.equal(model(**inputs, labels=labels).loss, wanted)
    assert torch.equal(model.forward(**inputs, labels=labels).loss, wanted)
    assert int((labels == IMAGE).sum()) == 8  # the caller's tensor is as it was


def test_a_loss_put_in_place_of_forward_gets_labels_without_placeholders(model, monkeypatch) -> None:
    seen = {}
    monkeypatch.setattr(model, "forward", types.MethodType(lambda self, **kwargs: seen.update(kwargs), model))
    ids = tiny.mllm_inputs()["input_ids"]
    model(input_ids=ids, labels=ids, shift_labels=ids)
    for name in ("labels", "shift_labels"):
        assert torch.equal(seen[name], ids.masked_fill(ids == IMAGE, -100))


@pytest.mark.parametrize("label", [161, 5000, -1])
def test_labels_outside_the_vocabulary_are_named(model, text, label) -> None:
    labels = text["input_ids"].clone()
    labels[0, 3] = label
    with pytest.raises(ValueError, match=rf"`labels` contain {label}, but the vocabulary has the ids 0 to 159"):
        model(**text, labels=labels)


# --- outputs ----------------------------------------------------------------------------------------------------


def test_tuples_instead_of_outputs(model, text) -> None:
    labels = text["input_ids"]
    outputs = model(**text, labels=labels)
    loss, logits = model(**text, labels=labels, return_dict=False)[:2]
    assert torch.equal(loss, outputs.loss)
    assert torch.equal(logits, outputs.logits)
    assert torch.equal(model(**text, return_dict=False)[0], outputs.logits)


def test_base_model_gives_hidden_states_behind_the_final_norm(model, text) -> None:
    base = model.base_model
    assert type(base) is VilaModel
    assert base is getattr(model, model.base_model_prefix)
    assert model.get_decoder() is base.language_model
    logits = model.get_output_embeddings()(base(**text).last_hidden_state)
    assert torch.equal(logits, model(**text).logits)


def test_a_model_without_mllm_is_its_own_base() -> None:
    model = tiny.model(enable_mllm=False)
    assert model.base_model is model
    for method in (model.get_decoder, model.generate, lambda: model.get_image_features(torch.zeros(1, 3, 42, 42))):
        with pytest.raises(ValueError, match="has no mllm"):
            method()


def test_image_features(model) -> None:
    pixels = tiny.mllm_inputs()["pixel_values"]
    outputs = model.get_image_features(pixels, output_hidden_states=True)
    assert isinstance(outputs, BaseModelOutputWithPooling)
    assert len(outputs.hidden_states) == 3  # the embeddings and two layers: the third is never built
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert [tuple(features.shape) for features in outputs.pooler_output] == [(4, 48), (4, 48)]
    assert model.get_image_features(pixels).hidden_states is None
    last, pooled = model.get_image_features(pixels, return_dict=False)
    assert torch.equal(last, outputs.last_hidden_state)
    assert torch.equal(pooled, outputs.pooler_output)


def test_the_head_is_sharded_by_columns_between_processes(model) -> None:
    (plan,) = (plan for name, plan in model._tp_plan.items() if name.endswith("lm_head"))
    assert plan == "colwise_gather_output"
    assert any(name.endswith("layers.*.mlp.down_proj") for name in model._tp_plan)


def test_the_whole_configuration_answers_for_the_mllm(tmp_path: Path) -> None:
    config = tiny.config()
    assert config.image_token_id == IMAGE
    assert config.vision_config is config.mllm_config.vision_config
    assert config.get_text_config() is config.mllm_config.text_config
    assert not {"image_token_id", "vision_config"} & set(config.to_dict())  # stored once on the disk
    assert not hasattr(config, "video_token_id")  # VILA has no token for videos


def test_tied_embeddings_of_the_whole_model_are_the_mllms() -> None:
    tied = tiny.model(tie_word_embeddings=True)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    free = tiny.model()
    assert free.get_output_embeddings().weight is not free.get_input_embeddings().weight


# --- generate ---------------------------------------------------------------------------------------------------

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def test_generate_from_embeddings(model, text) -> None:
    embeds = model.get_input_embeddings()(text["input_ids"])
    wanted = model.generate(**text, **GREEDY)[:, text["input_ids"].shape[1] :]
    mask = text["attention_mask"]
    assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY), wanted)


def test_generate_from_embeddings_that_hold_image_features(model) -> None:
    inputs = tiny.mllm_inputs()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embeds = model.get_input_embeddings()(ids.masked_fill(ids == IMAGE, 0))
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    embeds = embeds.masked_scatter((ids == IMAGE)[..., None], features)
    answer = model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY)
    assert torch.equal(answer, model.generate(**inputs, **GREEDY)[:, ids.shape[1] :])
    with pytest.raises(ValueError, match="insert the features"):
        model.generate(inputs_embeds=embeds, pixel_values=inputs["pixel_values"], **GREEDY)


def test_beams_keep_the_images_of_every_prompt_in_order(model) -> None:
    inputs = tiny.mllm_inputs(batch=2, images=2)
    start = inputs["input_ids"].shape[1]
    beams = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    found = model.generate(**inputs, **beams, **GREEDY)
    for row, (sequence, score) in enumerate(zip(found.sequences, found.sequences_scores, strict=True)):
        pixels = inputs["pixel_values"][row // 3 * 2 :][:2]
        logits = model(sequence[None], pixel_values=pixels).logits[0, start - 1 : -1].log_softmax(dim=-1)
        torch.testing.assert_close(score, logits.gather(1, sequence[start:, None]).mean())


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 2},
        {"num_beams": 1, "return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    ],
)
def test_ways_to_generate_give_the_same_answer(model, options) -> None:
    inputs = tiny.mllm_inputs(batch=1)
    answer = model.generate(**inputs, **options, **GREEDY)
    assert torch.equal(getattr(answer, "sequences", answer), model.generate(**inputs, **GREEDY))
    if "output_scores" in options:
        assert len(answer.scores) == len(answer.hidden_states) == 4
        assert len(answer.hidden_states[0]) == 3


def test_an_answer_goes_on_from_its_cache(model) -> None:
    inputs, options = tiny.mllm_inputs(), {"do_sample": False, "return_dict_in_generate": True}
    begun = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, **options)
    ids, cache = begun.sequences, begun.past_key_values
    ended = model.generate(ids, past_key_values=cache, max_new_tokens=2, min_new_tokens=2, **options)
    assert torch.equal(ended.sequences, model.generate(**inputs, **GREEDY))


@torch.no_grad()
def test_one_graph_holds_the_mllm_with_images_and_labels() -> None:
    model, inputs = tiny.model().mllm, tiny.mllm_inputs()
    labels = inputs["input_ids"]
    wanted = model(**inputs, labels=labels).loss  # transformers hooks into its layers in the first call
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs, labels=labels).loss, wanted)


def test_generate_about_images_that_are_not_there_is_refused(model) -> None:
    inputs = tiny.mllm_inputs()
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="8 image tokens, but there are no `pixel_values`"):
        model.generate(**inputs, **GREEDY)


# --- MLLMs of other families ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "mllm"), [("llava", LLAVA), ("qwen2_5_vl", QWEN)])
def test_an_mllm_of_another_family_answers_and_conditions(family: str, mllm: dict, tmp_path: Path) -> None:
    model, inputs = tiny.model(mllm_config=mllm), other_inputs(family)
    assert model.config.mllm_config.model_type == family
    answer = model.generate(**inputs, **GREEDY)
    assert torch.equal(answer, model.mllm.generate(**inputs, **GREEDY))

    labels = inputs["input_ids"].clone()
    labels[:, :6] = -100
    latents = torch.randn(2, 16, 2, 8, 8)
    outputs = model(**inputs, labels=labels, latents=latents, prompt_embeds=torch.randn(2, 5, 32))
    assert torch.equal(outputs.answer_loss, model.mllm(**inputs, labels=labels).loss)
    outputs.loss.backward()
    for part in (model.mllm, model.vision_head, model.adapter, model.decoder):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())

    states = model.get_mllm_hidden_states(**inputs)
    assert states.shape == (2, 12, 48)
    context = model.encode_condition(states, torch.randn(2, 5, 32))
    assert context.shape[::2] == (2, 32)
    black = model.get_mllm_hidden_states(**(inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}))
    assert not torch.allclose(states, black)  # the image reaches the visual tokens

    model.save_pretrained(tmp_path)
    loaded = OmniVideoForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.generate(**inputs, **GREEDY), answer)
    assert torch.equal(loaded.get_mllm_hidden_states(**inputs), states)


def test_beams_keep_the_images_of_another_family_in_order() -> None:
    model = tiny.model(mllm_config=LLAVA)
    inputs = other_inputs("llava")
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"]], dim=1)
    pixels = torch.randn(4, 3, 28, 28)
    options = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True} | GREEDY
    found = model.generate(ids, pixel_values=pixels, **options)
    for row, (sequence, score) in enumerate(zip(found.sequences, found.sequences_scores, strict=True)):
        logits = model(sequence[None], pixel_values=pixels[2 * row : 2 * row + 2]).logits[0, 23:-1]
        torch.testing.assert_close(score, logits.log_softmax(dim=-1).gather(1, sequence[24:, None]).mean())
