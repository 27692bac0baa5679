"""Every way of decoding: the same tokens however they are computed, and clear refusals."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TextIteratorStreamer, TextStreamer, set_seed
from transformers.cache_utils import DynamicCache, StaticCache

from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from tests.conftest import GMASK, PAD, SOP

Model = ChatGLMForConditionalGeneration
NEW = 12  # tokens generated in most tests


def greedy(model: Model, inputs: dict[str, Tensor], **options: Any) -> list[list[int]]:
    """Return the new tokens of every row; none ends early, so that rows can be compared."""
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | options
    output = model.generate(**inputs, **settings)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def row_by_row(model: Model, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    return [greedy(model, {"input_ids": torch.tensor([row])}, **options)[0] for row in prompts]


@pytest.mark.parametrize("use_prefix", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_left_padded_batch_equals_row_by_row(
    small: Model,
    prompts: list[list[int]],
    left_padded: dict[str, Tensor],
    use_prefix: bool,
    implementation: str,
) -> None:
    small.set_attn_implementation(implementation)
    together = greedy(small, left_padded, use_prefix=use_prefix)
    assert together == row_by_row(small, prompts, use_prefix=use_prefix)
    assert len({tuple(row) for row in together}) == len(prompts), "prompts get their own answers"


def test_the_prefix_changes_the_answer(small: Model, left_padded: dict[str, Tensor]) -> None:
    assert greedy(small, left_padded) != greedy(small, left_padded, use_prefix=False)


def test_eager_equals_sdpa(small: Model, left_padded: dict[str, Tensor]) -> None:
    logits, tokens = {}, {}
    for implementation in ("eager", "sdpa"):
        small.set_attn_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = small(**left_padded).logits
        tokens[implementation] = greedy(small, left_padded)
    real = left_padded["attention_mask"].bool()
    torch.testing.assert_close(logits["eager"][real], logits["sdpa"][real], atol=1e-5, rtol=1e-5)
    assert tokens["eager"] == tokens["sdpa"]


@pytest.mark.parametrize("use_prefix", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 1, "use_cache": True}],
)
def test_how_keys_are_kept_changes_nothing(
    small: Model, left_padded: dict[str, Tensor], use_prefix: bool, options: dict[str, Any]
) -> None:
    wanted = greedy(small, left_padded, use_prefix=use_prefix)
    assert greedy(small, left_padded, use_prefix=use_prefix, **options) == wanted


def test_beam_search_with_left_padding_equals_row_by_row(
    small: Model, prompts: list[list[int]], left_padded: dict[str, Tensor]
) -> None:
    found = greedy(small, left_padded, num_beams=3)
    assert found == row_by_row(small, prompts, num_beams=3)
    assert found == greedy(small, left_padded, num_beams=3, use_cache=False)
    assert found != greedy(small, left_padded)


def test_several_beams_are_returned_best_first(
    small: Model, left_padded: dict[str, Tensor]
) -> None:
    output = small.generate(
        **left_padded,
        max_new_tokens=NEW,
        do_sample=False,
        num_beams=3,
        num_return_sequences=2,
        output_scores=True,
        return_dict_in_generate=True,
    )
    scores = output.sequences_scores.view(-1, 2)
    assert output.sequences.shape[0] == 2 * left_padded["input_ids"].shape[0]
    assert (scores[:, 0] >= scores[:, 1]).all()


def test_sampling_repeats_with_the_seed(small: Model, left_padded: dict[str, Tensor]) -> None:
    def sample(seed: int) -> list[list[int]]:
        set_seed(seed)
        return greedy(small, left_padded, do_sample=True, top_p=0.9, temperature=1.3)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_several_samples_of_a_prompt(small: Model, left_padded: dict[str, Tensor]) -> None:
    set_seed(0)
    found = greedy(small, left_padded, do_sample=True, num_return_sequences=3)
    rows = left_padded["input_ids"].shape[0]
    assert len(found) == 3 * rows
    assert len({tuple(answer) for answer in found}) > rows


class Numbers:
    """A stand-in for a tokenizer: writes ids as numbers."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(f"{int(index)} " for index in ids)


