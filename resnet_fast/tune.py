# SPDX-License-Identifier: Apache-2.0
"""`resnet-fast tune`: measure which backend and tile is fastest for each op of a model.

    ops that the model runs -> candidates -> checked against the reference -> timed -> chosen

Three things are kept apart so that each can be tested without a GPU: what may run (`candidates`,
from the table that the ops choose from), how long it takes (a `Timer`), and what follows from that
(`choose`). A candidate whose result disagrees with the float64 reference gets no time at all. What
is chosen without measurements is kept unless another is faster beyond the noise: what cannot be
told apart should not depend on the day.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fast import _hardware, _names, agreement, ops
from resnet_fast.dispatch import table, tuning
from resnet_fast.dispatch.heuristics import Target
from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.row import Row
from resnet_fast.measuring.rounds import Timer, event_timer
from resnet_fast.measuring.steadiness import Timing
from resnet_fast.recording import Work
from resnet_fast.spec import Tile

SHORTLIST = 8  # candidates of one backend that are timed: each tile costs a compilation in Triton
WITHIN = 2.0  # times the best estimate: the model is a roofline, not off by more
MARGIN = 0.02  # a gain below this is not worth a departure from the usual choice


class Contender(NamedTuple):
    """A backend, and a tile where it has them."""

    backend: str
    tile: Tile | None = None

    def __str__(self) -> str:
        return f"{self.backend} {self.tile}" if self.tile else self.backend


Function = Callable[[], Tensor]
# (contender, problem, the op's arguments) -> the function to check and to time
FunctionOf = Callable[[Contender, Problem, tuple], Function]


@dataclass(slots=True)
class Result:
    """What was found for one op and spec.

    Args:
        work: the op and what it computes.
        usual: what is chosen without any measurement.
        choices: the fastest of each backend, the one to take first; empty if none was right, or
            if there was nothing to choose from.
        timings: microseconds of every contender that agreed with the reference.
        faults: of every other, why it got no time.
    """

    work: Work
    usual: Contender
    choices: tuning.Choices = ()
    timings: dict[Contender, Timing] = field(default_factory=dict)
    faults: dict[Contender, str] = field(default_factory=dict)

    def to_rows(self) -> list[dict]:
        """Flat rows, as for a CSV file: one per contender."""
        chosen = str(self.choices[0]) if self.choices else ""
        return [
            {
                "op": self.work.op, "convolution": str(self.work), "candidate": str(contender),
                "chosen": str(contender) == chosen, "usual": contender == self.usual,
                "median_us": time and time.median, "p20_us": time and time.p20,
                "p80_us": time and time.p80, "fault": self.faults.get(contender, ""),
            }
            for contender in dict.fromkeys((*self.timings, *self.faults, self.usual))
            for time in (self.timings.get(contender),)
        ]  # fmt: skip


# ---- which candidates


def problem_of(work: Work, arch: int, gpu: str = "", hardware: _hardware.Gpu | None = None):
    """The problem of an op as the models ask for it on a GPU: channels_last, aligned, one dtype."""
    where = {"device": "cuda", "arch": arch, "gpu": gpu, "hardware": hardware}
    return ops.OPS[work.op].usual(work.spec, **where)


def modelled(work: Work, target: Target, names: Sequence[str] = ()) -> dict[Contender, float]:
    """The contenders with tiles and the microseconds that are estimated; no GPU is asked."""
    hardware = _hardware.described(target)
    problem = problem_of(work, hardware.capability, hardware=hardware)
    rows = [row for row in table.of(work.op) if not names or row.backend in names]
    rows = [row for row in rows if not row.refusal(problem) and not row.tile_refusal(problem)]
    return {contender: us for row in rows for contender, us in _shortlist(row, problem).items()}


def _shortlist(row: Row, problem: Problem) -> dict[Contender, float]:
    """The best tiles of a backend: those within twice its best estimate, at most eight."""
    legal = [c for c in row.candidates(problem) if c.refusal is None]
    legal.sort(key=lambda c: c.microseconds)
    near = [c for c in legal[:SHORTLIST] if c.microseconds <= WITHIN * legal[0].microseconds]
    return {Contender(row.backend, c.tile): c.microseconds for c in near}


def candidates(problem: Problem, names: Sequence[str] = ()) -> list[Contender]:
    """What may run `problem` here and could be chosen for it.

    Beside the backends in `names` (all, if empty) what is chosen without measurements, always: a
    choice is a comparison with it.
    """
    found = []
    for row in table.of(problem.op):
        if (not names or row.backend in names) and row.why_not(problem) is None:
            found += _shortlist(row, problem) or [Contender(row.backend)]
    first = usual(problem)
    return found if first in found else [first, *found]


def check(names: Iterable[str], dtypes: Iterable[str]) -> None:
    """Raise ValueError for a dtype that is unknown, or a backend that is, or is never chosen."""
    for dtype in dtypes:
        _names.dtype(dtype)
    for name in names:
        table.check_name(name)
        row = next((row for row in table.ROWS if row.backend == name), None)
        if row is None or row.by_name or row.device == "cpu":
            reason = row.by_name if row and row.by_name else "it does not run on a GPU"
            raise ValueError(f"backend {name!r} cannot be tuned: {reason}")


def usual(problem: Problem) -> Contender:
    """What is chosen for `problem` without measurements."""
    row = next(row for row, _ in table.in_order(problem, measured=()) if not row.why_not(problem))
    return Contender(row.backend, row.choose(problem))


# ---- where

clear = tuning.clear


def gpu(name: str) -> torch.device:
    """The GPU of that name.

    Raises:
        ValueError: there is none, or it is no device that kernels here run on.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: {error}") from None
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(
            f"nothing can be measured: no NVIDIA GPU that torch can use is at {name!r} "
            "(--dry-run prints the candidates, modelled)"
        )
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {name!r}: there are {torch.cuda.device_count()} GPUs")
    if _hardware.nearest_architecture(_hardware.capability_of(device)) is None:
        raise ValueError(f"{name_of(device)}: the kernels need compute capability 8.0 or newer")
    return device


