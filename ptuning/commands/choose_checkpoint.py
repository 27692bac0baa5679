"""`python -m ptuning choose-checkpoint RUN --dev FILE`: the checkpoint that answers best.

Validation loss can rise while answers still improve, so every checkpoint answers the dev prompts
greedily, and the answers decide. The base is loaded once. Answers are kept in RUN: the same command
continues where it was stopped, and with --copy added it has nothing left to generate.
Source: LIMA, https://arxiv.org/abs/2305.11206, section 3 and appendix B.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from ptuning.data.dataset import GenerationDataset, load_generation_dataset
from ptuning.data.formats import UnknownColumns
from ptuning.data.prompts import COLUMN_FIELDS
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.model.cpu.linear import prepack_if_room
from ptuning.model.cpu.threads import limit_threads
from ptuning.scoring.answering import AnswerRun
from ptuning.scoring.pictures import load_log_history
from ptuning.scoring.ranking import Candidate, format_ranking, lead, rank
from ptuning.storage import INFO_NAME, write_atomically, write_json
from ptuning.train.checkpoints import MANIFEST_NAME, fault_of
from ptuning.train.processes import trainer_arguments
from ptuning.train.run_config import RunConfig, parse_arguments
from ptuning.train.run_directory import RunDirectory
from ptuning.train.tuning import load_model, open_tuning
from ptuning.tunings.artefact import FULL, MARKS, PUBLISHED_NAME
from ptuning.tunings.loading import base_of, load_tokenizer

NAME = "choose-checkpoint"
# Flags that decide how a run answers, besides those that its artefacts remember.
RECORDED = (
    *("quantization_bit", "quantize_embeddings", "bf16", "fp16"),
    *("tokenizer_name", "model_revision"),
)

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> int:
    """Print the ranking, write the report, copy if asked; 1 if a checkpoint had to be skipped."""
    folder: Path = arguments.run
    for flag, least in (("batch_size", 1), ("max_new_tokens", 3)):
        value = getattr(arguments, flag)
        if value is not None and value < least:
            raise ValueError(f"--{flag} is {value}; use {least} or more.")
    if not folder.is_dir():
        raise ValueError(f"RUN is {folder}, which is not a folder; give main.py's --output_dir.")
    with RunDirectory(folder) as directory:
        checkpoints, skipped = _find_checkpoints(directory)
        config = _read_config(checkpoints[-1], directory, arguments)
        tokenizer = load_tokenizer(config.tokenizer_name or config.model_name_or_path, **config.hub)
        rows = _read_dev(arguments.dev, config, tokenizer)
        try:
            found, base = _answer(config, tokenizer, rows, checkpoints, arguments.batch_size)
        except KeyboardInterrupt:
            logger.warning("Type the same command again to continue; finished answers are kept.")
            raise
        ranked = rank(found, arguments.metric)
        sys.stdout.write(format_ranking(ranked, base, arguments.metric))
        best = folder / ranked[0].name
        if arguments.copy:
            _copy(best, folder, str(config.tuning))
        else:
            logger.info("To use it: give %s as the prefix or model, or add --copy", best)
        report = {
            "best": best.name,
            "metric": arguments.metric,
            **lead(ranked, arguments.metric),
            "copied": arguments.copy,
            "checkpoints": [candidate.figures() for candidate in ranked],
            "base": base and base.figures(),
            "skipped": skipped,
            "settings": _settings(arguments, config),
        }
        write_json(folder / f"{NAME}.json", report)
        _write_answers(folder / f"{NAME}.jsonl", rows, [*ranked, *([base] if base else [])])
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


def _read_dev(path: Path, config: RunConfig, tokenizer: ChatGLMTokenizer) -> GenerationDataset:
    """Return the rows to answer: in the run's columns, else in those that are found."""
    try:
        rows, summary = load_generation_dataset(path, tokenizer, config.row_format)
    except UnknownColumns:
        unnamed: dict[str, Any] = dict.fromkeys(COLUMN_FIELDS)
        own = replace(config.row_format, format="auto", **unnamed)
        rows, summary = load_generation_dataset(path, tokenizer, own)
    if not summary.num_labelled:
        raise ValueError(
            f"--dev is {path}, which has no answers to compare with; add a column such as response."
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
) -> tuple[list[Candidate], Candidate | None]:
    """Return the checkpoints' answers, and the base's unless it would have to be loaded again."""
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
        answered = own.answer(model, is_tuned=name != "base").rows
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
    if config.tuning == FULL:
        return found, None
    with tuning.untuned(model) as untouched:
        return found, answers_of("base", untouched, "answering with the base")


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
    logger.info("Copied %s into %s; to score it again: PREFIX=%s bash evaluate.sh", best, run, run)


def _settings(arguments: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    """Return what the answers depend on, by the names of the flags."""
    names = ("source_prefix", "max_source_length", "max_target_length", "recipe")
    values = {name: getattr(config, name) for name in ("model_name_or_path", *RECORDED, *names)}
    return {"dev": str(arguments.dev), "batch_size": arguments.batch_size, **values}


def _write_answers(path: Path, rows: GenerationDataset, candidates: Sequence[Candidate]) -> None:
    """Write a JSON line per row: prompt, reference, and each candidate's answer, the best first."""
    lines = [
        json.dumps(
            {
                "prompt": row.prompt,
                "reference": row.label,
                "answers": {candidate.name: candidate.texts[index] for candidate in candidates},
            },
            ensure_ascii=False,
        )
        for index, row in enumerate(rows)
    ]
    write_atomically(path, "".join(f"{x}\n" for x in lines).encode("utf-8", "backslashreplace"))
