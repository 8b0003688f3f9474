"""What upstream's VILA folder says beside its weights: sizes, tokens, images and sampling."""

from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from omni_video_hf import OmniVideoProcessor, VilaConfig
from omni_video_hf.processing.processing_omni_video import IMAGE_TOKEN
from omni_video_hf.tasks import IMAGE_GENERATION_TOKEN, VIDEO_GENERATION_TOKEN
from omni_video_hf.utils.safe_load import CorruptCheckpointError

from .original_checkpoint import VILA, OriginalCheckpoint, read_tokenizer

CONFIG = f"{VILA}/config.json"
LLM_CONFIG = f"{VILA}/llm/config.json"
GENERATION_CONFIG = f"{VILA}/llm/generation_config.json"
TOWER_CONFIG = f"{VILA}/vision_tower/config.json"
PREPROCESSOR_CONFIG = f"{VILA}/vision_tower/preprocessor_config.json"
PROJECTOR_CONFIG = f"{VILA}/mm_projector/config.json"

EMBEDDING = "mllm.model.language_model.embed_tokens.weight"
IMAGE_PATCH_TOKEN = "<im_patch>"
END_OF_TURN = "<|eot_id|>"
# Upstream looks for these ids by number: the second and third behind bos.
GENERATION_TOKENS = {IMAGE_GENERATION_TOKEN: 2, VIDEO_GENERATION_TOKEN: 3}
BICUBIC = 3  # PIL's number

# (file, key, what upstream assumes without it, supported values)
SUPPORTED: tuple[tuple[str, str, Any, tuple[Any, ...]], ...] = (
    (CONFIG, "mm_use_im_start_end", False, (False,)),
    (CONFIG, "mm_vision_select_feature", None, ("cls_patch",)),
    (CONFIG, "s2", False, (False, None)),
    (PROJECTOR_CONFIG, "mm_projector_type", None, ("mlp_downsample",)),
    (TOWER_CONFIG, "model_type", None, ("siglip_vision_model",)),
    (PREPROCESSOR_CONFIG, "resample", BICUBIC, (BICUBIC,)),
)


def vila_config(checkpoint: OriginalCheckpoint, tokenizer: PreTrainedTokenizerBase) -> VilaConfig:
    """Configuration of VILA; settings of upstream's that this port does not reproduce are refused."""
    for file, key, default, supported in SUPPORTED:
        _refuse_unless(checkpoint, file, key, checkpoint.json(file).get(key, default), supported)
    settings = checkpoint.json(CONFIG)
    # Upstream would add the token to the tokenizer, and with it a row of random numbers to the embedding.
    if IMAGE_PATCH_TOKEN not in tokenizer.get_vocab():
        key = "mm_use_im_patch_token"
        _refuse_unless(checkpoint, CONFIG, key, settings.get(key, True), (False,))
    layer = settings.get("mm_vision_select_layer")
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ValueError(f"{checkpoint.root / CONFIG}: mm_vision_select_layer is {layer!r}; it must be a number.")
    text = checkpoint.json(LLM_CONFIG)
    if "model_type" not in text:
        raise CorruptCheckpointError(f"{checkpoint.root / LLM_CONFIG}: has no 'model_type'.")
    try:
        return VilaConfig(
            text_config=text,
            vision_config=checkpoint.json(TOWER_CONFIG),
            vision_feature_layer=layer,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        )
    except Exception as error:  # values of any kind, checked by transformers
        raise CorruptCheckpointError(
            f"{checkpoint.root / VILA}: config.json, llm/config.json and vision_tower/config.json make no "
            f"configuration ({error})."
        ) from error


def vila_tokenizer(checkpoint: OriginalCheckpoint) -> PreTrainedTokenizerBase:
    """The language model's tokenizer, `<image>` added behind its vocabulary."""
    folder = checkpoint.path(f"{VILA}/llm")
    tokenizer = read_tokenizer(folder, "bos_token", "eos_token")
    embedding = checkpoint.mllm().tensors.get(EMBEDDING)
    if embedding is None:
        raise CorruptCheckpointError(f"{folder}: has no weight 'model.embed_tokens.weight'.")
    rows = len(embedding)
    if len(tokenizer) != rows:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the embedding has {rows} rows. "
            "Upstream would cut rows off or make random ones up; convert a checkpoint whose parts fit."
        )
    tokenizer.add_tokens(IMAGE_TOKEN, special_tokens=True)
    return tokenizer


