"""Ranks that can be harmed from outside. Like real ones, they import nothing that only a replica needs."""

from __future__ import annotations

import os
import signal
from typing import Literal

from meteora_dist.bench.findable import FindableRank, Found

Fault = Literal["kill", "stop", "raise"]


async def harm(target: Found, fault: Fault) -> None:
    """Kills a rank's process with -9, stops it, or makes its next forward pass raise."""
    if fault == "raise":
        await target.actor.break_next_pass.remote()
    else:
        os.kill(target.pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)


class FragileRank(FindableRank):
    """A rank that fails on request."""

    async def break_next_pass(self) -> None:
        """Plants an error at the first layer of the model."""
        self._running().routed.model.get_decoder().layers[0].register_forward_pre_hook(_fail)


def _fail(*_: object) -> None:
    raise RuntimeError("a planted fault")
