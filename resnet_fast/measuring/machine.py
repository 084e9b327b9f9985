# SPDX-License-Identifier: Apache-2.0
"""What something was measured on and with: the part of a result that makes it repeatable."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import resnet_fast

ROOT = Path(resnet_fast.__file__).parent.parent  # of a checkout
CPUINFO = Path("/proc/cpuinfo")
# Words of a processor's name that do not tell it apart.
COMMON = {"intel", "amd", "cpu", "processor", "nvidia", "geforce", "core", "with", "r", "tm"}


@dataclass(frozen=True, slots=True)
class Environment:
    """Where and with what something was measured; empty text where a thing is absent.

    Args:
        device: the processor's or GPU's name.
        kind: "cpu" or "cuda".
        threads: of torch on the CPU.
        clocks: as the machine tells them; of a row, right after its rounds.
        driver: of the GPU.
        commit: of the checkout, with "-dirty" where files differ from it.
        processor: beside a GPU.
    """

    device: str
    kind: str
    threads: int
    clocks: str
    driver: str
    python: str
    torch: str
    triton: str
    cudnn: str
    resnet_fast: str
    commit: str
    processor: str = ""

    def named(self) -> dict[str, str]:
        """All that is known, by name, in the order in which it matters."""
        facts = asdict(self)
        kind, device = facts.pop("kind"), facts.pop("device")
        known = {name: str(value) for name, value in facts.items() if value}
        return {"gpu" if kind == "cuda" else "processor": device} | known

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.named().items())


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
        triton=version_of("triton"),
        cudnn=str(torch.backends.cudnn.version() or "") if cuda else "",
        resnet_fast=resnet_fast.__version__,
        commit=commit(),
        processor=processor_name() if cuda else "",
    )


def processor_name() -> str:
    """The CPU's name as its maker gives it, told apart by numbers, and what it computes with."""
    facts: dict[str, str] = {}
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    if not re.search(r"\d", name) and "model" in facts:  # a virtual machine's, as a rule
        name += f" (family {facts.get('cpu family', '?')}, model {facts['model']})"
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def pick_device(device: str) -> torch.device:
    """The device that a name stands for; "auto" is a GPU if there is one.

    Raises:
        ValueError: torch knows no such device, or has none here; or nothing is timed on its kind.
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


def clocks_of(device: torch.device) -> str:
    """The clocks as they are now, as the machine tells them; "" where it does not."""
    return _gpu_fact(device, "clocks.sm,clocks.mem") if device.type == "cuda" else _cpu_clock()


def machine_name(facts: Environment) -> str:
    """A folder's name for results, of the processor and no host: "cpu-xeon-2-threads"."""
    words = re.findall(r"[a-z0-9]+", re.split("@| [(]|,", facts.device)[0].lower())
    kept = [word for word in words if word not in COMMON] or ["unknown"]
    if facts.kind == "cuda":
        return "gpu-" + "-".join(kept)
    return "-".join(["cpu", *kept, str(facts.threads), "threads"])


def commit() -> str:
    """The checkout's commit, "-dirty" if files differ from it; "" outside of a checkout."""
    head = _said("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if not head or not (ROOT / ".git").exists():
        return ""
    changed = _said("git", "-C", str(ROOT), "status", "--porcelain", "--", "resnet_fast", "csrc")
    return head + ("-dirty" if changed else "")


def version_of(package: str) -> str:
    """The version that is installed; "" where it is not."""
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
