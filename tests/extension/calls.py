# SPDX-License-Identifier: Apache-2.0
"""What runs where the extension is loaded: calls of its ops with CPU tensors; data in and out."""

from __future__ import annotations

import ctypes

import torch

import resnet_fast
from resnet_fast import ops
from resnet_fast.kernels import cuda
from tests.support import nvcc
from tests.support import stem as stem_mirror

CHANNELS_LAST = torch.channels_last
VECTORS = ("scale", "shift", "mean", "var")
OPS = cuda.OPS


def load(folder: str) -> None:
    """Load the extension in `folder`, not one that the package may hold."""
    resnet_fast.__path__.insert(0, folder)
    cuda.module()


def facts() -> dict[str, object]:
    """What the module says of itself."""
    module = cuda.module()
    return {
        "missing": cuda.missing(),
        "architectures": module.architectures,
        "ptx": module.ptx,
        "tiles": module.tiles,
        "kernels": {op: module.kernels(op) for op in OPS},
        "refusals": {arch: cuda.architecture_refusal(arch) for arch in (75, 80, 86, 90, 121)},
        "explain": cuda.explain(),
        "driver": module.driver_error(),
    }


def resources() -> str:
    """How a kernel's registers are refused without a GPU."""
    return error_of(lambda: cuda.module().resources("conv_bn_act", 0, 0))


def error_of(call) -> str:
    """The type and text of what a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def nhwc(*shape, dtype=torch.float16):
    return torch.zeros(shape, dtype=dtype).contiguous(memory_format=CHANNELS_LAST)


def off_by_one(tensor):
    """The same shape and strides, one element further in memory."""
    memory = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    return memory[1:].as_strided(tensor.shape, tensor.stride())


def elementwise(backward: bool, name: str) -> str:
    """The error of one call of add_relu's ops."""
    x, y, out = (nhwc(2, 8, 4, 4) for _ in range(3))
    memory = torch.zeros(512, dtype=torch.float16)
    x, y, out = {
        "good": (x, y, out),
        "in-place": (x, y, x),
        "integer": (x.int(), y, out),
        "double": (x.double(), y.double(), out.double()),
        "dtype": (x, y.float(), out),
        "shape": (x, y[:1], out),
        "rank": (x, y[0], out),
        "out-shape": (x, y, out[:1]),
        "layout": (x, y.contiguous(), out),
        "out-layout": (x, y, out.contiguous()),
        "strided": tuple(nhwc(2, 8, 4, 8)[..., ::2] for _ in range(3)),
        "folded": tuple(memory.as_strided((2, 2, 2), (1, 1, 5)) for _ in range(3)),
        "expanded": tuple(memory[:1].expand(4) for _ in range(3)),
        "overlap-x": (memory[:256], memory[256:], memory[8:264]),
        "overlap-y": (torch.zeros(256).half(), memory[:256], memory[8:264]),
    }[name]
    op = "_add_relu_backward_cuda" if backward else "_add_relu_cuda"
    return error_of(lambda: getattr(torch.ops.resnet_fast, op)(x, y, out))


def convolution(dtype=torch.float16) -> dict[str, object]:
    """Arguments of a convolution that only lacks a GPU: [2, 16, 6, 7] -> [2, 24, 3, 4]."""
    return {
        "x": nhwc(2, 16, 6, 7, dtype=dtype),
        "weight": nhwc(24, 16, 3, 3, dtype=dtype),
        "scale": torch.ones(24),
        "shift": torch.zeros(24, dtype=dtype),
        "mean": torch.zeros(24),
        "var": torch.ones(24),
        "eps": 1e-5,
        "residual": nhwc(2, 24, 3, 4, dtype=dtype),
        "stride": (2, 2),
        "padding": (1, 1),
        "dilation": (1, 1),
        "relu": True,
        "tile": 0,
        "split_k": 1,
        "workspace": None,
        "out": nhwc(2, 24, 3, 4, dtype=dtype),
    }


