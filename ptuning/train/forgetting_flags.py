"""The flags about what a base keeps of its abilities, and their checks."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptuning.data.mixing import parse_mix
from ptuning.model.tuned import PTUNING

if TYPE_CHECKING:
    from ptuning.train.flags import DataArguments, ModelArguments, TrainingArguments


def flag(help_text: str) -> Any:
    """Declare a flag that is unset by default."""
    return field(default=None, metadata={"help": help_text})


@dataclass
class StartArguments:
    """How a new prefix starts; a part of ModelArguments."""

    preset: str | None = flag(
        "Defaults that go together: task (--learning_rate 2e-2), for the task's score, or gentle "
        "(--learning_rate 1e-3 --prefix_init_std 1e-3), which keeps more of the base; typed flags "
        "win."
    )
    prefix_init_std: float | None = flag(
        "Spread of a new prefix's entries; unset is 1, as published. Near 0, the prefix changes "
        "the base least at the start."
    )


@dataclass
class GeneralArguments:
    """General prompts and general rows; a part of DataArguments."""

    mix: str | None = flag(
        "Train on general rows too: FILE:RATIO, RATIO being their share of all rows of an epoch, "
        "or FILE:RATIO:PROMPT,RESPONSE to name their columns; unset columns are the task's."
    )
    measure_retention: bool | None = flag(
        "With --do_predict, measure how much the base's answers to general prompts have changed; "
        "unset is as --compare_base."
    )
    general_prompts: str | None = flag(
        "File of those prompts, column prompt; unset is general_prompts.json in the base's folder, "
        "else the 40 of this package."
    )


def check_forgetting(
    model: "ModelArguments", data: "DataArguments", training: "TrainingArguments"
) -> None:
    """Refuse values that cannot be, and flags that another flag leaves without effect (ValueError).

    Takes measure_retention's meaning from compare_base where it is unset.
    """
    if data.mix is not None:
        source = parse_mix(data.mix)
        if training.do_train and not source.path.is_file():
            raise ValueError(
                f"--mix is {data.mix}, and there is no file {source.path}; give a .json, .jsonl "
                "or .csv file of general rows."
            )
    if training.do_predict and data.general_prompts and not Path(data.general_prompts).is_file():
        raise ValueError(
            f"--general_prompts is {data.general_prompts}, which is no file; give rows such as "
            '{"prompt": "..."}, or leave it out.'
        )
    if data.measure_retention is None:
        data.measure_retention = data.compare_base
    if model.preset is not None and training.tuning != PTUNING:
        raise ValueError(
            f"--preset is {model.preset} and --tuning is {training.tuning}; the presets are for a "
            "prefix: leave --preset out and give --learning_rate."
        )
    if model.prefix_init_std is None:
        return
    if model.prefix_init_std <= 0:
        raise ValueError(f"--prefix_init_std is {model.prefix_init_std}; use a number above 0.")
    if training.tuning != PTUNING or model.ptuning_checkpoint is not None:
        raise ValueError(
            f"--prefix_init_std is {model.prefix_init_std}, but no new prefix is made here; leave "
            "it out."
        )
