"""Every back end on a real card against the reference; each test skips, with the reason, a back end that is missing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ptuning
from ptuning.model.quantization import torch_backend
from ptuning.model.quantization.backends import BACKEND_NAMES, get_backend, pick_backend
from ptuning.model.quantization.layers import QuantizedLinear, quantize_model_
from ptuning.model.quantization.reference import QuantizedWeight, quantize_weight
from tests.model.quantization.conftest import exact_product, product_tolerance

pytestmark = pytest.mark.gpu

BITS = [4, 8]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Decoding, the fused products at both ends of their range, and a batch left to the library.
ROWS = [1, 4, 5, 130, 300]
SIZES = [
    (4096, 4096),
    (520, 1000),
    (37, 42),
]  # whole tiles, broken tiles, and rows that no vector fits


@pytest.fixture
def device() -> torch.device:
    """The first card."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", 0)


def skip_if_missing(name: str, device: torch.device, dtype: torch.dtype) -> None:
    reason = get_backend(name).unavailable_reason(device, dtype)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


def random_weight(num_out: int, num_in: int, bits: int, device: torch.device) -> QuantizedWeight:
    torch.manual_seed(0)
    return quantize_weight(torch.randn(num_out, num_in, device=device) * 0.05, bits)


@pytest.mark.parametrize("name", BACKEND_NAMES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_both_products_agree_with_the_reference(
    device: torch.device, name: str, bits: int, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    skip_if_missing(name, device, dtype)
    num_out, num_in = size
    weight = random_weight(num_out, num_in, bits, device)
    backend = get_backend(name)
    for num_rows in ROWS:
        for transposed, width in ((False, num_in), (True, num_out)):
            x = torch.randn(num_rows, width, device=device).to(dtype)
            product = backend.matmul_transposed if transposed else backend.matmul
            result = product(x, *weight, bits)
            assert result.dtype == dtype
            error = (result.double() - exact_product(x, weight, bits, transposed=transposed)).abs()
            bound = product_tolerance(x, weight, bits, transposed=transposed)
            worst = (error / bound).max().item()
            assert worst <= 1, (
                f"{num_rows} rows, transposed={transposed}: {worst} times the tolerance"
            )


@pytest.mark.parametrize("bits", BITS)
def test_quantising_on_the_card_gives_the_same_bytes_as_on_the_cpu(
    device: torch.device, bits: int
) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(512, 512) * 0.05).to(torch.float16)
    here, there = quantize_weight(weight, bits), quantize_weight(weight.to(device), bits)
    assert torch.equal(here.packed, there.packed.cpu())
    assert torch.equal(here.scale, there.scale.cpu())


@pytest.mark.parametrize("name", BACKEND_NAMES)
@pytest.mark.parametrize("bits", BITS)
def test_the_published_logits_are_met_on_the_card(
    device: torch.device, golden: Path, name: str, bits: int
) -> None:
    from safetensors.torch import load_file

    skip_if_missing(name, device, torch.float32)
    folder = golden / "chatglm-tiny"
    tensors = load_file(folder / "cases.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ptuning.load_prefix(model, folder / "prefix.safetensors")
    quantize_model_(model.to(device), bits, name)
    ids, positions = tensors["forward_prefix.input_ids"], tensors["forward_prefix.position_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids.to(device), position_ids=positions.to(device)).logits.cpu()
    real = ids != model.config.pad_token_id
    torch.testing.assert_close(
        logits[real], tensors[f"forward_int{bits}.logits"][real], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_on_a_small_card_a_training_step_never_holds_the_float_weight(
    device: torch.device,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """The float16 weight would take 16384 x 4096 x 2 = 128 MiB; a step may need a quarter of that."""
    skip_if_missing(name, device, torch.float16)
    monkeypatch.setattr(torch_backend, "total_memory", lambda _device: 2 * 2**30)
    layer = QuantizedLinear(4096, 16384, bits=4, backend=name, device=device, dtype=torch.float16)
    x = torch.randn(64, 4096, device=device, dtype=torch.float16, requires_grad=True)
    layer(x).float().sum().backward()  # tuning and workspaces, once
    x.grad = None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    layer(x).float().sum().backward()
    extra_mib = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    record_property("extra_mib", extra_mib)
    activations_mib = (
        64 * 16384 * (2 + 4 + 4 + 2) / 2**20
    )  # product, its float copy, and their gradients
    assert extra_mib <= activations_mib + 64


def test_auto_picks_a_compiled_back_end_on_a_card(device: torch.device) -> None:
    name = pick_backend("auto", device, torch.float16, 4).name
    missing = [
        other
        for other in BACKEND_NAMES[: BACKEND_NAMES.index(name)]
        if get_backend(other).unavailable_reason(device, torch.float16) is None
    ]
    assert not missing
