"""Answer the rows of a data set, tuned and with the untouched base, score as rows finish, and
gather the report.

It joins decoding (`ptuning.model`) and scoring (`ptuning.evaluate`), which do not know each other.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME

from ptuning.data.dataset import GenerationDataset
from ptuning.data.tokenization import pad_left
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.engine.decoding import PUBLISHED_SAMPLING, Decoding, generate_answers
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
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
from ptuning.scoring.report import METHODS, ReportData, ReportRow, write_report
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
from ptuning.tunings.artefact import PTUNING, read_tuned_info
from ptuning.tunings.loading import choose_dtype
from ptuning.tunings.prefix import base_fingerprint
from ptuning.tunings.tuning import Tuning

REPORT_NAME = "report.html"
BASE_PREDICTIONS_NAME = "generated_predictions_base.txt"

logger = logging.getLogger("main")


@dataclass(frozen=True)
class Answers:
    """One pass over the rows."""

    texts: list[str | None]  # None: the row has no prompt
    scores: list[PairScores | None]  # None: nothing to compare, without a label or a prompt
    runtime_s: float

    @property
    def means(self) -> CorpusScores:
        """The means over the rows that have scores, blank answers counted."""
        return mean_scores(self.texts, self.scores)


class AnsweredRow(NamedTuple):
    """One row's answer and its scores, None as in `Answers`."""

    row_index: int
    text: str | None
    scores: PairScores | None


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


