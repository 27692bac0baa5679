"""Completions from the engine: equal ones for equal seeds, and counted."""

from ptuning.completions.source import Ask, EngineSource
from ptuning.engine.request import Sampling


def test_the_engine_repeats_itself_and_counts_tokens(loaded_nano):
    model, tokenizer = loaded_nano
    source = EngineSource(model, tokenizer, name="nano", max_rows=2)
    asked = [Ask(number, text, number) for number, text in enumerate(["你好", "谢谢", "你好"], 5)]
    one, other = (dict(source.complete(asked, Sampling(1.0), 12)) for _ in range(2))
    assert one == other
    assert sorted(one) == [5, 6, 7]
    assert source.context_length == model.config.max_sequence_length
    for ask in asked:
        completion = one[ask.request]
        assert completion.prompt_tokens == source.num_tokens(ask.prompt)
        assert 0 < completion.completion_tokens <= 12
        assert completion.finish_reason in ("stop", "length")
    greedy = dict(source.complete(asked, Sampling(0.0), 12))
    assert greedy[5] == greedy[7]
