"""Every hint names flags of the command that printed it, and typing what it says gets past it.

To add a hint: a line in HINTS with the command line that provokes it, words of the message, and the
command line that follows the advice. DIR/... are the folders that `folders` makes.
"""

import argparse
import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from ptuning import __main__ as program
from ptuning.commands.registry import COMMANDS
from ptuning.tunings.loading import NANO_DIR

MODEL_COMMANDS = ("chat", "serve", "web")

# command line, words of the message, what to type then (None: the message gives no whole line)
HINTS = [
    *(
        (f"{name} --model DIR/{kind}", f"holds a prefix .*: --model BASE --prefix DIR/{kind}$",
         f"{name} --model nano --prefix DIR/{kind}")
        for name in MODEL_COMMANDS for kind in ("published", "published-with-config")
    ),
    *((f"{name} --model DIR/{kind}", f"holds a prefix .*: --model {NANO_DIR} --prefix DIR/{kind}$",
       f"{name} --model {NANO_DIR} --prefix DIR/{kind}")
      for name in MODEL_COMMANDS for kind in ("prefix", "prefix-with-config")),
    *((f"{name} --model nowhere", "--model is nowhere, which is not a folder.* or nano",
       f"{name} --model nano") for name in MODEL_COMMANDS),
    *((f"{name} --prefix DIR/published", "does not name the base .* give it with --model",
       f"{name} --prefix DIR/published --model nano") for name in MODEL_COMMANDS),
    *((f"{name} --prefix DIR/moved", "was trained on /no/base, .* give it with --model",
       f"{name} --prefix DIR/moved --model nano") for name in MODEL_COMMANDS),
    ("chat --prefix a=", "give DIRECTORY or NAME=DIRECTORY", "chat --prefix a=DIR/prefix"),
    ("chat --prefix DIR/prefix --prefix DIR/prefix", "--prefix names 'prefix' twice",
     "chat --prefix DIR/prefix --prefix b=DIR/prefix"),
    ("serve --host 0.0.0.0", "add --api_key SECRET, or use --host 127", "serve --host 127.0.0.1"),
    ("web --host 0.0.0.0", "add --password SECRET", "web --host 0.0.0.0 --password s"),
    ("answer DIR/rows.jsonl --output DIR/out.jsonl --model nowhere",
     "--model is nowhere", "answer DIR/rows.jsonl --output DIR/out.jsonl --model nano"),
    ("answer DIR/rows.jsonl --output DIR/out.jsonl --model DIR/prefix",
     f"holds a prefix .*: --model {NANO_DIR}$",
     f"answer DIR/rows.jsonl --output DIR/out.jsonl --model {NANO_DIR}"),
    *((f"data check DIR/rows.jsonl --{flag} DIR/prefix", f"holds a prefix .*: --{flag} {NANO_DIR}$",
       f"data check DIR/rows.jsonl --picture none --{flag} nano")
      for flag in ("model_name_or_path", "tokenizer_name")),
    ("data check DIR/rows.jsonl --max_source_length 1", "use 3 or more",
     "data check DIR/rows.jsonl --max_source_length 3 --picture none"),
    *((f"data convert DIR/rows.jsonl --out DIR/new.jsonl --{flag} DIR/prefix",
       f"holds a prefix .*: --{flag} {NANO_DIR}$",
       f"data convert DIR/rows.jsonl --out DIR/new.jsonl --{flag} nano")
      for flag in ("model_name_or_path", "tokenizer_name")),
    ("data convert DIR/rows.jsonl --out DIR/new.jsonl --max_target_length 1", "use 3 or more",
     "data convert DIR/rows.jsonl --out DIR/new.jsonl --max_target_length 3"),
    ("data convert --out DIR/new.jsonl", "give files, or --mix FILE:SHARE,FILE:SHARE",
     "data convert DIR/rows.jsonl --out DIR/new.jsonl"),
    ("data convert DIR/rows.jsonl --out DIR/rows.jsonl", "is read as well; give another name",
     "data convert DIR/rows.jsonl --out DIR/new.jsonl"),
    ("data convert DIR/nano.jsonl --out DIR/rows.jsonl", "add --overwrite",
     "data convert DIR/nano.jsonl --out DIR/made.jsonl --overwrite"),
    ("data convert DIR/nano.jsonl --out DIR/new.csv", "a name that ends in .jsonl",
     "data convert DIR/nano.jsonl --out DIR/new.jsonl"),
    ("data convert DIR/unlabelled.jsonl --out DIR/new.jsonl", "--keep_unanswered keeps rows",
     "data convert DIR/unlabelled.jsonl --out DIR/new.jsonl --keep_unanswered"),
    ("data convert DIR/inputs.jsonl --out DIR/new.jsonl --prompt_column p --response_column output",
     'differ only in the column "input".* --input_column input',
     "data convert DIR/inputs.jsonl --out DIR/new.jsonl --prompt_column p --input_column input "
     "--response_column output"),
    ("data convert --mix DIR/rows.jsonl:0.5,DIR/nano.jsonl:0.4 --out DIR/new.jsonl",
     "make them sum to 1", "data convert --mix DIR/rows.jsonl:0.5,DIR/nano.jsonl:0.5 "
     "--out DIR/new.jsonl"),
    ("data convert --mix DIR/rows.jsonl --out DIR/new.jsonl", "give FILE:SHARE,FILE:SHARE",
     "data convert --mix DIR/rows.jsonl:0.5,DIR/nano.jsonl:0.5 --out DIR/new.jsonl"),
    ("data convert DIR/rows.jsonl --total 3 --out DIR/new.jsonl", "add --mix, or leave it out",
     "data convert DIR/rows.jsonl --out DIR/new.jsonl"),
    ("convert nowhere DIR/new", "SRC is nowhere, which is not a folder", "convert nano DIR/new"),
    ("convert DIR/published DIR/new", "SRC is .* holds a prefix", "convert nano DIR/new"),
    ("export DIR/published DIR/new --format kv", "--model_name_or_path DIRECTORY$",
     "export DIR/published DIR/new --format kv --model_name_or_path nano"),
    ("export DIR/published DIR/new --format kv --model_name_or_path nowhere",
     "--model_name_or_path is nowhere", None),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefixes of the nano model: ours, one whose base was moved, and published ones."""
    import ptuning
    from ptuning.tunings.loading import load_base

    root = tmp_path_factory.mktemp("hints")
    model = copy.deepcopy(load_base(str(NANO_DIR), dtype=torch.float32))
    model.add_prefix(2)
    ptuning.save_prefix(model, root / "prefix")
    for name in ("moved", "published", "published-with-config"):
        ptuning.save_prefix(model, root / name)
        file = root / name / "prefix_config.json"
        info = json.loads(file.read_text(encoding="utf-8")) | {
            "base_model_name_or_path": "/no/base"
        }
        file.write_text(json.dumps(info), encoding="utf-8")
    for name in ("published", "published-with-config"):
        for file in (root / name).iterdir():
            file.unlink()
        tensors = {
            f"transformer.prefix_encoder.{key}": value
            for key, value in model.prefix_encoder.state_dict().items()
        }
        torch.save(tensors, root / name / "pytorch_model.bin")
    config = (NANO_DIR / "config.json").read_text(encoding="utf-8")
    (root / "published-with-config" / "config.json").write_text(config, encoding="utf-8")
    shutil.copytree(root / "prefix", root / "prefix-with-config")
    (root / "prefix-with-config" / "config.json").write_text(config, encoding="utf-8")
    row = json.dumps({"prompt": "a", "content": "a", "summary": "b"})
    (root / "rows.jsonl").write_text(row + "\n", encoding="utf-8")
    (root / "nano.jsonl").write_text(row + "\n", encoding="utf-8")
    (root / "unlabelled.jsonl").write_text('{"content": "a", "summary": ""}\n', encoding="utf-8")
    rows = [json.dumps({"p": "a", "input": word, "output": word}) for word in "xy"]
    (root / "inputs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return root


def flags_of(line: list[str]) -> set[str]:
    """Return every flag that the command of a line accepts, its actions' included."""
    command = next(command for command in COMMANDS if command.name == line[0])
    parser = argparse.ArgumentParser()
    command.add_flags(parser)
    parsers, flags = [parser], set()
    while parsers:
        for action in parsers.pop()._actions:
            flags |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return flags


class ReachedError(Exception):
    """The command got as far as loading a model."""


def run(line: str, folders: Path, monkeypatch, capsys) -> tuple[int | None, str]:
    """Run a command line; its exit status (None: the model would have been loaded) and words."""

    def reached(*_args: object, **_kwargs: object) -> None:
        raise ReachedError

    for place in ("serve.session.Session", "serve.client.EngineClient"):
        monkeypatch.setattr(f"ptuning.{place}.load", reached)
    monkeypatch.setattr("ptuning.commands.answer.load_tokenizer", reached)
    monkeypatch.setattr("ptuning.commands.serving.check_address", check_host)
    try:
        status = program.main(line.replace("DIR", str(folders)).split())
    except ReachedError:
        status = None
    return status, capsys.readouterr().err.replace(str(folders), "DIR")


def check_host(host: str, port: int, api_key: str | None) -> None:
    """Check the address but for the port, which another program may be listening on."""
    from ptuning.serve.startup import check_guarded

    check_guarded(host, api_key, flag="--api_key")


@pytest.mark.parametrize(("line", "words", "advice"), HINTS, ids=[hint[0] for hint in HINTS])
def test_a_hint_names_flags_of_its_command_and_gets_past_the_error(
    line, words, advice, folders, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    status, message = run(line, folders, monkeypatch, capsys)
    assert status == 2
    assert message.count("\n") == 1
    assert re.search(words, message), message
    named = set(re.findall(r"(?<![\w-])--[a-z]\w*", message))
    assert named <= flags_of(line.split()), f"{line} advises {named - flags_of(line.split())}"
    if advice is not None:
        status, message = run(
            advice.replace("DIR/new", str(tmp_path / "new")), folders, monkeypatch, capsys
        )
        # The page needs gradio, which `web` asks for once everything else is right.
        assert status in (None, 0) or message.startswith("ptuning web: gradio is not"), message
