# SPDX-License-Identifier: Apache-2.0
"""How every provider is timed: right answers first, then fair rounds.

    build -> first call, cold -> its answer against float64 -> warm-up until stable
          -> the answer again -> memory of one call -> rounds, each provider once per round

A provider whose answer fails either check gets no time. A provider that is missing, throws or runs
out of memory is left with the reason, and the others go on.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from resnet_fast import agreement
from resnet_fast.agreement import Verdict
from resnet_fast.measuring.clock import Clock
from resnet_fast.measuring.rounds import rounds, warm_up
from resnet_fast.measuring.steadiness import FEWEST_ROUNDS, MIN_ROUNDS, Timing

# What becomes of a provider in a case.
MEASURED = "measured"
FAILED = "failed its check"
MISSING = "missing"
THREW = "threw"
MEMORY = "too little memory"
LEFT_OUT = "left out"
INTERRUPTED = "interrupted"

TIME_IS_UP = "the time that the run may take was up"


class Missing(ValueError):
    """A provider that cannot run here at all; the text says why and what to do."""


class LeftOut(Exception):
    """A provider that is not measured in this case; the text says why."""


Inputs = tuple[object, ...]


@dataclass(slots=True)
class Entrant:
    """A provider ready for one case.

    Args:
        call: the whole work: from one set of inputs to the result.
        prepare: a set of inputs as this provider takes it; done once per set, untimed.
        around: entered outside of the clock around every call: modes, flags.
        layout, backend, tile: for the row; each a text, or a function asked after the first call.
        graphable: whether its work may be captured in a CUDA graph to time the device alone. What
            is a graph itself may not, and holds its memory between calls: it has no peak.
        own_thread: whether all its calls are made in a thread of its own: torch keeps cuDNN's
            choice for a convolution per thread, and the first to run it chooses for all.
    """

    call: Callable[..., Tensor]
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs
    around: Callable[[], contextlib.AbstractContextManager] = torch.inference_mode
    layout: str = "channels_last"
    backend: str | Callable[[], str] = ""
    tile: str | Callable[[], str] = ""
    graphable: bool = True
    own_thread: bool = False


def answer(entrant: Entrant, inputs: Inputs) -> Tensor:
    """What a entrant gives for inputs, untimed, under its modes and in a thread as it wants."""

    def ask() -> Tensor:
        with entrant.around():
            return entrant.call(*entrant.prepare(inputs))

    if not entrant.own_thread:
        return ask()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(ask).result()


@dataclass(frozen=True, slots=True)
class Case:
    """What all providers are given, and what their answers are held against.

    Args:
        inputs: sets of inputs; the calls of all providers together walk through them, so that all
            others are used between two uses of one.
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


@dataclass(slots=True)
class Outcome:
    """What became of one provider: a status, and if that is "measured", its times."""

    status: str = INTERRUPTED
    reason: str = ""
    verdict: Verdict | None = None
    wall: Timing | None = None
    device: Timing | None = None
    samples: tuple[float, ...] = ()  # the rounds' wall times
    device_how: str = ""
    first_ms: float | None = None  # of the first call, cold
    build_ms: float | None = None
    warm_up: int = 0
    peak_memory_mb: float | None = None
    layout: str = ""
    backend: str = ""
    tile: str = ""


@dataclass(slots=True)
class _Runner:
    """A entrant on its way through the protocol."""

    entrant: Entrant
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
        if self.entrant.own_thread:
            self.thread = ThreadPoolExecutor(1)

    def inside(self, work: Callable[..., Any], *args) -> Any:
        """Do `work` under the entrant's modes, on the clock's device, in the right thread."""

        def do() -> Any:
            with self.clock.current(), self.entrant.around():
                return work(self, *args)

        return do() if self.thread is None else self.thread.submit(do).result()

    def next_call(self) -> Callable[[], Tensor]:
        inputs = self.inputs[next(self.turns) % len(self.inputs)]
        return lambda: self.entrant.call(*inputs)

    def first_call(self) -> Callable[[], Tensor]:
        inputs = self.inputs[self.FIRST]
        return lambda: self.entrant.call(*inputs)


