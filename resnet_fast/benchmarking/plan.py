# SPDX-License-Identifier: Apache-2.0
"""What is asked of the suite, and about how long that will take: told before it begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from resnet_fast import _names
from resnet_fast.benchmarking import cases, providers
from resnet_fast.benchmarking.cases import ModelCase, OpCase
from resnet_fast.measuring import steadiness
from resnet_fast.measuring.machine import pick_device
from resnet_fast.measuring.peers import Provider
from resnet_fast.profiling.layers import layers_of

QUICK_COMPILED = (("resnet18", 1),)  # the (model, batch) that `--quick` has the time to compile
# When `--quick` begins nothing new in a suite.
QUICK_SECONDS = {"models": 100.0, "ops": 150.0}
# FLOPs a second that eager torch reaches, roughly: of a CPU's thread in float32, and of a GPU.
THREAD_RATE, GPU_RATE = 3e10, 2e13
CALLS = 10  # of a provider beside the rounds: the first, warm-up, checks, memory
REFERENCE = 8  # times a call takes, for what it is checked against: float64 of eight images


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be measured; empty sequences stand for the defaults.

    Args:
        suites: of `cases.SUITES`.
        device: "auto", "cpu", "cuda", ...
        extent: of `cases.EXTENTS`: what the defaults are. "quick" also keeps to its three minutes.
        providers, models, batches, dtypes: by name.
        seconds: of timed rounds per case.

    Raises:
        ValueError: a name that is not known; the known ones are listed.
    """

    suites: Sequence[str] = cases.SUITES
    device: str = "auto"
    extent: str = cases.USUAL
    providers: Sequence[str] = ()
    models: Sequence[str] = ()
    batches: Sequence[int] = ()
    dtypes: Sequence[str] = ()
    seconds: float | None = None
    place: torch.device = field(init=False)

    def __post_init__(self) -> None:
        for part, kind, known in (
            ("suites", "suite", cases.SUITES),
            ("providers", "provider", providers.names()),
            ("models", "model", _names.natural(cases.model_names())),
        ):
            chosen = [_names.choose(kind, name, known) for name in getattr(self, part)]
            object.__setattr__(self, part, chosen)
        object.__setattr__(self, "extent", _names.choose("extent", self.extent, cases.EXTENTS))
        dtypes = [_names.dtype(name, cases.DTYPES) for name in self.dtypes]
        object.__setattr__(self, "dtypes", dtypes)
        if any(batch < 1 for batch in self.batches):
            raise ValueError(f"batches must be positive, got {list(self.batches)}")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds must be positive, got {self.seconds}")
        if not any(map(self.asks, self.suites)):
            of_suites = {
                p.name: None for suite in self.suites for p in providers.providers_of(suite)
            }
            text = f"no provider of {', '.join(self.suites)} is named; known are"
            raise ValueError(f"{text} {', '.join(of_suites)}")
        object.__setattr__(self, "place", pick_device(self.device))
        if "tf32" in self.dtypes and self.place.type != "cuda":
            raise ValueError(f"tf32 is a GPU's way to multiply float32; this is {self.place}")

    def asks(self, suite: str) -> bool:
        """Whether any provider of the suite is asked."""
        named = set(self.providers)
        return not named or any(p.name in named for p in providers.providers_of(suite))

    @property
    def quick(self) -> bool:
        return self.extent == cases.QUICK

    def cases(self, suite: str) -> list[ModelCase] | list[OpCase]:
        """The suite's cases on the request's device."""
        extent, kind = cases.EXTENTS[self.extent], self.place.type
        dtypes = self.dtypes or extent.dtypes[kind]
        names = self.models or extent.models
        if suite == "models":
            names, batches = names or cases.model_names(), self.batches or extent.batches
            return cases.model_cases(names, batches, dtypes, kind)
        names, batches = names or cases.SHAPES_FROM, self.batches or extent.op_batches
        return cases.op_cases(names, batches, dtypes, kind, extent.convolutions)

    def seconds_of(self, suite: str) -> float:
        if self.seconds is not None:
            return self.seconds
        return {"models": 4.0, "ops": 1.0}[suite] * (0.4 if self.quick else 1.0)

    def asked(self, case: ModelCase | OpCase) -> tuple[list[Provider], dict[str, str]]:
        """The providers that are asked in a case, and those that are not, with the reason."""
        return providers.choose(case, self.place.type, tuple(self.providers), self.extent)


def seconds_of(case: ModelCase | OpCase, request: Request) -> float:
    """About how long a case takes: building, warming up and the rounds of all that are asked."""
    suite = "models" if isinstance(case, ModelCase) else "ops"
    asked, _ = request.asked(case)
    cuda = request.place.type == "cuda"
    rate = GPU_RATE if cuda else THREAD_RATE * torch.get_num_threads()
    call = flops_of(case) / rate
    each_round = call * len(asked) * (2 if suite == "models" else 1)
    rounds = max(request.seconds_of(suite), steadiness.MIN_ROUNDS * each_round)
    build = sum(provider.seconds[suite] for provider in asked)
    return rounds + build + call * (CALLS * len(asked) + REFERENCE)


def flops_of(case: ModelCase | OpCase) -> int:
    if isinstance(case, OpCase):
        return case.flops
    return case.batch * sum(layer.flops for layer in layers_of(case.model, fused=False))


def estimate(request: Request) -> float:
    """About how many seconds all of it takes; it may be wrong by a factor of two."""
    found = 0.0
    for suite in filter(request.asks, request.suites):
        found += sum(seconds_of(case, request) for case in request.cases(suite))
        if request.quick:
            found = min(found, QUICK_SECONDS[suite])
    return found


class TimeLeft:
    """How much longer a run takes: by the estimate, and by how far that was from what is done.

    Args:
        request: that is run.
        now: seconds since some moment.
    """

    def __init__(self, request: Request, now: Callable[[], float]) -> None:
        self._request, self._now, self._start = request, now, now()
        self._total, self._done = estimate(request), 0.0

    def done(self, case: ModelCase | OpCase) -> None:
        """A case has been measured."""
        self._done += seconds_of(case, self._request)

    def said(self) -> str:
        """ "about 12 min left"; of `--quick`, which keeps to its time whatever is left, that."""
        spent = self._now() - self._start
        if self._request.quick:
            rest = self._total - spent
        else:
            slower = spent / self._done if self._done else 1.0
            rest = (self._total - self._done) * slower
        return f"about {duration(rest)} left"


def announced(request: Request) -> list[str]:
    """What is about to be measured, how long that takes, and whether the machine is too busy."""
    listed = [case for suite in filter(request.asks, request.suites)
              for case in request.cases(suite)]  # fmt: skip
    count = sum(len(request.asked(case)[0]) for case in listed)
    text = f"{len(listed)} cases, {count} rows: about {duration(estimate(request))}"
    more = {cases.QUICK: "; what it has no time for is left out", cases.USUAL: "; all by --full"}
    threads = 1 if request.place.type == "cuda" else torch.get_num_threads()
    busy = steadiness.too_busy(steadiness.busy_now(threads))
    return [text + more.get(request.extent, ""), *busy]


def duration(seconds: float) -> str:
    """A time as people say it: "40 s", "12 min", "3.5 h", "2.1 days"."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 36 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
