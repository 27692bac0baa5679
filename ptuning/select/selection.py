"""The five steps in order: clean, duplicates, against, score, pick. Every row gets one verdict."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

from ptuning.completions.journal import digest
from ptuning.data.conversion import ContractRow, convert_file, number_repeats, split_input
from ptuning.data.formats import UnknownColumns
from ptuning.data.near_duplicates import NearDuplicates, Nearest, own_texts
from ptuning.data.prompts import RowFormat, TextRow, to_example
from ptuning.data.segmentation import count_words
from ptuning.output import Progress
from ptuning.select.choosing import Similar, pick, quotas
from ptuning.select.cleaning import RULES, Fields, fault_of, without_fake_input

SELECTED = "selected"
FIT = (SELECTED, "over_budget", "too_similar")  # verdicts on rows that could be picked
VERDICTS = RULES | {
    "exact_duplicate": "完全重复: the same prompt and answer as an earlier row",
    "near_duplicate": "近似重复: almost the same text as an earlier row",
    "in_against": "与 --against 重复: in a file of --against, or almost",
    "no_score": "没有得分: the judge gave no grade, or the loss is no number",
    "prompt_is_no_help": "提示没有帮助 (IFD ≥ 1): an answer no easier to predict with its prompt",
    "too_similar": "与已选样本太相似: too similar to a picked row with a higher score",
    "over_budget": "合格但未入选: fit, but the budget of its source went to others",
    SELECTED: "入选: in --out",
}

logger = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """What became of a row; like: the id of the row it is similar to, and how similar."""

    name: str
    like: str = ""
    similarity: float = 0.0


PENDING = Verdict("")  # still in


@dataclass
class PoolRow:
    """A row of the pool that is selected from."""

    contract: ContractRow
    fields: Fields
    verdict: Verdict = PENDING
    score: float | None = None

    @property
    def text_row(self) -> TextRow:
        """The row as training reads it."""
        history = tuple((question, answer) for question, answer in self.contract["history"])
        return TextRow(0, self.contract["prompt"], self.answer, history)

    @property
    def prompt(self) -> str:
        """The prompt as the model reads it, earlier turns included."""
        return to_example(self.text_row, RowFormat()).prompt

    @property
    def answer(self) -> str:
        """The answer."""
        return self.contract["response"]

    @property
    def pair(self) -> tuple[str, str]:
        """Prompt and answer."""
        return self.prompt, self.answer

    @property
    def key(self) -> str:
        """A hash of prompt and answer."""
        return digest(self.pair)

    def drop(self, name: str, like: "PoolRow", similarity: float) -> None:
        """Give the verdict that the row is similar to another."""
        self.verdict = Verdict(name, like.contract["id"], round(similarity, 4))


def read_pool(paths: Sequence[Path], *, needs_answers: bool = True) -> list[PoolRow]:
    """Read the rows of files in any known format; what cannot be read is logged with its reason.

    ValueError for a file whose columns are not known, or without any answer where they are needed.
    """
    pool = []
    names = Counter(path.name for path in paths)
    for path in paths:
        try:
            made = convert_file(path, RowFormat(), keep_unanswered=True)
        except UnknownColumns as error:
            said = "its columns have no known format; name them with `ptuning data convert` first."
            raise ValueError(f"{error.path}: {said}") from error
        if needs_answers and made.rows and not any(row["response"] for row in made.rows):
            raise ValueError(f"{path} has no answers; add a column such as response.")
        for line in made.read.lines(left_out="left out")[1:] if made.num_rejected else ():
            logger.warning("%s: %s", path, line)
        name = path.name if names[path.name] == 1 else f"{path.absolute().parent.name}/{path.name}"
        for contract, row, raw in zip(made.rows, made.read.kept, made.read.sources, strict=True):
            instruction, text = split_input(raw, made.read.layout, row)
            earlier = "\n".join(text for turn in row.history for text in turn)
            source = raw.columns.get("source")
            contract["source"] = source if isinstance(source, str) and source.strip() else name
            pool.append(PoolRow(contract, Fields(instruction, text, row.response, earlier)))
    if repeats := number_repeats([row.contract for row in pool]):
        logger.warning("repeated ids: %d, such as %s; +1, ... are added", len(repeats), repeats[0])
    return pool


def remaining(pool: Sequence[PoolRow]) -> list[PoolRow]:
    """Return those without a verdict."""
    return [row for row in pool if row.verdict == PENDING]


def clean(pool: Sequence[PoolRow]) -> int:
    """Step 1: drop unfit rows, empty inputs that say there is none; return how many these are."""
    num_emptied = 0
    for _, row in _tracked(pool, "cleaning"):
        fields = row.fields
        prompt = without_fake_input(row.contract["prompt"], fields.input)
        if prompt is not None:
            num_emptied += 1
            row.contract["prompt"] = prompt
            fields = fields._replace(instruction=prompt, input="")
        row.verdict = Verdict(fault_of(fields) or "")
    return num_emptied


def drop_duplicates(pool: Sequence[PoolRow]) -> None:
    """Step 2: drop rows that repeat an earlier one, exactly or nearly."""
    exact: dict[str, int] = {}
    earlier, texts = NearDuplicates(), own_texts([row.pair for row in pool])
    for number, row in _tracked(pool, "finding duplicates"):
        first = exact.setdefault(row.key, number)
        if first < number:
            row.drop("exact_duplicate", pool[first], 1.0)
        elif found := earlier.find_or_add(number, texts[number], row.answer):
            row.drop("near_duplicate", pool[found.number], found.similarity)
    earlier.say_limited()


def drop_known(pool: Sequence[PoolRow], against: Sequence[PoolRow]) -> None:
    """Step 3: drop rows whose prompt is in the evaluation data, and near-duplicates of its rows.

    A prompt in the history counts as well.
    """
    known, texts = NearDuplicates(), own_texts([row.pair for row in (*against, *pool)])
    prompts: dict[str, int] = {}
    for number, other in enumerate(against):
        known.add(number, texts[number], other.answer)
        prompts.setdefault(_bare(other.prompt), number)
    prompts.pop("", None)
    for number, row in _tracked(pool, "comparing with --against"):
        asked = [row.prompt, row.contract["prompt"], *(turn[0] for turn in row.contract["history"])]
        same = next((prompts[bare] for bare in map(_bare, asked) if bare in prompts), None)
        found = None if same is None else Nearest(same, 1.0)
        if found := found or known.find(texts[len(against) + number], row.answer):
            row.drop("in_against", against[found.number], found.similarity)
    known.say_limited()


def _bare(text: str) -> str:
    """Return a text without what copies differ in: case, blank space, punctuation."""
    return "".join(filter(str.isalnum, text.lower()))


def _tracked(pool: Sequence[PoolRow], title: str) -> Iterator[tuple[int, PoolRow]]:
    """Yield those without a verdict, and their numbers."""
    with Progress(len(pool), title) as progress:
        for number, row in enumerate(pool):
            if row.verdict == PENDING:
                yield number, row
            progress.update()


def random_score(row: PoolRow, seed: int) -> float:
    """Return a score by chance, the same for a row in every run with this seed."""
    return Random(f"{seed}:{row.contract['id']}").random()


class Choice(NamedTuple):
    """The rows picked, best first, and those that chance and length alone would have picked."""

    picked: list[PoolRow]
    random: list[PoolRow]
    longest: list[PoolRow]
    rooms: dict[str, int]  # how many of each source were to be picked


def choose(
    pool: Sequence[PoolRow],
    budget: int,
    temperature: float | None,
    similarity: Callable[[Sequence[PoolRow]], Similar],
    seed: int,
) -> Choice:
    """Step 5: pick the best of each source, and give every row its verdict.

    The sources share the budget at a temperature (see `quotas`); None takes them for one.
    similarity is asked once, with the rows best first.
    """

    def source_of(row: PoolRow) -> str:
        return "" if temperature is None else row.contract["source"]

    def best_first(score: Callable[[PoolRow], float]) -> tuple[list[PoolRow], list[str]]:
        rows = sorted(pool, key=lambda row: (-score(row), random_score(row, seed)))
        return rows, list(map(source_of, rows))

    _, rooms = quotas(Counter(map(source_of, pool)), budget, temperature or 1.0)
    rows, sources = best_first(lambda row: row.score or 0.0)
    picked, skipped = pick(sources, rooms, similarity(rows))
    for index, row in enumerate(rows):
        row.verdict = Verdict("over_budget")
        if index in skipped:
            row.drop("too_similar", rows[skipped[index].number], skipped[index].similarity)
    for index in picked:
        rows[index].verdict = Verdict(SELECTED)
    chosen = [[rows[index] for index in picked]]
    for score in (partial(random_score, seed=seed), lambda row: float(count_words(row.answer))):
        rows, sources = best_first(score)
        chosen.append([rows[index] for index in pick(sources, rooms, lambda _: None)[0]])
    return Choice(chosen[0], chosen[1], chosen[2], rooms)
