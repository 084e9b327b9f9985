# SPDX-License-Identifier: Apache-2.0
"""The first launch of a plan on a GPU: if it fails, the next backend serves the call.

Refusals are known before anything runs. Failures of a compiler, a driver or a device are not: a
missing tool, a kernel that does not fit. So the first launch of a plan is a trial. If it raises,
the plan is chosen again without that backend, with the reason among its refusals and one warning.
Once it has returned, nothing stands between the plan and its launches.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import torch

from resnet_fast import _hardware

_lock = threading.Lock()

# refusals that are known already, by the backend's name -> a `Plan`
Choose = Callable[[dict[str, str]], object]


def on_trial(choose: Choose, named: str):
    """The plan that `choose({})` makes, on trial.

    Args:
        choose: makes a plan; it does not ask the backends in the refusals that it is given.
        named: the backend asked for by argument, which no other may replace.
    """
    plan = choose({})
    _arm(plan, choose, named)
    return plan


def _arm(plan, choose: Choose, named: str) -> None:
    if plan.row.tried and plan.backend != named:
        plan.bind = Trial(plan, choose, named)


def reason_to_pass_on(error: Exception) -> str:
    """Why a backend whose launch failed is passed over, in words.

    Raises:
        Exception: the error itself, where the backend is not at fault: memory is short, or a CUDA
            graph is being recorded, which any failure spoils.
    """
    recording = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    if recording or _hardware.is_out_of_memory(error):
        raise error
    text = str(error).strip().partition("\n")[0]
    return f"its first launch failed: {type(error).__name__}: {text}"


class Trial:
    """Takes the place of a plan's `bind` until one of its launches has returned."""

    def __init__(self, plan, choose: Choose, named: str) -> None:
        self.plan, self.bind, self.choose, self.named = plan, plan.bind, choose, named

    def __call__(self, *tensors) -> FirstRun:
        return FirstRun(self, tensors)

    def is_over(self) -> bool:
        """Whether the plan has launched, or has another backend."""
        return self.plan.bind is not self

    def succeeded(self) -> None:
        """The plan's launches need no more watching."""
        if not self.is_over():
            self.plan.bind = self.bind

    def failed(self, error: Exception) -> None:
        """Give the plan to the next backend, unless no other could do better: then raise."""
        reason = reason_to_pass_on(error)
        with _lock:
            if self.is_over():  # another thread's launch failed too
                return
            plan = self.plan
            found = self.choose({**plan.refusals, plan.backend: reason})
            warnings.warn(
                f"resnet_fast: backend {plan.backend!r} cannot run {plan.problem.spec}, "
                f"{found.backend!r} does: {reason}",
                stacklevel=2,
            )
            plan.failed = f"{plan.backend}: {reason}"
            plan.row, plan.refusals, plan.tile = found.row, found.refusals, found.tile
            plan.why, plan.bind = found.why, found.bind
            _arm(plan, self.choose, self.named)


class FirstRun:
    """A runner whose launch may be the first of its plan; fresh until one has been."""

    __slots__ = ("tensors", "trial")
    growth = None

    def __init__(self, trial: Trial, tensors: tuple) -> None:
        self.trial, self.tensors = trial, tensors

    def __call__(self, *args):
        trial = self.trial
        if trial.is_over():
            return trial.plan.bind(*self.tensors)(*args)
        try:
            y = trial.bind(*self.tensors)(*args)
        except Exception as error:
            trial.failed(error)
            return trial.plan.bind(*self.tensors)(*args)
        trial.succeeded()
        return y

    def fresh(self, weight: torch.Tensor) -> bool:
        return not self.trial.is_over()
