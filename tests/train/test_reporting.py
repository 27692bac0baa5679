"""--report_to and --push_to_hub: refused in one line before anything is loaded, or they work."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from transformers.integrations import integration_utils

from ptuning.train.progress import PACKAGES, check_push_to_hub, check_reporting

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def without_reporters(monkeypatch):
    monkeypatch.setattr("ptuning.train.progress.find_spec", lambda _name: None)


@pytest.mark.parametrize("value", [None, "none", "all", [], ["none"], ["all"]])
def test_asking_for_nothing_or_for_whatever_is_there_needs_nothing(value, without_reporters):
    check_reporting(value)


@pytest.mark.parametrize(
    ("value", "packages"),
    [
        ("wandb", "wandb"),
        ("comet_ml", "comet-ml"),
        (["swanlab", "tensorboard"], "swanlab tensorboard"),
        ("dagshub", "dagshub mlflow"),
    ],
)
def test_a_missing_package_is_named_with_what_to_type(value, packages, without_reporters):
    with pytest.raises(ValueError, match="not installed here") as caught:
        check_reporting(value)
    assert str(caught.value).endswith(f"type: {sys.executable} -m pip install {packages}")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="--report_to is wandbb; use none") as caught:
        check_reporting(["wandbb", "tensorboard"])
    assert "wandb, " not in str(caught.value).split(";")[0]
    assert "swanlab" in str(caught.value)


def test_every_name_that_transformers_knows_is_known():
    assert set(integration_utils.INTEGRATION_TO_CALLBACK) <= set(PACKAGES)


def test_a_folder_of_offline_runs_is_no_package(tmp_path, monkeypatch):
    """wandb leaves ./wandb, which Python takes for a package without code."""
    (tmp_path / "wandb_of_a_test" / "offline-run").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PACKAGES, "wandb", {"wandb_of_a_test": "wandb"})
    with pytest.raises(ValueError, match="pip install wandb"):
        check_reporting("wandb")


# ---- --push_to_hub ----


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_pushing_offline_is_refused(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set: unset it"):
        check_push_to_hub("output/run", {"hub_token": "hf_x"})


def test_pushing_needs_a_token(online, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="hf auth login"):
        check_push_to_hub("output/run", {})


@pytest.mark.parametrize(
    ("error", "needed"),
    [
        (HTTPError("Name or service not known"), "cannot be reached (Name or service not known)"),
        (OSError("no route"), "cannot be reached (no route)"),
        (HFValidationError("Repo id must be ..."), "refuses the repository run: Repo id must be"),
    ],
)
def test_a_hub_that_fails_is_told_in_one_line(error, needed, online, monkeypatch):
    def fails(*_args, **_options):
        raise error

    monkeypatch.setattr(HfApi, "create_repo", fails)
    with pytest.raises(ValueError, match="--push_to_hub: ") as caught:
        check_push_to_hub("output/run", {"hub_token": "hf_x"})
    assert needed in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_token_without_the_right_is_told_as_such(online, monkeypatch):
    client = importlib.import_module(HTTPError.__module__.partition(".")[0])  # httpx, or httpx2

    def forbidden(*_args, **_options):
        response = client.Response(403, request=client.Request("POST", "https://huggingface.co"))
        raise RepositoryNotFoundError("403 Forbidden: no rights\nmore", response=response)

    monkeypatch.setattr(HfApi, "create_repo", forbidden)
    with pytest.raises(ValueError, match="refuses the repository me/run: 403 Forbidden") as caught:
        check_push_to_hub("output/run", {"hub_model_id": "me/run", "hub_token": "hf_x"})
    assert "more" not in str(caught.value)


def test_the_repository_is_made_as_transformers_would(online, monkeypatch):
    made = []
    monkeypatch.setattr(
        HfApi, "create_repo", lambda _api, name, **options: made.append((name, options))
    )
    check_push_to_hub("output/run", {"hub_token": "hf_x", "hub_private_repo": True})
    assert made == [("run", {"token": "hf_x", "private": True, "exist_ok": True})]


# ---- In a run ----


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        (["--report_to", "wandb"], "-m pip install wandb"),
        (["--report_to", "wandbb"], "--report_to is wandbb; use none"),
        (["--push_to_hub"], "--push_to_hub needs"),
    ],
)
def test_a_run_that_cannot_report_does_not_start(
    flags, needed, short_run, without_reporters, monkeypatch, capsys
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "ptuning.train.tuning.load_base", lambda *_a, **_o: pytest.fail("was loaded")
    )
    assert short_run.start(*flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("main.py: ")
    assert needed in error
    assert len(error.splitlines()) == 1
    assert not short_run.out.exists()


STUB = '''
"""Records the calls of transformers' callback for this package."""
import json, os, types

def note(*what):
    with open(os.environ["CALLS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(what, default=str) + "\\n")

class Config(dict):
    def update(self, values, **options):
        note("config", sorted(values))

class Run:
    id = name = url = "stub"
    summary = {}
    def _label(self, **options): pass

config, run = Config(), None

def init(**options):
    global run
    run = Run()
    note("init", options.get("project"))
    return run

def get_run():
    return run

def define_metric(*args, **options): pass
def termwarn(*args, **options): pass
def log(values, **options): note("log", values)
def finish(): note("finish")
'''


def run_with(short_run, name, environment, *more):
    flags = short_run.flags("--report_to", name, "--logging_steps", "2", *more)
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *flags],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_run_reports_to_a_package_that_is_there(name, short_run, tmp_path):
    """With a stand-in for the package; transformers' own callback calls it."""
    packages, calls = tmp_path / "packages", tmp_path / "calls"
    (packages / name / "sdk" / "lib").mkdir(parents=True)
    (packages / name / "__init__.py").write_text(STUB, encoding="utf-8")
    error = packages / name / "sdk" / "lib" / "config_util.py"
    error.write_text("class ConfigError(Exception): pass\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(packages), "CALLS": str(calls)}
    done = run_with(short_run, name, environment)
    assert done.returncode == 0, done.stderr
    assert "{'" not in done.stdout
    made = [json.loads(line) for line in calls.read_text("utf-8").splitlines()]
    assert made[0][0] == "init"
    losses = [values for kind, values in made if kind == "log" and "train/loss" in values]
    assert len(losses) == 3


@pytest.mark.parametrize(
    ("name", "environment", "left"),
    [
        ("wandb", {"WANDB_MODE": "offline"}, "wandb"),
        ("swanlab", {"SWANLAB_MODE": "offline"}, "swanlog"),
        ("mlflow", {}, "mlruns"),
    ],
)
def test_a_real_package_works_offline(name, environment, left, short_run, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.chdir(short_run.folder)
    environment = {
        **os.environ,
        **environment,
        "WANDB_DIR": str(short_run.folder),
        "MLFLOW_TRACKING_URI": (short_run.folder / "mlruns").as_uri(),
        "SWANLAB_LOG_DIR": str(short_run.folder / "swanlog"),
    }
    done = run_with(short_run, name, environment)
    assert done.returncode == 0, done.stderr
    assert any((short_run.folder / left).iterdir())


def test_tensorboard_gets_the_losses(short_run, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(short_run.folder / "board"))
    assert short_run.start("--report_to", "tensorboard") == 0
    assert any((short_run.folder / "board").glob("events.*"))
