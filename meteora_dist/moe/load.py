"""Counts how much every slot is used: what a rebalance of the placement is decided on.

Shapes: T tokens, N linears of a group, K expert slots a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


class SlotLoads:
    """How often the tokens of this rank's requests were routed to each slot, once for every linear.

    Ranks of a tp group see the same tokens and count the same; the load of the world is the sum over one rank of each
    group. Groups only hand their ids over, and a pass is counted at its end, at once.
    """

    def __init__(self, adapters: Sequence[str]) -> None:
        """Starts at zero; ``adapters`` are the digests of those in the slots."""
        self._seen: list[Tensor] = []
        self._uses: Tensor | None = None
        # Names and counts are replaced together: another thread may be reading. The empty slot is counted first.
        self._counted = tuple(adapters), torch.zeros(1 + len(adapters), dtype=torch.long)

    def see(self, slots_TNK: Tensor) -> None:
        """Takes the slots of one group of linears in the pass under way; ``NO_EXPERT`` where unused."""
        self._seen.append(slots_TNK)

    def counter(self) -> Tensor:
        """Uses of each slot in the pass under way, int64, for compiled code to add to."""
        if self._uses is None:
            self._uses = torch.zeros(len(self._counted[0]), dtype=torch.long)
        return self._uses

    def settle(self) -> None:
        """Counts the pass that has ended."""
        adapters, counts = self._counted
        if self._seen:
            used = torch.cat([slots_TNK.flatten() for slots_TNK in self._seen]) + 1
            self._seen.clear()
            counts = counts + torch.bincount(used, minlength=len(counts)).cpu()
        if self._uses is not None:
            counts = counts + pad(self._uses, (1, 0))
            self._uses = None
        self._counted = adapters, counts

    def by_adapter(self) -> dict[str, int]:
        """The counts since the start, by digest; for any thread."""
        adapters, counts = self._counted
        return dict(zip(adapters, counts[1:].tolist(), strict=True))

    def renumber(self, adapters: Sequence[str]) -> None:
        """Between two passes: the slots hold other adapters from now on; new ones start at zero."""
        known = self.by_adapter()
        self._counted = tuple(adapters), torch.tensor([0, *(known.get(digest, 0) for digest in adapters)])
