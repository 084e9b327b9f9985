# SPDX-License-Identifier: Apache-2.0
"""A clock that tests turn by hand, cases of a few numbers, and rows made up on purpose."""

from __future__ import annotations

from collections.abc import Callable

import torch

from resnet_fast.benchmarking.rows import Result
from resnet_fast.measuring.clock import Clock
from resnet_fast.measuring.machine import Environment
from resnet_fast.measuring.protocol import MEASURED, Case, Entrant
from resnet_fast.measuring.steadiness import Others

ENVIRONMENT = Environment(
    device="Test Processor", kind="cpu", threads=2, clocks="2000 MHz", driver="", python="3.12",
    torch="2.14", triton="", cudnn="", resnet_fast="0.1.0", commit="abc",
)  # fmt: skip


class FakeClock(Clock):
    """Time passes where a test says so, and memory is never asked for."""

    def __init__(self) -> None:
        self.seconds = 0.0
        super().__init__(lambda: self.seconds)

    @property
    def others(self) -> Others:
        """Nobody else is on this machine."""
        return Others(1, self.now, self.now, lambda: (self.seconds, 1))

    def peak_memory_mb(self, call: Callable[[], object]) -> float | None:
        call()
        return None


def case(**changes) -> Case:
    """Three sets of inputs for the identity."""
    sets = [(torch.full((2, 3), float(i)),) for i in range(3)]
    given = {"inputs": sets, "exact": sets[0][0].double(), "eager": sets[0][0]}
    return Case(**(given | changes))


def right(clock: FakeClock, milliseconds: float = 1.0, log: list | None = None, name: str = ""):
    """Builds a provider whose answer is right and takes so long."""

    def call(x: torch.Tensor) -> torch.Tensor:
        clock.seconds += milliseconds / 1e3
        if log is not None:
            log.append((name, int(x[0, 0])))
        return x.clone()

    return lambda: Entrant(call)


def row(provider: str = "resnet_fast", ms: float = 10.0, spread: float = 0.02, **changes) -> Result:
    """A measured row whose p20 and p80 lie `spread` to both sides of the median."""
    given = {
        "suite": "models", "subject": "resnet18", "shape": "1x3x224x224", "where": "", "batch": 1,
        "dtype": "float32", "provider": provider, "status": MEASURED, "wall_ms": ms,
        "wall_p20_ms": ms * (1 - spread), "wall_p80_ms": ms * (1 + spread), "wall_p99_ms": ms * 1.2,
        "rounds": 20, "error": 1e-6, "eager_error": 1e-6, "error_limit": 1e-5, "first_ms": 30.0,
        "flops": 10**9, "bytes": 10**7, "images_per_s": 1e3 / ms, "tflops": 0.1, "gbs": 1.0,
        "stable": True, "environment": ENVIRONMENT,
    }  # fmt: skip
    return Result(**(given | changes))
