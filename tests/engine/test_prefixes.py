"""Rows that see prefixes of a stack, each compared with its own prefixes by itself, in float64."""

import random
import weakref

import pytest
import torch

from ptuning.engine import prefixes as prefix_rows
from ptuning.engine.engine import Engine
from ptuning.engine.prefixes import (
    MAX_STACK_RATIO,
    PrefixCache,
    PrefixStack,
    SharedPrefix,
    mix_prefixes,
)
from ptuning.engine.request import Request

CPU = torch.device("cpu")
NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 3, 8
LENGTHS = {"A": 5, "B": 3, "C": 8, "D": 1, "E": 4}
NEVER = frozenset({64})  # beyond the small model's vocabulary

# What rows see: the letter of a prefix for its weight 1, pairs for other weights, () for the base.
SCENES = {
    "all see one": ["A", "A", "A"],
    "one row": ["C"],
    "one row of two prefixes": [[("A", 0.3), ("B", 0.7)]],
    "one weighted": [[("A", 0.5)], [("A", 2.0)], "A"],
    "base next to one": ["A", (), "A", ()],
    "base first": [(), (), "B"],
    "different lengths": ["B", "A", "C", "A", "D"],
    "idle places": ["A", "A", "A", "B", "A", "A", "A"],
    "blends and others": [[("A", 0.7), ("C", 0.3)], "B", (), [("C", 1.5), ("A", 0.1)], "C"],
    "a blend with itself": [[("A", 0.5), ("A", 0.5)], "B", "A"],
}


