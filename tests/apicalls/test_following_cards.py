"""From the example's cards to answers: a prefix on nano reads the call from the document it is shown."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from main import main
from ptuning import __main__ as program
from ptuning.apicalls.cards import Card, Cards, read_cards
from ptuning.apicalls.pairs import _invent, identifying_texts, prompt_maker, read_pairs, to_prompt
from ptuning.apicalls.verdicts import Reference, judge
from ptuning.commands.answer import open_model
from ptuning.completions.source import Ask, EngineSource
from ptuning.engine.request import Sampling
from ptuning.tunings.loading import find_model

EXAMPLE = Path(__file__).parents[2] / "docs" / "api-calls"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cards() -> Cards:
    return read_cards(EXAMPLE / "cards.jsonl")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train as docs/api-calls.md says."""
    folder = tmp_path_factory.mktemp("api")
    words = "api prepare --copies 20 --distractors 0 --p 0.9 --vary 0.8"
    files = ["--cards", str(EXAMPLE / "cards.jsonl"), "--out", str(folder / "api.jsonl")]
    assert program.main([*words.split(), *files]) == 0
    flags = f"""
        --do_train --train_file {folder}/api.jsonl --output_dir {folder}/prefix --pre_seq_len 128
        --learning_rate 3e-2 --max_steps 400 --per_device_train_batch_size 16
        --max_source_length 256 --max_target_length 128 --model_name_or_path nano
    """
    assert main(flags.split()) == 0
    return folder / "prefix"


@pytest.fixture(scope="module")
def source(prefix: Path) -> EngineSource:
    named = find_model("nano", flag="--model_name_or_path")
    return EngineSource(*open_model(named, None, prefix=prefix), name="nano", max_rows=16)


def answers(source: EngineSource, prompts: Sequence[str]) -> list[str]:
    asks = [Ask(number, prompt, 0) for number, prompt in enumerate(prompts)]
    found = dict(source.complete(asks, Sampling(), 128))
    return [str(found[number].text) for number in range(len(prompts))]


def share_right(
    source: EngineSource, cards: Cards, prompts: Sequence[str], calls: Sequence[Card]
) -> float:
    """Return the share of answers that are exactly the calls of their cards."""
    verdicts = [
        judge(text, cards, Reference("", card.api_call, card.domain))
        for text, card in zip(answers(source, prompts), calls, strict=True)
    ]
    return sum(one.reason is None for one in verdicts) / len(verdicts)


def test_held_out_wordings_and_swapped_repositories(
    source: EngineSource, cards: Cards, tmp_path: Path
) -> None:
    pairs, left_out = read_pairs(EXAMPLE / "dev.jsonl", cards)
    trained = {question for card in cards for question in card.fields["questions"]}
    assert (len(pairs), left_out) == (48, [])
    assert trained.isdisjoint(pair.question for pair in pairs)
    questions = [pair.question for pair in pairs]

    right = [cards[pair.card] for pair in pairs]
    oracle = [to_prompt(q, [card.document]) for q, card in zip(questions, right, strict=True)]
    assert share_right(source, cards, oracle, right) >= 0.9
    retrieved = list(map(prompt_maker(cards, 1), questions))
    assert share_right(source, cards, retrieved, right) >= 0.8

    shares = []
    for seed in range(5):
        swapped = swap_repositories(cards, tmp_path / f"{seed}.jsonl", seed)
        changed = [swapped[pair.card] for pair in pairs]
        documents = [[card.document] for card in changed]
        prompts = list(map(to_prompt, questions, documents))
        known = [identifying_texts(card)[0] for card in right]
        assert not [
            text for text, old in zip(answers(source, prompts), known, strict=True) if old in text
        ]
        shares.append(share_right(source, swapped, prompts, changed))
    assert sum(shares) / 5 >= 0.5  # measured: 0.67, from 0.50 to 0.83; else letters are wrong


def swap_repositories(cards: Cards, path: Path, seed: int) -> Cards:
    """Give every card a repository that no row of the training had."""
    lines = []
    for number, card in enumerate(cards):
        (old,) = identifying_texts(card)
        text = json.dumps(dict(card.fields), ensure_ascii=False)
        lines.append(text.replace(old, _invent(old, Random(f"s{seed} {number}"))))
        assert lines[-1] != text
    path.write_text("\n".join(lines), encoding="utf-8")
    return read_cards(path)


def test_ask_prints_the_call(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--cards", str(EXAMPLE / "cards.jsonl"), "--prefix", str(prefix)]
    assert program.main(["api", "ask", "请为上衣写个标题", *flags]) == 0
    assert capsys.readouterr().out == "shop.title(repo='songmu/title-a', length='short')\n"