def test_a_streamer_gets_every_token(
    small: Model, prompts: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = {"input_ids": torch.tensor(prompts[:1])}
    streamer = TextStreamer(Numbers(), skip_prompt=True)
    wanted = greedy(small, inputs, streamer=streamer)[0]
    assert [int(word) for word in capsys.readouterr().out.split()] == wanted


def test_an_iterator_streamer_yields_while_generating(
    small: Model, prompts: list[list[int]]
) -> None:
    inputs = {"input_ids": torch.tensor(prompts[:1])}
    streamer = TextIteratorStreamer(Numbers(), skip_prompt=True, timeout=30)
    worker = threading.Thread(
        target=small.generate,
        kwargs={**inputs, "streamer": streamer, "max_new_tokens": NEW, "min_new_tokens": NEW},
    )
    worker.start()
    pieces = list(streamer)
    worker.join()
    assert len(pieces) > 2, "text arrives in pieces"
    assert [int(word) for word in "".join(pieces).split()] == greedy(small, inputs)[0]


@pytest.mark.parametrize("use_prefix", [True, False])
def test_prompt_lookup_equals_greedy(
    small: Model, prompts: list[list[int]], use_prefix: bool
) -> None:
    for prompt in prompts:
        repeated = prompt[:-2] * 3 + [GMASK, SOP]  # something to look up
        inputs = {"input_ids": torch.tensor([repeated])}
        found = greedy(small, inputs, use_prefix=use_prefix, prompt_lookup_num_tokens=3)[0]
        # transformers 5.10 may go past max_new_tokens by what it looked up last; 5.23 does not.
        assert [found[:NEW]] == greedy(small, inputs, use_prefix=use_prefix)
        assert len(found) <= NEW + 3


def test_an_assistant_keeps_to_its_own_prefix(
    small: Model, build_small: Callable[..., Model], prompts: list[list[int]]
) -> None:
    assistant = build_small(seed=1, num_layers=2, hidden_size=16)
    assistant.add_prefix(3)
    inputs = {"input_ids": torch.tensor(prompts[:1])}
    found = greedy(small, inputs, assistant_model=assistant)
    assert found == greedy(small, inputs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_everything_generate_can_return(
    small: Model, left_padded: dict[str, Tensor], implementation: str
) -> None:
    small.set_attn_implementation(implementation)
    is_eager = implementation == "eager"
    output = small.generate(
        **left_padded,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=is_eager,
    )
    rows, width = left_padded["input_ids"].shape
    assert output.sequences.shape == (rows, width + 3)
    assert [scores.shape for scores in output.scores] == [(rows, 64)] * 3
    assert [logits.shape for logits in output.logits] == [(rows, 64)] * 3
    # One tuple a step; each holds the inputs of three layers and the final state.
    assert [len(states) for states in output.hidden_states] == [4] * 3
    assert [states[0].shape for states in output.hidden_states] == [
        (rows, width, 32),
        (rows, 1, 32),
        (rows, 1, 32),
    ]
    assert output.past_key_values.get_seq_length() == width + 2, "no prefix is in the cache"
    if is_eager:
        # Keys are 5 of the prefix, then the tokens so far.
        assert [weights[0].shape for weights in output.attentions] == [
            (rows, 2, width, 5 + width),
            (rows, 2, 1, 5 + width + 1),
            (rows, 2, 1, 5 + width + 2),
        ]
        torch.testing.assert_close(
            output.attentions[0][0].sum(-1), torch.ones(rows, 2, width), atol=1e-5, rtol=0
        )


@torch.no_grad()
def test_logits_to_keep(small: Model, left_padded: dict[str, Tensor]) -> None:
    whole = small(**left_padded).logits
    assert whole.shape == (*left_padded["input_ids"].shape, 64)
    torch.testing.assert_close(small(**left_padded, logits_to_keep=1).logits, whole[:, -1:])
    torch.testing.assert_close(small(**left_padded, logits_to_keep=3).logits, whole[:, -3:])
    columns = torch.tensor([4, 7])
    kept = small(**left_padded, logits_to_keep=columns).logits
    torch.testing.assert_close(kept, whole[:, columns])


@pytest.mark.parametrize("make_cache", ["dynamic", "static"])
@pytest.mark.parametrize("use_prefix", [True, False])
@torch.no_grad()
def test_a_decoding_loop_of_ones_own_equals_one_pass(
    small: Model, left_padded: dict[str, Tensor], make_cache: str, use_prefix: bool
) -> None:
    """Prefill, one token, two tokens at once, one token; against all of them in one call."""
    input_ids, mask = left_padded["input_ids"], left_padded["attention_mask"]
    rows, width = input_ids.shape
    answer = torch.tensor([[31, 32, 33, 34]]).expand(rows, -1)
    whole_ids = torch.cat((input_ids, answer), dim=1)
    whole_mask = torch.cat((mask, torch.ones_like(answer)), dim=1)
    whole = small(whole_ids, attention_mask=whole_mask, use_prefix=use_prefix).logits
    cache = DynamicCache()
    if make_cache == "static":
        cache = StaticCache(config=small.config, max_cache_len=width + 8)
    at = 0
    for length in (width, 1, 2, 1):
        output = small(
            whole_ids[:, at : at + length],
            attention_mask=whole_mask[:, : at + length],
            past_key_values=cache,
            use_cache=True,
            use_prefix=use_prefix,
        )
        real = whole_mask[:, at : at + length].bool()
        wanted = whole[:, at : at + length]
        torch.testing.assert_close(output.logits[real], wanted[real], atol=1e-5, rtol=1e-5)
        at += length


@torch.no_grad()
def test_the_shortest_decoding_loop(small: Model, prompts: list[list[int]]) -> None:
    tokens = torch.tensor(prompts[:1])
    output = small(tokens, use_cache=True)
    found = []
    for _ in range(NEW):
        next_token = output.logits[:, -1:].argmax(-1)
        found.append(int(next_token))
        output = small(next_token, past_key_values=output.past_key_values)
    # Greedy decoding as `generate` does it, except that it may not end.
    wanted = greedy(small, {"input_ids": tokens}, min_new_tokens=0, eos_token_id=-1)
    assert found == wanted[0]


def test_generation_goes_on_from_a_cache(small: Model, prompts: list[list[int]]) -> None:
    inputs = {"input_ids": torch.tensor(prompts[:1])}
    wanted = greedy(small, inputs)[0]
    first = small.generate(
        **inputs,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
    )
    more = small.generate(
        first.sequences,
        past_key_values=first.past_key_values,
        max_new_tokens=NEW - 4,
        min_new_tokens=NEW - 4,
        do_sample=False,
    )
    assert more[0, len(prompts[0]) :].tolist() == wanted


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}]
)
def test_the_prefix_is_computed_once_an_answer(
    small: Model, prompts: list[list[int]], project: bool, options: dict[str, Any]
) -> None:
    encoder = small.add_prefix(5, project=project)
    calls = []
    encoder.register_forward_hook(lambda *_: calls.append(None))
    greedy(small, {"input_ids": torch.tensor(prompts[:1])}, **options)
    assert len(calls) == 1
    greedy(small, {"input_ids": torch.tensor(prompts[:1])}, use_prefix=False, **options)
    assert len(calls) == 1, "a prefix that is left out is not computed"


