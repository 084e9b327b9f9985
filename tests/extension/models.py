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
from resnet_fast import agreement, ops
from resnet_fast.dispatch import table

INPUTS = {
    "planes": ((2, 3, 40, 40), lambda x: x),
    "grown": ((3, 3, 40, 40), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "odd": ((1, 3, 37, 51), lambda x: x),
    "none": ((0, 3, 40, 40), lambda x: x),
    "slice": ((2, 3, 48, 56), lambda x: x[:, :, 3:38, 5:38]),
}


class Launcher:
    """In place of an op's private one: its own checks, then the op's reference."""

    def __init__(self, op: ops.Op, calls: Counter) -> None:
        self.op, self.calls = op, calls
        self.checks = getattr(torch.ops.resnet_fast, f"_{op.name}_cuda").default
        self.names = [argument.name for argument in self.checks._schema.arguments]
        self.default = self

    def __call__(self, *arguments) -> None:
        with pytest.raises(ValueError, match=r": (x|h) must be on a CUDA device, got .* on cpu;"):
            self.checks(*arguments)
        self.calls[self.op.name] += 1
        given = dict(zip(self.names, arguments, strict=True))
        given["activation"] = "relu" if given.get("relu", True) else "none"
        call = self.op.Call(**{name: given[name] for name in self.op.Call._fields if name in given})
        given["out"].copy_(self.op.reference(call))


def pretend(patch: pytest.MonkeyPatch) -> Counter:
    """CPU tensors take the ways of a GPU's; what was launched is counted."""
    calls: Counter = Counter()
    for op in ops.OPS.values():
        patch.setattr(torch.ops.resnet_fast, f"_{op.name}_cuda", Launcher(op, calls))
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
