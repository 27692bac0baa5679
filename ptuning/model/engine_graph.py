"""Decoding steps recorded and replayed: on CUDA a whole step is one launch in place of hundreds.

A card reads ChatGLM-6B's int4 weights in about a millisecond, but launching a step's kernels one by
one takes several. A CUDA graph fixes shapes and addresses, so rows are filled up to few counts with
idle ones, which write where no row is, and columns to multiples of 64; the step's numbers lie in
one tensor that is overwritten. A recorded step is compared with a plain one before it is used.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
Shapes: R rows decoding, N rows with the idle ones, E hidden size.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ptuning.model.backbone import ChatGLMModel
from ptuning.model.engine_row import Row
from ptuning.model.engine_slots import Slots
from ptuning.model.engine_step import decode_step, run_step, step_numbers
from ptuning.model.prefix_rows import PrefixRows, SeenPrefixes
from ptuning.model.shared_prefix import Shares

ROWS_STEP = 8  # above 8 rows, counts are filled up to multiples of it; below, to powers of 2
COLUMNS_STEP = 64
# Recording costs about as much as ten plain steps: not for what ends at once, and not for a mixture
# of prefixes, which the next row that joins or leaves makes another, before it has lasted a while.
STEPS_BEFORE, MIXED_STEPS_BEFORE = 3, 16
MOST_GRAPHS = 32  # each holds its result and its launches; intermediate tensors share one pool
MOST_SHAPES = 4096  # whose plain steps are counted
MOST_DIFFERENCE = 0.01  # of a row's length: half precision's rounding, summed in another order

logger = logging.getLogger(__name__)

# Records what a function does with tensors: how to do it again, and the tensor that it fills.
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class Graph(NamedTuple):
    """One recorded step, with what its kernels read and write."""

    numbers: Tensor  # (4, N)
    replay: Callable[[], None]
    output: Tensor  # (N, E)
    prefixes: PrefixRows | None  # held, as the kernels read from their addresses


class Shape(NamedTuple):
    """What a recorded step holds for."""

    num_rows: int  # N
    num_columns: int
    shares: tuple[Shares, ...]  # what each of the N rows sees

    @property
    def is_uniform(self) -> bool:
        """Whether all rows see the same."""
        return all(shares == self.shares[0] for shares in self.shares)


class Addresses(NamedTuple):
    """Where recorded steps read and write; they hold for nothing else."""

    slots: Slots
    generation: int  # of the slots
    weight: int  # a model that is moved or cast takes this weight with it


class GraphedSteps:
    """Takes decoding steps, recorded where the same shape comes again and again."""

    def __init__(
        self, transformer: ChatGLMModel, make_recorder: Callable[[], Record] | None = None
    ) -> None:
        """Take a model on CUDA; other recorders are for tests."""
        self.transformer = transformer
        self.why_not = ""  # once recording has failed, how
        self._make_recorder = make_recorder or self._cuda_recorder
        self._record: Record | None = None
        self._graphs: dict[Shape, Graph] = {}
        self._steps: Counter[Shape] = Counter()  # plain ones, by shape
        self._addresses: Addresses | None = None

    @property
    def num_graphs(self) -> int:
        """How many recorded steps are held."""
        return len(self._graphs)

    def step(self, rows: Sequence[Row], slots: Slots, seen: SeenPrefixes) -> Tensor:
        """Return the final states (R, E) of the newest tokens; they hold until the next step."""
        if self.why_not:
            return self._plain(rows, slots, seen)
        addresses = Addresses(
            slots, slots.generation, self.transformer.final_layernorm.weight.data_ptr()
        )
        if addresses != self._addresses:
            self.forget()
            self._addresses = addresses
        shape = self._shape_of(rows, slots)
        graph = self._graphs.get(shape)
        if graph is not None:
            graph.numbers.copy_(self._numbers(rows, shape))
            graph.replay()
            return graph.output[: len(rows)]
        self._steps[shape] += 1
        if self._steps[shape] < (STEPS_BEFORE if shape.is_uniform else MIXED_STEPS_BEFORE):
            if len(self._steps) > MOST_SHAPES:
                self._steps.clear()
            return self._plain(rows, slots, seen)
        return self._first_of(shape, rows, slots, seen.of(shape.shares))[: len(rows)]

    def forget(self) -> None:
        """Drop all recorded steps, and with them their memory."""
        self._graphs.clear()
        self._steps.clear()
        self._addresses = None
        self._record = None  # a pool of memory that all graphs have left takes no new ones

    def _cuda_recorder(self) -> "CudaRecorder":
        return CudaRecorder(self.transformer.final_layernorm.weight.device)

    def _plain(self, rows: Sequence[Row], slots: Slots, seen: SeenPrefixes) -> Tensor:
        prefixes = seen.of([row.request.shares for row in rows])
        return decode_step(self.transformer, rows, slots, prefixes)

    def _shape_of(self, rows: Sequence[Row], slots: Slots) -> Shape:
        num_rows = min(filled_rows(len(rows)), slots.num_slots)
        longest = max(row.length for row in rows) + 1
        num_columns = min(-(-longest // COLUMNS_STEP) * COLUMNS_STEP, slots.capacity)
        shares = [row.request.shares for row in rows]
        shares += shares[:1] * (num_rows - len(rows))
        return Shape(num_rows, num_columns, tuple(shares))

    def _numbers(self, rows: Sequence[Row], shape: Shape) -> Tensor:
        """Return (4, N) on the CPU; an idle row is token 0 in column 0 of its slot."""
        own = step_numbers(rows)
        return torch.cat((own, own.new_zeros(4, shape.num_rows - len(rows))), dim=1)

    def _first_of(
        self, shape: Shape, rows: Sequence[Row], slots: Slots, prefixes: PrefixRows | None
    ) -> Tensor:
        """Take a plain step of the filled-up shape, record it, and keep it if it does the same."""
        numbers = self._numbers(rows, shape).to(self.transformer.final_layernorm.weight.device)

        def work() -> Tensor:
            return run_step(self.transformer, numbers, slots, shape.num_columns, prefixes)

        expected = work()
        if not bool(expected[: len(rows)].isfinite().all()):
            del self._steps[shape]  # the model overflows: nothing to compare with
            return expected
        if len(self._graphs) >= MOST_GRAPHS:  # graphs share memory: all go or none
            addresses = self._addresses
            self.forget()
            self._addresses = addresses
        self._record = self._record or self._make_recorder()
        try:
            replay, output = self._record(work)
            replay()
        except RuntimeError as error:
            cause = error.__context__ or error  # a capture's end fails too once a step in it has
            self._give_up(" ".join(str(cause).split())[:300] or type(cause).__name__)
            return expected
        difference = _largest_difference(output[: len(rows)], expected[: len(rows)])
        if not difference <= MOST_DIFFERENCE:  # so that a NaN counts as one
            self._give_up(f"a recorded step differs from a plain one by {difference:.3g} of itself")
            return expected
        self._graphs[shape] = Graph(numbers, replay, output, prefixes)
        return output

    def _give_up(self, reason: str) -> None:
        self.forget()
        self.why_not = reason
        logger.warning(
            "Decoding steps are not recorded as CUDA graphs from here on, so answers take longer: "
            "%s. Engine(record_steps=False) takes plain steps from the start.",
            reason,
        )


def _largest_difference(found: Tensor, expected: Tensor) -> float:
    """Return the length of the difference over that of the row expected, in the worst row."""
    expected = expected.float()
    ratios = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return ratios.max().item()


def filled_rows(num_rows: int) -> int:
    """Return how many rows a recorded step has for num_rows.

    >>> [filled_rows(count) for count in (1, 2, 3, 8, 9, 17)]
    [1, 2, 4, 8, 16, 24]
    """
    if num_rows > ROWS_STEP:
        return -(-num_rows // ROWS_STEP) * ROWS_STEP
    return 1 << (num_rows - 1).bit_length()


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory: they are replayed one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _recording_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record work, after running it on the same stream: libraries set themselves up there."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):  # left for the caller's, also by a failed capture
                work()
                # Other threads may use the device meanwhile: a server reads a prefix, say.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    output = work()
            torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay, output


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the device's one stream to record on: cuBLAS keeps memory for each it has seen."""
    return torch.cuda.Stream(device)