def generation_token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Id of `[GEN_IMG]` or `[GEN_VID]`; where the tokenizer splits it, the number upstream looks for."""
    ids = tokenizer.encode(token, add_special_tokens=False)
    return ids[0] if len(ids) == 1 else tokenizer.bos_token_id + GENERATION_TOKENS[token]


def generation_token_notes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What is unusual about the tokens by which the MLLM asks to draw."""
    notes = []
    for token, offset in GENERATION_TOKENS.items():
        ids, literal = tokenizer.encode(token, add_special_tokens=False), tokenizer.bos_token_id + offset
        if len(ids) != 1:
            notes.append(f"the tokenizer splits {token!r} into {len(ids)} pieces; upstream's id {literal} is used.")
        elif ids[0] != literal:
            notes.append(f"{token!r} has the id {ids[0]}, which is used; upstream looks for {literal}.")
    return notes


def generation_config(checkpoint: OriginalCheckpoint, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Upstream's sampling: what its code passes to `generate`, and the rest as stored with the language model."""
    stored = checkpoint.json(GENERATION_CONFIG) if checkpoint.has(GENERATION_CONFIG) else {}
    eos = stored.pop("eos_token_id", None)
    eos = eos if isinstance(eos, list) else [tokenizer.eos_token_id if eos is None else eos]
    end_of_turn = tokenizer.get_vocab().get(END_OF_TURN)
    pad = tokenizer.pad_token_id
    settings = {name: value for name, value in stored.items() if name[0] != "_" and name != "transformers_version"}
    settings |= {
        "do_sample": True,
        "temperature": 0.2,
        "top_p": 1.0,
        "max_new_tokens": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": list(dict.fromkeys([*eos, *([] if end_of_turn is None else [end_of_turn])])),
        "pad_token_id": tokenizer.eos_token_id if pad is None else pad,
    }
    try:
        config = GenerationConfig(**settings)
        config.validate(strict=True)
    except Exception as error:  # values of any kind, checked by transformers
        raise CorruptCheckpointError(f"{checkpoint.root / GENERATION_CONFIG}: {error}") from error
    return config


def vila_processor(
    checkpoint: OriginalCheckpoint, config: VilaConfig, tokenizer: PreTrainedTokenizerBase
) -> OmniVideoProcessor:
    """Tokenizer and image processor with upstream's settings."""
    stored = checkpoint.json(PREPROCESSOR_CONFIG)
    names = ("image_mean", "image_std", "rescale_factor")
    side, limit = config.vision_config.image_size, checkpoint.json(LLM_CONFIG).get("tokenizer_model_max_length")
    size = stored.get("size", {"height": side, "width": side})
    _refuse_unless(checkpoint, PREPROCESSOR_CONFIG, "size", size, ({"height": side, "width": side},))
    for key in ("do_resize", "do_rescale", "do_normalize"):
        _refuse_unless(checkpoint, PREPROCESSOR_CONFIG, key, stored.get(key, True), (True,))
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"{checkpoint.root / LLM_CONFIG}: tokenizer_model_max_length is {limit!r}; not a length.")
    padded = checkpoint.json(CONFIG).get("image_aspect_ratio") == "pad"  # everything else squashes
    return OmniVideoProcessor(
        SiglipImageProcessorPil(size=size, **{name: stored[name] for name in names if name in stored}),
        tokenizer,
        num_image_tokens=config.image_seq_length,
        image_aspect_ratio="pad" if padded else "resize",
        model_max_length=limit,
    )


def _refuse_unless(
    checkpoint: OriginalCheckpoint, file: str, key: str, value: Any, supported: tuple[Any, ...]
) -> None:
    if not any(type(value) is type(one) and value == one for one in supported):
        raise ValueError(f"{checkpoint.root / file}: {key} is {value!r}; only {supported[0]!r} is supported.")
