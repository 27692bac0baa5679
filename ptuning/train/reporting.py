"""Whether a run can report where it was asked to (--report_to, --push_to_hub), before it starts.

transformers finds out only when the trainer is made: after the rows were read and the model loaded.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ptuning.train.processes import in_main_process
from ptuning.train.run_config import RunConfig, UsageError

# --report_to: packages of which one is needed, by the names they are imported and installed under.
# Source: https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/integrations/integration_utils.py
SAME_NAME = "clearml codecarbon dagshub dvclive mlflow neptune swanlab trackio wandb"
PACKAGES: dict[str, dict[str, str]] = {name: {name: name} for name in SAME_NAME.split()} | {
    "azure_ml": {"azureml": "azureml-core"},
    "comet_ml": {"comet_ml": "comet-ml"},
    "flyte": {"flytekit": "flytekit"},
    "kubeflow": {},  # it sends to a server, with no package of its own
    "tensorboard": {"tensorboard": "tensorboard", "tensorboardX": "tensorboardX"},
}


def check_reporting(report_to: str | Sequence[str] | None) -> None:
    """Check that the packages of --report_to are installed; UsageError with what to type."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    if names in (["none"], ["all"]):
        return
    if unknown := [name for name in names if name not in PACKAGES]:
        raise UsageError(
            f"--report_to is {', '.join(unknown)}; use none, all (whatever is installed) or one of "
            f"{', '.join(sorted(PACKAGES))}."
        )
    if missing := list(_missing_packages(names)):
        raise UsageError(
            f"--report_to {' '.join(names)} needs {' and '.join(missing)}, not installed here; "
            f"type: {sys.executable} -m pip install {' '.join(missing)}"
        )


def _missing_packages(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        packages = PACKAGES[name]
        if packages and not any(map(_is_installed, packages)):
            yield next(iter(packages.values()))
    if "dagshub" in names and "mlflow" not in names and not _is_installed("mlflow"):
        yield "mlflow"  # which dagshub logs through


def _is_installed(module: str) -> bool:
    """Tell whether a package can be imported; a folder ./wandb of offline runs is none."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def check_push_to_hub(
    *,
    output_dir: str | Path,
    hub_model_id: str | None = None,
    token: str | None = None,
    private: bool | None = None,
) -> None:
    """Make the repository that --push_to_hub writes to, as transformers would after loading.

    hub_model_id None names it after output_dir, token None is that of `hf auth login` or HF_TOKEN.
    UsageError, with what to type, where the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi, constants, errors, get_token

    leave_out = "or leave --push_to_hub out and upload the folder later with hf upload."
    if constants.HF_HUB_OFFLINE:
        raise UsageError(
            f"--push_to_hub needs the hub, and HF_HUB_OFFLINE is set: unset it, {leave_out}"
        )
    if (token or get_token()) is None:
        raise UsageError(
            "--push_to_hub needs a token that may write: type hf auth login, give --hub_token, "
            f"{leave_out}"
        )
    repository = hub_model_id or Path(output_dir).absolute().name
    try:
        HfApi().create_repo(repository, token=token, private=private, exist_ok=True)
    except (errors.HfHubHTTPError, ValueError) as error:  # refused: token, permission, name
        raise UsageError(
            f"--push_to_hub: {constants.ENDPOINT} refuses the repository {repository}: "
            f"{_first_line(error)} Give a token that may write to it (--hub_token, hf auth login) "
            f"and --hub_model_id OWNER/NAME, {leave_out}"
        ) from error
    except (errors.HTTPError, OSError) as error:  # HTTPError: httpx's or httpx2's, as the hub has
        raise UsageError(
            f"--push_to_hub: {constants.ENDPOINT} cannot be reached ({_first_line(error)}): check "
            f"the connection or set HF_ENDPOINT to a mirror, {leave_out}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_run(config: RunConfig) -> None:
    """Refuse to start if what the run reports to is missing (UsageError)."""
    check_reporting(config.report_to)
    if config.push_to_hub:
        flags = config.trainer_flags
        check = partial(
            check_push_to_hub,
            output_dir=config.output_dir,
            hub_model_id=flags.get("hub_model_id"),
            token=flags.get("hub_token"),
            private=flags.get("hub_private_repo"),
        )
        in_main_process(check)
