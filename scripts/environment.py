"""Find a Python that has every dependency, or create `.venv`.

Run first by every shell script, so it uses only the standard library.
    python scripts/environment.py choose run   print an interpreter that can run the project
    python scripts/environment.py choose dev   the same, with the tools of `make check`
    python scripts/environment.py check run    name what is missing and exit with status 1, if any
    python scripts/environment.py cuda         print the number of CUDA devices that torch can use
`.venv/installed.lock` says what `.venv` holds: it is empty during an installation and gets the
lock's text when that has succeeded, so an interrupted one is never taken for complete.
"""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCKS = {"run": ["requirements.lock"], "dev": ["requirements.lock", "requirements-dev.lock"]}
STAMP = "installed.lock"
LOG = "install.log"
PROGRESS_S = 15.0  # between two progress lines where the output is not a terminal
LOG_TAIL_LINES = 15
HINTS = {  # message of pip -> advice; the first match counts
    "No space left on device": "The disk is full: free 2 GB (6 GB for a CUDA build of torch).",
    "Retrying (Retry(": (
        "The package index was not reached: check the network, or set PIP_INDEX_URL or PIP_PROXY."
    ),
    "No matching distribution found": (
        "The index has no such build for this Python and platform. The lock is for Python 3.11 to\n"
        "3.14 on Linux, Windows or an Apple-silicon Mac; elsewhere install the ranges in\n"
        "pyproject.toml into an environment of your own and give it: PYTHON=/path/to/python"
    ),
}


class SetupError(Exception):
    """An error that the user can fix; its text says what was found and what to type."""


def say(text: str) -> None:
    """Write a line to stderr; stdout is reserved for the interpreter's path."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def read_requirements(project_file: Path, group: str) -> list[str]:
    """Return the requirements in pyproject.toml; "dev" adds those of the checks."""
    project = tomllib.loads(project_file.read_text(encoding="utf-8"))["project"]
    requirements = list(project["dependencies"])
    if group == "dev":
        requirements += project["optional-dependencies"]["dev"]
    return requirements


def find_unmet(requirements: list[str]) -> dict[str, str]:
    """Return the requirements that this interpreter does not meet, with what was found instead.

    >>> find_unmet(["no-such-package>=1"])
    {'no-such-package>=1': 'missing'}
    """
    requirement_type = _requirement_type()
    if requirement_type is None:
        return dict.fromkeys(requirements, "missing")
    unmet = {}
    for text in requirements:
        requirement = requirement_type(text)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            unmet[text] = "missing"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            unmet[text] = f"has {version}"
    return unmet


def _requirement_type() -> type[Any] | None:
    """Return packaging's Requirement, or pip's copy; None in a Python that has neither."""
    for name in ("packaging.requirements", "pip._vendor.packaging.requirements"):
        try:
            requirement_type: type[Any] = importlib.import_module(name).Requirement
        except ModuleNotFoundError:
            continue
        return requirement_type
    return None


def check(root: Path, group: str) -> None:
    """Raise an error that names what this interpreter lacks and the command that installs it."""
    unmet = find_unmet(read_requirements(root / "pyproject.toml", group))
    if unmet:
        lacks = ", ".join(f"{requirement} ({found})" for requirement, found in unmet.items())
        command = shlex.join([sys.executable, "-m", "pip", "install", *unmet])
        raise SetupError(
            f"PYTHON={sys.executable} lacks {lacks}; nothing is installed into a Python you name.\n"
            f"Type: {command}\nor leave PYTHON out, and .venv is used."
        )


def venv_python(venv: Path) -> Path:
    """Return the path of the interpreter in a virtual environment on this system."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def lock_text(root: Path, group: str) -> str:
    """Return the group's lock files, joined; the text of "dev" begins with that of "run"."""
    return "".join((root / name).read_text(encoding="utf-8") for name in LOCKS[group])


def read_stamp(venv: Path) -> str | None:
    """Return what `.venv` holds: "" if incomplete, None if it was not created here."""
    stamp = venv / STAMP
    return stamp.read_text(encoding="utf-8") if stamp.is_file() else None


