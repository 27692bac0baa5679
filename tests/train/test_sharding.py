"""The parts of several processes make up what one process has, each row once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from ptuning.train.sharding import EpochOrder, MaskableRows, ShardedBatches


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
