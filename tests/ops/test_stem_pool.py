# SPDX-License-Identifier: Apache-2.0
"""stem_pool beside torch: values, layouts, bytes, special values, what it refuses, traced."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from resnet_fast import ops
from resnet_fast.dispatch import cuda
from resnet_fast.ops import STEM_POOL, ArgumentError, StemCall, stem_pool
from resnet_fast.ops.stem_pool import reference
from resnet_fast.spec import ConvSpec
from tests.support import interpreted
from tests.support.tolerance import assert_within

K_GEMM = 7 * 7 * 3
NHWC = torch.channels_last
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = {
    "one-pixel": (2, 1, 1),
    "two-pixels": (1, 2, 1),
    "odd": (2, 37, 45),
    "even": (1, 34, 30),
    "no-image": (0, 9, 9),
}
LAYOUTS = {
    "nhwc": lambda x: x.contiguous(memory_format=NHWC),
    "nchw": lambda x: x.contiguous(),
    "slice": lambda x: F.pad(x, (1, 2, 2, 1))[:, :, 2:-1, 1:-2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def arguments(
    size: str = "odd",
    dtype: torch.dtype = torch.float32,
    *,
    layout: str = "nhwc",
    image: bool = False,
    constants: bool = True,
    norm: bool = True,
    filters: int = 16,
    backend: str = "auto",
) -> StemCall:
    """A call; with `image` x is uint8, and with `constants` it has a mean and a deviation."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    n, h, w = SIZES[size]
    x = normal(n, 3, h, w)
    x = x.mul(64).add(128).clamp(0, 255).to(torch.uint8) if image else x.to(dtype)
    weight = (normal(filters, 3, 7, 7) / K_GEMM**0.5).to(dtype).to(memory_format=NHWC)
    vectors = [normal(filters).abs() + 0.5, normal(filters)]
    vectors += [normal(filters), normal(filters).abs() + 0.5] if norm else [None, None]
    of_images = (torch.tensor(MEAN), torch.tensor(STD)) if image and constants else (None, None)
    return StemCall(LAYOUTS[layout](x), weight, *vectors, 1e-5, *of_images, backend)


def definition(call: StemCall, dtype: torch.dtype) -> torch.Tensor:
    """The formula at `dtype`, by nothing of ours."""
    x = call.x
    if x.dtype == torch.uint8:
        x = x.to(torch.promote_types(dtype, torch.float32)) / 255
        if call.image_mean is not None:
            x = (x - call.image_mean.view(3, 1, 1)) / call.image_std.view(3, 1, 1)
    y = F.conv2d(x.to(dtype), call.weight.to(dtype), None, 2, 3)
    wide = torch.promote_types(dtype, torch.float32)
    scale, shift = call.scale.to(wide), call.shift.to(wide)
    mean = torch.zeros_like(scale) if call.mean is None else call.mean.to(wide)
    var = torch.ones_like(scale) if call.var is None else call.var.to(wide)
    y = F.batch_norm(y, mean, var, scale, shift, eps=call.eps if call.mean is not None else 0.0)
    return F.max_pool2d(F.relu(y), 3, 2, 1)


def assert_right(call: StemCall, label: str = "") -> torch.Tensor:
    y = STEM_POOL.overload(*call)
    dtype = call.weight.dtype
    assert y.dtype == dtype and y.is_contiguous(memory_format=NHWC)
    reference = definition(call, torch.float64)
    if y.numel():
        assert_within(y, definition(call, dtype), reference, K_GEMM, label)
    assert y.shape == reference.shape
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_values(size, layout, dtype):
    for image in (False, True):
        for norm in (False, True):
            call = arguments(size, dtype, layout=layout, image=image, norm=norm)
            assert_right(call, f"bytes {image}, norm {norm}")


@pytest.mark.parametrize("backend", ["aten", "cpu"])
def test_values_of_a_backend_asked_for(backend):
    for image in (False, True):
        assert_right(arguments(image=image, constants=False, backend=backend))


def test_a_backend_that_cannot_says_why():
    with pytest.raises(ValueError, match=r"'cpu' cannot take the stem .*not channels_last"):
        STEM_POOL.overload(*arguments(layout="nchw", backend="cpu"))
    with pytest.raises(ValueError, match=r"'cuda' cannot take the stem .*cuda tensors"):
        STEM_POOL.overload(*arguments(backend="cuda"))


def test_the_environment_prefers(monkeypatch):
    """Sizes of their own: a plan that was made is kept."""
    monkeypatch.setenv("RESNET_FAST_BACKEND", "aten")
    assert ops.STEM_POOL.plan_of(arguments(filters=32)).backend == "aten"
    monkeypatch.setenv("RESNET_FAST_BACKEND", "cudnn")  # which has no stem
    assert ops.STEM_POOL.plan_of(arguments(filters=40)).backend == "cpu"
    monkeypatch.setenv("RESNET_FAST_BACKEND", "tpu")
    with pytest.raises(ValueError, match="unknown backend 'tpu'"):
        STEM_POOL.overload(*arguments(filters=48))


