# SPDX-License-Identifier: Apache-2.0
"""The table of rows, op by backend: which backend serves a problem, with which tile, and why.

    backend  device   convolution   join        stem         relu(x + y)   its gradient
    cuda     cuda     csrc/cuda: one C++ kernel each
    triton   cuda     one kernel    one kernel  conv, pool   one kernel    the same
    cpu      cpu      oneDNN        two convs   conv, pool   two passes
    aten     any      torch's own functions, unfused; it refuses nothing
    cudnn    cuda     where asked for by name

Each backend's file has its rows, and each row says what it refuses and why. They are asked in this
order: the one named by argument or by RESNET_FAST_BACKEND, what `resnet-fast tune` measured
(tuning.py), what is preferred for the GPU and the kind of problem (preferences.py), this table. The
first that does not refuse is taken, with the measured tile or the one that should be the fastest.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from resnet_fast import _env, _names
from resnet_fast.dispatch import aten, cpu, cuda, triton, tuning
from resnet_fast.dispatch.preferences import preference
from resnet_fast.dispatch.problem import Binder, Problem
from resnet_fast.dispatch.row import Row
from resnet_fast.dispatch.trial import on_trial
from resnet_fast.spec import Tile

AUTO = "auto"
ASKED = "asked for"
ROWS: tuple[Row, ...] = (*cuda.ROWS, *triton.ROWS, *cpu.ROWS, *aten.ROWS)


@dataclass(slots=True)
class Plan:
    """A problem, the backend that was chosen for it and why, and why those before it were not.

    `tile` is how its kernel cuts the work, printable; None where the backend has no tiles. `failed`
    is a backend that was chosen before and could not launch, and why.
    """

    problem: Problem
    row: Row
    refusals: dict[str, str]
    bind: Binder
    calls: int = 0
    why: str = ""
    tile: Tile | None = None
    failed: str = ""

    @property
    def backend(self) -> str:
        """The name of the backend that was chosen."""
        return self.row.backend

    @property
    def is_one_kernel(self) -> bool:
        """Whether what lies between the op's parts never exists."""
        return self.row.fuses

    def why_fallback(self) -> str:
        """Why no fused kernel of this device took the problem, or the one that was to failed."""
        if self.row.device is not None:
            return self.failed
        if self.why == ASKED:
            return f"backend {self.backend} was asked for, which fuses nothing"
        fused = {row.backend for row in of(self.problem.op) if row.device == self.problem.device}
        why = [reason for name, reason in self.refusals.items() if name in fused]
        return "; ".join(why) or f"no fused kernel for {self.problem.device}"


def of(op: str) -> list[Row]:
    """The rows of an op, in the table's order."""
    return [row for row in ROWS if row.op == op]


def row_of(op: str, backend: str) -> Row | None:
    """One row, or None where the backend does not have the op."""
    return next((row for row in of(op) if row.backend == backend), None)


def names(op: str | None = None) -> list[str]:
    """What the `backend` argument of an op, or of some op, may be."""
    return [AUTO, *dict.fromkeys(row.backend for row in ROWS if op in (None, row.op))]


def devices() -> dict[str, str | None]:
    """The device type that each backend runs on; None for any."""
    return {row.backend: row.device for row in ROWS}


def check_name(backend: str, op: str | None = None) -> None:
    """Raise ValueError unless `backend` is a backend's name or "auto"."""
    if backend not in names(op):
        raise ValueError(f"resnet_fast: {_names.unknown('backend', backend, names(op))}")


def plan(problem: Problem, backend: str = AUTO) -> Plan:
    """Choose a backend for `problem` and let it prepare.

    Args:
        problem: what is to be run.
        backend: a backend's name, or "auto" for the order that this module's docstring tells.

    Raises:
        ValueError: an unknown backend, of either kind, or one asked for by argument that refuses.
    """
    check_name(backend, problem.op)
    wanted = _wanted(backend)
    return on_trial(functools.partial(_choose, problem, backend, wanted), backend)


