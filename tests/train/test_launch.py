"""One process keeps to one device and says what to type for all; several find each other."""

from types import SimpleNamespace

import pytest
import torch
from transformers.training_args import ParallelMode

from ptuning.train.flags import UsageError, parse_arguments
from ptuning.train.processes import processes
from ptuning.train.processes.launch import prepare_processes

FLAGS = [
    *("--do_train", "--train_file", "my rows.json", "--model_name_or_path", "THUDM/chatglm-6b"),
    *("--pre_seq_len", "8", "--per_device_train_batch_size", "2"),
]


@pytest.fixture
def four_gpus(monkeypatch):
    """As transformers sees four: the device itself cannot be made up."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


def parse(tmp_path, *more):
    return parse_arguments([*FLAGS, "--output_dir", str(tmp_path), *more])


def test_several_gpus_without_a_launcher_are_not_wrapped_in_data_parallel(four_gpus, tmp_path):
    arguments = parse(tmp_path, "--gradient_accumulation_steps", "16")
    training = arguments.training
    assert (training.n_gpu, training.parallel_mode) == (1, ParallelMode.NOT_PARALLEL)
    assert training.train_batch_size == 2
    assert training.eval_batch_size == training.per_device_eval_batch_size
    (notice,) = arguments.notices
    assert "4 GPUs are visible and one process was started" in notice
    assert "torchrun --nproc_per_node 4 main.py --do_train --train_file 'my rows.json'" in notice
    assert notice.endswith("--gradient_accumulation_steps 16 --gradient_accumulation_steps 4")


def test_the_command_it_names_is_one_that_main_reads(four_gpus, tmp_path, monkeypatch):
    import shlex

    notice = parse(tmp_path, "--gradient_accumulation_steps", "16").notices[0]
    words = shlex.split(notice.splitlines()[-1])
    assert words[:4] == ["torchrun", "--nproc_per_node", "4", "main.py"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    again = parse_arguments(words[4:])
    assert again.training.gradient_accumulation_steps == 4
    assert again.notices == ()


def test_rows_in_a_step_are_spoken_of_where_they_cannot_stay_the_same(four_gpus, tmp_path):
    (notice,) = parse(tmp_path, "--gradient_accumulation_steps", "3").notices
    assert "with 4 times the rows in a step" in notice
    assert notice.endswith("--gradient_accumulation_steps 3")


def test_one_gpu_is_not_spoken_of(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert parse(tmp_path).notices == ()


@pytest.mark.parametrize(("has_accelerator", "backend"), [(False, "gloo"), (True, None)])
def test_several_processes_without_an_accelerator_take_gloo(monkeypatch, has_accelerator, backend):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_accelerator)
    training = SimpleNamespace(
        use_cpu=False, ddp_backend=None, ddp_find_unused_parameters=None, deepspeed=None
    )
    prepare_processes(training)
    assert (training.use_cpu, training.ddp_backend) == (not has_accelerator, backend)
    assert training.ddp_find_unused_parameters is False


def test_deepspeed_that_is_not_installed_is_named_with_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(
        UsageError, match=r"--deepspeed is deepspeed\.json, .* pip install deepspeed"
    ):
        parse(tmp_path, "--tuning", "full", "--deepspeed", "deepspeed.json")


def test_answers_are_refused_where_no_process_has_the_whole_model(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=r"bash evaluate\.sh"):
        parse(tmp_path, "--do_predict", "--test_file", "dev.json", "--use_cpu")


def test_machines_that_do_not_share_the_output_folder_are_refused(monkeypatch, tmp_path):
    (tmp_path / "mark").touch()
    processes.check_shared_folder(tmp_path, "mark")
    monkeypatch.setattr(processes, "gather", lambda own: [own, False])
    with pytest.raises(UsageError, match="process 1 does not see"):
        processes.check_shared_folder(tmp_path, "mark")


def test_processes_that_see_different_things_are_refused(monkeypatch):
    processes.check_same_everywhere("x", 1, needed="y")
    monkeypatch.setattr(processes, "gather", lambda own: [own, own, "b"])
    with pytest.raises(UsageError, match="x is a for process 0 and b for process 2; y"):
        processes.check_same_everywhere("x", "a", needed="y")


def test_frozen_weights_and_buffers_are_not_sent_around():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    processes.leave_frozen_alone(model)
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
    assert processes.is_lost_peer(error) is is_lost
