"""The shell around the project: which Python, which paths, which flags, and what is said when it cannot go on."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*ROOT.glob("*.sh"), *(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"])
BASH = shutil.which("bash") or "bash"

# Stands for a Python with everything: prints what main.py is given; STUB_CUDA is what environment.py says of CUDA.
STUB = f"""#!/usr/bin/env bash
case "$*" in
  main.py*) printf '%s\\n' "$@"; exit "${{STUB_EXIT:-0}}" ;;
  *environment.py\\ cuda) printf '%s\n' "${{STUB_CUDA:-1 a device}}" ;;
  *) exec "{sys.executable}" "$@" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the scripts and what they read, so that a test can write beside them."""
    root = tmp_path / "checkout"
    shutil.copytree(
        ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__")
    )
    for file in [*ROOT.glob("*.sh"), *ROOT.glob("*.lock"), ROOT / "pyproject.toml"]:
        shutil.copy(file, root)
    python = tmp_path / "python"
    python.write_text(STUB, encoding="utf-8")
    python.chmod(0o755)
    return root


def run(
    script: Path, *arguments: str, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script with the stub as PYTHON and nothing of this session's settings."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    stub = str(script.parents[1] / "python")
    return subprocess.run(
        [BASH, str(script), *arguments],
        cwd=cwd or script.parent,
        env={**kept, "PYTHON": stub, **variables},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=60,
    )


def flags(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return what main.py was given as {flag: value}; a switch has the value "" and the last one wins."""
    assert result.returncode == 0, result.stderr
    words = result.stdout.splitlines()
    assert words[0] == "main.py"
    pairs = zip(words, [*words[1:], "--"], strict=True)
    return {
        word: "" if value.startswith("--") else value
        for word, value in pairs
        if word.startswith("--")
    }


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that a script which does nothing else ends with."""
    assert result.returncode == 2, result.stderr
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    return line


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_prefix(folder: Path, base: str, age_s: int) -> Path:
    folder.mkdir(parents=True)
    config = folder / "prefix_config.json"
    config.write_text(f'{{"base_model_name_or_path": "{base}"}}', encoding="utf-8")
    os.utime(config, (1_700_000_000 - age_s,) * 2)
    return folder


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_script_parses_and_stops_at_the_first_failure(script: Path) -> None:
    result = subprocess.run([BASH, "-n", str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    if script.name not in {"setup.sh", "settings.sh"}:  # sourced by the others
        assert "set -euo pipefail" in script.read_text(encoding="utf-8")


# train.sh


def test_training_with_cuda_takes_the_published_settings(checkout: Path) -> None:
    given = flags(run(checkout / "train.sh"))
    expected = {
        "--model_name_or_path": "THUDM/chatglm-6b",
        "--pre_seq_len": "128",
        "--learning_rate": "2e-2",
        "--max_source_length": "64",
        "--max_target_length": "64",
        "--per_device_train_batch_size": "1",
        "--gradient_accumulation_steps": "16",
        "--max_steps": "3000",
        "--save_steps": "1000",
        "--logging_steps": "10",
        "--output_dir": "output/adgen-chatglm-6b-pt-128-2e-2",
        "--train_file": "AdvertiseGen/sample/train.json",
        "--test_file": "AdvertiseGen/sample/dev.json",
        "--do_train": "",
        "--do_predict": "",
    }
    assert {name: given.get(name) for name in expected} == expected
    assert not {"--quantization_bit", "--prompt_column", "--response_column"} & given.keys()
    assert "--history_column" not in given


def test_training_without_cuda_takes_the_embedded_model_and_says_so(checkout: Path) -> None:
    result = run(checkout / "train.sh", STUB_CUDA="0 No CUDA device for torch 2.13.0")
    assert flags(result)["--model_name_or_path"] == "ptuning/nano/weights"
    assert flags(result)["--output_dir"].startswith("output/adgen-nano-pt-")
    data, line = result.stderr.splitlines()
    assert data == "Data: AdvertiseGen/sample/train.json"
    assert line.startswith("No CUDA device for torch 2.13.0: training the embedded nano model.")
    assert "MODEL=THUDM/chatglm-6b bash train.sh" in line
    for words in (["--use_cpu"], ["--no-cuda", "true"], ["--use_cpu=True", "--seed", "7"]):
        result = run(checkout / "train.sh", *words)  # the stub has a device
        assert flags(result)["--model_name_or_path"] == "ptuning/nano/weights"
        flag = words[0].partition("=")[0].replace("-c", "_c")
        assert f"{flag}: training the embedded nano model." in result.stderr
        assert words[0] in result.stdout
    given = flags(run(checkout / "train.sh", "--use_cpu", "false"))
    assert given["--model_name_or_path"] == "THUDM/chatglm-6b"


def test_every_value_can_be_given_and_further_flags_are_passed_on(checkout: Path) -> None:
    given = flags(
        run(
            checkout / "train.sh", "--seed", "7", "--learning_rate", "3e-3", MODEL="nano", PRE_SEQ_LEN="8", LR="1e-4",
            MAX_STEPS="5", QUANTIZATION_BIT="4", HISTORY_COLUMN="turns", NAME="mine",
        )
    )  # fmt: skip
    assert given["--model_name_or_path"] == "ptuning/nano/weights"
    assert given["--pre_seq_len"] == "8"
    assert given["--max_steps"] == "5"
    assert given["--quantization_bit"] == "4"
    assert given["--history_column"] == "turns"
    assert given["--seed"] == "7"
    assert given["--learning_rate"] == "3e-3", "a flag after the script's own wins"
    assert given["--output_dir"] == "output/mine-pt-8-3e-3"
    assert "--overwrite_output_dir" not in given, "main.py resumes, or refuses another run's folder"


def test_a_preset_sets_the_rate_from_either_place_and_a_typed_rate_wins(checkout: Path) -> None:
    for words, variables in (
        ([], {"PRESET": "gentle"}),
        (["--preset", "gentle"], {}),
        (["--preset=gentle"], {}),
    ):
        given = flags(run(checkout / "train.sh", *words, MODEL="nano", **variables))
        assert given["--learning_rate"] == "1e-3"
        assert given["--output_dir"] == "output/adgen-nano-pt-128-1e-3"
    assert given["--preset"] == "gentle"
    assert (
        flags(run(checkout / "train.sh", LR="5e-3", PRESET="gentle"))["--learning_rate"] == "5e-3"
    )
    assert flags(run(checkout / "train.sh", PRESET="task"))["--learning_rate"] == "2e-2"
    lima = flags(run(checkout / "train.sh", PRESET="lima"))
    assert (lima["--learning_rate"], "--max_steps" in lima) == ("2e-2", False), "15 epochs"
    assert flags(run(checkout / "train.sh", PRESET="lima", MAX_STEPS="9"))["--max_steps"] == "9"
    assert "--save_steps" not in lima, "a checkpoint for each epoch"
    assert flags(run(checkout / "train.sh", PRESET="lima", SAVE_STEPS="9"))["--save_steps"] == "9"
    touch(checkout, "a.json", "b.json")
    chat = {"TRAIN_FILE": "a.json", "DEV_FILE": "b.json"}
    assert flags(run(checkout / "train_chat.sh", **chat))["--learning_rate"] == "1e-2"
    assert (
        flags(run(checkout / "train_chat.sh", PRESET="gentle", **chat))["--learning_rate"] == "1e-3"
    )
    assert (
        flags(run(checkout / "train_chat.sh", "--preset=gentle", **chat))["--learning_rate"]
        == "1e-3"
    )
    assert (
        flags(run(checkout / "train_chat.sh", "--tuning", "lora", MODEL="nano", **chat))[
            "--learning_rate"
        ]
        == "1e-2"
    )
    assert flags(run(checkout / "train_chat.sh", TUNING="lora", **chat))["--learning_rate"] == (
        "2e-4"
    )
    assert "PRESET=soft: use task" in refusal(run(checkout / "train.sh", PRESET="soft"))
    assert "--preset soft: use task" in refusal(run(checkout / "train.sh", "--preset", "soft"))


def test_real_data_is_preferred_to_the_sample(checkout: Path) -> None:
    (checkout / "AdvertiseGen").mkdir()
    (checkout / "AdvertiseGen" / "train.json").touch()
    assert flags(run(checkout / "train.sh"))["--train_file"] == "AdvertiseGen/sample/train.json", (
        "dev.json is missing"
    )
    (checkout / "AdvertiseGen" / "dev.json").touch()
    assert flags(run(checkout / "train.sh"))["--train_file"] == "AdvertiseGen/train.json"
    assert flags(run(checkout / "train.sh"))["--validation_file"] == "AdvertiseGen/dev.json"


def test_paths_are_seen_from_the_folder_the_command_was_typed_in(
    checkout: Path, tmp_path: Path
) -> None:
    here = tmp_path / "my work"
    touch(here, "base/config.json", "base/pytorch_model.bin", "rows.json")
    touch(checkout, "data/dev.json")
    given = flags(
        run(checkout / "train.sh", cwd=here, MODEL="base", TRAIN_FILE="rows.json", DEV_FILE="data/dev.json",
            OUTPUT_DIR="out", PYTHON="../python")
    )  # fmt: skip
    assert given["--model_name_or_path"] == f"{here}/base"
    assert given["--train_file"] == f"{here}/rows.json"
    assert given["--validation_file"] == "data/dev.json", "not there, so seen from the repository"
    assert given["--output_dir"] == f"{here}/out"
    assert flags(run(checkout / "train.sh", cwd=here, MODEL="THUDM/chatglm-6b"))[
        "--model_name_or_path"
    ] == ("THUDM/chatglm-6b")


def test_status_of_python_is_passed_on(checkout: Path) -> None:
    assert run(checkout / "train.sh", STUB_EXIT="130").returncode == 130


def test_own_training_rows_need_own_rows_to_score_on(checkout: Path) -> None:
    line = refusal(run(checkout / "train.sh", TRAIN_FILE="rows.json"))
    assert line.startswith("TRAIN_FILE=rows.json without DEV_FILE;")
    line = refusal(run(checkout / "train.sh", "--train_file", "rows.json"))
    assert line.startswith("--train_file rows.json without DEV_FILE;")


def test_chat_training_has_its_own_lengths_and_rate(checkout: Path) -> None:
    touch(checkout, "a.json", "b.json")
    given = flags(
        run(
            checkout / "train_chat.sh",
            "--seed",
            "7",
            TRAIN_FILE="a.json",
            DEV_FILE="b.json",
            LR="5e-3",
        )
    )
    assert given["--train_file"] == "a.json"
    assert given["--validation_file"] == "b.json"
    assert "--history_column" not in given, "it is found, as every other column"
    assert given["--max_source_length"] == given["--max_target_length"] == "256"
    assert given["--learning_rate"] == "5e-3"
    assert given["--seed"] == "7"


def test_a_pattern_names_several_files(checkout: Path) -> None:
    touch(checkout, "my/part-1.jsonl", "my/part-2.jsonl", "b.json")
    given = flags(run(checkout / "train.sh", TRAIN_FILE="my/*.jsonl", DEV_FILE="b.json"))
    assert given["--train_file"] == "my/*.jsonl"
    assert given["--output_dir"].startswith("output/my-chatglm-6b-")
    given = flags(
        run(
            checkout / "train.sh",
            *("--train_file", "*.jsonl", "--validation_file", "b.json"),
            cwd=checkout / "my",
        )
    )
    assert given["--train_file"] == f"{checkout}/my/*.jsonl"
    line = refusal(run(checkout / "train.sh", TRAIN_FILE="my/*.csv", DEV_FILE="b.json"))
    assert line.startswith("TRAIN_FILE=my/*.csv: no such file")
    words = ("--train_file", "my/part-1.jsonl", "my/part-2.jsonl", "--seed", "7")
    line = refusal(run(checkout / "train.sh", *words, DEV_FILE="b.json"))
    assert line.startswith(
        "my/part-2.jsonl is one file too many here; for several, quote a pattern"
    )


def test_chat_training_without_data_says_what_to_type(checkout: Path) -> None:
    result = run(checkout / "train_chat.sh")
    assert result.returncode == 2
    assert "TRAIN_FILE=chat/train.json DEV_FILE=chat/dev.json" in result.stderr


@pytest.mark.parametrize(
    ("tuning", "rate", "folder"),
    [("lora", "2e-4", "adgen-chatglm-6b-lora-2e-4"), ("full", "1e-4", "adgen-chatglm-6b-ft-1e-4")],
)
def test_other_ways_of_tuning_have_their_rate_and_folder(
    checkout: Path, tuning: str, rate: str, folder: str
) -> None:
    given = flags(run(checkout / "train.sh", TUNING=tuning))
    assert given["--tuning"] == tuning
    assert given["--learning_rate"] == rate
    assert given["--output_dir"] == f"output/{folder}"
    assert "--pre_seq_len" not in given
    typed = flags(run(checkout / "train.sh", "--tuning", tuning, TUNING="ptuning"))
    assert typed == given, "a flag beats the variable, and the defaults follow it"
    line = refusal(run(checkout / "train.sh", TUNING="qlora"))
    assert line.startswith("TUNING=qlora: use ptuning")


def test_several_gpus_share_the_rows_of_a_step(checkout: Path, tmp_path: Path) -> None:
    (checkout / "output" / "run").mkdir(parents=True)
    (checkout / "output" / "run" / "prefix_config.json").write_text("{}", encoding="utf-8")
    body = 'case "$*" in *distributed*) printf "%s\\n" "$@"; echo visible=${CUDA_VISIBLE_DEVICES-all} ;; *"environment.py cuda") echo 4 ;; *scripts/environment*|*sys.version*) ;; esac'
    python = write_command(tmp_path / "many", body)
    launch = "-m torch.distributed.run --standalone --nproc_per_node 4 main.py".split()
    trained = run(checkout / "train.sh", PYTHON=python, NUM_GPUS="4").stdout.split()
    assert trained[: len(launch)] == launch
    assert trained[trained.index("--gradient_accumulation_steps") + 1] == "4"  # 16 rows, as alone
    assert trained[-1] == "visible=all"
    variables = {"NUM_GPUS": "4", "PREFIX": "output/run", "MODEL": "a/b"}
    assert run(checkout / "evaluate.sh", PYTHON=python, **variables).stdout.split()[:6] == launch
    for wrong in ("two", "0"):
        refused = run(checkout / "train.sh", NUM_GPUS=wrong)
        assert f"NUM_GPUS is {wrong}" in refused.stderr
        assert refused.returncode == 2


def test_deepspeed_starts_one_process_per_gpu_with_the_published_settings(
    checkout: Path, tmp_path: Path
) -> None:
    body = 'case "$*" in *"environment.py cuda") echo 4 CUDA ;; *find_spec*|*scripts/environment*|*sys.version*) exit ;; *) printf "%s\\n" "$@" ;; esac'
    python = write_command(
        tmp_path / "all-there",
        f'{body}\ncase "$*" in *distributed*) echo visible=${{CUDA_VISIBLE_DEVICES-all}} ;; esac',
    )
    result = run(checkout / "ds_train_finetune.sh", "--seed", "7", PYTHON=python)
    assert result.returncode == 0, result.stderr
    given = result.stdout.split()
    start = given.index("torch.distributed.run")
    assert given[start : start + 5] == [
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "4",
        "main.py",
    ]
    pairs = dict(pairwise(given))
    assert pairs["--deepspeed"] == "deepspeed.json"
    assert pairs["--tuning"] == "full"
    assert pairs["--learning_rate"] == "1e-4"
    assert pairs["--max_steps"] == "5000"
    assert pairs["--output_dir"] == "output/adgen-chatglm-6b-ft-1e-4"
    assert "--fp16" in given
    assert "--overwrite_output_dir" not in given
    assert given[-3:] == ["--seed", "7", "visible=all"]
    words = "--bf16 --num_train_epochs 3 --learning_rate 5e-5 --output_dir mine".split()
    given = run(checkout / "ds_train_finetune.sh", *words, PYTHON=python, LR="1e-5").stdout.split()
    pairs = dict(pairwise(given))
    assert "--fp16" not in given, "main.py refuses both"
    assert "--max_steps" not in given
    assert (pairs["--num_train_epochs"], pairs["--learning_rate"]) == ("3", "5e-5")
    assert given.count("--output_dir") == 1
    touch(checkout, "my/rows.json")
    given = run(checkout / "ds_train_finetune.sh", PYTHON=python, TRAIN_FILE="my/rows.json")
    assert "output/rows-chatglm-6b-ft-1e-4" in given.stdout.split()


def test_deepspeed_without_a_gpu_names_what_trains_on_a_cpu(checkout: Path, tmp_path: Path) -> None:
    python = write_command(
        tmp_path / "cpu",
        'case "$*" in *"environment.py cuda") echo 0 No CUDA device for torch 2.13.0 ;; esac',
    )
    result = run(checkout / "ds_train_finetune.sh", PYTHON=python)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "No CUDA device for torch 2.13.0. The whole model on a CPU: TUNING=full bash train.sh"
    )


def test_deepspeed_that_is_missing_is_named(checkout: Path, tmp_path: Path) -> None:
    body = 'case "$*" in *find_spec*) exit 1 ;; esac'
    python = write_command(tmp_path / "lacking", body)
    result = run(checkout / "ds_train_finetune.sh", PYTHON=python, NUM_GPUS="4")
    assert result.returncode == 1
    assert "pip install deepspeed" in result.stderr


def test_a_run_ends_by_epochs_or_by_steps(checkout: Path) -> None:
    for words, variables, steps, epochs in (
        ([], {"EPOCHS": "0.5"}, None, "0.5"),
        (["--num_train_epochs", "3"], {}, None, "3"),
        (["--num-train-epochs=3"], {"MAX_STEPS": "50"}, None, "3"),
        (["--max_steps", "50"], {"EPOCHS": "3"}, "50", None),
        (["--max_steps", "50", "--num_train_epochs", "3"], {}, "50", None),
        (["--max_steps", "-1", "--num_train_epochs", "2"], {}, None, "2"),
        (["--max_steps", "-1"], {}, None, "3"),
        ([], {"MAX_STEPS": "-1"}, None, "3"),
        (["--max_steps", "5", "--max_steps=6"], {}, "6", None),
        ([], {}, "400", None),
    ):
        given = flags(run(checkout / "train.sh", *words, MODEL="nano", **variables))
        assert given.get("--max_steps") == steps, (words, variables)
        assert given.get("--num_train_epochs") == epochs, (words, variables)
    line = refusal(run(checkout / "train.sh", MAX_STEPS="50", EPOCHS="3"))
    assert line.startswith("MAX_STEPS=50 and EPOCHS=3 are both set;")


@pytest.mark.parametrize("script", ["train.sh", "ds_train_finetune.sh"])
def test_numbers_are_refused_before_a_python_is_chosen(checkout: Path, script: str) -> None:
    for name, value in (
        ("MAX_STEPS", "0"), ("MAX_STEPS", "abc"), ("MAX_STEPS", "1.5"), ("MAX_STEPS", "-2"),
        ("EPOCHS", "0"), ("EPOCHS", "0.00"), ("EPOCHS", "."), ("EPOCHS", "-1"), ("LR", "2e"),
        ("LR", "0e-2"), ("BATCH_SIZE", "0"), ("NUM_GPUS", "two"), ("NUM_GPUS", "0"),
    ):  # fmt: skip
        line = refusal(run(checkout / script, PYTHON="/no/such/python", **{name: value}))
        assert line.startswith(f"{name} is {value}; give a "), line
    for name, value in (("LR", ".5"), ("LR", "1.0e-05"), ("LR", "10"), ("SAVE_STEPS", "0.25")):
        assert value in flags(run(checkout / "train.sh", MODEL="nano", **{name: value})).values()


def test_flags_that_a_variable_stands_for_set_it(checkout: Path) -> None:
    touch(checkout, "my/train.json", "my/dev.json")
    result = run(
        checkout / "train.sh", "--model-name-or-path", "nano", "--pre_seq_len=8",
        "--learning_rate", "1e-4", "--train_file", "my/train.json", "--validation_file",
        "my/dev.json", "--learning_rate=3e-3", "--load_best_model_at_end", "--seed", "7",
    )  # fmt: skip
    given = flags(result)
    assert given["--model_name_or_path"] == "ptuning/nano/weights"
    assert given["--output_dir"] == "output/my-nano-pt-8-3e-3"
    assert given["--test_file"] == "my/dev.json"
    assert given["--max_steps"] == "400", "the embedded model's"
    words = result.stdout.splitlines()
    assert words[-3:] == ["--load_best_model_at_end", "--seed", "7"]
    repeated = [word for word in given if words.count(word) > 1]
    assert not repeated
    given = flags(run(checkout / "train.sh", "--output_dir", "mine", "--overwrite_output_dir"))
    assert given["--output_dir"] == "mine"
    assert "--overwrite_output_dir" in given
    assert run(checkout / "train.sh", "--max_steps").stdout.endswith("\n--max_steps\n")


def test_a_checkpoint_to_start_from_has_its_own_length_and_tuning(
    checkout: Path, tmp_path: Path
) -> None:
    prefix = write_prefix(tmp_path / "prefix", "THUDM/chatglm-6b", age_s=0)
    (prefix / "prefix_config.json").write_text('{\n  "prefix_length": 16,\n}', encoding="utf-8")
    for flag in ("--init_from", "--ptuning_checkpoint"):
        given = flags(run(checkout / "train.sh", flag, str(prefix)))
        assert given[flag] == str(prefix)
        assert "--pre_seq_len" not in given
        assert given["--output_dir"] == "output/adgen-chatglm-6b-pt-16-2e-2"
    given = flags(run(checkout / "train.sh", "--init_from", str(prefix), PRE_SEQ_LEN="16"))
    assert given["--pre_seq_len"] == "16"
    given = flags(run(checkout / "train.sh", "--init_from", "old/pytorch_model.bin"))
    assert "--pre_seq_len" not in given
    assert given["--output_dir"] == "output/adgen-chatglm-6b-pt-2e-2"
    touch(
        tmp_path, "lora/adapter_config.json", "lora/tuning_config.json", "full/tuning_config.json"
    )
    for tuning, folder in (("lora", "lora-2e-4"), ("full", "ft-1e-4")):
        given = flags(run(checkout / "train.sh", "--init_from", str(tmp_path / tuning)))
        assert given["--tuning"] == tuning
        assert given["--output_dir"] == f"output/adgen-chatglm-6b-{folder}"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("my/train.json", "my"), ("my/reviews.v2.jsonl", "reviews.v2"), ("my/Dataset.csv", "my"),
        ("评论 数据/训练.json", "训练"), ("评论 数据/train.json", "评论-数据"),
        ("my/a (b)&c$.json", "a-b-c"), ("v1.5/rows", "rows"), ("data/train.json", None),
    ],
)  # fmt: skip
def test_a_run_on_own_data_is_named_after_it(checkout: Path, file: str, name: str | None) -> None:
    touch(checkout, file, "dev.json")
    data = {"TRAIN_FILE": file, "DEV_FILE": "dev.json", "MODEL": "nano"}
    result = run(checkout / "train.sh", **data)
    assert flags(result)["--output_dir"] == f"output/{name or 'data'}-nano-pt-128-2e-2"
    assert not result.stderr, "the data is the user's own"
    chat = flags(run(checkout / "train_chat.sh", **data))["--output_dir"]
    assert chat == f"output/{f'{name}-nano' if name else 'chat'}-pt-128-1e-2"
    named = flags(run(checkout / "train.sh", **data, NAME="mine"))
    assert named["--output_dir"] == "output/mine-pt-128-2e-2"


def test_a_run_on_a_file_beside_the_command_is_named_after_the_folder(
    checkout: Path, tmp_path: Path
) -> None:
    touch(tmp_path, "reviews/train.json", "reviews/dev.json")
    data = {"TRAIN_FILE": "train.json", "DEV_FILE": "dev.json", "MODEL": "nano"}
    given = flags(run(checkout / "train.sh", cwd=tmp_path / "reviews", **data))
    assert given["--output_dir"] == "output/reviews-nano-pt-128-2e-2"
    given = flags(run(checkout / "train_chat.sh", cwd=tmp_path / "reviews", **data))
    assert given["--output_dir"] == "output/reviews-nano-pt-128-1e-2"
    assert given["--train_file"] == f"{tmp_path}/reviews/train.json"


def test_paths_that_lead_nowhere_are_refused_in_the_words_typed(
    checkout: Path, tmp_path: Path
) -> None:
    touch(checkout, "there.json", "empty/README.md", "bare/config.json")
    nowhere = {"PYTHON": "/no/such/python"}
    for words, variables, said in (
        ([], {"TRAIN_FILE": "no.json", "DEV_FILE": "there.json"}, "TRAIN_FILE=no.json: no such file"),
        (["--train_file", "no.json"], {"DEV_FILE": "there.json"}, "--train_file no.json: no such"),
        ([], {"TRAIN_FILE": "there.json", "DEV_FILE": "empty"}, "DEV_FILE=empty is a folder"),
        ([], {"MODEL": "empty"}, "MODEL=empty: that folder lacks config.json or weights"),
        ([], {"MODEL": "bare"}, "MODEL=bare: that folder lacks config.json or weights"),
        (["--model_name_or_path=bare"], {}, "--model_name_or_path bare: that folder lacks"),
        ([], {"MODEL": "there.json"}, "MODEL=there.json is not a folder"),
        ([], {"MODEL": "/no/such"}, "MODEL=/no/such is not a folder"),
        ([], {"MODEL": "my/own/model"}, "MODEL=my/own/model is not a folder"),
    ):  # fmt: skip
        assert refusal(run(checkout / "train.sh", *words, **variables, **nowhere)).startswith(said)
    line = refusal(run(checkout / "evaluate.sh", DEV_FILE="no.json", **nowhere))
    assert line.startswith("DEV_FILE=no.json: no such file")
    touch(checkout, "bare/pytorch_model-00001-of-00008.bin")
    assert flags(run(checkout / "train.sh", MODEL="bare"))["--model_name_or_path"] == "bare"


@pytest.mark.parametrize(
    ("script", "variables"),
    [
        ("train.sh", "MODEL TUNING TRAIN_FILE NAME EPOCHS LR MAX_STEPS HISTORY_COLUMN"),
        ("train_chat.sh", "TRAIN_FILE LR MAX_SOURCE_LENGTH"),
        ("ds_train_finetune.sh", "NUM_GPUS DEEPSPEED LR SAVE_TOTAL_LIMIT"),
        ("evaluate.sh", "PREFIX MODEL EVAL_BATCH_SIZE"),
        ("web_demo.sh", "PREFIX MODEL PYTHON"),
    ],
)
def test_help_lists_the_variables_without_a_python(
    checkout: Path, script: str, variables: str
) -> None:
    result = run(checkout / script, "--seed", "7", "--help", PYTHON="/no/such/python", LR="abc")
    assert result.returncode == 0
    assert not result.stderr
    assert f"bash {script}" in result.stdout
    assert "--help" in result.stdout, "where the other flags are listed"
    assert not [name for name in variables.split() if name not in result.stdout.split()]
    assert run(checkout / script, "-h", PYTHON="/no/such/python").stdout == result.stdout


def test_help_gives_each_default(checkout: Path) -> None:
    lines = run(checkout / "train.sh", "--help").stdout.splitlines()
    rows = [line.split(maxsplit=1) for line in lines if line.startswith("  ")]
    table = {name: text for name, text in rows if name.isupper()}
    assert table["SAVE_STEPS"].split() == "200 or 1000 steps between two checkpoints".split()
    assert table["PRE_SEQ_LEN"].startswith("128 ")
    assert table["HISTORY_COLUMN"].startswith("unset ")
    read = (checkout / "train.sh").read_text(encoding="utf-8")
    settings = set(re.findall(r"setting --\w+ ([A-Z_]+)", read))
    assert settings - {"PRESET", "TUNING"} <= set(table)


# evaluate.sh


def test_evaluation_without_a_prefix_says_to_train_first(checkout: Path) -> None:
    result = run(checkout / "evaluate.sh")
    assert result.returncode == 1
    assert "Type: bash train.sh" in result.stderr
    assert not result.stdout


def test_evaluation_takes_the_newest_prefix_and_its_base(checkout: Path) -> None:
    write_prefix(checkout / "output" / "old", "THUDM/chatglm-6b", age_s=100)
    newest = write_prefix(
        checkout / "output" / "new one" / "checkpoint-20", "/models/基座", age_s=0
    )
    result = run(checkout / "evaluate.sh")
    given = flags(result)
    assert (
        given["--ptuning_checkpoint"] == given["--output_dir"] == str(newest.relative_to(checkout))
    )
    assert given["--model_name_or_path"] == "/models/基座"
    assert "--do_train" not in given
    assert "--max_source_length" not in given, "the prefix remembers its own"
    assert "Newest: output/new one/checkpoint-20" in result.stderr


def test_evaluation_takes_an_adapter_or_a_whole_model_too(checkout: Path) -> None:
    write_prefix(checkout / "output" / "old", "THUDM/chatglm-6b", age_s=100)
    newest = checkout / "output" / "lora"
    newest.mkdir()
    (newest / "tuning_config.json").write_text(
        '{"base_model_name_or_path": "/models/base"}', encoding="utf-8"
    )
    given = flags(run(checkout / "evaluate.sh"))
    assert given["--ptuning_checkpoint"] == str(newest.relative_to(checkout))
    assert given["--model_name_or_path"] == "/models/base"
    (newest / "tuning_config.json").rename(newest / "adapter_config.json")  # written by peft alone
    given = flags(run(checkout / "evaluate.sh", PREFIX=str(newest)))
    assert given["--model_name_or_path"] == "/models/base"


def test_evaluation_of_a_named_prefix(checkout: Path, tmp_path: Path) -> None:
    prefix = write_prefix(tmp_path / "there" / "mine", "ptuning/nano/weights", age_s=0)
    given = flags(
        run(checkout / "evaluate.sh", cwd=prefix.parent, PREFIX="mine/", PROMPT_COLUMN="q")
    )
    assert given["--ptuning_checkpoint"] == given["--output_dir"] == str(prefix)
    assert given["--model_name_or_path"] == "ptuning/nano/weights"
    assert given["--prompt_column"] == "q"


def test_evaluation_of_a_published_checkpoint_needs_the_base(
    checkout: Path, tmp_path: Path
) -> None:
    published = tmp_path / "checkpoint-3000"
    published.mkdir()
    result = run(checkout / "evaluate.sh", PREFIX=str(published))
    assert result.returncode == 2
    assert "MODEL=THUDM/chatglm-6b" in result.stderr
    given = flags(run(checkout / "evaluate.sh", PREFIX=str(published), MODEL="THUDM/chatglm-6b"))
    assert given["--model_name_or_path"] == "THUDM/chatglm-6b"
    assert given["--max_source_length"] == given["--max_target_length"] == "64"


def test_evaluation_refuses_a_prefix_that_is_not_there(checkout: Path) -> None:
    result = run(checkout / "evaluate.sh", PREFIX="no/such")
    assert result.returncode == 2
    assert "PREFIX=no/such is not a folder" in result.stderr
    typed = run(checkout / "evaluate.sh", "--ptuning_checkpoint", "no/such")
    assert "--ptuning_checkpoint no/such is not a folder" in typed.stderr


def test_evaluation_names_a_damaged_file(checkout: Path) -> None:
    prefix = write_prefix(checkout / "output" / "run", "THUDM/chatglm-6b", age_s=0)
    about = prefix / "prefix_config.json"
    for text in (about.read_text("utf-8")[:-9], "[]"):
        about.write_text(text, encoding="utf-8")
        result = run(checkout / "evaluate.sh")
        assert result.returncode == 2
        assert "prefix_config.json is damaged" in result.stderr
        assert "Traceback" not in result.stderr


def test_evaluation_of_a_checkpoint_named_by_its_flag_leaves_the_newest_alone(
    checkout: Path,
) -> None:
    write_prefix(checkout / "output" / "newest", "THUDM/chatglm-6b", age_s=0)
    write_prefix(checkout / "output" / "old", "/models/base", age_s=100)
    given = flags(run(checkout / "evaluate.sh", "--ptuning_checkpoint", "output/old"))
    assert given["--ptuning_checkpoint"] == given["--output_dir"] == "output/old"
    assert given["--model_name_or_path"] == "/models/base"


# Which Python


def write_command(path: Path, body: str) -> str:
    path.write_text(f"#!{BASH}\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_given_python_that_lacks_packages_is_refused_and_left_alone(
    checkout: Path, tmp_path: Path
) -> None:
    bare = write_command(tmp_path / "bare", f'exec "{sys.executable}" -I -S "$@"')
    result = run(checkout / "train.sh", PYTHON=bare)
    assert result.returncode == 1
    assert "lacks torch>=2.8 (missing), transformers>=5.10,<6 (missing)" in result.stderr
    assert "-m pip install 'torch>=2.8' 'transformers>=5.10,<6'" in result.stderr
    assert not (checkout / ".venv").exists()


def test_given_python_that_is_too_old_is_refused(checkout: Path, tmp_path: Path) -> None:
    old = write_command(
        tmp_path / "old", 'if [ "$1" = --version ]; then echo "Python 3.8.18"; else exit 1; fi'
    )
    result = run(checkout / "train.sh", PYTHON=old)
    assert result.returncode == 2
    assert "is Python 3.8.18; 3.11 or newer is needed" in result.stderr


def test_given_python_that_is_no_command_is_refused(checkout: Path) -> None:
    result = run(checkout / "train.sh", PYTHON="no/such/python")
    assert result.returncode == 2
    assert "PYTHON=no/such/python is not a command" in result.stderr


def test_a_machine_without_python_is_told_so(checkout: Path, tmp_path: Path) -> None:
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "dirname").symlink_to(shutil.which("dirname") or "/usr/bin/dirname")
    result = run(checkout / "train.sh", PYTHON="", PATH=str(commands))
    assert result.returncode == 1
    assert "Found no Python 3.11 or newer" in result.stderr
    assert "PYTHON=/path/to/python" in result.stderr


def test_the_current_python_is_used_when_it_has_everything(checkout: Path, tmp_path: Path) -> None:
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "python3").symlink_to(checkout.parent / "python")
    (checkout / "main.py").write_text("import sys\nprint(sys.executable)\n", encoding="utf-8")
    result = run(
        checkout / "train.sh", PYTHON="", MODEL="nano", PATH=f"{commands}:{os.environ['PATH']}"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == sys.executable
    assert not (checkout / ".venv").exists()


def test_unknown_step_of_the_checks_is_refused(checkout: Path) -> None:
    result = run(checkout / "scripts" / "check.sh", "tset")
    assert result.returncode == 2
    assert "'tset' is not a step; use check, test, lint, types or format." in result.stderr


def test_the_checks_run_slow_tests_and_the_tests_alone_do_not(checkout: Path) -> None:
    python = checkout.parent / "python"
    python.write_text('#!/usr/bin/env bash\necho "$@"\n', encoding="utf-8")
    script = checkout / "scripts" / "check.sh"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    *_, marks = shlex.split(project["tool"]["pytest"]["ini_options"]["addopts"])
    everything = marks.removesuffix(" and not slow")
    assert everything != marks
    checks = run(script, "check", "-k", "x", PYTHON=str(python)).stdout.splitlines()
    assert checks[-1] == f"-m pytest -q -n auto --dist loadfile -m {everything} -k x"
    alone = run(script, "test", "-k", "x", PYTHON=str(python)).stdout.splitlines()
    assert alone[-1] == "-m pytest -q -n auto --dist loadfile -k x", (
        "and pyproject.toml leaves the slow ones out"
    )
