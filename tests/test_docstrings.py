"""Examples in the docstrings of what users call: each one is complete, and runs."""

import doctest
import inspect
from importlib import import_module

import pytest

MODULES = ("omni_video_hf", "omni_video_hf.training", "omni_video_hf.shapes", "omni_video_hf.media")

# Methods that transformers, diffusers and torch call, under the names that they have there.
CALLED_BY_LIBRARIES = {
    *("get_decoder", "set_decoder", "get_input_embeddings", "set_input_embeddings", "get_output_embeddings"),
    *("set_output_embeddings", "get_text_config", "prepare_inputs_for_generation", "register_to_config"),
    *("call_model_init", "compute_loss", "create_optimizer", "create_scheduler", "evaluation_loop", "log"),
    *("floating_point_ops", "get_eval_dataloader", "get_test_dataloader", "get_train_dataloader"),
    *("prediction_step", "training_step", "PlaceholderLabelsMixin.__call__"),
}
# A repository on the Hub, or a trained LoRA or data set comes first: docs/ and examples/ show these.
NEEDS_MORE_THAN_A_CHECKPOINT = {
    *("OmniVideoPushMixin.push_to_hub", "OmniVideoPushMixin.create_model_card", "OmniVideoSavingMixin.push_to_hub"),
    *("OmniVideoRepositoryMixin.push_to_hub", "OmniVideoRepositoryMixin.download", "complete_repository"),
    *("OmniVideoTrainer", "averaged_weights", "draw_previews", "gather_trained", "save_model", "train"),
    *("trained_parameters", "collect_lora_layers", "delete_adapters", "fuse_lora", "load_lora_weights"),
    *("save_lora_weights", "unfuse_lora", "set_adapters", "enable_lora", "disable_lora", "unload_lora_weights"),
    # Omni-Video 2 has no checkpoint in the package.
    *(
        "OmniVideo2Pipeline",
        "OmniVideo2Pipeline.__call__",
        "OmniVideo2ThinkingMixin.think",
        "OmniVideo2ThinkingMixin.answer",
    ),
    *("OmniVideo2RequestMixin.prepare_video_settings", "OmniVideo2DenoisingMixin.denoise"),
    *("OmniVideo2EncodersMixin.encode_instruction", "OmniVideo2EncodersMixin.encode_texts"),
    *("OmniVideo2EncodersMixin.encode_videos", "OmniVideo2EncodersMixin.encode_contexts"),
    *("OmniVideo2Processor", "OmniVideo2Processor.chat_inputs", "OmniVideo2Processor.video_pixels"),
    *("OmniVideo2Processor.clip_size", "OmniVideo2Processor.frame_numbers"),
}
# These still lack an example. The list may only become shorter.
WITHOUT = {
    *("OmniVideoForConditionalGeneration", "OmniVideoForConditionalGeneration.encode_condition"),
    *("OmniVideoForConditionalGeneration.forward", "OmniVideoForConditionalGeneration.get_mllm_hidden_states"),
    *("OmniVideoForConditionalGeneration.predict_velocity", "OmniVideoAdapter.set_attn_implementation"),
    *("OmniVideoForConditionalGeneration.set_attn_implementation", "OmniVideoTextMixin.get_image_features"),
    *("OmniVideoSavingMixin.from_pretrained", "OmniVideoSavingMixin.pipeline_components"),
    *("OmniVideoSavingMixin.save_pretrained", "PlaceholderLabelsMixin.without_placeholders"),
    *("VilaForConditionalGeneration", "VilaForConditionalGeneration.forward"),
    *("VilaForConditionalGeneration.get_image_features", "OmniVideoDenoisingMixin.denoise"),
    *("OmniVideoEncodersMixin.decode", "OmniVideoEncodersMixin.encode_null_instruction"),
    *("OmniVideoEncodersMixin.encode_source", "OmniVideoPipeline.answer"),
    *("OmniVideoRequestMixin.check_inputs", "OmniVideoRequestMixin.check_videos_fit"),
    *("OmniVideoRequestMixin.prepare_settings", "OmniVideoProcessor.__call__"),
    "OmniVideoProcessor.apply_chat_template",
}


def is_ours(found):
    return getattr(found, "__module__", "").startswith("omni_video_hf")


def public():
    """What the public modules export, and the public methods of the classes among it, by qualified name."""
    found = {}
    for module in map(import_module, MODULES):
        for exported in (getattr(module, name) for name in module.__all__):
            if not (inspect.isclass(exported) or inspect.isroutine(exported)) or not is_ours(exported):
                continue
            found[exported.__qualname__] = exported
            for name in dir(exported) if inspect.isclass(exported) else ():
                method = inspect.getattr_static(exported, name)
                method = getattr(method, "__func__", method)
                method = inspect.unwrap(method) if callable(method) else None
                if inspect.isfunction(method) and is_ours(method) and (name[0] != "_" or name == "__call__"):
                    found[method.__qualname__] = method
    return found


PUBLIC = public()


def has_example(found):
    return ">>>" in (found.__doc__ or "")


def is_excused(name):
    excused = CALLED_BY_LIBRARIES | NEEDS_MORE_THAN_A_CHECKPOINT
    return name in excused or name.rpartition(".")[2] in excused


def test_what_users_call_has_an_example():
    missing = {name for name, found in PUBLIC.items() if not has_example(found) and not is_excused(name)}
    assert missing == WITHOUT


@pytest.mark.parametrize("name", sorted(name for name, found in PUBLIC.items() if has_example(found)))
def test_the_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(PUBLIC[name]), {}, name, None, None)
    printed = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=printed.append)
    assert result.attempted > 1
    assert not result.failed, "".join(printed)
