"""A trainer whose processes share the rows out, so that several do what one would.

Only what is trained is reduced. Written against transformers 5.10 to 5.23.
"""

from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ptuning.train.processes.processes import draw_apart, leave_frozen_alone
from ptuning.train.processes.sharding import sharded_loader


class ShardingTrainer(transformers.Seq2SeqTrainer):
    """transformers' trainer with each row used once; as it is, in one process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take transformers' arguments."""
        super().__init__(*args, **kwargs)
        if self.args.world_size > 1:
            assert self.model is not None, "main.py makes no trainer without one"
            leave_frozen_alone(self.model)

    @property
    def shares_rows_out(self) -> bool:
        """Whether rows are shared out here: not by an engine that splits a row or weighs rows."""
        return (
            self.args.world_size > 1
            and getattr(self.args, "parallelism_config", None) is None
            and self.args.train_sampling_strategy != "batch_rebalance"
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this process's part of the training rows."""
        if not self.shares_rows_out:
            return super().get_train_dataloader()
        order = self._get_train_sampler(self.train_dataset)
        return self._sharded(self.train_dataset, order, self._train_batch_size, trains=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return this process's part of the validation rows."""
        if not self.shares_rows_out:
            return super().get_eval_dataloader(eval_dataset)
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        order = torch.utils.data.SequentialSampler(rows)
        return self._sharded(rows, order, self.args.eval_batch_size, trains=False)

    def _sharded(
        self, rows: Any, order: Any, batch_size: int, *, trains: bool
    ) -> DataLoader[Dataset[Any]]:
        return sharded_loader(
            rows, order, self.data_collator, self.args, batch_size=batch_size, trains=trains
        )

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """Return the sum of every process's values, in each of them."""
        if self.args.world_size == 1:
            return values
        total: Any = self.accelerator.reduce(values.to(self.args.device), reduction="sum")
        return total

    def draw_apart_from_others(self) -> None:
        """Give a new run's processes dropout masks of their own."""
        if self.args.world_size > 1:
            draw_apart(self.args.seed, self.args.process_index)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Finish, the losses since the last log line taken over all processes too."""
        self._tr_loss = self.sum_over_processes(self._tr_loss) / self.args.world_size
        return super()._finalize_training(*args, **kwargs)
