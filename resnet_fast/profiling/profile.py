# SPDX-License-Identifier: Apache-2.0
"""profile(model, example): a row per layer, what binds it, and how close to the bound it runs.

Marked runs and unmarked ones take turns, so the result itself says what marking costs. A model
compared with takes its turns in the same rounds: the machine's drift hits all alike.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import TextIO

import torch
from torch import Tensor, nn

from resnet_fast.conversion.find import owners
from resnet_fast.measuring import steadiness
from resnet_fast.measuring.clock import Clock, clock_of
from resnet_fast.measuring.machine import environment
from resnet_fast.measuring.rounds import rounds as numbered
from resnet_fast.measuring.twins import torchvision_twin
from resnet_fast.nn.launches import OpStep
from resnet_fast.profiling import page, parts, picture
from resnet_fast.profiling import text as _text
from resnet_fast.profiling.calls import Calls, around_calls
from resnet_fast.profiling.findings import Findings
from resnet_fast.profiling.layers import as_run
from resnet_fast.profiling.parts import LAUNCHES, REMAINDER, Part
from resnet_fast.profiling.roofline import Roofline, roofline_of
from resnet_fast.profiling.suggest import suggestions
from resnet_fast.profiling.timeline import Replay, Timeline
from resnet_fast.profiling.trace import trace_of

FORMAT = 1  # of `to_json`
WARM_UP = 3
SECONDS = 4.0
# Untimed runs before each timed one: after another model's run, a ResNet-50 at batch 1 is 8 %
# slower in its first run, 3 % in the third and 0.5 % in the fifth (CPU, bfloat16).
SETTLING_RUNS, SETTLING_SECONDS = 4, 0.2
PEERS = ("torchvision",)


class Profile(Findings):
    """What `profile` found; print it, or write it with `to_json`, `trace`, `html` and `png`."""

    __slots__ = ()

    def to_json(self) -> dict:
        """Plain data: dictionaries, lists, strings and numbers."""
        data = asdict(self)
        data["format"] = FORMAT
        data["shape"] = list(self.shape)
        for name in ("rows", "stages"):
            data[name] = [_plain(row) for row in getattr(self, name)]
        data["total"], data["run"] = _plain(self.total), _plain(self.run)
        data["warnings"] = self.warnings
        return data

    def to_rows(self) -> list[dict]:
        """Flat rows, as for a CSV file: one per layer in execution order, then the gaps."""
        shared = {
            "model": self.model, "device": self.device, "dtype": self.dtype, "batch": self.batch,
        }  # fmt: skip
        return [shared | _plain(row) for row in self.rows]

    def table(self, layers: bool = False, top: int = 12, width: int | None = None) -> str:
        """As text: the stages and the slowest layers, or with `layers` all layers in order.

        Of a terminal `width` columns wide the less important columns are left out, and named.
        """
        return _text.render(self, layers, top, width)

    def __str__(self) -> str:
        return self.table()

    def trace(self) -> dict:
        """A Chrome trace, as https://ui.perfetto.dev opens it: `json.dump` it into a file."""
        return trace_of(self)

    def html(self, file: TextIO | None = None) -> str:
        """One page that needs nothing else; also written to `file`."""
        text = page.render(self)
        if file is not None:
            file.write(text)
        return text

    def png(self, file) -> None:
        """The flame picture: width is time, colour the share of the roofline; needs matplotlib."""
        picture.write_png(self, file)


