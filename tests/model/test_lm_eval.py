"""lm-evaluation-harness on our model, by the file shown in docs/transformers.md; runs where lm_eval (0.4.13 tried) is."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NANO

instance = pytest.importorskip(
    "lm_eval.api.instance", reason="needs lm_eval, which this project does not depend on"
)
DOCS = Path(__file__).parents[2] / "docs" / "transformers.md"
QUESTION = "类型#裤*版型#宽松*颜色#白色"
RIGHT, WRONG = "类型为裤,版型为宽松,颜色为白色。", "你好,有什么可以帮你?"


@functools.cache  # the class is registered by name, once
def shown() -> dict[str, Any]:
    """Run the file shown in the page and return its names."""
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text("utf-8"), re.M | re.S)
    (code,) = [block for block in blocks if "HFLM" in block]
    names: dict[str, Any] = {"__name__": "shown"}
    exec(code, names)
    return names


def harness_model(name: str) -> Any:
    return shown()[name](pretrained=str(NANO), dtype="float32", batch_size=2, device="cpu")


def scores(model: Any) -> list[float]:
    requests = [
        instance.Instance("loglikelihood", {}, (QUESTION, text), 0) for text in (RIGHT, WRONG)
    ]
    return [score for score, _ in model.loglikelihood(requests, disable_tqdm=True)]


def answers(model: Any, until: list[str]) -> list[str]:
    options = {"until": until, "max_gen_toks": 30, "do_sample": False}
    requests = [
        instance.Instance("generate_until", {}, (text, options), 0) for text in (QUESTION, "你好！")
    ]
    return model.generate_until(requests, disable_tqdm=True)


def test_the_class_shown_scores_answers() -> None:
    right, wrong = scores(harness_model("ChatGLM"))
    assert right > -1
    assert wrong < -20
    assert scores(harness_model("HFLM"))[0] < -20, "without [gMASK] <sop> even the right one is"


def test_the_class_shown_generates_until_a_stop_text() -> None:
    model = harness_model("ChatGLM")
    whole, greeting = answers(model, [])
    assert whole == RIGHT
    assert len(greeting) > 5
    assert answers(model, ["颜色"])[0] == RIGHT.partition("颜色")[0]
