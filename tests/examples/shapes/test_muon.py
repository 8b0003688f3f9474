"""torch's two optimizers, joined: each parameter moves as its own optimizer alone would move it."""

import copy

import pytest
import torch
from torch import nn

from examples.shapes.training.muon import MuonOfStacks, MuonWithAdamW, orthogonalize, split_parameters


class Net(nn.Module):
    """A part of every kind."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.conv = nn.Conv3d(4, 6, (3, 1, 1), padding=(1, 0, 0))
        self.linear = nn.Linear(6, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.lm_head = nn.Linear(5, 7, bias=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, ids):
        features = self.conv(self.embed(ids).mT[..., None, None])[..., 0, 0].mT
        return self.lm_head(self.frozen(self.linear(features))).square().mean()


@pytest.fixture(autouse=True)
def _in_bfloat16(monkeypatch):
    """As torch's own, on any processor."""
    monkeypatch.setattr("examples.shapes.training.muon.multiplies_bfloat16", lambda: True)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 1, 1]])


def run(net, optimizer, steps):
    for _ in range(steps):
        net.zero_grad()
        net(IDS).backward()
        optimizer.step()


def test_matrices_and_kernels_are_told_from_tokens_rows(net):
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    matrices, rest = ([names[id(parameter)] for parameter in part] for part in split_parameters(net))
    assert matrices == ["conv.weight", "linear.weight", "unused.weight"]
    assert rest == ["embed.weight", "conv.bias", "linear.bias", "lm_head.weight", "unused.bias"]


def test_every_parameter_moves_as_by_its_own_optimizer(net):
    other = copy.deepcopy(net)
    # Seen as a matrix, the kernel is a linear layer of the three frames around; its own Muon sees that.
    kernel = nn.Parameter(other.conv.weight.detach().flatten(1).clone())
    muon = torch.optim.Muon([kernel, other.linear.weight], 0.02, 0.0, adjust_lr_fn="match_rms_adamw")
    vectors = [other.embed.weight, other.conv.bias, other.linear.bias, other.lm_head.weight]
    adamw = torch.optim.AdamW(vectors, 0.02, (0.9, 0.99), weight_decay=0.0)
    run(net, MuonWithAdamW(net, 0.02), 3)
    for _ in range(3):
        other.zero_grad()
        other(IDS).backward()
        kernel.grad = other.conv.weight.grad.flatten(1)
        muon.step()
        adamw.step()
        other.conv.weight.data.copy_(kernel.detach().view_as(other.conv.weight))
    for (name, one), two in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("nesterov", [True, False])
def test_stacks_move_as_their_matrices_one_by_one(nesterov):
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 24), (16, 16), (24, 8), (8, 24)]
    begun = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in begun] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov}
    optimizers = MuonOfStacks(ours, **settings), torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        if step == 3:  # each goes on from where the other was
            states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
            for optimizer, state in zip(optimizers, reversed(states), strict=True):
                optimizer.load_state_dict(state)
        for number, (one, two) in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(one.shape, generator=generator)
            one.grad, two.grad = (None, None) if number == step else (gradient, gradient.clone())
        for optimizer in optimizers:
            optimizer.step()
    for start, one, two in zip(begun, ours, theirs, strict=True):
        assert (one - two).norm() < 0.01 * (two - start).norm()


def test_schedules_reach_both(net):
    optimizer = MuonWithAdamW(net, 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0))
    before = copy.deepcopy(net.state_dict())
    run(net, optimizer, 1)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    schedule.step()
    run(net, optimizer, 1)
    moved = {name for name, value in net.state_dict().items() if not torch.equal(before[name], value)}
    assert moved == {"embed.weight", "conv.weight", "conv.bias", "linear.weight", "linear.bias", "lm_head.weight"}


def test_resuming_is_exact(net, tmp_path):
    def fresh(model):
        optimizer = MuonWithAdamW(model, 0.05)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def steps(model, optimizer, schedule, count):
        for _ in range(count):
            run(model, optimizer, 1)
            schedule.step()

    whole, resumed = net, copy.deepcopy(net)
    optimizer, schedule = fresh(whole)
    steps(whole, optimizer, schedule, 2)
    resumed.load_state_dict(whole.state_dict())
    torch.save([optimizer.state_dict(), schedule.state_dict()], tmp_path / "state.pt")
    steps(whole, optimizer, schedule, 2)
    optimizer, schedule = fresh(resumed)
    for part, state in zip((optimizer, schedule), torch.load(tmp_path / "state.pt"), strict=True):
        part.load_state_dict(state)
    steps(resumed, optimizer, schedule, 2)
    for (name, one), two in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_a_kernel_that_cannot_be_seen_as_a_matrix_is_refused(net):
    net.conv.weight = nn.Parameter(net.conv.weight.detach().transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(ValueError, match=r"shape \(6, 4, 3, 1, 1\) is not contiguous"):
        MuonWithAdamW(net, 0.1)


def test_a_model_that_is_moved_afterwards_trains_as_if_it_had_not_been(net):
    """Among several processes accelerate gives every parameter new memory after the optimizer was made."""
    other = copy.deepcopy(net)
    run(net, MuonWithAdamW(net, 0.02), 2)
    optimizer = MuonWithAdamW(other, 0.02)
    for parameter in other.parameters():
        parameter.data = parameter.data.clone()
    run(other, optimizer, 2)
    for parameter, moved in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, moved)


def test_without_instructions_for_bfloat16_the_iteration_runs_in_float32(monkeypatch):
    matrices = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))
    settings = ((3.4445, -4.775, 2.0315), 5, 1e-7)
    rounded = orthogonalize(matrices, *settings)
    monkeypatch.setattr("examples.shapes.training.muon.multiplies_bfloat16", lambda: False)
    exact = orthogonalize(matrices, *settings)
    assert (rounded.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)
