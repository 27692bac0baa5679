"""Rows to answer without an answer to compare with, or without a prompt: through scoring for real."""

import json

import pytest

from ptuning.data.dataset import GenerationDataset, GenerationRow
from ptuning.data.prompts import Example
from ptuning.data.tokenization import to_generation_batch
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.scoring import answering as prediction
from ptuning.scoring.answering import score
from ptuning.train.processes import trainer_arguments
from ptuning.train.rows import Rows
from ptuning.train.run_config import parse_arguments
from ptuning.train.tuning import load_model, open_tuning
from tests.tiny import rows, write_rows
from tests.train.test_many_processes import (  # noqa: F401
    COMMON,
    NANO,
    launcher,
    predict_argv,
    scores_of,
    trained,
)

LABELLED = rows(3)
NO_LABEL = {"content": LABELLED[1]["content"], "summary": ""}
NO_PROMPT = {"content": "", "summary": LABELLED[1]["summary"]}
SCORES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")


@pytest.fixture
def scored(trained, tmp_path):  # noqa: F811
    """Return a function that answers and scores rows, and returns the table."""

    def run(made, *more):
        argv = ["--do_predict", "--test_file", "unread.json", "--model_name_or_path", str(NANO)]
        argv += ["--ptuning_checkpoint", str(trained / "prefix"), "--output_dir", str(tmp_path)]
        config = parse_arguments([*argv, *COMMON.split(), *more])
        tokenizer = ChatGLMTokenizer.from_pretrained(NANO)
        asked = [row["content"] for row in made]
        ids, _ = to_generation_batch(
            tokenizer, [Example(text, "", text) for text in asked], max_source_length=32
        )
        dataset = GenerationDataset(
            [
                GenerationRow(row_ids if row["content"] else [], row["content"], row["summary"], 1)
                for row_ids, row in zip(ids, made, strict=True)
            ]
        )
        tuning = open_tuning(config)
        model = load_model(config, tuning, trainer_arguments(config))
        return score(
            config, tuning, model, tokenizer, Rows(None, None, dataset, None), batch_size=1
        )

    return run


@pytest.fixture
def asked(monkeypatch):
    """Collect the prompts that the model is given; `limit` answers, then it is interrupted."""
    real = prediction.generate_answers
    seen = []

    def generate(model, prompts, **options):
        assert all(prompts)
        for index, answer in real(model, prompts, **options):
            if len(seen) == generate.limit:
                raise KeyboardInterrupt
            seen.append(prompts[index])
            yield index, answer

    generate.limit = 10**6
    generate.seen = seen
    monkeypatch.setattr(prediction, "generate_answers", generate)
    return generate


def lines_of(folder, name="generated_predictions.txt"):
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


def with_middle(row):
    return [LABELLED[0], row, LABELLED[2]]


@pytest.mark.parametrize("middle", [NO_LABEL, NO_PROMPT])
def test_one_row_lacks_something_and_the_others_score_as_without_it(
    middle, scored, asked, tmp_path
):
    scored([LABELLED[0], LABELLED[2]])
    wanted, answers = scores_of(tmp_path), lines_of(tmp_path)
    asked.seen.clear()
    table = scored(with_middle(middle))
    found = scores_of(tmp_path)
    is_asked = bool(middle["content"])
    for way in ("predict", "base"):
        for name in SCORES:
            assert found[f"{way}_{name}"] == wanted[f"{way}_{name}"]
        assert found[f"{way}_samples"] == 2 + is_asked
        assert found[f"{way}_scored"] == 2
        assert found[f"{way}_empty"] == wanted[f"{way}_empty"]
    assert found["predict_rouge-l"] > 0
    assert len(asked.seen) == 2 * (2 + is_asked)
    for name in ("generated_predictions.txt", "generated_predictions_base.txt"):
        assert len(lines_of(tmp_path, name)) == 3
    first, second, third = lines_of(tmp_path)
    assert [first, third] == answers
    assert bool(second["labels"]) == bool(middle["summary"])
    assert bool(second["predict"]) == is_asked
    assert ("rows scored" in table) == is_asked
    report = (tmp_path / "report.html").read_text("utf-8")
    why = "no answer to compare with: not scored" if is_asked else "no prompt: not answered"
    assert report.count(why) == 1
    assert report.count('<details class="row"') == 3