def new_prefix(length, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(100 * length + seed)
    shape = (2, 1, NUM_HEADS, length, HEAD_DIM)
    layers = [torch.randn(shape, generator=generator) for _ in range(NUM_LAYERS)]
    return SharedPrefix([layer.to(dtype) for layer in layers])


def prefixes_in(dtype):
    return {name: new_prefix(length, dtype) for name, length in LENGTHS.items()}


@pytest.fixture
def prefixes():
    return prefixes_in(torch.float32)


def shares_of(scene, prefixes):
    return [
        mix_prefixes([(prefixes[pair[0]], float((*pair, 1)[1])) for pair in row]) for row in scene
    ]


def tokens_seen(seen, shares):
    """Yield (row, share, the columns of its tokens)."""
    for row, of_row in enumerate(shares):
        for place, share in enumerate(of_row):
            start = place * seen.stack.length
            yield row, share, slice(start, start + share.prefix.length)


def assert_within(found, exact, magnitudes, dtype):
    """Compare with float64, given the sum of the absolute terms: each addition rounds once."""
    rounding = torch.finfo(dtype).eps
    bound = 16 * rounding * magnitudes + torch.finfo(dtype).tiny
    assert ((found.double() - exact).abs() <= bound).all()


def assert_rows_see_their_own(seen, shares, dtype):
    """Compare keys, values, scores, mask and sums of every layer with a loop over rows."""
    num_rows = len(shares)
    torch.manual_seed(1)
    query = torch.randn(num_rows, NUM_HEADS, HEAD_DIM).to(dtype)
    weights = torch.rand(num_rows, NUM_HEADS, seen.width).to(dtype)  # not 0 where there is no key
    output = torch.randn(num_rows, NUM_HEADS, HEAD_DIM).to(dtype)
    mask = torch.full((num_rows, 1, seen.width), torch.finfo(torch.float32).min)
    for layer in range(NUM_LAYERS):
        key_values = seen.key_values(layer)
        scores = seen.scores(layer, query)
        added = seen.add_values(layer, weights, output)
        assert key_values.shape[1] in (1, num_rows)
        assert key_values.shape[3:] == (seen.width, HEAD_DIM)
        assert scores.shape == (num_rows, NUM_HEADS, seen.width)
        assert scores.dtype is torch.float32
        assert added.dtype is dtype
        exact, magnitudes = output.double(), output.double().abs()
        for row, share, columns in tokens_seen(seen, shares):
            own = share.prefix.key_values[layer][:, 0]  # (2, H, P, D)
            held = key_values[:, min(row, key_values.shape[1] - 1), :, columns]
            assert torch.equal(held, own)
            keys, values = own.double()
            terms = query[row].double().unsqueeze(1) * keys  # (H, P, D)
            found = scores[row, :, columns]
            assert_within(found, terms.sum(-1), terms.abs().sum(-1), torch.float32)
            drawn = weights[row, :, columns].double().unsqueeze(-1) * values  # (H, P, D)
            exact[row] += drawn.sum(1)
            magnitudes[row] += drawn.abs().sum(1)
            mask[row, 0, columns] = share.log_weight
        assert_within(added, exact, magnitudes, dtype)
    assert torch.equal(seen.mask, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
def test_every_row_sees_its_own_prefixes(scene, dtype):
    shares = shares_of(scene, prefixes_in(dtype))
    assert_rows_see_their_own(PrefixCache(CPU).lookup(shares), shares, dtype)


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
def test_weights_scale_what_a_prefix_draws_in_the_softmax(scene, prefixes):
    """The definition: a token of a prefix with weight w counts w * exp(score)."""
    shares = shares_of(scene, prefixes)
    seen = PrefixCache(CPU).lookup(shares)
    torch.manual_seed(2)
    query = torch.randn(len(shares), NUM_HEADS, HEAD_DIM)
    own_key, own_value = torch.randn(2, len(shares), NUM_HEADS, HEAD_DIM)
    own_score = (query * own_key).sum(-1, keepdim=True)  # (R, H, 1)
    scores = torch.cat((seen.scores(1, query) + seen.mask, own_score), dim=-1)
    weights = scores.softmax(dim=-1)
    found = seen.add_values(1, weights[..., :-1], weights[..., -1:] * own_value)

    total = own_score.double().exp()  # (R, H, 1)
    drawn = total * own_value.double()
    for row, share, columns in tokens_seen(seen, shares):
        keys, values = share.prefix.key_values[1][:, 0].double()
        counts = (query[row].double().unsqueeze(1) * keys).sum(-1).exp()  # (H, P)
        counts *= torch.tensor(share.log_weight).double().exp()
        total[row] += counts.sum(-1, keepdim=True)
        drawn[row] += (counts.unsqueeze(-1) * values).sum(1)
        assert weights[row, :, columns].gt(0).all()
    num_tokens = [sum(share.prefix.length for share in row) for row in shares]
    assert weights[..., :-1].count_nonzero(dim=-1)[:, 0].tolist() == num_tokens
    # exp multiplies the rounding of a score (here below 20) by as much
    torch.testing.assert_close(found.double(), drawn / total, rtol=2e-5, atol=2e-5)


def test_rows_that_come_and_go_see_their_own_on_the_stacks_that_stay(prefixes):
    rng = random.Random(0)
    cache = PrefixCache(CPU)
    letters = [*LENGTHS, ()]
    rows, stacks = [], []
    for _ in range(40):
        rng.shuffle(rows)
        del rows[rng.randint(0, 4) :]
        joining = rng.choices(letters, k=rng.randint(1, 3))
        staying = shares_of(rows, prefixes)
        rows += joining
        for part in (joining, rows):  # as the engine asks: the admitted rows, then all
            shares = shares_of(part, prefixes)
            seen = cache.lookup(shares, staying=staying if part is joining else ())
            if seen is None:
                assert not any(shares)
                continue
            assert_rows_see_their_own(seen, shares, torch.float32)
            stacks.append(seen.stack)
    num_stacks = len(set(map(id, stacks)))
    assert 5 < num_stacks < len(stacks) / 2


def test_rows_of_the_base_alone_see_nothing():
    cache = PrefixCache(CPU)
    assert cache.lookup([]) is None
    assert cache.lookup([(), ()]) is None


def test_one_prefix_is_not_copied(prefixes):
    prefix = prefixes["A"]
    alone = PrefixCache(CPU).lookup(shares_of(["A", "A"], prefixes))
    assert alone.groups is None
    next_to_base = PrefixCache(CPU).lookup(shares_of(["A", ()], prefixes))
    for layer, held in enumerate(prefix.key_values):
        assert alone.key_values(layer) is held
        assert alone.stack.layers[layer] is next_to_base.stack.layers[layer] is held


def test_a_stack_holds_every_prefix_once_and_zeros_at_the_ends(prefixes):
    seen = PrefixCache(CPU).lookup(shares_of("ABAABBAB", prefixes))
    assert list(seen.stack.places) == [prefixes["A"], prefixes["B"]]
    for stacked in seen.stack.layers:
        assert stacked.shape == (2, 2, NUM_HEADS, LENGTHS["A"], HEAD_DIM)
        assert not stacked[:, 1, :, LENGTHS["B"] :].any()


def test_a_stack_stays_while_few_of_its_prefixes_are_idle(prefixes):
    assert MAX_STACK_RATIO == 2
    cache = PrefixCache(CPU)

    def stack_for(scene):
        shares = shares_of(scene, prefixes)
        seen = cache.lookup(shares)
        assert_rows_see_their_own(seen, shares, torch.float32)
        return seen.stack

    four = stack_for("ABCD")
    assert stack_for("DAC") is four
    assert stack_for(["D", (), "D", "B"]) is four, "four held, two in use"
    one = stack_for("D")
    assert one is not four, "four held, one in use"
    assert list(one.places) == [prefixes["D"]]
    two = stack_for("DE")
    assert two is not one, "E is not in the stack"
    assert stack_for("E") is two
    assert stack_for("D") is two


def test_the_same_shares_are_found_once(prefixes):
    cache = PrefixCache(CPU)
    scene = ["A", (), [("A", 0.5), ("B", 0.5)]]
    asked = shares_of(scene, prefixes)
    first = cache.lookup(asked)
    assert cache.lookup(shares_of(scene, prefixes)) is first
    assert cache.lookup(tuple(shares_of(scene, prefixes))) is first
    asked[0] = ()  # the asker's list is the asker's
    assert cache.lookup(shares_of(scene, prefixes)) is first
    changed = cache.lookup(asked)
    assert changed is not first
    assert_rows_see_their_own(changed, asked, torch.float32)
    weighted = shares_of(["A", (), [("A", 0.4), ("B", 0.6)]], prefixes)
    assert_rows_see_their_own(cache.lookup(weighted), weighted, torch.float32)


def test_a_stack_that_cannot_be_made_leaves_nothing_half_found(prefixes, monkeypatch):
    cache = PrefixCache(CPU)
    cache.lookup(shares_of("AAB", prefixes))
    shares = shares_of("CCD", prefixes)
    with monkeypatch.context() as patch:
        patch.setattr(PrefixStack, "_stack", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            cache.lookup(shares)
    assert_rows_see_their_own(cache.lookup(shares), shares, torch.float32)


def held_after(ask):
    """Return the letters of the prefixes that live on, held by nothing but the finder, after ask."""
    cache, prefixes = PrefixCache(CPU), prefixes_in(torch.float32)
    references = {name: weakref.ref(prefix) for name, prefix in prefixes.items()}
    ask(cache, prefixes)
    prefixes.clear()
    return {name for name, reference in references.items() if reference() is not None}


def test_nothing_is_held_that_is_forgotten_or_no_longer_in_use():
    def ask(*scenes):
        def asking(cache, prefixes):
            for scene in scenes:
                cache.lookup(shares_of(scene, prefixes))

        return asking

    def forget(cache, prefixes):
        ask("ABC")(cache, prefixes)
        cache.clear()

    assert held_after(ask("ABC")) == {"A", "B", "C"}
    assert held_after(forget) == set()
    assert held_after(ask("ABC", "A")) == {"A"}
    assert held_after(ask("ABC", [(), ()])) == set()


def test_admitted_rows_keep_the_prefixes_of_the_others_in_the_stack(prefixes):
    cache = PrefixCache(CPU)
    all_rows = shares_of("ABCD", prefixes)
    stack = cache.lookup(all_rows).stack
    joining = shares_of("AA", prefixes)
    seen = cache.lookup(joining, staying=all_rows)
    assert seen.stack is stack
    assert_rows_see_their_own(seen, joining, torch.float32)
    assert cache.lookup(shares_of([()], prefixes), staying=all_rows) is None
    assert cache.lookup(all_rows).stack is stack
    new = cache.lookup(shares_of("E", prefixes), staying=all_rows).stack
    assert new is not stack
    assert cache.lookup([*all_rows, *shares_of("E", prefixes)]).stack is new


@torch.no_grad()
def test_the_engine_copies_prefixes_only_for_a_new_one(small, prompts, monkeypatch):
    made = []
    monkeypatch.setattr(
        prefix_rows, "PrefixStack", lambda some: made.append(len(some)) or PrefixStack(some)
    )
    shared = []
    for length in (2, 3, 4, 5):
        encoder = small.transformer.new_prefix_encoder(length, project=False)
        shared.append(SharedPrefix(encoder(torch.float32)))
    small.remove_prefix()
    engine = Engine(small, max_rows=8, max_prefill_delay=0)
    for prefix in shared[:3]:
        engine.add(Request(prompts[0], 40, mix_prefixes([(prefix, 1.0)]), end_ids=NEVER))
    for place in (0, 1, 2, 0, 1, 3, 0, 3):
        for _ in range(3):
            engine.step()
        joining = Request(prompts[1], 2, mix_prefixes([(shared[place], 1.0)]), end_ids=NEVER)
        engine.add(joining)
    while not engine.is_idle:
        engine.step()
    assert made[:2] == [3, 4], "one stack of the first three, one with the fourth"
    assert len(made) <= 3, "and at most one more, when most have left"
