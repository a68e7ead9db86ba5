"""The ranks' processes on this node, to be ended at once even when they are stopped."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping

import ray

from meteora_cluster.member import Whereabouts


class LocalProcesses:
    """Processes of ranks on the caller's own node; those elsewhere are left to Ray.

    Ray asks a process to end, and kills it when it has not done so after five seconds: a stopped one never does, and
    holds its share of the placement group for that long.
    """

    def __init__(self) -> None:
        self._handles: dict[int, int] = {}

    def hold(self, ranks: Mapping[int, Whereabouts]) -> None:
        """Takes a handle on each that is here: unlike a process id it never comes to mean another process."""
        here = ray.get_runtime_context().get_node_id()
        for rank, whereabouts in ranks.items():
            if whereabouts.node == here:
                # Gone already, or a kernel without such handles.
                with contextlib.suppress(OSError):
                    self._handles[rank] = os.pidfd_open(whereabouts.pid)

    def kill(self, rank: int) -> None:
        """Ends the process of a rank, if it is held, and lets go of it."""
        handle = self._handles.pop(rank, None)
        if handle is not None:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)

    def let_go(self, rank: int) -> None:
        """Gives the handle of a rank back, if there is one; its process lives on."""
        handle = self._handles.pop(rank, None)
        if handle is not None:
            os.close(handle)