def profile(
    model: nn.Module,
    example: Tensor,
    *,
    warmup: int = WARM_UP,
    seconds: float = SECONDS,
    rounds: int | None = None,
    compare: str | nn.Module | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Profile:
    """Time every layer of a model, and say what it could be at best.

    Args:
        model: any eager model in eval mode, fused or not; nothing of it is changed.
        example: the input, [N, C, H, W], on the model's device and of its dtype.
        warmup: runs before the first timed one.
        seconds: of timed rounds, at least 7 and at most 200.
        rounds: their number, instead.
        compare: "torchvision" for torchvision's model of the same shape with the same weights, or
            a model; each row then has its time for the same layer.
        progress: told what is being done.

    Returns:
        A `Profile`. Ctrl-C in the timed rounds gives that of the rounds there were.

    Raises:
        TypeError: model is not a module, or example not a tensor.
        ValueError: model is in training mode; warmup, seconds or rounds is out of range; compare
            is not a known name, or torchvision has no such model.

    Example:
        >>> profile = resnet_fast.profile(model, torch.randn(1, 3, 224, 224))
        >>> print(profile)
    """
    _check(model, example, warmup, seconds, rounds, compare)
    roofline = _roofline(example, progress)
    clock = clock_of(example.device)
    subjects = {"": _Subject(model, example)}
    peer = ""
    if compare is not None:
        peer = compare if isinstance(compare, str) else type(compare).__name__
        progress(f"building {peer}'s model")
        twin = torchvision_twin(model, example) if isinstance(compare, str) else compare
        x = example.contiguous(memory_format=torch.channels_last) if example.dim() == 4 else example
        subjects[peer or "peer"] = _Subject(twin, x)
    with clock.current():
        for name, subject in subjects.items():
            subject.prepare(
                clock, warmup, lambda text, name=name: progress(f"{name} {text}".strip())
            )
        with clock.others as rest:
            interrupted = _measure(list(subjects.values()), clock, seconds, rounds, progress)
    ours, *others = subjects.values()
    found = _profile(ours, example, roofline, clock)
    found.interrupted, found.busy = interrupted, rest.busy
    if others:
        theirs = others[0].rows(clock)
        found.peer, found.peer_seconds = peer, statistics.median(others[0].walls)
        found.peer_spread = steadiness.spread_of(others[0].walls)
        found.peer_whole = others[0].whole(theirs, clock)
        found.rows = [_beside(row, parts.peer_rows(theirs).get(row.name)) for row in found.rows]
    found.suggestions = suggestions(found)
    return found


def _tell(progress: Callable[[str], None], name: str, text: str) -> None:
    progress(f"{name} {text}".strip())


@dataclass(slots=True)
class _Subject:
    """A model that is measured, and what was measured of it."""

    model: nn.Module
    x: Tensor
    timeline: Timeline | None = None
    walls: list[float] = field(default_factory=list)  # from call to completion, unmarked
    replays: list[Replay] = field(default_factory=list)
    busy: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})

    @torch.inference_mode()
    def prepare(self, clock: Clock, warmup: int, progress: Callable[[str], None]) -> None:
        for run in range(max(warmup, 2)):  # fused blocks keep their plans from the second on
            progress(f"warm-up {run + 1}")
            self.model(self.x)
            clock.synchronize()
        self.timeline = Timeline(self.model, self.x, clock)

    def rows(self, clock: Clock) -> list[Part]:
        """Of the replays that ran what most of them ran."""
        common = Counter(replay.names for replay in self.replays).most_common(1)[0][0]
        alike = [replay for replay in self.replays if replay.names == common]
        return parts.rows_of(as_run(self.model, self.x), alike, clock.device_apart)

    def whole(self, rows: list[Part], clock: Clock) -> float:
        """Seconds of a run as the rows were measured: no less than these together."""
        marked = [replay.whole.device for replay in self.replays]
        whole = statistics.median(self.walls if clock.device_apart else marked)
        return max(whole, sum(row.seconds for row in rows))


@torch.inference_mode()
def _measure(
    subjects: list[_Subject],
    clock: Clock,
    seconds: float,
    rounds: int | None,
    progress: Callable[[str], None],
) -> bool:
    """Rounds until the time is up; whether they were interrupted."""
    done = 0
    try:
        with around_calls() as calls:
            for number in numbered(seconds, count=rounds):
                progress(f"round {number}")
                for subject in subjects:
                    for marked in (done % 2 == 0, done % 2 == 1):  # each kind goes first in turn
                        _once(subject, clock, calls, marked)
                done = number
    except KeyboardInterrupt:
        for subject in subjects:  # the pairs that are complete
            for kept in (subject.walls, subject.replays, *subject.busy.values()):
                del kept[done:]
        if not done:
            raise
        return True
    return False


def _once(subject: _Subject, clock: Clock, calls: Calls, marked: bool) -> None:
    with subject.timeline.open(calls) if marked else nullcontext():
        # Both kinds find the caches as so many runs of their own have left them.
        end = time.perf_counter() + SETTLING_SECONDS
        for _ in range(SETTLING_RUNS):
            subject.model(subject.x)
            clock.synchronize()
            if time.perf_counter() > end:
                break
        start = time.thread_time()
        replay = subject.timeline.replay()  # with marks inside only while it is open
        busy = time.thread_time() - start
        subject.busy[marked].append(replay.whole.device if clock.device_apart else busy)
        if marked:
            subject.replays.append(replay)
        elif clock.device_apart:
            start = time.perf_counter()
            subject.model(subject.x)
            clock.synchronize()
            subject.walls.append(time.perf_counter() - start)
        else:
            subject.walls.append(replay.whole.host)


