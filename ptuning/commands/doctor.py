"""`python -m ptuning doctor`: what this machine has, and what every command would pick on it.

Each pick comes from the code that makes it in a run. Nothing is changed, downloaded or written.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import time
import tomllib
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from packaging.requirements import Requirement
from transformers import TrainingArguments

from ptuning.data.dataset import default_cache_dir
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.config import ChatGLMConfig
from ptuning.model.quantization.backends import (
    AUTO,
    BackendReport,
    pick_backend,
    report_backends,
)
from ptuning.tunings.loading import choose_dtype

DISTRIBUTION = "chatglm-ptuning"
PROJECT_FILE = Path(__file__).resolve().parents[2] / "pyproject.toml"
ALWAYS = "all commands"
NANO, PUBLISHED_BASE = "ptuning/nano/weights", "THUDM/chatglm-6b"  # bases of train.sh
MATRIX_SIZE = 512  # rows and columns of the matrices that are timed
NO_BACKEND = "none: "  # before the reason, in place of a name


class Package(NamedTuple):
    """A package that this project names; found is None where it is not installed."""

    name: str
    needed_for: str  # ALWAYS, or the extra that names it
    wanted: str  # version range; "" for any
    found: str | None
    fits: bool

    @property
    def fault(self) -> str:
        """What is wrong with the package, "" if nothing is."""
        return "" if self.fits else "not installed" if self.found is None else "wrong version"


class Device(NamedTuple):
    """A processor that torch can use; name is torch's: cpu, cuda:0."""

    name: str
    hardware: str
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Defaults:
    """What a command takes where nothing is typed."""

    device: str
    base_dtype: str
    attention: str
    int4_backend: str
    int8_backend: str
    token_cache: str
    train_script_base: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found; missing lists what a run needs and does not have."""

    versions: dict[str, str]
    packages: list[Package]
    devices: list[Device]
    cpu_speed: dict[str, float]  # of a matrix product; float32 is 1
    backends: list[BackendReport]
    defaults: Defaults
    notes: list[str]
    missing: list[str] = field(default_factory=list)


def run(arguments: argparse.Namespace) -> int:
    """Print the diagnosis; return 1 with --strict when something needed is missing, else 0."""
    diagnosis = diagnose()
    if arguments.json:
        values = asdict(diagnosis) | {
            name: [record._asdict() for record in getattr(diagnosis, name)]
            for name in ("packages", "devices", "backends")
        }
        sys.stdout.write(json.dumps(values, ensure_ascii=False, indent=2) + "\n")
    else:
        sys.stdout.write(as_text(diagnosis))
    return 1 if arguments.strict and diagnosis.missing else 0


def diagnose() -> Diagnosis:
    """Look at packages, devices and back ends, and ask for every default."""
    device = default_device()
    dtype = choose_dtype(device, None)
    cache = default_cache_dir()
    defaults = Defaults(
        device=str(device),
        base_dtype=short(dtype),
        attention=default_attention(),
        int4_backend=picked_backend(device, dtype, 4),
        int8_backend=picked_backend(device, dtype, 8),
        token_cache=str(cache),
        train_script_base=PUBLISHED_BASE if torch.cuda.is_available() else NANO,
    )
    diagnosis = Diagnosis(
        versions={
            "ptuning": own_version(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "CUDA of torch": str(torch.version.cuda or "none: a build for CPUs"),
        },
        packages=find_packages(),
        devices=find_devices(),
        cpu_speed=relative_cpu_speed(),
        backends=report_backends(device, dtype),
        defaults=defaults,
        notes=find_notes(),
    )
    for package in diagnosis.packages:
        if package.needed_for == ALWAYS and not package.fits:
            wanted = f"{package.name}{package.wanted}"
            found = package.found or "not installed"
            diagnosis.missing.append(f"{wanted} ({found}): pip install '{wanted}'")
    for bits, picked in ((4, defaults.int4_backend), (8, defaults.int8_backend)):
        if picked.startswith(NO_BACKEND):
            diagnosis.missing.append(f"a back end for int{bits} weights on {device}")
    if not is_writable(cache):
        diagnosis.missing.append(
            f"a token cache that can be written ({cache} cannot): set PTUNING_CACHE to a folder"
        )
    return diagnosis


def default_device() -> torch.device:
    """Return the device that main.py trains on where no flag says otherwise."""
    try:
        return TrainingArguments(output_dir="unused", report_to="none").device
    except ImportError:  # accelerate is missing, as find_packages reports: nothing can train
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_attention() -> str:
    """Return the attention implementation that a model gets by default."""
    config = ChatGLMConfig(
        vocab_size=8, hidden_size=8, num_layers=1, num_attention_heads=1, inner_hidden_size=8
    )
    return str(ChatGLMForConditionalGeneration(config).config._attn_implementation)


def picked_backend(device: torch.device, dtype: torch.dtype, bits: int) -> str:
    """Return the name of the back end that auto takes, or why there is none."""
    try:
        return pick_backend(AUTO, device, dtype, bits).name
    except ValueError as error:
        return f"{NO_BACKEND}{error}"


def own_version() -> str:
    """Return this project's version, from pyproject.toml in a checkout."""
    if PROJECT_FILE.is_file():
        return str(read_project()["version"])
    return metadata.version(DISTRIBUTION)


