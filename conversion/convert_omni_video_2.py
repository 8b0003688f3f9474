"""Converts upstream's folder of Omni-Video 2 (A14B or 1.3B) to a repository for diffusers."""

from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from huggingface_hub import snapshot_download
from transformers import AutoConfig

from omni_video_hf import OmniVideo2Pipeline, OmniVideo2Processor
from omni_video_hf.hub.repository import finalize_repository
from omni_video_hf.pipelines.omni_video_2.prompts import BOUNDARY_RATIO, OMNI_VIDEO_2_PRESETS

from .authors_prompts import read_prompts
from .components import Component, check_files
from .components_2 import (
    MAX_CONTEXT_LENGTHS,
    adapter_component_2,
    check_experts,
    check_mllm_files,
    decoder_component,
    mllm_config,
    mllm_model,
    other_components,
    qwen_processor,
)
from .convert_omni_video import check_component, check_output, plan_shards, report, write_weights
from .original_checkpoint import read_tokenizer
from .original_checkpoint_2 import (
    TEXT_ENCODER_2,
    TEXT_TOKENIZER_2,
    WAN_VAE_2,
    OriginalCheckpoint2,
    find_layout,
)
from .unfinished import Unfinished, alone, check_disk_space, fingerprint
from .wan_repository import find_wan, load_wan_component, wan_files

OPTIONAL_2 = {"text_encoder": TEXT_ENCODER_2, "vae": WAN_VAE_2, "tokenizer": TEXT_TOKENIZER_2}
MLLM_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
MLLM_DOWNLOADS = (*MLLM_FILES, "tokenizer*", "vocab.json", "merges.txt", "*preprocessor_config.json", "chat_template*")


