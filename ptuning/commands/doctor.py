"""`python -m ptuning doctor`: what this machine has, and what every command would pick on it.

Each pick is asked of the code that makes it in a run, so that what is printed is what happens.
Nothing is changed, fetched or written. Sizes are bytes inside, GB of 10**9 on the screen.
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
CHECKS_ONLY = "dev"  # the extra that no command needs
NANO = "ptuning/nano/weights"
PUBLISHED_BASE = "THUDM/chatglm-6b"
PRODUCT_SIZE = 512  # rows and columns of the matrices that are timed
NO_BACKEND = "none: "  # before the reason, in place of a name


@dataclass(frozen=True)
class Package:
    """A package this project names: found is None where it is not installed."""

    name: str
    needed_for: str  # "all commands", or the extra that names it
    wanted: str  # its range, empty for any version
    found: str | None
    fits: bool


@dataclass(frozen=True)
class Device:
    """A processor that torch can use."""

    name: str  # as torch writes it: cpu, cuda:0
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
    """Everything the doctor found; missing is what a run needs and has not got."""

    versions: dict[str, str]
    packages: list[Package]
    devices: list[Device]
    cpu_speed: dict[str, float]  # of a product, float32 is 1
    backends: list[BackendReport]
    defaults: Defaults
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def run(arguments: argparse.Namespace) -> int:
    """Print the diagnosis; 1 with --strict when something needed is missing, else 0."""
    diagnosis = diagnose()
    if arguments.json:
        values = asdict(diagnosis) | {"backends": [b._asdict() for b in diagnosis.backends]}
        text = json.dumps(values, ensure_ascii=False, indent=2) + "\n"
    else:
        text = as_text(diagnosis)
    sys.stdout.write(text)
    return 1 if arguments.strict and diagnosis.missing else 0


def diagnose() -> Diagnosis:
    """Look at packages, devices and back ends, and ask for every default."""
    device = default_device()
    dtype = choose_dtype(device, None)
    packages = find_packages()
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
        versions=find_versions(),
        packages=packages,
        devices=find_devices(),
        cpu_speed=relative_cpu_speed(),
        backends=report_backends(device, dtype),
        defaults=defaults,
        notes=find_notes(),
    )
    for package in packages:
        if package.needed_for == "all commands" and not package.fits:
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
    except ImportError:  # accelerate is missing, which find_packages reports: nothing can train
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_attention() -> str:
    """Return the attention implementation that a model gets where none is asked for."""
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


def find_versions() -> dict[str, str]:
    """Return the versions of what is not a package of ours, and of this project."""
    return {
        "ptuning": own_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "CUDA of torch": str(torch.version.cuda or "none: a build for CPUs"),
    }


def own_version() -> str:
    """Return this project's version, from its pyproject.toml in a checkout."""
    if PROJECT_FILE.is_file():
        return str(_project()["version"])
    return metadata.version(DISTRIBUTION)


def _project() -> dict[str, object]:
    project = tomllib.loads(PROJECT_FILE.read_text(encoding="utf-8"))["project"]
    assert isinstance(project, dict), "pyproject.toml has a [project] table"
    return project


def declared_requirements() -> list[tuple[str, Requirement]]:
    """Return (what it is for, requirement) of every dependency this project names."""
    if not PROJECT_FILE.is_file():  # installed: the same lists, with the extra as a marker
        return [_with_use(Requirement(line)) for line in metadata.requires(DISTRIBUTION) or ()]
    project = _project()
    needed, extras = project["dependencies"], project["optional-dependencies"]
    assert isinstance(needed, list), "dependencies is a list in pyproject.toml"
    assert isinstance(extras, dict), "optional-dependencies is a table in pyproject.toml"
    found = [("all commands", Requirement(line)) for line in needed]
    return found + [(extra, Requirement(line)) for extra, lines in extras.items() for line in lines]


def _with_use(requirement: Requirement) -> tuple[str, Requirement]:
    """Return what an installed project's requirement is for, read from its marker."""
    _, is_extra, name = str(requirement.marker or "").partition("extra == ")
    return (name.strip("\"'") if is_extra else "all commands", requirement)


