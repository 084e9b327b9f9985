# SPDX-License-Identifier: Apache-2.0
"""A row of the table: one op by one backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from resnet_fast.dispatch.heuristics import Candidate, Family, choose, explain
from resnet_fast.dispatch.problem import Binder, Problem
from resnet_fast.spec import Tile


def _nothing(*_) -> None:
    return None


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Row:
    """How one backend runs one op.

    Args:
        op: the op's name.
        backend: what `report`, RESNET_FAST_BACKEND and the ops' `backend` argument call it.
        build: prepares a problem: all that can be kept between calls is made here. The tile is one
            of the family's, or None where there is no family.
        device: the device type that it needs, or None for any.
        anywhere: whether it runs on every device nevertheless, as an interpreter does.
        missing: why it cannot run on this machine, or on a GPU of that architecture; or None.
        refusal: why it cannot take a problem, whatever the tile; or None.
        family: the tiles of its kernel; None where there are none to choose from.
        by_name: why it is taken only where it is asked for by name; "" for all others.
        fuses: whether models should call the op where this row runs it: one kernel does the work
            of several, and what would lie between them never exists.
        any_layout: whether it reads the first tensor however it lies in memory.
        tried: whether its kernels are compiled for, or loaded on, a device at first, so that the
            first launch is a trial (`trial.py`).
    """

    op: str
    backend: str
    build: Callable[[Problem, Tile | None], Binder]
    device: str | None = None
    anywhere: Callable[[], bool] = _never
    missing: Callable[[int], str | None] = _nothing
    refusal: Callable[[Problem], str | None] = _nothing
    family: Family | None = None
    by_name: str = ""
    fuses: bool = False
    any_layout: bool = False
    tried: bool = False

    def runs_on(self, device: str) -> bool:
        """Whether it may run on devices of a type at all."""
        return self.device in (None, device) or self.anywhere()

    def why_not(self, problem: Problem, asked: bool = False) -> str | None:
        """Why it does not take a problem here, `asked` for by name or not; None if it does."""
        if not self.runs_on(problem.device):
            return f"runs on {self.device} tensors, not {problem.device}"
        if self.by_name and not asked:
            return self.by_name
        reason = self.missing(problem.arch) or self.refusal(problem)
        return reason or self.tile_refusal(problem)

    def tile_refusal(self, problem: Problem) -> str | None:
        """Why no tile of the family can cut a problem; None where one can, or needs not."""
        try:
            self.choose(problem)
        except ValueError as error:
            return str(error)
        return None

    def candidates(self, problem: Problem) -> tuple[Candidate, ...]:
        """Every tile of the family with its cost or refusal; none where there is no family."""
        return explain(problem.spec, problem.target, self.family) if self.family else ()

    def choose(self, problem: Problem) -> Tile | None:
        """The tile that should be the fastest, by the family's estimate; None without a family.

        Raises:
            ValueError: no tile is legal.
        """
        return choose(problem.spec, problem.target, self.family) if self.family else None
