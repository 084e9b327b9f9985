# SPDX-License-Identifier: Apache-2.0
"""conv_bn_join beside float64, what it refuses, and how torch's modes see it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from resnet_fast.ops import CONV_BN_JOIN, ArgumentError, JoinCall, conv_bn_join
from resnet_fast.ops.conv_bn_join import reference
from resnet_fast.spec import JoinSpec
from tests.support import join_cases
from tests.support.here import cpu_backend
from tests.support.tolerance import assert_within

DTYPES = ("float32", "bfloat16", "float16", "float64")
PLAIN = join_cases.join(2, 5, 4, 16, 24, 32, stride=(2, 2), odd=(1, 0), dtype="float32")
NETWORKS = {
    f"resnet{depth}-{name}": spec
    for depth in (18, 50)
    for name, spec in join_cases.resnet_joins(depth, n=2, size=32).items()
}


def of(spec: JoinSpec, dtype: str) -> JoinSpec:
    precision = "ieee"  # of a CPU
    return JoinSpec(
        replace(spec.main, dtype=dtype, precision=precision),
        replace(spec.projection, dtype=dtype, precision=precision),
    )


def call_of(tensors: join_cases.JoinTensors, **changes) -> JoinCall:
    h, weight, scale, shift, mean, var, eps, x, *projection = tensors.arguments()[:-1]
    proj_weight, proj_scale, proj_shift, proj_mean, proj_var, proj_eps = projection
    call = JoinCall(
        h, weight, scale, shift, x, proj_weight, proj_scale, proj_shift,
        tensors.spec.projection.stride, mean, var, eps, proj_mean, proj_var, proj_eps,
    )  # fmt: skip
    return call._replace(**changes)


def assert_right(y, tensors, label="") -> None:
    assert y.dtype == tensors.main.x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_within(y, tensors.eager(), tensors.reference(), tensors.k_gemm, label)


@pytest.fixture
def call():
    return call_of(join_cases.join_tensors(PLAIN))


# ---- results


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, dtype):
    tensors = join_cases.join_tensors(of(NETWORKS[name], dtype))
    assert_right(CONV_BN_JOIN.overload(*call_of(tensors)), tensors)
    assert CONV_BN_JOIN.last_plan().backend == cpu_backend(dtype)


@pytest.mark.parametrize("backend", ["auto", "aten"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", join_cases.ODD)
def test_odd(name, dtype, backend):
    params = torch.float64 if dtype == "float64" else torch.float32
    tensors = join_cases.join_tensors(of(join_cases.ODD[name], dtype), params=params)
    assert_right(CONV_BN_JOIN.overload(*call_of(tensors, backend=backend)), tensors)


@pytest.mark.parametrize("backend", ["auto", "aten"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", join_cases.FACTORS)
def test_scales(name, dtype, backend):
    factors = join_cases.FACTORS[name]
    tensors = join_cases.join_tensors(of(PLAIN, dtype), factors=factors)
    assert_right(CONV_BN_JOIN.overload(*call_of(tensors, backend=backend)), tensors)


def test_a_scale_of_zero_leaves_the_other_convolution_alone(call):
    y = CONV_BN_JOIN.overload(
        *call._replace(proj_scale=torch.zeros(32), proj_shift=torch.zeros(32))
    )
    alone = CONV_BN_JOIN.overload(
        *call._replace(proj_weight=call.proj_weight * 0, proj_shift=torch.zeros(32), proj_mean=None,
                       proj_var=None)
    )  # fmt: skip
    assert torch.equal(y, alone) and y.any()


@pytest.mark.parametrize("name", ["h", "x"])
@pytest.mark.parametrize("sliced", [False, True], ids=["contiguous", "sliced"])
def test_layouts(name, sliced):
    tensors = join_cases.join_tensors(of(PLAIN, "float32"))
    call = call_of(tensors)
    change = (
        (lambda t: F.pad(t, (1, 2, 0, 1))[..., :-1, 1:-2]) if sliced else torch.Tensor.contiguous
    )
    assert_right(
        CONV_BN_JOIN.overload(*call._replace(**{name: change(getattr(call, name))})), tensors
    )


def test_nan_reaches_what_it_reaches_in_torch(call):
    call.h[0, 1, 2, 2] = call.x[1, 3, 0, 0] = torch.nan
    y = CONV_BN_JOIN.overload(*call)
    where = torch.zeros(2, 1, 5, 4, dtype=torch.bool)
    where[0, 0, 2, 2] = where[1, 0, 0, 0] = True
    assert torch.equal(y.isnan(), where.expand_as(y))


def test_the_public_function_has_the_defaults_of_the_schema(call):
    affine = call[:8]
    assert torch.equal(conv_bn_join(*affine, stride=2), CONV_BN_JOIN.overload(*affine, [2, 2]))
    both = {name: getattr(call, name) for name in ("mean", "var", "proj_mean", "proj_var")}
    assert torch.equal(conv_bn_join(*affine, (2, 2), **both), CONV_BN_JOIN.overload(*call))


def test_eps_is_added_to_each_variance():
    tensors = join_cases.join_tensors(of(PLAIN, "float32"))
    tensors.main.eps, tensors.projection.eps = 0.5, 2.0
    assert_right(CONV_BN_JOIN.overload(*call_of(tensors)), tensors)


def test_an_empty_batch_gives_an_empty_result(call):
    y = CONV_BN_JOIN.overload(*call._replace(h=call.h[:0], x=call.x[:0]))
    assert y.shape == (0, 32, 5, 4)


def test_the_arguments_are_left_alone(call):
    tensors = [t for t in call if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors]
    first = CONV_BN_JOIN.overload(*call)
    kept = first.clone()
    CONV_BN_JOIN.overload(*call._replace(x=call.x + 1))
    assert all(map(torch.equal, tensors, before)) and torch.equal(first, kept)


# ---- bad input

ONE_FORM = re.compile(r"resnet_fast::conv_bn_join: .+ must be .+, got .+; .+")
NHWC = torch.channels_last
# id -> changed arguments; argument named; in "expected"; in "got"
BAD = {
    "h-3d": ({"h": torch.randn(16, 5, 4)}, "h", "4-D", "[16, 5, 4]"),
    "x-3d": ({"x": torch.randn(24, 9, 8)}, "x", "4-D", "[24, 9, 8]"),
    "h-integer": ({"h": torch.ones(2, 16, 5, 4).int()}, "h", "floating", "int32"),
    "x-half": ({"x": torch.ones(2, 24, 9, 8).half()}, "proj_weight", "of x's dtype", "float32"),
    "x-and-weight-half": (
        {"x": torch.ones(2, 24, 9, 8).half(), "proj_weight": torch.ones(32, 24, 1, 1).half()},
        "x", "of h's dtype float32", "float16",
    ),
    "h-channels": ({"h": torch.randn(2, 8, 5, 4)}, "weight", "C / groups = 8", "[32, 16, 1, 1]"),
    "x-channels": ({"x": torch.randn(2, 8, 9, 8)}, "proj_weight", "= 8 / 1", "[32, 24, 1, 1]"),
    "weight-even": ({"weight": torch.randn(32, 16, 2, 2)}, "weight", "odd", "[32, 16, 2, 2]"),
    "weight-3d": ({"weight": torch.randn(32, 16, 1)}, "weight", "[K, C", "[32, 16, 1]"),
    "proj-weight-3x3": (
        {"proj_weight": torch.randn(32, 24, 3, 3)}, "proj_weight", "[K, D, 1, 1]", "[32, 24, 3, 3]",
    ),
    "proj-weight-filters": (
        {"proj_weight": torch.randn(16, 24, 1, 1)}, "proj_scale", "K = 16", "[32]",
    ),
    "all-of-projection-narrower": (
        {"proj_weight": torch.randn(16, 24, 1, 1), "proj_scale": torch.ones(16),
         "proj_shift": torch.ones(16), "proj_mean": torch.ones(16), "proj_var": torch.ones(16)},
        "x", "projection has y's shape [2, 32, 5, 4]", "[2, 16, 5, 4]",
    ),
    "map": ({"x": torch.randn(2, 24, 11, 8)}, "x", "y's shape [2, 32, 5, 4]", "[2, 32, 6, 4]"),
    "stride": ({"stride": (1, 2)}, "x", "y's shape [2, 32, 5, 4]", "[2, 32, 9, 4]"),
    "stride-zero": ({"stride": (0, 2)}, "stride", "at least 1", "[0, 2]"),
    "batch": ({"x": torch.randn(1, 24, 9, 8)}, "x", "y's shape [2, 32", "[1, 32, 5, 4]"),
    "scale": ({"scale": torch.ones(31)}, "scale", "K = 32", "[31]"),
    "proj-shift-half": ({"proj_shift": torch.ones(32).half()}, "proj_shift", "float32", "float16"),
    "proj-mean-only": ({"proj_var": None}, "proj_mean and proj_var", "both", "only proj_mean"),
    "var-only": ({"mean": None}, "mean and var", "both", "only var"),
    "backend": ({"backend": "tpu"}, "backend", "one of ['auto', 'cuda', 'triton'", "'tpu'"),
    "sparse": ({"x": torch.ones(2, 24, 9, 8).to_sparse()}, "x", "dense", "sparse_coo"),
}  # fmt: skip


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name, fake, call):
    changes, argument, expected, got = BAD[name]
    if fake and name == "sparse":
        pytest.skip("a fake tensor cannot be sparse")
    bad = call._replace(**changes)
    with pytest.raises(ArgumentError) as caught:
        if fake:
            with FakeTensorMode() as mode:
                fakes = (mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in bad)
                CONV_BN_JOIN.overload(*fakes)
        else:
            CONV_BN_JOIN.overload(*bad)
    text = str(caught.value)
    assert ONE_FORM.fullmatch(text), text
    assert f": {argument} must be" in text, text
    assert expected in text.partition(", got ")[0] and got in text.partition(", got ")[2], text


def test_another_device_is_named(call):
    meta = {n: getattr(call, n).to("meta") for n in ("x", "proj_weight", "proj_scale", "proj_shift",
                                                     "proj_mean", "proj_var")}  # fmt: skip
    with pytest.raises((ArgumentError, NotImplementedError), match=r"device|on meta"):
        CONV_BN_JOIN.overload(*call._replace(**meta))


# ---- torch's modes


@pytest.mark.parametrize("name", ["h", "weight", "scale", "x", "proj_weight", "proj_shift"])
def test_a_gradient_is_that_of_torchs_own_functions(name, call):
    call = call._replace(**{name: getattr(call, name).detach().requires_grad_()})
    wanted = getattr(call, name)
    with torch.enable_grad():
        (ours,) = torch.autograd.grad(CONV_BN_JOIN.overload(*call).sum(), wanted)
        (theirs,) = torch.autograd.grad(reference(call).sum(), wanted)
    assert torch.equal(ours, theirs)
    with torch.inference_mode():
        CONV_BN_JOIN.overload(*call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_maps(dtype):
    tensors = join_cases.join_tensors(of(PLAIN, "float32"))
    with torch.autocast("cpu", dtype):
        y = CONV_BN_JOIN.overload(*call_of(tensors))
    for part in (tensors.main, tensors.projection):
        part.x, part.weight = part.x.to(dtype), part.weight.to(dtype)
    assert y.dtype == dtype
    assert_right(y, tensors)


def test_autocast_does_not_round_the_vectors():
    """The difference from one is all that is left of the sum, if it was not rounded away."""
    one, beside = torch.ones(1, 1, 1, 1), torch.tensor([1 + 2.0**-12])
    small = torch.tensor([2.0**-11])
    with torch.autocast("cpu", torch.bfloat16):
        y = conv_bn_join(one, one, torch.zeros(1), small, one, one, torch.ones(1), -beside)
    assert y.item() == 2.0**-12


def test_autocast_leaves_float64_alone():
    tensors = join_cases.join_tensors(of(PLAIN, "float64"), params=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert_right(CONV_BN_JOIN.overload(*call_of(tensors)), tensors)


def test_flops_are_those_of_both_convolutions(call):
    with FlopCounterMode(display=False) as counter:
        CONV_BN_JOIN.overload(*call)
    assert counter.get_total_flops() == PLAIN.flops == 2 * 2 * 20 * 32 * (16 + 24)


@pytest.mark.parametrize("name", ["odd-map", "3x3", "affine", "k-1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_opcheck(name, dtype):
    call = call_of(join_cases.join_tensors(of(join_cases.ODD[name], dtype)))
    torch.library.opcheck(CONV_BN_JOIN.overload, tuple(call))
    torch.library.opcheck(CONV_BN_JOIN.overload, tuple(call._replace(h=call.h.contiguous())))


def test_compile_is_one_graph_for_all_sizes(call):
    torch._dynamo.reset()

    def block(h, x):
        return conv_bn_join(h.relu(), *call[1:4], x, *call[5:8], stride=2) + 1

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, p, q in ((2, 5, 4), (3, 7, 6)):
        h = torch.randn(n, 16, p, q).contiguous(memory_format=NHWC)
        x = torch.randn(n, 24, 2 * p, 2 * q).contiguous(memory_format=NHWC)
        torch.testing.assert_close(compiled(h, x), block(h, x))
