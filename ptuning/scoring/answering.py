"""Answer the rows of a data set with the tuned model and its base, score them, write the report."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME

from ptuning.data.dataset import GenerationDataset
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.engine.engine import PUBLISHED_SAMPLING, Decoding, generate_answers
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.checkpoint.layout import base_fingerprint
from ptuning.output import Progress
from ptuning.scoring.metrics import (
    CorpusScores,
    PairScores,
    format_scores_table,
    mean_scores,
    score_pair,
)
from ptuning.scoring.pictures import load_log_history
from ptuning.scoring.predictions import (
    PREDICTIONS_NAME,
    RESULTS_NAME,
    Prediction,
    PredictionFile,
    write_results,
)
from ptuning.scoring.report import ReportData, ReportRow, run_name, write_report
from ptuning.scoring.retention import Retention, RetentionRun
from ptuning.train.processes import (
    gather,
    in_main_process,
    is_main_process,
    num_processes,
    process_index,
)
from ptuning.train.rows import Rows
from ptuning.train.run_config import RunConfig
from ptuning.train.tuning import Tuning
from ptuning.tunings.artefact import PTUNING, read_info
from ptuning.tunings.loading import choose_dtype

REPORT_NAME = "report.html"
BASE_PREDICTIONS_NAME = "generated_predictions_base.txt"

logger = logging.getLogger("main")


class AnsweredRow(NamedTuple):
    """One row's answer and its scores."""

    row_index: int
    text: str | None  # None: the row has no prompt
    scores: PairScores | None  # None: nothing to compare, without a label or a prompt


@dataclass(frozen=True)
class Answers:
    """One model's answers to every row, in row order."""

    rows: list[AnsweredRow]
    runtime_s: float

    @property
    def means(self) -> CorpusScores:
        """The means over the rows that have scores; blank answers are counted."""
        return mean_scores([row.text for row in self.rows], [row.scores for row in self.rows])


