"""`python -m ptuning select`: the rows of data files that are worth training on."""

import argparse
import difflib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ptuning.commands.asking import check_least, check_out, open_base, open_endpoint
from ptuning.completions.endpoint import EndpointSource
from ptuning.completions.journal import digest, saved_scores, to_line
from ptuning.data.near_duplicates import ROUGE_THRESHOLD, NearDuplicates, own_texts
from ptuning.data.prompts import TextRow
from ptuning.data.raw_file import number_of
from ptuning.data.reading import find_files
from ptuning.data.segmentation import count_words
from ptuning.select import selection
from ptuning.select.choosing import Similar, SimilarStates
from ptuning.select.judge import judge, judge_templates
from ptuning.select.scores import Base
from ptuning.select.selection import VERDICTS, Choice, PoolRow, Verdict
from ptuning.select.selection_report import write_reports
from ptuning.storage import write_atomically

TEMPERATURE = 3.0  # of quotas, as LIMA's
MAX_SIMILARITY = {"base": 0.9, "minhash": ROUGE_THRESHOLD}
BY_BASE = ("ifd", "target")
SHOWN = 200  # characters of a text in the verdicts
ENDPOINT_FLAGS = ("endpoint", "model", "api", "api_key_env", "timeout", "concurrency")
OWN = r"\.(random|longest|verdicts)\.jsonl|\.report\.(json|html)"
JOURNALS = r"\.(ifd|target|judge)-\w+\.jsonl"

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
        raise ValueError("name the files to select from, first: select FILE ... --out best.jsonl")
    check_out(out, out.with_suffix(".report.json"), (*files, *against, *like), OWN, JOURNALS)
    pool, targets = selection.read_pool(files), selection.read_pool(like)
    known = selection.read_pool(against, needs_answers=False)
    needs_base = arguments.score in BY_BASE or settings["embed"] == "base"
    base = Base(*open_base(arguments)[:2]) if needs_base else None
    source = open_endpoint(arguments) if arguments.score == "judge" else None

    num_emptied = 0 if "clean" in arguments.skip else selection.clean(pool)
    if "duplicates" not in arguments.skip:
        selection.drop_duplicates(pool)
    if known:
        selection.drop_known(pool, known)
    try:
        _give_scores(arguments, selection.remaining(pool), targets, base, source)
    except KeyboardInterrupt:
        logger.warning("Type the same command again to continue; finished scores are kept.")
        raise
    shares = arguments.budget, settings["quota_temperature"]
    similarity = partial(_similarity, settings, base)
    choice = selection.choose(selection.remaining(pool), *shares, similarity, arguments.seed)
    _write(out, pool, choice, settings, num_emptied)
    if len(choice.picked) < arguments.budget:
        left = number_of(len(choice.picked), "row")
        logger.warning("--budget is %d; no more than %s could be selected.", arguments.budget, left)
    if not choice.picked and arguments.score == "ifd" and arguments.prefix is None:
        logger.warning("A base may know nothing of a task: train a prefix briefly, add --prefix.")
    return 0 if choice.picked else 1


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check the flags, and return what decides the selection."""
    kind, given = arguments.score, vars(arguments)
    check_least(arguments, budget=1, quota_temperature=1)
    unset = "base" if kind in BY_BASE else "minhash" if "duplicates" in arguments.skip else "none"
    embed = arguments.embed or unset
    threshold = arguments.max_similarity
    least = ROUGE_THRESHOLD if embed == "minhash" else 0
    if threshold is not None and not least <= threshold <= 1:
        raise ValueError(f"--max_similarity is {threshold}; with --embed {embed} use {least} to 1.")
    by_source = arguments.quota == "source"
    by_base = (kind in BY_BASE or embed == "base", "--score ifd, target or --embed base")
    for flag, (is_used, needs) in {
        "like": (kind == "target", "--score target"),
        **dict.fromkeys(ENDPOINT_FLAGS, (kind == "judge", "--score judge")),
        **dict.fromkeys(("model_name_or_path", "prefix", "quantization_bit"), by_base),
        "quota_temperature": (by_source, "--quota source"),
        "max_similarity": (embed != "none", "--embed base or minhash"),
    }.items():
        if given[flag] not in (None, []) and not is_used:
            raise ValueError(f"--{flag} is for {needs}; give that too, or leave it out.")
        if is_used and not given[flag] and flag in ("like", "endpoint"):
            raise ValueError(f"--score {kind} needs --{flag}.")
    values = {
        name: str(value) if isinstance(value, Path) else value for name, value in given.items()
    }
    return values | {
        "quota_temperature": arguments.quota_temperature or TEMPERATURE if by_source else None,
        "embed": embed,
        "max_similarity": MAX_SIMILARITY.get(embed) if threshold is None else threshold,
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
        identity |= {"model": source.name, "prompts": digest(judge_templates())}
        score = partial(judge, source)
    else:
        assert base is not None, "loaded for these scores"
        identity |= {"base": base.fingerprint, "bits": arguments.quantization_bit}
        score = base.ifd
        if kind == "target" and rows:
            base.centre_on([row.text_row for row in rows])
            identity["rows"] = digest([row.key for row in (*rows, *targets)])
            states = base.states([row.text_row for row in targets])
            score = partial(base.nearness, targets=states)
    path = arguments.out.with_suffix(f".{kind}-{digest(identity)}.jsonl")
    texts = [row.text_row for row in rows]
    found = saved_scores(
        *(path, identity, [row.key for row in rows]),
        lambda missing: score([texts[index] for index in missing]),
        f"scoring by {kind}",
    )
    if base is not None and base.num_cut:
        cut = number_of(base.num_cut, "row")
        logger.warning("%s longer than the base reads: scored by the beginning", cut)
    for row in rows:
        row.score = found.get(row.key)
        if row.score is None:
            row.verdict = Verdict("no_score")
        elif kind == "ifd" and row.score >= 1:
            row.verdict = Verdict("prompt_is_no_help")


def _similarity(settings: Mapping[str, Any], base: Base | None, rows: Sequence[PoolRow]) -> Similar:
    """Return the test for rows that are too similar to a picked one."""
    threshold = settings["max_similarity"]
    if settings["embed"] == "none" or not rows:
        return lambda _: None
    if settings["embed"] == "minhash":
        picked, own = NearDuplicates(threshold), own_texts([row.pair for row in rows])
        return lambda index: picked.find_or_add(index, own[index], rows[index].answer)
    assert base is not None, "loaded for --embed base"
    texts = [row.text_row for row in rows]
    base.centre_on(texts)

    def embed(block: range) -> np.ndarray:
        return base.states(texts[block.start : block.stop]).numpy()

    return SimilarStates(min(settings["budget"], len(rows)), embed, threshold)


def _write(
    out: Path, pool: Sequence[PoolRow], choice: Choice, settings: Mapping[str, Any], emptied: int
) -> None:
    """Write report and verdicts, and the rows if there are any; say what is in them."""
    path = out.with_suffix(".report.json")
    report = write_reports(path, pool, choice, settings, emptied)
    written: dict[str, list[Any]] = {
        ".verdicts.jsonl": [
            {"id": row.contract["id"], "score": row.score, **row.verdict._asdict()}
            | {"prompt": row.contract["prompt"][:SHOWN], "answer": row.answer[:SHOWN]}
            for row in pool
        ],
        ".random.jsonl": [row.contract for row in choice.random],
        ".longest.jsonl": [row.contract for row in choice.longest],
        ".jsonl": [row.contract for row in choice.picked],
    }
    for suffix, lines in written.items():
        if lines:  # those of an earlier run stay
            write_atomically(out.with_suffix(suffix), b"".join(map(to_line, lines)))
    if emptied:
        logger.info("%7d emptied: inputs that say there is none", emptied)
    for name, count in report["verdicts"].items():
        logger.info("%7d %s: %s", count, name, VERDICTS[name].partition(": ")[2])
    stays = f"; {out} is of an earlier run" if not choice.picked and out.exists() else ""
    logger.info("wrote %d of %d rows to %s%s", report["out"], report["in"], out, stays)
    logger.info("report: %s; --explain ID tells why a row went", path.with_suffix(".html"))


def _explain(row_id: str, path: Path) -> int:
    """Say what became of a row, with the row that it is like."""
    if not path.exists():
        raise ValueError(f"{path} is not there; run the selection first, without --explain.")
    verdicts = {row["id"]: row for row in map(json.loads, path.read_bytes().splitlines())}
    if row_id not in verdicts:
        close = ", ".join(difflib.get_close_matches(row_id, verdicts, n=3, cutoff=0.0))
        raise ValueError(f"--explain is {row_id}; {path} has {close}, ...")
    row = verdicts[row_id]
    said = f"{row_id}: {row['name']} ({VERDICTS[row['name']].partition(': ')[2]})"
    said += f"; score {row['score']:.4f}" if row["score"] is not None else ""
    like = f"like {row['like']}, similarity {row['similarity']}"
    for line, one in ((said, row), (like, verdicts.get(row["like"], {}))):  # {}: of --against
        if one is row or row["like"]:
            texts = (one.get(name, "").split() for name in ("prompt", "answer"))
            logger.info("%s\n  %s\n  %s", line, *map(" ".join, texts))
    return 0
