"""Data files as people have them, through main.py: what is trained, what is said, what is answered."""

import json
import logging

import pytest

from main import main
from ptuning import __main__ as program
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.train.rows import load_rows
from ptuning.train.run_config import parse_arguments
from ptuning.tunings.artefact import read_info
from tests.test_main import base, files, train_flags  # noqa: F401
from tests.tiny import rows, write_rows

TRANSLATIONS = [
    {"instruction": "写一句", "input": row["content"], "output": row["summary"], "id": index}
    for index, row in enumerate(rows(6))
]
CHATS = [
    {
        "conversations": [
            {"from": "human", "value": "裤"},
            {"from": "gpt", "value": "宽松的"},
            {"from": "human", "value": row["content"]},
            {"from": "gpt", "value": row["summary"]},
        ]
    }
    for row in rows(5)
]
NAMED = ("--prompt_column", "instruction", "--response_column", "output")


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def answers_of(folder):
    lines = (folder / "generated_predictions.txt").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_an_input_that_is_left_out_ends_the_run_and_the_advice_helps(
    base,  # noqa: F811
    files,  # noqa: F811
    log,
    capsys,
):
    write_rows(files / "train.json", TRANSLATIONS)
    assert main(train_flags(base, files, *NAMED)) == 2
    said = capsys.readouterr().err
    assert '6 rows differ only in the column "input", which is not used, so' in said
    advice = "--prompt_column instruction --input_column input --response_column output"
    assert f"use it: {advice}, or train all the same with --allow_repeated_prompts." in said
    assert "columns not used: input (filled in 6 of 6 rows), id (filled in 6" in log.text
    assert main(train_flags(base, files, *advice.split())) == 0
    assert main(train_flags(base, files, *NAMED, "--overwrite_output_dir")) == 2  # from the cache


def test_repeated_prompts_are_trained_where_they_are_wanted(base, files):  # noqa: F811
    write_rows(files / "train.json", TRANSLATIONS)
    assert main(train_flags(base, files, *NAMED, "--allow_repeated_prompts")) == 0


def test_a_chat_is_remembered_as_one(base, files, log):  # noqa: F811
    write_rows(files / "train.json", CHATS)
    assert main(train_flags(base, files)) == 0
    assert "5 rows read, 10 answers in them, 10 kept" in log.text
    assert "format sharegpt: the turns of conversations" in log.text
    settings = read_info(files / "out").settings
    assert (settings["multi_turn"], settings["format"]) == (True, "auto")
    write_rows(files / "train.json", rows(5))
    assert main([*train_flags(base, files), "--overwrite_output_dir"]) == 0
    assert read_info(files / "out").settings["multi_turn"] is False


def loaded(base, files, *more):  # noqa: F811
    config = parse_arguments(train_flags(base, files, *more))
    return load_rows(config, ChatGLMTokenizer.from_pretrained(base), overwrite_cache=False)


def test_several_files_are_joined_in_order_each_in_its_format(base, files, log):  # noqa: F811
    write_rows(files / "a.json", CHATS)
    write_rows(files / "b.json", TRANSLATIONS)
    train = str(files / "train.json")
    one = loaded(base, files).train
    several = loaded(base, files, "--train_file", train, f"{files}/[ab].json").train
    assert len(several) == len(one) + 10 + 6
    for index in range(len(one)):
        assert several[index]["input_ids"].equal(one[index]["input_ids"])
    assert several.lengths.sum() == len(several.arrays.ids)
    for name in ("columns: content", "sharegpt: the turns", "alpaca: instruction + input"):
        assert f"format {name}" in log.text
    some = loaded(base, files, "--train_file", f"{files}/?.json", "--max_train_samples", "7").train
    assert len(some) == 10 + 2  # five conversations, two rows


