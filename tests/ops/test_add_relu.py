# SPDX-License-Identifier: Apache-2.0
"""add_relu beside torch: values, layouts, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from resnet_fast.ops import ArgumentError, add_relu
from tests.support.tolerance import assert_within

CHANNELS_LAST = torch.channels_last
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=CHANNELS_LAST)


LAYOUTS = {
    "channels-last": lambda: (channels_last(2, 24, 5, 7), channels_last(2, 24, 5, 7)),
    "contiguous": lambda: (torch.randn(2, 24, 5, 7), torch.randn(2, 24, 5, 7)),
    "different": lambda: (torch.randn(2, 24, 5, 7), channels_last(2, 24, 5, 7)),
    "channel-slices": lambda: (channels_last(2, 40, 5, 7)[:, 3:27], channels_last(2, 24, 5, 7)),
    "equal-channel-slices": lambda: tuple(channels_last(2, 40, 5, 7)[:, 3:27] for _ in "xy"),
    "batch-slices": lambda: tuple(channels_last(4, 24, 5, 7)[1:3] for _ in "xy"),
    "strided": lambda: tuple(channels_last(2, 24, 5, 14)[..., ::2] for _ in "xy"),
    "permuted": lambda: tuple(torch.randn(7, 2, 24, 5).permute(1, 2, 3, 0) for _ in "xy"),
    "expanded": lambda: (torch.randn(1, 24, 1, 1).expand(2, 24, 5, 7), channels_last(2, 24, 5, 7)),
    "both-expanded": lambda: tuple(torch.randn(24, 1, 1).expand(2, 24, 5, 7) for _ in "xy"),
    "empty": lambda: (channels_last(0, 24, 5, 7), channels_last(0, 24, 5, 7)),
    "no-dimension": lambda: (torch.randn(()), torch.randn(())),
    "one-dimension": lambda: (torch.randn(17), torch.randn(17)),
    "five-dimensions": lambda: (torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6)),
    "one-element": lambda: (channels_last(1, 1, 1, 1), channels_last(1, 1, 1, 1)),
}
DENSE = ("channels-last", "contiguous", "different", "batch-slices", "permuted", "five-dimensions")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_layout(layout, dtype):
    torch.manual_seed(0)
    x, y = (tensor.to(dtype) for tensor in LAYOUTS[layout]())
    result = add_relu(x, y)
    assert_within(result, torch.relu(x + y), (x.double() + y.double()).relu(), k_gemm=1)
    assert result.dtype == dtype
    if layout in DENSE:
        assert result.stride() == x.stride()
    assert result.data_ptr() not in (x.data_ptr(), y.data_ptr()) or not x.numel()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    x, y = LAYOUTS[layout]()
    torch.library.opcheck(torch.ops.resnet_fast.add_relu.default, (x, y))


def test_the_arguments_are_left_alone():
    x, y = channels_last(2, 8, 4, 4), channels_last(2, 8, 4, 4)
    before = x.clone(), y.clone()
    add_relu(x, y)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


BAD = {
    "integers": (lambda x: (x.int(), x.int()), "x", "floating", "int32", ".float()"),
    "complex": (lambda x: (x, x.to(torch.complex64)), "y", "floating", "complex64", ".float()"),
    "shape": (lambda x: (x, x[:, :1]), "y", r"\[2, 8, 4, 4\]", r"\[2, 1, 4, 4\]", "expand_as"),
    "rank": (lambda x: (x, x[0]), "y", r"\[2, 8, 4, 4\]", r"\[8, 4, 4\]", "expand_as"),
    "dtype": (lambda x: (x, x.half()), "y", "float32", "float16", r"\.to\(torch\.float32\)"),
    "sparse-x": (lambda x: (x.to_sparse(), x), "x", "dense", "sparse_coo", "to_dense"),
    "sparse-y": (lambda x: (x, x.to_sparse()), "y", "dense", "sparse_coo", "to_dense"),
    "device": (lambda x: (x, x.to("meta")), "y", "cpu", "meta", r"\.to\('cpu'\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_it_refuses_says_so_alike_on_real_and_fake_tensors(name):
    make, argument, expected, got, remedy = BAD[name]
    arguments = make(channels_last(2, 8, 4, 4))
    pattern = (
        rf"^resnet_fast::add_relu: {argument} must be .*{expected}.*, got .*{got}.*; .*{remedy}"
    )
    with pytest.raises(ArgumentError, match=pattern) as real:
        add_relu(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [t if t.is_meta else mode.from_tensor(t) for t in arguments]
        with pytest.raises(ArgumentError) as fake:
            add_relu(*fakes)
    assert str(fake.value) == str(real.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_is_torchs(layout):
    torch.manual_seed(0)
    ours = [tensor.requires_grad_() for tensor in LAYOUTS[layout]()]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    with torch.enable_grad():
        result, expected = add_relu(*ours), torch.relu(theirs[0] + theirs[1])
        result.backward(torch.ones_like(result) * 3)
        expected.backward(torch.ones_like(expected) * 3)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our.grad, their.grad)


def test_gradcheck_to_second_order():
    torch.manual_seed(0)
    x, y = (torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in "xy")
    with torch.enable_grad():
        # away from the kink, where a difference quotient has no meaning
        assert (x + y).abs().min() > 1e-3
        assert torch.autograd.gradcheck(add_relu, (x, y))
        assert torch.autograd.gradgradcheck(add_relu, (x, y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_at_zero_nan_and_infinity_is_torchs(dtype):
    values = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-7, -1e-7, 1.0], dtype=dtype)
    grads = torch.tensor([1.0, 2.0, 3.0, math.nan, math.nan, math.inf, 5.0, 6.0], dtype=dtype)
    results = []
    for function in (add_relu, lambda x, y: torch.relu(x + y)):
        x, y = values.clone().requires_grad_(), torch.zeros_like(values).requires_grad_()
        with torch.enable_grad():
            function(x, y).backward(grads)
        results.append((x.grad, y.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["channels-last", "different", "empty", "no-dimension"])
def test_opcheck_with_a_gradient(layout):
    x, y = (tensor.requires_grad_() for tensor in LAYOUTS[layout]())
    with torch.enable_grad():
        torch.library.opcheck(torch.ops.resnet_fast.add_relu.default, (x, y))
        torch.library.opcheck(torch.ops.resnet_fast._add_relu_backward.default, (x, y.detach()))


def test_only_what_needs_a_gradient_gets_one():
    x, y = channels_last(2, 8, 4, 4).requires_grad_(), channels_last(2, 8, 4, 4)
    with torch.enable_grad():
        result = add_relu(x, y)
        assert result.requires_grad
        result.sum().backward()  # an expanded gradient
    assert torch.equal(x.grad, (result > 0).float()) and y.grad is None
    assert not add_relu(x, y).requires_grad
    with torch.inference_mode():
        assert not add_relu(x, y).requires_grad


def test_a_gradient_of_another_dtype_is_refused():
    x = channels_last(2, 8, 4, 4)
    pattern = r"_add_relu_backward: grad must be of y's dtype float32, got .*float16"
    with pytest.raises(ArgumentError, match=pattern):
        torch.ops.resnet_fast._add_relu_backward(x.half(), x)


def test_it_counts_no_flops():
    with FlopCounterMode(display=False) as counter:
        add_relu(channels_last(2, 8, 4, 4), channels_last(2, 8, 4, 4))
    assert counter.get_total_flops() == 0
