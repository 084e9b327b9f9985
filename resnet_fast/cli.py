# SPDX-License-Identifier: Apache-2.0
"""The command `resnet-fast`: check this machine, compare, profile, bench, build the extension.

Only this file and the `tables.py` speak to a terminal; the rest is computed elsewhere.
argparse, because it has options of several values (`--batch 1 8`), which click and typer have not.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import sys
import sysconfig
from pathlib import Path

AGREES, DISAGREES, BAD_INPUT, SKIPPED, INTERRUPTED = 0, 1, 2, 3, 130
EXIT_STATUS = (
    "exit status: 0 all agree; 1 they do not; 2 bad input; 3 all agree, but some images could not "
    "be read"
)
BENCH_STATUS = (
    "exit status: 0 done, or nothing slower; 1 an answer failed its check, or something is slower "
    "by more than the noise; 2 bad input; 3 some rows have no time, as it says; 130 interrupted, "
    "with what was measured written"
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
    _tune_parser(commands)
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
    _add_build(commands)
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
    extent = command.add_mutually_exclusive_group()
    extent.add_argument("--quick", dest="extent", action="store_const", const="quick",
        default="usual", help="few cases: under three minutes on two cores")  # fmt: skip
    extent.add_argument("--full", dest="extent", action="store_const", const="full",
        help="all models, layers, batches and dtypes, autotuned: days on a GPU")  # fmt: skip
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    add("--providers", nargs="+", default=[], metavar="NAME", help="default: all of the device")
    add("--models", nargs="+", default=[], metavar="NAME", help="default: two, or all by --full")
    help_batch = "default: 1 8 32, or 1 8 32 128 256 by --full"
    add("--batch", type=int, nargs="+", default=[], metavar="N", help=help_batch)
    help_dtype = "float32, tf32, float16, bfloat16; default: two, or all of the device by --full"
    add("--dtype", nargs="+", default=[], metavar="DTYPE", help=help_dtype)
    add("--seconds", type=float, help="of timed rounds per case")
    help_out = "of the results; default: benchmarks/results/MACHINE"
    add("--out", type=Path, metavar="DIR", help=help_out)
    add("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"),
        help="measure nothing: hold two results (rows.json, rows.csv or their folders) "
        "against each other")  # fmt: skip


def _add_build(commands) -> None:
    text = "compile the CUDA C++ kernels for the torch that is installed; no GPU is needed"
    command = commands.add_parser("build", help=text, description=f"{text[0].upper()}{text[1:]}.",
        epilog="needs nvcc (of torch's CUDA major), g++, ninja and pybind11: "
        "pip install 'resnet_fast[build]'. exit status: 0 built; 2 not, and why")  # fmt: skip
    command.set_defaults(run=build)
    add = command.add_argument
    add("--arch", nargs="+", metavar="X.Y", type=_architecture, help="compute capabilities; "
        "default: 8.0 8.6 8.9 9.0 10.0 12.0; newer GPUs run the PTX of the first")  # fmt: skip
    add("--jobs", type=int, metavar="N", help="processes at a time; default: the usable cores")
    add("--into", type=Path, metavar="FOLDER", help="put the module there; default: the package")
    add("--verbose", action="store_true", help="print commands, and every kernel's registers")


def _architecture(text: str) -> int:
    if not re.fullmatch(r"\d+\.\d", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no compute capability such as 9.0")
    return int(text.replace(".", ""))


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
    if options.json is not None:
        options.json.write_text(json.dumps(result.to_json(), indent=2) + "\n")
    console = _console(sys.stdout)
    for part in tables.render(result):
        console.print(part, highlight=False)
    for name, reason in result.skipped.items():
        notes.print(f"skipped {name}: {reason}", style="yellow", highlight=False)
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
            suites=("models", "ops") if options.suite == "all" else (options.suite,),
            device=options.device,
            extent=options.extent,
            providers=options.providers,
            models=options.models,
            batches=options.batch,
            dtypes=options.dtype,
            seconds=options.seconds,
        )
        folder = command.writable_folder(options.out, request)
        notes.print("\n".join(command.announced(request)), highlight=False, soft_wrap=True)
        with notes.status("starting") as status:
            results, files = command.measure(request, folder, status.update)
    except (ValueError, KeyError, OSError) as error:
        raise BadInput(str(error)) from error
    for part in command.render(results):
        console.print(part, highlight=False)
    notes.print("written: " + ", ".join(map(str, files)), highlight=False, soft_wrap=True)
    untimed = command.untimed(results, request)
    for line in untimed:
        notes.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    if not results.complete:
        return INTERRUPTED
    if command.failed(results):
        return DISAGREES
    return SKIPPED if untimed else AGREES


def profile(options: argparse.Namespace) -> int:
    """The command `profile`."""
    if options.batch < 1 or not options.seconds >= 0:
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
    if options.trace is not None:  # files first: a reader of the table may close the pipe
        options.trace.write_text(json.dumps(found.trace()))
    if options.html is not None:
        options.html.write_text(found.html())
    if options.png is not None:
        found.png(options.png)
    if options.json is not None:
        options.json.write_text(json.dumps(found.to_json(), indent=2) + "\n")
    print(found.table(layers=options.layers))
    return INTERRUPTED if found.interrupted else AGREES


@contextlib.contextmanager
def _progress():
    """What is being done, on one line of stderr; without rich, or away from a terminal, none."""
    if importlib.util.find_spec("rich") is None:
        yield lambda text: None
        return
    with _console(sys.stderr).status("") as status:
        yield status.update


def build(options: argparse.Namespace) -> int:
    """The command `build`."""
    from resnet_fast import build as recipe

    if options.jobs is not None and options.jobs < 1:
        raise BadInput("--jobs must be positive")
    output = None
    if options.into is not None:
        output = options.into / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    try:
        toolchain = recipe.find()
        with _steps(sys.stderr) as progress:
            report = recipe.build(
                toolchain,
                architectures=options.arch,
                jobs=options.jobs,
                output=output,
                progress=progress,
                verbose=print if options.verbose else None,
            )
    except (recipe.BuildError, OSError) as error:
        raise BadInput(f"not built: {error}") from None
    print("\n".join(recipe.describe(report, every_kernel=options.verbose)))
    return AGREES


@contextlib.contextmanager
def _steps(stream):
    """Shows steps as they end: a bar at a terminal where rich is there, else a line for each."""
    try:
        from rich.progress import Progress
    except ImportError:
        Progress = None
    if Progress is None or not stream.isatty():
        yield lambda done, total, text: print(f"[{done}/{total}] {text}", file=stream, flush=True)
        return
    with Progress(console=_console(stream), transient=True) as bar:
        task = bar.add_task("compiling", total=None)
        yield lambda done, total, text: bar.update(
            task, completed=done, total=total, description=text
        )


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


def _tune_parser(commands) -> None:
    text = "measure which backend and tile is fastest for each convolution of a model, and keep it"
    more = "The choices are used from the next start on; a GPU is needed, except for --dry-run."
    command = commands.add_parser("tune", help=text, description=f"{text}. {more}")
    command.set_defaults(run=tune)
    add = command.add_argument
    add("model", metavar="MODEL", nargs="?", default="resnet50", help="default: resnet50")
    add("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    help_dtype = "float16, bfloat16, float32; default: float16"
    add("--dtype", nargs="+", default=["float16"], metavar="DTYPE", help=help_dtype)
    add("--backend", nargs="+", default=[], metavar="NAME", help="cuda, triton, aten; default: all")
    add("--seconds", type=float, default=1.0, help="of timing per convolution; default: 1")
    add("--device", default="cuda", help="cuda, cuda:1, ...")
    add("--dry-run", action="store_true", help="print the candidates, modelled; measure nothing")
    add("--arch", type=int, metavar="SM",
        help="for --dry-run: compute capability times ten; default: this GPU's, or 80")  # fmt: skip
    add("--clear", action="store_true", help="forget what was measured, on any GPU, and stop")


def tune(options: argparse.Namespace) -> int:
    """The command `tune`."""
    _rich()
    from resnet_fast import tune as tuner

    console, notes = _console(sys.stdout), _console(sys.stderr)
    try:
        if options.clear:
            files = tuner.clear()
            console.print("\n".join(f"removed {file}" for file in files) or "nothing was kept")
            return AGREES
        if min(options.batch) < 1 or options.seconds <= 0:
            raise BadInput("--batch and --seconds must be positive")
        tuner.check(options.backend, options.dtype)
        if options.dry_run:
            arch = options.arch or tuner.arch_here() or 80
            specs = tuner.convolutions(options.model, options.batch, options.dtype)
            console.print(_candidates_table(specs, arch, options.backend), highlight=False)
            return AGREES
        device = tuner.gpu(options.device)
        specs = tuner.convolutions(options.model, options.batch, options.dtype)
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error
    results, interrupted = [], False
    try:
        with notes.status("preparing") as status:
            for result in tuner.tune(
                specs, device, options.backend, options.seconds, status.update
            ):
                results.append(result)
                notes.print(f"{len(results)}/{len(specs)} {result.spec}", highlight=False)
    except KeyboardInterrupt:
        interrupted = True
    except OSError as error:
        raise BadInput(f"the choices cannot be kept: {error}") from error
    console.print(_results_table(results, device), highlight=False)
    for result in results:
        for candidate, fault in result.faults.items():
            notes.print(f"{result.spec}: {candidate}: {fault}", style="yellow", highlight=False)
    console.print(f"kept in {tuner.path_of(device)}", highlight=False)
    if interrupted:
        notes.print("resnet-fast: interrupted; what is in the table was kept")
        return INTERRUPTED
    return DISAGREES if any(result.faults for result in results) else AGREES


def _candidates_table(specs, arch: int, names):
    from resnet_fast import tune as tuner

    title = f"Candidates on sm_{arch}: modelled microseconds, nothing was measured"
    table = _rich().table.Table("convolution", "times", "candidate", "modelled us", title=title)
    for spec, count in specs.items():
        found = tuner.modelled(spec, arch, names)
        rows = [(str(candidate), f"{time:.1f}") for candidate, time in found.items()]
        for number, row in enumerate(rows or [("aten", "")]):
            table.add_row(*((str(spec), str(count)) if number == 0 else ("", "")), *row)
        table.add_section()
    return table


def _results_table(results, device):
    from resnet_fast import tune as tuner

    title = f"Measured on {tuner.name_of(device)}: medians in microseconds, L2 flushed"
    headings = ("convolution", "chosen", "us", "without measuring", "us", "ratio")
    table = _rich().table.Table(*headings, title=title)
    for result in results:
        if not result.choices:
            why = "none was right" if result.faults else "no other"
            table.add_row(str(result.spec), str(result.usual), why)
            continue
        best, usual = result.choices[0], result.timings.get(result.usual)
        chosen = str(tuner.Candidate(best.backend, best.tile))
        theirs = (f"{usual.median:.1f}", f"{best.microseconds / usual.median:.2f}") if usual else ()
        times = (f"{best.microseconds:.1f}", str(result.usual), *theirs)
        table.add_row(str(result.spec), chosen, *times)
    return table


if __name__ == "__main__":
    sys.exit(main())