def read_project() -> dict[str, Any]:
    """Return the [project] table of pyproject.toml."""
    project: dict[str, Any] = tomllib.loads(PROJECT_FILE.read_text(encoding="utf-8"))["project"]
    return project


def declared_requirements() -> list[tuple[str, Requirement]]:
    """Return (what it is for, requirement) of every dependency that this project names."""
    if PROJECT_FILE.is_file():
        project = read_project()
        lines = {ALWAYS: project["dependencies"], **project["optional-dependencies"]}
        return [(use, Requirement(line)) for use, some in lines.items() for line in some]
    found = []  # installed: the same lines, with the extra as a marker
    for line in metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(line)
        extra = str(requirement.marker or "").partition("extra == ")[2].strip("\"'")
        found.append((extra or ALWAYS, requirement))
    return found


def find_packages() -> list[Package]:
    """Return the packages that this project names, those of its own checks left out."""
    requirements = [(use, needed) for use, needed in declared_requirements() if use != "dev"]
    # A CUDA build of torch brings its own Triton, so no list of ours names it.
    requirements.append(("cuda", Requirement("triton")))
    packages = []
    for use, requirement in requirements:
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = None
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        packages.append(Package(requirement.name, use, str(requirement.specifier), found, fits))
    return packages


def find_devices() -> list[Device]:
    """Return the CPU and every accelerator that torch sees."""
    memory = psutil.virtual_memory()
    hardware = (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    devices = [Device("cpu", hardware, memory.total, memory.available)]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        hardware = f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}"
        devices.append(Device(f"cuda:{index}", hardware, total, free))
    for name in ("mps", "xpu"):
        if getattr(torch, name).is_available():
            devices.append(Device(name, f"{name} of torch", memory.total, memory.available))
    return devices


def relative_cpu_speed() -> dict[str, float]:
    """Return the speed of a matrix product by dtype, relative to float32.

    A number far below 1 means that the CPU emulates the dtype.
    """
    times_s = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        matrix = torch.ones(MATRIX_SIZE, MATRIX_SIZE, dtype=dtype)
        runs_s = []
        for _ in range(5):  # the best counts: the first also warms up
            started = time.perf_counter()
            torch.mm(matrix, matrix)
            runs_s.append(time.perf_counter() - started)
        times_s[short(dtype)] = min(runs_s)
    return {name: round(times_s["float32"] / taken, 3) for name, taken in times_s.items()}


def find_notes() -> list[str]:
    """Return remarks that need no action."""
    notes = []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        notes.append(f"CUDA_VISIBLE_DEVICES is {visible!r}: torch sees only those GPUs.")
    has_driver = shutil.which("nvidia-smi") is not None
    if has_driver and not torch.cuda.is_available() and visible != "":
        notes.append(
            f"nvidia-smi is installed, but torch {torch.__version__} sees no GPU: install a CUDA "
            "build of torch that fits the driver."
        )
    return notes


def is_writable(folder: Path) -> bool:
    """Return whether folder, or its nearest existing parent, can be written."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


def short(dtype: torch.dtype) -> str:
    """Return a dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def table(rows: list[tuple[str, ...]]) -> str:
    """Align the columns of rows, indented by two.

    >>> table([("a", "1"), ("long", "2")])
    '  a     1\\n  long  2\\n'
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return "".join(f"  {line.rstrip()}\n" for line in lines)


def as_text(diagnosis: Diagnosis) -> str:
    """Return the diagnosis as aligned text; sizes are in GB of 10**9 bytes."""
    defaults = diagnosis.defaults
    parts: dict[str, list[tuple[str, ...]]] = {
        "Versions": list(diagnosis.versions.items()),
        "Packages": [
            (p.name, p.found or "-", p.wanted, p.needed_for, p.fault) for p in diagnosis.packages
        ],
        "Devices": [
            (d.name, f"{d.free_bytes / 1e9:.1f} of {d.memory_bytes / 1e9:.1f} GB free", d.hardware)
            for d in diagnosis.devices
        ],
        f"Speed of a {MATRIX_SIZE} x {MATRIX_SIZE} product on the CPU, float32 = 1": [
            (name, f"{value:.2f}") for name, value in diagnosis.cpu_speed.items()
        ],
        f"Back ends of int4 and int8 weights, for {defaults.base_dtype} on {defaults.device}": [
            (b.name, "available" if b.available else f"unavailable: {b.reason}")
            for b in diagnosis.backends
        ],
        "Defaults of main.py, train.sh and evaluate.sh": [
            ("device", defaults.device),
            ("base dtype", f"{defaults.base_dtype} (--bf16 or --fp16 to change)"),
            ("attention", defaults.attention),
            ("--quantization_bit 4", defaults.int4_backend),
            ("--quantization_bit 8", defaults.int8_backend),
            ("token cache", defaults.token_cache),
            ("base of train.sh", f"{defaults.train_script_base} (MODEL=... to change)"),
        ],
        "Defaults of python -m ptuning convert and export": [("device", "cpu")],
    }
    text = "\n".join(f"{title}\n{table(rows)}" for title, rows in parts.items())
    notes = "".join(f"\nNote: {note}\n" for note in diagnosis.notes)
    missing = "".join(f"\nNeeded: {line}\n" for line in diagnosis.missing)
    return text + notes + (missing or "\nNothing that is needed is missing.\n")
