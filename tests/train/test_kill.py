"""A run killed at random moments, while it saves too, ends with the bits of one left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_base, rows, write_rows

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
TIMES = ("runtime", "per_second")
# 30 rows in batches of 4 are 8 steps an epoch, so that every run crosses two of their ends.
COMMON = "--max_source_length 32 --max_target_length 12 --pre_seq_len 4 --learning_rate 2e-2"
SCENARIOS = {
    "short": "--max_steps 6 --save_steps 2 --logging_steps 1 --per_device_train_batch_size 4",
    "best of steps": (
        "--max_steps 20 --save_steps 3 --logging_steps 2 --eval_strategy steps --eval_steps 3 "
        "--load_best_model_at_end true --save_total_limit 1 --per_device_train_batch_size 4"
    ),
    "grouped by length": (
        "--max_steps 14 --save_steps 2 --logging_steps 5 --gradient_accumulation_steps 2 "
        "--train_sampling_strategy group_by_length --per_device_train_batch_size 2 "
        "--save_total_limit 2 --logging_first_step true"
    ),
    "epochs, stopped early": (
        "--num_train_epochs 6 --save_strategy epoch --eval_strategy epoch --logging_strategy epoch "
        "--load_best_model_at_end true --early_stopping_patience 2 --learning_rate 1000 "
        "--lr_scheduler_type constant --per_device_train_batch_size 4"
    ),
}
KILLS = {"short": 3, "best of steps": 8, "grouped by length": 6, "epochs, stopped early": 6}


class Runs:
    """Runs of main.py in forked processes, on the same rows and base."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        self.base = make_base(folder / "base")
        write_rows(folder / "train.json", rows(30))
        write_rows(folder / "dev.json", rows(40)[30:])
        self.environment = {**ENVIRONMENT, "PTUNING_CACHE": str(folder / "cache")}
        self.forker = subprocess.Popen(
            [sys.executable, "-m", "tests.train.killing"],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.forker.stdout is not None
        assert self.forker.stdout.readline() == "ready\n"

    def argv(self, out: Path, scenario: str) -> list[str]:
        files = f"--train_file {self.folder}/train.json --validation_file {self.folder}/dev.json"
        flags = f"--do_train --model_name_or_path {self.base} --output_dir {out} {files} {COMMON}"
        return f"{flags} {SCENARIOS[scenario]} --disable_tqdm true --use_cpu true".split()

    def start(
        self,
        argv: list[str],
        *,
        after_s: float | None = None,
        at_operation: int | None = None,
    ) -> dict[str, Any]:
        log = self.folder / "log"
        request = {"argv": argv, "log": str(log), "after_s": after_s, "at_operation": at_operation}
        assert self.forker.stdin is not None
        assert self.forker.stdout is not None
        self.forker.stdin.write(json.dumps(request) + "\n")
        self.forker.stdin.flush()
        answer = json.loads(self.forker.stdout.readline())
        assert answer["status"] in (0, -signal.SIGKILL), log.read_text("utf-8")[-3000:]
        return answer

    def whole(self, scenario: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what a run that nobody disturbs leaves, and how long it took."""
        if scenario not in self.known:
            out = self.folder / f"whole-{len(scenario)}"
            answer = self.start(self.argv(out, scenario))
            self.known[scenario] = result_of(out), answer
        return self.known[scenario]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("kill"))
    yield made
    assert made.forker.stdin is not None
    made.forker.stdin.close()
    made.forker.wait(timeout=10)


def without_times(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if not k.endswith(TIMES)}


def result_of(out: Path) -> dict[str, Any]:
    """Everything that a finished run leaves, but times and the folder's own name."""
    checkpoints = [p for p in out.iterdir() if p.name.startswith("checkpoint-")]
    last = max(checkpoints, key=lambda folder: int(folder.name.partition("-")[2]))
    state = json.loads((out / "trainer_state.json").read_text("utf-8"))
    best = state.pop("best_model_checkpoint")
    log = [without_times(entry) for entry in state.pop("log_history")]
    weights = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for folder in (out, last)
        for path in [folder / "prefix.safetensors"]
    }
    return {
        "last": last.name,
        "weights": weights,
        "optimizer": torch.load(last / "optimizer.pt"),
        "scheduler": torch.load(last / "scheduler.pt"),
        "random": torch.load(last / "rng_state.pth", weights_only=False),
        "run state": json.loads((last / "run_state_0.json").read_text("utf-8")),
        "best": best and Path(best).name,
        "log": log,
        "state": state,
        "leftovers": [path.name for path in out.iterdir() if path.name.startswith(".")],
    }


def assert_same(found: Any, wanted: Any, where: str = "") -> None:
    """Compare bit for bit, and say where they differ."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            assert_same(found[key], wanted[key], f"{where}/{key}")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), where
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_same(one, other, f"{where}/{index}")
    elif torch.is_tensor(wanted):
        assert found.dtype == wanted.dtype, where
        assert torch.equal(found, wanted), where
    else:
        same = found == wanted
        assert same if isinstance(same, bool) else same.all(), f"{where}: {found} is not {wanted}"


@pytest.mark.parametrize(
    "scenario",
    ["short", *(pytest.param(name, marks=pytest.mark.slow) for name in KILLS if name != "short")],
)
def test_a_killed_run_ends_as_one_left_alone(scenario, runs):
    wanted, whole = runs.whole(scenario)
    draw = random.Random(f"kill {scenario}")
    out = runs.folder / f"killed-{len(scenario)}"
    argv = runs.argv(out, scenario)
    kills = finished = 0
    while kills < KILLS[scenario]:
        if kills % 2:
            answer = runs.start(argv, at_operation=draw.randint(1, whole["operations"] // 2))
        else:
            answer = runs.start(argv, after_s=draw.uniform(0.2, 0.8) * whole["seconds"])
        if answer["status"] == 0:  # it was faster than its killer
            assert_same(result_of(out), wanted)
            shutil.rmtree(out)
            finished += 1
            assert finished < 30, "the runs end before they can be killed"
        else:
            kills += 1
    assert runs.start(argv)["status"] == 0
    assert_same(result_of(out), wanted)


@pytest.mark.slow
def test_the_run_that_stops_early_does(runs):
    wanted, _ = runs.whole("epochs, stopped early")
    assert wanted["state"]["global_step"] < wanted["state"]["max_steps"]


@pytest.mark.slow
def test_a_run_killed_all_through_its_first_save_goes_on(runs):
    wanted, whole = runs.whole("best of steps")
    out = runs.folder / "each"
    argv = [*runs.argv(out, "best of steps"), "--resume_from_checkpoint", "auto"]
    for operation in range(3, 24, 4):
        assert runs.start(argv, at_operation=operation)["status"] == -signal.SIGKILL
    assert runs.start(argv)["status"] == 0
    assert_same(result_of(out), wanted)
    assert whole["operations"] > 60


@pytest.mark.slow
def test_a_real_process_told_to_stop_saves_first(runs):
    scenario = "grouped by length"
    wanted, _ = runs.whole(scenario)
    out = runs.folder / "told"
    argv = runs.argv(out, scenario)
    process = subprocess.Popen(
        [sys.executable, "main.py", *argv],
        cwd=ROOT,
        env=runs.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "  loss " in line:
            process.send_signal(signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "type the same command again" in errors
    assert "Traceback" not in errors
    stopped_at = [p.name for p in out.iterdir() if p.name.startswith("checkpoint-")]
    assert stopped_at
    assert "checkpoint-14" not in stopped_at
    assert runs.start(argv)["status"] == 0
    assert_same(result_of(out), wanted)
