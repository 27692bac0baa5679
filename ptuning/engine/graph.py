"""Decoding steps as CUDA graphs: one launch per step instead of hundreds.

An H100 reads ChatGLM-6B's int4 weights in about a millisecond, but launching a step's kernels one
by one takes several. A CUDA graph fixes shapes and addresses, so a batch is padded to one of a few
row counts with idle rows, which write to unused slots; columns are rounded up to a multiple of 64;
and token ids, columns and positions are copied into one static tensor before each replay. A graph
is validated against an eager step before it is used.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
Shapes: R rows decoding, B rows including idle ones, E hidden size.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ptuning.engine.prefixes import BatchPrefixes, PrefixCache, PrefixMix
from ptuning.engine.request import Row
from ptuning.engine.slots import Slots
from ptuning.engine.step import decode_step, run_step, step_numbers
from ptuning.model.chatglm import ChatGLMModel

ROWS_STEP = 8  # row counts above 8 are padded to a multiple of it, smaller ones to a power of 2
COLUMNS_STEP = 64
# A capture costs the host about four eager steps (by count, not measured): reference step, warm-up,
# capture and validated replay. So a shape is captured only once it has recurred, and a mix of
# prefixes much later, since any row that is admitted or evicted changes the mix.
STEPS_BEFORE, MIXED_STEPS_BEFORE = 3, 16
# The least recently used graph beyond this many is evicted. 128 rows meet 19 row counts x 3 widths
# (192 columns) = 57 shapes, which all fit. A graph holds its output, at most 1 MiB (128 x 4096 in
# half precision), and CUDA's record of some 830 kernels: 64 KiB each before driver 550, 3.2 GiB in
# 64 graphs; less since then.
# Source: https://docs.pytorch.org/docs/stable/torch.compiler_cudagraph_trees.html
MAX_GRAPHS = 64
MAX_SHAPES = 4096  # whose eager steps are counted
MAX_DIFFERENCE = 0.01  # relative, per row: half-precision rounding when sums are reordered

logger = logging.getLogger(__name__)

# Captures a function; returns how to replay it and the tensor that each replay overwrites.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class Graph(NamedTuple):
    """One captured step, with the tensors its kernels read and write."""

    numbers: Tensor  # (4, B)
    replay: Callable[[], None]
    output: Tensor  # (B, E)
    prefixes: BatchPrefixes | None  # kept alive: the kernels read from it


class Shape(NamedTuple):
    """The key of a graph, which is valid for nothing else."""

    num_rows: int  # B
    num_columns: int
    mixes: tuple[PrefixMix, ...]  # the prefixes of each of the B rows


class GraphedSteps:
    """Runs decoding steps, replaying a CUDA graph wherever a shape recurs."""

    def __init__(self, transformer: ChatGLMModel) -> None:
        self.transformer = transformer
        self.disabled_reason = ""  # set once a capture has failed
        self.graphs: dict[Shape, Graph] = {}  # least recently used first
        self.new_capture: Callable[[torch.device], Capture] = CudaCapture  # tests replace it
        self._capture: Capture | None = None
        self._steps: Counter[Shape] = Counter()  # eager steps by shape
        self._addresses: tuple[Slots, int, int] | None = None

    def step(self, rows: Sequence[Row], slots: Slots, cache: PrefixCache) -> Tensor:
        """Return the final states (R, E) of the newest tokens, valid until the next step."""
        if self.disabled_reason:
            return self._eager(rows, slots, cache)
        weight = self.transformer.final_layernorm.weight
        # Where all graphs read and write; the weight moves when the model is moved or cast.
        addresses = (slots, slots.generation, weight.data_ptr())
        if addresses != self._addresses:
            self.clear()
            self._addresses = addresses
        shape = self._shape_of(rows, slots)
        graph = self.graphs.pop(shape, None)
        if graph is not None:
            self.graphs[shape] = graph  # last, as the most recently used
            numbers = step_numbers(rows, shape.num_rows, weight.device)
            graph.numbers.copy_(numbers, non_blocking=True)
            graph.replay()
            return graph.output[: len(rows)]
        self._steps[shape] += 1
        is_uniform = all(mix == shape.mixes[0] for mix in shape.mixes)
        if self._steps[shape] < (STEPS_BEFORE if is_uniform else MIXED_STEPS_BEFORE):
            if len(self._steps) > MAX_SHAPES:
                self._steps.clear()
            return self._eager(rows, slots, cache)
        return self._capture_step(shape, rows, slots, cache.lookup(shape.mixes))[: len(rows)]

    def clear(self) -> None:
        """Drop all graphs, and with them their memory."""
        self.graphs.clear()
        self._steps.clear()
        self._addresses = None
        # The memory pool goes too: PyTorch asserts (`use_count > 0`) that a pool still has a graph
        # when another one is captured into it.
        self._capture = None

    def _eager(self, rows: Sequence[Row], slots: Slots, cache: PrefixCache) -> Tensor:
        prefixes = cache.lookup([row.request.prefixes for row in rows])
        return decode_step(self.transformer, rows, slots, prefixes)

    def _shape_of(self, rows: Sequence[Row], slots: Slots) -> Shape:
        num_rows = min(padded_rows(len(rows)), slots.num_slots)
        longest = max(row.length for row in rows) + 1
        num_columns = min(-(-longest // COLUMNS_STEP) * COLUMNS_STEP, slots.capacity)
        mixes = [row.request.prefixes for row in rows]
        mixes += mixes[:1] * (num_rows - len(rows))
        return Shape(num_rows, num_columns, tuple(mixes))

    def _capture_step(
        self, shape: Shape, rows: Sequence[Row], slots: Slots, prefixes: BatchPrefixes | None
    ) -> Tensor:
        """Run an eager step of the padded shape, capture it, and keep the graph if it agrees."""
        device = self.transformer.final_layernorm.weight.device
        numbers = step_numbers(rows, shape.num_rows, device).to(device, non_blocking=True)

        def work() -> Tensor:
            return run_step(self.transformer, numbers, slots, shape.num_columns, prefixes)

        expected = work()
        if not bool(expected[: len(rows)].isfinite().all()):
            del self._steps[shape]  # the model overflows: nothing to validate against
            return expected
        capture = self._capture or self.new_capture(device)
        try:
            replay, output = capture(work)
            replay()
        except RuntimeError as error:
            cause = error.__context__ or error  # an error in a capture makes its end fail as well
            self._disable(" ".join(str(cause).split())[:300] or type(cause).__name__)
            return expected
        difference = _largest_difference(output[: len(rows)], expected[: len(rows)])
        if not difference <= MAX_DIFFERENCE:  # true for NaN too
            self._disable(f"a graph's output differs from an eager step's by {difference:.2%}")
            return expected
        self.graphs[shape] = Graph(numbers, replay, output, prefixes)
        self._capture = capture  # only now that a graph keeps its memory pool in use
        if len(self.graphs) > MAX_GRAPHS:  # only now: the pool must not lose its last graph
            evicted = next(iter(self.graphs))
            del self.graphs[evicted], self._steps[evicted]  # to be captured, it has to recur again
        return output

    def _disable(self, reason: str) -> None:
        self.clear()
        self.disabled_reason = reason
        logger.warning(
            "CUDA graphs are disabled and decoding continues with eager steps, which are slower: "
            "%s. Engine(use_graphs=False) disables them from the start.",
            reason,
        )


def _largest_difference(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to that of expected, for the worst row."""
    expected = expected.float()
    ratios = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return ratios.max().item()


def padded_rows(num_rows: int) -> int:
    """Return how many rows a graph for num_rows has.

    >>> [padded_rows(count) for count in (1, 2, 3, 8, 9, 17)]
    [1, 2, 4, 8, 16, 24]
    """
    if num_rows > ROWS_STEP:
        return -(-num_rows // ROWS_STEP) * ROWS_STEP
    return 1 << (num_rows - 1).bit_length()


class CudaCapture:
    """Captures CUDA graphs that share one memory pool: they are replayed one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _capture_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Warm up on the capture stream, where cuBLAS allocates a workspace, then capture."""
        with torch.cuda.device(self._device):
            caller = torch.cuda.current_stream()
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                try:
                    work()
                finally:
                    caller.wait_stream(self._stream)  # for the warm-up; a capture executes nothing
                try:
                    return self._captured(work)
                except torch.OutOfMemoryError:  # a capture may not free the allocator's cache
                    torch.cuda.empty_cache()
                    return self._captured(work)

    def _captured(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture work on the current stream.

        torch.cuda.graph would synchronise the device and empty the allocator's cache every time.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device during the capture: a server prefills, for example.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            output = work()
        finally:
            graph.capture_end()
        return graph.replay, output


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the device's only capture stream: cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream(device)
