import re

import pytest
import tiny
import torch
import training

from omni_video_hf import OmniVideoConfig, OmniVideoForConditionalGeneration
from omni_video_hf.training import STAGES
from omni_video_hf.training.stages import freeze_all_but, stage_config

VISUAL_CONTEXT = "adapter.visual_context_adapter."
MOVES = {
    "align": ("mllm.lm_head.", "vision_head."),
    "connect": ("adapter.",),
    "joint": ("mllm.lm_head.", "vision_head.", "adapter.", "decoder."),
    "decoder": (VISUAL_CONTEXT, "decoder."),
}
# Each visual token is alone in the adapter's encoder: with one key, what queries and keys are changes nothing.
# Their gradient is nothing, or on some processors what rounding leaves, which the optimizer takes for a direction.
ALONE = re.compile(r"adapter\.query_transformer\.encoder_layers\.\d+\.self_attn\.[qk]_proj\.")


@pytest.mark.parametrize("stage", list(MOVES))
def test_exactly_the_named_parameters_move(stage, tmp_path):
    model = tiny.model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    samples = [training.instructed("v2v", number) for number in range(4)]
    run = training.trainer(tmp_path, samples, model, stage=stage, condition_dropout=0.0)
    run.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    named = {name for name in before if name.startswith(MOVES[stage])}
    assert moved <= named
    assert all(ALONE.match(name) for name in named - moved)
    held = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if name.startswith(MOVES[stage])}
    assert len(run.optimizer.state) == len(held)


def test_parts_that_the_losses_do_not_run_are_left_out():
    def parts(stage, precomputed, **options):
        config = stage_config(OmniVideoConfig(), STAGES[stage].loss_config(options), precomputed)
        present = {"mllm": config.enable_mllm, "adapter": config.adapter_config, "decoder": config.decoder_config}
        return {name for name, value in present.items() if value}

    assert parts("align", precomputed=False) == {"mllm"}
    assert parts("align", precomputed=True, answer_weight=0.0) == set()
    assert parts("connect", precomputed=True) == {"adapter", "decoder"}
    text = {"text_alignment_weight": 1.0, "flow_matching_weight": 0.0}
    assert parts("connect", precomputed=True, **text) == {"adapter"}
    assert parts("decoder", precomputed=False) == {"mllm", "adapter", "decoder"}
    assert parts("joint", precomputed=True) == {"mllm", "adapter", "decoder"}


def test_what_no_loss_reaches_stays_frozen_and_need_not_be_there():
    """As the beginning of the paper's stage 2, with the vision head: both bridges move into the space of texts."""
    options = {"text_alignment_weight": 1.0, "flow_matching_weight": 0.0}
    losses = STAGES["joint"].loss_config(options)
    config = stage_config(tiny.config(), losses, precomputed=False)
    assert config.decoder_config is None
    model = OmniVideoForConditionalGeneration(config)
    names = freeze_all_but(model, STAGES["joint"], losses)
    assert {name.split(".")[0] for name in names} == {"mllm", "vision_head", "adapter"}
    assert not any("visual_context_adapter" in name for name in names)


def test_a_part_that_is_not_there_and_an_empty_stage_are_refused():
    model = tiny.model(enable_mllm=False)
    stage = STAGES["align"]
    with pytest.raises(ValueError, match="trains the text_head, which this model does not have"):
        freeze_all_but(model, stage, stage.loss_config())
    names = freeze_all_but(model, stage, stage.loss_config({"answer_weight": 0.0}))
    assert {name.split(".")[0] for name in names} == {"vision_head"}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing would train: add LoRA layers first"):
        freeze_all_but(model, STAGES["lora"], STAGES["lora"].loss_config())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": "conect"}, r"`stage`: unknown 'conect' \(did you mean 'connect'\?\)"),
        ({"losses": {"alignement": "cosine"}}, r"unknown 'alignement' \(did you mean 'alignment'\?\)"),
        ({"losses": {"alignment": "l1"}}, "`alignment` must be one of cosine, squared_l2"),
        ({"part_learning_rates": {"decodr": 1e-4}}, r"unknown 'decodr' \(did you mean 'decoder'\?\)"),
        ({"part_learning_rates": {"decoder": -1.0}}, "decoder must be a number of 0 or more"),
        ({"condition_dropout": 1.2}, "`condition_dropout` must be between 0 and 1, got 1.2"),
        ({"condition_dropout": 0.7, "prompt_dropout": 0.4}, "add up to 1 at most"),
        ({"ema_decay": 1.0}, "`ema_decay` must be 0"),
        ({"preview_steps": 2}, "`previews` is empty"),
        ({"frozen_dtype": "bfloat16"}, "needs `bf16: true`"),
        ({"frozen_dtype": "float61"}, "unknown 'float61'"),
        ({"lora": {"r": 4}}, "use `stage: lora`"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        training.arguments(tmp_path, **settings)
