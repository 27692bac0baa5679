"""P-Tuning v2 for ChatGLM-6B.

Importing this package registers the configuration, the model and the tokenizer with transformers'
Auto classes and does nothing else. `load_prefix` and `save_prefix` read and write trained prefixes.

Importing torch and transformers takes seconds, so this module imports neither, and `--help` answers
at once. Registration waits for the first use of an Auto class from `transformers` (not one from
`transformers.models`). It must wait: while transformers is being imported, one of our own modules
may be the importer, itself half imported.
"""

import re
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

if TYPE_CHECKING:
    from ptuning.tunings.prefix import load_prefix, save_prefix

__all__ = ["load_prefix", "save_prefix"]

SUPPORTED = ("torch>=2.8", "transformers>=5.10,<6")


def check_versions() -> None:
    """Raise a one-line ImportError when torch or transformers is missing or out of range."""
    for needed in SUPPORTED:
        requirement = Requirement(needed)
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = "not installed"
        else:
            try:
                release = Version(found).base_version  # of a nightly, too
            except InvalidVersion:  # of a build of one's own, such as 2.9-mine
                release = (re.match(r"[\d.]*\d", found) or ["0"])[0]
            if requirement.specifier.contains(release):
                continue
        raise ImportError(
            f"{requirement.name} is {found}; this toolkit needs {needed}: pip install '{needed}'"
        )


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ptuning.tunings import prefix

    return getattr(prefix, name)


def _register() -> None:
    # From their own modules: `transformers` itself calls this function when asked for them.
    from transformers.models.auto.configuration_auto import AutoConfig
    from transformers.models.auto.modeling_auto import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
    )

    from ptuning.data.tokenizer import register_tokenizer
    from ptuning.model.chatglm import ChatGLMForConditionalGeneration
    from ptuning.model.config import ChatGLMConfig

    AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
    # The published repository maps AutoModel to the class with the head; its scripts rely on that.
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        auto_class.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
    register_tokenizer()


class _TransformersFinder(MetaPathFinder):
    """Hooks the import of transformers, so that `_register` runs before the first Auto class."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "transformers":
            return None
        later = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(name, path, target) for finder in later)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                _register_on_first_use(type(sys.modules[name]))  # it replaces itself there

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register_on_first_use(lazy_module: Any) -> None:
    """Register before transformers looks up the first of its Auto classes.

    transformers resolves its names lazily in `__getattr__` of its module class. The class is
    patched, not the module, because transformers creates the module twice.
    """
    look_up = lazy_module.__getattr__

    def __getattr__(self: ModuleType, name: str) -> Any:
        is_auto = name == "pipeline" or name.startswith("Auto") or "MAPPING" in name
        if is_auto and self.__name__ == "transformers":
            _register()
            lazy_module.__getattr__ = look_up
        return look_up(self, name)

    lazy_module.__getattr__ = __getattr__


check_versions()
if "transformers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _TransformersFinder())
