"""main.py for real on a two-layer model: files written, flags accepted, errors before the model is loaded."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from main import main
from ptuning.scoring.pictures import draw_loss_curve
from ptuning.train.tuning import PrefixTuning
from tests.tiny import leave_picture_out, make_base, rows, write_rows
from trainer_seq2seq import Seq2SeqTrainer


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("PTUNING_CACHE", str(tmp_path / "cache"))
    leave_picture_out(monkeypatch)
    write_rows(tmp_path / "train.json", rows(30))
    write_rows(tmp_path / "dev.json", rows(40)[30:])
    return tmp_path


def train_flags(base, files, *more):
    return [
        "--do_train",
        *("--model_name_or_path", str(base)),
        *("--train_file", str(files / "train.json")),
        *("--validation_file", str(files / "dev.json")),
        *("--output_dir", str(files / "out")),
        *("--pre_seq_len", "4", "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1"),
        *("--max_source_length", "32", "--max_target_length", "12"),
        *("--per_device_train_batch_size", "2", "--learning_rate", "2e-2"),
        *("--disable_tqdm", "true"),
        *more,
    ]


def prefix_of(folder: Path) -> dict:
    return load_file(folder / "prefix.safetensors")


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


def log_of(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def test_a_short_run_trains_validates_answers_and_lists_these_files(base, files, monkeypatch):
    monkeypatch.setattr("trainer_seq2seq.draw_loss_curve", draw_loss_curve)
    weights = (base / "model.safetensors").read_bytes()
    flags = train_flags(base, files, "--do_eval", "--do_predict", "--eval_strategy", "steps")
    assert main([*flags, "--eval_steps", "2", "--per_device_eval_batch_size", "4"]) == 0
    out = files / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "all_results.json",
        "checkpoint-2",
        "checkpoint-4",
        "eval_results.json",
        "generated_predictions.state.json",
        "generated_predictions.txt",
        "generated_predictions_base.state.json",
        "generated_predictions_base.txt",
        "loss_curve.png",
        "predict_results.json",
        "prefix.safetensors",
        "prefix_config.json",
        "report.html",
        "run.json",
        "train_results.json",
        "trainer_state.json",
    ]
    assert sorted(path.name for path in (out / "checkpoint-4").iterdir()) == [
        "checkpoint.json",
        "optimizer.pt",
        "prefix.safetensors",
        "prefix_config.json",
        "rng_state.pth",
        "run_state_0.json",
        "scheduler.pt",
        "trainer_state.json",
    ]
    assert (out / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (base / "model.safetensors").read_bytes() == weights
    lines = (out / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 10
    assert set(json.loads(lines[0])) == {"labels", "predict"}
    results = json.loads((out / "predict_results.json").read_text(encoding="utf-8"))
    assert {"predict_bleu-4", "base_bleu-4", "predict_empty"} <= set(results)
    losses = [entry["eval_loss"] for entry in log_of(out) if "eval_loss" in entry]
    assert len(losses) == 2


def test_the_loss_falls(base, files):
    assert main(train_flags(base, files, "--max_steps", "30", "--save_steps", "30")) == 0
    losses = [entry["loss"] for entry in log_of(files / "out") if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_the_published_command_lines_run(base, files, monkeypatch):
    monkeypatch.setattr("ptuning.scoring.retention.MAX_NEW_TOKENS", 8)
    train = f"""
        --do_train --train_file {files}/train.json --validation_file {files}/dev.json
        --prompt_column content --response_column summary --overwrite_cache
        --model_name_or_path {base} --output_dir {files}/output/adgen-chatglm-6b-pt-8-2e-2
        --overwrite_output_dir --max_source_length 64 --max_target_length 16
        --per_device_train_batch_size 1 --per_device_eval_batch_size 1
        --gradient_accumulation_steps 16 --predict_with_generate --max_steps 3 --logging_steps 10
        --save_steps 1000 --learning_rate 2e-2 --pre_seq_len 8 --quantization_bit 4
    """
    assert main(train.split()) == 0
    checkpoint = files / "output" / "adgen-chatglm-6b-pt-8-2e-2" / "checkpoint-3"
    assert (checkpoint / "prefix.safetensors").is_file()
    evaluate = f"""
        --do_predict --validation_file {files}/dev.json --test_file {files}/dev.json
        --overwrite_cache --prompt_column content --response_column summary
        --model_name_or_path {base} --ptuning_checkpoint {checkpoint}
        --output_dir {files}/output/scores --overwrite_output_dir
        --max_source_length 64 --max_target_length 16 --per_device_eval_batch_size 1
        --predict_with_generate --pre_seq_len 8 --quantization_bit 4
    """
    assert main(evaluate.split()) == 0
    written = (files / "output" / "scores" / "generated_predictions.txt").read_text("utf-8")
    assert len(written.splitlines()) == 10


def test_scores_are_the_same_twice_and_need_no_prefix_flags(base, files):
    assert main(train_flags(base, files)) == 0
    flags = [
        "--do_predict",
        *("--test_file", str(files / "dev.json"), "--model_name_or_path", str(base)),
        *("--ptuning_checkpoint", str(files / "out"), "--output_dir", str(files / "scores")),
    ]
    seen = []
    for _ in range(2):
        assert main(flags) == 0
        results = json.loads((files / "scores" / "predict_results.json").read_text("utf-8"))
        seen.append({k: v for k, v in results.items() if k != "predict_runtime"})
    assert seen[0] == seen[1]


def test_the_published_recipe_samples_and_says_nothing_of_greedy(base, files):
    flags = train_flags(base, files, "--do_predict", "--recipe", "published")
    assert main([*flags, "--max_predict_samples", "1", "--compare_base", "false"]) == 0
    report = (files / "out" / "report.html").read_text("utf-8")
    assert "0.7" in report
    assert "0.95" in report


@pytest.mark.parametrize("dropout", ["0", "0.3"])
def test_resuming_gives_the_same_prefix_bit_for_bit(dropout, base, files):
    flags = train_flags(base, files, "--layer_dropout", dropout)
    assert main(flags) == 0
    whole = prefix_of(files / "out")
    shutil.rmtree(files / "out" / "checkpoint-4")
    (files / "out" / "prefix.safetensors").unlink()
    assert main([*flags, "--resume_from_checkpoint", "auto"]) == 0
    assert same(prefix_of(files / "out"), whole)


def test_lima_decays_to_a_tenth_and_leaves_a_checkpoint_of_every_epoch(base, files):
    flags = train_flags(base, files, "--preset", "lima", "--num_train_epochs", "3")
    place = flags.index("--max_steps")
    flags = [*flags[:place], *flags[place + 4 :], "--per_device_train_batch_size", "10"]
    assert main(flags) == 0
    rates = {}
    for folder in (files / "out").glob("checkpoint-*"):
        group, _biases = torch.load(folder / "optimizer.pt")["param_groups"]
        assert (tuple(group["betas"]), group["weight_decay"]) == ((0.9, 0.95), 0.1)
        rates[folder.name] = group["lr"]
    wanted = {"checkpoint-3": 0.014, "checkpoint-6": 0.008, "checkpoint-9": 0.002}
    assert group["initial_lr"] == 0.02
    assert rates == pytest.approx(wanted)


def test_the_seed_decides_the_prefix(base, files):
    prefixes = []
    for seed in ("1", "1", "2"):
        assert main(train_flags(base, files, "--overwrite_output_dir", "--seed", seed)) == 0
        prefixes.append(prefix_of(files / "out"))
    assert same(prefixes[0], prefixes[1])
    assert not same(prefixes[0], prefixes[2])


def test_the_best_prefix_is_kept_at_the_end(base, files):
    flags = train_flags(base, files, "--eval_strategy", "steps", "--eval_steps", "2")
    flags += ["--load_best_model_at_end", "--learning_rate", "50", "--max_steps", "6"]
    assert main(flags) == 0
    state = json.loads((files / "out" / "trainer_state.json").read_text("utf-8"))
    best = Path(state["best_model_checkpoint"])
    assert same(prefix_of(files / "out"), prefix_of(best))
    losses = {e["step"]: e["eval_loss"] for e in log_of(files / "out") if "eval_loss" in e}
    assert best.name == f"checkpoint-{min(losses, key=losses.get)}"


def test_early_stopping_ends_a_run_that_gets_worse(base, files):
    flags = train_flags(base, files, "--eval_strategy", "steps", "--eval_steps", "2")
    flags += ["--load_best_model_at_end", "--early_stopping_patience", "1"]
    assert main([*flags, "--learning_rate", "100", "--max_steps", "40"]) == 0
    assert max(entry["step"] for entry in log_of(files / "out")) < 40


def test_the_validation_loss_does_not_depend_on_the_batch(base, files):
    losses = []
    for size in ("1", "3", "10"):
        flags = train_flags(base, files, "--do_eval", "--overwrite_output_dir")
        assert main([*flags, "--per_device_eval_batch_size", size]) == 0
        results = json.loads((files / "out" / "eval_results.json").read_text("utf-8"))
        losses.append(results["eval_loss"])
    assert max(losses) - min(losses) < 1e-5  # float32 sums in another order


@pytest.mark.parametrize("smoothing", ["0", "0.1"])
def test_one_row_eight_times_gives_the_loss_of_eight_rows_once(smoothing, base, files, monkeypatch):
    attach = PrefixTuning.attach

    def without_dropout(tuning, model):
        attach(tuning, model)
        model.prefix_encoder.dropout = 0.0  # draws another mask for another batch shape

    monkeypatch.setattr(PrefixTuning, "attach", without_dropout)
    runs = []
    for rows_per_batch, batches in (("1", "8"), ("8", "1")):
        flags = train_flags(base, files, "--overwrite_output_dir")
        flags += ["--per_device_train_batch_size", rows_per_batch]
        flags += ["--label_smoothing_factor", smoothing]
        assert main([*flags, "--gradient_accumulation_steps", batches]) == 0
        runs.append([e["loss"] for e in log_of(files / "out") if "loss" in e])
    assert runs[0] == pytest.approx(runs[1], abs=1e-4)


def test_a_json_file_of_flags_does_the_same_as_flags(base, files):
    assert main(train_flags(base, files)) == 0
    by_flags = prefix_of(files / "out")
    values = {
        "do_train": True,
        "model_name_or_path": str(base),
        "train_file": str(files / "train.json"),
        "output_dir": str(files / "out2"),
        "pre_seq_len": 4,
        "max_steps": 4,
        "save_steps": 2,
        "max_source_length": 32,
        "max_target_length": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 2e-2,
        "disable_tqdm": True,
        "evaluation_strategy": "no",
    }
    (files / "run.json").write_text(json.dumps(values), encoding="utf-8")
    assert main([str(files / "run.json")]) == 0
    assert same(prefix_of(files / "out2"), by_flags)


def test_training_goes_on_from_a_given_prefix(base, files):
    assert main(train_flags(base, files)) == 0
    flags = train_flags(base, files, "--ptuning_checkpoint", str(files / "out"))
    flags[flags.index("--output_dir") + 1] = str(files / "second")
    assert main([*flags, "--learning_rate", "0"]) == 0
    assert same(prefix_of(files / "second"), prefix_of(files / "out"))


def test_an_interrupted_prediction_goes_on_where_it_stopped(base, files, monkeypatch):
    assert main(train_flags(base, files)) == 0
    flags = [
        "--do_predict",
        *("--test_file", str(files / "dev.json"), "--model_name_or_path", str(base)),
        *("--ptuning_checkpoint", str(files / "out"), "--output_dir", str(files / "scores")),
        *("--per_device_eval_batch_size", "1", "--measure_retention", "false"),
    ]
    assert main(flags) == 0
    whole = (files / "scores" / "generated_predictions.txt").read_bytes()
    shutil.rmtree(files / "scores")

    import ptuning.scoring.answering as prediction

    real = prediction.generate_answers
    answered = []

    def stops_after(count):
        def generate(model, prompts, **options):
            for row, answer in enumerate(real(model, prompts, **options)):
                if row == count:
                    raise KeyboardInterrupt
                answered.append(row)
                yield answer

        return generate

    monkeypatch.setattr(prediction, "generate_answers", stops_after(9))
    assert main(flags) == 130
    kept = (files / "scores" / "generated_predictions.txt").read_bytes().count(b"\n")
    assert 0 < kept < 10
    answered.clear()
    monkeypatch.setattr(prediction, "generate_answers", stops_after(1000))
    assert main(flags) == 0
    assert len(answered) == 10 - kept + 10  # the rest of the tuned rows, and the base's
    assert (files / "scores" / "generated_predictions.txt").read_bytes() == whole


def stopped_after(monkeypatch, step):
    """Have training stopped as by Ctrl-C when that step is over."""
    real = Seq2SeqTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Seq2SeqTrainer, "training_step", training_step)


def contents(folder):
    """Return every file of a folder with the hash of its content."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_command_after_ctrl_c_resumes_and_ends_as_an_unstopped_run(
    base, files, monkeypatch, capsys, caplog
):
    flags = train_flags(base, files)
    assert main([*flags, "--output_dir", str(files / "unstopped")]) == 0
    with monkeypatch.context() as patch:
        stopped_after(patch, 3)
        assert main(flags) == 130
    assert "checkpoint-3 is complete: type the same command again" in capsys.readouterr().err
    with caplog.at_level("INFO"):
        assert main(flags) == 0
    assert "checkpoint-3" in caplog.text
    assert "--overwrite_output_dir" in caplog.text  # how to start over instead
    assert same(prefix_of(files / "out"), prefix_of(files / "unstopped"))


