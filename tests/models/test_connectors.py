import copy

import pytest
import tiny
import torch
from diffusers.hooks import apply_layerwise_casting
from golden import CORE_EXPECTED
from torch import nn

from omni_video_hf import OmniVideoAdapter, OmniVideoAdapterConfig, OmniVideoVisionHead, OmniVideoVisionHeadConfig
from omni_video_hf.models.connectors import OmniVideoQueryTransformer, pad_embeddings


@pytest.fixture(scope="module")
def adapter():
    built = OmniVideoAdapter(**tiny.ADAPTER).eval()
    tiny.randomize(built)
    return built


@pytest.fixture(scope="module")
def head():
    built = OmniVideoVisionHead(OmniVideoVisionHeadConfig(**tiny.VISION_HEAD)).eval()
    tiny.randomize(built)
    return built


def parts(batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 4, 24, generator=generator),
        torch.randn(batch, 5, 32, generator=generator),
        torch.randn(batch, 16, 2, 8, 4, generator=generator),
        torch.randn(batch, 16, 1, 4, 4, generator=generator),
    )


@torch.no_grad()
def test_context_layout(adapter):
    """Source, reference, visual tokens, prompt, each between its markers: restated plainly."""
    vision, prompt, source, reference = parts()
    context = adapter(vision, prompt, source, reference, output_kind="video")[0]
    image_start, image_end, visual_start, visual_end, prompt_start, prompt_end = adapter.marker_embeds()
    tokens = [adapter.query_transformer(vision[:, index : index + 1])[0] for index in range(4)]
    wanted = torch.cat(
        [
            image_start[None],
            adapter.visual_context_adapter(source)[0],
            image_end[None],
            image_start[None],
            adapter.visual_context_adapter(reference)[0],
            image_end[None],
            visual_start[None],
            *tokens,
            visual_end[None],
            prompt_start[None],
            prompt[0],
            prompt_end[None],
        ]
    )
    assert torch.allclose(context, wanted, atol=1e-5)
    image = adapter(vision, prompt, output_kind="image")[0]
    assert torch.allclose(image[1:7], tokens[0], atol=1e-5)
    assert len(image) == 1 + 6 + 1 + 1 + 5 + 1


@torch.no_grad()
def test_source_tokens_run_frame_by_frame_row_by_row(adapter):
    latents = torch.zeros(1, 16, 2, 8, 4)
    bare = adapter.visual_context_adapter(latents)[0]
    latents[:, :, 1, 4:, :] = 1.0  # second frame, second row of tokens
    changed = (adapter.visual_context_adapter(latents)[0] - bare).abs().sum(dim=1) > 1e-6
    assert changed.tolist() == [False, False, False, True]


@torch.no_grad()
def test_without_markers_parts_are_joined_bare():
    adapter = OmniVideoAdapter(**tiny.ADAPTER, use_markers=False).eval()
    vision, prompt, source, _ = parts()
    assert adapter(vision, prompt, source).shape == (1, 4 + 24 + 5, 32)
    assert "marker_embeds" not in adapter.state_dict()


@torch.no_grad()
def test_batches_of_unequal_lengths_equal_single_samples(adapter, head):
    vision, prompt, source, _ = parts(batch=3)
    lengths = (5, 2, 4)
    prompts = [row[:length] for row, length in zip(prompt, lengths, strict=True)]
    together = adapter(vision, prompts, source)
    mask = torch.tensor([[int(index < length) for index in range(5)] for length in lengths])
    assert torch.equal(adapter(vision, prompt, source, prompt_embeds_mask=mask), together)
    for index, length in enumerate(lengths):
        alone = adapter(vision[index : index + 1], prompts[index][None], source[index : index + 1])
        assert alone.shape[1] == together.shape[1] - (5 - length)
        assert torch.allclose(together[index, : alone.shape[1]], alone[0], atol=1e-5)
        assert not together[index, alone.shape[1] :].any()

    states = [torch.randn(length, 48) for length in (7, 3, 5)]
    for index, row in enumerate(states):
        assert torch.allclose(head(states)[index], head(row[None])[0], atol=1e-5)
    padded, mask = pad_embeddings(states, None, "states")
    assert torch.allclose(head(padded, mask), head(states), atol=1e-6)
    left = torch.stack([nn.functional.pad(row, (0, 0, 7 - len(row), 0)) for row in states])
    left_mask = torch.tensor([[int(index >= 7 - len(row)) for index in range(7)] for row in states])
    assert torch.allclose(head(left, left_mask), head(states), atol=1e-5)


