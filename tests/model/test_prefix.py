"""What training may change, and in which arithmetic: the invariants of P-Tuning v2."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, set_seed

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.prefix_encoder import PrefixEncoder, join_prefix

Model = ChatGLMForConditionalGeneration
Build = Callable[..., Model]
# transformers 5.10 has gradient_checkpointing_enable only; 5.23 has it under a new name as well.
OLD_NAME = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def prefix_gradients(model: Model, batch: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Return fresh gradients of the prefix's parameters, in order."""
    model.zero_grad()
    model(**batch, **options).loss.backward()
    return [parameter.grad.clone() for parameter in model.prefix_encoder.parameters()]


def assert_close_relative(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() <= tolerance * b.norm()


def train(model: Model, batch: dict[str, Tensor], *, steps: int) -> list[float]:
    """Take AdamW steps at the published learning rate; return the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("project", [False, True])
def test_only_the_prefix_gets_a_gradient(
    small: Model, training_batch: dict[str, Tensor], project: bool
) -> None:
    small.add_prefix(5, project=project)
    small.freeze_base()
    small.train()
    small(**training_batch).loss.backward()
    with_gradient = {name for name, value in small.named_parameters() if value.grad is not None}
    prefix = {name for name, _ in small.named_parameters() if "prefix_encoder." in name}
    assert len(prefix) == (5 if project else 1)
    assert with_gradient == prefix
    assert {name for name, _ in small.base_parameters()} == (
        {name for name, _ in small.named_parameters()} - prefix
    )


@pytest.mark.parametrize("project", [False, True])
def test_steps_change_the_prefix_and_no_bit_of_the_base(
    small: Model, training_batch: dict[str, Tensor], project: bool
) -> None:
    small.add_prefix(5, project=project)
    small.freeze_base()
    before = copy.deepcopy(small.state_dict())
    small.train()
    losses = train(small, training_batch, steps=5)
    assert losses[-1] < losses[0]
    for name, value in small.state_dict().items():
        assert torch.equal(value, before[name]) != ("prefix_encoder." in name), name


def test_the_prefix_gets_its_gradient_after_an_evaluation_pass(
    small: Model, training_batch: dict[str, Tensor], left_padded: dict[str, Tensor]
) -> None:
    """Nothing computed without gradient, as in `generate`, may be kept and used for training."""
    small.freeze_base()
    wanted = prefix_gradients(small, training_batch)
    with torch.no_grad():
        small(**training_batch)
    small.generate(**left_padded, max_new_tokens=3)
    assert_close_relative(prefix_gradients(small, training_batch), wanted, 0.0)


@OLD_NAME
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_checkpointing_changes_no_gradient(
    small: Model,
    training_batch: dict[str, Tensor],
    project: bool,
    use_reentrant: bool,
    dropout: float,
) -> None:
    encoder = small.add_prefix(5, project=project)
    encoder.dropout = dropout
    small.freeze_base()
    small.train()
    set_seed(3)
    wanted = prefix_gradients(small, training_batch)
    small.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    set_seed(3)
    found = prefix_gradients(small, training_batch)
    assert_close_relative(found, wanted, 1e-6)
    set_seed(4)
    differs = any(
        not torch.allclose(a, b)
        for a, b in zip(prefix_gradients(small, training_batch), wanted, strict=True)
    )
    assert differs == (dropout > 0), "the seed matters exactly where there is dropout"


def test_dropout_is_drawn_for_every_row_and_in_training_only(small: Model) -> None:
    rows = torch.tensor([[5, 6, 7, 61, 62, 8]]).repeat(3, 1)
    with torch.no_grad():
        still = small(rows).logits
        small.train()
        dropped = small(rows).logits
        again = small(rows).logits
    assert torch.equal(still[0], still[1])
    assert not torch.allclose(dropped[0], dropped[1])
    assert not torch.allclose(dropped[1], dropped[2])
    assert not torch.allclose(dropped, again)


def test_join_prefix_places_drops_and_scales() -> None:
    prefix = torch.arange(1.0, 2 * 2 * 4 * 3 + 1).view(2, 1, 2, 4, 3)  # (2, 1, H, P, D)
    keys, values = torch.full((5, 2, 6, 3), -1.0), torch.full((5, 2, 6, 3), -2.0)
    joined_keys, joined_values = join_prefix(prefix, keys, values, dropout=0.0)
    assert joined_keys.shape == joined_values.shape == (5, 2, 10, 3)  # (B, H, P + S, D)
    assert torch.equal(joined_keys[:, :, :4], prefix[0].expand(5, -1, -1, -1))
    assert torch.equal(joined_values[:, :, :4], prefix[1].expand(5, -1, -1, -1))
    assert torch.equal(joined_keys[:, :, 4:], keys)
    assert torch.equal(joined_values[:, :, 4:], values)
    in_half = join_prefix(prefix, keys.bfloat16(), values.bfloat16(), dropout=0.0)
    assert [joined.dtype for joined in in_half] == [torch.bfloat16] * 2, "tokens set the type"
    set_seed(0)
    dropped_keys, dropped_values = join_prefix(prefix, keys, values, dropout=0.5)
    for found, whole in ((dropped_keys, joined_keys), (dropped_values, joined_values)):
        assert torch.equal(found[:, :, 4:], whole[:, :, 4:]), "real tokens are never dropped"
        kept = found[:, :, :4] != 0
        assert torch.equal(found[:, :, :4][kept], 2 * whole[:, :, :4][kept])
        assert 0.25 < kept.float().mean() < 0.75
        assert not torch.equal(kept[0], kept[1])


def test_the_table_holds_each_layers_keys_then_its_values() -> None:
    encoder = PrefixEncoder(prefix_length=3, num_layers=2, num_heads=2, head_dim=4, project=False)
    assert encoder.embedding.weight.shape == (3, 2 * 2 * 8)
    with torch.no_grad():
        encoder.embedding.weight.copy_(torch.arange(96.0).view(3, 32))
    layers = encoder(torch.float32)
    assert [layer.shape for layer in layers] == [(2, 1, 2, 3, 4)] * 2  # (2, 1, H, P, D)
    for layer_index, layer in enumerate(layers):
        for kind in range(2):  # keys, values
            for head in range(2):
                for token in range(3):
                    first = 32 * token + 8 * (2 * layer_index + kind) + 4 * head
                    wanted = torch.arange(float(first), first + 4)
                    assert torch.equal(layer[kind, 0, head, token], wanted)


def test_a_projected_encoder_has_the_published_names_and_shapes() -> None:
    encoder = PrefixEncoder(prefix_length=3, num_layers=2, num_heads=2, head_dim=4, project=True)
    assert {name: tuple(value.shape) for name, value in encoder.state_dict().items()} == {
        "embedding.weight": (3, 8),
        "trans.0.weight": (8, 8),
        "trans.0.bias": (8,),
        "trans.2.weight": (32, 8),
        "trans.2.bias": (32,),
    }
    layers = encoder(torch.bfloat16)
    assert [(layer.shape, layer.dtype) for layer in layers] == [
        ((2, 1, 2, 3, 4), torch.bfloat16)
    ] * 2


@pytest.mark.parametrize("length", [0, -1])
def test_a_prefix_of_no_tokens_is_refused(small: Model, length: int) -> None:
    with pytest.raises(ValueError, match=rf"prefix_length is {length}; use 1 or more"):
        small.add_prefix(length)


def test_the_config_follows_the_prefix(small: Model) -> None:
    small.add_prefix(7, project=True)
    assert (small.config.pre_seq_len, small.config.prefix_projection) == (7, True)
    assert small.transformer.config.pre_seq_len == 7
    small.add_prefix(2)
    assert (small.config.pre_seq_len, small.config.prefix_projection) == (2, False)
    small.remove_prefix()
    assert (small.config.pre_seq_len, small.config.prefix_projection) == (None, False)
    assert small.prefix_encoder is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("project", [False, True])
def test_a_half_base_trains_a_float32_prefix(
    tmp_path: Path,
    build_small: Build,
    training_batch: dict[str, Tensor],
    dtype: torch.dtype,
    project: bool,
) -> None:
    build_small(initializer_range=0.1).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, pre_seq_len=6, prefix_projection=project
    )
    for name, value in model.named_parameters():
        assert value.dtype == (torch.float32 if "prefix_encoder." in name else dtype), name
    model.freeze_base()
    model.train()
    model.prefix_encoder.dropout = 0.0
    losses = train(model, training_batch, steps=5)
    assert losses[-1] < losses[0]
    assert all(value.isfinite().all() for value in model.prefix_encoder.parameters())
    assert model(**training_batch).loss.dtype == torch.float32, "cross-entropy is float32"


def test_a_prefix_attached_to_a_half_model_stays_float32(small: Model) -> None:
    small.bfloat16()
    encoder = small.add_prefix(4, project=True)
    assert {value.dtype for value in encoder.parameters()} == {torch.float32}
    assert {layer.dtype for layer in small.transformer.prefix_for(True)} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_model_equals_loading_it_so(
    tmp_path: Path, build_small: Build, left_padded: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """The rotary frequencies are float32 in both: bfloat16 would bend them by up to 0.4 %."""
    build_small().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    cast = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval().to(dtype)
    assert cast.transformer.inverse_frequencies.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(cast(**left_padded).logits, loaded(**left_padded).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_autocast_trains_as_the_trainer_does_with_bf16_and_fp16(
    small: Model, training_batch: dict[str, Tensor], dtype: torch.dtype, implementation: str
) -> None:
    small.set_attn_implementation(implementation)
    small.freeze_base()
    wanted = prefix_gradients(small, training_batch)
    with torch.autocast("cpu", dtype=dtype):
        found = prefix_gradients(small, training_batch)
    assert found[0].dtype == torch.float32
    # bfloat16 keeps 8 bits; three layers of it leave a few per cent.
    assert_close_relative(found, wanted, 0.1)


@pytest.mark.parametrize("project", [False, True])
def test_a_fresh_prefix_is_drawn_the_same_way_wherever_it_comes_from(
    tmp_path: Path, build_small: Build, project: bool
) -> None:
    """Table N(0, 1); the projection as torch draws a linear layer, uniform in 1/sqrt(E)."""
    build_small().save_pretrained(tmp_path)
    built = build_small(pre_seq_len=64, prefix_projection=project)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, pre_seq_len=64, prefix_projection=project
    )
    added = build_small()
    added.add_prefix(64, project=project)
    for model in (built, loaded, added):
        encoder = model.prefix_encoder
        assert encoder.prefix_length == model.config.pre_seq_len == 64
        table = encoder.embedding.weight.detach()
        assert table.shape == (64, 32 if project else 2 * 3 * 32)
        assert abs(table.mean()) < 0.1
        assert abs(table.std() - 1) < 0.1
        if project:
            for layer in (encoder.trans[0], encoder.trans[2]):
                for weight in (layer.weight.detach(), layer.bias.detach()):
                    bound = 32**-0.5
                    assert weight.abs().max() <= bound
                    assert abs(weight.std() - bound / 3**0.5) < 0.2 * bound


@pytest.mark.parametrize("project", [False, True])
def test_one_batch_of_eight_equals_eight_of_one(
    small: Model, training_batch: dict[str, Tensor], project: bool
) -> None:
    """Rows have 2 to 6 answer tokens: a mean of means would weigh them wrongly."""
    small.add_prefix(5, project=project)
    small.freeze_base()
    batch = {name: value.repeat(2, 1) for name, value in training_batch.items()}
    batch["input_ids"][4:, 0] += 20  # eight different rows
    num_items = int((batch["labels"][:, 1:] != -100).sum())
    together = prefix_gradients(small, batch)
    small.zero_grad()
    losses = []
    for row in range(8):
        part = {name: value[row : row + 1] for name, value in batch.items()}
        width = int(part["attention_mask"].sum())
        part = {name: value[:, :width] for name, value in part.items()}  # no padding at all
        loss = small(**part, num_items_in_batch=num_items).loss
        loss.backward()
        losses.append(loss.item())
    one_by_one = [parameter.grad for parameter in small.prefix_encoder.parameters()]
    assert_close_relative(one_by_one, together, 1e-5)
    assert sum(losses) == pytest.approx(small(**batch).loss.item(), rel=1e-5)
    as_tensor = small(**batch, num_items_in_batch=torch.tensor(num_items)).loss
    assert as_tensor.item() == pytest.approx(sum(losses), rel=1e-5)


def test_the_loss_is_the_shifted_cross_entropy(
    small: Model, training_batch: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        output = small(**training_batch)
        logits = small(
            **{name: value for name, value in training_batch.items() if name != "labels"}
        ).logits
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)
    assert small.train()(**training_batch).logits is None
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), training_batch["labels"][:, 1:].flatten()
    )
    assert output.loss.shape == ()
    torch.testing.assert_close(output.loss, wanted, atol=1e-6, rtol=1e-6)


@OLD_NAME
def test_generation_in_training_mode(small: Model, left_padded: dict[str, Tensor]) -> None:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    wanted = small.generate(**left_padded, **options)
    small.prefix_encoder.dropout = 0.0
    small.train()
    assert torch.equal(small.generate(**left_padded, **options), wanted)
    small.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient checkpointing.*call model\.eval\(\)"):
        small.generate(**left_padded, **options)
    small.eval()
    assert torch.equal(small.generate(**left_padded, **options), wanted)


def test_outputs_come_as_a_tuple_when_asked(small: Model, left_padded: dict[str, Tensor]) -> None:
    with torch.no_grad():
        wanted = small(**left_padded).logits
        assert torch.equal(small(**left_padded, return_dict=False)[0], wanted)
        small.config.return_dict = False
        assert torch.equal(small(**left_padded)[0], wanted)
