# SPDX-License-Identifier: Apache-2.0
"""What conv_bn_act refuses: the message names op, argument, expected, got and remedy.

Each case runs on real tensors, on fake ones, and through the in-place op where that applies.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from resnet_fast.ops import ArgumentError, conv_bn_act, conv_bn_act_

ONE_FORM = re.compile(r"resnet_fast::conv_bn_act: .+ must be .+, got .+; .+")


def good() -> dict[str, object]:
    """Arguments the op takes: [2, 8, 6, 6] * [12, 8, 3, 3] -> [2, 12, 6, 6]."""
    return {
        "x": torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last),
        "weight": torch.randn(12, 8, 3, 3),
        "scale": torch.ones(12),
        "shift": torch.zeros(12),
        "residual": torch.randn(2, 12, 6, 6).contiguous(memory_format=torch.channels_last),
        "padding": 1,
        "mean": torch.zeros(12),
        "var": torch.ones(12),
    }


def without_residual(**changes):
    return {"residual": None, **changes}


# id -> changed arguments; argument named; in "expected"; in "got"; in the remedy
BAD = {
    "x-3d": ({"x": torch.randn(8, 6, 6)}, "x", "4-D", "[8, 6, 6]", "dimension"),
    "x-5d": ({"x": torch.randn(2, 8, 1, 6, 6)}, "x", "4-D", "[2, 8, 1, 6, 6]", "dimension"),
    "x-0d": ({"x": torch.randn(())}, "x", "4-D", "[]", "dimension"),
    "weight-3d": ({"weight": torch.randn(12, 8, 3)}, "weight", "[K, C", "[12, 8, 3]", "dimension"),
    "residual-2d": ({"residual": torch.randn(2, 12)}, "residual", "4-D", "[2, 12]", "dimension"),
    "x-integer": ({"x": torch.ones(2, 8, 6, 6).int()}, "x", "float32", "int32", ".float()"),
    "x-complex": ({"x": torch.ones(2, 8, 6, 6) + 0j}, "x", "float32", "complex64", ".float()"),
    "x-float8": (
        {"x": torch.ones(2, 8, 6, 6).to(torch.float8_e4m3fn)}, "x", "float32", "float8", ".float()",
    ),
    "weight-half": (
        {"weight": torch.randn(12, 8, 3, 3).half()},
        "weight", "float32", "float16", "call .to(torch.float32)",
    ),
    "weight-float32-beside-bf16": (
        {"x": torch.randn(2, 8, 6, 6).bfloat16()},
        "weight", "bfloat16", "float32", "call .to(torch.bfloat16)",
    ),
    "residual-half": (
        {"residual": torch.randn(2, 12, 6, 6).half()},
        "residual", "float32", "float16", "call .to(torch.float32)",
    ),
    "channels": (
        {"x": torch.randn(2, 9, 6, 6)},
        "weight", "C / groups = 9 / 1", "[12, 8, 3, 3]", "8 channels",
    ),
    "sparse-x": ({"x": torch.randn(2, 8, 6, 6).to_sparse()}, "x", "dense", "sparse", ".to_dense()"),
    "sparse-weight": (
        {"weight": torch.randn(12, 8, 3, 3).to_sparse()},
        "weight", "dense", "sparse", ".to_dense()",
    ),
    "sparse-residual": (
        {"residual": torch.randn(2, 12, 6, 6).to_sparse()},
        "residual", "dense", "sparse", ".to_dense()",
    ),
    "sparse-mean": ({"mean": torch.ones(12).to_sparse()}, "mean", "dense", "sparse", "to_dense"),
    "sparse-scale": ({"scale": torch.ones(12).to_sparse()}, "scale", "dense", "sparse", "to_dense"),
    "device-weight": (
        {"weight": torch.empty(12, 8, 3, 3, device="meta")}, "weight", "cpu", "meta", ".to('cpu')",
    ),
    "device-residual": (
        {"residual": torch.empty(2, 12, 6, 6, device="meta")},
        "residual", "cpu", "meta", ".to('cpu')",
    ),
    "device-shift": (
        {"shift": torch.empty(12, device="meta")}, "shift", "cpu", "meta", ".to('cpu')",
    ),
    "device-var": ({"var": torch.empty(12, device="meta")}, "var", "cpu", "meta", ".to('cpu')"),
    "negative-padding": ({"padding": -1}, "padding", "at least 0", "[-1, -1]", "functional.pad"),
    "padding-on-four-sides": (
        {"padding": (1, 1, 0, 0)}, "padding", "two integers", "[1, 1, 0, 0]", "functional.pad",
    ),
    "padding-of-one": ({"padding": (1,)}, "padding", "two integers", "[1]", "functional.pad"),
    "zero-stride": ({"stride": 0}, "stride", "at least 1", "[0, 0]", "integer"),
    "zero-stride-in-width": ({"stride": (1, 0)}, "stride", "at least 1", "[1, 0]", "integer"),
    "zero-dilation": ({"dilation": 0}, "dilation", "at least 1", "[0, 0]", "integer"),
    "groups-that-do-not-divide": ({"groups": 3}, "groups", "divisor of C = 8", "3", "groups"),
    "zero-groups": ({"groups": 0}, "groups", "divisor", "0", "groups"),
    "negative-groups": ({"groups": -1}, "groups", "divisor", "-1", "groups"),
    "groups-of-another-weight": (
        {"groups": 2}, "weight", "C / groups = 8 / 2", "[12, 8, 3, 3]", "16 channels",
    ),
    "residual-of-another-size": (
        {"residual": torch.randn(2, 12, 5, 6)}, "residual", "[2, 12, 6, 6]", "[2, 12, 5, 6]", "1x1",
    ),
    "residual-of-x": (
        {"residual": torch.randn(2, 8, 6, 6)}, "residual", "[2, 12, 6, 6]", "[2, 8, 6, 6]", "1x1",
    ),
    "residual-to-broadcast": (
        {"residual": torch.randn(1, 12, 6, 6)}, "residual", "[2, 12, 6, 6]", "[1, 12, 6, 6]", "1x1",
    ),
    "no-output": (
        without_residual(x=torch.randn(2, 8, 2, 6), padding=0),
        "x", "dilated 3x3 filter", "leaves no output", "padding",
    ),
    "no-output-for-dilation": (
        without_residual(dilation=4), "x", "dilated 3x3 filter", "leaves no output", "padding",
    ),
    "no-channels": (
        without_residual(x=torch.randn(2, 0, 6, 6), weight=torch.randn(12, 0, 3, 3)),
        "x", "without empty", "[2, 0, 6, 6]", "only N",
    ),
    "no-rows": (
        without_residual(x=torch.randn(2, 8, 0, 6), padding=2),
        "x", "without empty", "[2, 8, 0, 6]", "only N",
    ),
    "no-filter": (
        without_residual(weight=torch.randn(12, 8, 0, 3)),
        "weight", "without empty", "[12, 8, 0, 3]", "only N",
    ),
    "activation": ({"activation": "gelu"}, "activation", "['none', 'relu']", "'gelu'", "'none'"),
    "backend": ({"backend": "cutlass"}, "backend", "'aten'", "'cutlass'", "'auto'"),
    "mean-without-var": ({"var": None}, "mean and var", "both given", "only mean", "running_var"),
    "var-without-mean": ({"mean": None}, "mean and var", "both given", "only var", "running_mean"),
    "scale-too-long": ({"scale": torch.ones(13)}, "scale", "K = 12", "[13]", "each filter"),
    "shift-of-c": ({"shift": torch.ones(8)}, "shift", "K = 12", "[8]", "each filter"),
    "mean-2d": ({"mean": torch.ones(12, 1)}, "mean", "K = 12", "[12, 1]", "each filter"),
    "var-0d": ({"var": torch.ones(())}, "var", "K = 12", "[]", "each filter"),
    "scale-double": ({"scale": torch.ones(12).double()}, "scale", "float32", "float64", ".float()"),
    "shift-half": ({"shift": torch.ones(12).half()}, "shift", "float32", "float16", ".float()"),
    "var-integer": ({"var": torch.ones(12).long()}, "var", "float32", "int64", ".float()"),
}  # fmt: skip


@pytest.fixture(params=BAD)
def bad(request):
    """A complete set of arguments of which one is bad, and what its message must hold."""
    changes, *message = BAD[request.param]
    return good() | changes, message


def message_of(function, arguments: dict[str, object]) -> str:
    with pytest.raises(ArgumentError) as caught:
        function(**arguments)
    return str(caught.value)


def test_the_arguments_that_the_bad_ones_start_from_are_good():
    assert conv_bn_act(**good()).shape == (2, 12, 6, 6)


def test_message_has_one_form_and_names_everything(bad):
    arguments, (argument, expected, got, remedy) = bad
    message = message_of(conv_bn_act, arguments)
    assert ONE_FORM.fullmatch(message), message
    named, rest = message.removeprefix("resnet_fast::conv_bn_act: ").split(" must be ", 1)
    what_expected, rest = rest.split(", got ", 1)
    what_got, what_to_do = rest.rsplit("; ", 1)
    assert named == argument
    assert expected in what_expected
    assert got in what_got
    assert remedy in what_to_do


def test_fake_tensors_get_the_same_message(bad):
    arguments, _ = bad
    real = message_of(conv_bn_act, arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {
            name: mode.from_tensor(value)
            if isinstance(value, Tensor) and not value.is_meta
            else value
            for name, value in arguments.items()
        }
        assert message_of(conv_bn_act, fakes) == real


def test_inplace_gets_the_same_message(bad):
    arguments, _ = bad
    if arguments["residual"] is None:
        arguments = arguments | {"residual": torch.randn(2, 12, 6, 6)}
    before = arguments["residual"].clone() if not arguments["residual"].is_meta else None
    assert message_of(conv_bn_act_, arguments) == message_of(conv_bn_act, arguments)
    if before is not None and not before.is_sparse:
        assert torch.equal(arguments["residual"], before)


def test_the_error_is_a_value_error():
    assert issubclass(ArgumentError, ValueError)


def test_a_bad_call_after_a_good_one_is_still_refused():
    """Plans are kept between calls: the kept plan must not let a bad argument through."""
    conv_bn_act(**good())
    for changes, *_ in BAD.values():
        message_of(conv_bn_act, good() | changes)


def test_a_backend_that_cannot_take_the_problem_raises_with_its_reason():
    arguments = good() | {"backend": "cpu", "x": torch.randn(2, 8, 6, 6)}
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot take .*: x is contiguous, not"):
        conv_bn_act(**arguments)
