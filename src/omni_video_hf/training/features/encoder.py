"""`FeatureEncoder`: features of images, videos and texts from VAE, text encoder and MLLM, with their provenance."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import WanTransformer3DModel
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModel

from ...media.clip import VideoClip
from ...media.frame_sampling import sample_frames
from ...media.sources import Source
from ...models.connectors import OmniVideoAdapter
from ...pipelines.pipeline_omni_video import OmniVideoPipeline
from ...pipelines.presets import GenerationSettings
from ...tasks import get_task
from ...utils.modules import dtype_name
from ...utils.names import check_known
from ...utils.tokens import hub_call
from ..data.collator import encode_conversation
from ..data.framing import Framing, FramingRules
from ..data.media_table import Row, probe

CODE_VERSION = 1  # raised when this package computes other features than before from the same inputs
INSTRUCTIONS = ("states", "tokens")
TARGET_FRAMES = 8  # of a video, whose features are averaged


@dataclass(frozen=True)
class PrecomputeSettings:
    """
    Settings of the features.

    Args:
        framing: buckets of sizes and frame numbers, and the frame rate.
        instruction: `"states"` stores the MLLM's hidden states, for stages that leave the MLLM as it is; `"tokens"`
            the ids, images and labels from which a stage that trains the MLLM computes them.
        mllm_frames: frames of a v2v source for the MLLM: `"first"`, the first frame as in the authors' code, or
            `"all"`. Default: the setting of the model's processor.
    """

    framing: FramingRules = field(default_factory=FramingRules)
    instruction: Literal["states", "tokens"] = "states"
    mllm_frames: Literal["first", "all"] | None = None

    def __post_init__(self) -> None:
        check_known("instruction", [self.instruction], INSTRUCTIONS)
        if self.mllm_frames is not None:
            check_known("mllm_frames", [self.mllm_frames], ("first", "all"))


class FeatureEncoder:
    """
    Computes features with a pipeline's VAE, text encoder and MLLM.

    Args:
        pipeline: its transformer and adapter may be empty, see [`load_encoders`].
        settings: settings of the features.
        target_encoder: name or folder of a SigLIP model whose pooled output of the target becomes `target_features`,
            which the visual tokens are aligned with (paper, stage 1); the mean over 8 frames of a video.

    Raises:
        ValueError: for sizes that the latents do not fit.
    """

    def __init__(
        self,
        pipeline: OmniVideoPipeline,
        settings: PrecomputeSettings = PrecomputeSettings(),
        target_encoder: str | Path | None = None,
    ) -> None:
        settings.framing.check(pipeline.grid)
        self.pipeline, self.settings = pipeline, settings
        self.target_model: Any = None
        self.target_processor: Any = None
        if target_encoder is not None:
            model = AutoModel.from_pretrained(target_encoder)
            self.target_model = getattr(model, "vision_model", model).eval().to(pipeline.vae.device)
            self.target_processor = AutoImageProcessor.from_pretrained(target_encoder, backend="pil")
        self.provenance = _from_main_process(self._component_provenance)

    def _component_provenance(self) -> dict[str, Any]:
        parts = {
            "vae": self.pipeline.vae,
            "text_encoder": self.pipeline.text_encoder,
            "mllm": self.pipeline.mllm.mllm,  # without the vision head, on which no feature depends
            "target_encoder": self.target_model,
        }
        found = {name: weights_hash(module) for name, module in parts.items() if module is not None}
        dtypes = {f"{name}_dtype": _dtype(module) for name, module in parts.items() if module is not None}
        return found | dtypes

    def provenance_of(self, task: str) -> dict[str, Any]:
        """Everything of the encoder's that features of a task depend on."""
        asks = get_task(task).answers_in_text
        tokens = asks or self.settings.instruction == "tokens"
        unused = set() if not asks else {"vae", "text_encoder", "target_encoder"}
        unused |= {"mllm"} if tokens else set()
        fields = {name: value for name, value in self.provenance.items() if name.removesuffix("_dtype") not in unused}
        return fields | {
            "template": self._template(task),
            "instruction": "tokens" if tokens else "states",
            "mllm_frames": self._mllm_frames if get_task(task).mllm_sees_first_frame else None,
            "code_version": CODE_VERSION,
        }

    @property
    def _mllm_frames(self) -> Literal["first", "all"]:
        return self.settings.mllm_frames or self.pipeline.processor.mllm_frames

    def _template(self, task: str) -> str:
        """Hash of all that makes ids and pixels out of a prompt and its pictures, and of the text encoder's ids."""
        processor = self.pipeline.processor
        tokenizers = [processor.tokenizer] + ([] if get_task(task).answers_in_text else [self.pipeline.tokenizer])
        parts = [get_task(task).fingerprint, processor.chat_template]
        parts += [f"{processor.num_image_tokens} {processor.image_aspect_ratio} {processor.num_frames}"]
        needs_target = self.target_processor is not None and not get_task(task).answers_in_text
        targets = [self.target_processor] if needs_target else []
        for image_processor in (processor.image_processor, *targets):
            parts.append(json.dumps(image_processor.to_dict(), sort_keys=True, default=str))
        for tokenizer in tokenizers:
            # Padding and truncation are settings of the last call.
            backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
            parts.append(json.dumps(backend, sort_keys=True))
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]

    def decode(
        self, row: Row, framing: Framing | None = None, source_framing: Framing | None = None
    ) -> tuple[VideoClip, VideoClip | None] | None:
        """
        Decode target and source of one sample, for [`encode`]; `None` for a question. Any thread may do this.

        Args:
            row: its task and files.
            framing: part of the target that is used; `None` for a question.
            source_framing: part of the source that is used; `None` without a source.
        """
        if get_task(row.task).answers_in_text:
            return None
        if framing is None or row.media is None or (source_framing is not None and row.source is None):
            raise ValueError(f"{row.id}: task {row.task!r} needs a file and `framing` for its target and its source.")
        target = framing.load(row.media)
        source = source_framing.load(row.source) if source_framing is not None and row.source is not None else None
        return target, source

    @torch.no_grad()
    def encode(
        self,
        row: Row,
        framing: Framing | None = None,
        source_framing: Framing | None = None,
        decoded: tuple[VideoClip, VideoClip | None] | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Compute the features of one sample.

        Args:
            row: its texts, task and files.
            framing: part of the target that is used; `None` for a question.
            source_framing: part of the source that is used; `None` without a source.
            decoded: its frames, from [`decode`]. Default: they are decoded now.

        Returns:
            Tensors by name, on the CPU, with the dtypes of the components; latents in float32.
        """
        decoded = decoded or self.decode(row, framing, source_framing)
        if decoded is None or framing is None:
            return self._question(row)
        target, source = decoded
        shown: dict[str, Any] = {}
        if source is not None and source_framing is not None:
            is_image = source_framing.fps is None
            shown = {"image": Image.fromarray(source.frames[0])} if is_image else {"video": source}
        features = self._instruction(row, shown)
        features["prompt_embeds"] = self.pipeline.encode_prompt(row.text)[0]
        features["latents"] = self._latents(row.task, target, framing)
        if source is not None:
            name = str(get_task(row.task).latents)
            features[name] = self._latents(row.task, source, framing)
        if self.target_model is not None:
            features["target_features"] = self._target_features(target)
        return {name: tensor.cpu() for name, tensor in features.items()}

    def _question(self, row: Row) -> dict[str, torch.Tensor]:
        if row.media is None:
            return encode_conversation(self.pipeline.processor, row.task, row.text, row.answer)
        with row.media.open() as path:  # of a video, only the frames that are shown are decoded
            shown: dict[str, Any] = {probe(row.media).kind: path}
            return encode_conversation(self.pipeline.processor, row.task, row.text, row.answer, **shown)

    def _instruction(self, row: Row, shown: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        processor, mllm_frames = self.pipeline.processor, self._mllm_frames
        if self.settings.instruction == "tokens":
            return encode_conversation(processor, row.task, row.text, mllm_frames=mllm_frames, **shown)
        media = {f"{kind}s": [value] for kind, value in shown.items()}
        inputs = processor.apply_task_template(
            row.task, row.text, mllm_frames=mllm_frames, return_tensors="pt", **media
        )
        states = self.pipeline.mllm.get_mllm_hidden_states(**inputs.to(self.pipeline.mllm.device))
        return {"mllm_hidden_states": states[0]}

    def _latents(self, task: str, clip: VideoClip, framing: Framing) -> torch.Tensor:
        """Normalised latents `[channels, frames, height, width]`, resized and encoded by the pipeline itself."""
        settings = GenerationSettings(
            task=task,
            height=framing.height,
            width=framing.width,
            num_frames=len(clip.frames),
            fps=framing.fps,
            num_inference_steps=1,  # nothing is generated: the pipeline only needs the size
            guidance_scale=1.0,
            flow_shift=1.0,
        )
        return self.pipeline.encode_source(Source(videos=[clip]), settings)[0]

    def _target_features(self, clip: VideoClip) -> torch.Tensor:
        """`[width]`: the mean over frames, as upstream's `siglip2_img_pooled_output_tgt` of one image."""
        frames = sample_frames(clip.frames, "uniform", min(TARGET_FRAMES, len(clip.frames)))
        pixels = self.target_processor([Image.fromarray(frame) for frame in frames], return_tensors="pt")
        pixels = pixels["pixel_values"].to(self.target_model.device, self.target_model.dtype)
        return self.target_model(pixel_values=pixels).pooler_output.float().mean(dim=0)


@hub_call
def load_encoders(
    model: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> OmniVideoPipeline:
    """
    A pipeline that encodes: its decoder and adapter have no layers, and their weights are not loaded.

    Args:
        model: folder or Hub repository.
        dtype: dtype of MLLM and text encoder. Default: as stored. The VAE uses float32: its errors are learned.
        device: device of the encoders. Default: that of this process.
        revision: branch, tag or commit.
        token: access token of the Hub.
    """
    origin = {"revision": revision, "token": token}
    # The pipeline reads patch sizes and widths off their configurations.
    transformer = WanTransformer3DModel.load_config(model, subfolder="transformer", **origin)
    adapter = OmniVideoAdapter.load_config(model, subfolder="adapter", **origin)
    formats: dict[str, Any] = {} if dtype is None else {"dtype": {"default": dtype, "vae": torch.float32}}
    pipeline = OmniVideoPipeline.from_pretrained(
        model,
        transformer=WanTransformer3DModel.from_config(transformer, num_layers=0),
        adapter=OmniVideoAdapter.from_config(adapter, num_encoder_layers=0, num_decoder_layers=0),
        **origin,
        **formats,
    )
    return pipeline.to(device or PartialState().device)


# --- provenance -----------------------------------------------------------------------------------------------------


def weights_hash(module: nn.Module) -> str:
    """
    Hash of a module's tensors and configuration: says what it is, wherever it was loaded from.

    A commit of the Hub would change with its README, and a folder has none.
    """
    config: Any = module.config
    config = config if isinstance(config, Mapping) else config.to_dict()
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _dtype(module: nn.Module) -> str:
    return dtype_name(next(module.parameters()).dtype)


def _from_main_process(compute: Callable[[], Any]) -> Any:
    """Run `compute` on the main process only, and return its result on every process."""
    return broadcast_object_list([compute() if PartialState().is_main_process else None])[0]


__all__ = ["FeatureEncoder", "PrecomputeSettings", "load_encoders", "weights_hash"]
