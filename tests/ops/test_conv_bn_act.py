# SPDX-License-Identifier: Apache-2.0
"""conv_bn_act and conv_bn_act_ beside float64: every convolution of ResNet-18 and 50, and odd ones.

Each case runs at each dtype; all tensors are slices out of larger ones that are NaN elsewhere.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_fast import disabled, models
from resnet_fast.ops import CONV_BN_ACT, ArgumentError, conv_bn_act, conv_bn_act_
from resnet_fast.spec import ConvSpec
from tests.support.here import cpu_backend
from tests.support.tolerance import assert_within

DTYPES = ("float32", "bfloat16", "float16", "float64")
CHANNELS_LAST = torch.channels_last


def model_convolutions(*names: str, size: int = 64, batch: int = 2) -> dict[str, ConvSpec]:
    """The distinct convolutions of the models as they meet them on a batch of size x size images.

    The last convolution of a block adds the shortcut, a projection has no ReLU, as in the paper.
    """
    found: dict[ConvSpec, str] = {}
    for model_name in names:
        with torch.device("meta"):
            model = getattr(models, model_name)().eval()
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(_recorder(f"{model_name}.{name}", found, model))
        with torch.no_grad(), disabled():
            model(torch.empty(batch, 3, size, size, device="meta"))
    return {name: spec for spec, name in found.items()}


def _recorder(name: str, found: dict[ConvSpec, str], model: nn.Module):
    parent = model.get_submodule(name.split(".", 1)[1].rpartition(".")[0])
    last = "conv3" if hasattr(parent, "conv3") else "conv2"

    def record(conv, inputs, _):
        n, c, h, w = inputs[0].shape
        spec = ConvSpec(
            n, h, w, c, conv.out_channels, *conv.kernel_size, conv.stride, conv.padding,
            conv.dilation, conv.groups, residual=name.endswith(last), norm=True,
            activation="none" if "downsample" in name else "relu",
        )  # fmt: skip
        found.setdefault(spec, name)

    return record


MODELS = model_convolutions("resnet18", "resnet50")
PLAIN = ConvSpec(n=2, h=9, w=9, c=16, k=24, r=3, s=3, padding=(1, 1))
ODD = {
    "c3-stem-odd-map": replace(PLAIN, h=31, w=17, c=3, k=64, r=7, s=7, stride=(2, 2), norm=True),
    "k24-residual": replace(PLAIN, residual=True),
    "k1": replace(PLAIN, k=1, residual=True),
    "c1": replace(PLAIN, c=1),
    "1x1-map": replace(PLAIN, h=1, w=1, norm=True, residual=True),
    "1x1-map-of-a-3x3-filter-unpadded": replace(PLAIN, h=3, w=3, padding=(0, 0)),
    "pointwise": replace(PLAIN, r=1, s=1, padding=(0, 0), residual=True, norm=True),
    "pointwise-stride-2-odd": replace(PLAIN, r=1, s=1, padding=(0, 0), stride=(2, 2)),
    "tall": replace(PLAIN, h=23, w=4, norm=True),
    "wide-1xs-filter": replace(PLAIN, h=4, w=23, r=1, s=5, padding=(0, 2), residual=True),
    "stride-3": replace(PLAIN, h=20, w=20, stride=(3, 3)),
    "stride-2x1": replace(PLAIN, stride=(2, 1), residual=True),
    "dilation-2": replace(PLAIN, dilation=(2, 2), padding=(2, 2), norm=True),
    "padding-wider-than-the-filter": replace(PLAIN, padding=(4, 3)),
    "groups-4": replace(PLAIN, groups=4, residual=True, norm=True),
    "depthwise": replace(PLAIN, c=24, groups=24),
    "depthwise-x2": replace(PLAIN, c=12, groups=12, activation="none"),
    "n1": replace(PLAIN, n=1, residual=True),
    "n7": replace(PLAIN, n=7, norm=True),
    "no-activation": replace(PLAIN, activation="none"),
    "no-activation-residual": replace(PLAIN, activation="none", residual=True, norm=True),
}


def run(call, **changes):
    call = call._replace(**changes)
    names = ("mean", "var", "eps", "backend")
    return conv_bn_act(*call[:10], **{name: getattr(call, name) for name in names})


def run_inplace(call):
    names = ("mean", "var", "eps", "backend")
    return conv_bn_act_(*call[:10], **{name: getattr(call, name) for name in names})


def assert_right(y, call, definition, eager):
    assert y.dtype == call.x.dtype
    assert y.is_contiguous(memory_format=CHANNELS_LAST)
    assert_within(y, eager(call), definition(call), call.weight[0].numel())


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("name", MODELS)
def test_convolutions_of_the_models(name, dtype, arguments, definition, eager):
    spec = replace(MODELS[name], dtype=dtype)
    call = arguments(spec)
    y = run(call)
    assert CONV_BN_ACT.last_plan().backend == cpu_backend(dtype)
    assert_right(y, call, definition, eager)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ODD)
def test_odd_convolutions(name, dtype, arguments, definition, eager):
    spec = replace(ODD[name], dtype=dtype)
    call = arguments(spec)
    y = run(call)
    assert CONV_BN_ACT.last_plan().backend == cpu_backend(dtype)
    assert_right(y, call, definition, eager)
    assert_right(run(call, backend="aten"), call, definition, eager)


def test_the_models_have_the_convolutions_that_are_known():
    """Else a broken collector would leave the cases above empty."""
    geometries = {(s.c, s.k, s.r, s.stride) for s in MODELS.values()}
    assert {(3, 64, 7, (2, 2)), (256, 512, 3, (2, 2)), (2048, 512, 1, (1, 1))} <= geometries
    assert {s.residual for s in MODELS.values()} == {True, False}
    assert {s.activation for s in MODELS.values()} == {"relu", "none"}
    assert len(MODELS) >= 25


@pytest.mark.parametrize("backend", ["auto", "aten"])
@pytest.mark.parametrize("norm", [False, True], ids=["affine", "statistics"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_in_the_dtype_of_x(dtype, norm, backend, arguments, definition, eager):
    call = arguments(replace(PLAIN, dtype=dtype, norm=norm, residual=True), vector_dtype=None)
    assert_right(run(call, backend=backend), call, definition, eager)


@pytest.mark.parametrize("backend", ["auto", "aten"])
@pytest.mark.parametrize("narrow", [("scale", "shift"), ("mean", "var"), ("scale", "var")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_vectors_of_two_dtypes(dtype, narrow, backend, arguments, definition, eager):
    call = arguments(replace(PLAIN, dtype=dtype, norm=True))
    call = call._replace(**{name: getattr(call, name).to(call.x.dtype) for name in narrow})
    assert_right(run(call, backend=backend), call, definition, eager)


@pytest.mark.parametrize("backend", ["auto", "aten"])
def test_eps_is_added_to_the_variance(backend, arguments, definition, eager):
    call = arguments(replace(PLAIN, norm=True, dtype="float32"))._replace(eps=0.5)
    assert_right(run(call, backend=backend), call, definition, eager)


def test_integers_stand_for_pairs(arguments):
    call = arguments(replace(PLAIN, h=20, w=20, stride=(2, 2), dilation=(2, 2), dtype="float32"))
    y = conv_bn_act(*call[:4], stride=2, padding=1, dilation=2)
    assert torch.equal(y, run(call))


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channel-slice": lambda x: F.pad(x, (0, 0, 0, 0, 3, 5), value=torch.nan)[:, 3:-5],
    "row-slice": lambda x: F.pad(x, (0, 0, 2, 1), value=torch.nan)[:, :, 2:-1],
    "every-second-column": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "permuted": lambda x: x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
    "expanded-batch": lambda x: x[:1].expand(x.shape[0], -1, -1, -1),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("argument", ["x", "residual", "weight"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, argument, dtype, arguments, definition, eager):
    call = arguments(replace(PLAIN, residual=True, norm=True, dtype=dtype))
    tensor = LAYOUTS[layout](getattr(call, argument))
    assert tensor.shape == getattr(call, argument).shape
    call = call._replace(**{argument: tensor})
    assert_right(run(call), call, definition, eager)


@pytest.mark.parametrize("name", ["scale", "shift", "mean", "var"])
def test_strided_vectors(name, arguments, definition, eager):
    call = arguments(replace(PLAIN, norm=True, dtype="float32"))
    call = call._replace(**{name: getattr(call, name).repeat_interleave(2)[::2]})
    assert_right(run(call), call, definition, eager)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in ODD if ODD[name].residual])
def test_inplace_writes_what_the_functional_op_returns(name, dtype, arguments, definition, eager):
    call = arguments(replace(ODD[name], dtype=dtype))
    before, exact, plain = call.residual.clone(), definition(call), eager(call)
    y = run(call)
    assert torch.equal(call.residual, before), "the functional op wrote into its residual"
    assert run_inplace(call) is call.residual
    assert_within(call.residual, plain, exact, call.weight[0].numel())
    # With groups torch adds the residual to a finished convolution: rounded once more, other bits.
    assert torch.equal(call.residual, y) or call.groups > 1
    larger = call.residual._base
    assert larger[0].isnan().all() and larger[-1].isnan().all(), "wrote outside of residual"


@pytest.mark.parametrize("layout", ["contiguous", "channel-slice", "row-slice"])
def test_inplace_keeps_the_layout_of_residual(layout, arguments, definition, eager):
    call = arguments(replace(PLAIN, residual=True, dtype="float32"))
    residual = LAYOUTS[layout](call.residual)
    address, strides = residual.data_ptr(), residual.stride()
    y = run_inplace(call._replace(residual=residual))
    assert (y.data_ptr(), y.stride()) == (address, strides)
    assert_within(y, eager(call), definition(call), PLAIN.k_gemm)


def test_inplace_is_seen_where_a_kernel_writes(arguments, monkeypatch):
    """A GPU's kernels write past torch's functions, which count versions."""
    call = arguments(replace(PLAIN, residual=True, dtype="float32"))
    monkeypatch.setattr(CONV_BN_ACT, "run", lambda call, inplace: call.residual)
    before = call.residual._version
    run_inplace(call)
    assert call.residual._version == before + 1


def test_inplace_into_x_itself(arguments, definition, eager):
    """The kernel may not write y over pixels that it has yet to read."""
    call = arguments(replace(PLAIN, k=16, residual=True, dtype="float32"))
    call = call._replace(residual=call.x)
    exact, plain = definition(call), eager(call)
    assert_within(run_inplace(call), plain, exact, PLAIN.k_gemm)


def test_inplace_is_seen_by_the_version_counter(arguments):
    call = arguments(replace(PLAIN, residual=True, dtype="float32"))
    before = call.residual._version
    run_inplace(call)
    assert call.residual._version > before


@pytest.mark.parametrize("shape", [(0, 16, 9, 9), (0, 16, 3, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_batch_gives_an_empty_result(shape, dtype):
    x = torch.empty(shape, dtype=getattr(torch, dtype))
    weight = torch.randn(24, 16, 3, 3).to(x.dtype)
    y = conv_bn_act(x, weight, torch.ones(24), torch.zeros(24), padding=1, stride=2)
    expected = F.conv2d(x, weight, padding=1, stride=2)
    assert y.shape == expected.shape and y.dtype == x.dtype
    residual = torch.empty_like(y)
    again = conv_bn_act_(x, weight, torch.ones(24), torch.zeros(24), residual, padding=1, stride=2)
    assert again is residual


def test_no_filters_give_no_channels():
    none = torch.empty(0)
    y = conv_bn_act(torch.randn(2, 4, 5, 5), torch.empty(0, 4, 3, 3), none, none)
    assert y.shape == (2, 0, 3, 3)


def test_the_arguments_are_left_alone(arguments):
    call = arguments(replace(PLAIN, residual=True, norm=True, dtype="bfloat16"))
    tensors = [tensor for tensor in call if isinstance(tensor, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    run(call)
    assert all(map(torch.equal, tensors, before))


def test_a_result_is_its_own_memory(arguments):
    """A second call may not write over what the first returned."""
    call = arguments(replace(PLAIN, dtype="float32"))
    first = run(call)
    kept = first.clone()
    run(call, x=call.x + 1)
    assert torch.equal(first, kept)


def test_an_inplace_residual_in_another_dtype_than_x_is_rejected(arguments):
    call = arguments(replace(PLAIN, residual=True, dtype="bfloat16"))
    with pytest.raises(ArgumentError, match="residual must be of x's dtype bfloat16"):
        run_inplace(call._replace(residual=call.residual.float()))
