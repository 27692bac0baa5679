"""One process keeps to one device and says what to type for all; several share rows exactly."""

import shlex

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.training_args import ParallelMode

from ptuning.train import processes as launch
from ptuning.train.flags import UsageError
from ptuning.train.processes import (
    EpochOrder,
    MaskableRows,
    ShardedBatches,
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
    launch.exclude_frozen_from_ddp(model)
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


# ---- Rows ----


def parts(
    num_rows: int, batch_size: int, num_processes: int, *, drop_last: bool = False
) -> list[list[list[int]]]:
    made = [
        ShardedBatches(
            SequentialSampler(range(num_rows)),
            batch_size=batch_size,
            num_processes=num_processes,
            process_index=index,
            drop_last=drop_last,
        )
        for index in range(num_processes)
    ]
    assert len({len(sampler) for sampler in made}) == 1
    assert [len(list(sampler)) for sampler in made] == [len(sampler) for sampler in made]
    return [list(sampler) for sampler in made]


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_each_step_has_the_rows_that_one_process_would_have(rows, batch, processes, drop_last):
    whole = list(BatchSampler(SequentialSampler(range(rows)), batch * processes, drop_last))
    shared = parts(rows, batch, processes, drop_last=drop_last)
    for step, wanted in enumerate(whole):
        own = [part[step] for part in shared]
        assert [row for share in own for row in share if row >= 0] == wanted
        assert all(0 < len(share) <= batch for share in own)
        for share in own:  # a masked row stands in only where there is no other
            assert all(row >= 0 for row in share) or len(share) == 1
    assert {len(part) for part in shared} == {len(whole)}


def test_a_masked_row_has_no_label_and_the_others_are_untouched():
    rows = [{"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([-100, 6])}]
    shared = MaskableRows(rows)  # type: ignore[arg-type]
    assert len(shared) == 1
    assert shared[0] is rows[0]
    assert shared[~0]["labels"].tolist() == [-100, -100]
    assert shared[~0]["input_ids"].tolist() == [5, 6]
    assert rows[0]["labels"].tolist() == [-100, 6]


def test_an_epoch_has_one_order_whatever_was_drawn_before():
    def order(epoch: int, draws: int) -> list[int]:
        torch.rand(draws)
        made = EpochOrder(LengthGroupedSampler(2, lengths=list(range(20))), seed=3)
        made.set_epoch(epoch)
        return list(made)

    assert order(1, 0) == order(1, 7)
    assert order(1, 0) != order(2, 0)
    assert sorted(order(1, 0)) == list(range(20))


@pytest.mark.parametrize("num_processes", [2, 3])
def test_whole_batches_are_cut_where_accelerate_cuts_them(num_processes):
    from accelerate.data_loader import BatchSamplerShard

    batches = BatchSampler(SequentialSampler(range(12 * num_processes)), 4, False)
    for index, part in enumerate(parts(12 * num_processes, 4, num_processes)):
        assert part == list(BatchSamplerShard(batches, num_processes, index))