def _wanted(backend: str) -> str:
    """The backend asked for by argument or else by the environment, where it is a preference."""
    wanted = backend if backend != AUTO else _env.backend() or AUTO
    check_name(wanted)
    return wanted


def _choose(problem: Problem, backend: str, wanted: str, known: dict[str, str]) -> Plan:
    refusals: dict[str, str] = {}
    for row, why in in_order(problem, wanted):
        reason = known.get(row.backend) or row.why_not(problem, asked=row.backend == wanted)
        if reason is None:
            tile = _tile(row, problem)
            if row.device is None and row.backend != wanted and _only_layout_is_amiss(problem):
                _warn_of_contiguous_weights()
            bind = row.build(problem, tile)
            return Plan(problem, row, refusals, bind, why=why, tile=tile)
        if row.backend == backend:
            text = f"backend {backend!r} cannot take {problem.spec}: {reason}"
            raise ValueError(f"resnet_fast: {text}")
        refusals[row.backend] = reason
    raise AssertionError(f"a backend of {problem.op} must refuse nothing")


def _tile(row: Row, problem: Problem) -> Tile | None:
    """The measured tile, where there is one that is still legal; else the chooser's."""
    choices = tuning.measured(problem.gpu, problem.op, problem.spec)
    found = tuning.tile_of(choices, row.backend, row.candidates(problem))
    return found or row.choose(problem)


def in_order(
    problem: Problem, wanted: str = AUTO, measured: tuning.Choices | None = None
) -> Iterator[tuple[Row, str]]:
    """The rows in the order in which they are asked, each with why it stands where it does.

    `measured` stands for the choices that are kept for the problem; empty for an order without any.
    """
    rows = {row.backend: row for row in of(problem.op)}
    reasons = [(wanted, ASKED)]
    if measured is None:
        measured = tuning.measured(problem.gpu, problem.op, problem.spec)
    reasons += [(c.backend, f"measured: {c.microseconds:.1f} us") for c in measured]
    if problem.device == "cuda" and problem.product is not None:
        preferred = preference(problem.product, problem.target)
        if preferred:
            first, *others = preferred.order
            reasons += [(first, preferred.reason), *((name, "") for name in others)]
    reasons += [(name, "") for name in rows]
    for name, why in reasons:
        row = rows.pop(name, None)
        if row is not None:
            yield row, why


def explain(problem: Problem) -> tuple[str, dict[str, str]]:
    """The first backend that takes `problem`, and for each other why it does not run."""
    whys = {row.backend: (row.why_not(problem), why) for row, why in in_order(problem)}
    chosen = next(name for name, (reason, _) in whys.items() if reason is None)
    first = f"{chosen} comes first" + (f": {whys[chosen][1]}" if whys[chosen][1] else "")
    return chosen, {name: why or first for name, (why, _) in whys.items() if name != chosen}


def may_fuse(op: str, device: str, backend: str = AUTO) -> bool:
    """Whether some row of the op that fuses could run where this device and name are asked for.

    Models ask at every call, so no name is looked at where no device is right.
    """
    fusing = [row for row in ROWS if row.fuses and row.op == op and row.runs_on(device)]
    wanted = _wanted(backend) if fusing else AUTO
    return any(wanted in (AUTO, row.backend) for row in fusing)


def _only_layout_is_amiss(problem: Problem) -> bool:
    """Whether a GPU's kernel would take the problem if its weight were channels_last."""
    turned = problem.in_usual_layout() if problem.device == "cuda" else None
    if turned is None:
        return False
    return any(row.why_not(turned) is None for row in of(problem.op) if row.device == "cuda")


@functools.cache
def _warn_of_contiguous_weights() -> None:
    """Once in a process: one call repairs all layers of a model."""
    warnings.warn(
        "resnet_fast: convolutions with contiguous weights run unfused on this GPU, whose fused "
        "kernels read channels_last; call model.to(memory_format=torch.channels_last) once",
        stacklevel=2,
    )
