"""A LoRA adapter or a whole tuned model as a session's model: its answers, its lengths, and what it refuses."""

import copy

import pytest
import torch

from ptuning.model.adapter import adapter_parameters, add_adapter
from ptuning.model.checkpoint.layout import base_fingerprint
from ptuning.serve.session import Session
from ptuning.serve.startup import choose_served
from ptuning.serve.web_talk import WebTalk
from ptuning.tunings.artefact import FULL, LORA, Info, write_info
from ptuning.tunings.loading import NANO_DIR, find_model
from ptuning.tunings.lora import save_adapter
from tests.serve.conftest import ADGEN

QUESTION = "类型#裤*版型#宽松"


@pytest.fixture(scope="module")
def tuned_nano(nano):
    """Nano with a loud adapter on it."""
    pytest.importorskip("peft", reason="needs the peft library (pip install peft)")
    model = copy.deepcopy(nano)
    add_adapter(model, rank=2, alpha=4)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_parameters(model).values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def adapter(tuned_nano, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output") / "lora"
    fingerprint = base_fingerprint(tuned_nano)
    save_adapter(
        tuned_nano,
        folder,
        Info(
            tuning=LORA,
            base_model_name_or_path=str(NANO_DIR),
            base_fingerprint=fingerprint,
            settings=ADGEN,
        ),
    )
    return folder


@pytest.fixture(scope="module")
def whole(nano, session, tmp_path_factory):
    """A whole model: nano with another final norm."""
    folder = tmp_path_factory.mktemp("output") / "full"
    model = copy.deepcopy(nano)
    with torch.no_grad():
        model.transformer.final_layernorm.bias += torch.randn(
            192, generator=torch.Generator().manual_seed(0)
        )
    model.save_pretrained(folder)
    session.tokenizer.save_pretrained(folder)
    write_info(folder, Info(tuning=FULL, base_model_name_or_path=str(NANO_DIR), settings=ADGEN))
    return model, folder


def generated(model, session, num_tokens):
    inputs = session.tokenizer([QUESTION], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    return session.tokenizer.decode(
        output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


def test_an_adapter_answers_in_place_of_the_base_at_its_own_length(session, tuned_nano, adapter):
    with Session.load(adapter, device="cpu") as tuned:
        answer = "".join(tuned.chat(QUESTION, clean=False))
        assert answer == generated(tuned_nano, tuned, ADGEN["max_target_length"])
        assert answer != "".join(session.chat(QUESTION, clean=False))
        assert WebTalk(tuned).trained_length("base") == ADGEN["max_target_length"]
        assert not WebTalk(tuned).is_trained_on_chats("base")


def test_a_whole_model_answers_in_place_of_the_base(whole):
    model, folder = whole
    with Session.load(folder, device="cpu") as tuned:
        answer = "".join(tuned.chat(QUESTION, clean=False))
        assert answer == generated(model, tuned, ADGEN["max_target_length"])


def test_prefixes_are_not_mixed_with_them(session, adapter, whole, prefix_dirs):
    for folder, reason in ((adapter, "has a LoRA adapter"), (whole[1], "was trained on")):
        with Session.load(folder, device="cpu") as tuned, pytest.raises(ValueError, match=reason):
            tuned.add_prefix("adgen", prefix_dirs["adgen"])
        with pytest.raises(ValueError, match=f"--model {folder}"):
            session.add_prefix("other-kind", folder)
    with pytest.raises(ValueError, match=f"--prefix {prefix_dirs['adgen']}$"):
        find_model(str(prefix_dirs["adgen"]))


def test_what_was_tuned_last_is_served(adapter, whole, prefix_dirs):
    assert choose_served(None, output=adapter.parent) == (str(adapter), {})
    assert choose_served(None, output=whole[1].parent) == (str(whole[1]), {})
    newest = choose_served(None, output=prefix_dirs["adgen"].parent)
    assert newest.model == str(NANO_DIR)
    assert list(newest.prefixes) == ["newest"]


def test_a_base_or_a_hub_name_stands_for_itself():
    assert find_model(str(NANO_DIR)) == (str(NANO_DIR), None, None)
    assert find_model("THUDM/chatglm-6b") == ("THUDM/chatglm-6b", None, None)
