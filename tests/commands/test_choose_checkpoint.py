"""`python -m ptuning choose-checkpoint`: with made-up answers on a two-layer model, and for real on nano."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from main import main
from ptuning import __main__ as program
from ptuning.commands.choose_checkpoint import read_validation_loss
from ptuning.scoring.answering import AnswerRun
from ptuning.tunings.loading import SAMPLE_DIR
from ptuning.tunings.prefix import export_prefix
from tests.completions.scripted import Reply, as_completion
from tests.test_main import base, train_flags  # noqa: F401  (a fixture)
from tests.tiny import rows, write_rows

REPEATED = {2: 8, 4: 99, 6: 12, 0: 2}  # step (0: the base): characters of the reference it repeats
TABLE = "                     rougeL     bleu  validation loss\n"


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):  # noqa: F811
    """A run with three checkpoints, each with its validation loss."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTUNING_CACHE", str(folder / "cache"))
        patch.setattr("trainer_seq2seq.draw_loss_curve", lambda _log, path: path.write_bytes(b""))
        write_rows(folder / "train.json", rows(30))
        write_rows(folder / "dev.json", rows(36)[30:])
        more = ("--max_steps", "6", "--eval_strategy", "steps", "--eval_steps", "2")
        assert main(train_flags(base, folder, *more)) == 0
    return folder


class Choice:
    """The command on a copy of the run; answers are made up from the prefix that is attached."""

    def __init__(self, folder):
        self.out, self.dev = folder / "out", folder / "dev.json"
        self.prefixes = {
            step: load_file(self.out / f"checkpoint-{step}" / "prefix.safetensors")
            for step in REPEATED
            if step
        }
        self.asked = []  # the step of each answer
        self.interrupted_after = None

    def __call__(self, *flags):
        """Return the exit status."""
        self.asked.clear()
        command = ["choose-checkpoint", str(self.out), "--dev", str(self.dev), *flags]
        return program.main(command)

    def generate(self, run, model, indices):
        step = 0
        if model.prefix_encoder is not None:
            (attached,) = model.prefix_encoder.state_dict().values()
            for own, tensors in self.prefixes.items():
                step = own if next(iter(tensors.values())).equal(attached) else step
            assert step
        for place, index in enumerate(indices):
            if len(self.asked) == self.interrupted_after:
                raise KeyboardInterrupt
            self.asked.append(step)
            yield place, run.labels[index][: REPEATED[step]]

    @property
    def report(self):
        return json.loads((self.out / "choose-checkpoint.json").read_text(encoding="utf-8"))