def convert(
    original: Path,
    output: Path,
    mllm: str | None,
    prompts: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    max_context_length: int | None = None,
    wan_repo: str | None = None,
    decoder_heads: int | None = None,
) -> None:
    """
    Convert upstream's checkpoint of Omni-Video 2, one shard in memory at a time.

    Everything is checked before anything is written: every weight must be used, every one of ours be there, in its
    shape. `output` appears when it is complete; an interrupted run goes on where it stopped when started again.

    Args:
        original: upstream's folder, with `high_noise_model` and `low_noise_model`, or with `transformer`.
        output: folder to make; it must not exist or be empty.
        mllm: folder or Hub repository of the released Qwen3-VL; its weights are copied as they are.
        prompts: upstream's `shared_config.py`, whose prompts the repository keeps. Without it, it has the project's
            own prompts, with which the released weights were not trained.
        dtype: number format of the weights; as stored by default. Copied parts stay as they are.
        max_shard_size: of each file of weights, such as `"5GB"`.
        max_context_length: tokens of the context; by default as released, 6144 (A14B) or 6272 (1.3B).
        wan_repo: folder or Hub repository of Wan in diffusers' format, for text encoder, tokenizer and VAE where
            `original` lacks them.
        decoder_heads: number of heads of a decoder whose heads are not 128 wide.

    Raises:
        ValueError: for anything in the checkpoint that is missing, left over, of another shape, damaged or unsafe, and
            for an MLLM that does not fit.
    """
    check_output(output)
    layout = find_layout(original)
    if layout is None:
        raise ValueError(f"{original}: is no checkpoint of Omni-Video 2.")
    checkpoint = OriginalCheckpoint2(original, layout)
    missing = [folder for folder, name in OPTIONAL_2.items() if not checkpoint.has(name)]
    if missing and wan_repo is None:
        raise ValueError(
            f"{original / OPTIONAL_2[missing[0]]}: is missing. Download it, or take {', '.join(missing)} from a "
            "repository of Wan in diffusers' format with `--wan-repo`."
        )
    if mllm is None:
        raise ValueError(
            "`--mllm` is missing: give the folder or Hub repository of the MLLM that the checkpoint was trained with, "
            "such as Qwen/Qwen3-VL-30B-A3B-Instruct."
        )
    texts = None if prompts is None else read_prompts(prompts)
    wan_source = find_wan(wan_repo, missing) if missing and wan_repo is not None else None

    components = _components(checkpoint, max_context_length or MAX_CONTEXT_LENGTHS[layout], decoder_heads)
    for component in components:
        check_component(component, checkpoint.root)
    models = {component.name: component.model for component in components}
    wan_models = {name: load_wan_component(name, wan_source) for name in missing if name != "tokenizer"}
    models |= wan_models
    check_experts(models)
    width = models["adapter"].config.mllm_hidden_size
    mllm_folder = _find_mllm(mllm)
    models["mllm"] = mllm_model(mllm_config(mllm_folder, layout, width))
    check_mllm_files(models["mllm"], mllm_folder)
    processor = qwen_processor(mllm_folder)
    tokenizer_folder = wan_source / "tokenizer" if "tokenizer" in missing else original / TEXT_TOKENIZER_2
    text_tokenizer = read_tokenizer(tokenizer_folder, "eos_token", "pad_token")

    options = {
        "dtype": str(dtype),
        "shard": str(max_shard_size),
        "context": models["adapter"].config.max_context_length,
        "wan": str(wan_source),
        "mllm": str(mllm_folder),
        "prompts": texts,
        "heads": decoder_heads,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    working = output.with_name(f"{output.name}.incomplete")
    with alone(output), Unfinished(working, fingerprint(original, options)) as unfinished:
        check_output(output)  # once more: another run may just have ended
        plans = {component.name: plan_shards(component, dtype, max_shard_size) for component in components}
        copied = {file: file.parent.name for name in wan_models for file in wan_files(wan_source, name)}
        copied |= {file: "mllm" for pattern in MLLM_FILES for file in sorted(mllm_folder.glob(pattern))}
        needed = sum(plan.metadata["total_size"] for plan in plans.values())
        check_disk_space(needed + sum(file.stat().st_size for file in copied), working)
        write_weights(components, plans, dtype, unfinished)
        for file, folder in copied.items():
            unfinished.copy(file, working / folder / file.name)
        settings = {"boundary_ratio": BOUNDARY_RATIO if "transformer_2" in models else None, "prompts": texts}
        unfinished.add(lambda folder: write_the_rest_2(folder, models, processor, text_tokenizer, settings))
        finalize_repository(working)
        _verify(working, components, plans)
        unfinished.finish(output)
    unread = checkpoint.unread_weights(name for component in components for name in component.load().files)
    notes = [f"{original / name} belongs to no part and was not read." for name in unread[:20]]
    report(components, notes + _notes(layout, texts is None), output)


def _components(
    checkpoint: OriginalCheckpoint2, max_context_length: int, decoder_heads: int | None
) -> list[Component]:
    experts = [
        component
        for number in range(len(checkpoint.decoders))
        for component in (
            adapter_component_2(checkpoint, number, max_context_length),
            decoder_component(checkpoint, number, decoder_heads),
        )
    ]
    return experts + other_components(checkpoint)


def _find_mllm(mllm: str) -> Path:
    """The folder of the MLLM on this machine; a Hub repository is downloaded, without pickles."""
    folder = Path(mllm)
    return folder if folder.is_dir() else Path(snapshot_download(mllm, allow_patterns=list(MLLM_DOWNLOADS)))


def _notes(layout: str, own_prompts: bool) -> list[str]:
    notes = []
    if own_prompts:
        notes.append(
            "the repository has this project's own prompts, because `--prompts` was not given; the released weights "
            "were trained with those in upstream's `omnivideo/configs/shared_config.py`."
        )
    if layout == "1.3B":
        notes.append("the checkpoint of 1.3B does not say which Qwen3-VL it was trained with, only its width.")
    return notes


def write_the_rest_2(
    folder: Path,
    models: dict[str, torch.nn.Module],
    processor: OmniVideo2Processor,
    text_tokenizer: Any,
    settings: dict[str, Any],
) -> None:
    """Processor, tokenizer of the text encoder, scheduler, and the pipeline's own index."""
    for target in (folder, folder / "processor"):
        processor.save_pretrained(target)
    text_tokenizer.save_pretrained(folder / "tokenizer")
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=OMNI_VIDEO_2_PRESETS["t2v"]["flow_shift"]
    )
    scheduler.save_pretrained(folder / "scheduler")
    pipeline = OmniVideo2Pipeline(
        **models, processor=processor, tokenizer=text_tokenizer, scheduler=scheduler, **settings
    )
    pipeline.save_config(folder)


def _verify(folder: Path, components: list[Component], plans: dict[str, Any]) -> None:
    """Load what was written: every component from its configuration, against the headers of its files."""
    for component in components:
        with torch.device("meta"):
            kind: Any = type(component.model)
            if component.weights_name == "model":
                model = kind(kind.config_class.from_pretrained(folder / component.name))
            else:
                model = kind.from_config(kind.load_config(folder / component.name))
        check_files(model, folder / component.name, plans[component.name].dtypes)
    check_mllm_files(mllm_model(AutoConfig.from_pretrained(folder / "mllm")), folder / "mllm")
    OmniVideo2Processor.from_pretrained(folder)
