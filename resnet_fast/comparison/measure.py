# SPDX-License-Identifier: Apache-2.0
"""compare(): torchvision's model and ours on real photographs: do they agree, and how fast.

A view of the benchmark suite: its protocol, providers and statistics, on the user's photographs and
weights. A setting whose answers disagree is reported and not timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

import resnet_fast
from resnet_fast import _names, agreement, models
from resnet_fast.agreement import Verdict
from resnet_fast.benchmarking import suite
from resnet_fast.measuring import protocol, steadiness
from resnet_fast.measuring.clock import clock_of
from resnet_fast.measuring.machine import environment, pick_device
from resnet_fast.measuring.memory import room_for
from resnet_fast.measuring.peers import (
    EAGER,
    NHWC,
    OURS,
    ModelWork,
    Provider,
    compared,
    searching,
)
from resnet_fast.measuring.photographs import Photographs
from resnet_fast.measuring.progress import Progress, Rounds
from resnet_fast.measuring.steadiness import Timing
from resnet_fast.measuring.twins import build_pair

SECONDS = 6.0  # of timed rounds per setting


@dataclass(frozen=True, slots=True)
class Setting:
    """One dtype and batch: do the models agree, and their times.

    Args:
        dtype, batch: of the input.
        verdict: the logits' errors against float64, ours beside eager's.
        top1_ours, top1_eager: how many photographs get float64's class.
        photographs: how many there are.
        fused: residual blocks (and stem) that ran fused, and of how many.
        timings: per provider; empty where the models disagree.
        untimed: of the other providers, why they have no time.
    """

    dtype: str
    batch: int
    verdict: Verdict
    top1_ours: int
    top1_eager: int
    photographs: int
    fused: tuple[int, int]
    timings: dict[str, Timing] = field(default_factory=dict)
    untimed: dict[str, str] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether our logits are exact enough, in the first call and after the warm-up."""
        return self.verdict.agrees and OURS not in self.untimed

    @property
    def best_eager(self) -> str:
        """torchvision's fastest form."""
        forms = [name for name in EAGER if name in self.timings]
        return min(forms, key=lambda name: self.timings[name].median, default="")

    def ratio(self, provider: str) -> float | None:
        """The provider's median time over that of torchvision at its best.

        None where the two scatter so much that it would say nothing.
        """
        base = self.timings.get(self.best_eager)
        return base and self.timings[provider].over(base)

    def stable(self, provider: str) -> bool:
        """Whether the provider's time, and torchvision's that it is compared with, are stable."""
        base = self.timings.get(self.best_eager)
        return self.timings[provider].stable and (base is None or base.stable)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found, with all that tells where and on what.

    Args:
        model, weights, device, machine, photographs: of what and on what.
        skipped: files that were no photographs, with the reason.
        settings: one per dtype and batch.
        interrupted: whether Ctrl-C ended it early; the settings are those that were complete.
    """

    model: str
    weights: str
    device: str
    machine: dict[str, str]
    photographs: list[str]
    skipped: dict[str, str]
    settings: list[Setting] = field(default_factory=list)
    interrupted: bool = False

    @property
    def agrees(self) -> bool:
        return all(setting.agrees for setting in self.settings)

    @property
    def warnings(self) -> list[str]:
        """What to know before the times are taken as facts; nothing where all of them may be."""
        return steadiness.warnings([t for s in self.settings for t in s.timings.values()])

    def to_json(self) -> dict:
        """Plain data: dictionaries, lists, strings and numbers."""
        data = {**asdict(self), "warnings": self.warnings}
        for setting, row in zip(self.settings, data["settings"], strict=True):
            row["agrees"] = setting.agrees
            for name, timing in setting.timings.items():
                row["timings"][name] |= {"spread": timing.spread, "stable": timing.stable}
            if setting.timings:
                row["ratio"] = {name: setting.ratio(name) for name in setting.timings}
        return data

    def to_rows(self) -> list[dict]:
        """Flat rows, as for a CSV file: one per setting and provider, or per setting not timed."""
        found = []
        for setting in self.settings:
            verdict = setting.verdict
            shared = {
                "model": self.model, "weights": self.weights, "device": self.device,
                "dtype": setting.dtype, "batch": setting.batch, "agrees": setting.agrees,
                "error": verdict.ours, "eager_error": verdict.eager, "limit": verdict.limit,
                "top1_ours": setting.top1_ours, "top1_eager": setting.top1_eager,
                "photographs": setting.photographs,
            }  # fmt: skip
            found += [
                {**shared, "provider": name, **asdict(timing), "ratio": setting.ratio(name)}
                for name, timing in setting.timings.items()
            ] or [shared]
        return found


def compare(
    name: str,
    photographs: Photographs,
    *,
    batches: Sequence[int] = (1, 8),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    device: str = "auto",
    weights: str | None = None,
    peers: Sequence[str] = (),
    seconds: float = SECONDS,
    progress: Progress = lambda text, share: None,
) -> Comparison:
    """Run torchvision's model and ours, with the same weights, on the same photographs.

    Args:
        name: one of the ten builders, for example "resnet50", in any case of letters.
        photographs: see `photographs.load`.
        batches: batch sizes; photographs are repeated to fill them.
        dtypes: "float32", "bfloat16" or "float16", or a short form such as "fp32" or "half".
        device: "auto" for a GPU if there is one, else "cpu"; or any torch device.
        weights: None for random weights whose BatchNorm statistics are those of the photographs;
            a torchvision weights name ("DEFAULT", "IMAGENET1K_V1"), which is downloaded; or the
            path of a state_dict.
        peers: what else is timed: "compile", "openvino".
        seconds: of timed rounds per setting.
        progress: told what is being done, and how much of the whole is.

    Returns:
        A `Comparison`. Ctrl-C gives that of the settings which were complete; before the first of
        them it is raised.

    Raises:
        ValueError: unknown model, dtype, device or peer; a peer that cannot run here; or weights
            that are none of the model.
        MemoryError: a batch does not fit.
    """
    place = pick_device(device)
    name, dtypes = models.registry.model_name(name), [_names.dtype(dtype) for dtype in dtypes]
    providers = compared(place.type, peers)
    asked = [(dtype, batch) for dtype in dtypes for batch in batches]
    for dtype, batch in asked:
        with room_for(name, batch, dtype, place):
            pass
    progress("building the models", 0)
    theirs, ours = build_pair(name, weights, photographs.pixels)
    found = Comparison(
        model=name,
        weights=weights or "random (seed 0), BatchNorm statistics of the photographs",
        device=str(place),
        machine=environment(place).named(),
        photographs=photographs.names,
        skipped=photographs.skipped,
    )
    progress("float64 reference", 0)
    with torch.inference_mode():
        exact = copy.deepcopy(theirs).double()(photographs.pixels.double())
    try:
        for number, (dtype, batch) in enumerate(asked):
            tell = Rounds(f"{dtype}, batch {batch}", number, len(asked), seconds, progress)
            images = partial(
                suite.batch_of, photographs.pixels, batch, place, getattr(torch, dtype)
            )
            with room_for(name, batch, dtype, place), searching():
                work = ModelWork(theirs, ours, images(0))
                setting = _check((dtype, batch), providers, photographs, work, exact, tell)
                if setting.agrees:
                    _time(setting, providers, images, work, exact, seconds, tell)
            found.settings.append(setting)
            suite.release(place)
    except KeyboardInterrupt:
        if not found.settings:
            raise
        return replace(found, interrupted=True)
    return found


def _check(
    asked: tuple[str, int],
    providers: Sequence[Provider],
    photographs: Photographs,
    work: ModelWork,
    exact: Tensor,
    tell: Callable[[str], None],
) -> Setting:
    """One dtype and batch, not timed yet: eager's answers and ours on all photographs."""
    tell("checking answers")
    x = photographs.pixels.to(work.x.device, work.x.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    built = {p.name: p.build(work) for p in providers if p.name in (NHWC, OURS)}
    ours, eager = (protocol.answer(built[name], (x,)).cpu() for name in (OURS, NHWC))
    classes = exact.argmax(1)
    top1 = [int((y.argmax(1) == classes).sum()) for y in (ours, eager)]
    report = resnet_fast.report(built[OURS].call)
    verdict = agreement.compare(ours, eager, exact)
    return Setting(*asked, verdict, *top1, len(x), (report.fused, len(report)))


def _time(
    setting: Setting,
    providers: Sequence[Provider],
    images: Callable[[int], Tensor],
    work: ModelWork,
    exact: Tensor,
    seconds: float,
    tell: Callable[[str], None],
) -> None:
    """Take the providers through the suite's protocol, and write what came of it to the setting."""
    case, _ = suite.model_case(images, exact, work)
    builders = {provider.name: partial(provider.build, work) for provider in providers}
    outcomes, interrupted = protocol.measure(
        builders, case, clock_of(work.x.device), seconds=seconds, progress=tell
    )
    if interrupted:
        raise KeyboardInterrupt
    for name, outcome in outcomes.items():
        if outcome.status == protocol.MISSING:
            raise protocol.Missing(outcome.reason)
        if outcome.status == protocol.MEMORY:
            raise MemoryError(f"{name}: {outcome.reason}")
        if outcome.wall is not None:
            setting.timings[name] = outcome.wall
        else:
            setting.untimed[name] = f"{outcome.status}: {outcome.reason}"