def test_a_finished_run_typed_again_trains_no_step_and_scores(base, files):
    flags = train_flags(base, files, "--do_predict", "--compare_base", "false")
    assert main(flags) == 0
    trained = prefix_of(files / "out")
    (files / "out" / "predict_results.json").unlink()
    assert main(flags) == 0
    assert same(prefix_of(files / "out"), trained)
    assert (files / "out" / "predict_results.json").is_file()


@pytest.mark.parametrize("what", ["rate", "rows"])
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_is_not_replaced_by_another_one_unasked(
    what, is_finished, base, files, monkeypatch, capsys
):
    flags = train_flags(base, files)
    with monkeypatch.context() as patch:
        if not is_finished:
            stopped_after(patch, 3)
        assert main(flags) == (0 if is_finished else 130)
    before = contents(files / "out")
    capsys.readouterr()
    if what == "rows":
        write_rows(files / "train.json", rows(29))
    more = ["--learning_rate", "1e-3"] if what == "rate" else []
    assert main([*flags, *more]) == 2
    error = capsys.readouterr().err
    difference = "--learning_rate was 0.02 and is 0.001" if what == "rate" else "different rows"
    for word in (difference, "--output_dir", "NAME="):
        assert word in error
    # A finished run has no step left to continue with at another rate.
    offers_to_continue = "--resume_from_checkpoint auto" in error
    assert offers_to_continue == (what == "rows" or not is_finished)
    assert "--overwrite_output_dir" in error
    assert contents(files / "out") == before
    assert main([*flags, *more, "--overwrite_output_dir"]) == 0
    assert contents(files / "out") != before


