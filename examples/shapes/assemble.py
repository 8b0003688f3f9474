"""
Joins parts into one repository: `python -m examples.shapes.assemble given ...` before the paper's stages, and
`python -m examples.shapes.assemble finished ...` after them.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5EncoderModel

from omni_video_hf.models.modeling_vila import VilaForConditionalGeneration
from omni_video_hf.pipelines.pipeline_omni_video import OmniVideoPipeline

from . import configuration
from .configuration import MAX_BYTES, empty_instruction

SEED = 0  # of the bridges, which nothing has trained yet

app = typer.Typer(add_completion=False, help="Join the parts of Omni-Video Shapes into a repository.")
Output = Annotated[Path, typer.Option(help="Folder of the repository.")]


@app.command()
@torch.no_grad()
def given(
    vae: Annotated[Path, typer.Option(help="Folder of the trained VAE.")],
    text_encoder: Annotated[Path, typer.Option(help="Folder of the trained text encoder.")],
    transformer: Annotated[Path, typer.Option(help="Folder of the trained decoder.")],
    mllm: Annotated[Path, typer.Option(help="Folder of the trained MLLM.")],
    output: Output,
) -> None:
    """Put the parts that the paper takes as given around new bridges, and store the null states they give."""
    torch.manual_seed(SEED)
    pipe = configuration.pipeline()
    for name, part in (
        ("vae", AutoencoderKLWan.from_pretrained(vae)),
        ("transformer", WanTransformer3DModel.from_pretrained(transformer)),
        ("text_encoder", UMT5EncoderModel.from_pretrained(text_encoder)),
    ):
        pipe.register_modules(**{name: part.eval()})
    pipe.mllm.mllm.load_state_dict(VilaForConditionalGeneration.from_pretrained(mllm).state_dict())
    store_null_states(pipe)
    pipe.save_pretrained(output)


def store_null_states(pipe: OmniVideoPipeline) -> None:
    """What the text encoder and the MLLM say of nothing, for the null branch of guidance."""
    empty = pipe.tokenizer("", return_tensors="pt")
    pipe.adapter.null_prompt_embeds.weight.copy_(pipe.text_encoder(**empty).last_hidden_state[0])
    states = pipe.mllm.eval().get_mllm_hidden_states(**empty_instruction(pipe.processor))
    pipe.mllm.vision_head.null_hidden_states.weight.copy_(states[0])


@app.command()
def finished(
    model: Annotated[Path, typer.Option(help="Folder `pipeline` of the last stage.")],
    output: Output,
    transformer: Annotated[Path | None, typer.Option(help="Folder of a decoder that learned edits.")] = None,
) -> None:
    """Store the trained model in half precision, with its presets."""
    pipe = OmniVideoPipeline.from_pretrained(model)
    if transformer is not None:
        pipe.register_modules(transformer=WanTransformer3DModel.from_pretrained(transformer).eval())
        pipe.adapter.register_to_config(source_conditioning=configuration.SOURCE_CONDITIONING)
    pipe.to(torch.float16)
    pipe.register_to_config(presets=configuration.PRESETS)
    pipe.save_pretrained(output)
    # Code is written into every repository; the package, which brings the checkpoint, has it already.
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file() and path.suffix != ".py")
    if size > MAX_BYTES:
        raise typer.BadParameter(f"{output} takes {size:,} bytes, more than {MAX_BYTES:,}.")


if __name__ == "__main__":
    app()
