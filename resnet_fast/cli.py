# SPDX-License-Identifier: Apache-2.0
"""The command `resnet-fast`: check this machine, compare, profile a model, run the benchmarks.

Only this file and the `tables.py` speak to a terminal; the rest is computed elsewhere.
argparse, because it has options of several values (`--batch 1 8`), which click and typer have not.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import sys
from pathlib import Path

AGREES, DISAGREES, BAD_INPUT, SKIPPED, INTERRUPTED = 0, 1, 2, 3, 130
EXIT_STATUS = (
    "exit status: 0 all agree; 1 they do not; 2 bad input; 3 all agree, but some images could not "
    "be read"
)
BENCH_STATUS = (
    "exit status: 0 done, or nothing slower; 1 an answer failed its check, or something is slower "
    "by more than the noise; 2 bad input; 130 interrupted, with what was measured written"
)


class BadInput(Exception):
    """What the user asked for cannot be done; the text says why."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help(sys.stderr)
        return BAD_INPUT
    try:
        return options.run(options)
    except BadInput as error:
        print(f"resnet-fast: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("resnet-fast: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("resnet-fast", description="Drop-in ResNets that run fused.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    text = "what this machine has, which backend serves which op, and why the others do not"
    command = commands.add_parser("check", help=text, description=f"Print {text}.")
    command.set_defaults(run=check)
    text = "compare torchvision's model with ours: same weights, real photographs, one run"
    command = commands.add_parser("compare", help=text, description=text, epilog=EXIT_STATUS)
    command.set_defaults(run=compare)
    command.add_argument("model", metavar="MODEL", help="resnet18 ... wide_resnet101_2")
    add = command.add_argument
    add("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    dtypes = ["float32", "bfloat16"]
    help_dtype = "float32, bfloat16, float16; default: the first two"
    add("--dtype", nargs="+", default=dtypes, metavar="DTYPE", help=help_dtype)
    add("--images", nargs="+", default=[], metavar="FILE", help="default: photographs that ship")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    add("--weights", help="torchvision weights to download, or a state_dict file; default: random")
    add("--compile", action="append_const", const="compile", dest="peers",
        help="time torch.compile with freezing too")  # fmt: skip
    add("--openvino", action="append_const", const="openvino", dest="peers",
        help="time OpenVINO too, where it is installed")  # fmt: skip
    add("--seconds", type=float, default=6.0, help="timed seconds per setting; default: 6")
    add("--json", type=Path, metavar="FILE", help="write the result here too")
    _add_profile(commands)
    _add_bench(commands)
    return parser


def _add_profile(commands) -> None:
    text = "where a model's time goes: its layers, what bounds them, and what to try"
    command = commands.add_parser("profile", help=text, description=text)
    command.set_defaults(run=profile)
    command.add_argument("model", metavar="MODEL", help="resnet18 ... wide_resnet101_2")
    add = command.add_argument
    add("--batch", type=int, default=1, metavar="N", help="default: 1")
    add("--dtype", default="float32", help="float32 (the default), bfloat16 or float16")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    add("--layers", action="store_true", help="all layers in order, not the slowest alone")
    add("--compare", metavar="WHO", help="torchvision: the same layers' times there")
    add("--seconds", type=float, default=4.0, help="of timed runs; default: 4")
    add("--trace", type=Path, metavar="FILE", help="write a Chrome trace, for ui.perfetto.dev")
    add("--html", type=Path, metavar="FILE", help="write a page with the flame picture")
    add("--png", type=Path, metavar="FILE", help="write the flame picture")
    add("--json", type=Path, metavar="FILE", help="write the rows")


def _add_bench(commands: argparse._SubParsersAction) -> None:
    text = (
        "time our ops and models beside torch, cuDNN and other compilers, and write rows and a page"
    )
    command = commands.add_parser("bench", help=text, description=text, epilog=BENCH_STATUS)
    command.set_defaults(run=bench)
    add = command.add_argument
    add("suite", nargs="?", choices=("ops", "models", "all"), default="all", metavar="SUITE",
        help="ops, models or all; default: all")  # fmt: skip
    add("--quick", action="store_true", help="few cases: under three minutes on two cores")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    add("--providers", nargs="+", default=[], metavar="NAME", help="default: all of the device")
    add("--models", nargs="+", default=[], metavar="NAME", help="default: all, or two by --quick")
    add("--batch", type=int, nargs="+", default=[], metavar="N", help="default: 1 8 32 128 256")
    help_dtype = "float32, tf32, float16, bfloat16; default: all of the device"
    add("--dtype", nargs="+", default=[], metavar="DTYPE", help=help_dtype)
    add("--seconds", type=float, help="of timed rounds per case")
    help_out = "of the results; default: benchmarks/results/MACHINE"
    add("--out", type=Path, metavar="DIR", help=help_out)
    add("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"),
        help="measure nothing: hold two results (rows.json, rows.csv or their folders) "
        "against each other")  # fmt: skip


def check(options: argparse.Namespace) -> int:
    """The command `check`."""
    table_type = _rich().table.Table
    from resnet_fast import machine

    table = table_type("", "found", "detail", "to do", title="This machine")
    for fact in machine.facts():
        table.add_row(fact.name, "yes" if fact.present else "no", fact.detail, fact.remedy)
    console = _console(sys.stdout)
    console.print(table)
    headings = ("op", "device", "dtype", "served by", "why not the others")
    table = table_type(*headings, title="Which backend serves which op")
    for row in machine.services():
        why = "\n".join(f"{name}: {reason}" for name, reason in row.others.items())
        table.add_row(row.op, row.device, row.dtype, row.backend, why, end_section=True)
    console.print(table)
    return AGREES


def compare(options: argparse.Namespace) -> int:
    """The command `compare`."""
    _rich()
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        raise BadInput(f'{error}; pip install "resnet_fast[all]"') from None
    if min(options.batch) < 1 or options.seconds <= 0:
        raise BadInput("--batch and --seconds must be positive")
    _check_writable("--json", options.json)
    from resnet_fast.comparison import compare, photographs, tables

    notes = _console(sys.stderr)
    try:
        with notes.status("reading photographs") as status:
            result = compare(
                options.model,
                photographs.load(options.images),
                batches=options.batch,
                dtypes=options.dtype,
                device=options.device,
                weights=options.weights,
                peers=options.peers or (),
                seconds=options.seconds,
                progress=status.update,
            )
    except (ValueError, KeyError, OSError) as error:
        raise BadInput(str(error)) from error
    console = _console(sys.stdout)
    for part in tables.render(result):
        console.print(part, highlight=False)
    for name, reason in result.skipped.items():
        notes.print(f"skipped {name}: {reason}", style="yellow", highlight=False)
    if options.json is not None:
        options.json.write_text(json.dumps(result.to_json(), indent=2) + "\n")
    if not result.agrees:
        return DISAGREES
    return SKIPPED if result.skipped else AGREES


def bench(options: argparse.Namespace) -> int:
    """The command `bench`."""
    _rich()
    for package in ("torchvision", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise BadInput(f'{package} is not installed; pip install "resnet_fast[all]"')
    from resnet_fast import benchmarking
    from resnet_fast.benchmarking import command

    console, notes = _console(sys.stdout), _console(sys.stderr)
    try:
        if options.compare is not None:
            parts, slower = command.compare(*options.compare)
            for part in parts:
                console.print(part, highlight=False)
            return DISAGREES if slower else AGREES
        request = benchmarking.Request(
            suites=("ops", "models") if options.suite == "all" else (options.suite,),
            device=options.device,
            quick=options.quick,
            providers=options.providers,
            models=options.models,
            batches=options.batch,
            dtypes=options.dtype,
            seconds=options.seconds,
        )
        folder = command.writable_folder(options.out, request)
        with notes.status("starting") as status:
            results, files = command.measure(request, folder, status.update)
    except (ValueError, KeyError, OSError) as error:
        raise BadInput(str(error)) from error
    for part in command.render(results):
        console.print(part, highlight=False)
    notes.print("written: " + ", ".join(map(str, files)), highlight=False, soft_wrap=True)
    if not results.complete:
        return INTERRUPTED
    return DISAGREES if command.failed(results) else AGREES


def profile(options: argparse.Namespace) -> int:
    """The command `profile`."""
    if options.batch < 1 or options.seconds < 0:
        raise BadInput("--batch must be positive, and --seconds not negative")
    for name in ("trace", "html", "png", "json"):
        _check_writable(f"--{name}", getattr(options, name))
    if options.png is not None and importlib.util.find_spec("matplotlib") is None:
        raise BadInput('--png needs matplotlib; pip install "resnet_fast[bench]"')
    from resnet_fast.profiling import command

    with _progress() as tell:
        try:
            found = command.profile_by_name(
                options.model, options.batch, options.dtype, options.device, options.compare,
                options.seconds, tell,
            )  # fmt: skip
        except (ValueError, KeyError, MemoryError) as error:
            raise BadInput(str(error)) from error
    print(found.table(layers=options.layers))
    if options.trace is not None:
        options.trace.write_text(json.dumps(found.trace()))
    if options.html is not None:
        options.html.write_text(found.html())
    if options.png is not None:
        found.png(options.png)
    if options.json is not None:
        options.json.write_text(json.dumps(found.to_json(), indent=2) + "\n")
    return INTERRUPTED if found.interrupted else AGREES


@contextlib.contextmanager
def _progress():
    """What is being done, on one line of stderr; without rich, or away from a terminal, none."""
    if importlib.util.find_spec("rich") is None:
        yield lambda text: None
        return
    with _console(sys.stderr).status("") as status:
        yield status.update


def _check_writable(option: str, file: Path | None) -> None:
    """Refuse a file that cannot be written before the work, not after it."""
    if file is None:
        return
    there = file.exists()
    if file.is_dir() or not os.access(file if there else file.parent, os.W_OK):
        raise BadInput(f"{option}: {file} cannot be written")


def _rich():
    try:
        import rich.console
        import rich.table
    except ImportError as error:
        raise BadInput(f'{error}; pip install "resnet_fast[all]"') from None
    return rich


def _console(stream):
    # Away from a terminal the tables keep their whole width: logs and pipes have no columns.
    width = None if stream.isatty() else 160
    return _rich().console.Console(file=stream, width=width)


if __name__ == "__main__":
    sys.exit(main())
