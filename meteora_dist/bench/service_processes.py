"""The processes of a service that this process runs: who they are, what memory they hold, what time they have used."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any

# Ray names its processes after the actor's class, and the method that runs.
_NAMES: dict[str, tuple[str, ...]] = {
    "replica": ("ray::ServeReplica",),
    "rank": ("ray::RankActor", "ray::MeasuredRank"),
    "proxy": ("ray::ProxyActor",),
}


@dataclass(frozen=True, slots=True)
class ServiceProcesses:
    """They are found once: a service under measurement keeps its processes.

    Attributes:
        found: Process handles by role.
    """

    found: dict[str, list[Any]]

    @classmethod
    def find(cls) -> ServiceProcesses:
        """Those among the descendants of this process, once the service runs."""
        children = [(child, _title(child)) for child in _psutil().Process().children(recursive=True)]
        return cls({role: [child for child, title in children if title.startswith(_NAMES[role])] for role in _NAMES})

    def resident(self) -> dict[str, int]:
        """Resident bytes by role, shared ones included."""
        return {role: sum(one.memory_info().rss for one in members) for role, members in self.found.items()}

    def cpu_s(self) -> dict[str, float]:
        """Seconds of a core that each role has used so far; this process is the ``caller``."""
        own = os.times()
        used = {role: sum(sum(one.cpu_times()[:2]) for one in members) for role, members in self.found.items()}
        return {**used, "caller": own.user + own.system}


def _title(process: Any) -> str:
    psutil = _psutil()
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def _psutil() -> Any:
    # Ray ships it and puts it on the path when it is imported.
    return import_module("psutil")
