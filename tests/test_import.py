"""`import ptuning` is light, and registers the classes in time whichever package comes first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ptuning.commands.registry import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "assert not {'torch', 'transformers'} & set(sys.modules), 'torch or transformers is imported'\n"
)
# Modules that a command line is read with before the run starts
LIGHT = [
    "ptuning",
    "ptuning.__main__",
    "ptuning.commands.registry",
    "ptuning.data.mixing",
    "ptuning.tunings.artefact",
    "ptuning.serve.startup",
    "ptuning.tunings.loading",
]
SHOW = """
folder = "ptuning/nano/weights"
loaded = [auto.from_pretrained(folder) for auto in (AutoConfig, AutoTokenizer, AutoModel)]
assert [type(one).__name__ for one in loaded] == [
    "ChatGLMConfig", "ChatGLMTokenizer", "ChatGLMForConditionalGeneration"
], loaded
"""
AUTO = "from transformers import AutoConfig, AutoModel, AutoTokenizer\n"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def assert_runs(code: str) -> None:
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", LIGHT)
def test_neither_torch_nor_transformers_is_imported(module: str) -> None:
    assert_runs(f"import sys, {module}\n{HEAVY}")


@pytest.mark.slow
def test_the_class_alone_is_known_to_transformers_label_smoothing() -> None:
    assert_runs(
        "import sys; sys.modules['peft'] = None\n"  # peft imports Auto classes, which registers
        "from ptuning.model.chatglm import ChatGLMForConditionalGeneration as Model\n"
        "from transformers.trainer import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names\n"
        "assert names['chatglm'] == Model.__name__"
    )


@pytest.mark.parametrize(
    "line",
    ["", "--help", "fly", "chat --modle nano", "chat --model nowhere", "chat --prefix nowhere"]
    + [f"{command.name} --help" for command in COMMANDS],
)
def test_help_and_mistakes_take_half_a_second_of_cpu(line: str) -> None:
    code = (
        "import sys\nfrom ptuning.__main__ import main\n"
        f"try: main({line.split()})\nexcept SystemExit: pass\n{HEAVY}"
    )
    before = os.times()
    assert_runs(code)
    after = os.times()
    used_s = after.children_user + after.children_system
    used_s -= before.children_user + before.children_system
    assert used_s < 1.0  # 0.1 to 0.3 here; importing torch and transformers takes above 2


@pytest.mark.parametrize(
    "imports",
    [
        "import ptuning\n" + AUTO,
        pytest.param(AUTO + "import ptuning\n", marks=pytest.mark.slow),
        *(
            pytest.param(line + AUTO, marks=pytest.mark.slow)
            for line in (
                # Ours is the first importer of transformers, and only half imported itself.
                "import ptuning.model.config\n",
                "import ptuning\nfrom ptuning import load_prefix, save_prefix\n",
                "import ptuning, importlib\nimportlib.reload(ptuning)\n",
                "import ptuning, transformers, importlib\nimportlib.reload(transformers)\n",
            )
        ),
    ],
)
def test_the_classes_are_registered_in_every_order_of_imports(imports: str) -> None:
    assert_runs(imports + SHOW)


@pytest.mark.slow
def test_a_pipeline_is_built_without_naming_an_auto_class() -> None:
    assert_runs(
        "import ptuning\nfrom transformers import pipeline\n"
        "made = pipeline('text-generation', model='ptuning/nano/weights')\n"
        "assert type(made.model).__name__ == 'ChatGLMForConditionalGeneration'"
    )


@pytest.mark.slow
def test_threads_may_import_at_once() -> None:
    done = run_python(
        """
import importlib, sys, threading
import ptuning
import transformers  # whose own import is not safe in several threads: it replaces its module
names = ["transformers", "ptuning.model.config", "ptuning.data.tokenizer", "ptuning.model.chatglm",
         "ptuning.train.progress", "ptuning.serve.session"]
start, errors, found = threading.Barrier(2 * len(names)), [], []

def work(name):
    start.wait()
    try:
        importlib.import_module(name)
        from transformers import AutoConfig
        found.append(type(AutoConfig.from_pretrained("ptuning/nano/weights")).__name__)
    except Exception as error:
        errors.append((name, repr(error)))

threads = [threading.Thread(target=work, args=(name,)) for name in names * 2]
sys.setswitchinterval(1e-5)
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not errors, errors
assert found == ["ChatGLMConfig"] * len(threads), found
"""
    )
    assert done.returncode == 0, done.stderr


def test_an_error_in_our_own_modules_is_not_hidden() -> None:
    done = run_python("import sys, ptuning\nsys.modules['ptuning.model.chatglm'] = None\n" + AUTO)
    assert done.returncode == 1
    assert "import of ptuning.model.chatglm halted" in done.stderr


def test_a_missing_transformers_is_reported_as_itself() -> None:
    done = run_python(
        "import sys, ptuning\n"
        "sys.path[:] = [path for path in sys.path if 'site-packages' not in path]\n"
        "import transformers"
    )
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named 'transformers'" in done.stderr


@pytest.mark.slow
def test_a_config_survives_pickling() -> None:
    assert_runs(
        "import pickle, ptuning\n" + AUTO + "config = AutoConfig.from_pretrained("
        "'ptuning/nano/weights')\n"
        "assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()\n"
        "import transformers\nassert pickle.loads(pickle.dumps(AutoModel)) is AutoModel"
    )


def test_unknown_names_of_the_package_are_attribute_errors() -> None:
    import ptuning

    with pytest.raises(AttributeError, match="module 'ptuning' has no attribute 'load_suffix'"):
        ptuning.load_suffix  # noqa: B018
    assert callable(ptuning.load_prefix)
