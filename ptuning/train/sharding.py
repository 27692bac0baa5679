"""Rows sharded over processes: each step has the same rows as in one process.

A global batch is num_processes x batch_size rows in the order that one process would see; every
process takes its part. At the end of an epoch parts may differ in length, and a process without
rows computes one row with every label masked: it adds nothing to loss and gradient, and every
process takes part in every step. accelerate repeats rows instead, which then count twice.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import seed_worker

from ptuning.data.tokenization import IGNORED_LABEL


class ShardedBatches(BatchSampler):
    """One process's part of every global batch, as row numbers; ~i stands for row i, masked."""

    def __init__(
        self,
        sampler: Sampler[int],
        *,
        batch_size: int,
        num_processes: int,
        process_index: int,
        drop_last: bool = False,
    ) -> None:
        """Take the order of all rows, and the rows of one process in a whole batch."""
        super().__init__(sampler, batch_size * num_processes, drop_last)
        self.num_shares, self.share_index = num_processes, process_index

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's rows of each global batch: contiguous, of nearly equal number."""
        for batch in super().__iter__():
            start = len(batch) * self.share_index // self.num_shares
            end = len(batch) * (self.share_index + 1) // self.num_shares
            yield batch[start:end] or [~batch[0]]


class MaskableRows(Dataset[dict[str, Tensor]]):
    """Rows by their numbers; ~i is row i with every label masked."""

    def __init__(self, rows: Dataset[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)  # type: ignore[arg-type]  # map-style

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a row, or a masked one."""
        if index >= 0:
            return self.rows[index]
        row = self.rows[~index]
        return {**row, "labels": torch.full_like(row["labels"], IGNORED_LABEL)}


class EpochOrder(Sampler[int]):
    """An order drawn per epoch from the seed and the epoch alone, so equal in all processes."""

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the next order for that epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        """Yield the row numbers in their order."""
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)


def sharded_loader(
    rows: Dataset[dict[str, Tensor]],
    order: Sampler[int],
    collate: Callable[[list[Any]], dict[str, Tensor]],
    args: Any,
    *,
    batch_size: int,
    trains: bool,
) -> DataLoader[Any]:
    """Return the loader of this process's part; args are transformers' training arguments."""
    if isinstance(order, LengthGroupedSampler):
        order.batch_size *= args.world_size  # rows of like length share a global batch
        order = EpochOrder(order, args.seed)
    batches = ShardedBatches(
        order,
        batch_size=batch_size,
        num_processes=args.world_size,
        process_index=args.process_index,
        drop_last=trains and args.dataloader_drop_last,
    )
    workers = args.dataloader_num_workers
    seeds = partial(seed_worker, num_workers=workers, rank=args.process_index)
    loader = DataLoader(
        MaskableRows(rows),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor,
        worker_init_fn=seeds if trains else None,
        persistent_workers=trains and args.dataloader_persistent_workers,
    )
    return prepare_data_loader(
        loader,
        args.device,
        num_processes=1,  # it is sharded already
        process_index=0,
        put_on_device=True,
        use_seedable_sampler=args.accelerator_config.use_seedable_sampler,
        data_seed=args.data_seed,
    )
