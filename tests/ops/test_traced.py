# SPDX-License-Identifier: Apache-2.0
"""The ops where torch looks at them: opcheck, torch.compile, torch.export, fx, make_fx."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from resnet_fast.ops import add_relu, conv_bn_act, conv_bn_act_
from resnet_fast.spec import ConvSpec

SPEC = ConvSpec(n=2, h=9, w=7, c=16, k=24, r=3, s=3, padding=(1, 1), dtype="float32")
OP = torch.ops.resnet_fast.conv_bn_act.default
OP_INPLACE = torch.ops.resnet_fast.conv_bn_act_.default
LAYOUTS = {
    "nhwc": lambda x: x,
    "nchw": lambda x: x.contiguous(),
    "permuted": lambda x: x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
    "channel-slice": lambda x: x.repeat(1, 2, 1, 1)[:, 5 : 5 + x.shape[1]],
    "row-slice": lambda x: x.repeat(1, 1, 2, 1)[:, :, 1 : 1 + x.shape[2]],
    "empty": lambda x: x[:0],
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("norm", [False, True], ids=["affine", "statistics"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, dtype, norm, arguments):
    call = arguments(replace(SPEC, residual=norm, norm=norm, dtype=dtype))
    changes = {"x": LAYOUTS[layout](call.x)}
    if norm:
        changes["residual"] = LAYOUTS[layout](call.residual)
    torch.library.opcheck(OP, tuple(call._replace(**changes)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_inplace(layout, arguments):
    call = arguments(replace(SPEC, residual=True, norm=True))
    x, residual = LAYOUTS[layout](call.x), LAYOUTS[layout](call.residual)
    torch.library.opcheck(OP_INPLACE, tuple(call._replace(x=x, residual=residual)))


UNUSUAL = {
    "1x1-map": replace(SPEC, h=1, w=1, residual=True),
    "one-filter": replace(SPEC, k=1),
    "one-channel": replace(SPEC, c=1),
    "batch-of-one": replace(SPEC, n=1, stride=(2, 3)),
    "depthwise": replace(SPEC, c=24, groups=24),
    "float64": replace(SPEC, dtype="float64"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_opcheck_of_unusual_convolutions(name, arguments):
    torch.library.opcheck(OP, tuple(arguments(UNUSUAL[name])))


class Block(nn.Module):
    """Two convolutions, a join and an in-place join, with ordinary torch between them."""

    def __init__(self, call) -> None:
        super().__init__()
        for name in ("weight", "scale", "shift", "mean", "var"):
            self.register_buffer(name, getattr(call, name).clone())

    def forward(self, x):  # [N, H, W, C]
        vectors = (self.scale, self.shift)
        statistics = {"mean": self.mean, "var": self.var}
        y = conv_bn_act(x, self.weight, *vectors, padding=1, **statistics)
        z = conv_bn_act(x * 2, self.weight, *vectors, y, padding=1, activation="none")
        z = conv_bn_act_(x, self.weight, *vectors, z, padding=1, **statistics)
        return add_relu(y, z)


@pytest.fixture
def block(arguments):
    return Block(arguments(replace(SPEC, norm=True)))


def batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    for n, h, w in sizes:
        x = torch.randn(n, 16, h, w, generator=generator)
        yield x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_is_one_graph_for_all_sizes(backend, block):
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    compiles = []
    for x in batches((2, 9, 7), (5, 9, 7), (3, 12, 10)):
        y = compiled(x)
        assert_close(y, block(x))
        assert y.is_contiguous(memory_format=torch.channels_last)
        compiles.append(counter.frame_count)
    assert compiles[0] > 0
    assert compiles[1:] == compiles[:1] * 2, "a new size was compiled anew"


def test_compile_takes_both_layouts(block):
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    (x,) = batches((2, 9, 7))
    assert_close(compiled(x), block(x))
    assert_close(compiled(x.contiguous()), block(x))


def test_compile_under_autocast(block):
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    (x,) = batches((2, 9, 7))
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
        expected = block(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, expected)


def test_compile_sees_an_error_of_the_op(block):
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"resnet_fast::conv_bn_act: x must be 4-D"):
        compiled(torch.randn(16, 9, 7))


def test_compiled_code_reads_the_weights_live(block):
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    (x,) = batches((2, 9, 7))
    before = compiled(x)
    block.weight.mul_(0.5)
    block.mean.add_(1)
    after = compiled(x)
    assert_close(after, block(x))
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_a_dynamic_batch_survives_saving(strict, block):
    (example,) = batches((2, 9, 7))
    shapes = {"x": {0: Dim("batch"), 2: Dim.AUTO, 3: Dim.AUTO}}
    program = torch.export.export(block, (example,), dynamic_shapes=shapes, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("resnet_fast.conv_bn_act" in target for target in targets) == 3
    assert sum("resnet_fast.add_relu" in target for target in targets) == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for x in batches((1, 9, 7), (5, 9, 7), (4, 16, 11)):
        assert_close(loaded(x), block(x))


def test_make_fx_records_one_node(arguments):
    call = arguments(replace(SPEC, norm=True, residual=True))
    tracer = make_fx(
        lambda x: OP(x, *call[1:]), tracing_mode="symbolic", _allow_non_fake_inputs=True
    )
    graph = tracer(call.x).graph
    called = [node for node in graph.nodes if node.op == "call_function"]
    assert [node.target for node in called if "aten" not in str(node.target)] == [OP]


def test_fx_traces_the_op():
    def function(x, w, scale, shift):
        return torch.ops.resnet_fast.conv_bn_act(x, w, scale, shift, padding=[1, 1])

    traced = torch.fx.symbolic_trace(function)
    (x,) = batches((2, 9, 7))
    inputs = (x, torch.randn(4, 16, 3, 3), torch.ones(4), torch.zeros(4))
    assert torch.equal(traced(*inputs), function(*inputs))
