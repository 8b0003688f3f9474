import pytest
import tiny
import torch
from torch import nn

from conversion.key_maps import UMT5_RULES, convert_query_transformer, convert_wan_transformer, rename
from omni_video_hf import OmniVideoAdapterConfig
from omni_video_hf.models.connectors import OmniVideoQueryTransformer


def upstream_bridge():
    """Upstream's adapter: `torch.nn.Transformer` behind two linear layers."""
    module = nn.Module()
    module.decoder_query = nn.Parameter(torch.randn(1, 6, 32))
    module.fc = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 32))
    module.adapter = nn.Transformer(32, 4, 1, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
    tiny.randomize(module)
    return module.eval()


def test_a_torch_transformer_becomes_a_query_transformer_with_the_same_numbers():
    theirs = upstream_bridge()
    ours = OmniVideoQueryTransformer(OmniVideoAdapterConfig(**tiny.ADAPTER), 24).eval()
    tensors, unknown = convert_query_transformer(theirs.state_dict(), "adapter")
    assert not unknown
    ours.load_state_dict(tensors)
    inputs = torch.randn(3, 5, 24)
    with torch.no_grad():
        wanted = theirs.adapter(theirs.fc(inputs), theirs.decoder_query.expand(3, -1, -1))
        assert torch.allclose(ours(inputs), wanted, atol=1e-5)


def test_nothing_is_copied():
    state = upstream_bridge().state_dict()
    tensors, _ = convert_query_transformer(state, "adapter")
    memory = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert all(tensor.untyped_storage().data_ptr() in memory for tensor in tensors.values())


@pytest.mark.parametrize("name", ["adapter.encoder.layers.0.norm9.weight", "fc.1.weight", "optimizer", ""])
def test_unknown_names_are_reported(name):
    _, unknown = convert_query_transformer({name: torch.zeros(1)}, "adapter")
    assert unknown == [name]
    assert rename({name: torch.zeros(1)}, UMT5_RULES) == ({}, [name])


def test_names_that_fold_onto_another_are_reported():
    weights = {"blocks.0.self_attn.q.weight": torch.zeros(1), "blocks.0.attn1.to_q.weight": torch.ones(1)}
    converted, unknown = convert_wan_transformer(weights)
    assert len(converted) == 1
    assert unknown == ["blocks.0.self_attn.q.weight"]
