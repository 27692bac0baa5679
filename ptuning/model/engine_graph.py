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
from typing import Any, NamedTuple

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
STEPS_BEFORE = 3  # recording costs about as much as ten plain steps: not for what ends at once
MOST_GRAPHS = 32  # each holds a step's intermediate tensors
MOST_DIFFERENCE = 0.05  # of the largest state: half precision's rounding, summed in another order

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


class GraphedSteps:
    """Takes decoding steps, recorded where the same shape comes again and again."""

    def __init__(self, transformer: ChatGLMModel, record: Record | None = None) -> None:
        """Take a model on CUDA; another way to record is for tests."""
        self.transformer = transformer
        self.why_not = ""  # once recording has failed, how
        self._record = record or CudaRecorder(transformer.inverse_frequencies.device)
        self._graphs: dict[Shape, Graph] = {}
        self._steps: Counter[Shape] = Counter()  # plain ones, by shape
        self._slots: tuple[Slots, int] | None = None  # those recorded with, and their generation

    @property
    def num_graphs(self) -> int:
        """How many recorded steps are held."""
        return len(self._graphs)

    def step(self, rows: Sequence[Row], slots: Slots, seen: SeenPrefixes) -> Tensor:
        """Return the final states (R, E) of the newest tokens; they hold until the next step."""
        if self._slots != (slots, slots.generation):
            self.forget()
            self._slots = (slots, slots.generation)
        shape = self._shape_of(rows, slots)
        graph = self._graphs.get(shape)
        if graph is not None:
            graph.numbers.copy_(self._numbers(rows, shape))
            graph.replay()
            return graph.output[: len(rows)]
        self._steps[shape] += 1
        if self.why_not or self._steps[shape] < STEPS_BEFORE:
            prefixes = seen.of([row.request.shares for row in rows])
            return decode_step(self.transformer, rows, slots, prefixes)
        return self._first_of(shape, rows, slots, seen.of(shape.shares))[: len(rows)]

    def forget(self) -> None:
        """Drop all recorded steps, and with them their memory."""
        self._graphs.clear()
        self._steps.clear()
        self._slots = None

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
        try:
            replay, output = self._record(work)
            replay()
        except RuntimeError as error:
            self._give_up(" ".join(str(error).split())[:300] or type(error).__name__)
            return expected
        largest, difference = expected.abs().max(), (output - expected).abs().max()
        if not bool(difference <= MOST_DIFFERENCE * largest):  # so that a NaN counts as one
            self._give_up(
                f"a recorded step differs by {difference.item():.3g} from a plain one, whose "
                f"largest state is {largest.item():.3g}"
            )
            return expected
        if len(self._graphs) >= MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        self._graphs[shape] = Graph(numbers, replay, output, prefixes)
        return output

    def _give_up(self, reason: str) -> None:
        self.forget()
        self.why_not = reason
        logger.warning(
            "Decoding steps are not recorded as CUDA graphs, which is slower: %s", reason
        )


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
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record work, after running it on the same stream: libraries set themselves up there."""
        with torch.cuda.device(self.device):
            if self._stream is None:
                self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                work()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile: a server reads a prefix, say.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                output = work()
        return graph.replay, output
