"""Every package that is imported is the standard library, ours, or declared in pyproject.toml."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"ptuning", "main", "arguments", "trainer_seq2seq", "scripts", "tests", "benchmarks"}
WITH_TORCH = {"triton"}  # a CUDA build of torch brings its own
# Where an import's name tells nothing of its distribution and that need not be installed here
DISTRIBUTION_OF = {"cpm_kernels": "cpm-kernels", "fastapi": "fastapi", "gradio": "gradio"}
DISTRIBUTION_OF |= {"playwright": "playwright", "uvicorn": "uvicorn", "peft": "peft"}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*, with_dev: bool) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra, more in project["optional-dependencies"].items():
        if with_dev or extra != "dev":
            lines += more
    return {normalised(re.match(r"[\w.-]+", line)[0]) for line in lines}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - OURS - WITH_TORCH


@pytest.mark.parametrize("folder", ["ptuning", "scripts", ".", "benchmarks", "tests"])
def test_every_imported_package_is_declared(folder: str) -> None:
    files = (ROOT / folder).glob("*.py") if folder == "." else (ROOT / folder).rglob("*.py")
    known = declared(with_dev=folder in ("benchmarks", "tests"))
    distributions = packages_distributions()
    missing = {
        (name, str(file.relative_to(ROOT)))
        for file in files
        for name in imported(file)
        if not known
        & {
            normalised(one)
            for one in (*distributions.get(name, ()), DISTRIBUTION_OF.get(name, name))
        }
    }
    assert not missing, sorted(missing)
