"""
`torch.compile` of the decoder's blocks: one graph, no breaks, no recompilation between steps or calls.

The graphs go to the eager backend: what is tested is what is traced and when, which needs no C++ compiler.
"""

import pytest
import tiny
import torch
from golden import relative_error
from torch._dynamo.utils import counters

ARGUMENTS = {"task": "t2v", "num_inference_steps": 5, "output_type": "latent"}


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    counters.clear()
    pipe = tiny.pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    yield pipe
    torch._dynamo.reset()


def run(pipe, prompt="a cat", **arguments):
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **(ARGUMENTS | arguments)).frames


def graphs():
    return counters["stats"]["unique_graphs"]


def test_one_graph_serves_all_blocks_branches_and_steps(compiled):
    seen = []
    latents = run(compiled, callback_on_step_end=lambda *_: seen.append(graphs()) or {})
    # the first step makes the keys and values uncompiled, the second compiles, nothing after it
    assert seen == [0, 1, 1, 1, 1]
    assert not counters["graph_break"]
    plain = tiny.pipeline()
    plain.set_progress_bar_config(disable=True)
    assert relative_error(latents, run(plain)) < 1e-4


def test_another_prompt_does_not_recompile(compiled):
    run(compiled)
    before = graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(compiled, "a much longer prompt about a cat and a dog")
        run(compiled, guidance_interval=(0.0, 0.5))
    assert graphs() == before


@pytest.mark.slow
def test_the_whole_decoder_compiles_in_one_piece(compiled):
    plain = tiny.pipeline()
    plain.set_progress_bar_config(disable=True)
    wanted = run(plain)
    plain.transformer.compile(fullgraph=True, backend="eager")
    torch._dynamo.reset()
    counters.clear()
    seen = []
    latents = run(plain, callback_on_step_end=lambda *_: seen.append(graphs()) or {})
    assert seen[1] == seen[-1] >= 1
    assert not counters["graph_break"]
    assert relative_error(latents, wanted) < 1e-4