def measure(
    builders: dict[str, Callable[[], Entrant]],
    case: Case,
    clock: Clock,
    *,
    seconds: float,
    deadline: float = math.inf,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Outcome], bool]:
    """Take every provider through the protocol.

    Args:
        builders: by provider's name; each makes its `Entrant`, or raises to say why it cannot.
        case: inputs and references.
        clock: of the device.
        seconds: of timed rounds for all providers together; there are at least 7. A provider's
            warm-up takes at most half as long.
        deadline: of the clock: no step begins after it. With fewer than 7 rounds by then a time is
            kept as one that is not stable; with fewer than 3 there is none.
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
            for number in rounds(seconds, clock.now, deadline):
                if not runners:
                    break
                progress(f"round {number}")
                _round(runners, case.back_to_back)
    except KeyboardInterrupt:
        interrupted = True
    for runner in runners.values():
        _close(runner, others.busy, interrupted)
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
        return MISSING, line
    if isinstance(error, LeftOut):
        return LEFT_OUT, line
    kinds = (MemoryError, torch.OutOfMemoryError)
    said = ("out of memory", "not enough memory", "can't allocate memory")
    if isinstance(error, kinds) or any(words in text.lower() for words in said):
        return MEMORY, line
    return THREW, f"{type(error).__name__}: {line}"


def _enter(
    build: Callable[[], Entrant],
    case: Case,
    clock: Clock,
    outcome: Outcome,
    seconds: float,
    turns: Iterator[int],
) -> _Runner | None:
    """Build, check, warm up, check again; None where the answer was not exact enough."""
    start = clock.now()
    entrant = build()
    inputs = [entrant.prepare(one) for one in case.inputs]
    outcome.build_ms = (clock.now() - start) * 1e3
    runner = _Runner(entrant, inputs, outcome, clock, turns)
    return runner if runner.inside(_is_ready, case, seconds) else None


def _is_ready(runner: _Runner, case: Case, seconds: float) -> bool:
    """Check, warm up, check again; False where the answer was not exact enough."""
    entrant, clock, outcome = runner.entrant, runner.clock, runner.outcome
    result: list[Tensor] = []
    first_ms = clock.lap(lambda: result.append(runner.first_call()()))
    if not _agrees(result.pop(), case, outcome, "its first call"):
        return False
    outcome.first_ms = first_ms
    for name in ("layout", "backend", "tile"):
        said = getattr(entrant, name)
        setattr(outcome, name, said() if callable(said) else said)
    outcome.warm_up = warm_up(lambda: clock.lap(runner.next_call()), seconds / 2 * 1e3)
    # What a provider kept of the calls before (a captured graph, a buffer) shows here.
    if not _agrees(runner.first_call()(), case, outcome, "a call after the warm-up"):
        return False
    if entrant.graphable:
        outcome.peak_memory_mb = clock.peak_memory_mb(runner.next_call())
        runner.replay = clock.capture(runner.first_call())
    return True


def _agrees(result: Tensor, case: Case, outcome: Outcome, when: str) -> bool:
    count = len(case.exact)
    ours = result[:count].detach().cpu()
    if ours.shape != case.exact.shape:
        outcome.reason = f"{when} gave {list(result.shape)}, not {list(case.exact.shape)}"
        outcome.status, outcome.first_ms = FAILED, None
        return False
    # One that returns another dtype is held to the rule of the case's.
    ours = ours.to(case.eager.dtype)
    outcome.verdict = agreement.compare(ours, case.eager, case.exact, case.k_gemm)
    if not outcome.verdict.agrees:
        outcome.status, outcome.reason = FAILED, f"{when}: {outcome.verdict}"
        outcome.first_ms = None
        return False
    return True


def _round(runners: dict[str, _Runner], back_to_back: bool) -> None:
    for name, runner in list(runners.items()):
        with _reason_in(runner.outcome):
            runner.inside(_lap, back_to_back)
            continue
        del runners[name]  # it threw: its outcome has the reason, and its times are dropped


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


def _close(runner: _Runner, busy: float | None, interrupted: bool) -> None:
    """Turn samples into times; a provider with too few rounds gets none."""
    outcome, count = runner.outcome, len(runner.wall)
    if runner.thread is not None:
        runner.thread.shutdown()
    if interrupted and count < MIN_ROUNDS:
        return
    if count < FEWEST_ROUNDS:
        outcome.status, outcome.reason = LEFT_OUT, TIME_IS_UP
        return
    outcome.status = MEASURED
    if count < MIN_ROUNDS:
        outcome.reason = f"{count} rounds of at least {MIN_ROUNDS}: {TIME_IS_UP}"
    outcome.samples = tuple(runner.wall)
    outcome.wall = Timing.of(runner.wall, busy, outcome.first_ms)
    if runner.device:
        outcome.device = Timing.of(runner.device, busy)
        outcome.device_how = "graph replay" if runner.replay is not None else "events"
