"""Processes that have transformers and diffusers, but not this package: load repositories with their own code."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hub_server import HubServer, client_env, run_client

# The package lies in the tests' environment: a `None` in `sys.modules` makes importing it fail.
WITHOUT_PACKAGE = "import sys\nsys.modules['omni_video_hf'] = None\n"

# Loads a repository with both libraries. The process that wrote it runs the same lines; `results` are printed as JSON.
OUTPUTS = """
import hashlib, torch
from PIL import Image


def digest(tensor):
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def pipeline_outputs(pipe):
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    image = Image.linear_gradient("L").convert("RGB").resize((32, 32))
    def seeded(): return torch.Generator().manual_seed(7)
    clip = pipe("rot", task="t2v", num_frames=5, generator=seeded(), **size).frames
    edit = pipe("rot", image=image, task="i2i", generator=seeded(), **size).frames
    text = pipe("rot", image=image, task="understand", max_new_tokens=8, generator=seeded()).text
    return {"clip": digest(clip), "edit": digest(edit), "text": text}


def model_outputs(model, processor):
    inputs = processor.apply_task_template("t2v", ["rot", "blau"], return_tensors="pt")
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 16, 2, 4, 4, generator=generator)
    with torch.no_grad():
        context = model.encode_condition(model.get_mllm_hidden_states(**inputs), output_kind="video")
        velocity = model.predict_velocity(latents, torch.tensor([500.0, 20.0]), context)
    question = processor.apply_task_template("understand", "rot", return_tensors="pt")
    torch.manual_seed(0)
    answer = model.generate(**question, max_new_tokens=8)
    return {"context": digest(context), "velocity": digest(velocity), "answer": answer.tolist()}
"""

DIFFUSERS_DOOR = """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True, **extra)
results["pipeline"] = pipeline_outputs(pipe)
parts += [pipe, pipe.mllm]
"""

TRANSFORMERS_DOOR = """
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
options = dict(trust_remote_code=True, **extra)
processor = AutoProcessor.from_pretrained(repo, **options)
results["config"] = type(AutoConfig.from_pretrained(repo, **options)).__name__
for auto_class in (AutoModel, AutoModelForImageTextToText):
    model, report = auto_class.from_pretrained(repo, output_loading_info=True, **options)
    assert not any(report.values()), report
    results[auto_class.__name__] = model_outputs(model.eval(), processor)
model = AutoModel.from_pretrained(repo, device_map="auto", **options)
results["device_map"] = model_outputs(model, processor)
parts += [model, processor]
"""


def open_doors(repo: str | Path, *doors: str, **extra: Any) -> str:
    """Code that loads a repository with diffusers and transformers (or only with `doors`), and prints the outputs."""
    arguments = f"repo, extra, results, parts = {str(repo)!r}, {extra!r}, {{}}, []\n"
    modules = 'results["modules"] = sorted({type(part).__module__.partition(".")[0] for part in parts})\n'
    code = arguments + "".join(doors or (DIFFUSERS_DOOR, TRANSFORMERS_DOOR)) + modules
    return WITHOUT_PACKAGE + OUTPUTS + code + "import json; print(json.dumps(results))"


def expected_outputs(pipe: Any, model: Any, processor: Any) -> dict[str, Any]:
    """The same outputs, computed in this process."""
    scope: dict[str, Any] = {}
    exec(OUTPUTS, scope)  # noqa: S102 - the lines above
    outputs = scope["model_outputs"](model, processor)
    return {
        "pipeline": scope["pipeline_outputs"](pipe),
        "config": "OmniVideoConfig",
        "AutoModel": outputs,
        "AutoModelForImageTextToText": outputs,
        "device_map": outputs,
        "modules": ["diffusers_modules", "transformers_modules"],
    }


def run_stranger(code: str, home: Path, fails: bool = False, **env: str) -> str:
    """Run `code` offline in a fresh process without the package; returns what it prints, or its errors."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "DIFFUSERS_"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"} | env
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert (done.returncode != 0) == fails, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stderr if fails else done.stdout


def last_json(text: str) -> Any:
    """The last line of an output, as JSON."""
    return json.loads(text.strip().splitlines()[-1])


__all__ = ["HubServer", "client_env", "expected_outputs", "last_json", "open_doors", "run_client", "run_stranger"]
