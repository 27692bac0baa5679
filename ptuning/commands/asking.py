"""What commands share that ask a model: checks of their flags, and the endpoint behind them."""

import argparse
import importlib.util
import os
import re

from ptuning.commands.registry import OPENAI_KEY_VARIABLE
from ptuning.completions.endpoint import EndpointSource


def check_least(arguments: argparse.Namespace, **least: float) -> None:
    """Refuse a number below the least one for its flag (ValueError); unset ones pass."""
    for name, smallest in least.items():
        value = getattr(arguments, name)
        if value is not None and not value >= smallest:  # so NaN is refused too
            raise ValueError(f"--{name} is {value}; use {smallest:g} or more.")


def open_endpoint(arguments: argparse.Namespace) -> EndpointSource:
    """Connect to what the flags of `add_endpoint_flags` name; ValueError for one that is wrong."""
    url, key_name = arguments.endpoint, arguments.api_key_env or OPENAI_KEY_VARIABLE
    if arguments.model is None:
        raise ValueError("--endpoint needs the name of a model: --model NAME.")
    if not re.fullmatch(r"https?://(\[.+\]|[^/:]+)(:\d+)?(/.*)?", url):
        raise ValueError(f"--endpoint is {url}; give it as http://localhost:8000.")
    if importlib.util.find_spec("openai") is None:
        raise ValueError("openai is not installed; type: python -m pip install 'openai>=2'")
    if arguments.api_key_env is not None and key_name not in os.environ:
        raise ValueError(f"--api_key_env is {key_name}, a variable that is not set; export it.")
    check_least(arguments, concurrency=1, timeout=0.001)
    return EndpointSource(
        url.rstrip("/"),
        arguments.model,
        api=arguments.api,
        concurrency=arguments.concurrency,
        timeout_s=arguments.timeout,
        key=os.environ.get(key_name),
        key_name=key_name,
    )
