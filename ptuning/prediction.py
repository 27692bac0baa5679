"""Answer the rows of a data set, tuned and with the untouched base, score as rows finish, and
gather the report.

It joins decoding (`ptuning.model`) and scoring (`ptuning.evaluate`), which do not know each other.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from transformers import set_seed

from ptuning.data.collation import pad_left
from ptuning.data.dataset import GenerationDataset
from ptuning.data.general import GeneralPrompts
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.evaluate.metrics import CorpusScores, PairScores, is_blank, mean_scores, score_pair
from ptuning.evaluate.predictions import (
    PREDICTIONS_NAME,
    RESULTS_NAME,
    PredictionFile,
    write_results,
)
from ptuning.evaluate.report import ReportData, ReportRow, write_report
from ptuning.evaluate.retention import Retention
from ptuning.evaluate.table import format_scores_table
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.decoding import Decoding, generate_answers
from ptuning.model.prefix_artefact import base_fingerprint
from ptuning.output import Progress
from ptuning.retention import RetentionRun

REPORT_NAME = "report.html"
BASE_PREDICTIONS_NAME = "generated_predictions_base.txt"

logger = logging.getLogger("main")


@dataclass(frozen=True)
class Answers:
    """One pass over the rows."""

    texts: list[str]
    scores: list[PairScores]
    runtime_s: float

    @property
    def means(self) -> CorpusScores:
        """The means over all rows, blank answers counted."""
        return mean_scores(self.scores, empty=sum(map(is_blank, self.texts)))


class AnsweredRow(NamedTuple):
    """One row's answer and its scores."""

    row_index: int
    text: str
    scores: PairScores