def write_stamp(venv: Path, text: str) -> None:
    """Record atomically what `.venv` holds."""
    temporary = venv / f".{STAMP}.{os.getpid()}"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, venv / STAMP)


def is_ready(root: Path, group: str) -> bool:
    """Return whether `.venv` has what the group needs, by its stamp and its interpreter."""
    stamp = read_stamp(root / ".venv")
    if stamp is not None and not stamp.startswith(lock_text(root, group)):
        return False
    return _runs(venv_python(root / ".venv"), __file__, "check", group)


def choose(root: Path, group: str) -> Path:
    """Return the Python of a complete `.venv`, else this one if it suffices, else a new one."""
    venv = root / ".venv"
    if is_ready(root, group):
        return venv_python(venv)
    if not find_unmet(read_requirements(root / "pyproject.toml", group)):
        return Path(sys.executable)
    with exclusive(root / "requirements.lock"):
        if not is_ready(root, group):  # another process may have created it meanwhile
            make_venv(root, group)
    return venv_python(venv)


def make_venv(root: Path, group: str) -> None:
    """Install the group's lock into `.venv`, new or existing."""
    venv, lock = root / ".venv", LOCKS[group][-1]
    python = venv_python(venv)
    stamp = read_stamp(venv)
    if stamp is None and venv.is_dir() and any(venv.iterdir()):
        raise SetupError(
            f"{venv} was made by something else and lacks a part of {lock}.\n"
            f"Type: {shlex.quote(str(python))} -m pip install -r {lock}\n"
            "or remove that folder, and the same command makes a new one."
        )
    has_pip = bool(stamp) and _runs(python, "-c", "import pip")
    venv.mkdir(exist_ok=True)
    write_stamp(venv, "")
    if not has_pip:
        if stamp == "":
            say(".venv is incomplete (its installation did not end well): starting over.")
        _empty(venv)
        has_pip = _create(venv)
    say(f"Installing {lock} into .venv, once: minutes, 2 GB (more for CUDA). Log: .venv/{LOG}")
    pip = [python, "-m", "pip"] if has_pip else [sys.executable, "-m", "pip", "--python", python]
    install = [*pip, "install", "--progress-bar", "off", "-r", root / lock]
    started_s = time.monotonic()
    run_pip([str(part) for part in install], venv / LOG)
    write_stamp(venv, lock_text(root, group))
    say(f"Installed in {time.monotonic() - started_s:.0f} s.")


def _create(venv: Path) -> bool:
    """Create a virtual environment around the stamp; return whether it has its own pip."""
    has_pip = importlib.util.find_spec("ensurepip") is not None
    if not has_pip and importlib.util.find_spec("pip") is None:
        raise SetupError(
            f"{sys.executable} can make no .venv: it has neither ensurepip nor pip.\n"
            "On Debian or Ubuntu type: apt install python3-venv\n"
            "or give an environment that has the dependencies: PYTHON=/path/to/python"
        )
    # The base interpreter: this one may belong to the .venv that is being replaced.
    base = getattr(sys, "_base_executable", sys.executable)
    command = [base, "-m", "venv", *([] if has_pip else ["--without-pip"]), str(venv)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        said = (made.stdout + made.stderr).rstrip()
        raise SetupError(
            f"{shlex.join(command)} failed:\n{said}\nOn Debian or Ubuntu: apt install python3-venv"
        )
    return has_pip


def run_pip(command: list[str], log: Path) -> None:
    """Run pip, logging its output and showing progress on one line; errors quote the log's end."""
    quiet = {"PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    is_terminal = sys.stderr.isatty()
    started_s = shown_s = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **quiet},
        )
        try:
            while pip.poll() is None:
                time.sleep(0.2)
                now_s = time.monotonic()
                if now_s - shown_s >= (1.0 if is_terminal else PROGRESS_S):
                    shown_s = now_s
                    step = f"  {now_s - started_s:4.0f} s  {_latest_step(log)}"
                    sys.stderr.write(f"\r\033[K{step}" if is_terminal else f"{step}\n")
                    sys.stderr.flush()
        finally:
            if pip.poll() is None:
                pip.terminate()
                pip.wait()
            if is_terminal:
                sys.stderr.write("\r\033[K")
    if pip.returncode != 0:
        raise SetupError(explain_failure(log, pip.returncode))


