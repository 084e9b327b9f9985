# SPDX-License-Identifier: Apache-2.0
"""Whole models through the backend `cuda`, on CPU tensors where the extension is loaded.

Each call goes to the C++ launcher, whose checks it must pass but for the last, that a GPU is there;
what would be launched is then computed by torch. So the way from a model to a launch is walked to
its end: arguments, layouts, addresses, memory that is written over, splits, empty batches.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

import resnet_fast
from resnet_fast import agreement
from resnet_fast.dispatch import aten as backend
from resnet_fast.dispatch import table
from resnet_fast.kernels import aten

INPUTS = {
    "planes": ((2, 3, 40, 40), lambda x: x),
    "grown": ((3, 3, 40, 40), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "odd": ((1, 3, 37, 51), lambda x: x),
    "none": ((0, 3, 40, 40), lambda x: x),
    "slice": ((2, 3, 48, 56), lambda x: x[:, :, 3:38, 5:38]),
}


def conv_bn_act(
    x, weight, scale, shift, mean, var, eps, residual, stride, padding, dilation, relu,
    tile, split_k, workspace, out,
) -> None:  # fmt: skip
    geometry = (stride, padding, dilation, 1, "relu" if relu else "none")
    out.copy_(aten.conv_bn_act(x, weight, scale, shift, residual, *geometry, mean, var, eps))


def conv_bn_join(
    h, weight, scale, shift, mean, var, eps,
    x, proj_weight, proj_scale, proj_shift, proj_mean, proj_var, proj_eps, stride, tile, out,
) -> None:  # fmt: skip
    geometry = (stride, (0, 0), (1, 1), 1, "none")
    vectors = (proj_scale, proj_shift, None, *geometry, proj_mean, proj_var, proj_eps)
    shortcut = aten.conv_bn_act(x, proj_weight, *vectors)
    geometry = ((1, 1), [size // 2 for size in weight.shape[2:]], (1, 1), 1, "relu")
    out.copy_(aten.conv_bn_act(h, weight, scale, shift, shortcut, *geometry, mean, var, eps))


def stem_pool(*arguments) -> None:
    *operands, _, out = arguments
    out.copy_(backend.stem_pool(*operands))


class Launcher:
    """In place of a private op: its own checks, then torch."""

    def __init__(self, compute, calls: Counter) -> None:
        self.name, self.compute, self.calls = compute.__name__, compute, calls
        self.checks = getattr(torch.ops.resnet_fast, f"_{self.name}_cuda").default
        self.default = self

    def __call__(self, *arguments) -> None:
        with pytest.raises(ValueError, match=r": (x|h) must be on a CUDA device, got .* on cpu;"):
            self.checks(*arguments)
        self.calls[self.name] += 1
        self.compute(*arguments)


def pretend(patch: pytest.MonkeyPatch) -> Counter:
    """CPU tensors take the ways of a GPU's; what was launched is counted."""
    calls: Counter = Counter()
    for compute in (conv_bn_act, conv_bn_join, stem_pool):
        launcher = Launcher(compute, calls)
        patch.setattr(torch.ops.resnet_fast, f"_{compute.__name__}_cuda", launcher)

    rows = (
        replace(row, device="cpu", missing=lambda arch: None) if row.backend == "cuda" else row
        for row in table.ROWS
    )
    patch.setattr(table, "ROWS", tuple(rows))
    return calls


def network(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """A small head, and norms that are no identities."""
    torch.manual_seed(0)
    model = resnet_fast.models.get_model(name, num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(-1, 1)
    return model.to(dtype).to(memory_format=torch.channels_last)


def run(name: str, dtype: str) -> dict[str, dict[str, int]]:
    """By the name of an input: what one call launches; the first and the kept one alike."""
    launched = {}
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        calls = pretend(patch)
        model = network(name, getattr(torch, dtype))
        exact = network(name, torch.float64)
        exact.load_state_dict(model.state_dict())
        for label, (shape, layout) in INPUTS.items():
            x = layout(torch.randn(shape).to(getattr(torch, dtype)))
            given = x.clone()
            calls.clear()
            first = model(x)
            launched[label] = dict(calls)
            assert torch.equal(model(x), first) and torch.equal(x, given)
            assert calls == {op: 2 * count for op, count in launched[label].items()}
            with resnet_fast.disabled():
                eager, reference = model(x), exact(x.double())
            if x.numel():
                assert agreement.compare(first, eager, reference).agrees
            assert first.shape == reference.shape
    return launched