def deal_rows(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Return the row numbers of each share, ascending: like numbers of rows, like lengths.

    The longest rows are dealt first, back and forth. The same for the same lengths everywhere.

    >>> deal_rows([5, 1, 9, 5, 7], 2)
    [[1, 2, 3], [0, 4]]
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for place, row in enumerate(longest_first):
        turn, seat = divmod(place, num_shares)
        shares[seat if turn % 2 == 0 else num_shares - 1 - seat].append(row)
    return [sorted(share) for share in shares]


class BackgroundScores:
    """Scores by row number, computed in a thread while the next rows are generated.

    One thread is enough: a row takes milliseconds to score and far longer to generate, and torch's
    kernels run in parallel. Left by an error or Ctrl-C, it drops what is not scored yet.
    """

    def __init__(self) -> None:
        """Start the thread with the first row."""
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scores")
        self._scores: dict[int, Future[PairScores]] = {}

    def __enter__(self) -> Self:
        """Return the scores themselves."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the row being scored; after an error, for no other."""
        self._pool.shutdown(cancel_futures=kind is not None)

    def add(self, index: int, prediction: str, label: str) -> None:
        """Have row `index` scored; returns at once."""
        self._scores[index] = self._pool.submit(score_pair, prediction, label)

    def in_row_order(self) -> list[PairScores]:
        """Wait for every row added and return the scores in row order.

        What scoring a row raised is raised here.
        """
        return [self._scores[index].result() for index in sorted(self._scores)]


def alone(value: Any) -> list[Any]:
    """Return what every process of a run of one has."""
    return [value]


@dataclass(frozen=True)
class AnswerRun:
    """What both passes share.

    Of several processes each answers a share of the rows, and has all answers in the end; `gather`
    returns the values that each of them gives it, by process.
    """

    model: ChatGLMForConditionalGeneration
    tokenizer: ChatGLMTokenizer
    rows: GenerationDataset
    output_dir: Path
    max_target_length: int
    batch_size: int
    decoding: Decoding
    seed: int
    process_index: int = 0
    num_processes: int = 1
    gather: Callable[[Any], list[Any]] = alone

    def tuned(self) -> Answers:
        """Answer with the model as it is: an unfinished file of the same run is continued, a
        finished one made anew.
        """
        path = self.output_dir / PREDICTIONS_NAME
        return self._answer(self.model, path, is_tuned=True)

    def base(self, untouched: ChatGLMForConditionalGeneration) -> Answers:
        """Answer with the untouched base; finished rows of an earlier run with the same base are
        used again.
        """
        path = self.output_dir / BASE_PREDICTIONS_NAME
        return self._answer(untouched, path, is_tuned=False)

    def _answer(
        self, model: ChatGLMForConditionalGeneration, path: Path, *, is_tuned: bool
    ) -> Answers:
        started = time.monotonic()
        set_seed(self.seed + self.process_index)
        fingerprint = self._fingerprint(model, is_tuned=is_tuned)
        if self.num_processes > 1:
            rows = self._answer_shared(model, path, fingerprint, is_tuned=is_tuned)
        else:
            with PredictionFile(path, fingerprint=fingerprint) as file:
                if len(file.finished) == len(self.rows) and is_tuned:
                    file.restart()
                rows = self._answer_rows(model, file, range(len(self.rows)), is_tuned=is_tuned)
            self._remove_parts(path)
        texts, scores = [row.text for row in rows], [row.scores for row in rows]
        return Answers(texts, scores, time.monotonic() - started)

    def _answer_rows(
        self,
        model: ChatGLMForConditionalGeneration,
        file: PredictionFile,
        indices: Sequence[int],
        *,
        is_tuned: bool,
    ) -> list[AnsweredRow]:
        """Return the rows of these numbers; those that file has are taken from there."""
        first = len(file.finished)
        texts = [row.prediction for row in file.finished] + [""] * (len(indices) - first)
        with (
            BackgroundScores() as scores,
            self._progress(len(indices), first, is_tuned) as progress,
        ):
            for place, row in enumerate(file.finished):
                scores.add(place, row.prediction, row.label)
            for offset, token_ids in generate_answers(
                model,
                [self.rows[index].input_ids for index in indices[first:]],
                pad=partial(pad_left, pad_id=self.tokenizer.pad_token_id),
                batch_size=self.batch_size,
                decoding=self.decoding,
            ):
                place = first + offset
                label = self.labels[indices[place]]
                texts[place] = self._text_of(token_ids)
                file.add(place, label, texts[place])
                scores.add(place, texts[place], label)
                progress.update()
            answered = zip(indices, texts, scores.in_row_order(), strict=True)
            return [AnsweredRow(*row) for row in answered]

    def _answer_shared(
        self,
        model: ChatGLMForConditionalGeneration,
        path: Path,
        fingerprint: str,
        *,
        is_tuned: bool,
    ) -> list[AnsweredRow]:
        """Answer this process's share into a file of its own, and return the rows of all.

        Rows that `path` has are not answered again; a share that was stopped goes on with as many
        processes. The main process puts the shares together.
        """
        finished = self._finished_of(path, fingerprint, is_tuned=is_tuned)
        first = len(finished)
        shares = deal_rows(list(self.rows.lengths[first:]), self.num_processes)
        own = [first + row for row in shares[self.process_index]]
        part = self._part_path(path)
        with PredictionFile(part, fingerprint=f"{fingerprint} from row {first}") as file:
            answered = self._answer_rows(model, file, own, is_tuned=is_tuned)
        gathered = [row for share in self.gather(answered) for row in share]
        rows = sorted([*finished, *gathered], key=lambda row: row.row_index)
        if self.process_index == 0:
            with PredictionFile(path, fingerprint=fingerprint) as file:
                if first == 0:
                    file.restart()
                for row in rows[first:]:
                    file.add(row.row_index, self.labels[row.row_index], row.text)
        self.gather(None)  # the rows are in their file before the parts go
        self._remove_parts(path)
        return rows

    def _part_path(self, path: Path) -> Path:
        part = f"part{self.process_index}of{self.num_processes}"
        return path.with_name(f"{path.stem}.{part}{path.suffix}")

    def _remove_parts(self, path: Path) -> None:
        """Delete this process's part; the main one deletes what other runs left unfinished too."""
        whose = "*" if self.process_index == 0 else f"{self.process_index}of*"
        for part in path.parent.glob(f"{path.stem}.part{whose}"):
            part.unlink(missing_ok=True)

    def _finished_of(self, path: Path, fingerprint: str, *, is_tuned: bool) -> list[AnsweredRow]:
        """Return the rows that the main process finds in path, the same for every process."""
        rows: list[AnsweredRow] = []
        if self.process_index == 0:
            found = PredictionFile(path, fingerprint=fingerprint).finished
            if len(found) < len(self.rows) or not is_tuned:
                rows = [
                    AnsweredRow(index, row.prediction, score_pair(row.prediction, row.label))
                    for index, row in enumerate(found)
                ]
        shared: list[AnsweredRow] = self.gather(rows)[0]
        return shared

    def _progress(self, total: int, initial: int, is_tuned: bool) -> Progress:
        title = f"answering with the {'tuned model' if is_tuned else 'base'}"
        if self.num_processes > 1:
            title += f", 1 share of {self.num_processes}"
        return Progress(total, title, initial=initial, visible=self.process_index == 0)

    @cached_property
    def labels(self) -> list[str]:
        """The wanted answers as published: cut to max_target_length - 2 tokens and decoded again.

        So they are normalised (NFKC) exactly as the generated answers are.
        """
        encoded = self.tokenizer.encode_batch([row.label for row in self.rows.rows])
        return [self._text_of(ids[: self.max_target_length - 2]) for ids in encoded]

    def _text_of(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def _fingerprint(self, model: ChatGLMForConditionalGeneration, *, is_tuned: bool) -> str:
        """Return a hash of everything that shapes an answer; sampled answers are never taken up
        again.
        """
        digest = hashlib.sha256()
        parts: list[Any] = [base_fingerprint(model), str(model.dtype), asdict(self.decoding)]
        if self.decoding.do_sample:
            parts.append(time.time_ns())
        trained = [value for value in model.parameters() if is_tuned and value.requires_grad]
        for value in trained:
            digest.update(value.detach().float().cpu().numpy().tobytes())
        prompts = [row.input_ids for row in self.rows.rows]
        digest.update(json.dumps([parts, prompts, self.labels]).encode())
        return digest.hexdigest()

    def write_results(
        self, tuned: Answers, base: Answers | None, retention: Retention | None = None
    ) -> None:
        """Write predict_results.json, the base's figures and those of forgetting beside it."""
        metrics = tuned.means.by_published_name("predict")
        metrics["predict_runtime"] = round(tuned.runtime_s, 3)
        if base is not None:
            metrics |= base.means.by_published_name("base")
        if retention is not None:
            metrics |= retention.by_name()
        write_results(self.output_dir / RESULTS_NAME, metrics)

    def report_rows(self, tuned: Answers, base: Answers | None) -> list[ReportRow]:
        """Return the rows side by side."""
        return [
            ReportRow(
                index=index,
                prompt=row.prompt,
                label=self.labels[index],
                tuned=tuned.texts[index],
                tuned_bleu=tuned.scores[index].bleu_4,
                base=None if base is None else base.texts[index],
                base_bleu=None if base is None else base.scores[index].bleu_4,
            )
            for index, row in enumerate(self.rows.rows)
        ]


def score(
    run: AnswerRun,
    report: Callable[..., ReportData],
    *,
    untuned: Callable[[ChatGLMForConditionalGeneration], AbstractContextManager[Any]] | None,
    compare_base: bool,
    general: GeneralPrompts | None,
) -> str:
    """Answer every row tuned and with the untouched base, score both; return the table of scores.

    `report` makes the report's data of scores and rows. `untuned` gives the base in a block, None
    when it is not known; `general` are prompts to measure forgetting with. Processes other than the
    first return "".
    """
    measure = None
    if general is not None and run.process_index == 0:
        measure = RetentionRun(general, run.tokenizer, batch_size=run.batch_size)
    tuned = run.tuned()
    base = retention = known = None
    if untuned is not None and (compare_base or measure is not None):
        with untuned(run.model) as untouched:
            if compare_base:
                base = run.base(untouched)
            if measure is not None:
                known = measure.ask_base(untouched)
    if measure is not None and known is not None:
        retention = measure.compare(run.model, known)
        logger.info(retention.line())
    if run.process_index > 0:
        return ""
    run.write_results(tuned, base, retention)
    path = run.output_dir / REPORT_NAME
    data = report(
        tuned=tuned.means,
        base=base.means if base else None,
        retention=retention,
        rows=run.report_rows(tuned, base),
    )
    write_report(path, data)
    logger.info("Report with all answers: %s", path)
    return format_scores_table(data.base, data.tuned)
