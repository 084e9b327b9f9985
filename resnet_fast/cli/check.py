# SPDX-License-Identifier: Apache-2.0
"""`resnet-fast check`: what this machine has, what serves which op, and why the others do not."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict

from resnet_fast._table import Column, Table
from resnet_fast.cli import arguments, files, terminal
from resnet_fast.cli.status import AGREES
from resnet_fast.machine import Fact, Service

TEXTS = {
    "help": "what this machine has, which backend serves which op, and why the others do not",
    "description": "Print what this machine has, which backend serves which op, and why the others "
    "do not. Nothing is compiled or timed.",
    "epilog": "examples:\n  resnet-fast check\n  resnet-fast check --json - | jq .services\n",
}


def add(command: argparse.ArgumentParser) -> None:
    """Its options."""
    arguments.add_outputs(command, "all that is printed", csv=False)


def run(options: argparse.Namespace) -> int:
    """What it does."""
    from resnet_fast import machine

    facts, services = machine.facts(), machine.services()
    whole = {"facts": [asdict(f) for f in facts], "services": [asdict(s) for s in services]}
    files.write(options, whole)
    if not files.takes_stdout(options):
        terminal.show([_facts(facts), "", _services(services), "", *_reasons(services)])
    return AGREES


def _facts(facts: list[Fact]) -> Table:
    table = Table("This machine", [Column(name, right=False) for name in ("", "", "")])
    for fact in facts:
        remedy = f"; to do: {fact.remedy}" if fact.remedy else ""
        table.add(fact.name, "yes" if fact.present else "no", text=fact.detail + remedy)
    return table


def _services(services: list[Service]) -> Table:
    """A row per op and device: the dtypes are columns."""
    dtypes = list(dict.fromkeys(service.dtype for service in services))
    names = ("op", "device", *dtypes)
    table = Table("Which backend serves which op", [Column(name, right=False) for name in names])
    for op, device in dict.fromkeys((service.op, service.device) for service in services):
        same = {s.dtype: s.backend for s in services if (s.op, s.device) == (op, device)}
        table.add(op, device, *(same[dtype] for dtype in dtypes))
    return table


def _reasons(services: list[Service]) -> Iterator[Table | str]:
    """Each reason once, with its backends and the part of the table that it concerns."""
    about: dict[str, dict[str, list[Service]]] = {}
    for service in services:
        for backend, reason in service.others.items():
            about.setdefault(reason, {}).setdefault(backend, []).append(service)
    table = Table("Why not the others", [Column("", right=False), Column("", right=False)])
    for reason, by_backend in about.items():
        concerned = next(iter(by_backend.values()))
        table.add(", ".join(by_backend), text=reason + _where(concerned, services))
    yield table


def _where(concerned: list[Service], services: list[Service]) -> str:
    """The ops and dtypes that a reason concerns, unless it concerns all of a device."""
    devices = {service.device for service in concerned}
    same = [service for service in services if service.device in devices]
    parts = []
    for name in ("dtype", "op"):
        mine = dict.fromkeys(getattr(service, name) for service in concerned)
        if len(mine) < len({getattr(service, name) for service in same}):
            parts.append(", ".join(mine))
    return f" ({'; '.join(parts)})" if parts else ""