@pytest.mark.parametrize("made", [TRANSLATIONS, CHATS, rows(9)[5:]])
def test_general_rows_may_have_a_format_of_their_own(base, files, made):  # noqa: F811
    task = [{"问": row["content"], "答": row["summary"]} for row in rows(30)]
    write_rows(files / "train.json", task)
    general = write_rows(files / "general.json", made)
    more = ("--prompt_column", "问", "--response_column", "答", "--mix", f"{general}:0.5")
    assert len(loaded(base, files, *more).train) == 60


def test_general_rows_without_a_known_format_say_how_to_name_columns(
    base,  # noqa: F811
    files,  # noqa: F811
    capsys,
):
    general = write_rows(files / "general.json", [{"a": "1", "b": "2"}])
    assert main(train_flags(base, files, "--mix", f"{general}:0.5")) == 2
    said = capsys.readouterr().err
    assert "--mix: " in said
    assert 'The columns here are: "a", "b".' in said
    assert "FILE:RATIO:PROMPT,RESPONSE" in said


def test_a_part_of_general_prompts_that_is_left_out_ends_the_run(
    base,  # noqa: F811
    files,  # noqa: F811
    capsys,
    log,
):
    general = write_rows(files / "general.json", TRANSLATIONS)
    assert main(train_flags(base, files, "--mix", f"{general}:0.5:instruction,output")) == 2
    said = capsys.readouterr().err
    assert 'differ only in the column "input"' in said
    assert "leave the columns out of --mix to have them found" in said
    made = [{"question": "写", "passage": f"第 {n} 段", "answer": str(n)} for n in range(4)]
    write_rows(general, made)
    assert main(train_flags(base, files, "--mix", f"{general}:0.5")) == 2
    said = capsys.readouterr().err
    advice = said[said.index("python -m ptuning data convert") :].partition(", or train")[0]
    words = advice.replace("NAME.jsonl", str(files / "whole.jsonl")).split()[3:]
    assert program.main(words) == 0
    assert main(train_flags(base, files, "--mix", f"{files / 'whole.jsonl'}:0.5")) == 0


def test_general_rows_keep_their_turns_where_the_task_has_columns_of_the_same_names(
    base,  # noqa: F811
    files,  # noqa: F811
    log,
):
    made = [{"prompt": r["content"], "response": r["summary"], "history": []} for r in rows(6)]
    write_rows(files / "train.json", made)
    general = write_rows(
        files / "general.json", [{**row, "history": [["裤", "宽松的"]]} for row in made]
    )
    named = ("--prompt_column", "prompt", "--response_column", "response")
    loaded(base, files, *named, "--mix", f"{general}:0.5")
    assert "format columns: history + prompt -> response" in log.text


