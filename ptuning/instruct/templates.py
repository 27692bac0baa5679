"""Prompts that ask for new tasks: a text of requirements, and tasks to continue the list from.

The texts are in the folder templates. `adgen` asks for attribute lists with copy; `magpie` shows
nothing but the open beginning of a user turn, so that the model writes the question itself
(Xu et al. 2024, https://arxiv.org/abs/2406.08464). API_ZH and API_EN ask for requests that one API
fulfils, each with its call; their topic is the document of the API's card.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ptuning.data.conversion import split_input
from ptuning.data.formats import UnknownColumns
from ptuning.data.parsing import open_data
from ptuning.data.prompts import RowFormat
from ptuning.data.raw_file import DataError, RawRow
from ptuning.data.reading import read_raw_rows, read_rows
from ptuning.instruct.blocks import FIELDS, INPUT, INSTRUCTION, OUTPUT, Task, write_block
from ptuning.tunings.loading import SAMPLE_DIR

FOLDER = Path(__file__).parent
CONTENT, SUMMARY = "商品", "文案"


class Template(NamedTuple):
    """A kind of prompt: the language of its tasks, and how their fields are labelled.

    labels is empty for magpie. fields maps the labels that a completion may have to fields. topic
    is the line that names one.
    """

    name: str
    language: str  # "zh" or "en"
    labels: dict[str, str]
    no_input: str = ""
    topic: str = ""
    fields: dict[str, str] = FIELDS

    @property
    def text(self) -> str:
        """What precedes the list."""
        return _read(self.name)

    @property
    def digest(self) -> str:
        """A hash of everything that the template adds to a prompt."""
        parts = repr((self.text, self.labels, self.no_input, self.topic))
        return hashlib.sha256(parts.encode()).hexdigest()[:12]

    def prompt(self, shown: Sequence[Task], num_tasks: int, topic: str | None = None) -> str:
        """Return the prompt that shows tasks and asks for num_tasks more."""
        if not self.labels:
            return self.text
        line = "" if topic is None else self.topic.format(topic)
        head = self.text.format(num_tasks=len(shown) + num_tasks, topic=line)
        blocks = [
            write_block(task, number, self.labels, self.no_input)
            for number, task in enumerate(shown, 1)
        ]
        return f"{head}{''.join(blocks)}###\n{len(shown) + 1}. {self.labels[INSTRUCTION].rstrip()}"


ZH = Template(
    "zh",
    "zh",
    {INSTRUCTION: "指令：", INPUT: "输入：", OUTPUT: "输出："},
    no_input="<无输入>",
    topic="7. 所有任务都围绕这个主题：{}\n",
)
EN = Template(
    "en",
    "en",
    {INSTRUCTION: "Instruction: ", INPUT: "Input:", OUTPUT: "Output:"},
    no_input="<noinput>",
    topic="7. All tasks are about this topic: {}\n",
)
ADGEN = Template(
    "adgen",
    "zh",
    {INSTRUCTION: f"{CONTENT}：", OUTPUT: f"{SUMMARY}："},
    topic="4. 所有商品都围绕这个主题：{}\n",
    fields={CONTENT: INSTRUCTION, SUMMARY: OUTPUT},
)
API_ZH = Template(
    "api.zh",
    "zh",
    {INSTRUCTION: "请求：", OUTPUT: "调用："},
    topic="API：{}\n",
    fields={"请求": INSTRUCTION, "调用": OUTPUT},
)
API_EN = Template(
    "api.en",
    "en",
    {INSTRUCTION: "Request: ", OUTPUT: "Call: "},
    topic="API: {}\n",
    fields={"request": INSTRUCTION, "call": OUTPUT},
)
# The choices of `ptuning generate`; the two for APIs belong to `ptuning api write`.
TEMPLATES = {one.name: one for one in (ZH, EN, ADGEN, Template("magpie", "zh", {}))}


@cache
def _read(name: str) -> str:
    return (FOLDER / "templates" / f"{name}.txt").read_text(encoding="utf-8")


def shipped_seeds(template: Template) -> Path:
    """Return the file of a template's own seeds; FileNotFoundError outside a checkout for adgen."""
    if template.name != "adgen":
        return FOLDER / "seeds" / f"{template.name}.jsonl"
    if not SAMPLE_DIR.is_dir():
        raise FileNotFoundError(
            "--template adgen shows AdvertiseGen/sample of a checkout, which is not here; name "
            "rows of your own with --seeds FILE."
        )
    return SAMPLE_DIR / "train.json"


def read_seeds(paths: Sequence[Path]) -> list[Task]:
    """Return the tasks of files in any format of data files, or in Self-Instruct's.

    A row without an answer is an error: an example shows what a complete task is.
    """
    return [task for path in paths for task in _read_file(path)]


def _read_file(path: Path) -> list[Task]:
    rows = read_raw_rows(open_data(path), None)
    if rows and all("instances" in row.columns for row in rows):
        return [_of_self_instruct(row) for row in rows]
    try:
        read = read_rows(path, RowFormat())
    except UnknownColumns as error:
        raise DataError(
            path, None, "seeds need columns instruction, input and output, or prompt and response."
        ) from error
    if not read.kept or read.dropped:
        lines = "; ".join(read.lines(left_out="cannot be seeds")[1:])
        raise DataError(path, None, f"every seed needs an instruction and an output: {lines}")
    pairs = zip(read.kept, read.sources, strict=True)
    return [Task(*split_input(source, read.layout, row), row.response) for row, source in pairs]


def _of_self_instruct(row: RawRow) -> Task:
    """Read a row of https://github.com/yizhongw/self-instruct/blob/0b26cca/data/seed_tasks.jsonl."""
    try:
        first = row.columns["instances"][0]
        texts = (row.columns["instruction"], first.get("input") or "", first["output"])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise row.fault("needs an instruction and instances [{input, output}].") from error
    if not all(isinstance(text, str) for text in texts) or not (texts[0] and texts[2]):
        raise row.fault("needs an instruction and an output that are texts.")
    return Task(*texts)
