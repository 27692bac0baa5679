"""An engine slow enough to be stopped in the middle of an answer."""

import time

import pytest

from ptuning.serve.session import Session

STEP_S = 0.03


def slow_down(session: Session, monkeypatch: pytest.MonkeyPatch, *, step_s: float = STEP_S) -> None:
    """Make every decoding step of this session last a little."""
    engine = session.scheduler.engine
    fast_step = engine.step

    def step():
        time.sleep(step_s)
        return fast_step()

    monkeypatch.setattr(engine, "step", step)