class BackgroundScores(ThreadPoolExecutor):
    """Scores by row number, computed in a thread while the next rows are generated.

    One thread is enough: a row takes milliseconds to score and far longer to generate, and torch's
    kernels run in parallel. Left by an error or Ctrl-C, it drops what is not scored yet.
    """

    def __init__(self) -> None:
        super().__init__(max_workers=1, thread_name_prefix="scores")
        self._scores: dict[int, Future[PairScores | None]] = {}

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the row being scored; after an error, for no other."""
        self.shutdown(cancel_futures=kind is not None)

    def add(self, index: int, prediction: str | None, label: str) -> None:
        """Have row `index` scored; returns at once."""
        self._scores[index] = self.submit(score_pair, prediction, label)

    def in_row_order(self) -> list[PairScores | None]:
        """Wait for every row added and return the scores in row order.

        What scoring a row raised is raised here.
        """
        return [self._scores[index].result() for index in sorted(self._scores)]


@dataclass(frozen=True)
class AnswerRun:
    """What both passes share.

    A row without a prompt is never given to a model: it has an empty answer in the files. Of
    several processes each answers a share of the rows, and has all answers in the end.
    """

    config: RunConfig
    tokenizer: ChatGLMTokenizer
    rows: GenerationDataset
    batch_size: int

    @cached_property
    def decoding(self) -> Decoding:
        """How answers are decoded: greedily or with beams, or as the published code sampled."""
        if self.config.recipe == "published":
            return PUBLISHED_SAMPLING
        return Decoding(
            max_new_tokens=self.config.new_tokens,
            max_length=self.config.generation_max_length,
            num_beams=self.config.beams,
        )

    def answer(self, model: ChatGLMForConditionalGeneration, *, is_tuned: bool) -> Answers:
        """Answer every row; model is the tuned one, or the untouched base.

        A file that an earlier run left unfinished is continued. A finished one is used again if it
        is the base's, or if the run was stopped before its scores were written.
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
        texts, scores = [row.text for row in rows], [row.scores for row in rows]
        return Answers(texts, scores, time.monotonic() - started)

    @property
    def results(self) -> Path:
        """The file of scores; it is there when a scoring was finished."""
        return Path(self.config.output_dir) / RESULTS_NAME

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
        texts: list[str | None] = [None] * len(indices)
        title = f"answering with the {'tuned model' if is_tuned else 'base'}"
        if num_processes() > 1:
            title += f", 1 share of {num_processes()}"
        if first and is_main_process():
            logger.info("%s: %d of %d rows are there already", title, first, len(indices))
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
                    self.results.unlink(missing_ok=True)  # those of answers that are replaced now
                file.add(place, label, text or "")
                scores.add(place, text, label)
                progress.update()
            answered = zip(indices, texts, scores.in_row_order(), strict=True)
            return [AnsweredRow(*row) for row in answered]

    def _generate(
        self, model: ChatGLMForConditionalGeneration, indices: Sequence[int]
    ) -> Iterator[tuple[int, str | None]]:
        """Yield (place in indices, answer) as rows finish; None for rows without a prompt.

        Those come right after the first answer: a run that fails before it replaces no old row, and
        one that is stopped later keeps the answers behind them.
        """
        asked = [place for place, index in enumerate(indices) if self.rows[index].input_ids]
        answers = generate_answers(
            model,
            [self.rows[indices[place]].input_ids for place in asked],
            pad=partial(pad_left, pad_id=self.tokenizer.pad_token_id),
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
        """Answer this process's share into a file of its own, and return the rows of all.

        Rows that `path` has are not answered again; a share that was stopped goes on with as many
        processes. The main process puts the shares together.
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
        gather(None)  # the rows are in their file before the parts go
        self._remove_parts(path)
        return rows

    def _remove_parts(self, path: Path) -> None:
        """Delete this process's part; the main one deletes what other runs left unfinished too."""
        whose = "*" if is_main_process() else f"{process_index()}of*"
        for part in path.parent.glob(f"{path.stem}.part{whose}"):
            part.unlink(missing_ok=True)

    def _finished_of(self, path: Path, fingerprint: str, *, repeats: bool) -> list[AnsweredRow]:
        """Return the rows that the main process finds in path, the same for every process."""
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
        """Return the answer that a file has to row `index`; None if the row has no prompt."""
        return row.prediction if self.rows[index].input_ids else None

    @cached_property
    def labels(self) -> list[str]:
        """The wanted answers as published: cut to max_target_length - 2 tokens and decoded again.

        So they are normalised (NFKC) exactly as the generated answers are. "" is no label.
        """
        encoded = self.tokenizer.encode_batch([row.label for row in self.rows.rows])
        return [self._text_of(ids[: self.config.max_target_length - 2]) for ids in encoded]

    def _text_of(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def _fingerprint(self, model: ChatGLMForConditionalGeneration, *, is_tuned: bool) -> str:
        """Return a hash of all that shapes an answer; sampled answers are never continued."""
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
        metrics: dict[str, float | None] = tuned.means.by_published_name("predict")
        metrics["predict_runtime"] = round(tuned.runtime_s, 3)
        if base is not None:
            metrics |= base.means.by_published_name("base")
        if retention is not None:
            metrics |= retention.by_name()
        write_results(Path(self.config.output_dir) / RESULTS_NAME, metrics)

    def report_rows(self, tuned: Answers, base: Answers | None) -> list[ReportRow]:
        """Return the rows side by side."""
        return [
            ReportRow(
                index=index,
                prompt=row.prompt,
                label=self.labels[index],
                tuned=tuned.texts[index],
                tuned_bleu=_bleu_of(tuned, index),
                base=base.texts[index] if base else None,
                base_bleu=_bleu_of(base, index) if base else None,
            )
            for index, row in enumerate(self.rows.rows)
        ]


def _bleu_of(answers: Answers, index: int) -> float | None:
    scores = answers.scores[index]
    return scores.bleu_4 if scores else None


def score(
    config: RunConfig,
    tuning: Tuning,
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    rows: Rows,
    *,
    batch_size: int,
) -> str:
    """Answer the test rows tuned and with the untouched base, score both; return their table.

    Writes predictions, predict_results.json and the report. Where no row has a label, a line that
    says so stands for the table. Processes but the first return "".
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
    info = read_tuned_info(scored)
    states = [Path(folder) / TRAINER_STATE_NAME for folder in (scored, output_dir)]
    report = ReportData(
        title=f"ChatGLM {METHODS[config.tuning or PTUNING]}",
        made_at=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        model=config.model_name_or_path,
        prefix=scored,
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
