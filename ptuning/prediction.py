"""Answer the rows of a data set, tuned and with the untouched base, score as rows finish, and
gather the report.

It joins decoding (`ptuning.model`) and scoring (`ptuning.evaluate`), which do not know each other.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import set_seed

from ptuning.data.collation import pad_left
from ptuning.data.dataset import GenerationDataset
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.evaluate.background_scores import BackgroundScores
from ptuning.evaluate.metrics import CorpusScores, PairScores, is_blank, mean_scores
from ptuning.evaluate.predictions import (
    PREDICTIONS_NAME,
    RESULTS_NAME,
    PredictionFile,
    write_results,
)
from ptuning.evaluate.report import ReportRow
from ptuning.evaluate.retention import Retention
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.decoding import Decoding, generate_answers
from ptuning.model.prefix_artefact import base_fingerprint

BASE_PREDICTIONS_NAME = "generated_predictions_base.txt"


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


@dataclass(frozen=True)
class AnswerRun:
    """What both passes share."""

    model: ChatGLMForConditionalGeneration
    tokenizer: ChatGLMTokenizer
    rows: GenerationDataset
    output_dir: Path
    max_target_length: int
    batch_size: int
    decoding: Decoding
    seed: int

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
        set_seed(self.seed)
        texts: list[str] = [""] * len(self.rows)
        fingerprint = self._fingerprint(model, is_tuned=is_tuned)
        with BackgroundScores() as scores, PredictionFile(path, fingerprint=fingerprint) as file:
            if len(file.finished) == len(self.rows) and is_tuned:
                file.restart()
            first = len(file.finished)
            description = "answering, tuned" if is_tuned else "answering with the base"
            bar = tqdm(total=len(self.rows), initial=first, desc=description, unit="row")
            for index, row in enumerate(file.finished):
                texts[index] = row.prediction
                scores.add(index, row.prediction, row.label)
            for offset, token_ids in generate_answers(
                model,
                [row.input_ids for row in self.rows.rows[first:]],
                pad=partial(pad_left, pad_id=self.tokenizer.pad_token_id),
                batch_size=self.batch_size,
                decoding=self.decoding,
            ):
                index = first + offset
                texts[index] = self._text_of(token_ids)
                file.add(index, self.labels[index], texts[index])
                scores.add(index, texts[index], self.labels[index])
                bar.update()
            bar.close()
            return Answers(texts, scores.in_row_order(), time.monotonic() - started)

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
