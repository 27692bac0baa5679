"""The README holds: its flags are those of arguments.py, its files and variables exist, and both languages say the same."""

import re
from pathlib import Path
from typing import get_args

import pytest

from ptuning.data.prompts import FormatName, RowFormat
from ptuning.data.reading import read_rows
from scripts.readme_flags import BEGIN, END, default_text, own_flags, with_table

ROOT = Path(__file__).resolve().parents[1]
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README_zh.md").read_text(encoding="utf-8")
both = pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["en", "zh"])


def fenced(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language, "" for those without one."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [body for name, body in blocks if name == language]


def without_comments(code: str) -> str:
    """Drop comments, which are in the reader's language."""
    return re.sub(r" *#.*$", "", code, flags=re.MULTILINE)


def test_english_flag_table_is_that_of_arguments() -> None:
    assert BEGIN in ENGLISH
    assert with_table(ENGLISH) == ENGLISH, "run: python -m scripts.readme_flags"


def test_chinese_flag_table_has_the_same_flags_and_defaults() -> None:
    table = CHINESE.partition("<!-- flags")[2].partition(END)[0]
    rows = re.findall(r"^\| `--(\w+)` \| (\S+) \| \S", table, flags=re.MULTILINE)
    defaults = [
        (flag.name, default_text(flag.default).replace("unset", "未设")) for flag in own_flags()
    ]
    assert rows == defaults


@pytest.mark.parametrize("language", ["bash", "python"])
def test_both_languages_show_the_same_code(language: str) -> None:
    english = [without_comments(block) for block in fenced(ENGLISH, language)]
    assert english
    assert english == [without_comments(block) for block in fenced(CHINESE, language)]


def test_both_languages_have_the_same_parts() -> None:
    def outline(text: str) -> list[tuple[int, int]]:
        parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
        return [
            (len(re.findall(r"^\| ", part, re.M)), len(re.findall(r"^- ", part, re.M)))
            for part in parts
        ]

    assert outline(ENGLISH) == outline(CHINESE), "table rows and list items of each part"


def test_both_trees_name_what_is_there() -> None:
    trees = []
    for text in (ENGLISH, CHINESE):
        (tree,) = [block for block in fenced(text, "") if "trainer_seq2seq.py" in block]
        names = [re.split(r" {4,}", line)[0] for line in tree.splitlines()]
        trees.append([name for line in names for name in line.split()])
    assert trees[0] == trees[1]
    missing = [name for name in trees[0] if not (ROOT / name).exists()]
    assert not missing


def test_the_tree_names_every_file_of_a_package_that_it_opens() -> None:
    listed = {line.split(" ")[0] for line in ENGLISH.splitlines() if line.startswith("ptuning/")}
    opened = {
        path.rpartition("/")[0] for path in listed if path.endswith(".py") and path.count("/") > 1
    }
    for package in opened:
        names = {f"{package}/{file.name}" for file in (ROOT / package).glob("*.py")}
        assert names - {f"{package}/__init__.py"} <= listed


@both
def test_the_rows_shown_are_read_in_the_format_named(text: str, tmp_path: Path) -> None:
    shown = re.findall(r"^\| `(\w+)` \| `(\{.*?\})`(?=[:;：； ])", text, flags=re.MULTILINE)
    names = [name for name, _ in shown]
    assert set(names) == set(get_args(FormatName)) - {"auto"}
    for name, row in shown:
        (tmp_path / "row.jsonl").write_text(row.replace(", ...]", "]"), encoding="utf-8")
        rows = read_rows(tmp_path / "row.jsonl", RowFormat())
        assert (rows.layout.name, len(rows.kept)) == (name, 1)


@both
def test_links_inside_the_repository_resolve(text: str) -> None:
    targets = [
        link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("http", "#"))
    ]
    assert targets
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_variables_before_a_command_are_read_by_it() -> None:
    sources = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("*.sh")}
    common = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts").glob("*.sh"))
    commands = re.findall(r"^((?:[A-Z_]+=\S+ )+)bash (\w+\.sh)", ENGLISH, flags=re.MULTILINE)
    assert len(commands) > 5
    for assignments, script in commands:
        read = sources[script] + common + (sources["train.sh"] if script == "train_chat.sh" else "")
        for name in re.findall(r"([A-Z_]+)=", assignments):
            reads = rf"\$\{{{name}[:}}-]|(setting --\w* |take_flags.*=){name}\b"
            assert re.search(reads, read), f"{script} does not read {name}"
