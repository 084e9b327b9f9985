# SPDX-License-Identifier: Apache-2.0
"""Measured choices: which backend and tile was fastest, kept in one small file per GPU.

`resnet-fast tune` writes the file, `table.plan` looks choices up when it meets a problem for the
first time; nothing is measured, and no file is read, in any later call. A choice is as good as
what it was measured with, so a file names the versions of torch, triton, this package and its
extension, and one that names others is refused as a whole, with one warning.

The folder is RESNET_FAST_CACHE, or else `resnet_fast` in the user's cache folder.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from resnet_fast import _env
from resnet_fast.dispatch.heuristics import Candidate
from resnet_fast.spec import Spec, Tile

FORMAT = 2
SUFFIX = ".tuned.json"
LOCK = ".lock"  # stays in the folder: removed, it could not be waited for
LOCK_SECONDS = 60  # it is held for milliseconds: longer means that its owner hangs


@dataclass(frozen=True, slots=True)
class Choice:
    """The fastest that one backend could do.

    Args:
        backend: its name.
        tile: the tile as it prints, split included; "" for a backend that has none.
        microseconds: median of the measured times.
    """

    backend: str
    tile: str
    microseconds: float

    def __str__(self) -> str:
        return f"{self.backend} {self.tile}".strip()


Choices = tuple[Choice, ...]  # the one to take first


def measured(gpu: str, op: str, spec: Spec) -> Choices:
    """The measured choices for an op on the GPU of that name, the one to take first; or none."""
    return _loaded(gpu).get(_key(op, spec), ()) if gpu else ()


def _key(op: str, spec: Spec) -> str:
    """An op and what it computes, but for what makes no difference: TF32 matters to float32."""
    text = f"{op}: {spec!r}"
    return text if spec.dtype == "float32" else text.replace("precision='ieee'", "precision='tf32'")


def tile_of(choices: Choices, backend: str, candidates: Iterable[Candidate]) -> Tile | None:
    """The tile that was measured for a backend, as its table has it now.

    None for a tile that is no longer in the table, or no longer legal: the chooser takes another.
    """
    found = next((choice.tile for choice in choices if choice.backend == backend), "")
    legal = (candidate.tile for candidate in candidates if candidate.refusal is None)
    return next((tile for tile in legal if str(tile) == found), None)


def store(gpu: str, choices: dict[tuple[str, Spec], Choices]) -> Path:
    """Add to, or replace in, what is kept for a GPU; where it was written.

    The file is replaced as a whole or not at all, so that one who reads it meanwhile sees no half;
    and two that write at the same time lose nothing, as one waits for the other.

    Raises:
        OSError: the folder cannot be written, or another process keeps it locked.
    """
    path = path_of(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        kept, _ = _read(path, gpu)
        kept |= {_key(op, spec): found for (op, spec), found in choices.items()}
        _replace(path, gpu, kept)
    _loaded.cache_clear()
    return path


def _locked(folder: Path):
    """The folder as one's own, as long as the context is open."""
    from filelock import FileLock

    return FileLock(folder / LOCK, timeout=LOCK_SECONDS)


def _replace(path: Path, gpu: str, kept: dict[str, Choices]) -> None:
    content = {
        "format": FORMAT,
        "gpu": gpu,
        "versions": versions(),
        "choices": {key: [asdict(choice) for choice in found] for key, found in kept.items()},
    }
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def clear() -> list[Path]:
    """Remove what is kept for every GPU; the files that were removed."""
    folder = _env.cache_folder()
    files = sorted(folder.glob(f"*{SUFFIX}")) if folder and folder.is_dir() else []
    for file in files:
        file.unlink(missing_ok=True)
    _loaded.cache_clear()
    return files


def path_of(gpu: str) -> Path:
    """The file for the GPU of that name.

    Raises:
        OSError: there is no folder: no home, and RESNET_FAST_CACHE is not set.
    """
    folder = _env.cache_folder()
    if folder is None:
        raise OSError("no folder for measured choices: set RESNET_FAST_CACHE to one")
    return folder / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}{SUFFIX}"


@functools.cache
def versions() -> dict[str, str]:
    """What a time depends on beside the problem and the GPU."""
    return {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "resnet_fast": _version("resnet_fast"),
        "extension": _extension(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _extension() -> str:
    """The extension by a hash of its file: rebuilt kernels are other kernels."""
    from resnet_fast.kernels import cuda

    if cuda.missing():
        return "none"
    return hashlib.sha256(Path(cuda.module().__file__).read_bytes()).hexdigest()[:12]


@functools.cache
def _loaded(gpu: str) -> dict[str, Choices]:
    try:
        path = path_of(gpu)
    except OSError:
        return {}
    choices, fault = _read(path, gpu)
    if fault:
        advice = "the heuristics choose; run resnet-fast tune to measure anew"
        warnings.warn(f"resnet_fast: {path} is not used: {fault}; {advice}", stacklevel=2)
    return choices


def _read(path: Path, gpu: str) -> tuple[dict[str, Choices], str]:
    """What a file holds, or why it is not used."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}, ""
    except (OSError, UnicodeDecodeError) as error:
        return {}, f"it cannot be read ({error})"
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            return {}, f"it has format {content['format']}, this version reads {FORMAT}"
        if content["gpu"] != gpu:
            return {}, f"it was measured on {content['gpu']}, this is {gpu}"
        then, now = content["versions"], versions()
        if then != now:
            other = [name for name in now if then.get(name) != now[name]]
            facts = [f"{name} {then.get(name)}, here it is {now[name]}" for name in other]
            return {}, f"it was measured with {'; '.join(facts)}"
        found = content["choices"].items()
        return {key: tuple(map(_from_json, choices)) for key, choices in found}, ""
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return {}, f"it is damaged ({type(error).__name__}: {error})"


def _from_json(entry: dict) -> Choice:
    return Choice(str(entry["backend"]), str(entry["tile"]), float(entry["microseconds"]))
