# SPDX-License-Identifier: Apache-2.0
"""Blocks that are fused in parts, and convolutions with a bias: right, live, and told."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast.nn import run
from tests.nn.conftest import randomize
from tests.support.tolerance import assert_within

K_GEMM = 64 * 9


class Gate(nn.Module):
    """Squeeze and excitation, in one convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


def block(**parts: nn.Module) -> nn.Module:
    """timm's BasicBlock from 16 to 32 channels over an average-pooled shortcut, parts exchanged."""
    resnet = pytest.importorskip("timm.models.resnet")
    torch.manual_seed(0)
    shortcut = resnet.downsample_avg(16, 32, 1, stride=2)
    made = resnet.BasicBlock(16, 32, stride=2, downsample=shortcut)
    for name, part in parts.items():
        setattr(made, name, part)
    return randomize(made).eval()


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def agree(optimized: nn.Module, plain: nn.Module, x: torch.Tensor) -> torch.Tensor:
    exact = copy.deepcopy(plain).double()(x.double())
    y = optimized(x)
    assert_within(y, plain(x), exact, K_GEMM)
    return y


def kept(module: nn.Module) -> list:
    return run.plans_of(module)


PARTS = {
    "pool": dict,
    "gate": lambda: {"se": Gate(32)},
    "silu": lambda: {"act1": nn.SiLU(), "act2": nn.SiLU()},
    "no-projection-norm": lambda: {"downsample": nn.Conv2d(16, 32, 1, 2)},
    "group-norm": lambda: {"bn2": nn.GroupNorm(4, 32)},
    "blur": lambda: {"aa": nn.AvgPool2d(3, 1, 1), "se": Gate(32)},
    "shortcut-relu": lambda: {
        "downsample": nn.Sequential(nn.Conv2d(16, 32, 1, 2), nn.BatchNorm2d(32), nn.ReLU())
    },
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parts_agree_and_stay_live(parts, mode):
    plain = block(**PARTS[parts]())
    optimized = resnet_fast.optimize(plain, strict=True)
    x = image(2, 16, 12, 12)
    with mode():
        for _ in range(3):
            before = agree(optimized, plain, x)
        (plan,) = kept(optimized)
        only_ops = all(step.kind == "conv" for step in plan.steps)
        assert only_ops == (parts == "shortcut-relu")
        for model in (plain, optimized):
            model.conv2.weight.data *= 1.5
            model.bn1.running_mean += 0.5
        assert not torch.equal(agree(optimized, plain, x), before)


CHANGES = {
    "hook on what is called": lambda b: b.se.register_forward_hook(lambda *_: _[2] * 2),
    "hook inside what is called": lambda b: b.se.fc.register_forward_hook(lambda *_: _[2] * 2),
    "hook on what is not": lambda b: b.bn1.register_forward_hook(lambda *_: _[2] * 2),
    "another gate": lambda b: setattr(b, "se", nn.Tanh()),
    "no gate": lambda b: setattr(b, "se", None),
    "a part that was missing": lambda b: setattr(b, "drop_path", nn.Tanh()),
    "a pool's divisor": lambda b: setattr(b.downsample[0], "divisor_override", 2),
    "another activation": lambda b: setattr(b, "act2", nn.Tanh()),
    "training": lambda b: b.bn2.train(),
    "a bias": lambda b: setattr(b.conv2, "bias", nn.Parameter(torch.ones(32))),
}


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_has_its_effect(change, warm):
    plain = block(se=Gate(32))
    optimized = resnet_fast.optimize(plain, strict=True)
    x = image(2, 16, 12, 12)
    before = plain(x)
    for _ in range(2 * warm):
        agree(optimized, plain, x)
    for model in (plain, optimized):
        torch.manual_seed(3)
        CHANGES[change](model)
    for _ in range(2):
        assert (agree(optimized, plain, x) - before).abs().max() > 0.01


@pytest.mark.parametrize("parts", ["pool", "gate"])
def test_a_gradient_runs_the_plain_block(parts):
    plain = block(**PARTS[parts]())
    optimized = resnet_fast.optimize(plain)
    x = image(2, 16, 12, 12)
    with torch.no_grad():
        optimized(x)
    for model in (plain, optimized):
        model(x).square().sum().backward()
    for mine, theirs in zip(optimized.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    assert "gradient" in next(iter(resnet_fast.report(optimized))).reason


def test_a_gate_that_alone_is_trained_gets_its_gradient():
    plain = block(se=Gate(32)).requires_grad_(False)
    plain.se.requires_grad_(True)
    optimized = resnet_fast.optimize(plain)
    for model in (plain, optimized):
        model(image(2, 16, 12, 12)).sum().backward()
    torch.testing.assert_close(optimized.se.fc.weight.grad, plain.se.fc.weight.grad)


@pytest.mark.parametrize("parts", ["pool", "gate"])
@torch.no_grad()
def test_through_the_dispatcher(parts):
    """Compiled as one graph, and under autocast."""
    plain = block(**PARTS[parts]())
    optimized = resnet_fast.optimize(plain)
    x = image(2, 16, 12, 12)
    torch._dynamo.reset()
    compiled = torch.compile(optimized, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        y, eager = optimized(x), plain(x)
    assert y.dtype == eager.dtype
    assert_within(y, eager, copy.deepcopy(plain).double()(x.double()), K_GEMM)


@torch.inference_mode()
def test_what_a_pool_is_beside_is_bounded():
    """With average pools only, the bound that lets oneDNN's ReLU be used goes through."""
    bounded = {}
    for parts in ("pool", "gate"):
        optimized = resnet_fast.optimize(block(**PARTS[parts]()))
        optimized(image(2, 16, 12, 12))
        bounded[parts] = [plan.bounded for plan in kept(optimized)]
    assert bounded == {"pool": [True], "gate": [False]}


@torch.inference_mode()
def test_nan_and_infinity_pass():
    plain = block()
    optimized = resnet_fast.optimize(plain)
    x = image(2, 16, 12, 12)
    for _ in range(2):
        optimized(x)
    x[0, 0, 3, 3], x[1, 2, 8, 8] = torch.nan, torch.inf
    for _ in range(2):
        assert torch.equal(optimized(x).isnan(), plain(x).isnan())


# ---- a convolution's bias


def biased(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1)
    model = randomize(nn.Sequential(*layers, nn.BatchNorm2d(16)))
    for conv in (model[0], model[3]):
        conv.bias.data.normal_(0, 2, generator=torch.Generator().manual_seed(4))
    return model.eval().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "write",
    [
        lambda m: m[0].bias.data.add_(1),
        lambda m: m[0].bias.data.__setitem__(3, 9.0),
        lambda m: m[0].bias.detach().view(-1)[5:6].fill_(-7.0),
        lambda m: setattr(m[3], "bias", nn.Parameter(m[3].bias.detach() + 1)),
        lambda m: setattr(m[3].bias, "data", m[3].bias.data + 1),
        lambda m: setattr(m[3], "bias", None),
        lambda m: m[1].running_mean.add_(1),
    ],
)
def test_a_bias_is_live(write, dtype):
    plain = biased(dtype)
    optimized = resnet_fast.optimize(plain, strict=True)
    x = image(2, 8, 9, 9).to(dtype)
    with torch.inference_mode():
        optimized(x)
    with torch.no_grad():  # what was made in inference mode must serve here as well
        for _ in range(2):
            before = agree(optimized, plain, x)
        for model in (plain, optimized):
            write(model)
        for _ in range(2):
            assert not torch.equal(agree(optimized, plain, x), before)


@torch.no_grad()
def test_a_bias_is_live_in_a_compiled_model():
    plain = biased(torch.float32)
    optimized = resnet_fast.optimize(plain)
    torch._dynamo.reset()
    compiled = torch.compile(optimized, backend="aot_eager", fullgraph=True)
    x = image(2, 8, 9, 9)
    for _ in range(2):
        agree(compiled, plain, x)
        for model in (plain, optimized):
            model[0].bias += 1.0


def test_a_bias_that_is_trained_gets_its_gradient():
    plain = biased(torch.float32).requires_grad_(False)
    plain[0].bias.requires_grad_(True)
    optimized = resnet_fast.optimize(plain)
    for model in (plain, optimized):
        model(image(2, 8, 9, 9)).sum().backward()
    torch.testing.assert_close(optimized[0].bias.grad, plain[0].bias.grad)
