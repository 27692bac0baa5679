"""Several processes do what one does with the same rows in a step: losses, prefix, answers, endings."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import make_base, rows, write_rows

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "ptuning" / "nano" / "weights"
TIMES = ("runtime", "per_second")
COMMON = "--use_cpu true --disable_tqdm true --max_source_length 32 --max_target_length 16"


class Launcher:
    """Runs of main.py in one or more forked processes that talk by gloo."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tiny = make_base(folder / "tiny")
        write_rows(folder / "dev.json", rows(45)[40:])
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PTUNING_CACHE": str(folder / "cache"),
        }
        self.forker = subprocess.Popen(
            [sys.executable, "-m", "tests.train.launching"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.forker.stdout is not None
        assert self.forker.stdout.readline() == "ready\n"

    def train_file(self, count: int) -> Path:
        return write_rows(self.folder / f"train-{count}.json", rows(count))

    def start(
        self, argv: list[str], processes: int, *, no_dropout: bool = False, **how: Any
    ) -> list[int]:
        """Run, and return the exit status of each process."""
        request = {
            "argv": argv,
            "processes": processes,
            "log": f"{self.folder}/log",
            "no_dropout": no_dropout,
            "signal": None,
            "fail": None,
            **how,
        }
        assert self.forker.stdin is not None
        assert self.forker.stdout is not None
        self.forker.stdin.write(json.dumps(request) + "\n")
        self.forker.stdin.flush()
        statuses: list[int] = json.loads(self.forker.stdout.readline())["statuses"]
        return statuses

    def log(self, process: int = 0) -> str:
        return (self.folder / f"log{process}").read_text("utf-8")

    def finish(self, argv: list[str], processes: int, *, no_dropout: bool = False) -> None:
        statuses = self.start(argv, processes, no_dropout=no_dropout)
        assert statuses == [0] * processes, "\n".join(
            self.log(process)[-2500:] for process in range(processes)
        )


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    made = Launcher(tmp_path_factory.mktemp("processes"))
    yield made
    assert made.forker.stdin is not None
    made.forker.stdin.close()
    made.forker.wait(timeout=10)


def argv_of(launcher: Launcher, out: Path, num_rows: int, flags: str, base: Path) -> list[str]:
    files = (
        f"--train_file {launcher.train_file(num_rows)} --validation_file {launcher.folder}/dev.json"
    )
    model = f"--do_train --model_name_or_path {base} --output_dir {out}"
    return f"{model} {files} {COMMON} --logging_steps 1 {flags}".split()


def log_of(out: Path) -> list[dict[str, Any]]:
    entries = json.loads((out / "trainer_state.json").read_text("utf-8"))["log_history"]
    for entry in entries:
        entry.pop("total_flos", None)  # counts padding, which depends on who is in a batch
    return [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in entries]


def assert_same_log(found: Path, wanted: Path) -> None:
    """Losses to 1e-5, as the issue asks; a gradient norm is a square root of many sums."""
    one, other = log_of(found), log_of(wanted)
    assert [entry.keys() for entry in one] == [entry.keys() for entry in other]
    for entry, reference in zip(one, other, strict=True):
        assert entry == pytest.approx(reference, rel=1e-4, abs=1e-5)
        for name in ("loss", "eval_loss", "train_loss"):
            if name in entry:
                assert abs(entry[name] - reference[name]) < 1e-5, entry


def assert_same_weights(found: Path, wanted: Path, name: str, *, learning_rate: float) -> None:
    """Within a thousandth of a step, and on average far closer.

    AdamW divides a gradient by its own size: where a row's share cancels another's, the rounding
    of the sum, which depends on who is in a batch, moves that entry by much more than itself.
    """
    one, other = load_file(found / name), load_file(wanted / name)
    assert one.keys() == other.keys()
    for key in other:
        difference = (one[key] - other[key]).abs()
        assert difference.max() < 1e-3 * learning_rate, key
        assert difference.mean() < 1e-5 * learning_rate, key


def scores_of(out: Path) -> dict[str, Any]:
    found = json.loads((out / "predict_results.json").read_text("utf-8"))
    return {name: value for name, value in found.items() if not name.endswith("runtime")}


# Rows, flags that both have, flags of one process, of several, and how many these are. An epoch's
# last step has fewer rows than the others: 2, 3 and 1, of which not every process has one.
LAYOUTS = {
    "even": (12, "--max_steps 6", "4", "2", 2),
    "7 rows in 2 x 2": (7, "--max_steps 6", "4", "2", 2),
    "a process without rows": (5, "--max_steps 5 --logging_steps 2", "4", "2", 2),
    "accumulated over 3": (
        8,
        "--max_steps 4 --gradient_accumulation_steps 2",
        "3",
        "1",
        3,
    ),
}


@pytest.mark.parametrize(
    "layout",
    [
        "even",
        "a process without rows",
        pytest.param("7 rows in 2 x 2", marks=pytest.mark.slow),
        pytest.param("accumulated over 3", marks=pytest.mark.slow),
    ],
)
def test_several_processes_train_as_one(layout, launcher, tmp_path):
    num_rows, flags, alone, shared, processes = LAYOUTS[layout]
    flags += " --pre_seq_len 4 --learning_rate 2e-2 --eval_strategy steps --eval_steps 2"
    flags += " --per_device_eval_batch_size 2 --per_device_train_batch_size"
    one = argv_of(launcher, tmp_path / "one", num_rows, f"{flags} {alone}", NANO)
    launcher.finish(one, 1, no_dropout=True)
    several = argv_of(launcher, tmp_path / "several", num_rows, f"{flags} {shared}", NANO)
    launcher.finish(several, processes, no_dropout=True)
    assert_same_log(tmp_path / "several", tmp_path / "one")
    assert_same_weights(
        tmp_path / "several", tmp_path / "one", "prefix.safetensors", learning_rate=2e-2
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "tuning", ["lora --lora_dropout 0 --learning_rate 3e-2", "full --learning_rate 1e-4"]
)
def test_a_process_without_rows_holds_nobody_up_in_the_other_ways_of_tuning(
    tuning, launcher, tmp_path
):
    if tuning.startswith("lora"):
        pytest.importorskip("peft")
    flags = f"--tuning {tuning} --max_steps 3 --save_strategy no --per_device_train_batch_size"
    launcher.finish(argv_of(launcher, tmp_path / "one", 5, f"{flags} 4", NANO), 1)
    launcher.finish(argv_of(launcher, tmp_path / "two", 5, f"{flags} 2", NANO), 2)
    assert_same_log(tmp_path / "two", tmp_path / "one")


def predict_argv(
    launcher: Launcher, prefix: Path, out: Path, *, retention: bool = False, batch_size: int = 2
) -> list[str]:
    test = f"--do_eval --do_predict --validation_file {launcher.folder}/dev.json"
    model = f"--model_name_or_path {NANO} --ptuning_checkpoint {prefix} --output_dir {out}"
    asked = f"--measure_retention {str(retention).lower()}"  # of 40 more prompts
    return f"{test} {model} {COMMON} {asked} --per_device_eval_batch_size {batch_size}".split()


@pytest.fixture(scope="module")
def trained(launcher, tmp_path_factory):
    """A prefix, and what one process answers with it."""
    folder = tmp_path_factory.mktemp("trained")
    flags = "--max_steps 4 --pre_seq_len 4 --learning_rate 2e-2 --per_device_train_batch_size 4"
    launcher.finish(argv_of(launcher, folder / "prefix", 12, flags, NANO), 1)
    launcher.finish(predict_argv(launcher, folder / "prefix", folder / "alone"), 1)
    return folder


def answers_of(out: Path) -> list[bytes]:
    names = ("generated_predictions.txt", "generated_predictions_base.txt")
    return [(out / name).read_bytes() for name in names]


def test_answers_and_scores_of_several_processes_are_those_of_one(launcher, trained, tmp_path):
    """Five rows for three processes: each scored once, in the order of the file."""
    launcher.finish(predict_argv(launcher, trained / "prefix", tmp_path), 3)
    assert answers_of(tmp_path) == answers_of(trained / "alone")
    assert len(answers_of(tmp_path)[0].splitlines()) == 5
    assert scores_of(tmp_path) == scores_of(trained / "alone")
    assert scores_of(tmp_path)["predict_rouge-l"] > 0
    one = json.loads((trained / "alone" / "eval_results.json").read_text("utf-8"))
    found = json.loads((tmp_path / "eval_results.json").read_text("utf-8"))
    assert found["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-5)
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.slow
def test_every_process_answers_with_the_best_prefix(launcher, tmp_path):
    """The highest loss counts as the best one here, so that the best checkpoint is not the last."""
    flags = "--max_steps 3 --save_steps 1 --eval_strategy steps --eval_steps 1 --learning_rate 1"
    flags += " --metric_for_best_model eval_loss --greater_is_better true"
    flags += " --load_best_model_at_end true --pre_seq_len 4 --per_device_train_batch_size 2"
    flags += " --do_predict --compare_base false"
    argv = argv_of(launcher, tmp_path / "run", 12, flags, NANO)
    launcher.finish(argv, 2)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text("utf-8"))
    assert state["best_global_step"] < state["global_step"]
    launcher.finish(predict_argv(launcher, tmp_path / "run", tmp_path / "again"), 1)
    name = "generated_predictions.txt"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    last = tmp_path / "run" / "checkpoint-3"
    launcher.finish(predict_argv(launcher, last, tmp_path / "last"), 1)
    assert (tmp_path / "last" / name).read_bytes() != (tmp_path / "again" / name).read_bytes()


@pytest.mark.slow
def test_shares_that_were_answered_before_a_stop_are_not_answered_again(
    launcher, trained, tmp_path
):
    argv = predict_argv(launcher, trained / "prefix", tmp_path, batch_size=1)  # rows in order
    statuses = launcher.start(argv, 2, fail={"process": 1, "row": 1})
    assert 0 not in statuses
    parts = sorted(tmp_path.glob("generated_predictions.part?of2.txt"))
    assert [len(part.read_bytes().splitlines()) for part in parts] == [3, 1]
    assert not (tmp_path / "generated_predictions.txt").exists()
    row = json.loads(parts[1].read_text("utf-8"))
    mark = "marked, to be known again"
    parts[1].write_text(json.dumps({**row, "predict": mark}) + "\n", "utf-8")
    launcher.finish(argv, 2)
    made = [json.loads(line) for line in answers_of(tmp_path)[0].splitlines()]
    wanted = [json.loads(line) for line in answers_of(trained / "alone")[0].splitlines()]
    changed = [index for index in range(5) if made[index] != wanted[index]]
    assert [made[index]["predict"] for index in changed] == [mark]
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.slow
def test_another_number_of_processes_answers_anew(launcher, trained, tmp_path):
    argv = predict_argv(launcher, trained / "prefix", tmp_path)
    assert 0 not in launcher.start(argv, 2, fail={"process": 1, "row": 1})
    launcher.finish(argv, 1)
    assert answers_of(tmp_path) == answers_of(trained / "alone")
    assert not list(tmp_path.glob("*.part*"))


RESUMED = (
    "--max_steps 40 --save_steps 4 --save_total_limit 2 --pre_seq_len 4 --learning_rate 2e-2 "
    "--per_device_train_batch_size 2 --eval_strategy steps --eval_steps 4 "
    "--load_best_model_at_end true"
)


def result_of(out: Path) -> dict[str, Any]:
    last = out / "checkpoint-40"
    return {
        "log": log_of(out),
        "prefix": (out / "prefix.safetensors").read_bytes(),
        "last": (last / "prefix.safetensors").read_bytes(),
        "run state": [
            json.loads((last / f"run_state_{i}.json").read_text("utf-8")) for i in (0, 1)
        ],
        "random": [
            torch.load(last / f"rng_state_{i}.pth", weights_only=False)["cpu"].tolist()
            for i in (0, 1)
        ],
        "left over": [path.name for path in out.iterdir() if path.name.startswith(".")],
    }


@pytest.fixture(scope="module")
def undisturbed(launcher, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    launcher.finish(argv_of(launcher, out, 11, RESUMED, launcher.tiny), 2)
    return result_of(out)


def test_each_process_draws_its_own_dropout(undisturbed):
    first, second = undisturbed["random"]
    assert first != second


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_stopped_run_of_two_goes_on_bit_by_bit(number, undisturbed, launcher, tmp_path):
    """SIGTERM reaches one process alone here: the other has to stop at the same step."""
    argv = argv_of(launcher, tmp_path, 11, RESUMED, launcher.tiny)
    to = [1] if number == signal.SIGTERM else [0, 1]
    order = {"number": int(number), "to": to, "after": "step  8 of 40"}
    statuses = launcher.start(argv, 2, signal=order)
    if number == signal.SIGTERM:
        assert statuses == [143, 143], launcher.log(0) + launcher.log(1)
        assert "type the same command again" in launcher.log(1)
        assert "Traceback" not in launcher.log(0) + launcher.log(1)
    else:
        assert statuses == [-9, -9]
    assert not (tmp_path / "checkpoint-40").exists()
    launcher.finish(argv, 2)
    assert "Resuming" in launcher.log(0)
    assert result_of(tmp_path) == undisturbed


def test_every_process_refuses_what_the_main_one_refuses(launcher, tmp_path):
    argv = argv_of(launcher, tmp_path, 11, RESUMED + " --max_steps 4", launcher.tiny)
    launcher.finish(argv, 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert launcher.start([*argv, "--learning_rate", "1e-3"], 2) == [2, 2]
    for process in (0, 1):
        assert "--learning_rate was 0.02 and is 0.001" in launcher.log(process)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(("then", "now"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_another_number_of_processes_resumes_with_a_warning(then, now, launcher, tmp_path):
    argv = argv_of(launcher, tmp_path, 12, RESUMED + " --max_steps 4", launcher.tiny)
    launcher.finish(argv, then)
    longer = [*argv, "--max_steps", "8", "--resume_from_checkpoint", "auto"]
    launcher.finish(longer, now)
    assert f"was written with {2 * then} rows per step by {then} processes, and" in launcher.log(0)
    losses = [entry["loss"] for entry in log_of(tmp_path) if "loss" in entry]
    assert len(losses) == 8


def test_a_failing_process_does_not_leave_the_other_waiting(launcher, tmp_path):
    argv = argv_of(launcher, tmp_path, 11, RESUMED, launcher.tiny)
    statuses = launcher.start(argv, 2, fail={"process": 1, "step": 7})
    assert statuses == [6, 70], launcher.log(0)
    assert "made for a test" in launcher.log(1)
    assert "main.py: process 0: another process ended first" in launcher.log(0)
    assert "Traceback" not in launcher.log(0)
    assert (tmp_path / "checkpoint-4").is_dir()


def test_what_is_said_is_said_once(launcher, tmp_path):
    argv = argv_of(launcher, tmp_path, 11, RESUMED, launcher.tiny)
    missing = [*argv, "--response_column", "answers"]
    assert launcher.start(missing, 2) == [2, 2]
    assert "Training rows" not in launcher.log(1)
    assert "main.py: process 1: --train_file" in launcher.log(1)


@pytest.mark.slow
def test_torchrun_itself_passes_an_end_on(launcher, tmp_path):
    argv = argv_of(launcher, tmp_path, 11, RESUMED, launcher.tiny)
    argv[argv.index("--max_steps") + 1] = "4000"
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2 main.py".split()
    process = subprocess.Popen(
        [sys.executable, *launch, *argv],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PTUNING_CACHE": f"{launcher.folder}/cache"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "  loss " in line:
            process.send_signal(signal.SIGINT)
            break
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "stopped after a complete step" in output, output
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("checkpoint-")]
