"""`from_pretrained`, `save_pretrained` and `push_to_hub` of the pipeline, as a repository for both libraries."""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from diffusers.utils.torch_utils import get_device
from huggingface_hub import CommitInfo

from ...hub.headers import Header, read_header
from ...hub.remote_code import PIPELINE_COMPONENTS, import_from_package
from ...hub.repository import PUSHES, check_finished, check_indices, finalize_repository, staged, weight_files
from ...models.connectors import OmniVideoAdapter
from ...models.connectors_2 import OmniVideo2Adapter
from ...models.modeling_omni_video import OmniVideoForConditionalGeneration
from ...processing.processing_omni_video import OmniVideoProcessor
from ...processing.processing_omni_video_2 import OmniVideo2Processor
from ...utils.files import temporary_folder
from ...utils.modules import Host, has_lora
from ...utils.tokens import hub_call
from ...utils.turns import turn

logger = logging.get_logger(__name__)

CLASSES = {
    cls.__name__: cls
    for cls in (
        OmniVideoForConditionalGeneration,
        OmniVideoAdapter,
        OmniVideoProcessor,
        OmniVideo2Adapter,
        OmniVideo2Processor,
    )
}
# Arguments of `from_pretrained` that say where the files of a Hub repository lie.
_PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
# Components that are loaded as they are stored. The VAE uses float32, because its errors are visible in the pixels.
AS_STORED = ("mllm", "text_encoder", "adapter", "adapter_2", "transformer", "transformer_2")
# Parts of them that their classes keep in float32 with every dtype.
_KEPT_IN_FLOAT32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3", ".wo.")