def arch_here() -> int | None:
    """Compute capability times ten of the first GPU; None where there is none."""
    return _hardware.capability_of(torch.device("cuda")) if torch.cuda.is_available() else None


def name_of(device: torch.device) -> str:
    """The GPU's name, under which choices are kept."""
    return torch.cuda.get_device_name(device)


def path_of(device: torch.device):
    """The file of the choices for a GPU."""
    return tuning.path_of(name_of(device))


# ---- checking and measuring


def tune(
    asked: Iterable[Work],
    device: torch.device,
    names: Sequence[str] = (),
    seconds: float = 1.0,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Result]:
    """Measure ops on a GPU, and keep each one's choice as soon as it is made.

    Args:
        asked: what to measure, for example the keys of `recording.works`.
        device: the GPU.
        names: backends to measure; all if empty.
        seconds: of timing for each of them, compilation and checks apart.
        progress: told what is being done.

    Yields:
        a `Result` for each. A caller that stops early has lost none of those before.
    """
    name, hardware = name_of(device), _hardware.gpu_of(device)
    timer = event_timer(device)
    for work in asked:
        problem = problem_of(work, hardware.capability, name, hardware)
        found = candidates(problem, names)
        if len(found) == 1:
            yield Result(work, found[0])
            continue
        call = sample(work, device)
        result = measure(problem, call, found, timer=timer, seconds=seconds, progress=progress)
        if result.choices:
            tuning.store(name, {work: result.choices})
        yield result


def sample(work: Work, device: torch.device) -> tuple:
    """Random arguments of an op that compute a spec."""
    return ops.OPS[work.op].sample(work.spec, device)


def measure(
    problem: Problem,
    call: tuple,
    found: Sequence[Contender],
    *,
    timer: Timer,
    seconds: float,
    function_of: FunctionOf | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Result:
    """Check each contender against the reference, time those that agree, and choose.

    Args:
        problem: what is computed.
        call: the op's arguments.
        found: the contenders.
        timer: takes the times.
        seconds: for all of them together.
        function_of: makes the function of a contender.
        progress: told what is being done.
    """
    function_of = function_of or _function_of
    result = Result(Work(problem.op, problem.spec), usual(problem))
    op = ops.OPS[problem.op]
    eager = op.reference(call)
    exact = op.reference(call._make(t.double() if isinstance(t, Tensor) else t for t in call))
    right: dict[Contender, Function] = {}
    for contender in found:
        progress(f"checking {contender}")
        try:
            function = function_of(contender, problem, call)
            _poison(eager)
            verdict = agreement.compare(function(), eager, exact, problem.spec.k_gemm)
        except Exception as error:  # a kernel that does not compile or launch gets no time
            result.faults[contender] = f"{type(error).__name__}: {error}"
            continue
        if verdict.agrees:
            right[contender] = function
        else:
            result.faults[contender] = f"wrong: {verdict}"
    if right:
        progress(f"timing {len(right)} candidates")
        result.timings = timer(right, seconds)
        result.choices = choose(result.timings, result.usual)
    return result


def _poison(like: Tensor) -> None:
    """Leave NaN in the memory that the next tensor of that size gets, not an earlier result."""
    torch.full_like(like, float("nan"))


def choose(timings: dict[Contender, Timing], usual: Contender) -> tuning.Choices:
    """The fastest contender of each backend, and the backend to take first.

    `usual` comes first unless another is faster beyond the noise: at least 2 % at the median, and
    the middle 60 % of the two do not overlap.
    """
    best: dict[str, Contender] = {}
    for contender in sorted(timings, key=lambda c: timings[c].median):
        best.setdefault(contender.backend, contender)
    if usual in timings:
        ours = best[usual.backend]
        if not _beats(timings[ours], timings[usual]):
            best[usual.backend] = usual
    order = sorted(best.values(), key=lambda c: timings[c].median)
    if usual.backend in best:
        kept = best[usual.backend]
        if not _beats(timings[order[0]], timings[kept]):
            order.remove(kept)
            order.insert(0, kept)
    return tuple(tuning.Choice(c.backend, str(c.tile or ""), timings[c].median) for c in order)


def _beats(one: Timing, other: Timing) -> bool:
    return one.p80 < other.p20 and one.median < (1 - MARGIN) * other.median


def _function_of(contender: Contender, problem: Problem, call: tuple) -> Function:
    """A call of one contender."""
    op, row = ops.OPS[problem.op], table.row_of(problem.op, contender.backend)
    runner, inputs = row.build(problem, contender.tile)(*op.layer(call)), op.inputs(call)
    return lambda: runner(*inputs)