def test_a_test_set_without_any_label_is_answered_and_has_no_scores(scored, tmp_path):
    table = scored([{**row, "summary": ""} for row in LABELLED])
    assert len(table.splitlines()) == 1
    assert table.startswith("Rows answered: 3. None has an answer to compare with")
    assert str(tmp_path / "generated_predictions.txt") in table
    found = scores_of(tmp_path)
    for way in ("predict", "base"):
        assert {found[f"{way}_{name}"] for name in SCORES} == {None}
        assert (found[f"{way}_samples"], found[f"{way}_scored"]) == (3, 0)
    made = lines_of(tmp_path)
    assert [row["labels"] for row in made] == ["", "", ""]
    assert all(row["predict"] for row in made)
    report = (tmp_path / "report.html").read_text("utf-8")
    assert "No row has an answer to compare with" in report


def test_rows_without_a_prompt_alone_are_written_and_nothing_is_asked(scored, asked, tmp_path):
    table = scored([NO_PROMPT, NO_PROMPT])
    assert table.startswith("Rows answered: 0.")
    assert asked.seen == []
    assert [bool(row["labels"]) for row in lines_of(tmp_path)] == [True, True]
    assert [row["predict"] for row in lines_of(tmp_path)] == ["", ""]


@pytest.mark.parametrize("more", [(), ("--num_beams", "2")])
def test_an_interrupted_run_goes_on_around_rows_without_a_prompt(more, scored, asked, tmp_path):
    made = [NO_PROMPT, LABELLED[0], NO_PROMPT, NO_LABEL, LABELLED[2], NO_PROMPT]
    scored(made, *more)
    whole = (tmp_path / "generated_predictions.txt").read_bytes()
    scores = scores_of(tmp_path)
    assert len(asked.seen) == 6
    for limit in (1, 2):
        for name in tmp_path.iterdir():
            name.unlink()
        asked.seen.clear()
        asked.limit = limit
        with pytest.raises(KeyboardInterrupt):
            scored(made, *more)
        kept = lines_of(tmp_path)
        assert len(kept) == {1: 3, 2: 4}[limit]  # those before the row that was not answered yet
        asked.seen.clear()
        asked.limit = 10**6
        scored(made, *more)
        assert len(asked.seen) == 6 - limit
        assert (tmp_path / "generated_predictions.txt").read_bytes() == whole
        assert scores_of(tmp_path) == scores


def test_the_old_answers_stay_until_the_first_new_one_although_row_0_has_no_prompt(
    scored, asked, tmp_path
):
    scored([NO_PROMPT, *LABELLED])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    asked.seen.clear()
    asked.limit = 0
    with pytest.raises(KeyboardInterrupt):
        scored([NO_PROMPT, *LABELLED], "--generation_max_length", "40")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_two_processes_answer_and_score_as_one_around_rows_that_lack_something(
    launcher,  # noqa: F811
    trained,  # noqa: F811
    tmp_path,
):
    made = [NO_PROMPT, LABELLED[0], NO_LABEL, NO_PROMPT, LABELLED[2]]
    write_rows(tmp_path / "test.json", made)
    for processes in (1, 2):
        argv = predict_argv(launcher, trained / "prefix", tmp_path / f"{processes}")
        argv.remove("--do_eval")
        launcher.finish([*argv, "--test_file", str(tmp_path / "test.json")], processes)
    one, two = (lines_of(tmp_path / name) for name in "12")
    assert one == two
    assert [bool(row["predict"]) for row in two] == [bool(row["content"]) for row in made]
    assert [bool(row["labels"]) for row in two] == [bool(row["summary"]) for row in made]
    assert scores_of(tmp_path / "2") == scores_of(tmp_path / "1")
    assert scores_of(tmp_path / "2")["predict_scored"] == 2
    assert not list((tmp_path / "2").glob("*.part*"))
