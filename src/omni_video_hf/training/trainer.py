"""`OmniVideoTrainer`: the Trainer of transformers for a model with several losses, tasks and frozen components."""

import contextlib
import logging
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    TrainOutput,
)

from ..models.modeling_omni_video import OmniVideoForConditionalGeneration
from ..models.outputs import OmniVideoOutput
from ..pipelines.pipeline_omni_video import OmniVideoPipeline
from ..tasks import TASKS
from ..utils.modules import dtype_of
from ..utils.names import check_known
from .arguments import OmniVideoTrainingArguments
from .checkpointing import checkpoints
from .checkpointing.randomness import derive_seed, draw_dropouts, draw_source_dropout, kept_chance, sample_generators
from .checkpointing.result import tied_names
from .checkpointing.run_lock import only_training
from .data.rounds import RoundsOfBatches
from .data.streaming import stream_loader
from .lora import checkpoint_metadata, save_lora
from .reporting.callbacks import CloseLogAtCheckpoint, EpochOfSampler, MovingAverage, Previews, RunClock
from .reporting.meter import LossMeter
from .reporting.predictions import check_metrics, check_predictable
from .reporting.previews import bind_pipeline, check_previews, draw_previews, log_previews
from .reporting.pushing import OmniVideoPushMixin
from .stages import cast_frozen, freeze_all_but, part_of

logger = logging.getLogger(__name__)


# Inputs that determine which components of the model run.
ROUTE = (
    "input_ids",
    "pixel_values",
    "latents",
    "source_latents",
    "reference_latents",
    "prompt_embeds",
    "target_prompt_embeds",
    "labels",
)


EVALUATION = 2**31  # replaces the step of the training in seeds, so that evaluation uses other noise