def far_apart(n: int, stride_n: int):
    """x whose images lie `stride_n` elements apart; nobody reads it, so it takes no memory."""
    memory = torch.empty((n - 1) * stride_n + 6 * 7 * 16, dtype=torch.float16)
    return memory.as_strided((n, 16, 6, 7), (stride_n, 1, 7 * 16, 16))


def taps_far_apart() -> dict[str, object]:
    """A small x whose columns lie 40000 elements apart, under a filter that spans 65535 of them."""
    return {
        "x": torch.empty(2**21, dtype=torch.float16).as_strided(
            (2, 16, 6, 3), (720_000, 1, 120_000, 40_000)
        ),
        "padding": (1, 2**15 - 2), "dilation": (1, 2**15 - 1),
        "residual": None, "out": nhwc(2, 24, 3, 1),
    }  # fmt: skip


def changed(name: str) -> dict[str, object]:
    """The arguments above with one thing wrong."""
    good = convolution()
    x, weight, out = good["x"], good["weight"], good["out"]
    sliced = nhwc(2, 20, 6, 7)
    memory = torch.zeros(4096, dtype=torch.float16)
    inside = memory.as_strided((2, 16, 6, 7), x.stride())
    shares = torch.zeros(2 * 2 * 3 * 4 * 24)
    changes = {
        "good": {},
        "in-place": {"out": good["residual"]},
        "no-residual": {"residual": None},
        "no-norm": {"mean": None, "var": None},
        "slice-of-channels": {"x": nhwc(2, 24, 6, 7)[:, 8:]},
        "split": {"split_k": 2, "workspace": shares, "tile": 4},
        "x-3d": {"x": x[0]},
        "x-integer": {"x": x.int()},
        "x-double": {"x": x.double()},
        "x-contiguous": {"x": x.contiguous()},
        "x-strides": {"x": sliced[:, :16]},
        "x-address": {"x": off_by_one(x)},
        "x-channels": {"x": nhwc(2, 12, 6, 7), "weight": nhwc(24, 12, 3, 3)},
        "x-small": {"x": nhwc(2, 16, 1, 1), "padding": (0, 0)},
        "x-far": {"x": far_apart(2, 2**31)},
        "x-taps": taps_far_apart(),
        "x-none-of-many-pixels": {
            "x": nhwc(0, 16, 2**16, 2**16), "stride": (1, 1),
            "residual": None, "out": nhwc(0, 24, 2**16, 2**16),
        },
        "weight-dtype": {"weight": weight.float()},
        "weight-groups": {"weight": nhwc(24, 8, 3, 3)},
        "weight-layout": {"weight": weight.contiguous()},
        "weight-address": {"weight": off_by_one(weight)},
        "weight-filters": {"weight": nhwc(20, 16, 3, 3)},
        "weight-taps": {"weight": nhwc(24, 16, 16, 3), "padding": (8, 1)},
        "stride": {"stride": (0, 2)},
        "stride-length": {"stride": (2,)},
        "padding": {"padding": (1, -1)},
        "dilation": {"dilation": (1, 0)},
        "scale-shape": {"scale": torch.ones(23)},
        "scale-dtype": {"scale": torch.ones(24, dtype=torch.float64)},
        "scale-strided": {"scale": torch.ones(48)[::2]},
        "scale-address": {"scale": torch.ones(25)[1:]},
        "mean-alone": {"var": None},
        "var-alone": {"mean": None},
        "residual-shape": {"residual": nhwc(2, 24, 4, 4)},
        "residual-layout": {"residual": good["residual"].contiguous()},
        "residual-dtype": {"residual": good["residual"].float()},
        "out-shape": {"out": nhwc(2, 24, 3, 3)},
        "out-layout": {"out": out.contiguous()},
        "out-address": {"out": off_by_one(out)},
        "out-in-x": {
            "x": inside,
            "out": memory[64:].as_strided(out.shape, out.stride()),
        },
        "out-in-weight": {"out": weight.as_strided(out.shape, out.stride())},
        "out-beside-residual": {
            "residual": memory.as_strided(out.shape, out.stride()),
            "out": memory[8:].as_strided(out.shape, out.stride()),
        },
        "tile-high": {"tile": 99},
        "tile-negative": {"tile": -1},
        "split-none": {"split_k": 0},
        "split-many": {"split_k": 4, "workspace": torch.zeros(4 * 576), "tile": 0},
        "workspace-missing": {"split_k": 2},
        "workspace-small": {"split_k": 2, "workspace": shares[:-1]},
        "workspace-dtype": {"split_k": 2, "workspace": shares.half()},
        "workspace-address": {"split_k": 2, "workspace": off_by_one(shares)},
        "workspace-is-out": {
            "split_k": 2, "workspace": shares,
            "out": shares.view(torch.float16).as_strided(out.shape, out.stride()),
        },
    }[name]  # fmt: skip
    return good | changes


