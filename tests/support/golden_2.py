"""Numbers of Omni-Video 2's own code at tiny sizes, and its layouts as folders."""

import shutil
from functools import cache
from pathlib import Path

import torch
from golden import CORE, DATA
from safetensors.torch import load_file
from transformers import AutoTokenizer

from conversion.convert_omni_video_2 import convert
from omni_video_hf.media import VideoClip
from omni_video_hf.pipelines.omni_video_2.edit_source import EditVideo
from omni_video_hf.processing.processing_omni_video_2 import END, MllmFrames

V2 = DATA / "v2"
EXPECTED = load_file(V2 / "expected.safetensors")
MLLMS = {"A14B": V2 / "qwen3_vl_moe", "1.3B": V2 / "qwen3_vl"}
NEW_TOKENS = 24  # in the captions
STEPS = ("source_caption", "target_caption", "features")
# Loops: name of the case in the data, layout, case of the MLLM, and length of the context.
LOOPS = {
    "v2v": ("A14B.v2v", "A14B", "landscape", 384),
    "portrait": ("A14B.v2v_portrait", "A14B", "portrait", 384),
    "cut": ("A14B.v2v_cut", "A14B", "landscape", 140),
    "t2v": ("A14B.t2v", "A14B", "t2v", 384),
    "1.3B": ("1_3B.v2v", "1.3B", "landscape", 384),
}

DECODER_HEADS = 2


def expected(name: str) -> torch.Tensor:
    """A tensor of upstream; ids as int64. Cases share noise and latents of one source."""
    if name not in EXPECTED and name.endswith((".noise", ".source_latent")):
        name = f"1_3B.v2v.{name.rpartition('.')[2]}"
    tensor = EXPECTED[name]
    return tensor.long() if tensor.dtype == torch.int32 else tensor


@cache
def tokenizer(name: str = "qwen3_vl") -> AutoTokenizer:
    """The tokenizer of the MLLMs."""
    return AutoTokenizer.from_pretrained(V2 / name)


@cache
def turns(mllm: str, case: str, step: str) -> tuple[str, str]:
    """System prompt and text of the user in a step, from upstream's ids."""
    ids = expected(f"{mllm}.{case}.{step}.input_ids")[0].tolist()
    end = tokenizer().convert_tokens_to_ids(END)
    first = ids.index(end)
    second = ids.index(end, first + 1)
    system = tokenizer().decode(ids[1:first]).removeprefix("system\n")
    user = tokenizer().decode(ids[first + 3 : second])
    return system, user.removeprefix("user\n").rpartition("<|vision_end|>")[2]


def prompts() -> dict[str, str]:
    """System prompts of the pipeline as upstream had them."""
    return {step: turns("qwen3_vl", "landscape", step)[0] for step in STEPS}


def instruction(case: str) -> str:
    """Instruction of a case."""
    return turns("qwen3_vl", case, "features")[1]


def mllm_frames(case: str) -> MllmFrames:
    """The six frames that the MLLM saw."""
    return MllmFrames(EXPECTED[f"frames.{case}"].numpy(), tuple(EXPECTED[f"times.{case}"].tolist()))


def videos(case: str) -> list[EditVideo] | None:
    """Source of a case, of whose frames only those for the MLLM are kept."""
    frames = None if case == "t2v" else mllm_frames(case)
    return None if frames is None else [EditVideo(frames, frames.frames, 8.0)]


def clip(num_frames: int = 29, height: int = 64, width: int = 112) -> VideoClip:
    """A source of plain gradients, with motion."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frames = [
        torch.stack([rows * 2 + 3 * n, columns + 5 * n, rows + columns], dim=-1) % 256 for n in range(num_frames)
    ]
    return VideoClip((torch.stack(frames) % 256).to(torch.uint8).numpy(), fps=24.0)


def original(folder: Path, layout: str = "A14B") -> Path:
    """Upstream's folder; VAE of version 1, which is the same network."""
    root = folder / layout
    shutil.copytree(V2 / "A14B", root, ignore=shutil.ignore_patterns("*noise_model" if layout == "1.3B" else ""))
    if layout == "1.3B":
        shutil.copytree(V2 / "1_3B", root, dirs_exist_ok=True)
    shutil.copyfile(CORE / "omni_ckpts" / "wan" / "wanxiang1_3b" / "Wan2.1_VAE.pth", root / "Wan2.1_VAE.pth")
    return root


def shared_config(folder: Path, **changes: str | None) -> Path:
    """A file like upstream's configuration, with the prompts of the golden numbers."""
    texts = {
        "source_caption_system_prompt": prompts()["source_caption"],
        "target_caption_system_prompt": prompts()["target_caption"],
        "feature_extraction_system_prompt": prompts()["features"],
        "sample_neg_prompt_en": "blurred, grey",
    }
    lines = ["import torch", "from nowhere import Settings", "cfg = Settings()", "cfg.text_len = 512"]
    lines += [f"cfg.{name} = {text!r}" for name, text in (texts | changes).items() if text is not None]
    path = folder / "shared_config.py"
    path.write_text("\n".join(lines))
    return path


def converted(folder: Path, layout: str = "A14B") -> Path:
    """Upstream's folder as our repository."""
    output = folder / f"omni-video-2-{layout}"
    convert(
        original(folder, layout),
        output,
        mllm=str(MLLMS[layout]),
        prompts=shared_config(folder),
        max_context_length=384,
        decoder_heads=DECODER_HEADS,
    )
    return output
