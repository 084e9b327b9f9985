# SPDX-License-Identifier: Apache-2.0
"""How a time comes about, whoever is measured: right answers first, then fair rounds.

    build -> first call, cold -> its answer against float64 -> warm-up until stable
          -> the answer again -> memory of one call -> rounds, each provider once per round

A provider whose answer fails either check gets no time. Rounds go through all providers in turn, so
that a machine that slows down slows all of them. Who is missing, throws or runs out of memory is
left with its reason, and the rest go on.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from resnet_fast import agreement
from resnet_fast.agreement import Verdict
from resnet_fast.benchmarking import rows
from resnet_fast.benchmarking.clocks import Clock

MIN_ROUNDS, MAX_ROUNDS = 7, 200
WARM_UP_LIMIT = 24
WINDOW = 3  # calls whose median is compared with that of the calls before them
SETTLED = 0.10
TIME_IS_UP = "the time that the run may take was up"


class Missing(Exception):
    """A provider that cannot run here at all; the text says why and what to do."""


class LeftOut(Exception):
    """A provider that is not asked in this case; the text says why."""


Inputs = tuple[object, ...]


@dataclass(slots=True)
class Candidate:
    """A provider ready for one case.

    Args:
        call: the whole work: from one set of inputs to the result.
        prepare: a set of inputs as this provider takes it; done once per set, untimed.
        around: entered outside of the clock around every call: modes, flags.
        layout, backend, tile: for the row; each a text, or a function asked after the first call.
        graphable: whether its work may be captured in a CUDA graph to time the device alone. What
            is a graph itself may not, and holds its memory between calls: it has no peak.
        own_thread: whether all its calls are made in a thread of its own. torch keeps cuDNN's
            choice for a convolution per thread, searched for or not: the first comer's, for all.
    """

    call: Callable[..., Tensor]
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs
    around: Callable[[], contextlib.AbstractContextManager] = torch.inference_mode
    layout: str = "channels_last"
    backend: str | Callable[[], str] = ""
    tile: str | Callable[[], str] = ""
    graphable: bool = True
    own_thread: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """What all providers are given, and what their answers are held against.

    Args:
        inputs: sets of inputs; calls walk through them, whoever makes them: between two uses of
            one lie all others.
        exact, eager: float64's result for the first set, and eager torch's at the case's dtype,
            of the first images (a float64 reference of 256 would take longer than the benchmark).
        k_gemm: products per output element; 1 where layers follow each other.
        back_to_back: whether a timed call follows an untimed one of the same provider, as a server
            calls a model; otherwise the caches hold what the other providers left, or are flushed.
        cache_text: how inputs meet the caches, for the row.
    """

    inputs: Sequence[Inputs]
    exact: Tensor
    eager: Tensor
    k_gemm: int = 1
    back_to_back: bool = False
    cache_text: str = ""


@dataclass(frozen=True, slots=True)
class Statistics:
    """The samples of one column, in milliseconds."""

    median: float
    p20: float
    p80: float
    p99: float
    samples: tuple[float, ...] = ()

    @classmethod
    def of(cls, samples: Sequence[float]) -> Statistics:
        """Of at least one sample; percentiles lie between neighbours, within the samples."""
        if len(samples) == 1:
            return cls(*(samples[0],) * 4, tuple(samples))
        cuts = statistics.quantiles(samples, n=100, method="inclusive")
        return cls(statistics.median(samples), cuts[19], cuts[79], cuts[98], tuple(samples))


@dataclass(slots=True)
class Outcome:
    """What became of one provider: a status, and if that is "measured", its times."""

    status: str = rows.INTERRUPTED
    reason: str = ""
    verdict: Verdict | None = None
    wall: Statistics | None = None
    device: Statistics | None = None
    device_how: str = ""
    first_ms: float | None = None
    build_ms: float | None = None
    warm_up: int = 0
    busy: float | None = None  # the share of the CPU time that others took in the rounds
    peak_memory_mb: float | None = None
    layout: str = ""
    backend: str = ""
    tile: str = ""


@dataclass(slots=True)
class _Runner:
    """A candidate on its way through the protocol."""

    candidate: Candidate
    inputs: list[Inputs]
    outcome: Outcome
    clock: Clock
    turns: Iterator[int]  # of all runners together
    thread: ThreadPoolExecutor | None = None
    replay: Callable[[], object] | None = None
    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)

    FIRST: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.candidate.own_thread:
            self.thread = ThreadPoolExecutor(1)

    def inside(self, work: Callable[..., Any], *args) -> Any:
        """Do `work` under the candidate's modes, on the clock's device, in the right thread."""

        def do() -> Any:
            with self.clock.current(), self.candidate.around():
                return work(self, *args)

        return do() if self.thread is None else self.thread.submit(do).result()

    def next_call(self) -> Callable[[], Tensor]:
        inputs = self.inputs[next(self.turns) % len(self.inputs)]
        return lambda: self.candidate.call(*inputs)

    def first_call(self) -> Callable[[], Tensor]:
        inputs = self.inputs[self.FIRST]
        return lambda: self.candidate.call(*inputs)


def measure(
    builders: dict[str, Callable[[], Candidate]],
    case: Case,
    clock: Clock,
    *,
    seconds: float,
    deadline: float = math.inf,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Outcome], bool]:
    """Take every provider through the protocol.

    Args:
        builders: by provider's name; each makes its `Candidate`, or raises to say why it cannot.
        case: inputs and references.
        clock: of the device.
        seconds: of timed rounds for all providers together, of which at least 7 are made; a
            provider's warm-up takes at most half as long.
        deadline: of the clock: no step begins after it; who has too few rounds then has no time.
        progress: told what is being done.

    Returns:
        An `Outcome` per provider, and whether Ctrl-C cut the work short; what was measured until
        then is kept.
    """
    outcomes = {name: Outcome() for name in builders}
    runners: dict[str, _Runner] = {}
    interrupted, turns, others = False, itertools.count(1), clock.others
    try:
        for name, build in builders.items():
            progress(f"{name}: building and checking")
            with _reason_in(outcomes[name]):
                if clock.now() > deadline:
                    raise LeftOut(TIME_IS_UP)
                runner = _enter(build, case, clock, outcomes[name], seconds, turns)
                if runner is not None:
                    runners[name] = runner
        with others:
            _rounds(runners, clock, min(clock.now() + seconds, deadline), deadline, case, progress)
    except KeyboardInterrupt:
        interrupted = True
    for runner in runners.values():
        runner.outcome.busy = others.busy
        _close(runner, interrupted)
    return outcomes, interrupted


@contextlib.contextmanager
def _reason_in(outcome: Outcome):
    """Write the reason of an exception to the outcome and go on."""
    try:
        yield
    except Exception as error:
        outcome.status, outcome.reason = why(error)


def why(error: Exception) -> tuple[str, str]:
    """The status and the reason that an exception stands for."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0][:300]
    if isinstance(error, Missing):
        return rows.MISSING, line
    if isinstance(error, LeftOut):
        return rows.LEFT_OUT, line
    kinds = (MemoryError, torch.OutOfMemoryError)
    said = ("out of memory", "not enough memory", "can't allocate memory")
    if isinstance(error, kinds) or any(words in text.lower() for words in said):
        return rows.MEMORY, line
    return rows.THREW, f"{type(error).__name__}: {line}"