class OmniVideoRepositoryMixin(Host):
    """
    Loading and saving of [`OmniVideoPipeline`] as a repository.

    This class loads the components with its own classes and never runs the code of the repository. That code runs in
    `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`.
    """

    @classmethod
    @hub_call
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        memory: str | None = None,
        memory_device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Load a pipeline, as in diffusers. A repository of the other version gives the pipeline of that version.

        Args:
            pretrained_model_name_or_path: folder or Hub repository.
            dtype: as in diffusers, a dtype for all components or a dictionary from names of components to dtypes; or
                `"auto"`, every component as it is stored and the VAE in float32. Default: `"auto"` on a machine with
                an accelerator. On other machines MLLM and text encoder have the dtype of their configuration, and
                all other components float32, because most processors compute 16-bit formats several times slower.
            memory: `"24GB"`, `"16GB"`, `"12GB"` or `"8GB"`: a profile for an accelerator with this memory, which sets
                dtype, quantisation, offloading and VAE tiling, see [`PROFILES`]. Default: no profile.
            memory_device: the accelerator for `memory`. Default: the current one.
            kwargs: arguments of `from_pretrained` of diffusers.

        Raises:
            ValueError: for an unknown profile, a profile together with arguments that it sets, or a profile without an
                accelerator; for a folder with an unfinished save, or whose index names files outside the folder.

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> pipe = OmniVideoPipeline.from_pretrained(CHECKPOINT)
            >>> type(pipe).__name__
            'OmniVideoPipeline'
        """
        if Path(pretrained_model_name_or_path).is_dir():
            check_finished(pretrained_model_name_or_path)
        place = {name: kwargs[name] for name in _PLACE if name in kwargs}
        pipeline = cls.class_of(pretrained_model_name_or_path, place)
        if pipeline is not cls:
            return pipeline.from_pretrained(
                pretrained_model_name_or_path, memory=memory, memory_device=memory_device, **kwargs
            )
        if memory is None:
            if memory_device is not None:
                raise ValueError(f"`memory_device` is {memory_device!r}, but `memory` is missing: pass both.")
            return super().from_pretrained(
                pretrained_model_name_or_path, **cls._with_dtypes(pretrained_model_name_or_path, kwargs)
            )
        profiles = import_from_package("pipelines.memory.profiles")
        profile = profiles.get_memory_profile(memory, cls._repository_class())
        chosen = sorted(kwargs.keys() & {"dtype", "torch_dtype", "quantization_config", "device_map"})
        if chosen:
            raise ValueError(
                f"`memory={memory!r}` sets `{'`, `'.join(chosen)}` itself: leave one of them out, or choose all "
                "settings of the profile yourself."
            )
        settings = profiles.loading_arguments(profile, given=kwargs)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **settings, **kwargs)
        profiles.apply_memory_profile(pipe, profile, memory_device)
        return pipe

    @classmethod
    def _with_dtypes(cls, place: str | Path, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `from_pretrained` with the dtypes of the stored weights, where none are chosen."""
        chosen = kwargs.get("dtype", kwargs.get("torch_dtype"))
        if chosen != "auto" and (chosen is not None or get_device() == "cpu"):
            return kwargs
        kwargs = {name: value for name, value in kwargs.items() if name not in ("dtype", "torch_dtype")}
        if not Path(place).is_dir():  # the weights' headers are read from the files that are loaded next
            download = dict(kwargs)
            kwargs.pop("force_download", None)
            folder = Path(cls.download(str(place), **download))
        else:
            folder = Path(place)
        needed = [name for name in AS_STORED if name not in kwargs and (folder / name).is_dir()]
        variant, dtypes = kwargs.get("variant"), dict[str, torch.dtype | None]()
        for name in needed:  # a component without files of the variant is loaded without it
            files = weight_files(folder / name, variant) or weight_files(folder / name)
            header = {weight: entry for file in files for weight, entry in read_header(file).items()}
            dtypes[name] = stored_dtype(header, name)
        return kwargs | {"dtype": dtypes | {"vae": torch.float32, "default": torch.float32}}

    @classmethod
    @hub_call
    def load_config(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """
        Load `model_index.json`, as in diffusers, but with the classes of this code instead of the repository's.

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> OmniVideoPipeline.load_config(CHECKPOINT)["_class_name"]
            'OmniVideoPipeline'
        """
        if Path(pretrained_model_name_or_path).is_dir():  # a local folder, or a download
            check_indices(pretrained_model_name_or_path)
        config = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        index = config[0] if isinstance(config, tuple) else config
        for component, name in cls._component_classes().items():
            if index.get(component, [None])[-1] == name:
                index[component] = [CLASSES[name].__module__, name]
        index["_class_name"] = cls.__name__
        return config

    @classmethod
    def _component_classes(cls) -> dict[str, str]:
        """Components of this pipeline that are classes of this project."""
        return PIPELINE_COMPONENTS.get(cls._repository_class(), {})

    @classmethod
    def _repository_class(cls) -> str:
        """Name of this pipeline's class in a repository."""
        return next((base.__name__ for base in cls.__mro__ if base.__name__ in PIPELINE_COMPONENTS), "")

    @classmethod
    def class_of(cls, place: str | Path, hub: dict[str, Any]) -> Any:
        """
        The class of the pipeline that a repository names, if it is the other one of this project; else this one.

        Args:
            place: folder or Hub repository.
            hub: arguments of `from_pretrained` that say where files of the Hub lie.

        Example:
            >>> from omni_video_hf import OmniVideoPipeline
            >>> from omni_video_hf.shapes import CHECKPOINT
            >>> OmniVideoPipeline.class_of(CHECKPOINT, {}).__name__
            'OmniVideoPipeline'
        """
        from ..omni_video_2.pipeline_omni_video_2 import OmniVideo2Pipeline  # noqa: PLC0415 - imports this module
        from ..pipeline_omni_video import OmniVideoPipeline  # noqa: PLC0415 - imports this module

        try:
            name = super().load_config(place, **hub).get("_class_name")
        except OSError:  # whatever it is, loading says it
            return cls
        name = name[-1] if isinstance(name, list) and name else name
        known: dict[Any, Any] = {known.__name__: known for known in (OmniVideoPipeline, OmniVideo2Pipeline)}
        found = known.get(name, cls)
        return cls if issubclass(cls, found) else found

    @classmethod
    @hub_call
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Download the files of a Hub repository that this pipeline needs, except its code; as in diffusers."""
        reader: Any = type(cls.__name__, (_ReadsWithoutCode, cls), {})
        return super(OmniVideoRepositoryMixin, reader).download(pretrained_model_name, **kwargs)

    @hub_call
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
        Save a complete repository: components, processor, index of the whole model, and the code to load it.

        Args:
            save_directory: target folder; created if it does not exist. Weights of an earlier save are replaced when
                the new ones are complete.
            safe_serialization: must be `True`; pickles are not written.
            variant: variant in the file names, such as `fp16` for `model.fp16.safetensors`.
            max_shard_size: maximum size of a file.
            push_to_hub: push afterwards, with the arguments of [`push_to_hub`] in `kwargs`.

        Raises:
            ValueError: if a component has LoRA layers, or a class that the code of a repository does not contain.

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
            raise ValueError("`safe_serialization=False` would write pickles, which can run code: pass `True`.")
        for name in self._lora_loadable_modules:
            if getattr(self, name) is not None and has_lora(getattr(self, name)):
                raise ValueError(
                    f"The component `{name}` has LoRA layers. Save them with `save_lora_weights(folder, "
                    "**collect_lora_layers(pipe))`, or merge them into the weights with `fuse_lora()` and "
                    "`unload_lora_weights()` first."
                )
        with turn(*self.components.values()), staged(save_directory, variant, ["", *self.components]) as folder:
            for tokenizer in (self.tokenizer, self.processor.tokenizer):
                if getattr(tokenizer, "is_fast", False):  # padding of the last call; the next call sets its own
                    tokenizer.backend_tokenizer.no_padding()
                    tokenizer.backend_tokenizer.no_truncation()
            super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
            self.processor.save_pretrained(folder)
            finalize_repository(folder, variant)
        if push_to_hub:
            import_from_package("hub.push").push_repository(
                save_directory, kwargs.pop("repo_id", Path(save_directory).name), **kwargs
            )

    @hub_call
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
            repo_id: target repository, `owner/name`; created if it does not exist.
            commit_message: title of the commit or pull request.
            private: whether a new repository is private.
            token: access token of the Hub. Default: the stored one.
            create_pr: open a pull request instead of committing.
            revision: branch of the target; created if it does not exist.
            kwargs: arguments of [`save_pretrained`].

        Returns:
            The `CommitInfo` of huggingface_hub.
        """
        with temporary_folder(PUSHES) as folder:
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


def stored_dtype(header: Header, name: str = "") -> torch.dtype | None:
    """
    The dtype in which a component is loaded as stored: that of most of its values.

    Args:
        header: header of its weights, see [`read_header`].
        name: name of the component. With it, a warning says when float32 weights are rounded.

    Returns:
        float32, bfloat16 or float16; `None` for weights in other formats.

    Example:
        >>> from omni_video_hf.pipelines.shared.repository_mixin import stored_dtype
        >>> stored_dtype({"proj.weight": ("BF16", (8, 8), 128), "norm1.weight": ("F32", (8,), 32)})
        torch.bfloat16
    """
    formats = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    values: Counter[torch.dtype] = Counter()
    for weight, (stored, shape, _) in header.items():
        if stored in formats and not any(part in weight for part in _KEPT_IN_FLOAT32):
            values[formats[stored]] += prod(shape)
    if not values:
        return None
    most = values.most_common(1)[0][0]
    if name and most != torch.float32 and torch.float32 in values:
        logger.warning(
            f"`{name}`: {values[torch.float32]:,} values are stored in float32, and most others in {most}, in which "
            f"all are loaded. Pass a dtype, such as `dtype={{{name!r}: torch.float32, ...}}`, to round none of them."
        )
    return most


class _ReadsWithoutCode(Host):
    """Reads an index without its references to code, so that diffusers does not ask for `trust_remote_code`."""

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        index = super()._dict_from_json_file(json_file, *args, **kwargs)
        without = {name: [None, None] for name in cls._component_classes() if name in index}
        return index | without | {"_class_name": cls.__name__}


__all__ = ["AS_STORED", "OmniVideoRepositoryMixin", "stored_dtype"]
