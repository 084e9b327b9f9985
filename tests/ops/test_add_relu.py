# SPDX-License-Identifier: Apache-2.0
"""add_relu beside torch: values, layouts, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from resnet_fast.ops import ArgumentError, add_relu
from resnet_fast.testing.tolerance import assert_within

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


@pytest.mark.parametrize("index", [0, 1])
def test_a_needed_gradient_is_an_error(index):
    tensors = [channels_last(2, 8, 4, 4) for _ in "xy"]
    tensors[index].requires_grad_()
    with (
        torch.enable_grad(),
        pytest.raises(RuntimeError, match=r"add_relu has no gradient.*no_grad"),
    ):
        add_relu(*tensors)
    assert not add_relu(*tensors).requires_grad
    with torch.inference_mode():
        add_relu(*tensors)


def test_it_counts_no_flops():
    with FlopCounterMode(display=False) as counter:
        add_relu(channels_last(2, 8, 4, 4), channels_last(2, 8, 4, 4))
    assert counter.get_total_flops() == 0