def _enter(
    build: Callable[[], Candidate],
    case: Case,
    clock: Clock,
    outcome: Outcome,
    seconds: float,
    turns: Iterator[int],
) -> _Runner | None:
    """Build, check, warm up, check again; None where the answer was not exact enough."""
    start = clock.now()
    candidate = build()
    inputs = [candidate.prepare(one) for one in case.inputs]
    outcome.build_ms = (clock.now() - start) * 1e3
    runner = _Runner(candidate, inputs, outcome, clock, turns)
    return runner if runner.inside(_is_ready, case, seconds) else None


def _is_ready(runner: _Runner, case: Case, seconds: float) -> bool:
    """Check, warm up, check again; False where the answer was not exact enough."""
    candidate, clock, outcome = runner.candidate, runner.clock, runner.outcome
    result: list[Tensor] = []
    first_ms = clock.lap(lambda: result.append(runner.first_call()()))
    if not _agrees(result.pop(), case, outcome, "its first call"):
        return False
    outcome.first_ms = first_ms
    for name in ("layout", "backend", "tile"):
        said = getattr(candidate, name)
        setattr(outcome, name, said() if callable(said) else said)
    outcome.warm_up = warm_up(lambda: clock.lap(runner.next_call()), seconds / 2 * 1e3)
    # Whoever kept anything of the calls before (a captured graph, a buffer) shows it here.
    if not _agrees(runner.first_call()(), case, outcome, "a call after the warm-up"):
        return False
    if candidate.graphable:
        outcome.peak_memory_mb = clock.peak_memory_mb(runner.next_call())
        runner.replay = clock.capture(runner.first_call())
    return True


