"""`.venv` and the locks: made once, redone after an interruption, never taken from a user."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import environment

ROOT = Path(__file__).resolve().parents[1]


# A real .venv in small: its one package is made here, and no index is asked.


def write_wheel(folder: Path, version: str) -> None:
    """Write the smallest wheel there is: a module that knows its version."""
    info = f"tiny_package-{version}.dist-info"
    with zipfile.ZipFile(folder / f"tiny_package-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_package.py", f"version = '{version}'\n")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-package\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def small_project(tmp_path: Path) -> Path:
    """A project with one dependency that no Python has, and the wheels of two versions of it."""
    root = tmp_path / "small"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(environment.__file__, root / "scripts")
    (root / "pyproject.toml").write_text(
        '[project]\ndependencies = ["tiny-package>=1"]\n[project.optional-dependencies]\ndev = []\n',
        encoding="utf-8",
    )
    (root / "requirements.lock").write_text("tiny-package==1.0\n", encoding="utf-8")
    (root / "requirements-dev.lock").write_text("-r requirements.lock\n", encoding="utf-8")
    for version in ("1.0", "2.0"):
        write_wheel(tmp_path, version)
    return root


def set_up(root: Path, group: str = "run") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / "scripts" / "environment.py"), "choose", group],
        env={
            **os.environ,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(root.parent),
            "PIP_CONFIG_FILE": os.devnull,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def installed_version(root: Path) -> str:
    python = environment.venv_python(root / ".venv")
    command = [str(python), "-c", "import tiny_package; print(tiny_package.version)"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_environment_is_made_once_and_follows_the_lock(small_project: Path) -> None:
    venv, lock = small_project / ".venv", small_project / "requirements.lock"
    first = set_up(small_project)
    assert first.stdout.strip() == str(environment.venv_python(venv)), first.stderr
    assert installed_version(small_project) == "1.0"
    again = set_up(small_project)
    assert again.stdout == first.stdout
    assert again.stderr == "", "nothing to do, nothing said"

    lock.write_text("tiny-package==2.0\n", encoding="utf-8")
    (venv / "mine").touch()
    assert set_up(small_project).returncode == 0
    assert installed_version(small_project) == "2.0"
    assert (venv / "mine").exists(), "a changed lock is installed in place"

    lock.write_text("tiny-package==9.9\n", encoding="utf-8")
    failed = set_up(small_project)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert "No matching distribution found for tiny-package==9.9" in failed.stderr
    assert "The index has no such build" in failed.stderr
    assert environment.read_stamp(venv) == "", (
        "a failed installation is not taken for a complete one"
    )


def test_foreign_environment_is_never_emptied(small_project: Path) -> None:
    (small_project / ".venv").mkdir()
    (small_project / ".venv" / "pyvenv.cfg").touch()
    result = set_up(small_project)
    assert result.returncode == 1
    assert "was made by something else and lacks a part of requirements.lock" in result.stderr
    assert [path.name for path in (small_project / ".venv").iterdir()] == ["pyvenv.cfg"]


def test_stamp_of_the_checks_holds_for_a_run_but_not_the_other_way_round(
    small_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_runs", lambda *_: True)
    venv = small_project / ".venv"
    venv.mkdir()
    for group, ready_for in (("dev", ["run", "dev"]), ("run", ["run"])):
        environment.write_stamp(venv, environment.lock_text(small_project, group))
        assert [
            name for name in ("run", "dev") if environment.is_ready(small_project, name)
        ] == ready_for
    environment.write_stamp(venv, "")
    assert not environment.is_ready(small_project, "run")


def test_interrupted_environment_is_started_over_even_without_ensurepip(
    small_project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    venv = small_project / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "left over").touch()
    environment.write_stamp(venv, "")
    find_spec, hidden = environment.importlib.util.find_spec, {"ensurepip"}
    monkeypatch.setattr(
        environment.importlib.util,
        "find_spec",
        lambda name: None if name in hidden else find_spec(name),
    )
    for name, value in (
        ("NO_INDEX", "1"),
        ("FIND_LINKS", str(small_project.parent)),
        ("CONFIG_FILE", os.devnull),
    ):
        monkeypatch.setenv(f"PIP_{name}", value)

    environment.make_venv(small_project, "run")
    assert "starting over" in capsys.readouterr().err
    assert installed_version(small_project) == "1.0"
    assert not (venv / "bin" / "left over").exists()
    assert environment.read_stamp(venv) == environment.lock_text(small_project, "run")

    hidden.add("pip")
    environment.write_stamp(venv, "")
    with pytest.raises(environment.SetupError, match="apt install python3-venv"):
        environment.make_venv(small_project, "run")


def test_second_setup_waits_for_the_first(small_project: Path) -> None:
    code = (
        "import pathlib, sys; from scripts import environment\n"
        "with environment.exclusive(pathlib.Path(sys.argv[1])): sys.stdout.write('entered')"
    )
    file = small_project / "requirements.lock"
    with environment.exclusive(file):
        second = subprocess.Popen(
            [sys.executable, "-c", code, str(file)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert second.stderr is not None
        assert "waiting for it" in second.stderr.readline()
        assert second.poll() is None
    assert second.communicate(timeout=30)[0] == "entered"


def test_a_wrong_version_is_named_beside_what_is_needed() -> None:
    found = environment.find_unmet(["pytest>=9", "pytest<1", "no-such-package"])
    assert found == {"pytest<1": f"has {pytest.__version__}", "no-such-package": "missing"}


def test_failure_hint_fits_what_pip_said(tmp_path: Path) -> None:
    log = tmp_path / "install.log"
    log.write_text(
        "Collecting torch\nERROR: [Errno 28] No space left on device\n", encoding="utf-8"
    )
    text = environment.explain_failure(log, 1)
    assert "No space left on device" in text
    assert "The disk is full" in text
    assert str(log) in text


# The locks


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith(("#", "-r "))]
    # A platform's own package has a marker: name==version; platform_system == "Linux"
    pin = r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)(; .+)?"
    matches = [re.fullmatch(pin, line) for line in wanted if Requirement(line)]
    assert all(matches), "every line is name==version, without a build suffix"
    return {canonicalize_name(match[1]): match[2] for match in matches if match}


def test_locks_pin_a_version_inside_every_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    run_pins, dev_pins = pins("requirements.lock"), pins("requirements-dev.lock")
    for ranges, pinned in (
        (project["dependencies"] + extras["tensorboard"], run_pins),
        (extras["dev"], run_pins | dev_pins),
    ):
        for requirement in map(Requirement, ranges):
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), str(
                requirement
            )
    assert not set(run_pins) & set(dev_pins), "each version is written in one place"


def test_lock_keeps_what_cpm_kernels_needs() -> None:
    cuda = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]["cuda"]
    (setuptools,) = [item for item in map(Requirement, cuda) if item.name == "setuptools"]
    assert setuptools.specifier.contains(pins("requirements.lock")["setuptools"])
    assert "cpm-kernels" not in pins("requirements.lock"), "it needs a CUDA driver to be imported"


def test_web_and_browser_locks_pin_a_version_inside_every_range() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    web_pins, browser_pins = pins("requirements-web.lock"), pins("requirements-browser.lock")
    for ranges, pinned in ((extras["web"], web_pins), (extras["browser"], browser_pins)):
        assert ranges
        for requirement in map(Requirement, ranges):
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), str(
                requirement
            )
    others = pins("requirements.lock") | pins("requirements-dev.lock")
    assert set(web_pins) & set(others) == {"pillow"}, "gradio needs another pillow, and no more"
    assert not set(browser_pins) & (set(web_pins) | set(others))
    lines = (ROOT / "requirements-browser.lock").read_text(encoding="utf-8").splitlines()
    assert "-r requirements-web.lock" in lines


# Is there a CUDA device? Asked without torch.


class FakeDriver:
    """A driver library: what each of its functions returns, and the numbers it writes."""

    def __init__(self, version: int = 13020, count: int = 2, **results: int) -> None:
        self.written = {"cuDriverGetVersion": version}
        self.count, self.results = count, results

    def __getattr__(self, name: str) -> Callable[[Any], int]:
        def function(argument: Any) -> int:
            if name != "cuInit":
                argument._obj.value = self.written.get(name, self.count)
            return self.results.get(name, 0)

        return function


@pytest.mark.parametrize(
    ("build", "library", "driver", "count"),
    [
        ("cuda = '13.0'\nhip = None", "libcuda.so.1", FakeDriver(), 2),
        ("cuda = '12.8'\nhip = None", "nvcuda.dll", FakeDriver(), 2),
        ("cuda = '13.0'\nhip = None", "libcuda.so.1", FakeDriver(version=12090), 0),
        ("cuda = '13.0'\nhip = None", "libcuda.so.1", FakeDriver(cuInit=100), 0),
        ("cuda = '13.0'\nhip = None", "libcuda.so.1", FakeDriver(cuDeviceGetCount=999), 0),
        ("cuda = '13.0'\nhip = None", "no library", FakeDriver(), 0),
        ("cuda = None\nhip = '7.1.25424'", "libamdhip64.so", FakeDriver(count=1), 1),
        ("cuda = None\nhip = '7.1.25424'", "libamdhip64.so", FakeDriver(hipGetDeviceCount=100), 0),
        ("cuda: str | None = None", "libcuda.so.1", FakeDriver(), 0),
    ],
)
def test_cuda_devices_are_counted_by_the_driver_of_torchs_build(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: str,
    library: str,
    driver: FakeDriver,
    count: int,
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError", encoding="utf-8")
    (tmp_path / "torch" / "version.py").write_text(
        f"__version__ = '2.13.0+test'\n{build}\n", encoding="utf-8"
    )

    def load(name: str) -> FakeDriver:
        if Path(name).name != library:
            raise OSError(name)
        return driver

    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(environment.ctypes, "CDLL", load)
    assert environment.count_cuda_devices() == (count, "No CUDA device for torch 2.13.0+test")


def test_cuda_is_asked_for_without_importing_torch() -> None:
    code = (
        "import sys; sys.path.insert(0, 'scripts'); import environment; "
        "status = environment.main('cuda'); assert 'torch' not in sys.modules; sys.exit(status)"
    )
    asked = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert asked.returncode == 0, asked.stderr
    torch = importlib.import_module("torch")
    found = f"{torch.cuda.device_count()} No CUDA device for torch {torch.__version__}\n"
    assert asked.stdout == found