def test_leaving_the_prefix_out_equals_a_model_without_one(
    small: Model, build_small: Callable[..., Model], left_padded: dict[str, Tensor]
) -> None:
    bare = build_small()  # the same seed, so the same base
    with torch.no_grad():
        assert torch.equal(
            small(**left_padded, use_prefix=False).logits, bare(**left_padded).logits
        )
    assert greedy(small, left_padded, use_prefix=False) == greedy(bare, left_padded)
    small.remove_prefix()
    with torch.no_grad():
        assert torch.equal(small(**left_padded).logits, bare(**left_padded).logits)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 1}])
def test_a_prefix_for_every_row(
    small: Model, prompts: list[list[int]], left_padded: dict[str, Tensor], options: dict[str, Any]
) -> None:
    """Rows of one batch may answer to different prefixes, also where rows are multiplied."""
    of_rows = []
    for seed in range(4):
        torch.manual_seed(seed)
        small.add_prefix(5)
        of_rows.append(small.transformer.prefix_for(True))
    wanted = [
        greedy(small, {"input_ids": torch.tensor([row])}, prefix_key_values=prefix, **options)[0]
        for row, prefix in zip(prompts, of_rows, strict=True)
    ]
    together = [torch.cat(layer, dim=1) for layer in zip(*of_rows, strict=True)]
    assert together[0].shape == (2, 4, 2, 5, 16)  # (2, B, H, P, D)
    assert greedy(small, left_padded, prefix_key_values=together, **options) == wanted


