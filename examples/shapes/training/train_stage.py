"""
The paper's stages on Omni-Video Shapes, by the package's own trainer and from a recipe, resumable.

`python -m examples.shapes.training.train_stage align --model FOLDER --data FOLDER --output_dir FOLDER`, then the other
stages of `MIXES` in order; `--model` is what the one before wrote into its `pipeline`, `--data` what `latents` wrote.
Under `torchrun` several processes share a batch: two of one thread train 1.5 times as many samples as one with two
threads.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from accelerate import PartialState
from rich.console import Console
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel, set_seed
from transformers.utils import is_torch_tf32_available

from omni_video_hf.processing.processing_omni_video import OmniVideoProcessor
from omni_video_hf.training.checkpointing.checkpoints import last_checkpoint
from omni_video_hf.training.data.batch_sampler import OmniVideoBatchSampler
from omni_video_hf.training.recipe import read_recipe
from omni_video_hf.training.train import leave_process_group, load_for_stage, parameter_table, save_result
from omni_video_hf.training.trainer import OmniVideoTrainer

from .latents import read_pairs
from .muon import MuonFactory
from .runs import check_settings, multiplies_bfloat16, plain_attention_on_cpu, write_json
from .stage_data import StageCollator, StageSamples, siglip_features

RECIPES = Path(__file__).parent / "recipes"
MAX_WORKERS = 14


class Mix(NamedTuple):
    """
    What the batches of a stage are of.

    Args:
        shares: of the batches by task; `understand` is questions and requests without a task.
        streams: what [`StageSamples`] brings besides.
    """

    shares: dict[str, int]
    streams: tuple[str, ...] = ()


LAST_MIX = Mix({"t2v": 8, "t2i": 5, "v2v": 13, "i2i": 6, "understand": 2}, ("phrases", "disguises"))
# The stages in order.
MIXES = {
    "align": Mix({"t2v": 6, "t2i": 2, "v2v": 3, "i2i": 2, "understand": 4}),
    "align_texts": Mix({"t2v": 6, "t2i": 3, "v2v": 5, "i2i": 3, "understand": 1}, ("phrases",)),
    "connect": Mix({"t2v": 4, "t2i": 2, "v2v": 3, "i2i": 2, "understand": 0}),
    "joint": Mix({"t2v": 7, "t2i": 4, "v2v": 7, "i2i": 4, "understand": 2}, ("phrases",)),
    "compose": Mix({"t2v": 3, "t2i": 2, "v2v": 6, "i2i": 4, "understand": 1}, ("phrases", "disguises")),
    "refine": Mix({"t2v": 7, "t2i": 4, "v2v": 10, "i2i": 6, "understand": 2}, ("phrases", "disguises")),
    "polish": Mix({"t2v": 6, "t2i": 4, "v2v": 14, "i2i": 7, "understand": 1}, ("phrases", "disguises")),
    "finish": LAST_MIX,
    "settle": LAST_MIX,
}


def train(stage: str, words: Sequence[str]) -> Path:
    """
    Run a stage, from its last checkpoint where there is one.

    Args:
        stage: one of `MIXES`.
        words: `--model`, `--data`, `--output_dir` and settings in place of the recipe's, as in `omni-video train`.

    Returns:
        The folder `pipeline` with the whole model.
    """
    if stage not in MIXES:
        raise ValueError(f"`stage` must be one of {', '.join(MIXES)}, got {stage!r}.")
    mix = MIXES[stage]
    recipe = RECIPES / f"{stage}.yaml"
    run, args = read_recipe(recipe, [*_settings_of_the_machine(), *words])
    processes = PartialState().num_processes
    args.per_device_train_batch_size = _share(args.per_device_train_batch_size, processes)
    settings = {"recipe": yaml.safe_load(recipe.read_text()), "command": list(words), "processes": processes}
    with PartialState().main_process_first():
        check_settings(settings, Path(args.output_dir), Path(run.model), Path(run.data))
    set_seed(args.seed)
    folder = Path(run.model)
    model = load_for_stage(folder, args, precomputed=False)
    processor = OmniVideoProcessor.from_pretrained(folder / "processor")
    pairs = read_pairs(Path(run.data))
    features = None
    if args.loss_config.alignment_weight > 0:
        features = {key: siglip_features(model.mllm, processor, pairs[key]) for key in pairs}
    length = args.max_steps * args.train_batch_size * processes
    samples = StageSamples(pairs, processor, length, args.seed, features, **dict.fromkeys(mix.streams, True))
    collator = StageCollator(
        processor,
        PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
    )
    sampler = OmniVideoBatchSampler(
        samples.buckets, args.train_batch_size, processes, weights=mix.shares, seed=args.seed
    )
    trainer = OmniVideoTrainer(
        model,
        args,
        train_dataset=samples,
        data_collator=collator,
        train_batch_sampler=sampler,
        optimizer_cls_and_kwargs=(MuonFactory, {"lr": args.learning_rate, "weight_decay": args.weight_decay}),
    )
    if trainer.is_world_process_zero():
        Console(stderr=True).print(parameter_table(model, stage))
    with plain_attention_on_cpu():
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    result = save_result(trainer, folder)
    if trainer.is_world_process_zero():
        written = {"command": list(words), "processes": processes, "log": trainer.state.log_history}
        write_json(written, Path(args.output_dir) / "stage.json")
    leave_process_group(trainer)
    return result


def _settings_of_the_machine() -> list[str]:
    """What `words` may say otherwise."""
    if torch.cuda.is_available():
        # Matrices are too small for bfloat16 to pay, and one core makes batches slower than a GPU trains on them.
        workers = min(MAX_WORKERS, max(1, (os.cpu_count() or 2) - 2))
        tf32 = str(is_torch_tf32_available()).lower()
        return ["--bf16", "false", "--tf32", tf32, "--dataloader_num_workers", str(workers)]
    several = ["--ddp_backend", "gloo"] if "WORLD_SIZE" in os.environ else []
    return ["--use_cpu", "--bf16", str(multiplies_bfloat16()).lower(), *several]


def _share(batch_size: int, processes: int) -> int:
    """What each process takes of a batch."""
    if batch_size % processes:
        raise ValueError(
            f"A batch of {batch_size} cannot be shared among {processes} processes: take a divisor of it."
        )
    return batch_size // processes


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2:])
