"""`python -m ptuning choose-checkpoint RUN --dev FILE`: the checkpoint that answers best.

Validation loss can rise while answers still improve, so every checkpoint answers the dev prompts
greedily, and the answers decide. The base is loaded once. Answers are kept in RUN: the same command
continues where it was stopped, and with --copy added it has nothing left to generate.
Source: LIMA, https://arxiv.org/abs/2305.11206, section 3 and appendix B.
"""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from ptuning.commands.asking import check_least, open_endpoint, refuse_endpoint_flags
from ptuning.completions.endpoint import EndpointSource
from ptuning.completions.journal import digest, saved_scores, to_line
from ptuning.data.dataset import GenerationDataset, load_generation_dataset
from ptuning.data.formats import UnknownColumns
from ptuning.data.prompts import COLUMN_FIELDS, TextRow
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.model.cpu.linear import prepack_if_room
from ptuning.model.cpu.threads import limit_threads
from ptuning.scoring.answering import AnswerRun
from ptuning.scoring.pictures import load_log_history
from ptuning.scoring.ranking import JUDGE, Candidate, format_ranking, lead, rank
from ptuning.select.judge import judge, judge_templates
from ptuning.storage import INFO_NAME, write_atomically, write_json
from ptuning.train.checkpoints import MANIFEST_NAME, fault_of
from ptuning.train.processes import trainer_arguments
from ptuning.train.run_config import RunConfig, parse_arguments
from ptuning.train.run_directory import RunDirectory
from ptuning.train.tuning import load_model, open_tuning
from ptuning.tunings.artefact import FULL, MARKS, PUBLISHED_NAME
from ptuning.tunings.loading import base_of, load_tokenizer

NAME = "choose-checkpoint"
BASE = "base"
# Flags that decide how a run answers, besides those that its artefacts remember.
RECORDED = (
    *("quantization_bit", "quantize_embeddings", "bf16", "fp16"),
    *("tokenizer_name", "model_revision"),
)

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> int:
    """Print the ranking, write the report, copy if asked; 1 if a checkpoint had to be skipped."""
    folder: Path = arguments.run
    check_least(arguments, batch_size=1, max_new_tokens=3)
    if not folder.is_dir():
        raise ValueError(f"RUN is {folder}, which is not a folder; give main.py's --output_dir.")
    for flag in ("endpoint", "model"):
        if (arguments.metric == JUDGE) != (getattr(arguments, flag) is not None):
            raise ValueError(f"--metric judge and --{flag} need each other; give both or neither.")
    if arguments.metric != JUDGE:
        refuse_endpoint_flags(arguments, "api", "api_key_env", "timeout", "concurrency")
    with RunDirectory(folder) as directory:
        checkpoints, skipped = _find_checkpoints(directory)
        config = _read_config(checkpoints[-1], directory, arguments)
        tokenizer = load_tokenizer(config.tokenizer_name or config.model_name_or_path, **config.hub)
        rows = _read_dev(arguments.dev, config, tokenizer, arguments.metric)
        judge_source = open_endpoint(arguments) if arguments.metric == JUDGE else None
        try:
            found = _answer(config, tokenizer, rows, checkpoints, arguments.batch_size)
            if judge_source is not None:
                found = _judge(judge_source, rows, found, folder / NAME)
        except KeyboardInterrupt:
            logger.warning("Type the same command again to continue; finished answers are kept.")
            raise
        base = found.pop() if found[-1].name == BASE else None
        ranked = rank(found, arguments.metric)
        sys.stdout.write(format_ranking(ranked, base, arguments.metric))
        best = folder / ranked[0].name
        if base is not None and base.score(arguments.metric) >= ranked[0].score(arguments.metric):
            logger.warning("No checkpoint answers better than the untouched base.")
        if arguments.copy:
            _copy(best, folder, str(config.tuning))
        else:
            logger.info("To use it: give %s as the prefix or model, or add --copy", best)
        report = {
            "best": best.name,
            "metric": arguments.metric,
            "judge": arguments.model,
            **lead(ranked, arguments.metric),
            "copied": arguments.copy,
            "checkpoints": [candidate.figures() for candidate in ranked],
            "base": base and base.figures(),
            "skipped": skipped,
            "settings": _settings(arguments, config),
        }
        write_json(folder / f"{NAME}.json", report)
        shown = ranked if base is None else [*ranked, base]
        _write_answers(folder / f"{NAME}.jsonl", rows, shown, arguments.metric)
    logger.info("Figures: %s; answers: %s", folder / f"{NAME}.json", folder / f"{NAME}.jsonl")
    return 1 if skipped else 0


