"""The walls between the rooms: imports go one way, and the rules of style that a machine can hold."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ["data", "model", "evaluate", "prediction", "retention", "train", "serve", "nano"]
ROOMS += ["commands"]
TOP_NAMES = ["main", "arguments", "trainer_seq2seq"]

# room -> what of this project it may import besides itself
ALLOWED = {
    "ptuning.atomic_file": set(),  # every room may write a file whole
    "ptuning.output": set(),  # and show progress
    "ptuning": {"ptuning.data", "ptuning.model"},  # registers config, model and tokenizer
    # Where data, model and scores meet, for the run that RunConfig describes.
    "ptuning.scoring.answering": {
        "ptuning.data",
        "ptuning.model",
        "ptuning.evaluate",
        "ptuning.scoring.retention",
        "ptuning.train",
    },
    "ptuning.scoring.retention": {"ptuning.data", "ptuning.model", "ptuning.evaluate"},  # and here
    "ptuning.data": set(),
    "ptuning.model": set(),
    "ptuning.evaluate": set(),
    "ptuning.train": {
        "ptuning.data",
        "ptuning.model",
        "ptuning.tunings.bundled",
    },  # "nano" as a name
    # A base is loaded by the same code as in training; the nano model, which is served where no
    # other is named, lends its folder alone.
    "ptuning.serve": {
        "ptuning.data",
        "ptuning.model",
        "ptuning.tunings.loading",
        "ptuning.tunings.bundled",
    },
    "ptuning.nano": {"ptuning.data", "ptuning.model"},
    "ptuning.commands": {
        "ptuning.data",
        "ptuning.model",
        "ptuning.evaluate",
        "ptuning.train",
        "ptuning.serve",
        "ptuning.tunings.bundled",  # whose tokenizer counts where no other is named
    },
    "ptuning.__main__": {"ptuning.commands", "ptuning.train.config"},  # plan takes main.py's flags
    "arguments": {"ptuning.train"},
    "trainer_seq2seq": {"ptuning.evaluate", "ptuning.model", "ptuning.train"},
    "main": {"ptuning", "arguments", "trainer_seq2seq", *(f"ptuning.{room}" for room in ROOMS)},
}
MAY_PRINT = {"ptuning/serve/cli.py", "main.py"}
MAX_LINES = 700  # of a file that is one idea; most have 100 to 500


def source_files() -> list[Path]:
    """Return every Python file of the project but the tests; rooms not built yet have none."""
    files = [*(ROOT / "ptuning").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    files += [*(ROOT / "benchmarks").rglob("*.py"), *ROOT.glob("*.py")]
    return sorted(files)


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def room_of(module: str) -> str | None:
    """Return the key of ALLOWED that a dotted name belongs to; None for other people's modules.

    `ptuning.load_prefix` is a name in `ptuning` itself, so it belongs to "ptuning".
    """
    parts = module.split(".")
    if parts[0] in TOP_NAMES:
        return parts[0]
    if parts[0] != "ptuning":
        return None
    own = len(parts) > 1 and f"ptuning.{parts[1]}" in ALLOWED
    return f"ptuning.{parts[1]}" if own else "ptuning"


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Yield the full dotted name of everything imported, at any depth of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_on_load(tree: ast.Module) -> Iterator[str]:
    """Yield what is imported when the module is, so not what a function imports when called."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported_modules(node)
        pending.extend(ast.iter_child_nodes(node))


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=name_of(file))


def forbidden_imports(module: str, tree: ast.Module) -> list[str]:
    """Return the imports of a module that pass through a wall."""
    room = room_of(module)
    if room is None:
        return []
    permitted = ALLOWED[room] | {room, "ptuning.atomic_file", "ptuning.output"}

    def is_permitted(name: str) -> bool:
        single = any(f"{name}.".startswith(f"{module}.") for module in permitted - set(ALLOWED))
        return single or room_of(name) in {None, *permitted}

    return sorted(name for name in imported_modules(tree) if not is_permitted(name))


def module_of(file: Path) -> str:
    return name_of(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.mark.parametrize("file", source_files(), ids=name_of)
def test_imports_go_one_way(file: Path) -> None:
    found = forbidden_imports(module_of(file), parse(file))
    assert not found, f"{name_of(file)} may not import {found}"


@pytest.mark.parametrize(
    ("module", "line", "found"),
    [
        ("ptuning.data.reading", "import ptuning.model.config", ["ptuning.model.config"]),
        ("ptuning.model.chatglm", "def f():\n    from ptuning.data import tokenizer", ["ptuning.data.tokenizer"]),
        ("ptuning.scoring.report", "from ptuning import load_prefix", ["ptuning.load_prefix"]),
        ("ptuning.train.fit", "from main import main", ["main.main"]),
        ("ptuning.train.fit", "from ptuning.train.faults import guards\nfrom ptuning.model.config import C", []),
        ("trainer_seq2seq", "from ptuning.data import reading", ["ptuning.data.reading"]),
        ("main", "import arguments, trainer_seq2seq\nfrom ptuning.serve import session", []),
        ("ptuning.serve.session", "from ptuning.tunings.loading import x", []),
        ("ptuning.serve.session", "from ptuning.evaluate import report", ["ptuning.scoring.report"]),
        ("ptuning.serve.session", "from ptuning.train.base_models import x", ["ptuning.train.base_models.x"]),
        ("scripts.environment", "import main", []),
    ],
)  # fmt: skip
def test_the_wall_itself_holds(module: str, line: str, found: list[str]) -> None:
    assert forbidden_imports(module, ast.parse(line)) == found


@pytest.mark.parametrize("file", source_files(), ids=name_of)
def test_nobody_imports_main(file: Path) -> None:
    assert not [name for name in imported_modules(parse(file)) if name.split(".")[0] == "main"]


@pytest.mark.parametrize("file", source_files(), ids=name_of)
def test_cpm_kernels_is_not_loaded_on_import(file: Path) -> None:
    """It opens the CUDA driver as it loads, so a machine without one could import nothing."""
    assert not [
        name for name in imports_on_load(parse(file)) if name.split(".")[0] == "cpm_kernels"
    ]


@pytest.mark.parametrize("file", source_files(), ids=name_of)
def test_files_stay_short_and_say_what_they_hold(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name_of(file)} has {lines} lines; split it by idea"
    assert file.name not in {"utils.py", "helpers.py"}, "name a file after what it holds"
    assert ast.get_docstring(parse(file)), f"{name_of(file)} opens with a docstring"


@pytest.mark.parametrize("file", source_files(), ids=name_of)
def test_only_the_faces_print(file: Path) -> None:
    prints = [
        node.lineno
        for node in ast.walk(parse(file))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not prints or name_of(file) in MAY_PRINT or name_of(file).startswith("benchmarks/"), (
        prints
    )


def test_package_files_hold_a_docstring_only() -> None:
    rooms = [file for file in source_files() if file.name == "__init__.py"]
    assert rooms
    for file in rooms:
        if file != ROOT / "ptuning" / "__init__.py":
            assert len(parse(file).body) == 1, (
                f"{name_of(file)}: import from where a thing is written"
            )


def test_every_room_has_a_rule() -> None:
    folders = {child.parent.name for child in (ROOT / "ptuning").glob("*/*.py")}
    assert folders <= set(ROOMS), "a new room needs a line in ALLOWED"
    modules = {file.stem for file in ROOT.glob("*.py")}
    assert modules <= set(TOP_NAMES), "a new file beside main.py needs a line in ALLOWED"