def test_the_plan_tells_its_backend_and_counts_calls():
    call = arguments("even", filters=24)
    plan = ops.STEM_POOL.plan_of(call)
    before = plan.calls
    STEM_POOL.overload(*call)
    assert (plan.backend, plan.calls) == ("cpu", before + 1)
    assert "cuda tensors" in plan.refusals["cuda"]
    slow = ops.STEM_POOL.plan_of(call._replace(x=LAYOUTS["nchw"](call.x)))
    assert slow.backend == "aten" and "not channels_last" in slow.refusals["cpu"]
    assert not ops.STEM_POOL.reads(call)


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, one element further in memory than where an allocator puts it."""
    memory = tensor.new_empty(tensor.numel() + 1)
    return memory[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)


@pytest.mark.parametrize("image", [False, True], ids=["floats", "bytes"])
@pytest.mark.parametrize("name", ["", "x", "weight", "scale", "shift", "mean", "var"])
def test_gpu_kernels_are_told_of_addresses(name, image):
    """All read parameters 16 bytes at a time; x only those that need it in channels_last."""
    call = arguments(dtype=torch.float16, image=image)
    if name:
        call = call._replace(**{name: moved(getattr(call, name))})
    stem = ops.STEM_POOL.problem_of(call)
    assert stem.conv.aligned == (name in ("", "x"))
    assert stem.normalized().aligned == (name == "" or (name == "x" and image))
    refusal = cuda.stem_refusal(replace(stem, conv=replace(stem.conv, device="cuda", arch=80)))
    assert refusal is None if name in ("", "x") else "multiple of 16 bytes" in refusal


def test_explain_names_every_backend():
    chosen, others = ops.STEM_POOL.explain("cpu", "float32")
    assert chosen == "cpu" and {"auto", chosen, *others} == set(ops.STEM_POOL.backends)


@pytest.mark.parametrize("backend", ["aten", "cpu"])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf")], ids=str)
def test_special_values_pass_relu_and_pool(value, backend):
    call = arguments(backend=backend)
    call.x[1, 2, 20, 22] = value
    y, reference = STEM_POOL.overload(*call), definition(call, torch.float64)
    assert 0 < (~reference.isfinite()).sum() < reference.numel()
    assert torch.equal(y.isnan(), reference.isnan())
    assert torch.equal(y.isinf(), reference.isinf())


def test_vectors_are_read_at_the_call():
    call = arguments()
    first = STEM_POOL.overload(*call)
    call.shift.data.add_(1)
    assert (STEM_POOL.overload(*call) - first).abs().max() > 0.5
    assert_right(call)


def test_the_arguments_are_left_alone():
    call = arguments(image=True)
    tensors = [t for t in call if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors]
    STEM_POOL.overload(*call)
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("image", [False, True], ids=["floats", "bytes"])
def test_opcheck(image, layout):
    torch.library.opcheck(STEM_POOL.overload, tuple(arguments(layout=layout, image=image)))


BAD = {
    "x-of-four-channels": ({"x": torch.randn(2, 4, 9, 9)}, "x", r"\[N, 3, H, W\]", "4, 9, 9"),
    "x-not-a-batch": ({"x": torch.randn(3, 9, 9)}, "x", r"\[N, 3, H, W\]", r"; .*x\[None\]"),
    "x-empty": ({"x": torch.randn(2, 3, 0, 9)}, "x", "only N may be 0", "2, 3, 0, 9"),
    "x-dtype": ({"x": torch.randn(2, 3, 9, 9).half()}, "x", "float32, or uint8", "float16"),
    "x-integers": ({"x": torch.ones(2, 3, 9, 9).int()}, "x", "float32, or uint8", "int32"),
    "x-sparse": ({"x": torch.randn(2, 3, 9, 9).to_sparse()}, "x", "dense", "sparse"),
    "weight-3x3": ({"weight": torch.randn(16, 3, 3, 3)}, "weight", r"\[K, 3, 7, 7\]", "3, 3, 3"),
    "weight-integers": ({"weight": torch.ones(16, 3, 7, 7).int()}, "weight", "floating", "int32"),
    "weight-elsewhere": (
        {"weight": torch.empty(16, 3, 7, 7, device="meta")}, "weight", "device cpu", "meta",
    ),
    "scale-length": ({"scale": torch.ones(15)}, "scale", r"\[16\]", r"\[15\]"),
    "shift-dtype": ({"shift": torch.ones(16).double()}, "shift", "float32", "float64"),
    "mean-alone": ({"mean": torch.ones(16)}, "mean and var", "both", "only mean"),
    "var-shape": ({"var": torch.ones(1, 16)}, "var", r"\[16\]", r"\[1, 16\]"),
    "image-mean-of-floats": (
        {"image_mean": torch.ones(3), "image_std": torch.ones(3)},
        "image_mean", "unless x is uint8", "float32",
    ),
    "image-std-alone": (
        {"x": torch.ones(2, 3, 9, 9).byte(), "image_std": torch.ones(3)},
        "image_mean and image_std", "both", "only image_std",
    ),
    "image-mean-length": (
        {"x": torch.ones(2, 3, 9, 9).byte(), "image_mean": torch.ones(1)},
        "image_mean", r"\[3\]", r"\[1\]",
    ),
    "image-mean-dtype": (
        {"x": torch.ones(2, 3, 9, 9).byte(), "image_mean": torch.ones(3).half()},
        "image_mean", "float32", "float16",
    ),
    "backend": ({"backend": "gpu"}, "backend", "one of", "'gpu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_it_refuses_says_so_alike_on_real_and_fake_tensors(name):
    changes, argument, expected, got = BAD[name]
    call = arguments(norm=False)._replace(**changes)
    pattern = rf"^resnet_fast::stem_pool: {argument} must be .*{expected}.*, got .*{got}.*"
    with pytest.raises(ArgumentError, match=pattern) as real:
        STEM_POOL.overload(*call)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [
            mode.from_tensor(t) if isinstance(t, torch.Tensor) and not t.is_meta else t
            for t in call
        ]
        with pytest.raises(ArgumentError) as fake:
            STEM_POOL.overload(*fakes)
    assert str(fake.value) == str(real.value)


@pytest.mark.parametrize("name", ["x", "weight", "scale", "shift"])
def test_a_gradient_is_that_of_torchs_own_functions(name):
    call = arguments()
    wanted = getattr(call, name).requires_grad_()
    with torch.enable_grad():
        (ours,) = torch.autograd.grad(STEM_POOL.overload(*call).sum(), wanted)
        (theirs,) = torch.autograd.grad(reference(call).sum(), wanted)
    assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert not STEM_POOL.overload(*call).requires_grad


def test_flops_are_the_convolution_s():
    call = arguments()
    with FlopCounterMode(display=False) as counter:
        STEM_POOL.overload(*call)
    n, h, w = SIZES["odd"]
    assert counter.get_total_flops() == ConvSpec(n, h, w, 3, 16, 7, 7, (2, 2), (3, 3)).flops


class Stem(torch.nn.Module):
    def forward(self, x, weight, scale, shift, mean, var):
        return stem_pool(x, weight, scale, shift, mean=mean, var=var) * 2


def test_compile_and_export_see_one_node():
    call = arguments()
    expected = STEM_POOL.overload(*call) * 2
    compiled = torch.compile(Stem(), fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(*call[:6]), expected, rtol=0, atol=0)
    program = torch.export.export(Stem(), tuple(call[:6]))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("resnet_fast.stem_pool.default") == 1
    torch.testing.assert_close(program.module()(*call[:6]), expected, rtol=0, atol=0)
    torch._dynamo.reset()


def test_autocast_narrows_x_and_weight():
    call = arguments()
    narrow = call._replace(x=call.x.bfloat16(), weight=call.weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        y = STEM_POOL.overload(*call)
    assert torch.equal(y, STEM_POOL.overload(*narrow))
    image = arguments(image=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert STEM_POOL.overload(*image).dtype == torch.bfloat16
        assert STEM_POOL.overload(*arguments(dtype=torch.float64)).dtype == torch.float64


def triton_faults() -> list[str]:
    """Runs where Triton's kernels are interpreted: the op by its Triton backend."""
    faults = []
    with torch.no_grad():
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for changes in ({}, {"image": True, "layout": "nchw"}, {"size": "one-pixel"}):
                call = arguments(**{"size": "even", **changes}, dtype=dtype, filters=24)
                assert_right(call, f"{dtype}, {changes}")
                plan = ops.STEM_POOL.plan_of(call)
                if plan.backend != "triton":
                    faults.append(f"{dtype}, {changes}: {plan}")
        call = arguments("even")
        call.x[0, 2, 20, 22] = float("nan")
        if not torch.equal(
            STEM_POOL.overload(*call).isnan(), definition(call, torch.float64).isnan()
        ):
            faults.append("NaN was moved or lost")
    return faults


def test_triton():
    pytest.importorskip("triton")
    with interpreted.pool(1) as pool:
        assert pool.submit(triton_faults).result() == []