def _latest_step(log: Path) -> str:
    """Return pip's current step from the end of its log, cut to the terminal's width."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        if line.startswith("Installing collected packages"):
            return f"unpacking {line.count(',') + 1} packages"
        if line.strip().startswith(("Collecting ", "Downloading ", "Building ")):
            return line.strip()[:60]
    return "starting"


def explain_failure(log: Path, code: int) -> str:
    """Return the log's end and the advice that matches it."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    tail = [f"  {line}" for line in lines if line.strip()][-LOG_TAIL_LINES:]
    said = "\n".join(lines)
    hints = [advice for sign, advice in HINTS.items() if sign in said][:1]
    end = [f"pip ended with status {code}; all it said is in {log}.", *hints]
    return "\n".join([*tail, *end, "The same command starts the installation over."])


@contextmanager
def exclusive(file: Path) -> Iterator[None]:
    """Hold a lock on `file`, so that two installations in one folder take turns.

    Windows has no fcntl, and no lock is taken there.
    """
    if os.name == "nt":
        yield
        return
    fcntl = importlib.import_module("fcntl")
    with file.open("r+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another set-up is at work in this folder: waiting for it.")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def count_cuda_devices() -> tuple[int, str]:
    """Return what torch.cuda.device_count() returns, and a message if that is 0.

    Importing torch takes seconds, so the build is read from torch/version.py and the devices from
    the driver, which honours CUDA_VISIBLE_DEVICES. A ROCm build counts as CUDA, as in torch.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return 0, "torch is not installed"
    folder = Path(torch.origin).parent
    build = runpy.run_path(str(folder / "version.py"))
    count, version = ctypes.c_int(0), ctypes.c_int(0)
    found = False
    if build.get("cuda") and (driver := _load_driver("libcuda.so.1", "nvcuda.dll")):
        found = driver.cuInit(0) == driver.cuDriverGetVersion(ctypes.byref(version)) == 0
        # 13020 is CUDA 13.2; the runtime rejects a driver of an earlier major version.
        found = found and version.value // 1000 >= int(build["cuda"].split(".")[0])
        found = found and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    elif build.get("hip") and (
        driver := _load_driver(str(folder / "lib" / "libamdhip64.so"), "amdhip64.dll")
    ):
        found = driver.hipGetDeviceCount(ctypes.byref(count)) == 0
    return count.value if found else 0, f"No CUDA device for torch {build['__version__']}"


def _load_driver(*names: str) -> ctypes.CDLL | None:
    """Return the first of these libraries that can be loaded."""
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:  # not here
            continue
    return None


def _empty(venv: Path) -> None:
    """Remove everything in `.venv` except its stamp, which stays "incomplete"."""
    for child in venv.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child.name != STAMP:
            child.unlink()


def _runs(python: Path, *arguments: str) -> bool:
    """Return whether this interpreter exists and the command succeeds."""
    command = [str(python), *arguments]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:  # no such file, or a link to a Python that was removed
        return False


def _stop(number: int, frame: FrameType | None) -> None:
    """Turn a signal into an exit, so that pip is terminated too."""
    raise SystemExit(128 + number)


def main(action: str, group: str = "run") -> int:
    """Carry out "choose" or "check" for "run" or "dev", or "cuda"; return the exit status."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        if action == "check":
            check(ROOT, group)
        elif action == "cuda":
            count, none = count_cuda_devices()
            sys.stdout.write(f"{count} {none}\n")
        else:
            sys.stdout.write(f"{choose(ROOT, group)}\n")
    except SetupError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("Interrupted. The same command starts the installation over.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
