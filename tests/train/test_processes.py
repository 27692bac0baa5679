"""One process keeps to one device and says what to type for all; several find each other."""

import shlex

import pytest
import torch
from transformers.training_args import ParallelMode

from ptuning.train import processes as launch
from ptuning.train.flags import UsageError
from ptuning.train.processes import (
    check_gpu_is_here,
    how_to_use_all,
    launch_notices,
    process_values,
    trainer_arguments,
)
from ptuning.train.run_config import parse_arguments

FLAGS = [
    *("--do_train", "--train_file", "my rows.json", "--model_name_or_path", "THUDM/chatglm-6b"),
    *("--pre_seq_len", "8", "--per_device_train_batch_size", "2"),
]
GPU = torch.device("cuda", 0)


def parse(tmp_path, *more):
    return parse_arguments([*FLAGS, "--output_dir", str(tmp_path), *more])


def test_several_gpus_without_a_launcher_are_not_wrapped_in_data_parallel(monkeypatch, tmp_path):
    """As transformers sees four: the devices themselves cannot be made up."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    arguments = trainer_arguments(parse(tmp_path))
    assert (arguments.n_gpu, arguments.parallel_mode) == (1, ParallelMode.NOT_PARALLEL)
    assert (arguments.train_batch_size, arguments.eval_batch_size) == (2, 8)


def test_several_gpus_are_named_with_a_command_that_main_reads(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    config = parse(tmp_path, "--gradient_accumulation_steps", "16")
    (notice,) = launch_notices(config, GPU, 1)
    assert "4 GPUs are visible and one process was started, so only cuda:0 is used" in notice
    assert "torchrun --nproc_per_node 4 main.py --do_train --train_file 'my rows.json'" in notice
    words = shlex.split(notice.splitlines()[-1])
    assert words[:4] == ["torchrun", "--nproc_per_node", "4", "main.py"]
    again = parse_arguments(words[4:])
    assert again.rows_per_step(4) == config.rows_per_step(1)


def test_rows_per_step_are_mentioned_where_they_cannot_stay_the_same(tmp_path):
    config = parse(tmp_path, "--gradient_accumulation_steps", "3")
    notice = how_to_use_all(config, GPU, 4)
    assert "with 4 times the rows in a step" in notice
    assert notice.endswith("--gradient_accumulation_steps 3")


def test_one_device_is_not_mentioned_and_several_processes_on_a_cpu_are(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launch_notices(parse(tmp_path), GPU, 1) == []
    assert launch_notices(parse(tmp_path), torch.device("cpu"), 1) == []
    (notice,) = launch_notices(parse(tmp_path), torch.device("cpu"), 2)
    assert notice.startswith("No CUDA device: 2 processes on the CPU")


@pytest.mark.parametrize(("has_accelerator", "backend"), [(False, "gloo"), (True, None)])
def test_several_processes_without_an_accelerator_use_gloo(
    monkeypatch, tmp_path, has_accelerator, backend
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_accelerator)
    values = process_values(parse(tmp_path))
    assert (values["use_cpu"], values.get("ddp_backend")) == (not has_accelerator, backend)
    assert values["ddp_find_unused_parameters"] is False


def test_deepspeed_that_is_not_installed_is_named_with_what_to_type(tmp_path, monkeypatch):
    config = parse(tmp_path, "--deepspeed", "deepspeed.json")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(
        UsageError, match=r"--deepspeed is deepspeed\.json, .* pip install deepspeed"
    ):
        trainer_arguments(config)


def test_answers_are_refused_where_no_process_has_the_whole_model(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=r"bash evaluate\.sh"):
        trainer_arguments(parse(tmp_path, "--do_predict", "--test_file", "dev.json", "--use_cpu"))


def test_a_value_that_transformers_refuses_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="sometimes"):
        trainer_arguments(parse(tmp_path, "--save_strategy", "sometimes"))


def test_gpu_memory_is_for_a_gpu(tmp_path):
    config = parse(tmp_path, "--gpu_memory", "4.6")
    check_gpu_is_here(config, GPU)
    check_gpu_is_here(parse(tmp_path), torch.device("cpu"))
    with pytest.raises(UsageError, match=r"--gpu_memory is 4\.6 and this run computes on cpu"):
        check_gpu_is_here(config, torch.device("cpu"))


def test_machines_that_do_not_share_the_output_folder_are_refused(monkeypatch, tmp_path):
    (tmp_path / "mark").touch()
    launch.check_shared_folder(tmp_path, "mark")
    monkeypatch.setattr(launch, "gather", lambda own: [own, False])
    with pytest.raises(UsageError, match="process 1 does not see"):
        launch.check_shared_folder(tmp_path, "mark")


def test_frozen_weights_and_buffers_are_not_sent_around():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    launch.leave_frozen_alone(model)
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert ignored == {
        *("0.weight", "0.bias"),
        *("1.running_mean", "1.running_var", "1.num_batches_tracked"),
    }


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (torch.distributed.DistBackendError("NCCL error"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_a_lost_process_is_told_from_a_fault(error, is_lost):
    assert launch.is_lost_peer(error) is is_lost
