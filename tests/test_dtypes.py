"""Train, validate, answer and resume on a base in every dtype the frozen weights can have: through main.py on a two-layer model."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from main import main
from tests.tiny import leave_picture_out, make_base, rows, write_rows

FLAGS = {
    "fp32": [],
    "bf16": ["--bf16"],
    "fp16": ["--fp16"],
    "int8": ["--quantization_bit", "8"],
    "int4": ["--quantization_bit", "4"],
    "int4 with its embedding": ["--quantization_bit", "4", "--quantize_embeddings"],
}
NUM_TOKENS, NUM_LAYERS, HIDDEN_SIZE = 4, 2, 32  # of the prefix and of tests.tiny's base
STEPS = 4


@pytest.fixture(autouse=True)
def without_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_picture_out(monkeypatch)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.json", rows(8))
    write_rows(folder / "dev.json", rows(11)[8:])
    return folder


def flags(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(base), "--output_dir", str(out)),
        *("--validation_file", str(data / "dev.json"), "--token_cache_dir", str(data / "tokens")),
        *("--max_source_length", "32", "--max_target_length", "8"),
        *("--per_device_eval_batch_size", "3", "--disable_tqdm", "true"),
        *("--measure_retention", "false", *more),  # 40 prompts, slow in low precision
    ]


def train_flags(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    steps = ["--max_steps", str(STEPS), "--save_steps", "2", "--logging_steps", "1"]
    train = ["--do_train", "--train_file", str(data / "train.json"), "--learning_rate", "2e-2"]
    batch = ["--per_device_train_batch_size", "2", "--pre_seq_len", str(NUM_TOKENS)]
    return flags(base, data, out, *train, *steps, *batch, *more)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def table_of(folder: Path) -> torch.Tensor:
    """The prefix in an artefact, which holds nothing else."""
    (table,) = load_file(folder / "prefix.safetensors").values()
    return table


def results_of(folder: Path, name: str) -> dict[str, float]:
    return json.loads((folder / f"{name}_results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", FLAGS)
def test_a_base_in_this_dtype_trains_evaluates_and_resumes(
    kind: str, base: Path, data: Path, tmp_path: Path
) -> None:
    before, out = digests(base), tmp_path / "out"
    train = train_flags(base, data, out, *FLAGS[kind])

    assert main(train) == 0
    state = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    trained = table_of(out)
    assert trained.dtype == torch.float32
    assert trained.shape == (NUM_TOKENS, 2 * NUM_LAYERS * HIDDEN_SIZE)
    assert trained.isfinite().all()
    assert not trained.equal(table_of(out / "checkpoint-2")), "the prefix changes as it is trained"

    evaluate = ["--do_eval", "--do_predict", "--ptuning_checkpoint", str(out), *FLAGS[kind]]
    assert main(flags(base, data, tmp_path / "scores", *evaluate)) == 0
    assert math.isfinite(results_of(tmp_path / "scores", "eval")["eval_loss"])
    assert math.isfinite(results_of(tmp_path / "scores", "predict")["predict_bleu-4"])
    answers = (tmp_path / "scores" / "generated_predictions.txt").read_text(encoding="utf-8")
    assert [set(json.loads(line)) for line in answers.splitlines()] == [{"labels", "predict"}] * 3

    shutil.rmtree(out / "checkpoint-4")
    (out / "prefix.safetensors").unlink()
    assert main([*train, "--resume_from_checkpoint", "auto"]) == 0
    assert table_of(out).equal(trained)
    assert digests(base) == before


def test_every_dtype_computes_with_other_numbers(base: Path, data: Path, tmp_path: Path) -> None:
    """Or a flag would have been dropped on its way, and the test above would hold all the same."""
    seen = {}
    for kind, more in FLAGS.items():
        out = tmp_path / kind
        assert main(train_flags(base, data, out, "--do_eval", "--max_steps", "1", *more)) == 0
        seen[kind] = results_of(out, "eval")["eval_loss"]
    assert len(set(seen.values())) == len(FLAGS), seen
    # One training step apart by rounding alone: int4 keeps weights to 1 part in 14.
    assert max(seen.values()) - min(seen.values()) < 0.1 * min(seen.values()), seen
