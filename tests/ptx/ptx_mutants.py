# SPDX-License-Identifier: Apache-2.0
"""Mutants of PTX text: a synchronization deleted, a shared offset moved, a bound off by one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from softgpu import ptx

LOOSER = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}


def _delete(pattern: str):
    return lambda line: "" if re.search(pattern, line) else None


def _skip_wait(line: str) -> str | None:
    """A wait on an mbarrier that always succeeds at once."""
    found = re.search(r"mbarrier\.try_wait\S* (\w+), ", line)
    return f"setp.eq.u32 {found[1]}, 0, 0;" if found else None


def _move_offset(line: str) -> str | None:
    """Shared addresses and wgmma descriptors by 16 bytes."""
    if re.search(r"add\.s64\s.*, 46116862\d+;", line):  # a descriptor counts in 16 bytes
        return re.sub(r"(46116862\d+);", lambda m: f"{int(m[1]) + 1};", line)
    if not re.search(r"(ld|st)\.shared|ldmatrix|stmatrix|cp\.async\.c[ag]", line):
        return None
    return re.sub(
        r"\[\s*(%\w+)\s*(?:\+\s*(\d+))?\s*\]",
        lambda m: f"[{m[1]}+{int(m[2] or 0) + 16}]",
        line,
        count=1,
    )


def _loosen(line: str) -> str | None:
    found = re.search(r"setp\.(lt|le|gt|ge)\.[su]32", line)
    return line.replace(f"setp.{found[1]}", f"setp.{LOOSER[found[1]]}") if found else None


MUTATIONS = {
    "no bar.sync": _delete(r"\bbar\.sync"),
    "no wait_group": _delete(r"(cp\.async|wgmma)(\.bulk)?\.wait_group|cp\.async\.wait_all"),
    "no mbarrier wait": _skip_wait,
    "no fence": _delete(r"\bfence\.|wgmma\.fence"),
    "shared offset + 16": _move_offset,
    "bound off by one": _loosen,
}


def mutants(text: str, name: str, limit: int, executed: set[int]) -> Iterator[tuple[str, str, str]]:
    """(site, mutated text, probe) of at most `limit` executed sites, spread over the text.

    The probe traps where a bound is met exactly: where it does not, the mutant changes nothing.
    """
    lines = text.split("\n")
    changed = [(i, MUTATIONS[name](line)) for i, line in enumerate(lines) if i + 1 in executed]
    sites = [(i, new) for i, new in changed if new is not None]
    step = max(1, -(-len(sites) // limit))

    def with_line(i, new):
        return "\n".join([*lines[:i], new, *lines[i + 1 :]])

    for i, new in sites[::step]:
        probe = ""
        if found := re.search(r"setp\.\w\w\.(\w+)\s+\S+, (\S+), (\S+);", lines[i]):
            test = "{{ .reg .pred met; setp.eq.{} met, {}, {}; @met trap; }} ".format(
                *found.groups()
            )
            probe = with_line(i, test + lines[i])
        yield f"{i + 1}: {lines[i].strip()}", with_line(i, new), probe


@dataclass
class Tally:
    """What became of a kernel's mutants; `alive` has the sites of survivors by mutation."""

    made: int = 0
    caught: int = 0
    idle: int = 0
    alive: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"{self.made} mutants, {self.caught} caught, "
            f"{self.idle} bounds that no shape meets exactly, "
            f"{self.made - self.caught - self.idle} that change nothing"
        )

    def unexplained(self, explained: dict[str, tuple[int, str]]) -> dict[str, list[str]]:
        """Mutations of which more survive than `explained` has by (count, reason)."""
        return {
            mutation: sites
            for mutation, sites in self.alive.items()
            if len(sites) > explained.get(mutation, (0, ""))[0]
        }


def hunt(case) -> Tally:
    """Run every mutant of a kernel at all of its shapes.

    Args: case, with `text`, `shapes`, `sites` (at most so many of a mutation), and
        `check(text, shape)`, which returns the run or raises PtxError or AssertionError.
    """
    executed = {line for shape in case.shapes for line in case.check(case.text, shape).lines}
    tally = Tally()
    for mutation in MUTATIONS:
        for site, text, probe in mutants(case.text, mutation, case.sites, executed):
            tally.made += 1
            if not survives(case, text):
                tally.caught += 1
            elif probe and survives(case, probe):
                tally.idle += 1
            else:
                tally.alive.setdefault(mutation, []).append(site)
    return tally


def survives(case, text: str) -> bool:
    for shape in case.shapes:
        try:
            case.check(text, shape)
        except (ptx.PtxError, AssertionError):
            return False
    return True