@pytest.fixture(scope="module")
def prefix(base, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("trained")
    for name, made in (("train", rows(8)), ("dev", rows(8))):
        write_rows(folder / f"{name}.json", made)
    assert main(train_flags(base, folder)) == 0
    return folder / "out"


def evaluated(base, prefix, folder, test):  # noqa: F811
    """Answer and validate a file as evaluate.sh does."""
    return main(
        [
            *("--do_eval", "--do_predict", "--predict_with_generate"),
            *("--validation_file", str(test), "--test_file", str(test)),
            *("--model_name_or_path", str(base), "--ptuning_checkpoint", str(prefix)),
            *("--output_dir", str(folder / "scored"), "--compare_base", "false"),
            *("--disable_tqdm", "true"),
        ]
    )


def test_a_left_out_column_of_the_rows_to_validate_is_said(base, files, log):  # noqa: F811
    write_rows(
        files / "dev.json", [{"prompt": "写", "context": str(n), "response": "好"} for n in "12"]
    )
    assert (
        main(train_flags(base, files, "--do_eval", "--do_predict", "--compare_base", "false")) == 0
    )
    assert log.text.count('2 rows differ only in the column "context", which is not used') == 2


def test_a_test_set_without_answers_is_answered(base, prefix, files, log, capsys):  # noqa: F811
    made = [{"content": row["content"]} for row in rows(3)]
    test = write_rows(files / "test.json", made)
    assert evaluated(base, prefix, files, test) == 0
    answers = answers_of(files / "scored")
    assert [answer["labels"] for answer in answers] == ["", "", ""]
    assert "no row has an answer to compare with, so nothing is scored" in log.text
    assert "no validation loss for" in log.text
    results = json.loads((files / "scored" / "predict_results.json").read_bytes())
    assert (results["predict_bleu-4"], results["predict_samples"]) == (None, 3)
    assert not (files / "scored" / "eval_results.json").exists()


def test_a_test_set_keeps_its_lines_and_scores_those_with_answers(
    base,  # noqa: F811
    prefix,
    files,  # noqa: F811
    log,
):
    made = rows(4)
    made[1]["summary"] = ""
    made[2]["content"] = ""
    test = write_rows(files / "test.json", made)
    assert evaluated(base, prefix, files, test) == 0
    answers = answers_of(files / "scored")
    assert [bool(answer["labels"]) for answer in answers] == [True, False, True, True]
    assert answers[2]["predict"] == ""
    assert '1 row (25.0%) not answered: no prompt in "content" (line 3)' in log.text
    results = json.loads((files / "scored" / "predict_results.json").read_bytes())
    assert (results["predict_samples"], results["predict_scored"]) == (3, 2)
    assert (files / "scored" / "eval_results.json").exists()


def test_a_misspelled_answer_column_is_no_test_set_without_answers(
    base,  # noqa: F811
    prefix,
    files,  # noqa: F811
    capsys,
):
    flags = ["--do_predict", "--test_file", str(write_rows(files / "test.json", rows(2)))]
    flags += ["--model_name_or_path", str(base), "--ptuning_checkpoint", str(prefix)]
    flags += ["--output_dir", str(files / "scored"), "--response_column"]
    assert main([*flags, "sumary"]) == 2
    assert 'no column "sumary". Was "summary" meant?' in capsys.readouterr().err
    assert main([*flags, "gold", "--compare_base", "false"]) == 0  # nothing like it: no answers


def test_some_files_or_rows_without_answers_leave_the_validation_to_the_others(
    base,  # noqa: F811
    prefix,
    files,  # noqa: F811
    log,
):
    made = rows(4)
    write_rows(files / "test-1.json", [{"content": row["content"]} for row in made])
    write_rows(files / "test-2.json", [{**made[0], "summary": ""}, *made[1:]])
    assert evaluated(base, prefix, files, f"{files}/test-?.json") == 0
    assert f"no validation loss for {files}/test-1.json: no row to compare with" in log.text
    results = json.loads((files / "scored" / "predict_results.json").read_bytes())
    assert (results["predict_samples"], results["predict_scored"]) == (8, 3)
    assert (files / "scored" / "eval_results.json").exists()


def test_columns_that_a_checkpoint_remembers_can_be_left_behind(
    base,  # noqa: F811
    files,  # noqa: F811
    capsys,
):
    named = [{"问": row["content"], "答": row["summary"]} for row in rows(5)]
    for name in ("train", "dev"):
        write_rows(files / f"{name}.json", named)
    columns = ("--prompt_column", "问", "--response_column", "答")
    assert main(train_flags(base, files, *columns)) == 0
    flags = ["--do_predict", "--test_file", str(write_rows(files / "chats.json", CHATS))]
    flags += ["--model_name_or_path", str(base), "--ptuning_checkpoint", str(files / "out")]
    flags += ["--output_dir", str(files / "scored"), "--compare_base", "false"]
    assert main(flags) == 2
    said = capsys.readouterr().err
    assert "--prompt_column 问 --response_column 答 as in training" in said
    assert "type --format auto" in said
    assert main([*flags, "--format", "auto"]) == 0


def test_rows_beyond_the_context_of_the_base_are_said(base, files, log):  # noqa: F811
    made = rows(3)
    made[1]["summary"] *= 200
    write_rows(files / "train.json", made)
    assert main(train_flags(base, files, "--max_target_length", "3000")) == 0
    assert "1 of 3 rows are longer than the" in log.text
