"""Forgetting measured, general rows mixed in, and near-zero starts: through main.py on a two-layer model."""

import json
import math
import shutil

import pytest
import torch
from torch.nn import functional

from main import main
from ptuning.data.general_prompts import GeneralPrompts
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.scoring.retention import MAX_NEW_TOKENS, RetentionRun, TokenScores, divergence
from ptuning.train.rows import load_rows
from ptuning.train.run_config import parse_arguments
from tests.test_main import base, files, prefix_of, same, train_flags  # noqa: F401
from tests.tiny import rows, write_rows

PROMPTS = ["类型#裤", "颜色#白色*版型#宽松", "外套", "hello"]


@pytest.fixture(scope="module")
def run(base):  # noqa: F811
    model = ChatGLMForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    tokenizer = ChatGLMTokenizer.from_pretrained(base)
    return model, RetentionRun(GeneralPrompts(base, PROMPTS), tokenizer, batch_size=3)


def test_an_untouched_model_has_forgotten_nothing(run):
    model, asked = run
    found = asked.compare(model, asked.ask_base(model))
    assert found.num_same == len(PROMPTS)
    assert found.change == pytest.approx(0, abs=1e-6)
    assert found.divergence == pytest.approx(0, abs=1e-6)


def test_the_loss_is_that_of_the_models_own_forward(run):
    model, asked = run
    known = asked.ask_base(model)
    torch.manual_seed(0)
    model.add_prefix(4).scale_entries(1e3)  # a random base hardly hears a smaller one
    model.train()
    found = asked.compare(model, known)
    assert model.training
    model.eval()
    for row, prompt, answer in zip(found.rows, asked.prompt_ids, known.token_ids, strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            tuned = float(model(ids, labels=labels).loss)
            untouched = float(model(ids, labels=labels, use_prefix=False).loss)
        assert row.num_tokens == len(answer) <= MAX_NEW_TOKENS
        assert row.tuned_loss / row.num_tokens == pytest.approx(tuned, abs=1e-5)
        assert row.base_loss / row.num_tokens == pytest.approx(untouched, abs=1e-5)
    model.remove_prefix()
    assert found.divergence > 1e-6


def test_the_divergence_is_torchs_where_all_tokens_are_kept():
    torch.manual_seed(0)
    first, second = torch.randn(2, 5, 8).log_softmax(-1)
    kept = first.topk(8)
    found = divergence(TokenScores(torch.zeros(5), kept.indices, kept.values), second)
    wanted = functional.kl_div(second, first, log_target=True, reduction="none").sum(1)
    assert torch.allclose(found, wanted.double(), atol=1e-6)
    some = first.topk(3)
    less = divergence(TokenScores(torch.zeros(5), some.indices, some.values), second)
    assert bool((less <= wanted + 1e-6).all())


def results_of(folder):
    return json.loads((folder / "predict_results.json").read_text("utf-8"))


@pytest.mark.parametrize("way", ["prefix", "lora", "full"])
def test_every_way_of_tuning_is_measured_and_reported(way, base, files):  # noqa: F811
    flags = train_flags(base, files, "--do_predict", "--max_predict_samples", "2")
    if way != "prefix":
        at = flags.index("--pre_seq_len")
        flags[at : at + 2] = ["--tuning", way]
    assert main(flags) == 0
    results = results_of(files / "out")
    assert results["retention_prompts"] == 40
    assert results["retention_divergence"] >= 0
    if way == "full":  # the others move a random base by less than the figures show
        assert results["retention_divergence"] > 0
    change = results["retention_tuned_loss"] - results["retention_base_loss"]
    assert results["retention_loss_change"] == pytest.approx(change, abs=2e-4)
    report = (files / "out" / "report.html").read_text("utf-8")
    assert "Forgetting" in report
    assert "What is the capital of France?" in report


def test_prompts_of_ones_own_are_asked_without_comparing_rows(base, files):  # noqa: F811
    (files / "mine.jsonl").write_text('{"prompt": "裤"}\n', encoding="utf-8")
    flags = train_flags(base, files, "--do_predict", "--compare_base", "false")
    flags += ["--max_predict_samples", "2"]
    assert main(flags) == 0
    assert "retention_prompts" not in results_of(files / "out")
    flags += ["--measure_retention", "true", "--general_prompts", str(files / "mine.jsonl")]
    assert main([*flags, "--overwrite_output_dir"]) == 0
    results = results_of(files / "out")
    assert results["retention_prompts"] == 1
    assert "base_bleu-4" not in results


def general_rows(files, count):  # noqa: F811
    path = files / "general.jsonl"
    made = [{"q": row["summary"][:6], "a": row["content"]} for row in rows(count)]
    write_rows(path, made)
    return f"{path}:0.25:q,a"


def test_general_rows_stand_beside_the_tasks_and_take_no_source_prefix(base, files):  # noqa: F811
    tokenizer = ChatGLMTokenizer.from_pretrained(base)
    flags = train_flags(base, files, "--mix", general_rows(files, 90), "--source_prefix", "类型")
    mixed = load_rows(parse_arguments(flags), tokenizer, overwrite_cache=False).train
    assert len(mixed) == 40  # 30 of the task, a quarter general
    prefix = tokenizer.encode_batch(["类型类型"])[0][:2]
    starts = [mixed[index]["input_ids"][:2].tolist() == prefix for index in range(40)]
    assert starts == [True] * 30 + [False] * 10


def test_a_mixed_run_resumes_to_the_same_prefix(base, files):  # noqa: F811
    flags = train_flags(base, files, "--mix", general_rows(files, 7))
    assert main(flags) == 0
    whole = prefix_of(files / "out")
    shutil.rmtree(files / "out" / "checkpoint-4")
    (files / "out" / "prefix.safetensors").unlink()
    assert main([*flags, "--resume_from_checkpoint", "auto"]) == 0
    assert same(prefix_of(files / "out"), whole)
    shutil.rmtree(files / "out")
    assert main(train_flags(base, files)) == 0
    assert not same(prefix_of(files / "out"), whole)


def test_a_wrong_column_of_the_general_rows_says_how_to_name_it(base, files, capsys):  # noqa: F811
    mix = general_rows(files, 7).removesuffix(":q,a")
    assert main(train_flags(base, files, "--mix", mix)) == 2
    error = capsys.readouterr().err
    assert "--mix: " in error
    assert "general.jsonl: no known format; name the columns" in error
    assert "FILE:RATIO:PROMPT,RESPONSE" in error


@pytest.mark.parametrize("project", [False, True])
def test_a_small_spread_starts_nearer_to_the_base(project, run):
    model, _ = run
    ids = torch.tensor([[9, 8, 7, model.config.gmask_token_id, model.config.bos_token_id]])
    wanted = model(ids, use_prefix=False).logits
    distances = []
    for spread in (1.0, 1e-3):
        torch.manual_seed(0)
        encoder = model.add_prefix(8, project=project)
        encoder.scale_entries(spread)
        entries = torch.cat([layer.detach().flatten() for layer in encoder(torch.float32)])
        if not project:
            assert float(entries.std()) == pytest.approx(spread, rel=0.05)
        distances.append(float((model(ids).logits - wanted).detach().norm()))
    model.remove_prefix()
    assert math.isfinite(distances[0])
    assert distances[1] < (distances[0] if not project else distances[0] * 1.5)


def test_the_spread_reaches_the_prefix_that_is_trained(base, files):  # noqa: F811
    flags = train_flags(base, files, "--prefix_init_std", "1e-3", "--learning_rate", "0")
    assert main(flags) == 0
    table = prefix_of(files / "out")["transformer.prefix_encoder.embedding.weight"]
    assert float(table.std()) == pytest.approx(1e-3, rel=0.1)