@torch.no_grad()
def test_a_batch_of_one_serves_all(adapter, head):
    vision, prompt, source, _ = parts(batch=3)
    null = head()
    assert torch.equal(null, head(head.null_hidden_states()[None]))
    context = adapter(null, None, source)
    assert context.shape[0] == 3
    assert torch.allclose(context[:, -4:-1], adapter.null_prompt_embeds().expand(3, -1, -1))
    with pytest.raises(ValueError, match=r"\[3, 3, 2\]"):
        adapter(vision, prompt[:2], source)


@torch.no_grad()
def test_overflow_is_refused_with_numbers_or_cut_from_the_end(adapter):
    vision, prompt, _, _ = parts()
    source = torch.randn(1, 16, 9, 16, 12)  # 9 * 4 * 3 = 108 tokens
    with pytest.raises(ValueError) as error:
        adapter(vision, prompt, source)
    message = str(error.value)
    assert "143 tokens" in message  # 110 + 26 + 7
    assert "takes 96" in message
    assert "61 are free" in message
    assert "5 latent frames" in message
    cut = adapter(vision, prompt, source, context_overflow="truncate")
    whole = adapter(vision, prompt, source, max_context_length=200)
    assert cut.shape[1] == 96
    assert torch.equal(cut, whole[:, :96])
    assert adapter.pad_context(whole).shape[1] == 143
    assert adapter.pad_context(cut[:, :50]).shape[1] == 96
    with pytest.raises(ValueError, match="Shorten the prompt"):
        adapter(vision, torch.zeros(1, 90, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_kind": "audio"}, "'image' or 'video'"),
        ({"context_overflow": "repair"}, "'error' or 'truncate'"),
        ({"source_latents": torch.zeros(1, 16, 1, 6, 4)}, r"divisible by \(1, 4, 4\)"),
        ({"source_latents": torch.zeros(16, 1, 4, 4)}, "must be"),
        ({"prompt_embeds": torch.zeros(5, 32)}, "`prompt_embeds` must be"),
        ({"prompt_embeds_mask": torch.ones(1, 3)}, "mask of `prompt_embeds`"),
    ],
)
def test_bad_input_is_refused(adapter, arguments, message):
    vision, prompt, _, _ = parts()
    with pytest.raises(ValueError, match=message):
        adapter(vision, **({"prompt_embeds": prompt} | arguments))


def test_return_dict_false_gives_a_tuple(adapter):
    vision, prompt, _, _ = parts()
    (context,) = adapter(vision, prompt, return_dict=False)
    assert torch.equal(context, adapter(vision, prompt))


def test_query_transformer_is_torch_transformer():
    """Upstream's network is `torch.nn.Transformer`; parity of the released sizes rests on this and the golden data."""
    config = OmniVideoAdapterConfig(**(tiny.ADAPTER | {"num_decoder_layers": 1, "intermediate_size": 128}))
    ours = OmniVideoQueryTransformer(config, 24).eval()
    assert {type(module).__name__ for module in ours.modules()} >= {"OmniVideoEncoderLayer", "OmniVideoDecoderLayer"}
    names = {name.split(".")[-2] for name, _ in ours.named_parameters() if "attn" in name and "norm" not in name}
    assert names == {"q_proj", "k_proj", "v_proj", "out_proj"}


def test_save_and_load(adapter, tmp_path):
    adapter.save_pretrained(tmp_path)
    loaded = OmniVideoAdapter.from_pretrained(tmp_path).eval()
    assert loaded.attention_config.to_diff_dict() == adapter.attention_config.to_diff_dict()
    vision, prompt, source, reference = parts()
    with torch.no_grad():
        assert torch.equal(loaded(vision, prompt, source, reference), adapter(vision, prompt, source, reference))
    buffers = dict(loaded.named_buffers())
    assert set(buffers) == {"marker_embeds.weight", "null_prompt_embeds.weight"}
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in adapter.named_buffers())