def _find_checkpoints(directory: RunDirectory) -> tuple[list[Path], dict[str, str]]:
    """Return the complete checkpoints, oldest first, and what is wrong with each of the others."""
    folders = directory.all_checkpoints()
    skipped: dict[str, str] = {}
    for folder in folders:
        # The published code writes no manifest: damage is found when its weights are read.
        if (folder / MANIFEST_NAME).is_file() and (fault := fault_of(folder)):
            skipped[folder.name] = fault
            logger.warning("%s is skipped: %s", folder, fault)
    if len(skipped) == len(folders):
        raise ValueError(
            f"RUN is {directory.path}, which has no {'complete ' if skipped else ''}checkpoint-N "
            "to choose from; train with --save_strategy epoch, or with --save_steps 100, and "
            "without --save_total_limit, which deletes the older ones."
        )
    return [folder for folder in folders if folder.name not in skipped], skipped


def _read_config(newest: Path, directory: RunDirectory, arguments: argparse.Namespace) -> RunConfig:
    """Return how the run answers rows, with what was typed in place of what it remembers."""
    then = directory.recorded()
    base = arguments.model_name_or_path or base_of(newest, flag="--model_name_or_path")
    flags: dict[str, Any] = {name: then.get(name) for name in RECORDED} | {
        "do_predict": True,
        "output_dir": directory.path,
        "test_file": arguments.dev,
        "ptuning_checkpoint": newest,
        "model_name_or_path": base,
    }
    if arguments.quantization_bit is not None:
        flags["quantization_bit"] = arguments.quantization_bit
    if arguments.max_new_tokens is not None:
        flags["max_target_length"] = arguments.max_new_tokens
    config = parse_arguments([f"--{name}={value}" for name, value in flags.items() if value])
    if arguments.copy and config.tuning == FULL:
        raise ValueError(
            "--copy is for prefixes and LoRA adapters, and this run tuned the whole model; leave "
            "it out, and use the folder of the best checkpoint as the model."
        )
    return config


def _read_dev(
    path: Path, config: RunConfig, tokenizer: ChatGLMTokenizer, metric: str
) -> GenerationDataset:
    """Return the rows to answer: in the run's columns, else in those that are found."""
    try:
        rows, summary = load_generation_dataset(path, tokenizer, config.row_format)
    except UnknownColumns:
        unnamed: dict[str, Any] = dict.fromkeys(COLUMN_FIELDS)
        own = replace(config.row_format, format="auto", **unnamed)
        rows, summary = load_generation_dataset(path, tokenizer, own)
    if not summary.num_labelled and metric != JUDGE:
        raise ValueError(
            f"--dev is {path}, which has no answers to compare with; add a column such as "
            "response, or use --metric judge."
        )
    for line in summary.lines():
        logger.info(line)
    return rows


def _answer(
    config: RunConfig,
    tokenizer: ChatGLMTokenizer,
    rows: GenerationDataset,
    checkpoints: Sequence[Path],
    batch_size: int,
) -> list[Candidate]:
    """Return the checkpoints' answers, and last the base's if it need not be loaded again."""
    limit_threads()
    tuning = open_tuning(config)
    model = load_model(config, tuning, trainer_arguments(config))
    if config.tuning != FULL:
        prepack_if_room(model)
    kept = Path(config.output_dir) / NAME
    # Greedy, whereas the published recipe samples.
    run = AnswerRun(replace(config, recipe="corrected"), tokenizer, rows, batch_size)

    def answers_of(name: str, model: Any, title: str, loss: float | None = None) -> Candidate:
        own = replace(run, config=replace(run.config, output_dir=str(kept / name)), title=title)
        answered = own.answer(model, is_tuned=name != BASE).rows
        return Candidate(
            name=name,
            texts=[row.text for row in answered],
            pairs=[row.scores for row in answered],
            validation_loss=loss,
        )

    found = []
    for number, checkpoint in enumerate(checkpoints, 1):
        tuning.restore(model, checkpoint)
        title = f"answering with {checkpoint.name} ({number} of {len(checkpoints)})"
        loss = read_validation_loss(checkpoint)
        found.append(answers_of(checkpoint.name, model, title, loss))
    if config.tuning != FULL:
        with tuning.untuned(model) as untouched:
            found.append(answers_of(BASE, untouched, "answering with the base"))
    return found


