"""The benchmarks answer what their flags ask, and a GPU's first run survives what its stages do."""

import importlib
import inspect
import json
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    cuda,
    cuda_stages,
    cuda_tiles,
    full_size,
    generate,
    memory,
    row_lengths,
    select,
    setting,
    train,
)
from benchmarks.cuda_stages import Decoding, Figure, Stage, Target
from ptuning.model.quantization import triton_backend

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = sorted(
    file.stem
    for file in (ROOT / "benchmarks").glob("*.py")
    if "__main__" in file.read_text(encoding="utf-8")
)
TINY = ["--size", "tiny", "--device", "cpu", "--prefix", "4"]
ON_CPU = Target("cpu", "tiny")


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 1 TFLOP/s and 10 GB/s: measuring it takes seconds."""
    for module in (train, cuda_stages):
        monkeypatch.setattr(module, "matmul_flops_per_s", lambda flags: 1e12)
    for module in (generate, cuda_stages):
        monkeypatch.setattr(module, "memory_gb_per_s", lambda device: 10.0)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(f"benchmarks.{name}").main
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        main(*[["--help"]] * len(inspect.signature(main).parameters))
    assert "usage:" in capsys.readouterr().out


# row lengths


def test_the_stored_rows_are_those_that_were_always_measured() -> None:
    assert len(row_lengths.ADGEN) == 320
    assert sum(map(sum, row_lengths.ADGEN[:16])) == 1547
    assert max(max(length) for length in row_lengths.ADGEN) == row_lengths.MAX_LENGTH


def test_the_stored_rows_are_those_of_the_real_file(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, tokenizer = shared / "data/AdvertiseGen/train_head5001.json", shared / "data/chatglm-6b"
    row_lengths.main(["--rows_file", str(rows), "--tokenizer", str(tokenizer)])
    assert capsys.readouterr().out == row_lengths.NUMBERS.lstrip()


def test_rows_have_the_stored_lengths_and_repeat() -> None:
    flags = train.parse(TINY)
    config = setting.make_model(flags).config
    rows = setting.make_rows(flags, config, 322)
    prompt, answer = row_lengths.ADGEN[0]
    for row in (rows[0], rows[320]):
        assert (row.labels == -100).tolist() == [True] * prompt + [False] * answer
        assert row.input_ids[prompt - 1] == config.gmask_token_id
        assert row.input_ids[prompt] == config.bos_token_id


def test_rows_of_a_file_are_counted_with_its_tokenizer(tmp_path: Path) -> None:
    flags = train.parse([*TINY, "--rows_file", str(ROOT / "AdvertiseGen/sample/train.json")])
    rows = setting.make_rows(flags, setting.make_model(flags).config, 16)
    assert sum(len(row.input_ids) for row in rows) == 691
    with pytest.raises(SystemExit, match="2"):
        train.parse([*TINY, "--tokenizer", str(tmp_path)])


# train and generate


@pytest.mark.parametrize("bits", ["", "4", "8"])
def test_training_is_timed_at_any_width_and_batch(bits: str, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    width = ["--quantization_bit", bits] if bits else []
    assert train.main([*TINY, *width, "--rows", "3", "--steps", "1", "--json", str(out)]) == 0
    figures = json.loads(out.read_text(encoding="utf-8"))
    for name in ("ours", "published"):
        assert figures[f"{name}_real_tokens"] == sum(map(sum, row_lengths.ADGEN[:3]))
        assert figures[f"{name}_first_step_s"] > 0
        assert figures[f"{name}_mfu"] > 0


def test_a_quantised_model_is_what_was_asked_for() -> None:
    layer = setting.make_model(train.parse([*TINY, "--quantization_bit", "4"])).transformer.layers
    assert layer[0].mlp.dense_h_to_4h.weight.dtype == torch.int8
    assert train.parse(TINY).rows == 16, "the published accumulation"
    older = Namespace(size="tiny", device="cpu", dtype="float32", threads=None, prefix=4)
    assert not setting.make_model(older).config.quantization_bit


@pytest.mark.parametrize("bits", ["", "4", "8"])
def test_every_row_decodes_the_tokens_asked_for(bits: str, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    width = ["--quantization_bit", bits] if bits else []
    words = [*TINY, *width, "--rows", "4", "--single_rows", "1", "--new_tokens", "3"]
    assert generate.main([*words, "--json", str(out)]) == 0
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert figures["rows_compared"] == figures["rows_equal"] == 1
    assert figures["decode_gb_per_s"] > 0


def test_new_tokens_are_a_budget_or_the_real_answer() -> None:
    flags = generate.parse(TINY)
    model = setting.make_model(flags)
    fixed = generate.make_questions(flags, model, 4, flags.new_tokens)
    assert [question.num_answer_tokens for question in fixed] == [64] * 4
    real = generate.make_questions(flags, model, 4, 0)
    answers = [length.answer - 1 for length in row_lengths.ADGEN[:4]]  # <sop> is not generated
    assert [question.num_answer_tokens for question in real] == answers
    with pytest.raises(SystemExit, match="2"):
        generate.parse([*TINY, "--new_tokens", "-1"])


# select


@pytest.mark.parametrize("bits", ["", "4"])
def test_scoring_is_timed_next_to_training(bits: str, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    width = ["--quantization_bit", bits] if bits else []
    words = [*TINY, *width, "--rows", "4", "--repeats", "1", "--batch_tokens", "300"]
    assert select.main([*words, "--json", str(out)]) == 0
    figures = json.loads(out.read_text(encoding="utf-8"))
    lengths = row_lengths.ADGEN[:4]
    one_pass, both = sum(map(sum, lengths)), sum(p + 2 * a + 1 for p, a in lengths)
    tokens = {"training step": one_pass, "ifd": both, "states": one_pass}
    for name, wanted in tokens.items():
        found = figures[name]
        assert found["tokens_per_s"] * found["time_s"] == pytest.approx(wanted)
        assert found["rows_per_s"] * found["time_s"] == pytest.approx(4)
    assert figures["training step"]["times_training"] == 1


def test_a_pool_is_cleaned_and_deduplicated(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    assert select.main(["--pool_rows", "300", "--json", str(out)]) == 0
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert 240 < figures["kept"] < 290
    assert min(figures[name] for name in ("read_s", "clean_s", "duplicates_s", "peak")) > 0


# memory and full_size


def test_the_full_size_is_measured_on_cuda_unless_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = {"chatglm-6b-bfloat16", "chatglm-6b-int8-bfloat16", "chatglm-6b-int4-bfloat16"}
    assert not names & set(memory.parse(["--device", "cpu"]).cases)
    assert names <= set(memory.parse(["--device", "cuda"]).cases)
    rows = {case.rows for case in memory.CASES if case.name == "chatglm-6b-int4-bfloat16"}
    assert rows == {1, 16}
    assert memory.parse(["--device", "cpu", "--cases", *names]).cases == list(names)


def test_recompute_is_the_number_of_checkpointed_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = memory.parse(["--device", "cpu", "--prefix", "4", "--recompute", "1"])
    assert flags.work == ["train", "answer", "recompute"]
    asked = []
    monkeypatch.setattr(memory, "checkpoint_layers", lambda model, count: asked.append(count))
    monkeypatch.setattr(memory, "forget_peak", lambda device: None)  # Linux alone can
    monkeypatch.setattr(memory, "peak_bytes", lambda device: 7)
    for work in ("recompute", "train"):
        result = memory.measure(memory.Case("tiny", "float32", 4, 2, work), flags)
        assert result.measured == 7
    assert asked == [1, 0]
    for wrong in (["--recompute", "-1"], ["--recompute", "1", "--work", "train"]):
        with pytest.raises(SystemExit, match="2"):
            memory.parse(["--device", "cpu", *wrong])


def test_the_full_size_run_checkpoints_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size, "load_base", lambda *_, **__: setting.make_model(flags))
    flags = full_size.parse(["--size", "tiny", "--device", "cpu", "--recompute", "1"])
    layers = full_size.load(Path(), flags).transformer.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]
    assert "gradient checkpointing of 1 layers" in full_size.describe(flags)
    with pytest.raises(SystemExit, match="2"):
        full_size.parse(["--size", "tiny", "--recompute", "3"])


# cuda: the stages, on a CPU


def figures_of(stage: Iterator[Figure]) -> dict[str, Any]:
    found = list(stage)
    assert len({figure.name for figure in found}) == len(found), "names are keys of a stage"
    return {figure.name: figure.value for figure in found}


def test_the_smoke_stage_trains_and_decodes_in_all_widths() -> None:
    figures = figures_of(cuda_stages.smoke(ON_CPU))
    assert {name.partition(",")[0] for name in figures} == {"bf16", "int8", "int4"}
    assert all(value > 0 for value in figures.values())


def test_the_device_stage_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_stages, "PACKAGES", "torch no-such-package")
    figures = figures_of(cuda_stages.device(ON_CPU))
    assert figures["versions"] == f"torch {torch.__version__}, no-such-package missing"
    assert figures["read bandwidth"] == 10.0
    assert figures["matmul rate"] == 1.0
    assert figures["attention, MATH: new shape"] > 0
    assert "not available" in figures["attention, CUDNN_ATTENTION"]


def test_the_training_stage_goes_on_after_a_batch_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure = cuda_stages.measure_steps

    def measure_few(name: str, model: Any, rows: Any, *more: Any) -> dict[str, float]:
        if len(rows) == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(name, model, rows, *more) | {"peak_memory_bytes": 5e9}

    monkeypatch.setattr(cuda_stages, "measure_steps", measure_few)
    figures = figures_of(cuda_stages.train(ON_CPU, bits=4))
    assert figures["batch 64"] == "out of memory"
    assert figures["batch 16: peak memory"] == 5.0
    ours, published = figures["batch 16: step"], figures["batch 16, published recipe: step"]
    assert figures["batch 16: ours / published"] == pytest.approx(published / ours)
    assert figures["batch 1: MFU"] > 0


def test_the_decoding_stage_shares_out_the_bandwidth() -> None:
    cases = [Decoding(1, 1, graphs=False), Decoding(3, 2)]
    figures = figures_of(cuda_stages.decode(ON_CPU, bits=4, cases=cases))
    for name in ("1 rows, batch 1, no graphs", "3 rows, batch 2"):
        share = figures[f"{name}: share of the bandwidth"]
        assert share == pytest.approx(10 * figures[f"{name}: reads"])  # in %, of 10 GB/s


@pytest.mark.parametrize("bits", [4, 8])
def test_the_kernels_of_all_four_weights_run(bits: int) -> None:
    assert cuda_stages.run_products(ON_CPU, bits, 3) == "torch"


def test_the_tiles_stage_times_every_candidate_by_the_back_end_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = triton_backend.fused_tile
    seen: list[Any] = []

    def fused(self: Any, x: Any, packed: Any, scale: Any, bits: int) -> None:
        seen.append(triton_backend.fused_tile(len(x), packed.shape[0], transposed=False))

    def matvec(x: Any, packed: Any, scale: Any, bits: int) -> None:
        seen.append(triton_backend.MATVEC_TILE)

    def median_ms(device: str, work: Any) -> float:
        work()
        return 1e-3 * max(seen[-1])  # as if a tile cost its longest side

    monkeypatch.setattr(triton_backend.TritonBackend, "matmul_transposed", fused)
    monkeypatch.setattr(triton_backend.TritonBackend, "_matvec", staticmethod(matvec))
    monkeypatch.setattr(cuda_tiles, "median_ms", median_ms)
    kinds = [cuda_tiles.Product(1, False), cuda_tiles.Product(16, True)]
    monkeypatch.setattr(cuda_tiles, "PRODUCTS", kinds)
    figures = figures_of(cuda_stages.tiles(ON_CPU))
    assert len(figures) == 4 * 2 * 2, "weights, products, used and fastest"
    assert figures["64 x 64, 1 rows: used (8, 512)"] == pytest.approx(512)
    assert figures["64 x 64, 1 rows: fastest (4, 256)"] == pytest.approx(256)
    assert figures["64 x 64, 16 rows, back: fastest (16, 64, 32, 4, 3)"] == pytest.approx(64)
    assert set(seen) >= {*cuda_tiles.MATVEC_TILES, *cuda_tiles.candidates(kinds[1])}
    assert triton_backend.fused_tile is table


# cuda: the process that runs the stages


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


FAKES = {
    "good": python("""print('50 %|###\\nFIGURE ["step", 12.5, "ms"]')"""),
    "slow": python(
        """print('FIGURE ["first", 1, "s"]', flush=True); import time; time.sleep(60)"""
    ),
    "bad": python("print('about to fail'); raise ValueError('no kernel')"),
    "last": python("""print('FIGURE ["speed", 9876.5, "tokens/s"]')"""),
}


def fake_stages(names: list[str], limit_s: float = 1.5) -> dict[str, Stage]:
    return {name: Stage(cuda_stages.nano, limit_s, name == "gpu") for name in names}


def run(tmp_path: Path, names: list[str], budget_s: float = 100, limit_s: float = 1.5) -> Any:
    return cuda.run_all(
        fake_stages(names, limit_s),
        FAKES.__getitem__,
        on_cuda=False,
        budget_s=budget_s,
        out=tmp_path,
    )


def test_a_stage_that_fails_or_hangs_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    write = cuda.write_results

    def write_and_read(out: Path, results: Any) -> None:
        write(out, results)
        written.append(list(json.loads((out / "results.json").read_text(encoding="utf-8"))))

    monkeypatch.setattr(cuda, "write_results", write_and_read)
    names = ["good", "gpu", "slow", "bad", "last"]
    results = run(tmp_path, names)
    assert written == [names[: count + 1] for count in range(5)], "rewritten after each"
    assert {name: result.status for name, result in results.items()} == {
        "good": "ok",
        "gpu": "skipped: it needs CUDA",
        "slow": "timed out",
        "bad": "failed with status 1",
        "last": "ok",
    }
    assert [result.has_failed for result in results.values()] == [False, False, True, True, False]
    assert results["slow"].figures == [Figure("first", 1, "s")], "what was known is kept"
    assert results["slow"].time_s < 5
    stored = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert stored["good"]["figures"] == [{"name": "step", "value": 12.5, "unit": "ms"}]
    assert stored["bad"]["output"][0] == "about to fail"
    assert stored["bad"]["output"][-1] == "ValueError: no kernel"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["bad.log", "results.json", "slow.log"]


def test_the_table_has_a_line_for_each_figure_and_the_end_of_a_failed_stage(tmp_path: Path) -> None:
    lines = cuda.table(run(tmp_path, ["good", "bad", "last"])).splitlines()
    assert lines[0].split() == ["good", "step", "12.5", "ms"]
    assert lines[1].startswith("bad            failed with status 1")
    assert "| ValueError: no kernel" in lines[-2]
    assert lines[-1].split() == ["last", "speed", "9,876", "tokens/s"]


def test_stages_without_time_left_are_not_started(tmp_path: Path) -> None:
    (result,) = run(tmp_path, ["good"], budget_s=5).values()
    assert result.status.startswith("not started")
    assert not result.has_failed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_stage_and_its_processes_and_leaves_the_results(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child"
    code = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(child)!r}).write_text(str(child.pid))
time.sleep(60)
"""
    monkeypatch.setitem(FAKES, "slow", python(code))
    before = signal.signal(number, signal.default_int_handler)

    def interrupt() -> None:
        while not (child.exists() and child.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        results = run(tmp_path, ["good", "slow", "last"], limit_s=30)
    finally:
        thread.join()
        signal.signal(number, before)
    assert {name: result.status for name, result in results.items()} == {
        "good": "ok",
        "slow": "stopped",
    }
    assert list(json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))) == [
        "good",
        "slow",
    ]
    status, ends_at = Path(f"/proc/{child.read_text()}/status"), time.monotonic() + 5
    while status.exists() and "zombie" not in status.read_text(encoding="utf-8"):
        assert time.monotonic() < ends_at  # it ends a moment after it was killed
        time.sleep(0.02)


def test_without_a_gpu_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--device cpu --size tiny" in line


@pytest.mark.slow
def test_a_whole_run_on_a_cpu_ends_with_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", "--size", "tiny", "--only", "tests", "memory-int4"]
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert cuda.main([*words, "--out", str(tmp_path)]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["tests"]["status"] == "skipped: it needs CUDA"
    names = [figure["name"] for figure in results["memory-int4"]["figures"]]
    ways = ("0 checkpointed layers", "2 checkpointed layers", "2 checkpointed layers, chunks of 16")
    assert names == ["weights", *(f"{way}: peak" for way in ways)]
    printed = capsys.readouterr().out
    assert "memory-int4    2 checkpointed layers: peak" in printed
    assert printed.rstrip().endswith("results.json")
