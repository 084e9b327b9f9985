# SPDX-License-Identifier: Apache-2.0
"""Where a benchmark runs and with what: the part of a row that makes it repeatable."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import resnet_fast
from resnet_fast.benchmarking.rows import Environment
from resnet_fast.comparison.measure import processor_name

ROOT = Path(resnet_fast.__file__).parent.parent  # of a checkout
# Words of a processor's name that do not tell it apart.
COMMON = {"intel", "amd", "cpu", "processor", "nvidia", "geforce", "core", "with", "r", "tm"}


def environment(device: torch.device) -> Environment:
    """The facts of this machine, as it is now."""
    cuda = device.type == "cuda"
    return Environment(
        device=torch.cuda.get_device_name(device) if cuda else processor_name(),
        kind=device.type,
        threads=torch.get_num_threads(),
        clocks=clocks_of(device),
        driver=_gpu_fact(device, "driver_version") if cuda else "",
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        cudnn=str(torch.backends.cudnn.version() or "") if cuda else "",
        resnet_fast=resnet_fast.__version__,
        commit=commit(),
    )


def clocks_of(device: torch.device) -> str:
    """The clocks as they are now, as the machine tells them; "" where it does not."""
    return _gpu_fact(device, "clocks.sm,clocks.mem") if device.type == "cuda" else _cpu_clock()


def machine_name(facts: Environment) -> str:
    """A folder's name for results, of the processor and no host: "cpu-xeon-2-threads"."""
    words = re.findall(r"[a-z0-9]+", facts.device.partition("@")[0].lower())
    kept = [word for word in words if word not in COMMON] or ["unknown"]
    if facts.kind == "cuda":
        return "gpu-" + "-".join(kept)
    return "-".join(["cpu", *kept, str(facts.threads), "threads"])


def commit() -> str:
    """The checkout's commit, "-dirty" if files differ from it; "" where there is no checkout."""
    head = _said("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if not head or not (ROOT / ".git").exists():
        return ""
    changed = _said("git", "-C", str(ROOT), "status", "--porcelain", "--", "resnet_fast", "csrc")
    return head + ("-dirty" if changed else "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu_clock() -> str:
    """The fastest core's clock as Linux tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    speeds = [float(mhz) for mhz in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, re.MULTILINE)]
    return f"{max(speeds):.0f} MHz" if speeds else ""


def _gpu_fact(device: torch.device, query: str) -> str:
    # By its identity: CUDA_VISIBLE_DEVICES gives torch other numbers than nvidia-smi has.
    identity = torch.cuda.get_device_properties(device).uuid
    form = ("--format=csv,noheader", f"--id=GPU-{identity}")
    return _said("nvidia-smi", f"--query-gpu={query}", *form) or "unknown"


def _said(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