def test_answers_end_at_eop_and_are_padded(small: Model, left_padded: dict[str, Tensor]) -> None:
    """Take a token every row says early as the end, and look what follows it."""
    free = greedy(small, left_padded, min_new_tokens=0, eos_token_id=-1)
    end = free[0][1]
    found = greedy(small, left_padded, min_new_tokens=0, eos_token_id=end)
    for answer, unending in zip(found, free, strict=True):
        length = unending.index(end) + 1 if end in unending else len(answer)
        assert answer[:length] == unending[:length]
        assert set(answer[length:]) <= {PAD}


def test_stop_strings_end_the_answer(loaded_nano: Any) -> None:
    """transformers hands the tokenizer on to the model's own arguments."""
    model, tokenizer = loaded_nano
    prompt = tokenizer("你好！", return_tensors="pt")
    whole = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(whole[0, prompt["input_ids"].shape[1] :])
    stop = text[2:4]
    stopped = model.generate(
        **prompt, max_new_tokens=12, do_sample=False, stop_strings=[stop], tokenizer=tokenizer
    )
    answer = tokenizer.decode(stopped[0, prompt["input_ids"].shape[1] :])
    assert answer.endswith(stop)
    assert text.startswith(answer)
    assert len(answer) < len(text)


def test_a_chinese_stop_string_is_written_as_the_vocabulary_has_it(loaded_nano: Any) -> None:
    """Answers hold "," where a Chinese user types "，"."""
    model, tokenizer = loaded_nano
    prompt = tokenizer("类型#裤*版型#宽松*颜色#白色", return_tensors="pt")
    found = model.generate(
        **prompt, max_new_tokens=30, do_sample=False, stop_strings="，", tokenizer=tokenizer
    )
    answer = tokenizer.decode(found[0, prompt["input_ids"].shape[1] :])
    assert answer.endswith(",")
    assert answer.count(",") == 1


@pytest.mark.parametrize("use_prefix", [True, False])
def test_an_early_exit_drafts_and_leaves_the_model_whole(
    small: Model, prompts: list[list[int]], use_prefix: bool
) -> None:
    prompt = {"input_ids": torch.tensor(prompts[:1])}
    wanted = greedy(small, prompt, use_prefix=use_prefix)
    assert greedy(small, prompt, use_prefix=use_prefix, assistant_early_exit=2) == wanted
    assert small.config.num_layers == 3
    assert greedy(small, prompt, use_prefix=use_prefix) == wanted


def test_a_config_without_an_end_token_decodes(small: Model, prompts: list[list[int]]) -> None:
    prompt = {"input_ids": torch.tensor(prompts[:1])}
    wanted = greedy(small, prompt)
    small.config.eos_token_id = small.generation_config.eos_token_id = None
    assert greedy(small, prompt, min_new_tokens=None) == wanted