@pytest.fixture
def choose(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    choice = Choice(tmp_path)
    monkeypatch.setattr(AnswerRun, "_generate", lambda *given: choice.generate(*given))
    return choice


def test_every_checkpoint_and_the_base_answer_and_the_best_text_is_first(choose, capsys):
    assert choose() == 0
    assert choose.asked == [2] * 6 + [4] * 6 + [6] * 6 + [0] * 6
    table = capsys.readouterr().out
    assert table.startswith(TABLE)
    ranking = [line.split()[0] for line in table.splitlines()[1:5]]
    assert ranking == ["checkpoint-4", "checkpoint-6", "checkpoint-2", "base"]
    report = choose.report
    assert (report["best"], report["metric"], report["copied"]) == ("checkpoint-4", "rougeL", False)
    assert [row["name"] for row in report["checkpoints"]] == ranking[:3]
    log = json.loads((choose.out / "trainer_state.json").read_text("utf-8"))["log_history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    assert min(losses, key=losses.__getitem__) == 6  # the best answers are those of step 4
    for row in report["checkpoints"]:
        assert row["validation_loss"] == losses[int(row["name"].removeprefix("checkpoint-"))]
    best = report["checkpoints"][0]
    assert (best["dev_rouge-l"], best["dev_scored"], best["dev_empty"]) == (100.0, 6, 0)
    assert report["settings"]["max_source_length"] == 32  # as in training
    text = (choose.out / "choose-checkpoint.jsonl").read_text(encoding="utf-8")
    shown = [json.loads(line) for line in text.splitlines()]
    assert [row["prompt"] for row in shown] == [row["content"] for row in rows(36)[30:]]
    assert list(shown[0]["answers"]) == ranking
    assert shown[0]["reference"] == "这款上衣是白色的，修身的版型，穿着舒适。"
    assert shown[0]["answers"]["checkpoint-2"] == "这款上衣是白色的"


def test_an_interrupted_command_continues_and_a_finished_one_answers_nothing_again(choose, caplog):
    choose.interrupted_after = 8  # in the second checkpoint
    assert choose() == 130
    assert "same command again" in caplog.text
    choose.interrupted_after = None
    assert choose() == 0
    assert choose.asked == [4] * 4 + [6] * 6 + [0] * 6
    assert choose("--metric", "bleu") == 0
    assert (choose.asked, choose.report["metric"]) == ([], "bleu")
    write_rows(choose.dev, rows(36)[33:])
    assert choose() == 0
    assert len(choose.asked) == 12


def test_copy_makes_the_run_the_best_checkpoint(choose):
    assert choose("--copy") == 0
    assert choose.report["copied"]
    for name in ("prefix.safetensors", "prefix_config.json"):
        best = choose.out / "checkpoint-4" / name
        assert (choose.out / name).read_bytes() == best.read_bytes()


def test_damaged_checkpoints_are_skipped_with_their_fault_and_exit_with_1(choose, caplog):
    (choose.out / "checkpoint-4" / "prefix.safetensors").write_bytes(b"half")
    assert choose() == 1
    assert "checkpoint-4 is skipped: prefix.safetensors has 4 bytes of" in caplog.text
    assert choose.report["best"] == "checkpoint-6"
    assert list(choose.report["skipped"]) == ["checkpoint-4"]


def test_a_published_checkpoint_is_ranked_too(choose, base):  # noqa: F811
    published = choose.out / "checkpoint-8"
    export_prefix(choose.out / "checkpoint-4", published, form="published")
    shutil.rmtree(choose.out / "checkpoint-4")
    (choose.out / "checkpoint-8" / "config.json").write_bytes((base / "config.json").read_bytes())
    assert choose("--model_name_or_path", str(base), "--copy") == 0
    assert choose.report["best"] == "checkpoint-8"
    assert choose.report["checkpoints"][0]["validation_loss"] is None
    assert (choose.out / "pytorch_model.bin").is_file()


def test_a_judge_decides_and_a_row_counts_if_every_checkpoint_has_a_grade(
    choose, server, capsys, caplog
):
    def reply(asked):
        answer = asked.prompt.partition("【回答】\n")[2].partition("\n\n")[0]
        grade = {8: "4", 12: "5"}.get(len(answer), "2")
        refused = "类型#裤" in asked.prompt and grade == "5"
        return Reply(200, as_completion("I refuse" if refused else grade))

    server.answer = reply
    flags = ("--metric", "judge", "--endpoint", server.address, "--model", "any")
    assert choose(*flags) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["judge", "rougeL", "bleu", "validation", "loss"]
    ranking = [line.split()[:2] for line in table[1:5]]
    assert ranking == [
        ["checkpoint-6", "5.00"],
        ["checkpoint-2", "4.00"],
        ["checkpoint-4", "2.00"],
        ["base", "2.00"],
    ]
    assert "5 of 6 rows count" in caplog.text
    assert {row["dev_judged"] for row in choose.report["checkpoints"]} == {5}
    assert (choose.report["judge"], len(server.asked)) == ("any", 24)
    server.answer = lambda _: Reply(200, as_completion("6"))
    assert choose(*flags) == 0
    assert (choose.asked, len(server.asked)) == ([], 25)  # the refused one again
    assert choose.report["checkpoints"][0]["dev_judge"] == pytest.approx(31 / 6)


def test_a_judge_needs_no_references_and_grades_equal_answers_once(choose, server, capsys):
    write_rows(choose.dev, [{"content": row["content"]} for row in rows(36)[30:]])
    server.answer = lambda _: Reply(200, as_completion("3"))
    flags = ("--metric", "judge", "--endpoint", server.address, "--model", "any")
    assert choose(*flags) == 0
    assert len(server.asked) == 6  # all are empty
    best = capsys.readouterr().out.splitlines()[1].split()
    assert best[:4] == ["checkpoint-2", "3.00", "-", "-"]
    assert choose.report["checkpoints"][0]["dev_rouge-l"] is None
    server.answer = lambda _: Reply(200, as_completion("good"))
    assert choose(*flags, "--model", "other") == 2
    assert "--model other graded no row" in capsys.readouterr().err


def test_dev_rows_may_have_other_columns_than_the_training_rows(choose):
    made = [{"prompt": row["content"], "response": row["summary"]} for row in rows(36)[30:]]
    write_rows(choose.dev, made)
    assert choose() == 0
    assert choose.report["checkpoints"][0]["dev_scored"] == 6


def test_mistakes_are_one_line_that_says_what_to_type(choose, tmp_path, capsys):
    def said(*flags):
        assert choose(*flags) == 2
        assert not choose.asked
        return capsys.readouterr().err

    assert "--batch_size is 0; use 1 or more" in said("--batch_size", "0")
    assert "--max_new_tokens is 2; use 3 or more" in said("--max_new_tokens", "2")
    assert "--model_name_or_path is nowhere, which is not" in said("--model_name_or_path=nowhere")
    assert "--metric judge and --endpoint need each other" in said("--metric", "judge")
    assert "--metric judge and --model need each other" in said("--model", "any")
    write_rows(choose.dev, [{"content": "类型#裙"}])
    assert "has no answers to compare with; add a column" in said()
    choose.dev = tmp_path / "none.json"
    assert "none.json" in said()
    for folder in choose.out.glob("checkpoint-*"):
        (folder / "prefix.safetensors").unlink()
    assert "no complete checkpoint-N" in said()
    choose.out = choose.out / "checkpoint-2"
    assert "--save_strategy epoch, or with --save_steps 100" in said()
    choose.out = tmp_path / "nowhere"
    assert "RUN is" in said()


def test_a_checkpoint_without_validation_has_no_loss(tmp_path):
    assert read_validation_loss(tmp_path / "checkpoint-4") is None
    log = [{"step": 2, "eval_loss": 1.5}, {"step": 4, "loss": 3.0}, {"step": 6, "eval_loss": 1.0}]
    for step, loss in ((2, 1.5), (4, None), (6, 1.0)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        assert read_validation_loss(folder) == loss


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_adapters_and_whole_models_are_ranked_too(tuning, base, tmp_path, monkeypatch, capsys):  # noqa: F811
    pytest.importorskip("peft", reason="needs the peft library (pip install peft)")
    monkeypatch.setenv("PTUNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("trainer_seq2seq.draw_loss_curve", lambda _log, path: path.write_bytes(b""))
    write_rows(tmp_path / "train.json", rows(30))
    write_rows(tmp_path / "dev.json", rows(33)[30:])
    flags = train_flags(base, tmp_path)
    place = flags.index("--pre_seq_len")
    assert main([*flags[:place], "--tuning", tuning, *flags[place + 2 :]]) == 0
    out, stored = tmp_path / "out", {"lora": "adapter_model.safetensors", "full": "x"}[tuning]
    command = ["choose-checkpoint", str(out), "--dev", str(tmp_path / "dev.json")]
    assert program.main([*command, "--copy"]) == (0 if tuning == "lora" else 2)
    if tuning == "full":
        assert "--copy is for prefixes and LoRA adapters" in capsys.readouterr().err
        assert program.main(command) == 0
    report = json.loads((out / "choose-checkpoint.json").read_text(encoding="utf-8"))
    assert {row["name"] for row in report["checkpoints"]} == {"checkpoint-2", "checkpoint-4"}
    assert (report["base"] is None) == (tuning == "full")
    if tuning == "lora":
        assert (out / stored).read_bytes() == (out / report["best"] / stored).read_bytes()


@pytest.mark.slow
def test_the_best_answers_are_not_at_the_lowest_loss_on_nano(tmp_path, monkeypatch, capsys):
    """Four training rows: from step 30 on the loss on others rises, and answers still improve."""
    monkeypatch.setenv("PTUNING_CACHE", str(tmp_path / "cache"))
    for name, count in (("train", 4), ("dev", 50)):
        lines = (SAMPLE_DIR / f"{name}.json").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / f"{name}.json").write_text("".join(lines[:count]), encoding="utf-8")
    flags = f"""
        --do_train --model_name_or_path nano --output_dir {tmp_path}/run --pre_seq_len 64
        --train_file {tmp_path}/train.json --validation_file {tmp_path}/dev.json --max_steps 90
        --save_steps 30 --eval_strategy steps --eval_steps 30 --per_device_train_batch_size 4
        --learning_rate 5e-2 --lr_scheduler_type constant --seed 1
    """
    assert main(flags.split()) == 0
    run, dev = tmp_path / "run", tmp_path / "dev.json"
    assert program.main(["choose-checkpoint", str(run), "--dev", str(dev), "--copy"]) == 0
    report = json.loads((run / "choose-checkpoint.json").read_text(encoding="utf-8"))
    found = {row["name"]: row for row in report["checkpoints"]}
    losses = {name: row["validation_loss"] for name, row in found.items()}
    assert min(losses, key=losses.__getitem__) == "checkpoint-30"
    assert report["best"] in ("checkpoint-60", "checkpoint-90")  # 57.04 and 57.60
    gain = found[report["best"]]["dev_rouge-l"] - found["checkpoint-30"]["dev_rouge-l"]
    assert gain > 1  # 2.39 with a standard error of 1.75
    assert report["base"]["dev_rouge-l"] < found["checkpoint-30"]["dev_rouge-l"]
    best = run / report["best"] / "prefix.safetensors"
    assert (run / "prefix.safetensors").read_bytes() == best.read_bytes()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1] for line in lines if line.startswith("checkpoint-30")] == [
        "lowest loss"
    ]
