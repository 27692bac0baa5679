"""`python -m ptuning api`: rows of questions and API calls, new questions, answers, scores."""

import argparse
import logging
import sys
from pathlib import Path

from ptuning.apicalls.cards import NO_API, read_cards, read_common_cards
from ptuning.apicalls.evaluation import (
    count,
    judge_all,
    read_references,
    read_responses,
    table_lines,
    write_details,
)
from ptuning.apicalls.pairs import (
    BM25,
    CALL,
    DocumentSettings,
    compat_rows,
    pairs_of_cards,
    read_pairs,
    read_tags,
    to_prompt,
    training_rows,
)
from ptuning.apicalls.retrieval import Retriever
from ptuning.apicalls.verdicts import REASONS, to_shown_call
from ptuning.apicalls.writing import CardWriter
from ptuning.commands.asking import CONCURRENCY, check_least, check_out, open_source
from ptuning.commands.data import check_new_file
from ptuning.completions.journal import to_line
from ptuning.completions.source import Ask
from ptuning.data.raw_file import as_places, number_of
from ptuning.engine.request import Sampling
from ptuning.instruct.collect import Settings, journal_of
from ptuning.storage import write_atomically

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> int:
    """Do what the action says."""
    actions = {"prepare": _prepare, "write": _write, "ask": _ask, "eval": _evaluate}
    return actions[arguments.action](arguments)


def _prepare(arguments: argparse.Namespace) -> int:
    """Write the rows, and say what was left out."""
    settings, out = _document_settings(arguments), arguments.out
    reads = [path for path in (arguments.cards, arguments.pairs) if path is not None]
    check_new_file(out, reads, overwrite=arguments.overwrite)
    cards = read_common_cards(arguments.cards)
    if arguments.pairs is not None:
        pairs, lines = read_pairs(arguments.pairs, cards)
        if lines:
            left_out = f"{number_of(len(lines), 'row')} without a call of one of the cards"
            logger.warning("left out %s: %s", left_out, as_places(lines, "line"))
    else:
        pairs = pairs_of_cards(cards)
    if not pairs:
        raise ValueError(
            f'--cards {arguments.cards} has no "questions"; name questions with their calls by '
            "--pairs, or have a model write some: python -m ptuning api write"
        )
    if arguments.compat:
        rows = compat_rows(pairs, cards, settings.retriever)
    else:
        rows = training_rows(pairs, cards, settings)
    write_atomically(out, b"".join(map(to_line, rows)))
    num_cards = len({pair.card for pair in pairs} - {None})
    logger.info("wrote %d rows about %d of %d APIs to %s", len(rows), num_cards, len(cards), out)
    logger.info("lengths in tokens, for --max_source_length: python -m ptuning data check %s", out)
    return 0


def _document_settings(arguments: argparse.Namespace) -> DocumentSettings:
    """Check the flags; ValueError names the one that is wrong, or has no use."""
    is_bare = arguments.mode == "zero-shot"
    why = "--mode zero-shot" if is_bare else "--compat" if arguments.compat else None
    given = {name: getattr(arguments, name) for name in ("p", "distractors", "vary", "copies")}
    given = {name: value for name, value in given.items() if value is not None}
    unused = [*given, *(["retriever"] if is_bare and arguments.retriever else [])]
    if why and unused:
        raise ValueError(f"--{unused[0]} does nothing with {why}; leave one of them out.")
    for name in ("p", "vary"):
        if not 0 <= given.get(name, 0) <= 1:
            raise ValueError(f"--{name} is {given[name]}; use 0 to 1, a share of the rows.")
    check_least(arguments, distractors=0, copies=1)
    retriever = None if is_bare else arguments.retriever or BM25
    return DocumentSettings(retriever, seed=arguments.seed, **given)