class OmniVideoTrainer(OmniVideoPushMixin, Trainer):
    """
    Trains one stage of Omni-Video.

    Args:
        model: an [`OmniVideoForConditionalGeneration`]; its parameters are frozen but for those of `args.stage`. Or
            pass `model_init`, which makes one when a training begins.
        args: [`OmniVideoTrainingArguments`].
        train_batch_sampler: yields lists of indices into `train_dataset`, each of one task and size; has `__len__` and
            `set_epoch`. Without it, batches are sampled at random, as in transformers.
        preview_pipeline: pipeline that generates the previews with the components of the model.
        trainer_arguments: arguments of [`Trainer`] of transformers. `compute_metrics` gets logits and labels of text
            answers, so it is for data of the task `understand`.

    A dataset may be a stream of samples (`IterableDataset`), which the trainer groups into batches.

    Batches are arguments of the model's `forward` and `task`, one of `t2i t2v i2i v2v i2v understand`.

    Raises:
        ValueError: for arguments that do not fit the stage.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: OmniVideoForConditionalGeneration | None = None,
        args: OmniVideoTrainingArguments | None = None,
        *,
        train_batch_sampler: Any = None,
        preview_pipeline: OmniVideoPipeline | None = None,
        **trainer_arguments: Any,
    ) -> None:
        if not isinstance(args, OmniVideoTrainingArguments):
            raise ValueError(f"`args` must be OmniVideoTrainingArguments, got {type(args).__name__}.")
        evaluated = trainer_arguments.get("eval_dataset")
        metrics = trainer_arguments.get("compute_metrics")
        check_metrics(metrics, args.loss_config, args.stage, args.prediction_loss_only, evaluated)
        if args.preview_steps > 0 and preview_pipeline is None:
            raise ValueError("`preview_steps` is set, but `preview_pipeline` is missing: pass it.")
        check_previews(args.previews or [])
        if train_batch_sampler is not None and isinstance(trainer_arguments.get("train_dataset"), IterableDataset):
            raise ValueError("`train_batch_sampler` chooses samples by number, but a stream has none: leave it out.")
        self.train_batch_sampler = train_batch_sampler
        self.preview_pipeline = preview_pipeline
        self.base_revision: str | None = None  # of the Hub repository that the model came from
        self.ema: EMAModel | None = None
        self._stage_args = args
        self._micro_step = (-1, -1)  # optimiser step, batch within it
        self._eval_batches = 0
        self._writing = self._ending = False
        self._run_id = uuid.uuid4().hex
        if model is not None:
            self._prepare_for_stage(model)
        super().__init__(model=model, args=args, **trainer_arguments)
        self.loss_is_scaled_for_ga = False  # the model's loss is a mean over samples
        self.meters = {mode: LossMeter(args.device) for mode in (True, False)}
        self.is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self._refuse_what_sharding_cannot(args)
        if self.is_fsdp_enabled:
            self._name_fsdp_blocks(self.model)
        self.add_callback(CloseLogAtCheckpoint())
        self.add_callback(RunClock())
        if train_batch_sampler is not None:
            self.add_callback(EpochOfSampler(self))
        if args.ema_decay > 0:
            self.add_callback(MovingAverage(self))
        if args.preview_steps > 0:
            self.add_callback(Previews(self))

    def call_model_init(self, trial: Any = None) -> OmniVideoForConditionalGeneration:
        """Create a new model with `model_init`, and freeze all parameters that the stage does not train."""
        model = super().call_model_init(trial)
        self._prepare_for_stage(model)
        return model

    def _prepare_for_stage(self, model: OmniVideoForConditionalGeneration) -> None:
        args = self._stage_args
        self.trained_names = freeze_all_but(model, args.training_stage, args.loss_config)
        if args.frozen_dtype != "float32":
            cast_frozen(model, dtype_of(args.frozen_dtype))
        if args.preview_steps > 0 and self.preview_pipeline is not None:
            bind_pipeline(self.preview_pipeline, model)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by name."""
        parameters = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        return {name: parameters[name] for name in self.trained_names}

    def gather_trained(self) -> dict[str, torch.Tensor]:
        """
        Gather the trained parameters as complete tensors, by name, also if they are sharded.

        Every process must call this; with DeepSpeed only the main process gets the tensors.
        """
        parameters = self.trained_parameters()
        if not self.is_deepspeed_enabled:
            return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in parameters.items()}
        state = self.accelerator.get_state_dict(self.model_wrapped)
        return {name: state[name] for name in self.trained_names} if self.is_world_process_zero() else {}

    def train(self, resume_from_checkpoint: str | bool | None = None, **arguments: Any) -> TrainOutput:
        """
        Train, as in transformers, with a lock on `output_dir`; see [`only_training`].

        Args:
            resume_from_checkpoint: a complete checkpoint, or `True` for the newest complete one.
            arguments: other arguments of `train` of transformers.

        Raises:
            ValueError: if another training uses the folder, and for a checkpoint that is not complete.
        """
        with only_training(self.args):
            checkpoint = resume_from_checkpoint or None
            if checkpoint is True:
                checkpoint = checkpoints.last_checkpoint(self.args.output_dir)
                if checkpoint is None:
                    raise ValueError(f"`resume_from_checkpoint`: {self.args.output_dir} contains no checkpoint.")
            elif checkpoint is not None:
                checkpoints.check_complete(checkpoint)
            run = None if checkpoint is None else checkpoints.run_of(Path(checkpoint))
            self._run_id = run or uuid.uuid4().hex
            if self.args.should_save:
                checkpoints.clear(Path(self.args.output_dir) / checkpoints.WRITING_FOLDER)
            return super().train(resume_from_checkpoint=checkpoint, **arguments)

    # --- data -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Data loader of this process, for `train_batch_sampler` or a stream."""
        if isinstance(self.train_dataset, IterableDataset):
            return stream_loader(self.train_dataset, self.data_collator, self.args, self.accelerator, training=True)
        if self.train_batch_sampler is None:
            return super().get_train_dataloader()
        args, accelerator = self.args, self.accelerator
        rounds = RoundsOfBatches(self.train_batch_sampler, accelerator.num_processes)
        if not len(rounds):
            raise ValueError(
                f"`train_batch_sampler` gives {len(self.train_batch_sampler)} batches for "
                f"{accelerator.num_processes} processes: give more data or a smaller `per_device_train_batch_size`."
            )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=rounds,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return prepare_data_loader(
            loader,
            device=accelerator.device,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            put_on_device=True,
            even_batches=False,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Data loader of the evaluation, as in transformers or for a stream."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        data = data[eval_dataset] if isinstance(eval_dataset, str) else data
        if isinstance(data, IterableDataset):
            return stream_loader(data, self.data_collator, self.args, self.accelerator, training=False)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Data loader of `predict`, as in transformers or for a stream."""
        if isinstance(test_dataset, IterableDataset):
            return stream_loader(test_dataset, self.data_collator, self.args, self.accelerator, training=False)
        return super().get_test_dataloader(test_dataset)

    def _run_epoch(self, **arguments: Any) -> None:
        """Skip the epoch of a run that is resumed at its end, where transformers would train one more step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**arguments)

    # --- losses -----------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Seed the global generator by the step, because dropout layers use it."""
        step, batch = self._micro_step
        self._micro_step = (self.state.global_step, batch + 1 if step == self.state.global_step else 0)
        torch.manual_seed(derive_seed(self.args.seed, *self._micro_step, self._data_rank()))
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,  # noqa: ARG002 - the model's losses are means
    ) -> torch.Tensor | tuple[torch.Tensor, OmniVideoOutput]:
        """The weighted sum of the stage's losses; the step determines noise and dropped conditions."""
        inputs = dict(inputs)
        task = inputs.pop("task", None)
        batch_size = self._check_batch(inputs, task)
        generators = self._generators(batch_size, model.training)
        if model.training and self.args.drops_conditions:
            inputs["drop_instruction"], inputs["drop_prompt"] = draw_dropouts(
                generators, self.args.condition_dropout, self.args.instruction_dropout, self.args.prompt_dropout
            )
        if model.training and self.args.source_dropout > 0:
            inputs["drop_source"] = draw_source_dropout(generators, self.args.source_dropout)
        if inputs.get("input_ids") is not None and inputs.get("labels") is None:
            inputs["logits_to_keep"] = 1  # the other logits are not used
        output = model(**inputs, generator=generators, loss_config=self.args.loss_config)
        if output.loss is None:
            raise ValueError(
                f"A batch of the task {task!r} with {', '.join(sorted(inputs))} allows none of the losses of the "
                f"stage {self.args.stage!r} ({', '.join(self.args.training_stage.losses)})."
            )
        self.meters[model.training].add(output, task, batch_size)
        return (output.loss, output) if return_outputs else output.loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        The loss of a batch, whose noise is the same at every evaluation, and logits and labels of answers.

        Raises:
            ValueError: if logits are requested for a batch without text answers.
        """
        if not prediction_loss_only:
            check_predictable(inputs)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, output = self.compute_loss(model, inputs, return_outputs=True)
        self._eval_batches += 1
        if prediction_loss_only:
            return loss.detach(), None, None
        logits = None if "logits" in (ignore_keys or ()) or output.logits is None else output.logits.detach()
        return loss.detach(), logits, inputs["labels"]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Adds every loss by name and task to the metrics."""
        self._eval_batches = 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(self.meters[False].means(self.accelerator, f"{metric_key_prefix}_"))
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds every loss by name and task to what a step logs."""
        if "loss" in logs:
            logs |= self.meters[True].means(self.accelerator)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:  # noqa: ARG002
        """Not counted: transformers' estimate is for a language model."""
        return 0

    def _generators(self, batch_size: int, training: bool) -> list[torch.Generator]:
        step, batch = self._micro_step if training else (EVALUATION, self._eval_batches)
        stride = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        first = batch * self._data_world() + self._data_rank()
        return sample_generators(self.args.seed, step, first, batch_size, stride)

    def _data_rank(self) -> int:
        """Number of this process among those with data of their own: peers that share a batch share its noise."""
        return self.accelerator.process_index // self._peers()

    def _data_world(self) -> int:
        return self.accelerator.num_processes // self._peers()

    def _peers(self) -> int:
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        return 1 if parallelism is None else parallelism.non_data_parallel_size

    def _check_batch(self, inputs: Mapping[str, Any], task: str | None) -> int:
        """Batch size of a batch that is fit to train on."""
        if task is not None:
            check_known("task", [task], TASKS)
        rows = next(
            (inputs[k] for k in ("latents", "input_ids", "mllm_hidden_states") if inputs.get(k) is not None), None
        )
        if rows is None:
            raise ValueError(
                f"A batch must have `input_ids` or `mllm_hidden_states`, and `latents` to train generation; got "
                f"{sorted(inputs)}."
            )
        if inputs.get("input_ids") is None and inputs.get("mllm_hidden_states") is None:
            # Otherwise the model would silently train with the states of the empty instruction.
            raise ValueError(f"A batch must have `input_ids` or `mllm_hidden_states`, got {sorted(inputs)}.")
        if self.is_sharded and self.accelerator.num_processes > 1:
            route = sum(2**i for i, name in enumerate(ROUTE) if inputs.get(name) is not None)
            routes = self.accelerator.gather(torch.tensor([route], device=self.accelerator.device)).tolist()
            if len(set(routes)) > 1:
                raise ValueError(
                    "With sharded weights (FSDP, DeepSpeed) the processes must run the same components in every "
                    f"step, but their batches have different inputs (this one: {sorted(inputs)}). Use a batch "
                    "sampler that gives one task to all processes, or DDP."
                )
        return find_batch_size(rows)

    # --- optimiser --------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group per part with a learning rate of its own, and per kind of weight decay."""
        if self.optimizer is None and self.args.part_learning_rates:
            model = self.model if model is None else model
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(list(self._parameter_groups(model)), **settings)
        return super().create_optimizer(model)

    def _parameter_groups(self, model: Any) -> Iterable[dict[str, Any]]:
        text_head = model.get_output_embeddings()
        head = set() if text_head is None else set(text_head.parameters())
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                part = "text_head" if parameter in head else part_of(name)
                groups.setdefault((part, name in decayed), []).append(parameter)
        # The adapter's rate is also that of the visual context adapter inside it, unless that has its own.
        rates = dict(self.args.part_learning_rates)
        rates.setdefault("visual_context_adapter", rates.get("adapter", self.args.learning_rate))
        for (part, decays), parameters in groups.items():
            yield {
                "params": parameters,
                "lr": rates.get(part, self.args.learning_rate),
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }

    # --- moving average, previews -----------------------------------------------------------------------------------

    def create_scheduler(self, *args: Any, **kwargs: Any) -> torch.optim.lr_scheduler.LRScheduler:
        """Create scheduler and moving average, when the model is ready and before the first step."""
        if self.args.ema_decay > 0:
            self.ema = EMAModel(self.trained_parameters().values(), decay=self.args.ema_decay)
        return super().create_scheduler(*args, **kwargs)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Use the moving average instead of the weights during the block, if there is one."""
        if self.ema is None:
            yield
            return
        parameters = list(self.trained_parameters().values())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def draw_previews(self) -> Path | None:
        """Generate the previews with the current weights into `output_dir/previews`, and log them."""
        if self.preview_pipeline is None:
            raise ValueError("The trainer has no `preview_pipeline`, which generates the previews: pass one.")
        pipeline = self.preview_pipeline.to(self.args.device)
        was_training = self.model.training
        self.model.eval()
        try:
            with kept_chance(), self.averaged_weights(), self.accelerator.autocast():
                folder = Path(self.args.output_dir) / "previews"
                drawn = draw_previews(pipeline, self.args.previews, folder, self.state.global_step)
            log_previews(self.callback_handler.callbacks, drawn, self.args.previews, self.state.global_step)
            return drawn.sheet
        finally:
            self.model.train(was_training)

    # --- saving and resuming ----------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save all loaded components, with the moving average instead of the weights if there is one.

        In the `lora` stage only the LoRA layers are saved. Checkpoints contain the trained weights only.
        """
        if not self._writing:
            with self.averaged_weights():
                if not self.args.training_stage.lora:
                    super().save_model(output_dir, _internal_call)
                elif self.args.should_save:
                    save_lora(self.accelerator.unwrap_model(self.model), Path(output_dir or self.args.output_dir))
        elif self.is_sharded:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            metadata = {
                "stage": self.args.stage,
                "base_model": self.model.config._name_or_path,
                "base_revision": self.base_revision,
                "lora": self.args.lora,
                "tied": tied_names(self.accelerator.unwrap_model(self.model)),
            }
            if self.args.training_stage.lora:
                metadata |= checkpoint_metadata(self.accelerator.unwrap_model(self.model))
            checkpoints.save_trained(folder / checkpoints.TRAINED_NAME, self.trained_parameters(), metadata)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / checkpoints.WRITING_FOLDER) if self._writing or self._ending else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint to a temporary folder, and rename it when it is complete."""
        run_folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        writing = run_folder / checkpoints.WRITING_FOLDER
        if self.args.should_save:
            checkpoints.clear(writing)
        self.accelerator.wait_for_everyone()
        self._writing = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_global_step:
                best = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                self.state.best_model_checkpoint = str(best)
                self.state.save_to_json(str(writing / name / "trainer_state.json"))
            checkpoints.seal(writing / name, self._run_id)
            checkpoints.promote(writing / name, run_folder / name)
            self._rotate(run_folder, run_folder / name)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_folder / name))

    def _rotate(self, run_folder: Path, *kept: Path) -> None:
        best = self.state.best_model_checkpoint
        spared = {*kept, *([] if best is None else [Path(best)])}
        checkpoints.rotate(run_folder, self.args.save_total_limit, self._run_id, spared)

    def _finalize_training(self, trial: Any, *args: Any) -> TrainOutput:
        """With `save_total_limit=1` and a best checkpoint, remove the other checkpoints of this run only."""
        self._ending = True
        try:
            output = super()._finalize_training(trial, *args)
        finally:
            self._ending = False
        if self.state.global_step > self._initial_global_step:
            seen = set(gather_object(sorted(self.meters[True].seen)))
            for name in self.args.training_stage.losses:
                if self.args.loss_config.weight(name) > 0 and name not in seen:
                    logger.warning(
                        "No batch allowed the %s loss, whose weight is positive: it was not minimised.", name
                    )
        if self.args.should_save and self.state.best_model_checkpoint is not None and self.args.save_total_limit == 1:
            self._rotate(Path(self._get_output_dir(trial)))
        return output

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.ema is not None and self.args.should_save:
            checkpoints.save_ema(Path(output_dir) / checkpoints.EMA_NAME, self.ema, self.trained_names)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.ema is not None and checkpoint is not None:
            checkpoints.load_ema(Path(checkpoint) / checkpoints.EMA_NAME, self.ema, self.trained_names)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            path = Path(resume_from_checkpoint) / checkpoints.TRAINED_NAME
            checkpoints.load_trained(path, self.trained_parameters(), self.args.stage)

    def _load_best_model(self) -> None:
        if self.is_sharded:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    # --- pushing ----------------------------------------------------------------------------------------------------

    # --- sharding ---------------------------------------------------------------------------------------------------

    def _refuse_what_sharding_cannot(self, args: OmniVideoTrainingArguments) -> None:
        if not self.is_sharded:
            return
        for name, wanted in (("ema_decay", args.ema_decay), ("preview_steps", args.preview_steps)):
            if wanted:
                raise ValueError(
                    f"`{name}` needs whole weights on a process, which FSDP and DeepSpeed do not have: set it to 0, "
                    "or train with DDP."
                )
        if args.training_stage.lora:
            raise ValueError(
                "The `lora` stage does not support FSDP and DeepSpeed, because it trains few weights: use DDP."
            )
        if args.frozen_dtype != "float32":
            raise ValueError(
                "`frozen_dtype` must be float32 with FSDP and DeepSpeed, which need one dtype for all weights."
            )

    def _name_fsdp_blocks(self, model: Any) -> None:
        """Shard by the blocks this model has: it names also those of parts that the stage left out."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is None:
            present = {type(module).__name__ for module in model.modules()}
            plugin.transformer_cls_names_to_wrap = sorted(present & set(model._no_split_modules))
