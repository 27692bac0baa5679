"""Flat rows give what separate rows give: logits, loss, gradient, generated tokens."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ptuning  # noqa: F401  (registers the model)
from ptuning.data.tokenization import pad_right
from ptuning.model.positions import find_layout, flatten_rows, keep_needed, unflatten_rows

LENGTHS = (19, 7, 30, 12)


@pytest.fixture
def model(golden):
    folder = golden / "chatglm-tiny"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.add_prefix(8).load_state_dict(load_file(folder / "prefix.safetensors"))
    model.prefix_encoder.dropout = 0.0
    model.freeze_base()
    return model


def training_rows(model):
    """Rows of context, <sop>, answer; labels from <sop> on."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(10, 900, (length,), generator=generator)
        sop = length // 2
        ids[sop - 1], ids[sop] = model.config.gmask_token_id, model.config.bos_token_id
        labels = ids.clone()
        labels[:sop] = -100
        rows.append((ids, labels))
    return rows


def batch(rows, side):
    width = max(LENGTHS)
    ids = torch.full((len(rows), width), 3)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, (row, row_labels) in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), None)
        ids[index, place], labels[index, place], mask[index, place] = row, row_labels, 1
    return ids, labels, mask


def loss_and_gradient(model, batches, total):
    model.train()
    model.prefix_encoder.zero_grad()
    loss = 0.0
    for ids, labels, mask in batches:
        part = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=total).loss
        part.backward()
        loss += part.item()
    return loss, model.prefix_encoder.embedding.weight.grad.clone()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_flat_batch_has_the_loss_and_gradient_of_its_rows_alone(model, side, checkpointing):
    rows = training_rows(model)
    total = sum(int((labels != -100).sum()) for _, labels in rows)
    alone = [(i[None], lab[None], torch.ones_like(i)[None]) for i, lab in rows]
    expected_loss, expected = loss_and_gradient(model, alone, total)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradient = loss_and_gradient(model, [batch(rows, side)], total)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_of_real_tokens_do_not_depend_on_padding(model, side):
    model.eval()
    rows = training_rows(model)
    ids, _, mask = batch(rows, side)
    with torch.no_grad():
        flat = model(ids, attention_mask=mask).logits
        for index, (row, _) in enumerate(rows):
            alone = model(row[None]).logits[0]
            torch.testing.assert_close(flat[index][mask[index].bool()], alone, atol=1e-4, rtol=0)


def test_only_real_tokens_reach_the_linear_layers(model):
    rows = training_rows(model)
    ids, labels, mask = batch(rows, "right")
    seen = {}
    for index, layer in enumerate(model.transformer.layers):
        layer.mlp.register_forward_hook(
            lambda _m, inputs, _o, index=index: seen.update({index: inputs[0].shape[:2]})
        )
    model.train()(ids, attention_mask=mask, labels=labels)
    answer_tokens = sum(int((row_labels[1:] != -100).sum()) for _, row_labels in rows)
    assert seen[0] == (1, sum(LENGTHS))
    assert seen[26] == (1, sum(LENGTHS))
    assert seen[27] == (1, answer_tokens)


def test_flattening_and_unflattening_are_inverse():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    needed = torch.tensor([[False, True, True], [False, False, True]])
    grid = torch.randn(2, 3, 4) * mask[..., None]
    layout = find_layout(mask, needed)
    flat = flatten_rows(grid, layout)
    assert flat.shape == (1, 4, 4)
    assert unflatten_rows(flat, layout).equal(grid)
    assert keep_needed(flat, layout).equal(flatten_rows(grid, layout, only_needed=True))
    assert keep_needed(flat, layout)[0].equal(grid[mask.bool() & needed])


def test_unflattening_keeps_nothing_of_the_flat_tokens_for_the_backward_pass():
    layout = find_layout(torch.tensor([[1, 1, 0], [0, 1, 1]]), None)
    flat = torch.randn(1, 4, 5, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grid = unflatten_rows(flat, layout)
    assert not [tensor for tensor in kept if tensor.is_floating_point()]
    (gradient,) = torch.autograd.grad((grid * 3).sum(), flat)
    assert gradient.equal(torch.full_like(flat, 3.0))


def test_a_batch_as_collated_gives_the_loss_and_gradient_of_its_labels(model):
    """The collator's indices and those that the model derives by itself are the same."""
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in training_rows(model)]
    collated = pad_right(rows, pad_id=3)
    grids = [collated[name] for name in ("input_ids", "labels", "attention_mask")]
    expected = loss_and_gradient(model, [grids], total=7)
    model.prefix_encoder.zero_grad()
    loss = model(**collated, num_items_in_batch=7).loss
    loss.backward()
    assert loss.item() == expected[0]
    assert model.prefix_encoder.embedding.weight.grad.equal(expected[1])


def test_indices_that_are_not_complete_are_derived(model):
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in training_rows(model)]
    collated = pad_right(rows, pad_id=3)
    expected = model.eval()(**collated).loss
    for missing in ("tokens", "needed", "targets"):
        some = {name: value for name, value in collated.items() if name != missing}
        assert model(**some).loss == expected


def test_hidden_states_can_be_had_beside_the_loss(model):
    """All of them are asked for, so nothing is flat; the loss is the same."""
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in training_rows(model)]
    collated = pad_right(rows, pad_id=3)
    flat = model(**collated)
    whole = model(**collated, output_hidden_states=True)
    assert whole.hidden_states[-1].shape[:2] == collated["input_ids"].shape
    torch.testing.assert_close(whole.loss, flat.loss)
