"""What is served when little is named."""

import json
import os
import socket

import pytest

from ptuning.__main__ import main
from ptuning.commands.registry import KEY_VARIABLE, PASSWORD_VARIABLE
from ptuning.serve.startup import check_address, choose_served, find_newest, is_loopback
from ptuning.tunings.loading import NANO_DIR


def test_the_newest_prefix_is_found_as_evaluate_sh_does(tmp_path, prefix_dirs):
    assert find_newest(tmp_path) is None
    made = {}
    for age, name in enumerate(["a/checkpoint-10", "a", "b/checkpoint-20", "b/c/checkpoint-9"]):
        made[name] = tmp_path / name
        made[name].mkdir(parents=True, exist_ok=True)
        file = made[name] / "prefix_config.json"
        file.write_bytes((prefix_dirs["adgen"] / "prefix_config.json").read_bytes())
        os.utime(file, (1000 + age, 1000 + age))
    assert find_newest(tmp_path) == made["b/checkpoint-20"]
    os.utime(made["a"] / "prefix_config.json", (2000, 2000))
    assert find_newest(tmp_path) == made["a"]
    for file in made["a"].parent.rglob("prefix_config.json"):
        file.with_name("prefix.safetensors").touch()
    served = choose_served(None, output=tmp_path)
    assert served.prefixes == {"newest": made["a"]}
    assert served.model == str(NANO_DIR)


def test_named_prefixes_bring_their_base_and_a_named_model_comes_alone(tmp_path, prefix_dirs):
    served = choose_served(None, [f"x={prefix_dirs['other']}"], output=tmp_path)
    assert served == (str(NANO_DIR), {"x": prefix_dirs["other"]})
    assert choose_served("a/hub-id", output=tmp_path) == ("a/hub-id", {})
    assert choose_served("a/hub-id", [f"x={prefix_dirs['other']}"]).model == "a/hub-id"
    assert list(choose_served(None, [str(prefix_dirs["other"])]).prefixes) == [
        prefix_dirs["other"].name
    ]
    assert choose_served(None, output=tmp_path) == (str(NANO_DIR), {})


def test_a_base_trained_in_the_checkout_is_found_from_anywhere(tmp_path, prefix_dirs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "moved"
    folder.mkdir()
    config = json.loads((prefix_dirs["adgen"] / "prefix_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "ptuning/nano/weights"
    (folder / "prefix_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "prefix.safetensors").touch()
    assert choose_served(None, [f"x={folder}"]).model == str(NANO_DIR)


@pytest.mark.parametrize("word", ["=dir", "adgen=", ""])
def test_prefixes_without_name_or_folder_are_refused(word):
    with pytest.raises(ValueError, match="NAME=DIRECTORY"):
        choose_served(None, [word])


def test_other_machines_need_a_key():
    assert [
        is_loopback(host) for host in ("::1", "127.3.2.1", "10.0.0.1", "::", "example.org")
    ] == [
        True,
        True,
        False,
        False,
        False,
    ]
    check_address("127.0.0.1", 0, None)
    check_address("0.0.0.0", 0, "secret")
    with pytest.raises(ValueError, match=r"--host is 0\.0\.0\.0.*--api_key"):
        check_address("0.0.0.0", 0, None)
    with pytest.raises(ValueError, match="--api_key is empty"):
        check_address("127.0.0.1", 0, " ")


def test_a_port_in_use_is_refused_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: .*give another --port"):
            check_address("127.0.0.1", port, None)
    check_address("127.0.0.1", port, None)
    with pytest.raises(ValueError, match="--port 70000"):
        check_address("127.0.0.1", 70000, None)


@pytest.mark.parametrize("line", ["serve --api_key", "web --password"])
def test_an_empty_secret_is_refused_though_the_variable_has_one(line, monkeypatch, capsys) -> None:
    for variable in (KEY_VARIABLE, PASSWORD_VARIABLE):
        monkeypatch.setenv(variable, "secret")
    assert main([*line.split(), ""]) == 2
    assert f"{line.split()[1]} is empty" in capsys.readouterr().err
