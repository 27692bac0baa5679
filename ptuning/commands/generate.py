"""`python -m ptuning generate`: new instruction data from a model or an endpoint."""

import argparse
import json
import logging
from dataclasses import fields
from pathlib import Path

from ptuning.commands.asking import CONCURRENCY, check_least, check_out, open_source
from ptuning.completions.source import Source
from ptuning.data.raw_file import number_of
from ptuning.data.reading import find_files
from ptuning.engine.request import Sampling
from ptuning.instruct.blocks import Task
from ptuning.instruct.collect import Collector, Settings, journal_of
from ptuning.instruct.filters import BLOCKED_WORDS
from ptuning.instruct.templates import TEMPLATES, read_seeds, shipped_seeds
from ptuning.storage import write_atomically

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> int:
    """Generate rows, and say what became of the requests."""
    arguments.concurrency = CONCURRENCY if arguments.concurrency is None else arguments.concurrency
    settings = _settings(arguments)
    seeds = _read_seeds(arguments, settings)
    source = _open_source(arguments)
    collector = Collector(settings, seeds, source, arguments.out)
    try:
        tally = collector.collect(arguments.num, max_requests=arguments.max_requests)
    except KeyboardInterrupt:
        saved = number_of(collector.num_saved, "request")
        logger.warning("Type the same command again to continue; what %s gave is kept.", saved)
        raise
    if arguments.alpaca_json is not None:
        tasks = [{name: row["meta"][name] for name in Task._fields} for row in collector.rows]
        text = json.dumps(tasks, ensure_ascii=False, indent=2) + "\n"
        write_atomically(arguments.alpaca_json, text.encode("utf-8", "backslashreplace"))
    logger.info("%s", tally)
    written = number_of(tally.kept, "row")
    logger.info("wrote %s to %s; report: %s", written, arguments.out, collector.report_path)
    if tally.kept < arguments.num:
        logger.warning("%d of --num %d rows: %s.", tally.kept, arguments.num, tally.ended)
        return 1
    logger.info("mix them into training with --mix %s:0.3", arguments.out)
    return 0


def _settings(arguments: argparse.Namespace) -> Settings:
    """Check the flags; ValueError names the one that is wrong."""
    check_least(arguments, num=1, examples=0, machine_examples=0, tasks_per_request=1)
    check_least(arguments, max_new_tokens=1, concurrency=1, max_requests=1)
    Sampling(arguments.temperature, arguments.top_p)  # ValueError for values without a meaning
    if not 0 < arguments.rouge_threshold <= 1:
        raise ValueError(
            f"--rouge_threshold is {arguments.rouge_threshold}; use more than 0, and 1 at most "
            "(1 keeps everything)."
        )
    out: Path = arguments.out
    check_out(out, journal_of(out))
    other: Path | None = arguments.alpaca_json
    if other is not None:
        used = (out, journal_of(out), out.with_suffix(".report.json"), *arguments.seeds)
        is_own = other.resolve() in {path.resolve() for path in used}
        if is_own or other.is_dir() or (other.exists() and not journal_of(out).exists()):
            raise ValueError(f"--alpaca_json {other} exists or is in use; give another name.")
    values = {field.name: getattr(arguments, field.name) for field in fields(Settings)}
    values["topics"] = _read_lines(arguments.topics, "--topics")
    values["blocklist"] = _read_lines(arguments.blocklist, "--blocklist") or list(BLOCKED_WORDS)
    return Settings(**values)


def _read_lines(path: Path | None, flag: str) -> list[str]:
    """Return the lines of a file that are not blank; ValueError if there are none."""
    if path is None:
        return []
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be read ({error.strerror}).") from error
    except UnicodeError as error:
        raise ValueError(f"{flag} {path} is not UTF-8 text ({error}); save it as UTF-8.") from error
    if not any(lines):
        raise ValueError(f"{flag} {path} has no text; write one entry on each line.")
    return [line for line in lines if line]


def _read_seeds(arguments: argparse.Namespace, settings: Settings) -> list[Task]:
    """Return the tasks to show; magpie shows none."""
    template = TEMPLATES[settings.template]
    if not template.labels:
        for flag in ("seeds", "topics", "tasks_per_request"):
            if getattr(arguments, flag):
                raise ValueError(f"--{flag} has no use with --template {template.name}.")
        return []
    files = [file for given in arguments.seeds for file in find_files(str(given))]
    return read_seeds(files or [shipped_seeds(template)])


def _open_source(arguments: argparse.Namespace) -> Source:
    """Return what --endpoint names, or the model."""
    is_chat = arguments.endpoint is not None and arguments.api in (None, "chat")
    if is_chat and arguments.template == "magpie":
        raise ValueError(
            "--template magpie leaves a user's turn open, which a chat cannot; add --api "
            "completions."
        )
    return open_source(arguments)
