"""`python -m ptuning select`: the rows of data files that are worth training on."""

import argparse
import difflib
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ptuning.commands.asking import check_least, check_out, open_base, open_endpoint
from ptuning.completions.endpoint import EndpointSource
from ptuning.completions.journal import Journal, to_line
from ptuning.data.near_duplicates import ROUGE_THRESHOLD, NearDuplicates
from ptuning.data.prompts import TextRow
from ptuning.data.raw_file import number_of
from ptuning.data.reading import find_files
from ptuning.data.segmentation import count_words
from ptuning.output import Progress
from ptuning.select import selection
from ptuning.select.choosing import Similar, SimilarStates, quotas
from ptuning.select.judge import judge, judge_templates
from ptuning.select.scores import Base
from ptuning.select.selection import VERDICTS, Choice, PoolRow, Verdict
from ptuning.select.selection_report import write_reports
from ptuning.storage import write_atomically

TEMPERATURE = 3.0  # of quotas, as LIMA's
MAX_SIMILARITY = {"base": 0.9, "minhash": ROUGE_THRESHOLD}
BY_BASE = ("ifd", "target")

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> int:
    """Select rows and say what became of the others, or explain a verdict of an earlier run."""
    out: Path = arguments.out
    if arguments.explain is not None:
        return _explain(arguments.explain, out.with_suffix(".verdicts.jsonl"))
    settings = _settings(arguments)
    files, against, like = (
        [path for name in given for path in find_files(name)]
        for given in (arguments.files, arguments.against, arguments.like)
    )
    if not files:
        raise ValueError("name one or more files of rows to select from.")
    check_out(out, out.with_suffix(".report.json"), (*files, *against, *like))
    pool, known, targets = map(selection.read_pool, (files, against, like))
    needs_base = arguments.score in BY_BASE or settings["embed"] == "base"
    base = Base(*open_base(arguments)[:2]) if needs_base else None
    source = open_endpoint(arguments) if arguments.score == "judge" else None

    num_emptied = 0 if "clean" in arguments.skip else selection.clean(pool)
    if "duplicates" not in arguments.skip:
        selection.drop_duplicates(pool)
    if known:
        selection.drop_known(pool, known)
    _give_scores(arguments, selection.remaining(pool), targets, base, source)
    fit = selection.remaining(pool)
    sources = [row.contract["source"] if arguments.quota == "source" else "" for row in fit]
    rooms = quotas(Counter(sources), arguments.budget, settings["quota_temperature"])[1]
    choice = selection.choose(fit, rooms, partial(_similarity, settings, base), arguments.seed)
    if num_emptied:
        logger.info("%7d inputs that say there is none were emptied", num_emptied)
    _write(out, pool, choice, settings | {"emptied_inputs": num_emptied})
    if len(choice.picked) < arguments.budget:
        left = number_of(len(choice.picked), "row")
        logger.warning("--budget is %d, but there were only %s to select.", arguments.budget, left)
    return 0 if choice.picked else 1


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check the flags, and return what decides the selection."""
    kind, given = arguments.score, vars(arguments)
    check_least(arguments, budget=1, quota_temperature=1, max_similarity=0)
    embed = arguments.embed or ("base" if kind in BY_BASE else "minhash")
    by_base = (kind in BY_BASE or embed == "base", "--score ifd, target or --embed base")
    for flag, (is_used, needs) in {
        "like": (kind == "target", "--score target"),
        "endpoint": (kind == "judge", "--score judge"),
        "model": (kind == "judge", "--score judge"),
        **dict.fromkeys(("model_name_or_path", "prefix", "quantization_bit"), by_base),
        "quota_temperature": (arguments.quota == "source", "--quota source"),
        "max_similarity": (embed != "none", "--embed base or minhash"),
    }.items():
        if given[flag] and not is_used:
            raise ValueError(f"--{flag} is for {needs}; give that too, or leave it out.")
        if is_used and not given[flag] and flag in ("like", "endpoint"):
            raise ValueError(f"--score {kind} needs --{flag}.")
    values = {
        name: str(value) if isinstance(value, Path) else value for name, value in given.items()
    }
    return values | {
        "quota_temperature": arguments.quota_temperature or TEMPERATURE,
        "embed": embed,
        "max_similarity": arguments.max_similarity or MAX_SIMILARITY.get(embed),
    }


def _give_scores(
    arguments: argparse.Namespace,
    rows: Sequence[PoolRow],
    targets: Sequence[PoolRow],
    base: Base | None,
    source: EndpointSource | None,
) -> None:
    """Step 4: score the rows; drop those without a score, or whose prompt is no help."""
    kind = arguments.score
    if kind in ("none", "length"):
        for row in rows:
            row.score = float(count_words(row.answer))
            if kind == "none":
                row.score = selection.random_score(row, arguments.seed)
        return
    identity: dict[str, Any] = {"score": kind}
    score: Callable[[Sequence[TextRow]], Iterator[tuple[int, float | None]]]
    if source is not None:
        identity |= {"model": source.name, "prompts": _digest(repr(judge_templates()))}
        score = partial(judge, source)
    else:
        assert base is not None, "loaded for these scores"
        identity |= {"base": base.fingerprint, "bits": arguments.quantization_bit}
        score = base.ifd
        if kind == "target":
            base.centre_on([row.text_row for row in rows])
            identity["rows"] = _digest(repr([row.text for row in (*rows, *targets)]))
            states = base.states([row.text_row for row in targets])
            score = partial(base.nearness, targets=states)
    found: dict[str, float] = {}
    path = arguments.out.with_suffix(f".{kind}.jsonl")
    journal = Journal(path, identity, found.__setitem__)
    missing = [row for row in rows if _digest(row.text) not in found]
    with Progress(len(rows), f"scoring by {kind}", initial=len(rows) - len(missing)) as progress:
        for index, value in score([row.text_row for row in missing]):
            if value is not None and math.isfinite(value):  # what has no score is asked for again
                journal.add(_digest(missing[index].text), value)
            progress.update()
    if base is not None and base.num_cut:
        cut = number_of(base.num_cut, "row")
        logger.warning("%s longer than the base reads: scored by the beginning", cut)
    for row in rows:
        row.score = found.get(_digest(row.text))
        if row.score is None:
            row.verdict = Verdict("no_score")
        elif kind == "ifd" and row.score >= 1:
            row.verdict = Verdict("prompt_is_no_help")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _similarity(settings: Mapping[str, Any], base: Base | None, rows: Sequence[PoolRow]) -> Similar:
    """Return what tells whether a row is too similar to a picked one."""
    threshold = settings["max_similarity"]
    if settings["embed"] == "none":
        return lambda _: None
    if settings["embed"] == "minhash":
        picked = NearDuplicates(threshold)
        return lambda index: picked.find(rows[index].text, rows[index].answer, add_as=index)
    assert base is not None, "loaded for --embed base"
    texts = [row.text_row for row in rows]
    base.centre_on(texts)

    def embed(block: range) -> np.ndarray:
        return base.states(texts[block.start : block.stop]).numpy()

    return SimilarStates(min(settings["budget"], len(rows)), embed, threshold)


def _write(out: Path, pool: Sequence[PoolRow], choice: Choice, settings: Mapping[str, Any]) -> None:
    """Write the rows, the baselines, the verdicts and the reports, and say what is in them."""
    verdicts = [
        {"id": row.contract["id"], "score": row.score, **row.verdict._asdict()} for row in pool
    ]
    for suffix, lines in (
        (".random.jsonl", [row.contract for row in choice.random]),
        (".longest.jsonl", [row.contract for row in choice.longest]),
        (".verdicts.jsonl", verdicts),
        (".jsonl", [row.contract for row in choice.picked]),
    ):
        write_atomically(out.with_suffix(suffix), b"".join(map(to_line, lines)))
    path = out.with_suffix(".report.json")
    report = write_reports(path, pool, choice, settings)
    for name, count in report["verdicts"].items():
        logger.info("%7d %s: %s", count, name, VERDICTS[name].partition(": ")[2])
    logger.info("wrote %d of %d rows to %s", report["out"], report["in"], out)
    logger.info("report: %s; --explain ID tells why a row went", path.with_suffix(".html"))


def _explain(row_id: str, path: Path) -> int:
    """Say what became of a row."""
    if not path.exists():
        raise ValueError(f"{path} is not there; run the selection first, without --explain.")
    verdicts = {row["id"]: row for row in map(json.loads, path.read_bytes().splitlines())}
    if row_id not in verdicts:
        close = ", ".join(difflib.get_close_matches(row_id, verdicts, n=3, cutoff=0.0))
        raise ValueError(f"--explain is {row_id}; {path} has {close}, ...")
    row = verdicts[row_id]
    said = f"{row_id}: {row['name']} ({VERDICTS[row['name']].partition(': ')[2]})"
    said += f"; like {row['like']}, similarity {row['similarity']}" if row["like"] else ""
    said += f"; score {row['score']:.4f}" if row["score"] is not None else ""
    logger.info("%s", said)
    return 0