def _profile(
    subject: _Subject, example: Tensor, roofline: Roofline | None, clock: Clock
) -> Profile:
    rows = subject.rows(clock)
    whole = subject.whole(rows, clock)
    rest = whole - sum(row.seconds for row in rows)
    rows.append(Part(LAUNCHES if clock.device_apart else REMAINDER, "", "gap", rest))
    if roofline is not None:
        roofline = roofline.raised((row.name, row.flops, row.bytes, row.seconds) for row in rows)
    rows = [parts.against(row, roofline, whole, clock.device_apart) for row in rows]
    rows = [_served(row, subject.timeline.steps.get(row.name)) for row in rows]
    quickest = {marked: min(times) for marked, times in subject.busy.items()}
    spreads = map(steadiness.spread_of, subject.busy.values())
    modules = list(subject.model.modules())
    return Profile(
        model=type(subject.model).__name__,
        device=str(example.device),
        dtype=str(example.dtype).removeprefix("torch."),
        batch=example.shape[0] if example.dim() else 1,
        shape=tuple(example.shape),
        machine=environment(example.device).named(),
        roofline=roofline,
        rows=rows,
        seconds=whole,
        unmarked=statistics.median(subject.walls),
        spread=steadiness.spread_of(subject.walls),
        overhead=quickest[True] / quickest[False] - 1 if quickest[False] else 0.0,
        overhead_noise=steadiness.noise(
            steadiness.scatter(spread, len(subject.replays)) for spread in spreads
        ),
        rounds=len(subject.replays),
        device_apart=clock.device_apart,
        unoptimized=any(o.convs and not (o.installed or o.inner) for o in owners(subject.model)),
        contiguous_weights=sum(map(_is_contiguous, modules)),
    )


def _beside(row: Part, peer: Part | None) -> Part:
    return row if peer is None else replace(row, peer=peer.seconds, peer_spread=peer.spread)


def _served(row: Part, step: OpStep | None) -> Part:
    """The row with the backend that ran it."""
    if row.kind == "gap":
        return row
    if step is None or step.plan is None:
        return replace(row, backend=row.backend or "torch")
    tile = "" if step.plan.tile is None else str(step.plan.tile)
    return replace(row, backend=step.plan.backend, tile=tile, why=step.plan.why_fallback())


def _is_contiguous(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(module, nn.Conv2d)
        and isinstance(weight, Tensor)
        and not weight.is_contiguous(memory_format=torch.channels_last)
    )


def _plain(row: Part) -> dict:
    derived = ("tflops", "bandwidth_gbs", "ratio")
    return {**asdict(row), **{name: getattr(row, name) for name in derived}}


def _roofline(example: Tensor, progress: Callable[[str], None]) -> Roofline | None:
    try:
        return roofline_of(example.device, example.dtype, progress)
    except ValueError:
        return None


def _check(model, example, warmup: int, seconds: float, rounds: int | None, compare) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"resnet_fast.profile: model must be an nn.Module, got {type(model)}")
    if not isinstance(example, Tensor):
        raise TypeError(f"resnet_fast.profile: example must be a tensor, got {type(example)}")
    if model.training:
        raise ValueError("resnet_fast.profile: the model is in training mode; call model.eval()")
    if warmup < 0 or not seconds >= 0 or (rounds is not None and rounds < 1):
        got = f"warmup {warmup}, seconds {seconds}, rounds {rounds}"
        raise ValueError(f"resnet_fast.profile: expected warmup, seconds >= 0, rounds >= 1; {got}")
    if isinstance(compare, str) and compare not in PEERS:
        known = ", ".join(PEERS)
        raise ValueError(f"resnet_fast.profile: unknown compare {compare!r}; known are {known}")
    if compare is not None and not isinstance(compare, (str, nn.Module)):
        raise TypeError(f"resnet_fast.profile: compare is a {type(compare)}, not a name or a model")
