"""A training run: load model and data of a recipe, train, and write a complete repository."""

from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from rich.console import Console
from rich.table import Table
from transformers import set_seed
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from ..hub.staging import check_finished
from ..models.configuration_omni_video import OmniVideoConfig
from ..models.modeling_omni_video import OmniVideoForConditionalGeneration
from ..processing.processing_omni_video import OmniVideoProcessor
from ..utils.modules import dtype_of
from ..utils.names import is_repository_name
from .arguments import OmniVideoTrainingArguments
from .checkpointing import checkpoints
from .checkpointing.result import lora_deltas, tied_names, write_pipeline
from .checkpointing.run_lock import only_training
from .data.collator import OmniVideoDataCollator
from .data.loss_data import check_losses
from .data.run_data import is_precomputed, load_evaluation_data, load_training_data, make_sampler, names_of_data
from .lora import ADAPTER_NAME, add_lora, save_lora
from .recipe import RunArguments
from .reporting.previews import check_previews, load_preview_pipeline
from .reporting.publishing import push, summarize
from .stages import part_of, stage_config
from .trainer import OmniVideoTrainer

PIPELINE_FOLDER = "pipeline"
LORA_FOLDER = "lora"


def train(run: RunArguments, args: OmniVideoTrainingArguments, console: Console | None = None) -> Path:
    """
    Train, and write the repository of the trained model.

    Returns:
        `output_dir/pipeline`, a copy of the starting repository with the trained weights. After the `lora` stage the
        LoRA is merged into its weights, and `output_dir/lora` contains the LoRA alone.

    Raises:
        ValueError: for unsuitable data, settings or folders, before anything is loaded.
    """
    console = console or Console(stderr=True)
    with only_training(args):
        return _train(run, args, console)


def _train(run: RunArguments, args: OmniVideoTrainingArguments, console: Console) -> Path:
    checkpoint = _checkpoint_to_resume(run, args)
    origin = run.model or ""  # which `RunArguments` refuses
    if not Path(origin).is_dir() and not is_repository_name(origin):
        raise ValueError(f"`model` {origin} is neither a folder nor a Hub repository (`owner/name`).")
    check_previews(args.previews or [])
    _check_reporters(args)
    folder = Path(origin if Path(origin).is_dir() else snapshot_download(origin, revision=run.revision))
    check_finished(folder)
    processor = OmniVideoProcessor.from_pretrained(folder)
    data = load_training_data(run, processor, console)
    eval_data = load_evaluation_data(run, processor, console)
    check_losses(data.buckets, args.loss_config, args.stage, run.task_weights)
    if eval_data is not None:
        check_losses(eval_data.buckets, args.loss_config, args.stage, name="eval_data")
    data_seed = args.seed if args.data_seed is None else args.data_seed
    batch_size = args.per_device_train_batch_size
    sampler = make_sampler(data, run, batch_size, args.world_size, data_seed)
    set_seed(args.seed)
    model = load_for_stage(folder, args, is_precomputed(data))
    model.config._name_or_path = run.model  # not the path in a local cache, which is useless to others
    trainer = OmniVideoTrainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=eval_data,
        data_collator=OmniVideoDataCollator(processor.tokenizer.pad_token_id),
        train_batch_sampler=sampler,
        preview_pipeline=load_preview_pipeline(folder, model) if args.preview_steps > 0 else None,
    )
    trainer.base_revision = run.revision
    if trainer.is_world_process_zero():
        console.print(parameter_table(model, args.stage))
    trainer.train(resume_from_checkpoint=checkpoint)
    result = save_result(trainer, folder)
    if trainer.is_world_process_zero():
        for written in (result, result.with_name(LORA_FOLDER)):
            if written.is_dir():
                summarize(trainer, names_of_data(run)).save(written)
        if args.push_to_hub:
            push(trainer, result.with_name(LORA_FOLDER) if args.training_stage.lora else result)
    leave_process_group(trainer)
    return result


def _check_reporters(args: OmniVideoTrainingArguments) -> None:
    """Refuse loggers whose packages are missing, before the model is loaded."""
    for name, kind in zip(args.report_to, get_reporting_integration_callbacks(args.report_to), strict=True):
        try:
            kind()
        except RuntimeError as error:
            raise ValueError(
                f"`report_to`: {name} is not installed ({error}). Install it, or leave it out."
            ) from error


def leave_process_group(trainer: OmniVideoTrainer) -> None:
    """
    Destroy the process group of a run. Every process must call this after its last work.

    Otherwise a thread of the group may free its last tensor while Python exits, which aborts the process, so that the
    launcher kills the others. Destroying the group waits for its threads, but only if no object refers to the group
    any more, such as the wrapper of the model.
    """
    trainer.model_wrapped = trainer.model
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


def load_for_stage(
    folder: Path, args: OmniVideoTrainingArguments, precomputed: bool
) -> OmniVideoForConditionalGeneration:
    """
    Load the model in float32 with the components that the stage uses; other components are not read.

    bf16 weights would lose small updates, as with a learning rate of 3e-6. `bf16: true` still computes in bf16.
    Previews load other components into their own pipeline, so that the training does not depend on previews.
    """
    config = stage_config(OmniVideoConfig.from_pretrained(folder), args.loss_config, precomputed)
    model = OmniVideoForConditionalGeneration.from_pretrained(folder, config=config, dtype=torch.float32)
    if args.training_stage.lora:
        add_lora(model, cast("dict[str, Any] | None", args.lora))
    return model


def save_result(trainer: OmniVideoTrainer, base: Path) -> Path:
    """
    Write the result of a run into its `output_dir`. Every process must call this.

    Trained weights are stored in `args.result_dtype`, all others with the dtype that they have in `base`.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir) / PIPELINE_FOLDER
    with only_training(args), trainer.averaged_weights():
        weights = trainer.gather_trained()
        if trainer.is_world_process_zero():
            model, dtype = trainer.accelerator.unwrap_model(trainer.model), dtype_of(args.result_dtype)
            if args.training_stage.lora:
                save_lora(model, folder.with_name(LORA_FOLDER))
                write_pipeline(base, folder, {}, dtype, deltas=lora_deltas(model, ADAPTER_NAME))
            else:
                write_pipeline(base, folder, weights, dtype, aliases=tied_names(model))
        trainer.accelerator.wait_for_everyone()
    return folder


def parameter_table(model: OmniVideoForConditionalGeneration, stage: str) -> Table:
    """A table with the number of loaded and of trained parameters of each component."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        row = counts.setdefault(part_of(name), [0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() * parameter.requires_grad
    table = Table("part", "parameters", "trained", title=f"stage {stage}")
    for part, (total, trained) in counts.items():
        table.add_row(part, f"{total:,}", f"{trained:,}")
    return table


def _checkpoint_to_resume(run: RunArguments, args: OmniVideoTrainingArguments) -> str | None:
    found = checkpoints.numbered(args.output_dir)
    if found and not run.resume:
        raise ValueError(
            f"`output_dir` {args.output_dir} contains {found[-1].name} of an earlier run: pass `--resume` to resume "
            "from it, or choose another folder."
        )
    return checkpoints.last_checkpoint(args.output_dir)


__all__ = ["leave_process_group", "load_for_stage", "parameter_table", "save_result", "train"]