def _write(arguments: argparse.Namespace) -> int:
    """Write questions for the cards, and say which have too few."""
    check_least(arguments, per_card=1, max_new_tokens=1, concurrency=1)
    Sampling(arguments.temperature)  # ValueError for a value without a meaning
    out: Path = arguments.out
    check_out(out, journal_of(out), [arguments.cards])
    cards = read_common_cards(arguments.cards)
    settings = Settings(
        template=f"api.{arguments.language}",
        examples=0,
        machine_examples=3,
        topics=[card.document for card in cards],
        temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens,
        concurrency=arguments.concurrency or CONCURRENCY,
        blocklist=(),
        seed=arguments.seed,
    )
    writer = CardWriter(settings, cards, arguments.per_card, open_source(arguments), out)
    wanted = arguments.per_card * len(cards)
    try:
        tally = writer.collect(wanted)
    except KeyboardInterrupt:
        logger.warning("Type the same command again to continue; what was answered is kept.")
        raise
    logger.info("%s", tally)
    logger.info("wrote %s to %s", number_of(tally.kept, "row"), out)
    few = [card for index, card in enumerate(cards) if writer.kept[index] < arguments.per_card]
    if few:
        names = ", ".join(str(card.fields["api_name"]) for card in few[:5])
        logger.warning(
            "%s of %d with fewer than --per_card %d: %s%s",
            *(len(few), len(cards), arguments.per_card, names, ", ..." if few[5:] else ""),
        )
        return 1
    logger.info("make rows of them with api prepare --pairs %s", out)
    return 0


def _ask(arguments: argparse.Namespace) -> int:
    """Print the call that answers the question, and what is known of it."""
    check_least(arguments, top_k=0, max_new_tokens=1)
    cards = read_common_cards(arguments.cards)
    source = open_source(arguments)
    found = Retriever(cards).ranked(arguments.question, arguments.top_k)
    prompt = to_prompt(arguments.question, [cards[index].document for index in found])
    length, context = source.num_tokens(prompt), source.context_length
    if length and context and length + arguments.max_new_tokens > context:
        raise ValueError(
            f"the prompt has {length} tokens and --max_new_tokens is {arguments.max_new_tokens}, "
            f"but {source.name} has {context} for both; use a smaller --top_k or --max_new_tokens."
        )
    ((_, completion),) = source.complete([Ask(0, prompt, 0)], Sampling(), arguments.max_new_tokens)
    text = completion.text or ""
    shown = to_shown_call(text, cards)
    names = [str(cards[index].fields["api_name"]) for index in found]
    logger.info("documents: %s", ", ".join(names) or "none")
    if shown is None:
        says_none = read_tags(text).get(CALL) == NO_API
        logger.info("%s", "no API fits" if says_none else f"no API call in the answer: {text}")
        return 0 if says_none else 1
    sys.stdout.write(f"{shown.call or text}\n")
    verdict = ", ".join(shown.cards) if shown.reason is None else REASONS[shown.reason]
    logger.info("verdict: %s (%s)", "valid" if shown.valid else f"invalid, {shown.reason}", verdict)
    for name, value in read_tags(text).items():
        if name != CALL:
            logger.info("%s: %s", name.removeprefix("api_"), value)
    return 0 if shown.valid else 1


def _evaluate(arguments: argparse.Namespace) -> int:
    """Print the table, and write the details."""
    family = None if arguments.family == "auto" else arguments.family
    cards = read_cards(arguments.cards, family)
    references = read_references(arguments.reference)
    answers = read_responses(arguments.responses, references)
    details: Path | None = arguments.details
    if details is not None:
        reads = (arguments.cards, arguments.reference, arguments.responses)
        check_new_file(details, reads, overwrite=arguments.overwrite, flag="--details")
        page = details.with_suffix(".html")
        if page.exists() and not arguments.overwrite:
            raise ValueError(f"--details writes {page} too, which exists; add --overwrite.")
    rows = judge_all(answers, cards)
    logger.info("%d cards of the family %s", len(cards), cards.family)
    sys.stdout.write("".join(f"{line}\n" for line in table_lines(count(rows))))
    if len(rows) < len(references):
        logger.warning("%s without an answer", number_of(len(references) - len(rows), "reference"))
    if details is not None:
        logger.info("rows: %s; page: %s", details, write_details(details, rows, cards))
    return 0
