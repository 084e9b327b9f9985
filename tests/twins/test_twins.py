# SPDX-License-Identifier: Apache-2.0
"""A fused model and a twin that was never optimised, through the same random life.

Hypothesis draws a model, what is done to it and how it is called; after each call both must agree
by the rule of `resnet_fast/agreement`, or both must raise. What fails is shrunk to a few steps.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
import torchvision.models.resnet as reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import resnet_fast
import resnet_fast.models.resnet as ours
from resnet_fast import agreement
from resnet_fast.kernels import packed
from tests.nn.conftest import build, randomize
from tests.twins.changes import CHANGES, UNCOUNTED

K_GEMM = 512 * 9


@dataclass(frozen=True)
class Step:
    """A change, and the call after it; None for no change, or for no call."""

    change: str | None
    seed: int
    call: tuple | None  # mode, batch, size, layout


# ---- the models, each a function to a (fused, plain) pair


@functools.cache
def built(module, block: str) -> nn.Module:
    return build(module, block, (2, 1))


@functools.cache
def grouped() -> nn.Module:
    torch.manual_seed(0)
    dilated = [False, True, True]
    kind = reference.Bottleneck
    model = reference.ResNet(kind, [1, 1, 1, 1], 10, False, 4, 16, dilated)
    return randomize(model).eval().to(memory_format=torch.channels_last)


def own(block: str):
    return lambda: (copy.deepcopy(built(ours, block)), copy.deepcopy(built(reference, block)))


def optimized(make, name: str = ""):
    """torchvision's, or a block or a stage of it alone."""

    def pair():
        plain = copy.deepcopy(make()).get_submodule(name)
        return resnet_fast.optimize(plain, strict=True), plain

    return pair


basic, bottleneck = (functools.partial(built, reference, b) for b in ("BasicBlock", "Bottleneck"))

MODELS = {
    "ours-basic": own("BasicBlock"),
    "ours-bottleneck": own("Bottleneck"),
    "optimized-basic": optimized(basic),
    "optimized-bottleneck": optimized(bottleneck),
    "optimized-grouped": optimized(grouped),
    "block": optimized(basic, "layer2.0"),
    "stage": optimized(basic, "layer1"),
}

CALLS = st.tuples(
    st.sampled_from(["no_grad", "inference", "grad", "functional", "autocast", "disabled"]),
    st.integers(1, 3),
    st.sampled_from([(32, 32), (40, 33), (64, 48)]),
    st.sampled_from(["nchw", "nhwc", "strided"]),
)
STEPS = st.builds(
    Step, st.sampled_from([None, *CHANGES]), st.integers(0, 20), st.one_of(CALLS, CALLS, st.none())
)
LIVES = st.lists(STEPS, min_size=2, max_size=12)


# ---- both at once


def channels_in(model: nn.Module) -> int:
    return next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))


def image(model: nn.Module, seed: int, batch: int, size: tuple, layout: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels_in(model), *size, generator=generator)
    x = x.to(next(model.parameters()).dtype)
    if layout == "nhwc":
        return x.contiguous(memory_format=torch.channels_last)
    return x.repeat_interleave(2, 3)[..., ::2] if layout == "strided" else x


def run(model: nn.Module, mode: str, x: torch.Tensor) -> torch.Tensor | Exception:
    """What the model answers, or the error that it raises."""
    try:
        if mode == "grad":
            with torch.enable_grad():
                return model(x).detach()
        if mode == "inference":
            with torch.inference_mode():
                return model(x).clone()
        if mode == "disabled":
            with resnet_fast.disabled():
                return model(x)
        if mode == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)
        if mode == "functional":
            other = {name: p * 1.1 for name, p in model.named_parameters()}
            return torch.func.functional_call(model, other, x)
        return model(x)
    except Exception as error:
        return error


def exact(plain: nn.Module, mode: str, x: torch.Tensor) -> torch.Tensor:
    """The twin's answer in float64."""
    for module in plain.modules():  # a pruned weight that was made with a gradient is not copied
        if hasattr(module, "weight_mask"):
            module.weight = module.weight.detach()
    double = copy.deepcopy(plain).double()
    return run(double, "no_grad" if mode in ("grad", "autocast") else mode, x.double())


