# SPDX-License-Identifier: Apache-2.0
"""Nothing that is kept between calls outlives the weights and statistics that it was made from.

Each write is made to a fused model that has run, and to the plain one; then they must agree.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import resnet_fast


def train_a_step(m):
    m.train()
    m(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5)))
    m.eval()


def optimizer_step(m):
    m.train()
    optimizer = torch.optim.SGD(m.parameters(), lr=0.05)
    with torch.enable_grad():
        m(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))).sum().backward()
    optimizer.step()
    m.eval()


def other_state(m):
    generator = torch.Generator().manual_seed(6)
    return {
        name: t * torch.empty(t.shape).uniform_(0.8, 1.2, generator=generator)
        if t.is_floating_point()
        else t.clone()
        for name, t in m.state_dict().items()
    }


def load(m):
    m.load_state_dict(other_state(m))


def load_by_assignment(m):
    m.load_state_dict(other_state(m), assign=True)


def average_by_data(m):
    for parameter in m.parameters():
        parameter.data.mul_(0.9).add_(0.01)


def average_by_new_data(m):
    for parameter in m.parameters():
        parameter.data = parameter.data * 0.9 + 0.01


def write_statistics_by_data(m):
    m.layer1[0].bn1.running_mean.data[5] += 3.0
    m.layer2[0].downsample[1].running_var.data[60] *= 9.0


def write_one_affine_element(m):
    m.layer1[1].bn2.weight.data[63] = -2.0
    m.bn1.bias.data[1] = 2.0


def write_one_weight(m):
    m.layer1[0].conv1.weight[10, 20, 1, 1] = 5.0


def change_eps(m):
    m.layer1[0].bn1.running_var[:8] = 1e-4
    for module in m.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-2


def halve_and_back(m):
    m.half().float()


def change_layout(m):
    m.to(memory_format=torch.contiguous_format)


def change_layout_and_dtype_and_back(m):
    m.to(torch.bfloat16, memory_format=torch.contiguous_format)
    m.to(torch.float32, memory_format=torch.channels_last)


def swap_weights_of_blocks(m):
    a, b = m.layer1[0].conv1, m.layer1[1].conv1
    a.weight, b.weight = b.weight, a.weight
    a.weight.data[0] += 1.0


def swap_data_of_blocks(m):
    a, b = m.layer1[0].conv1.weight, m.layer1[1].conv1.weight
    a.data, b.data = b.data, a.data


def reset(m):
    torch.manual_seed(8)
    for module in m.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.reset_parameters()


@pytest.mark.parametrize(
    "write",
    [
        train_a_step,
        optimizer_step,
        load,
        load_by_assignment,
        average_by_data,
        average_by_new_data,
        write_statistics_by_data,
        write_one_affine_element,
        write_one_weight,
        change_eps,
        halve_and_back,
        change_layout,
        change_layout_and_dtype_and_back,
        swap_weights_of_blocks,
        swap_data_of_blocks,
        reset,
    ],
)
@torch.no_grad()
def test_a_write_is_noticed(write, pair, image, assert_agrees):
    fused, plain = pair()
    x = image(2, 3, 40, 40)
    before = [fused(x) for _ in range(2)][-1]
    for model in (fused, plain):
        write(model)
    y = assert_agrees(fused, plain, x)
    if write is not change_layout:
        assert (y - before).abs().max() > 1e-4 * before.abs().max()
    assert resnet_fast.report(fused).fused == len(resnet_fast.report(fused))


@torch.no_grad()
def test_training_and_evaluation_by_turns(pair, image, assert_agrees):
    fused, plain = pair()
    x = image(2, 3, 40, 40)
    outputs = [assert_agrees(fused, plain, x)]
    for turn in range(3):
        for model in (fused, plain):
            model.train()(image(4, 3, 32, 32, seed=turn) * (turn + 1))
        state = plain.state_dict()
        for name, value in fused.state_dict().items():
            torch.testing.assert_close(value, state[name], msg=name)
            value.copy_(state[name])  # so that rounding does not add up over the turns
        for model in (fused, plain):
            model.eval()
        outputs.append(assert_agrees(fused, plain, x))
        assert not torch.allclose(outputs[-1], outputs[-2], rtol=1e-3)


@torch.no_grad()
def test_two_models_swap_their_weights(pair, image, assert_agrees):
    (a, plain_a), (b, plain_b) = pair(), pair()
    load(b), load(plain_b)
    x = image(2, 3, 40, 40)
    for model in (a, b):
        model(x)
    for one, other in ((a, b), (plain_a, plain_b)):
        kept = copy.deepcopy(one.state_dict())
        one.load_state_dict(other.state_dict())
        other.load_state_dict(kept)
    assert not torch.equal(assert_agrees(a, plain_a, x), assert_agrees(b, plain_b, x))


@torch.no_grad()
def test_refresh_after_a_write_that_leaves_no_trace(pair, image, assert_agrees):
    fused, plain = pair()
    x = image(2, 3, 40, 40)
    fused(x)
    for model in (fused, plain):
        model.layer1[0].conv1.weight.data[10, 20, 1, 1] = 5.0
    assert resnet_fast.refresh(fused) is fused
    assert_agrees(fused, plain, x)


@torch.no_grad()
def test_dtype_round_trip_between_calls(pair, image, assert_agrees):
    fused, plain = pair()
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
        for model in (fused, plain):
            model.to(dtype)
        assert_agrees(fused, plain, image(2, 3, 40, 40).to(dtype), str(dtype))


def test_an_input_of_another_dtype_fails_as_in_torch(pair, image):
    fused, plain = pair()
    with torch.no_grad():
        fused(image(1, 3, 40, 40))
        for model in (fused, plain):
            with pytest.raises(RuntimeError):
                model(image(1, 3, 40, 40).double())
