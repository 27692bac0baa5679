"""LoRA and full fine-tuning through main.py on a two-layer model: files, scores, resuming, refusals."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from main import main
from ptuning.model.checkpoint.convert import convert_checkpoint
from ptuning.scoring.report import METHODS
from tests.test_main import base, files, log_of, same, train_flags  # noqa: F401  (fixtures)
from tests.tiny import make_base

pytest.importorskip("peft", reason="needs the peft library (pip install peft)")

WEIGHTS = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}
ARTEFACT = {
    "lora": {"adapter_config.json", "adapter_model.safetensors", "tuning_config.json"},
    "full": {
        "config.json",
        "model.safetensors",
        "ice_text.model",
        "tokenizer_config.json",
        "tuning_config.json",
    },
}
OF_ALL = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
both = pytest.mark.parametrize("tuning", ["lora", "full"])


def flags_of(tuning, base, files, *more):  # noqa: F811
    given = train_flags(base, files, *more)
    place = given.index("--pre_seq_len")
    return [*given[:place], "--tuning", tuning, *given[place + 2 :]]


def results(folder):
    values = json.loads((folder / "predict_results.json").read_text(encoding="utf-8"))
    return {name: value for name, value in values.items() if name != "predict_runtime"}


@both
def test_a_run_trains_answers_and_leaves_its_artefact_and_the_base(tuning, base, files):  # noqa: F811
    before = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    flags = flags_of(tuning, base, files, "--do_eval", "--do_predict")
    assert main([*flags, "--max_steps", "20", "--per_device_eval_batch_size", "4"]) == 0
    out = files / "out"
    names = {path.name for path in out.iterdir()}
    assert names >= ARTEFACT[tuning] | {"predict_results.json", "report.html"}
    page = (out / "report.html").read_text("utf-8")
    assert METHODS[tuning] in page
    assert {path.name for path in (out / "checkpoint-20").iterdir()} >= ARTEFACT[tuning] | OF_ALL
    assert not list(out.rglob(".unfinished"))
    assert not list(out.rglob("prefix*"))
    losses = [entry["loss"] for entry in log_of(out) if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])
    info = json.loads((out / "tuning_config.json").read_text(encoding="utf-8"))
    assert (info["tuning"], info["step"], info["base_model_name_or_path"]) == (
        tuning,
        20,
        str(base),
    )
    stored = load_file(out / WEIGHTS[tuning])
    assert info["trained_parameters"] == sum(value.numel() for value in stored.values())
    assert info["settings"]["max_source_length"] == 32
    assert hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest() == before
    assert len((out / "generated_predictions.txt").read_text("utf-8").splitlines()) == 10


def test_the_base_answers_the_same_whatever_was_trained(base, files):  # noqa: F811
    answers = set()
    for kind, flags in (
        ("ptuning", train_flags(base, files)),
        ("lora", flags_of("lora", base, files)),
        ("full", flags_of("full", base, files)),
    ):
        flags[flags.index("--output_dir") + 1] = str(files / kind)
        assert main([*flags, "--do_predict"]) == 0
        answers.add((files / kind / "generated_predictions_base.txt").read_bytes())
    assert len(answers) == 1


@both
def test_scoring_finds_out_what_it_is_given_and_agrees_with_the_run(tuning, base, files):  # noqa: F811
    assert main(flags_of(tuning, base, files, "--do_predict", "--learning_rate", "1e-2")) == 0
    flags = [
        "--do_predict",
        "--test_file",
        str(files / "dev.json"),
        "--model_name_or_path",
        str(base),
    ]
    flags += ["--ptuning_checkpoint", str(files / "out"), "--output_dir", str(files / "scores")]
    assert main(flags) == 0
    assert results(files / "scores") == results(files / "out")


def test_a_whole_model_is_scored_by_its_own_name_as_published(base, files):  # noqa: F811
    assert main(flags_of("full", base, files, "--do_predict", "--learning_rate", "1e-2")) == 0
    flags = [
        "--do_predict",
        "--test_file",
        str(files / "dev.json"),
        "--output_dir",
        str(files / "scores"),
    ]
    assert main([*flags, "--model_name_or_path", str(files / "out")]) == 0
    assert results(files / "scores") == results(files / "out")


def test_an_untouched_model_is_scored_alone(base, files):  # noqa: F811
    flags = [
        "--do_predict",
        "--test_file",
        str(files / "dev.json"),
        "--output_dir",
        str(files / "scores"),
    ]
    assert main([*flags, "--model_name_or_path", str(base), "--tuning", "full"]) == 0
    assert not any(name.startswith("base") for name in results(files / "scores"))


@both
def test_resuming_gives_the_same_weights_bit_for_bit(tuning, base, files):  # noqa: F811
    flags = flags_of(tuning, base, files, "--layer_dropout", "0.3")
    assert main(flags) == 0
    whole = load_file(files / "out" / WEIGHTS[tuning])
    shutil.rmtree(files / "out" / "checkpoint-4")
    (files / "out" / WEIGHTS[tuning]).unlink()
    assert main([*flags, "--resume_from_checkpoint", "auto"]) == 0
    assert same(load_file(files / "out" / WEIGHTS[tuning]), whole)


@both
def test_the_best_checkpoint_is_kept_at_the_end(tuning, base, files):  # noqa: F811
    flags = flags_of(tuning, base, files, "--eval_strategy", "steps", "--eval_steps", "2")
    flags += ["--load_best_model_at_end", "--learning_rate", "5", "--max_steps", "6"]
    assert main(flags) == 0
    best = json.loads((files / "out" / "trainer_state.json").read_text("utf-8"))[
        "best_model_checkpoint"
    ]
    kept = load_file(files / "out" / WEIGHTS[tuning])
    assert same(kept, load_file(files / "out" / best.rpartition("/")[2] / WEIGHTS[tuning]))


@both
def test_training_goes_on_from_what_was_trained(tuning, base, files):  # noqa: F811
    assert main(flags_of(tuning, base, files)) == 0
    flags = flags_of(tuning, base, files, "--ptuning_checkpoint", str(files / "out"))
    flags[flags.index("--output_dir") + 1] = str(files / "second")
    assert main([*flags, "--learning_rate", "0"]) == 0
    assert same(
        load_file(files / "second" / WEIGHTS[tuning]), load_file(files / "out" / WEIGHTS[tuning])
    )
    info = json.loads((files / "second" / "tuning_config.json").read_text("utf-8"))
    assert info["base_model_name_or_path"] == str(base)


def test_lora_trains_on_a_quantised_base(base, files):  # noqa: F811
    flags = flags_of("lora", base, files, "--do_predict", "--quantization_bit", "4")
    flags += ["--lora_target_modules", "query_key_value,dense_4h_to_h", "--lora_rank", "2"]
    assert main([*flags, "--max_steps", "12"]) == 0
    stored = load_file(files / "out" / WEIGHTS["lora"])
    assert len(stored) == 2 * 2 * 2
    assert all(value.abs().max() > 0 for value in stored.values())
    assert {value.dtype for value in stored.values()} == {torch.float32}


def test_mixed_precision_trains_float32_weights(base, files):  # noqa: F811
    flags = flags_of("full", base, files, "--do_predict", "--bf16", "--use_cpu")
    assert main([*flags, "--max_steps", "12"]) == 0
    stored = load_file(files / "out" / WEIGHTS["full"])
    assert {value.dtype for value in stored.values()} == {torch.float32}
    losses = [entry["loss"] for entry in log_of(files / "out") if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_a_quantised_base_cannot_be_trained_whole(base, files, tmp_path, capsys):  # noqa: F811
    convert_checkpoint(base, tmp_path / "int8", quantization_bits=8)
    assert main(flags_of("full", tmp_path / "int8", files)) == 2
    assert "use --tuning lora" in capsys.readouterr().err


def test_an_adapter_of_another_base_is_refused(base, files, tmp_path, capsys):  # noqa: F811
    assert main(flags_of("lora", base, files)) == 0
    other = make_base(tmp_path / "other", num_layers=3)
    flags = [
        "--do_predict",
        "--test_file",
        str(files / "dev.json"),
        "--model_name_or_path",
        str(other),
    ]
    flags += ["--ptuning_checkpoint", str(files / "out"), "--output_dir", str(files / "scores")]
    assert main(flags) == 2
    assert "--ptuning_checkpoint: the adapter at" in capsys.readouterr().err


def test_a_damaged_adapter_is_told_before_the_model_is_loaded(base, files, monkeypatch, capsys):  # noqa: F811
    assert main(flags_of("lora", base, files)) == 0
    weights = files / "out" / WEIGHTS["lora"]
    weights.write_bytes(weights.read_bytes()[:100])
    monkeypatch.setattr(
        "ptuning.train.tuning.load_base", lambda *_a, **_o: pytest.fail("was loaded")
    )
    flags = [
        "--do_predict",
        "--test_file",
        str(files / "dev.json"),
        "--model_name_or_path",
        str(base),
    ]
    flags += ["--ptuning_checkpoint", str(files / "out"), "--output_dir", str(files / "scores")]
    assert main(flags) == 2
    assert "damaged" in capsys.readouterr().err


def test_resuming_with_another_way_of_tuning_is_refused(base, files, capsys):  # noqa: F811
    assert main(flags_of("lora", base, files)) == 0
    assert (
        main(
            [*flags_of("full", base, files), "--resume_from_checkpoint", "auto", "--max_steps", "6"]
        )
        == 2
    )
    assert "is a lora checkpoint" in capsys.readouterr().err
