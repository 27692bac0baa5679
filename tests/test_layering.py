"""Imports go one way between packages and in no circle between files; rules of style that a machine can check."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# package -> the packages it may import besides itself, in the order in which data passes through
ALLOWED = {
    "ptuning.data": set(),
    "ptuning.model": set(),
    "ptuning.engine": {"ptuning.model"},
    "ptuning.completions": {"ptuning.data", "ptuning.model", "ptuning.engine"},
    "ptuning.tunings": {"ptuning.data", "ptuning.model"},
    "ptuning.train": {"ptuning.data", "ptuning.model", "ptuning.engine", "ptuning.tunings"},
    "ptuning.scoring": {
        *("ptuning.data", "ptuning.model", "ptuning.engine", "ptuning.completions"),
        *("ptuning.tunings", "ptuning.train"),
    },
    "ptuning.serve": {
        *("ptuning.data", "ptuning.model", "ptuning.engine", "ptuning.tunings"),
        "ptuning.apicalls",
    },
    "ptuning.instruct": {
        *("ptuning.data", "ptuning.model", "ptuning.engine", "ptuning.completions"),
        "ptuning.tunings",
    },
    "ptuning.select": {
        *("ptuning.data", "ptuning.model", "ptuning.engine", "ptuning.completions"),
        "ptuning.tunings",
    },
    "ptuning.apicalls": {
        *("ptuning.data", "ptuning.model", "ptuning.engine", "ptuning.completions"),
        *("ptuning.tunings", "ptuning.instruct"),
    },
    "ptuning.nano": {
        *("ptuning.data", "ptuning.model", "ptuning.tunings"),
        *("ptuning.instruct", "ptuning.apicalls"),
    },
}
PACKAGES = [name.removeprefix("ptuning.") for name in ALLOWED] + ["commands"]
ALLOWED |= {
    "ptuning.commands": set(ALLOWED) - {"ptuning.nano"},
    "ptuning.output": set(),  # progress bars, log lines: every package may import it
    "ptuning.storage": set(),  # and this, which writes files whole
    "ptuning": {"ptuning.data", "ptuning.model", "ptuning.tunings"},  # what `import ptuning` offers
    "ptuning.__main__": {"ptuning.commands", "ptuning.train"},
    "arguments": {"ptuning.train"},
    "trainer_seq2seq": set(ALLOWED) - {"ptuning.serve", "ptuning.nano"},
    "main": {"arguments", "trainer_seq2seq", *ALLOWED} - {"ptuning.serve", "ptuning.nano"}
    | {"ptuning"},
}
TOP_NAMES = ["main", "arguments", "trainer_seq2seq"]
MAY_PRINT = {"ptuning/serve/cli.py", "main.py"}
MAX_PARAMETERS = 8
DICTATED = {  # by transformers
    ("ptuning/model/chatglm.py", "forward"),
    ("ptuning/data/tokenizer.py", "apply_chat_template"),
}
MAX_LINES = 700  # of a file that is one idea; most have 100 to 500


def source_files() -> list[Path]:
    """Return every Python file of the project except the tests."""
    files = [*(ROOT / "ptuning").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    files += [*(ROOT / "benchmarks").rglob("*.py"), *ROOT.glob("*.py")]
    return sorted(files)


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def package_of(module: str) -> str | None:
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
    package = package_of(module)
    if package is None:
        return []
    permitted = ALLOWED[package] | {package, "ptuning.output", "ptuning.storage", None}
    return sorted(name for name in imported_modules(tree) if package_of(name) not in permitted)


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
        ("ptuning.model.chatglm", "from ptuning import load_prefix", ["ptuning.load_prefix"]),
        ("ptuning.engine.engine", "from ptuning.tunings import prefix", ["ptuning.tunings.prefix"]),
        ("ptuning.train.fit", "from main import main", ["main.main"]),
        ("ptuning.train.fit", "from ptuning.train import guards\nfrom ptuning.model.config import C", []),
        ("ptuning.train.fit", "from ptuning.output import track", []),
        ("ptuning.serve.session", "from ptuning.scoring import report", ["ptuning.scoring.report"]),
        ("main", "import arguments, trainer_seq2seq\nfrom ptuning.scoring import answering", []),
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


def test_every_package_has_a_rule() -> None:
    folders = {child.parent.name for child in (ROOT / "ptuning").glob("*/*.py")}
    assert folders <= set(PACKAGES), "a new package needs a line in ALLOWED"
    modules = {file.stem for file in ROOT.glob("*.py")}
    assert modules <= set(TOP_NAMES), "a new file beside main.py needs a line in ALLOWED"


def import_graph(sources: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Return for each module the modules of sources that it imports anywhere, for types alone too."""

    def target(name: str) -> str:
        return name if name in sources else name.rpartition(".")[0]

    return {
        module: {target(name) for name in imported_modules(tree)} & sources.keys() - {module}
        for module, tree in sources.items()
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected sets of more than one module."""
    reached: dict[str, set[str]] = {}
    for module in graph:
        found, pending = set(), [module]
        while pending:
            for following in graph[pending.pop()] - found:
                found.add(following)
                pending.append(following)
        reached[module] = found
    together = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in graph
        if module in reached[module]
    }
    return sorted(list(circle) for circle in together)


def test_no_file_imports_itself_through_others() -> None:
    graph = import_graph({module_of(file): parse(file) for file in source_files()})
    assert not circles(graph)


def test_a_circle_is_found_also_for_types_alone() -> None:
    sources = {
        "ptuning.a": "from ptuning import b",
        "ptuning.b": "from ptuning.c import C",
        "ptuning.c": "if TYPE_CHECKING:\n    from ptuning.a import A",
        "ptuning.d": "import ptuning.a",
    }
    graph = import_graph({module: ast.parse(source) for module, source in sources.items()})
    assert circles(graph) == [["ptuning.a", "ptuning.b", "ptuning.c"]]


def test_no_two_files_or_classes_share_a_name() -> None:
    own = [file for file in source_files() if file.name not in {"__init__.py", "__main__.py"}]
    own = [file for file in own if not name_of(file).startswith(("scripts/", "benchmarks/"))]
    names = Counter(file.stem for file in own)
    classes = Counter(
        node.name
        for file in own
        for node in ast.walk(parse(file))
        if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, count in (names + classes).items() if count > 1]


@pytest.mark.parametrize("file", source_files(), ids=name_of)
def test_a_function_takes_eight_values_at_most(file: Path) -> None:
    """More belong into one value with a name. Signatures that transformers dictates are exempt."""
    if "triton" in file.name:
        return  # a kernel takes pointers, strides and block sizes one by one
    found = []
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            names = [
                a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            ]
            if len([name for name in names if name not in {"self", "cls"}]) > MAX_PARAMETERS:
                found.append(node.name)
    assert not [name for name in found if (name_of(file), name) not in DICTATED]