def _judge(
    source: EndpointSource, rows: GenerationDataset, found: Sequence[Candidate], folder: Path
) -> list[Candidate]:
    """Return the candidates with grades, only of rows where every checkpoint got one.

    The same answer to a row is graded once; grades are kept like answers.
    """
    asked = {
        digest([row.prompt, text]): TextRow(row.line, row.prompt, text)
        for candidate in found
        for row, text in zip(rows, candidate.texts, strict=True)
        if text is not None
    }
    judge_of = {"model": source.name, "prompts": digest(judge_templates())}
    path, answers = folder / f"judge-{digest(judge_of)}.jsonl", list(asked.values())
    known = saved_scores(
        *(path, judge_of, list(asked)),
        lambda missing: judge(source, [answers[index] for index in missing]),
        "judging",
    )
    graded = [
        [known.get(digest([row.prompt, text])) for row, text in zip(rows, of.texts, strict=True)]
        for of in found
    ]
    of_checkpoints = [own for own, of in zip(graded, found, strict=True) if of.name != BASE]
    counts = [None not in grades for grades in zip(*of_checkpoints, strict=True)]
    if not any(counts):
        raise ValueError(f"--model {source.name} graded no row for every checkpoint; try another.")
    if not all(counts):
        text = "%d of %d rows count: to the others the judge did not give every grade"
        logger.warning(text, sum(counts), len(rows))
    return [
        replace(of, grades=[grade if c else None for grade, c in zip(own, counts, strict=True)])
        for own, of in zip(graded, found, strict=True)
    ]


def read_validation_loss(checkpoint: Path) -> float | None:
    """Return the loss that the run logged at a checkpoint's step, None if it did not validate."""
    state = checkpoint / TRAINER_STATE_NAME
    step = int(checkpoint.name.partition("-")[2])
    for entry in reversed(load_log_history(state) if state.is_file() else []):
        if entry.get("step") == step and math.isfinite(loss := entry.get("eval_loss", math.nan)):
            return float(loss)
    return None


def _copy(best: Path, run: Path, tuning: str) -> None:
    """Replace what a run tuned by a checkpoint's, the description last."""
    for name in (PUBLISHED_NAME, *reversed(MARKS[tuning]), INFO_NAME):
        if (best / name).is_file():
            write_atomically(run / name, (best / name).read_bytes())
    logger.info(
        "Copied %s into %s; to score it again: PREFIX=%s bash evaluate.sh",
        best,
        run,
        quote(str(run)),
    )


def _settings(arguments: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    """Return what the answers depend on, by the names of the flags."""
    names = ("source_prefix", "max_source_length", "max_target_length", "recipe")
    values = {name: getattr(config, name) for name in ("model_name_or_path", *RECORDED, *names)}
    return {"dev": str(arguments.dev), "batch_size": arguments.batch_size, **values}


def _write_answers(
    path: Path, rows: GenerationDataset, candidates: Sequence[Candidate], metric: str
) -> None:
    """Write a JSON line per row: prompt, reference, and every answer and score, the best first."""
    scores = {candidate.name: candidate.row_scores(metric) for candidate in candidates}
    lines = [
        to_line(
            {
                "prompt": row.prompt,
                "reference": row.label,
                "answers": {candidate.name: candidate.texts[index] for candidate in candidates},
                "scores": {name: of_rows[index] for name, of_rows in scores.items()},
            }
        )
        for index, row in enumerate(rows)
    ]
    write_atomically(path, b"".join(lines))