def _agrees(result: Tensor, case: Case, outcome: Outcome, when: str) -> bool:
    count = len(case.exact)
    ours = result[:count].detach().cpu()
    if ours.shape != case.exact.shape:
        outcome.reason = f"{when} gave {list(result.shape)}, not {list(case.exact.shape)}"
        outcome.status, outcome.first_ms = rows.FAILED, None
        return False
    # One that returns another dtype is held to the rule of the case's.
    ours = ours.to(case.eager.dtype)
    outcome.verdict = agreement.compare(ours, case.eager, case.exact, case.k_gemm)
    if not outcome.verdict.agrees:
        outcome.status, outcome.reason = rows.FAILED, f"{when}: {outcome.verdict}"
        outcome.first_ms = None
        return False
    return True


def warm_up(lap: Callable[[], float], milliseconds: float) -> int:
    """Call until the median of the last three times is within 10 % of that of the three before.

    Args:
        lap: calls once and says how many milliseconds that took.
        milliseconds: the calls may take together; three are made in any case, 24 at most.

    Returns:
        How often it was called. Whether times may be taken as facts, the rounds say.
    """
    times: list[float] = []
    while len(times) < WARM_UP_LIMIT and (len(times) < WINDOW or sum(times) < milliseconds):
        times.append(lap())
        if len(times) >= 2 * WINDOW:
            now = statistics.median(times[-WINDOW:])
            before = statistics.median(times[-2 * WINDOW : -WINDOW])
            if abs(now - before) <= SETTLED * before:
                break
    return len(times)


def _rounds(
    runners: dict[str, _Runner],
    clock: Clock,
    end: float,
    deadline: float,
    case: Case,
    progress: Callable[[str], None],
) -> None:
    count = 0
    while runners and clock.now() < (deadline if count < MIN_ROUNDS else end):
        if count == MAX_ROUNDS:
            return
        count += 1
        progress(f"round {count}")
        for name, runner in list(runners.items()):
            with _reason_in(runner.outcome):
                runner.inside(_lap, case.back_to_back)
                continue
            del runners[name]  # it threw: its reason stands in its outcome, and its times go


def _lap(runner: _Runner, back_to_back: bool) -> None:
    clock = runner.clock
    if back_to_back:
        runner.next_call()()
    else:
        clock.flush()
    wall_ms = clock.lap(runner.next_call())
    # A call's wall time is enough to queue all of its work in.
    call = runner.replay or (lambda: runner.next_call()())
    device_ms = clock.device_lap(call, cold=not back_to_back, ahead_ms=wall_ms)
    # Both or neither: an interruption between the two must not leave columns of unlike length.
    runner.wall.append(wall_ms)
    if device_ms is not None:
        runner.device.append(device_ms)


def _close(runner: _Runner, interrupted: bool) -> None:
    """Turn samples into statistics; a provider with too few rounds gets none."""
    outcome = runner.outcome
    if runner.thread is not None:
        runner.thread.shutdown()
    if len(runner.wall) < MIN_ROUNDS:
        if not interrupted:
            outcome.status, outcome.reason = rows.LEFT_OUT, TIME_IS_UP
        return
    outcome.status = rows.MEASURED
    outcome.wall = Statistics.of(runner.wall)
    if runner.device:
        outcome.device = Statistics.of(runner.device)
        outcome.device_how = "graph replay" if runner.replay is not None else "events"
