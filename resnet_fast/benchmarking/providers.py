# SPDX-License-Identifier: Apache-2.0
"""The ways to compute a single op that are measured, and the choice of providers for a case."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from resnet_fast import ops
from resnet_fast.benchmarking import cases, formulas
from resnet_fast.benchmarking.cases import ModelCase, OpCase
from resnet_fast.measuring import cudnn, peers
from resnet_fast.measuring.peers import COMPILING, NHWC, OURS, Provider, how_cudnn
from resnet_fast.measuring.protocol import Entrant, LeftOut

EAGER = {"models": NHWC, "ops": "aten"}


@dataclass(frozen=True, slots=True)
class OpWork:
    """An op case's material: the case, and the op as a module on its device."""

    case: OpCase
    module: nn.Module
    device: torch.device


def _aten(work: OpWork, benchmark: bool = False) -> Entrant:
    return Entrant(work.module, backend="torch", **how_cudnn(benchmark, work.device))


def _aten_folded(work: OpWork) -> Entrant:
    how = how_cudnn(True, work.device)
    return Entrant(formulas.folded(work.module), backend="torch", **how)


def _op_cudnn(work: OpWork) -> Entrant:
    cudnn.check_available(work.device)
    if work.case.spec.activation != "relu":
        raise LeftOut("cuDNN's fused calls end with a ReLU")
    conv = formulas.folded(work.module).conv
    call = cudnn.conv_add_relu if work.case.spec.residual else cudnn.conv_relu
    return Entrant(partial(call, conv), backend="cuDNN, fused call", **how_cudnn(True, work.device))


def _op_compile(work: OpWork) -> Entrant:
    call = peers.compiled(work.module)
    return Entrant(call, around=torch.no_grad, backend="Inductor, freezing")


def _op_ours(work: OpWork, backend: str = "auto") -> Entrant:
    call = work.module.ours(backend)
    return Entrant(call, backend=partial(_backend_of, work), tile=partial(_tile_of, work))


LAST_PLAN = {
    "conv_bn_act": ops.CONV_BN_ACT.last_plan,
    "conv_bn_join": ops.CONV_BN_JOIN.last_plan,
    "stem_pool": ops.STEM_POOL.last_plan,
}


def _backend_of(work: OpWork) -> str:
    """The backend that ran the last call; add_relu has no plan but one backend per dtype."""
    case = work.case
    if case.op in LAST_PLAN:
        return LAST_PLAN[case.op]().backend
    return ops.ADD_RELU.explain(str(work.device), case.spec.dtype)[0]


def _tile_of(work: OpWork) -> str:
    """The tile of the last call's kernel; "" where there is none."""
    plan = LAST_PLAN[work.case.op]() if work.case.op in LAST_PLAN else None
    return str(plan.tile) if plan and plan.tile else ""


WITH_NORM = tuple(LAST_PLAN)  # add_relu takes no backend either
OP_PROVIDERS = (
    Provider("aten", "torch, unfused", _aten),
    Provider("aten-cudnn-benchmark", "torch, unfused, cudnn.benchmark",
             partial(_aten, benchmark=True), "cuda", ops=WITH_NORM),
    Provider("aten-folded", "torch, BatchNorm folded; on a GPU cudnn.benchmark", _aten_folded,
             ops=WITH_NORM),
    Provider("cudnn-fused", "cudnn_convolution_(add_)relu, BatchNorm folded", _op_cudnn, "cuda",
             ops=("conv_bn_act",)),
    Provider("compile", "torch.compile of the unfused formula, freezing", _op_compile,
             seconds=COMPILING),
    Provider(OURS, "ours, the backend it chooses", _op_ours),
)  # fmt: skip


def providers_of(suite: str) -> tuple[Provider, ...]:
    """All providers of a suite; ours also by each backend that the ops know."""
    if suite == "models":
        return peers.model_providers()
    return OP_PROVIDERS + tuple(
        Provider(f"{OURS}-{name}", f"ours, backend {name}", partial(_op_ours, backend=name), device,
                 ops=WITH_NORM)
        for name, device in sorted(ops.backend_devices().items())
    )  # fmt: skip


def names() -> list[str]:
    """What `--providers` may name, of any suite and device."""
    return list(dict.fromkeys(p.name for suite in cases.SUITES for p in providers_of(suite)))


def choose(
    case: ModelCase | OpCase, device: str, wanted: tuple[str, ...], extent: str
) -> tuple[list[Provider], dict[str, str]]:
    """The providers to ask, and those that are not, each with the reason.

    A named provider is asked in any case: then its rows say why it has no time. Otherwise those of
    another device are left out at once, as are those too slow for the extent.
    """
    asked, left_out, order = [], {}, list(cases.EXTENTS)
    op = getattr(case, "op", None)
    for provider in providers_of("ops" if op else "models"):
        if op and provider.ops and op not in provider.ops:
            continue
        if wanted:
            if provider.name in wanted:
                asked.append(provider)
        elif provider.device not in (None, device):
            left_out[provider.name] = f"runs on {provider.device}, this is {device}"
        elif order.index(provider.extent) > order.index(extent):
            more = "--full" if provider.extent == cases.FULL else "a run without --quick"
            left_out[provider.name] = f"part of {more} alone; or name it with --providers"
        else:
            asked.append(provider)
    return asked, left_out
