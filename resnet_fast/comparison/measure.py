# SPDX-License-Identifier: Apache-2.0
"""compare(): torchvision's model and ours on real photographs: do they agree, and how fast.

Correctness comes first: a setting whose answers disagree is reported and not timed.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast import _names, agreement, models
from resnet_fast.agreement import Verdict
from resnet_fast.comparison import steadiness
from resnet_fast.comparison.checkpoints import torchvision_model
from resnet_fast.comparison.memory import check_memory, room_for
from resnet_fast.comparison.photographs import Photographs
from resnet_fast.comparison.progress import Progress, Rounds
from resnet_fast.comparison.providers import NCHW, NHWC, OURS, SEARCHED, Call, providers
from resnet_fast.comparison.timing import Timing, interleaved

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
    """

    dtype: str
    batch: int
    verdict: Verdict
    top1_ours: int
    top1_eager: int
    photographs: int
    fused: tuple[int, int]
    timings: dict[str, Timing]

    @property
    def agrees(self) -> bool:
        """Whether our logits are exact enough and no class is lost that eager keeps."""
        return self.verdict.agrees

    @property
    def best_eager(self) -> str:
        """torchvision's fastest form."""
        forms = [name for name in (NCHW, NHWC, SEARCHED) if name in self.timings]
        return min(forms, key=lambda name: self.timings[name].median)

    def ratio(self, provider: str) -> float | None:
        """The provider's median time over that of torchvision at its best.

        None where the two scatter so much that it would say nothing.
        """
        return self.timings[provider].over(self.timings[self.best_eager])

    def stable(self, provider: str) -> bool:
        """Whether the provider's time, and torchvision's that it is compared with, are stable."""
        return self.timings[provider].stable and self.timings[self.best_eager].stable


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
        timings = [timing for setting in self.settings for timing in setting.timings.values()]
        busy = max((t.busy for t in timings if t.busy is not None), default=None)
        return steadiness.warnings(sum(not t.stable for t in timings), len(timings), busy)

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
        peers: who else is timed: "compile", "openvino".
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
    asked = [(dtype, batch) for dtype in dtypes for batch in batches]
    for dtype, batch in asked:
        check_memory(name, batch, dtype, place)
    progress("building the models", 0)
    theirs, ours = build_pair(name, weights, photographs.pixels)
    found = Comparison(
        model=name,
        weights=weights or "random (seed 0), BatchNorm statistics of the photographs",
        device=str(place),
        machine=describe_machine(place),
        photographs=photographs.names,
        skipped=photographs.skipped,
    )
    progress("float64 reference", 0)
    with torch.inference_mode():
        exact = copy.deepcopy(theirs).double()(photographs.pixels.double())
    calls: dict[str, Call] = {}
    try:
        for number, (dtype, batch) in enumerate(asked):
            kind = getattr(torch, dtype)
            if batch == batches[0]:
                calls = providers(theirs, ours, kind, place, peers)
            tell = Rounds(f"{dtype}, batch {batch}", number, len(asked), seconds, progress)
            with room_for(name, batch, dtype, place):
                setting = _setting(calls, photographs, (dtype, batch), place, exact, seconds, tell)
            found.settings.append(setting)
    except KeyboardInterrupt:
        if not found.settings:
            raise
        return replace(found, interrupted=True)
    return found


def _setting(
    calls: dict[str, Call],
    photographs: Photographs,
    asked: tuple[str, int],
    place: torch.device,
    exact: Tensor,
    seconds: float,
    tell: Callable[[str], None],
) -> Setting:
    """Check one dtype and batch, and time it if it is right."""
    dtype, batch = asked
    kind = getattr(torch, dtype)
    tell("checking answers")
    setting = Setting(*asked, *_check(calls, photographs, kind, place, exact), timings={})
    if setting.agrees:
        x = photographs.batch(batch).to(place, kind).contiguous(memory_format=torch.channels_last)
        timed = {who: partial(call, _as_given(who, x)) for who, call in calls.items()}
        setting.timings.update(interleaved(timed, seconds, place, tell))
    return setting


def pick_device(device: str) -> torch.device:
    """The device that a name stands for; "auto" is a GPU if there is one.

    Raises:
        ValueError: torch knows no such device, or has none here; or it is of a kind whose end of
            work nothing here waits for.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        if place.type not in ("cpu", "cuda"):
            raise RuntimeError(f"nothing is timed on {place.type}")
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        known = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        text = f"device {device!r} cannot be used: {reason}; known here are {', '.join(known)}"
        raise ValueError(text) from None
    return place


def build_pair(name: str, weights: str | None, pixels: Tensor) -> tuple[nn.Module, nn.Module]:
    """torchvision's model and ours with the same weights, float32, in eval mode, on the CPU.

    Raises:
        ValueError: unknown model, whose known ones are listed; or weights that are none of it.
    """
    name = models.registry.model_name(name)
    torch.manual_seed(0)
    theirs = torchvision_model(name, weights)
    if weights is None:
        _calibrate(theirs, pixels)
    ours = models.get_model(name)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


@torch.no_grad()
def _calibrate(model: nn.Module, pixels: Tensor) -> None:
    """Give random weights the BatchNorm statistics of the photographs: signals stay in range."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # a cumulative average: the statistics of all that is seen
    model.train()(pixels)
    for norm in norms:
        norm.momentum = 0.1


def _as_given(provider: str, x: Tensor) -> Tensor:
    """x in the layout that the provider takes, so that no conversion is timed."""
    return x.contiguous() if provider == NCHW else x


def _check(calls: dict[str, Call], photographs: Photographs, dtype, place, exact: Tensor) -> tuple:
    x = photographs.pixels.to(place, dtype)
    ours, eager = calls[OURS](x).cpu(), calls[NHWC](x).cpu()
    verdict = agreement.compare(ours, eager, exact)
    classes = exact.argmax(1)
    top1 = [int((y.argmax(1) == classes).sum()) for y in (ours, eager)]
    report = resnet_fast.report(calls[OURS].model)
    return verdict, *top1, len(photographs.names), (report.fused, len(report))


def describe_machine(place: torch.device) -> dict[str, str]:
    """What the times were measured on and with."""
    facts = {
        "processor": processor_name(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "resnet_fast": resnet_fast.__version__,
    }
    if place.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(place)
        facts["cudnn"] = str(torch.backends.cudnn.version())
    return facts


def processor_name() -> str:
    """The CPU's name as its maker gives it, or its architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
