"""Where adapters may come from: folders below the configured roots, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from meteora_dist.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE
from meteora_dist.bank import NewExpert
from meteora_dist.bank.rows import ROWS_FILE
from meteora_dist.errors import InvalidRequest

logger = logging.getLogger(__name__)

_PARAM = "adapter"


class Sources:
    """The roots below which administrators may name adapters.

    A name is a path relative to a root; with several roots the first that has it counts. Links may lead anywhere below
    the same root, and never out of it.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        """Resolves the roots once, so that a root may itself be a link.

        Raises:
            InvalidRequest: One of them is no folder.
        """
        if missing := [root for root in roots if not root.is_dir()]:
            raise InvalidRequest(f"expert_roots: there is no folder {missing[0]}", "expert_roots")
        self._roots = tuple(root.resolve() for root in roots)

    def expert(self, adapter: str) -> NewExpert:
        """The expert that ``adapter`` names, with its gate rows where they lie beside it.

        Raises:
            InvalidRequest: There are no roots, no root has such a folder, or the folder or a file of it lies elsewhere.
        """
        if not self._roots:
            raise InvalidRequest("this service takes no adapters: its configuration names no expert_roots", _PARAM)
        path = Path(adapter)
        if not adapter or "\0" in adapter or path.is_absolute() or ".." in path.parts:
            raise InvalidRequest(
                f"{_PARAM} is {adapter!r}, but must be a path below one of the service's expert_roots, without '..'",
                _PARAM,
            )
        try:
            for root in self._roots:
                if (root / path).is_dir():
                    return NewExpert(_inside(root, path))
        except (OSError, RuntimeError):
            # A name that is too long for the file system, or, says Python, a link that leads to itself.
            logger.warning("an adapter cannot be looked up", exc_info=True)
        raise InvalidRequest(f"there is no folder {adapter!r} in the service's expert_roots", _PARAM)

    def shown(self, path: Path) -> str | None:
        """A path as an administrator may see it, relative to its root; None for one that lies elsewhere."""
        for root in self._roots:
            if path.is_relative_to(root):
                return str(path.relative_to(root))
        return None


def _inside(root: Path, path: Path) -> Path:
    folder = (root / path).resolve()
    files = (folder, *(folder / name for name in (CONFIG_FILE, WEIGHTS_FILE, ROWS_FILE)))
    for file in files:
        if not file.resolve().is_relative_to(root):
            raise InvalidRequest(f"{path / file.name if file != folder else path} leads out of its expert root", _PARAM)
    return folder