def agree(fused: nn.Module, plain: nn.Module, mode: str, x: torch.Tensor) -> None:
    """Both answer alike, or both raise."""
    reference = exact(plain, mode, x)
    trains = any(m.training for m in plain.modules())
    theirs = run(plain, mode, x)
    before = x.clone()
    mine = run(fused, mode, x)
    assert torch.equal(x, before), "the input was written to"
    if isinstance(theirs, Exception):
        assert isinstance(mine, Exception), f"answers where torch raises {theirs!r}"
        return
    assert not isinstance(mine, Exception), f"raises {mine!r} where torch answers"
    assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
    if trains:
        same_state(fused, plain)
    if not theirs.isfinite().all() or isinstance(reference, Exception):
        return  # an overflow of the dtype is no value to be near to
    error = agreement.error(theirs, reference)
    if not trains:  # another order of summation, eager too
        other = run(plain, mode, x.contiguous(memory_format=torch.channels_last))
        error = max(error, agreement.error(other, reference))
    limit = agreement.bound(error, mine.dtype, K_GEMM)
    assert agreement.error(mine, reference) <= limit


def same_state(fused: nn.Module, plain: nn.Module) -> None:
    """Training wrote the same, but for rounding, which is not to add up from step to step."""
    states = fused.state_dict(), plain.state_dict()
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        theirs = states[1][name]
        torch.testing.assert_close(value, theirs, msg=name, equal_nan=True)
        if not torch.equal(value, theirs):
            value.copy_(theirs)


def changed(model: nn.Module, step: Step) -> tuple[nn.Module, Exception | None]:
    """The model after a step's change, or with the error that it raises."""
    try:
        after = CHANGES[step.change](model, torch.Generator().manual_seed(step.seed))
        return model if after is None else after, None
    except Exception as error:
        return model, error


def serve_pixels(fused: nn.Module, plain: nn.Module) -> None:
    """Calls in which every convolution makes `PIXELS_PER_SUM` output pixels: all writes are seen.

    The last stage of these models makes one in 64 of the image.
    """
    x = image(plain, 0, 4, (128, 128), "nhwc")
    for _ in range(packed.PIXELS_PER_SUM // (x[:, 0].numel() // 64)):
        run(fused, "no_grad", x)


@torch.no_grad()
def live(model: str, steps: list[Step], see=lambda fused, _: resnet_fast.refresh(fused)) -> None:
    """One life: a model, warm from two calls, and its twin go through the steps.

    `see` is called after writes that PyTorch does not count.
    """
    fused, plain = MODELS[model]()
    for _ in range(2):
        agree(fused, plain, "no_grad", image(plain, 0, 2, (32, 32), "nchw"))
    for step in steps:
        if step.change is not None:
            torch.manual_seed(step.seed)
            fused, mine = changed(fused, step)
            torch.manual_seed(step.seed)
            plain, theirs = changed(plain, step)
            assert (mine is None) == (theirs is None), f"{step}: {mine!r}, torch's {theirs!r}"
            if step.change == "optimizer_step" and mine is None:
                same_state(fused, plain)
            if CHANGES[step.change] in UNCOUNTED:
                see(fused, plain)
        if step.call is not None:
            mode, *rest = step.call
            agree(fused, plain, mode, image(plain, step.seed, *rest))


UNTIMED = settings(
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@settings(UNTIMED, max_examples=20, derandomize=True)
@given(st.sampled_from(sorted(MODELS)), LIVES)
def test_a_twin_that_was_never_optimized(model, steps):
    live(model, steps)


@pytest.mark.slow
@settings(UNTIMED, max_examples=1000)
@given(st.sampled_from(sorted(MODELS)), LIVES)
def test_a_thousand_twins(model, steps):
    live(model, steps)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("model", ["ours-bottleneck", "optimized-basic"])
def test_each_change_alone(model, change):
    """Between two calls of each kind, so that none is left to chance."""
    calls = [(mode, 2, (32, 32), "nchw") for mode in ("no_grad", "inference", "grad")]
    steps = [Step(change, 3, calls[0]), *(Step(None, 3, call) for call in calls)]
    live(model, steps, see=serve_pixels)


@pytest.mark.parametrize("what", ["conv1.weight", "bn1.running_mean", "bn2.weight"])
@pytest.mark.parametrize("model", ["ours-bottleneck", "optimized-basic"])
@torch.no_grad()
def test_a_storage_that_is_freed_and_comes_back(model, what):
    """As sharded training has it. It is no change above: torch itself cannot copy such a model."""
    fused, plain = MODELS[model]()
    x = image(plain, 0, 2, (32, 32), "nchw")
    for _ in range(2):
        agree(fused, plain, "no_grad", x)
    name, _, attribute = f"layer2.0.{what}".rpartition(".")
    tensors = [getattr(m.get_submodule(name), attribute) for m in (fused, plain)]
    values = tensors[0] * 1.5
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)
    for mode in ("no_grad", "inference", "grad"):
        answers = [run(m, mode, x) for m in (fused, plain)]
        assert all(isinstance(answer, RuntimeError) for answer in answers), answers
    for tensor in tensors:
        tensor.untyped_storage().resize_(values.nbytes)
        tensor.data.copy_(values)
    agree(fused, plain, "no_grad", x)