def test_gradient_checkpointing_changes_nothing():
    adapter = OmniVideoAdapter(**tiny.ADAPTER).train()
    tiny.randomize(adapter)
    gradients = []
    for enabled in (False, True):
        if enabled:
            adapter.enable_gradient_checkpointing()
        adapter.zero_grad()
        adapter(*parts()[:3]).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in adapter.named_parameters()})
    assert all(torch.allclose(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
@torch.no_grad()
def test_layerwise_casting_stores_less_and_computes_as_told(adapter, storage, compute):
    vision, prompt, source, _ = parts()
    cast = copy.deepcopy(adapter).to(compute)
    whole = cast.get_memory_footprint()
    cast.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
    context = cast(vision, prompt, source)
    assert context.dtype == compute
    stored = {cast.query_transformer.input_proj_1.weight.dtype, cast.visual_context_adapter.proj.weight.dtype}
    assert stored == {storage}
    if storage != compute:
        assert cast.get_memory_footprint() < 0.75 * whole
    wanted = adapter(vision, prompt, source)
    distance = (context.float() - wanted).norm() / wanted.norm()
    assert distance < (0.01 if storage == torch.bfloat16 else 0.2)


def test_layerwise_casting_trains_what_is_not_cast():
    adapter = OmniVideoAdapter(**tiny.ADAPTER).train().to(torch.bfloat16)
    adapter.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    adapter(*parts()[:3]).float().square().sum().backward()
    assert adapter.query_transformer.query_tokens.grad.abs().sum() > 0


@torch.no_grad()
def test_a_vision_head_is_cast_layer_by_layer_too(head):
    cast, states = copy.deepcopy(head), torch.randn(1, 7, 48)
    apply_layerwise_casting(cast, torch.float8_e4m3fn, torch.float32)
    assert cast.query_transformer.input_proj_1.weight.dtype == torch.float8_e4m3fn
    assert (cast(states) - head(states)).norm() < 0.2 * head(states).norm()


@pytest.mark.parametrize("variant", [None, "fp16"])
@torch.no_grad()
def test_sharded_weights_of_any_variant_load(adapter, tmp_path, variant):
    adapter.save_pretrained(tmp_path, variant=variant, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    loaded = OmniVideoAdapter.from_pretrained(tmp_path, variant=variant).eval()
    assert torch.equal(loaded(*parts()), adapter(*parts()))
    half = OmniVideoAdapter.from_pretrained(tmp_path, variant=variant, torch_dtype=torch.float16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.float16}


def test_from_config_builds_the_same_modules(adapter):
    built = OmniVideoAdapter.from_config(adapter.config)
    assert built.config == adapter.config
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (built, adapter)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "options", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
@torch.no_grad()
def test_group_offloading_changes_nothing(adapter, options):
    offloaded = copy.deepcopy(adapter)
    offloaded.enable_group_offload(torch.device("cpu"), **options)
    assert torch.equal(offloaded(*parts()), adapter(*parts()))


@torch.no_grad()
def test_one_graph_holds_the_whole_adapter(adapter):
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(adapter), backend="eager", fullgraph=True)
    assert torch.equal(compiled(*parts()), adapter(*parts()))
    torch.compiler.reset()
    blocks = copy.deepcopy(adapter)
    blocks.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert torch.equal(blocks(*parts()), adapter(*parts()))


def test_heads_too_wide_for_flash_kernels_use_sdpa(adapter):
    wide = OmniVideoAdapter(**(tiny.ADAPTER | {"hidden_size": 520, "num_attention_heads": 2})).eval()
    wide.set_attn_implementation("flash_attention_2")  # nothing is imported: heads of 260 never reach the kernel
    with torch.no_grad():
        assert wide(parts()[0], torch.zeros(1, 2, 520)).shape[-1] == 520


def test_golden_data_has_markers_and_none():
    assert CORE_EXPECTED["v2v.mixed_context"].shape[0] - CORE_EXPECTED["v2v_no_special.mixed_context"].shape[0] == 6
