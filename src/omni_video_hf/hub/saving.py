"""`save_pretrained`, `push_to_hub` and `pipeline_components` of the whole model."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils.modeling import get_state_dict_offloaded_model
from diffusers import ModelMixin
from torch import nn

from ..utils.files import temporary_folder
from ..utils.modules import Host, has_lora, set_dtype
from ..utils.tokens import hub_call
from ..utils.turns import turn
from .hub_calls import check_place
from .remote_code import import_from_package
from .repository import MODEL_FOLDERS, PUSHES, finalize_repository, staged


class OmniVideoSavingMixin(Host):
    """Loading, saving and pushing of [`OmniVideoForConditionalGeneration`] as a repository of components."""

    @classmethod
    @hub_call
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any) -> Any:
        """
        Load a model, as `from_pretrained` of transformers.

        Raises:
            ValueError: for a folder with an unfinished save, and for a folder or Hub repository whose index names
                files outside of it.
        """
        check_place(pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def pipeline_components(self) -> dict[str, nn.Module]:
        """
        Components for a pipeline, which share their weights with this model.

        `OmniVideoPipeline.from_pretrained(base, **model.pipeline_components())` is the pipeline of a fine-tuned model.

        Returns:
            `mllm` (MLLM and vision head), and `adapter` and `transformer` if this model has them.
        """
        if self.adapter is None and self.decoder is None:
            return {"mllm": self}
        config = copy.deepcopy(self.config)
        config.adapter_config = config.decoder_config = None
        with init_empty_weights():
            half = type(self)(config)
        half.mllm, half.vision_head = self.mllm, self.vision_head
        half.generation_config = self.generation_config
        parts = {"mllm": half.train(self.training), "adapter": self.adapter, "transformer": self.decoder}
        return {name: part for name, part in parts.items() if part is not None}

    @hub_call
    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        Save the whole model as a repository: component folders, weight index, and code to load it.

        A model without adapter and decoder is itself a component and saved like any transformers model. The other
        components of a pipeline (VAE, text encoder, scheduler, processor) are not saved: use
        `OmniVideoPipeline.save_pretrained` for all of them, or [`push_to_hub`], which adds them.

        Args:
            save_directory: target folder; created if it does not exist. Weights of an earlier save are replaced when
                the new ones are complete.
            is_main_process: `False` for processes that only take part in gathering the weights.
            state_dict: weights to save instead of the model's own, by their names in the model.
            push_to_hub: push afterwards, with the arguments of [`push_to_hub`] in `kwargs`.
            max_shard_size: maximum size of a file.
            variant: variant in the file names, such as `fp16` for `model.fp16.safetensors`.
            safe_serialization: must be `True`; pickles are not written.

        Raises:
            ValueError: for a model that has LoRA layers or is quantised.
        """
        self._check_saveable(safe_serialization)
        if self.adapter is None and self.decoder is None:
            set_dtype(self.config, self.dtype)
            arguments = {"state_dict": state_dict, "max_shard_size": max_shard_size, "variant": variant}
            if is_main_process:
                with turn(self), staged(save_directory, variant, [""]) as folder:
                    super().save_pretrained(folder, **arguments)
            if push_to_hub or not is_main_process:
                with temporary_folder(PUSHES) as folder:
                    kwargs.setdefault("repo_id", Path(save_directory).name)
                    super().save_pretrained(folder, is_main_process, push_to_hub=push_to_hub, **arguments, **kwargs)
            return
        if state_dict is None and any(tensor.is_meta for tensor in self.state_dict().values()):
            state_dict = get_state_dict_offloaded_model(self)
        if is_main_process:
            with (
                turn(self, self.adapter, self.decoder),
                staged(save_directory, variant, ["", *MODEL_FOLDERS]) as folder,
            ):
                for name, part in self.pipeline_components().items():
                    weights = None if state_dict is None else _weights_of(name, state_dict)
                    _save_part(part, folder / name, weights, max_shard_size, variant)
                finalize_repository(folder, variant)
        if push_to_hub and is_main_process:
            import_from_package("hub.push").push_repository(
                save_directory, kwargs.pop("repo_id", Path(save_directory).name), **kwargs
            )

    @hub_call
    def push_to_hub(self, repo_id: str, *, base: str | Path | None = None, **kwargs: Any) -> Any:
        """
        Push a complete repository, which loads as a model and as a pipeline.

        Args:
            repo_id: target repository, `owner/name`.
            base: folder or Hub repository that contains VAE, text encoder, scheduler and processor. Default: the one
                from which this model was loaded.
            kwargs: `private`, `revision`, `create_pr`, `commit_message` and `token`, and those of [`save_pretrained`].

        Returns:
            The `CommitInfo` of huggingface_hub.
        """
        base = base or self.config._name_or_path
        saving = {name: kwargs.pop(name) for name in ("max_shard_size", "variant", "state_dict") if name in kwargs}
        with temporary_folder(PUSHES) as folder:
            self.save_pretrained(folder, **saving)
            return import_from_package("hub.push").push_completed(folder, repo_id, base, **kwargs)

    def _check_saveable(self, safe_serialization: bool) -> None:
        if not safe_serialization:
            raise ValueError("`safe_serialization=False` would write pickles, which can run code: pass `True`.")
        if has_lora(self):
            raise ValueError(
                "The model has LoRA layers. Save them with `OmniVideoPipeline.save_lora_weights(folder, "
                "**collect_lora_layers(model))`, or merge them into the weights first."
            )
        if getattr(self, "hf_quantizer", None) is not None and self.decoder is not None:
            raise ValueError("A quantised model cannot be saved: save the model before quantisation, or its LoRA.")


def _weights_of(component: str, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Select the weights of one component of the pipeline from those of the whole model."""
    if component == "mllm":
        return {name: value for name, value in state_dict.items() if name.startswith(("mllm.", "vision_head."))}
    prefix = {"adapter": "adapter.", "transformer": "decoder."}[component]
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


def _save_part(
    part: Any,
    folder: Path,
    state_dict: dict[str, torch.Tensor] | None,
    max_shard_size: int | str,
    variant: str | None,
) -> None:
    """Write one component with the method of its library."""
    arguments = {"max_shard_size": max_shard_size, "variant": variant}
    if isinstance(part, ModelMixin):
        if state_dict is not None:  # `save_pretrained` of diffusers has no argument for weights
            with init_empty_weights():
                part = type(part).from_config(part.config)
            part.load_state_dict(state_dict, assign=True)
        part.save_pretrained(folder, **arguments)
    else:
        part.save_pretrained(folder, state_dict=state_dict, **arguments)


__all__ = ["OmniVideoSavingMixin"]