def test_a_start_that_fails_leaves_no_folder(base, files):
    (files / "empty").mkdir()
    flags = train_flags(base, files, "--output_dir", str(files / "a" / "b"))
    assert main([*flags, "--model_name_or_path", str(files / "empty")]) == 2
    assert not (files / "a").exists()


WRONG = {
    "unknown flag": (["--lerning_rate", "1"], "--learning_rate"),
    "no file": (["--train_file", "nowhere.json"], "nowhere.json"),
    "no column": (["--prompt_column", "question"], "question"),
    "no model": (["--model_name_or_path", "./nowhere"], "./nowhere"),
    "no steps": (["--max_steps", "0"], "--max_steps is 0; use 1 or more"),
    "bad recipe": (["--recipe", "mine"], "published"),
    "bad bits": (["--quantization_bit", "3"], "4 or 8"),
    "zero prefix": (["--pre_seq_len", "0"], "--pre_seq_len is 0"),
    "no prefix there": (["--ptuning_checkpoint", "nowhere"], "nowhere"),
    "hub data": (["--dataset_name", "adgen"], "--train_file"),
    "both dtypes": (["--bf16", "--fp16"], "one dtype"),
    "no rows": (
        ["--per_device_train_batch_size", "0"],
        "--per_device_train_batch_size is 0; use 1 or more",
    ),
    "no rows to answer": (
        ["--per_device_eval_batch_size", "-1"],
        "--per_device_eval_batch_size is -1; use 1 or more",
    ),
    "no GPU to keep to": (
        ["--gpu_memory", "4.6", "--use_cpu"],
        "--gpu_memory is 4.6 and this run computes on cpu, which is not a CUDA device; leave it out",
    ),
    "nothing to resume": (["--resume_from_checkpoint", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_wrong_flags_are_told_before_the_model_is_loaded(case, base, files, monkeypatch, capsys):
    def must_not_load(*_args, **_options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("ptuning.train.tuning.load_base", must_not_load)
    more, needed = WRONG[case]
    assert main(train_flags(base, files, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("main.py: ")
    assert needed in error
    assert not (files / "out").exists()


def test_a_broken_line_is_named_with_its_number(base, files, monkeypatch, capsys):
    path = files / "train.json"
    path.write_text(path.read_text("utf-8") + '{"content": "a", "summ\n', encoding="utf-8")
    assert main(train_flags(base, files)) == 2
    assert "train.json:31: " in capsys.readouterr().err


def test_contradicting_the_prefix_is_an_error_that_names_both(base, files, capsys):
    assert main(train_flags(base, files)) == 0
    flags = train_flags(base, files, "--ptuning_checkpoint", str(files / "out"))
    flags[flags.index("--output_dir") + 1] = str(files / "second")
    flags[flags.index("--pre_seq_len") + 1] = "8"
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert "--pre_seq_len is 8" in error
    assert "has 4" in error


def test_an_output_folder_that_cannot_be_made_is_told_before_the_model_is_loaded(
    base, files, monkeypatch, capsys
):
    monkeypatch.setattr(
        "ptuning.train.tuning.load_base", lambda *_a, **_o: pytest.fail("was loaded")
    )
    (files / "out").write_text("a file")
    assert main(train_flags(base, files)) == 2
    error = capsys.readouterr().err
    assert "--output_dir" in error
    assert "cannot be written" in error


def test_a_damaged_prefix_is_told_before_the_model_is_loaded(base, files, monkeypatch, capsys):
    assert main(train_flags(base, files)) == 0
    whole = (files / "out" / "prefix.safetensors").read_bytes()
    (files / "out" / "prefix.safetensors").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(
        "ptuning.train.tuning.load_base", lambda *_a, **_o: pytest.fail("was loaded")
    )
    flags = ["--do_predict", "--test_file", str(files / "dev.json")]
    flags += ["--model_name_or_path", str(base), "--output_dir", str(files / "scores")]
    assert main([*flags, "--ptuning_checkpoint", str(files / "out")]) == 2
    assert "damaged" in capsys.readouterr().err


def test_resuming_where_there_is_nothing_says_that_it_starts_over(base, files, caplog):
    with caplog.at_level("INFO"):
        assert main(train_flags(base, files, "--resume_from_checkpoint", "auto")) == 0
    assert "starting over" in caplog.text


def test_a_data_error_names_the_flag_of_the_file(base, files, capsys):
    assert main(train_flags(base, files, "--train_file", "nowhere.json")) == 2
    assert "--train_file: nowhere.json" in capsys.readouterr().err


def test_answers_of_the_tuned_model_are_kept_while_the_base_answers(base, files, monkeypatch):
    """Stopped between the two halves of scoring, the run continues with the base's half."""
    assert main(train_flags(base, files)) == 0
    flags = ["--do_predict", "--test_file", str(files / "dev.json"), "--compare_base"]
    flags += ["--model_name_or_path", str(base), "--output_dir", str(files / "scores")]
    flags += ["--ptuning_checkpoint", str(files / "out"), "--measure_retention", "false"]
    import ptuning.scoring.answering as prediction

    real, answered = prediction.generate_answers, []

    def counted(model, prompts, **options):
        for row, answer in enumerate(real(model, prompts, **options)):
            if stops and len(answered) == 12:
                raise KeyboardInterrupt
            answered.append(row)
            yield answer

    monkeypatch.setattr(prediction, "generate_answers", counted)
    stops = True
    assert main(flags) == 130
    stops = False
    answered.clear()
    assert main(flags) == 0
    assert len(answered) < 10  # of the base's half alone
    answered.clear()
    assert main(flags) == 0
    assert len(answered) == 10  # a finished scoring is repeated with the tuned model


def test_label_smoothing_near_zero_takes_the_steps_of_a_run_without_it(base, files, monkeypatch):
    trainers, train = [], Seq2SeqTrainer.train

    def remember(trainer, *args, **kwargs):
        trainers.append(trainer)
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(Seq2SeqTrainer, "train", remember)
    runs = []
    for factor in ("0", "1e-7", "0.1"):
        flags = train_flags(base, files, "--overwrite_output_dir")
        assert main([*flags, "--label_smoothing_factor", factor]) == 0
        runs.append([e["loss"] for e in log_of(files / "out") if "loss" in e])
    assert len(runs[0]) == 4
    assert runs[1] == pytest.approx(runs[0], abs=1e-4)
    assert runs[2][0] != pytest.approx(runs[0][0], abs=1e-3), "a real factor changes the loss"
    assert [trainer.args.label_smoothing_factor for trainer in trainers] == [0, 1e-7, 0.1]
    assert all(trainer.label_smoother is None for trainer in trainers), "the model does it"
