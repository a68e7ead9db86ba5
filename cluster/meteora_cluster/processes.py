"""The ranks' processes on this node, to be ended at once even when they are stopped."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence

import ray

from meteora_cluster.member import Whereabouts


class LocalProcesses:
    """Processes of ranks on the caller's own node; those elsewhere are left to Ray.

    Ray asks a process to end, and kills it when it has not done so after five seconds: a stopped one never does, and
    holds its share of the placement group for that long.
    """

    def __init__(self) -> None:
        self._handles: list[int] = []

    def hold(self, ranks: Sequence[Whereabouts]) -> None:
        """Takes a handle on each that is here: unlike a process id it never comes to mean another process."""
        here = ray.get_runtime_context().get_node_id()
        for rank in ranks:
            # Gone already, or a kernel without such handles.
            with contextlib.suppress(OSError):
                self._handles += [os.pidfd_open(rank.pid)] if rank.node == here else []

    def kill(self) -> None:
        """Ends all of them, and lets go of the handles."""
        for handle in self._handles:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)
        self._handles = []