def find_packages() -> list[Package]:
    """Return every package this project names, needed ones first, those of its checks left out."""
    requirements = [(use, r) for use, r in declared_requirements() if use != CHECKS_ONLY]
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
    """Return the CPU and every card that torch sees."""
    memory = psutil.virtual_memory()
    hardware = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    devices = [
        Device(
            "cpu",
            f"{hardware}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}",
            memory.total,
            memory.available,
        )
    ]
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
    """Return the speed of a matrix product in each dtype as a multiple of float32's.

    Every CPU computes in all three; a number far below 1 says that it emulates.
    """
    times_s = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        matrix = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype)
        runs_s = []
        for _ in range(5):  # the best counts: the first one also warms up
            started = time.perf_counter()
            torch.mm(matrix, matrix)
            runs_s.append(time.perf_counter() - started)
        times_s[short(dtype)] = min(runs_s)
    return {name: round(times_s["float32"] / taken, 3) for name, taken in times_s.items()}


def find_notes() -> list[str]:
    """Return what is worth knowing and stops nobody."""
    notes = []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        notes.append(f"CUDA_VISIBLE_DEVICES is {visible!r}: torch sees only those cards.")
    has_driver = shutil.which("nvidia-smi") is not None
    if has_driver and not torch.cuda.is_available() and visible != "":
        notes.append(
            f"nvidia-smi is here, but torch {torch.__version__} sees no card: install a CUDA build "
            "of torch that fits the driver."
        )
    return notes


def is_writable(folder: Path) -> bool:
    """Say whether folder, or the nearest folder above it that exists, can be written."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


def short(dtype: torch.dtype) -> str:
    """Return a dtype's name without `torch.`.

    >>> short(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def table(rows: list[tuple[str, ...]]) -> str:
    """Align the columns of rows, two blanks in front.

    >>> table([("a", "1"), ("long", "2")])
    '  a     1\\n  long  2\\n'
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "".join(f"  {line.rstrip()}\n" for line in lines)


def as_text(diagnosis: Diagnosis) -> str:
    """Return the diagnosis as aligned text."""
    parts: dict[str, list[tuple[str, ...]]] = {
        "Versions": list(diagnosis.versions.items()),
        "Packages": [
            (p.name, p.found or "-", p.wanted, p.needed_for, "" if p.fits else fault_of(p))
            for p in diagnosis.packages
        ],
        "Devices": [
            (d.name, f"{d.free_bytes / 1e9:.1f} of {d.memory_bytes / 1e9:.1f} GB free", d.hardware)
            for d in diagnosis.devices
        ],
        f"Speed of a {PRODUCT_SIZE} x {PRODUCT_SIZE} product on the CPU, float32 = 1": [
            (name, f"{value:.2f}") for name, value in diagnosis.cpu_speed.items()
        ],
        f"Back ends of int4 and int8 weights, for {diagnosis.defaults.base_dtype} on "
        f"{diagnosis.defaults.device}": [
            (b.name, "available" if b.available else f"unavailable: {b.reason}")
            for b in diagnosis.backends
        ],
        "Defaults of main.py, train.sh and evaluate.sh": [
            ("device", diagnosis.defaults.device),
            ("base dtype", f"{diagnosis.defaults.base_dtype} (--bf16 or --fp16 to change)"),
            ("attention", diagnosis.defaults.attention),
            ("--quantization_bit 4", diagnosis.defaults.int4_backend),
            ("--quantization_bit 8", diagnosis.defaults.int8_backend),
            ("token cache", diagnosis.defaults.token_cache),
            ("base of train.sh", f"{diagnosis.defaults.train_script_base} (MODEL=... to change)"),
        ],
        "Defaults of python -m ptuning convert and export": [("device", "cpu")],
    }
    text = "\n".join(f"{title}\n{table(rows)}" for title, rows in parts.items())
    notes = "".join(f"\nNote: {note}\n" for note in diagnosis.notes)
    missing = "".join(f"\nNeeded: {line}\n" for line in diagnosis.missing)
    return text + notes + (missing or "\nNothing that is needed is missing.\n")


def fault_of(package: Package) -> str:
    """Say in a word what is wrong with a package."""
    return "not installed" if package.found is None else "wrong version"