def deal_rows(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Return the row numbers of each share, ascending: equal in number and similar in length.

    The longest rows are dealt first, in alternating order. Deterministic.

    >>> deal_rows([5, 1, 9, 5, 7], 2)
    [[1, 2, 3], [0, 4]]
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for place, row in enumerate(longest_first):
        turn, seat = divmod(place, num_shares)
        shares[seat if turn % 2 == 0 else num_shares - 1 - seat].append(row)
    return [sorted(share) for share in shares]


class BackgroundScores(ThreadPoolExecutor):
    """Scores rows in a thread while the next rows are generated.

    One thread is enough: scoring a row takes milliseconds, generating it far longer. An error or
    Ctrl-C drops the rows that are not scored yet.
    """

    def __init__(self) -> None:
        super().__init__(max_workers=1, thread_name_prefix="scores")
        self._scores: dict[int, Future[PairScores | None]] = {}

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the row being scored; cancel the others after an error."""
        self.shutdown(cancel_futures=kind is not None)

    def add(self, index: int, prediction: str | None, label: str) -> None:
        """Queue row `index` for scoring."""
        self._scores[index] = self.submit(score_pair, prediction, label)

    def in_row_order(self) -> list[PairScores | None]:
        """Wait for every row added; return the scores in row order, or raise a row's exception."""
        return [self._scores[index].result() for index in sorted(self._scores)]


@dataclass(frozen=True)
class AnswerRun:
    """The rows of a run and how they are answered, by the tuned model and by the base.

    A row without a prompt is not given to a model: its answer in the files is empty. Each of
    several processes answers a share of the rows; every process returns all answers.
    """

    config: RunConfig
    tokenizer: ChatGLMTokenizer
    rows: GenerationDataset
    batch_size: int
    title: str | None = None  # of the progress bar; None: says which of the two models answers

    @cached_property
    def decoding(self) -> Decoding:
        """Greedy or beam search, or the published code's sampling."""
        if self.config.recipe == "published":
            return PUBLISHED_SAMPLING
        return Decoding(
            max_new_tokens=self.config.new_tokens,
            max_length=self.config.generation_max_length,
            num_beams=self.config.beams,
        )

    def answer(self, model: ChatGLMForConditionalGeneration, *, is_tuned: bool) -> Answers:
        """Answer every row with the tuned model, or with the untouched base.

        An earlier run's unfinished file is continued. A finished file is reused if it is the
        base's, or if the run was stopped before its scores were written.
        """
        name = PREDICTIONS_NAME if is_tuned else BASE_PREDICTIONS_NAME
        path, started = Path(self.config.output_dir) / name, time.monotonic()
        set_seed(self.config.seed + process_index())
        fingerprint = self._fingerprint(model, is_tuned=is_tuned)
        repeats = is_tuned and in_main_process(self.results.is_file)
        if num_processes() > 1:
            rows = self._answer_shared(model, path, fingerprint, is_tuned=is_tuned, repeats=repeats)
        else:
            with PredictionFile(path, fingerprint=fingerprint) as file:
                if len(file.finished) == len(self.rows) and repeats:
                    file.restart()
                rows = self._answer_rows(model, file, range(len(self.rows)), is_tuned=is_tuned)
            self._remove_parts(path)
        return Answers(rows, time.monotonic() - started)

    @property
    def results(self) -> Path:
        """The file of scores, written when everything is scored."""
        return Path(self.config.output_dir) / RESULTS_NAME

    def _answer_rows(
        self,
        model: ChatGLMForConditionalGeneration,
        file: PredictionFile,
        indices: Sequence[int],
        *,
        is_tuned: bool,
    ) -> list[AnsweredRow]:
        """Return the rows at indices; those that are in file are not answered again."""
        first = len(file.finished)
        texts: list[str | None] = [None] * len(indices)
        title = self.title or f"answering with the {'tuned model' if is_tuned else 'base'}"
        if num_processes() > 1:
            title += f", 1 share of {num_processes()}"
        if first and is_main_process():
            logger.info("%s: %d of %d rows are already answered", title, first, len(indices))
        progress = Progress(len(indices), title, initial=first, visible=is_main_process())
        with BackgroundScores() as scores, progress:
            for place, row in enumerate(file.finished):
                texts[place] = self._answer_in(row, indices[place])
                scores.add(place, texts[place], row.label)
            for offset, text in self._generate(model, indices[first:]):
                place = first + offset
                label = self.labels[indices[place]]
                texts[place] = text
                if is_tuned and file.next_index == first:
                    self.results.unlink(missing_ok=True)  # the answers it scored are replaced now
                file.add(place, label, text or "")
                scores.add(place, text, label)
                progress.update()
            answered = zip(indices, texts, scores.in_row_order(), strict=True)
            return [AnsweredRow(*row) for row in answered]

    def _generate(
        self, model: ChatGLMForConditionalGeneration, indices: Sequence[int]
    ) -> Iterator[tuple[int, str | None]]:
        """Yield (place in indices, answer) as rows finish; None for rows without a prompt.

        The latter follow the first answer: a run that fails before that replaces no old row, and a
        run that is stopped after it keeps the answers to the rows behind them.
        """
        asked = [place for place, index in enumerate(indices) if self.rows[index].input_ids]
        answers = generate_answers(
            model,
            [self.rows[indices[place]].input_ids for place in asked],
            batch_size=self.batch_size,
            decoding=self.decoding,
        )
        answered = ((asked[offset], self._text_of(token_ids)) for offset, token_ids in answers)
        yield from islice(answered, 1)
        yield from ((place, None) for place in sorted({*range(len(indices))} - {*asked}))
        yield from answered

    def _answer_shared(
        self,
        model: ChatGLMForConditionalGeneration,
        path: Path,
        fingerprint: str,
        *,
        is_tuned: bool,
        repeats: bool,
    ) -> list[AnsweredRow]:
        """Answer this rank's share into its own part file; return the rows of every rank.

        Rows in `path` are not answered again. A part that was stopped is continued if the number of
        processes is the same. The main process merges the parts.
        """
        finished = self._finished_of(path, fingerprint, repeats=repeats)
        first = len(finished)
        shares = deal_rows(list(self.rows.lengths[first:]), num_processes())
        own = [first + row for row in shares[process_index()]]
        part = f"{path.stem}.part{process_index()}of{num_processes()}{path.suffix}"
        fingerprint_of_part = f"{fingerprint} from row {first}"
        with PredictionFile(path.with_name(part), fingerprint=fingerprint_of_part) as file:
            answered = self._answer_rows(model, file, own, is_tuned=is_tuned)
        gathered = [row for share in gather(answered) for row in share]
        rows = sorted([*finished, *gathered], key=lambda row: row.row_index)
        if is_main_process():
            with PredictionFile(path, fingerprint=fingerprint) as file:
                if first == 0:
                    file.restart()
                for row in rows[first:]:
                    file.add(row.row_index, self.labels[row.row_index], row.text or "")
        gather(None)  # a barrier: the rows are in their file before the parts are deleted
        self._remove_parts(path)
        return rows

    def _remove_parts(self, path: Path) -> None:
        """Delete this rank's part; the main process also deletes those of earlier runs."""
        whose = "*" if is_main_process() else f"{process_index()}of*"
        for part in path.parent.glob(f"{path.stem}.part{whose}"):
            part.unlink(missing_ok=True)

    def _finished_of(self, path: Path, fingerprint: str, *, repeats: bool) -> list[AnsweredRow]:
        """Return the rows that the main process finds in path, on every rank."""
        rows: list[AnsweredRow] = []
        if is_main_process():
            found = PredictionFile(path, fingerprint=fingerprint).finished
            if len(found) < len(self.rows) or not repeats:
                rows = [
                    AnsweredRow(index, text, score_pair(text, row.label))
                    for index, row in enumerate(found)
                    for text in [self._answer_in(row, index)]
                ]
        return list(gather(rows)[0])

    def _answer_in(self, row: Prediction, index: int) -> str | None:
        """Return a file's answer to row `index`; None if the row has no prompt."""
        return row.prediction if self.rows[index].input_ids else None

    @cached_property
    def labels(self) -> list[str]:
        """The reference answers as published: cut to max_target_length - 2 tokens and decoded.

        Decoding normalises them (NFKC) like the generated answers. "" means no label.
        """
        encoded = self.tokenizer.encode_batch([row.label for row in self.rows])
        return [self._text_of(ids[: self.config.max_target_length - 2]) for ids in encoded]

    def _text_of(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def _fingerprint(self, model: ChatGLMForConditionalGeneration, *, is_tuned: bool) -> str:
        """Return a hash of everything that determines an answer, unique if answers are sampled."""
        digest = hashlib.sha256()
        parts: list[Any] = [base_fingerprint(model), str(model.dtype), asdict(self.decoding)]
        if self.decoding.do_sample:
            parts.append(time.time_ns())
        trained = [value for value in model.parameters() if is_tuned and value.requires_grad]
        for value in trained:
            digest.update(value.detach().float().cpu().numpy().tobytes())
        prompts = [row.input_ids for row in self.rows]
        digest.update(json.dumps([parts, prompts, self.labels]).encode())
        return digest.hexdigest()

    def write_results(
        self, tuned: Answers, base: Answers | None, retention: Retention | None = None
    ) -> None:
        """Write predict_results.json: scores of the tuned model, the base, and forgetting."""
        metrics: dict[str, float | None] = tuned.means.by_published_name("predict")
        metrics["predict_runtime"] = round(tuned.runtime_s, 3)
        if base is not None:
            metrics |= base.means.by_published_name("base")
        if retention is not None:
            metrics |= retention.by_name()
        write_results(Path(self.config.output_dir) / RESULTS_NAME, metrics)

    def report_rows(self, tuned: Answers, base: Answers | None) -> list[ReportRow]:
        """Return the rows with both answers."""
        unasked = [AnsweredRow(row.row_index, None, None) for row in tuned.rows]
        pairs = zip(tuned.rows, base.rows if base else unasked, strict=True)
        return [
            ReportRow(
                index=new.row_index,
                prompt=row.prompt,
                label=self.labels[new.row_index],
                tuned=new.text,
                tuned_bleu=new.scores.bleu_4 if new.scores else None,
                base=old.text,
                base_bleu=old.scores.bleu_4 if old.scores else None,
            )
            for row, (new, old) in zip(self.rows, pairs, strict=True)
        ]


def score(
    config: RunConfig,
    tuning: Tuning,
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    rows: Rows,
    *,
    batch_size: int,
) -> str:
    """Answer and score the test rows with the tuned model and the base; return a table of scores.

    Writes the predictions, predict_results.json and the report. Without a label in any row the
    table is replaced by a line that says so. Ranks other than 0 return "".
    """
    assert rows.test is not None, "asked for only with rows to answer"
    dtype = choose_dtype(model.device, config.dtype_name)
    if model.dtype != dtype:  # full fine-tuning trains in float32
        model.to(dtype)  # type: ignore[arg-type]  # a wrapped nn.Module.to
    output_dir = Path(config.output_dir)
    run = AnswerRun(config, tokenizer, rows.test, batch_size)
    general = None
    if rows.general is not None and is_main_process():
        general = RetentionRun(rows.general, tokenizer, batch_size=batch_size)
    tuned = run.answer(model, is_tuned=True)
    base = retention = None
    if tuning.base is not None and (config.compare_base or general):
        with tuning.untuned(model) as untouched:
            base = run.answer(untouched, is_tuned=False) if config.compare_base else None
            known = general.ask_base(untouched) if general else None
        if general and known:
            retention = general.compare(model, known)
            logger.info(retention.line())
    if not is_main_process():
        return ""
    run.write_results(tuned, base, retention)
    scored = config.output_dir if config.do_train else tuning.checkpoint or tuning.weights
    info = read_info(scored)
    states = [Path(folder) / TRAINER_STATE_NAME for folder in (scored, output_dir)]
    report = ReportData(
        run=run_name(scored),
        made_at=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        model=config.model_name_or_path,
        tuned_path=scored,
        tuning=config.tuning or PTUNING,
        step=info.step if info else None,
        tuned=tuned.means,
        base=base.means if base else None,
        retention=retention,
        rows=run.report_rows(tuned, base),
        settings=asdict(config.row_format) | asdict(run.decoding),
        log_history=next((load_log_history(path) for path in states if path.is_file()), []),
    )
    write_report(output_dir / REPORT_NAME, report)
    logger.info("Report with all answers: %s", (output_dir / REPORT_NAME).absolute())
    if report.tuned.means is None:
        return (
            f"Rows answered: {report.tuned.samples}. None has an answer to compare with, so there "
            f"are no scores. The answers are in {(output_dir / PREDICTIONS_NAME).absolute()}"
        )
    return format_scores_table(report.base, report.tuned)
