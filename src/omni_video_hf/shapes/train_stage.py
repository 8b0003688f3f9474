"""
The paper's stages on Omni-Video Shapes, by the package's own trainer and from a recipe, resumable.

`python -m omni_video_hf.shapes.train_stage align --model FOLDER --data FOLDER --output_dir FOLDER`, then `connect` and
`joint`; `--model` is what the one before wrote into its `pipeline`, `--data` what `latents` wrote.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from rich.console import Console
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel, set_seed

from ..processing_omni_video import OmniVideoProcessor
from ..training.checkpoints import last_checkpoint
from ..training.recipe import read_recipe
from ..training.run import load_for_stage, parameter_table, save_result
from ..training.sampling import OmniVideoBatchSampler
from ..training.trainer import OmniVideoTrainer
from .latents import RecoloredScenes, ScenePairs
from .muon import MuonFactory
from .runs import check_settings, multiplies_bfloat16, plain_attention_on_cpu, write_json
from .stage_data import StageCollator, StageSamples, siglip_features

RECIPES = Path(__file__).parent / "recipes"
# Shares of the batches by task; `understand` is questions and requests without a task.
SHARES = {
    "align": {"t2v": 6, "t2i": 2, "v2v": 3, "i2i": 2, "understand": 4},
    "connect": {"t2v": 4, "t2i": 2, "v2v": 3, "i2i": 2, "understand": 0},
    "joint": {"t2v": 7, "t2i": 4, "v2v": 5, "i2i": 3, "understand": 2},
}


def train(stage: str, words: Sequence[str]) -> Path:
    """
    Run a stage, from its last checkpoint where there is one.

    Args:
        stage: `align`, `connect` or `joint`.
        words: `--model`, `--data`, `--output_dir` and settings in place of the recipe's, as in `omni-video train`.

    Returns:
        The folder `pipeline` with the whole model.
    """
    if stage not in SHARES:
        raise ValueError(f"`stage` must be one of {', '.join(SHARES)}, got {stage!r}.")
    recipe = RECIPES / f"{stage}.yaml"
    on_cpu = [] if torch.cuda.is_available() else ["--use_cpu", "--bf16", str(multiplies_bfloat16()).lower()]
    run, args = read_recipe(recipe, [*words, *on_cpu])
    check_settings({"recipe": yaml.safe_load(recipe.read_text()), "command": list(words)}, Path(args.output_dir))
    set_seed(args.seed)
    folder = Path(run.model)
    model = load_for_stage(folder, args, precomputed=False)
    processor = OmniVideoProcessor.from_pretrained(folder / "processor")
    pairs = {kind: ScenePairs(Path(run.data), kind) for kind in ("video", "image")}
    features = None
    if args.loss_config.alignment_weight > 0:
        features = {kind: siglip_features(model.mllm, processor, pairs[kind]) for kind in pairs}
    trains_decoder = "decoder" in args.training_stage.trains and args.loss_config.flow_matching_weight > 0
    recolored = {kind: RecoloredScenes(Path(run.data), kind) for kind in pairs} if trains_decoder else None
    samples = StageSamples(
        pairs,
        processor,
        args.max_steps * args.train_batch_size,
        args.seed,
        target_features=features,
        recolored=recolored,
        null_states=model.vision_head.null_hidden_states().clone(),
        edits_as_targets=args.loss_config.flow_matching_weight == 0,
    )
    collator = StageCollator(
        processor,
        PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
    )
    sampler = OmniVideoBatchSampler(
        samples.buckets, args.train_batch_size, args.world_size, weights=SHARES[stage], seed=args.seed
    )
    trainer = OmniVideoTrainer(
        model,
        args,
        train_dataset=samples,
        data_collator=collator,
        train_batch_sampler=sampler,
        optimizer_cls_and_kwargs=(MuonFactory, {"lr": args.learning_rate}),
    )
    Console(stderr=True).print(parameter_table(model, stage))
    with plain_attention_on_cpu():
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    result = save_result(trainer, folder)
    write_json({"command": list(words), "log": trainer.state.log_history}, Path(args.output_dir) / "stage.json")
    return result


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2:])
