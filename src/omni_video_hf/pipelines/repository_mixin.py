"""Loading, saving and pushing of the pipeline: as a repository that transformers and diffusers open."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo

from ..hub.remote_code import COMPONENT_CLASSES, PIPELINE_CLASS, import_from_package
from ..hub.repository import check_finished, check_indices, finalize_repository, staged
from ..models.connectors import OmniVideoAdapter
from ..models.modeling_omni_video import OmniVideoForConditionalGeneration
from ..processing.processing_omni_video import OmniVideoProcessor
from ..utils.modules import Host, has_lora

CLASSES = {cls.__name__: cls for cls in (OmniVideoForConditionalGeneration, OmniVideoAdapter, OmniVideoProcessor)}


class OmniVideoRepositoryMixin(Host):
    """
    What [`OmniVideoPipeline`] does differently from other pipelines when it is loaded and saved.

    Loaded through this class, a repository's own code is not needed and not run: its components are the classes that
    this one came with. `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` runs the repository's.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        memory: str | None = None,
        memory_device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Load a pipeline, as in diffusers.

        Args:
            pretrained_model_name_or_path: folder or Hub repository.
            memory: `"24GB"`, `"16GB"`, `"12GB"` or `"8GB"`, a profile that fits an accelerator of that much memory:
                number format, quantisation, offloading and VAE tiling, see [`PROFILES`]. By default nothing of it.
            memory_device: the accelerator that `memory` is about, the one that there is by default.
            kwargs: as in diffusers.

        Raises:
            ValueError: for an unknown profile, one together with arguments that it chooses, or without accelerator;
                for a folder into which a save did not finish, or whose index names files outside of it.

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> type(pipe).__name__
            'OmniVideoPipeline'
        """
        if Path(pretrained_model_name_or_path).is_dir():
            check_finished(pretrained_model_name_or_path)
        if memory is None:
            if memory_device is not None:
                raise ValueError(f"`memory_device` is {memory_device!r}, but no `memory` was asked for: pass both.")
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        profiles = import_from_package("pipelines.memory.profiles")
        profile = profiles.get_memory_profile(memory)
        chosen = sorted(kwargs.keys() & {"dtype", "torch_dtype", "quantization_config", "device_map"})
        if chosen:
            raise ValueError(
                f"`memory={memory!r}` chooses `{'`, `'.join(chosen)}` by itself: leave one of them out, or make the "
                "profile's settings by hand."
            )
        pipe = super().from_pretrained(pretrained_model_name_or_path, **profiles.loading_arguments(profile), **kwargs)
        profiles.apply_memory_profile(pipe, profile, memory_device)
        return pipe

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """
        The pipeline's index, as in diffusers, with this code's classes in the place of the repository's.

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> OmniVideoPipeline.load_config(CHECKPOINT)["_class_name"]
            'OmniVideoPipeline'
        """
        if Path(pretrained_model_name_or_path).is_dir():  # a user's, or what was downloaded
            check_indices(pretrained_model_name_or_path)
        config = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        index = config[0] if isinstance(config, tuple) else config
        for component, name in COMPONENT_CLASSES.items():
            if index.get(component, [None])[-1] == name:
                index[component] = [CLASSES[name].__module__, name]
        index["_class_name"] = cls.__name__
        return config

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Download what this pipeline needs of a Hub repository, its code excepted; as in diffusers otherwise."""
        reader: Any = type(cls.__name__, (_ReadsWithoutCode, cls), {})
        return super(OmniVideoRepositoryMixin, reader).download(pretrained_model_name, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Write a complete repository: components, processor, the index of the whole model, and the code to load it.

        Args:
            save_directory: made if need be; weights of an earlier save are replaced when the new ones are complete.
            safe_serialization: must stay `True`; pickles are not written.
            variant: as in `model.fp16.safetensors`.
            max_shard_size: largest file.
            push_to_hub: push afterwards, with the arguments of [`push_to_hub`] in `kwargs`.

        Raises:
            ValueError: when a component carries LoRA layers, or is of a class that no repository's code knows.

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> import tempfile
            >>> from pathlib import Path
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     pipe.save_pretrained(folder)
            ...     (Path(folder) / "model_index.json").is_file()
            True
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization=False` would write pickles, which can run code: leave it `True`.")
        for name in self._lora_loadable_modules:
            if getattr(self, name) is not None and has_lora(getattr(self, name)):
                raise ValueError(
                    f"`{name}` carries LoRA layers. Save them with `save_lora_weights(folder, "
                    "**collect_lora_layers(pipe))`, or make them part of the weights with `fuse_lora()` and "
                    "`unload_lora_weights()` first."
                )
        for tokenizer in (self.tokenizer, self.processor.tokenizer):
            if getattr(tokenizer, "is_fast", False):  # padding of the last call, set anew by the next one
                tokenizer.backend_tokenizer.no_padding()
                tokenizer.backend_tokenizer.no_truncation()
        with staged(save_directory, variant, ["", *self.components]) as folder:
            super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
            self.processor.save_pretrained(folder)
            finalize_repository(folder, variant)
        if push_to_hub:
            import_from_package("hub.push").push_repository(
                save_directory, kwargs.pop("repo_id", Path(save_directory).name), **kwargs
            )

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """
        Push a complete repository in one commit.

        Args:
            repo_id: `owner/name`, created if need be.
            commit_message: title of the commit or pull request.
            private: whether a new repository is private.
            token: for the Hub; the stored one by default.
            create_pr: open a pull request instead of committing.
            revision: branch, created if need be.
            kwargs: as in [`save_pretrained`].

        Returns:
            The commit, as huggingface_hub describes it.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            return import_from_package("hub.push").push_repository(
                folder,
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                create_pr=create_pr,
                revision=revision,
                base_model=self.config.get("_name_or_path"),
            )


class _ReadsWithoutCode(Host):
    """Reads an index as if its components needed no code: diffusers neither looks for it nor asks for trust."""

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        index = super()._dict_from_json_file(json_file, *args, **kwargs)
        without = {name: [None, None] for name in COMPONENT_CLASSES if name in index}
        return index | without | {"_class_name": PIPELINE_CLASS}


__all__ = ["OmniVideoRepositoryMixin"]
