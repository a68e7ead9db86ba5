"""A local Ray minds its own business."""

from __future__ import annotations

import signal

import pytest

pytestmark = [pytest.mark.ray]


@pytest.mark.usefixtures("own_ray")
def test_it_leaves_the_callers_sigterm_handler_alone() -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