def conv_error(name: str) -> str:
    """The error of one call of conv_bn_act."""
    arguments = changed(name).values()
    return error_of(lambda: torch.ops.resnet_fast._conv_bn_act_cuda(*arguments))


def conv_problem(name: str, dtype: str) -> tuple[bytes, dict[str, object]]:
    """The struct that the host makes of `changed(name)`, and the facts to hold it against."""
    arguments = changed(name)
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor) and key in ("x", "weight", "residual", "out"):
            moved = torch.empty_strided(value.shape, value.stride(), dtype=getattr(torch, dtype))
            arguments[key] = moved
    out = torch.zeros(ctypes.sizeof(nvcc.ConvProblem), dtype=torch.uint8)
    torch.ops.resnet_fast._conv_problem(*arguments.values(), out)
    told = {
        key: (value.data_ptr(), tuple(value.shape), tuple(value.stride()), value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for key, value in arguments.items()
    }
    return bytes(out.tolist()), told


def join_error(name: str) -> str:
    """The error of one call of a join: h [2, 16, 3, 4], x [2, 8, 6, 7] -> [2, 24, 3, 4]."""
    vector = torch.ones(24)
    good = {
        "h": nhwc(2, 16, 3, 4),
        "weight": nhwc(24, 16, 1, 1),
        "scale": vector, "shift": vector, "mean": vector, "var": vector, "eps": 1e-5,
        "x": nhwc(2, 8, 6, 7),
        "proj_weight": nhwc(24, 8, 1, 1),
        "proj_scale": vector, "proj_shift": vector, "proj_mean": None, "proj_var": None,
        "proj_eps": 1e-5, "stride": (2, 2), "tile": 0,
        "out": nhwc(2, 24, 3, 4),
    }  # fmt: skip
    changes = {
        "good": {},
        "window": {"weight": nhwc(24, 16, 3, 3)},
        "even-window": {"weight": nhwc(24, 16, 2, 2)},
        "projection-window": {"proj_weight": nhwc(24, 8, 3, 3)},
        "x-shape": {"x": nhwc(2, 8, 8, 8)},
        "x-dtype": {"x": nhwc(2, 8, 6, 7).float(), "proj_weight": nhwc(24, 8, 1, 1).float()},
        "x-channels": {"x": nhwc(2, 12, 6, 7), "proj_weight": nhwc(24, 12, 1, 1)},
        "out-is-h": {"h": nhwc(2, 24, 3, 4), "weight": nhwc(24, 24, 1, 1)},
        "tile": {"tile": 3},
        "proj_mean-alone": {"proj_mean": vector},
    }[name]
    arguments = good | changes
    if name == "out-is-h":
        arguments["out"] = arguments["h"]
    join = getattr(torch.ops.resnet_fast, f"_{ops.CONV_BN_JOIN.name}_cuda")
    return error_of(lambda: join(*arguments.values()))


def stem(name: str) -> dict[str, object]:
    """Arguments of a stem, [2, 3, 21, 30] -> [2, 16, 6, 8], with one thing changed."""
    vector, three = torch.ones(16), torch.ones(3)
    x, weight, out = nhwc(2, 3, 21, 30), nhwc(16, 3, 7, 7), nhwc(2, 16, 6, 8)
    bytes_ = nhwc(2, 3, 21, 30, dtype=torch.uint8)
    photograph = {"x": bytes_, "image_mean": three, "image_std": 2 * three}
    memory = torch.zeros(8192, dtype=torch.float16)
    changes = {
        "good": {},
        "nchw": {"x": x.contiguous()},
        "sliced": {"x": nhwc(2, 3, 25, 31)[:, :, 1:22, 1:]},
        "bytes": photograph,
        "bytes-nchw": photograph | {"x": bytes_.contiguous()},
        "no-norm": {"mean": None, "var": None},
        "float32": {"x": x.float(), "weight": weight.float(), "out": out.float(), "tile": 1},
        "x-3d": {"x": x[0]},
        "x-none-of-many-tiles": {"x": nhwc(0, 3, 2**21, 2**21), "out": nhwc(0, 16, 2**19, 2**19)},
        "x-channels": {"x": nhwc(2, 4, 21, 30)},
        "x-dtype": {"x": x.float()},
        "weight-shape": {"weight": nhwc(16, 3, 5, 5)},
        "weight-layout": {"weight": weight.contiguous()},
        "weight-filters": {"weight": nhwc(12, 3, 7, 7), **dict.fromkeys(VECTORS, vector[:12])},
        "weight-double": {"x": x.double(), "weight": weight.double()},
        "scale": {"scale": torch.ones(15)},
        "mean-alone": {"var": None},
        "image_mean-of-floats": {"image_mean": three},
        "image_std-shape": photograph | {"image_std": torch.ones(4)},
        "image_std-dtype": photograph | {"image_std": three.half()},
        "out-shape": {"out": nhwc(2, 16, 7, 8)},
        "out-dtype": {"out": out.float()},
        "out-address": {"out": off_by_one(out)},
        "out-in-x": {
            "x": memory.as_strided(x.shape, x.stride()),
            "out": memory[64:].as_strided(out.shape, out.stride()),
        },
        "tile": {"tile": 2},
    }[name]
    return {
        "x": x, "weight": weight, "scale": vector, "shift": vector, "mean": vector, "var": vector,
        "eps": 1e-5, "image_mean": None, "image_std": None, "tile": 0, "out": out,
    } | changes  # fmt: skip


def stem_error(name: str) -> str:
    """The error of one call of stem_pool."""
    return error_of(lambda: torch.ops.resnet_fast._stem_pool_cuda(*stem(name).values()))


def stem_problem(name: str) -> tuple[dict, dict]:
    """The struct that the host makes of `stem(name)`, and what the mirror makes of the same."""
    arguments = stem(name)
    given = {key: value for key, value in arguments.items() if key not in ("eps", "tile")}
    tensors = stem_mirror.StemTensors(**given, out_guard=(), eps=arguments["eps"])
    mirror = stem_mirror.stem_problem(
        tensors, stem_mirror.TILES[arguments["tile"]], torch.Tensor.data_ptr
    )
    out = torch.zeros(ctypes.sizeof(mirror), dtype=torch.uint8)
    torch.ops.resnet_fast._stem_problem(*arguments.values(), out)
    host = type(mirror).from_buffer_copy(bytes(out.tolist()))
    return fields_of(host), fields_of(mirror)


def fields_of(struct: ctypes.Structure) -> dict[str, object]:
    """A struct's fields by name; what lies between them may be anything."""
    values = {name: getattr(struct, name) for name, _ in struct._fields_}
    return {
        name: fields_of(value) if isinstance(value, ctypes.Structure) else value
        for name, value in values.items()
    }
