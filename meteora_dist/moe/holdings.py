"""What a rank has loaded of a residency, and how it gets from one to the next.

The next holdings are made beside the ones in use and share with them whatever stays: a rank reads from disk only the
adapters it newly owns and the gates of new generations. Nothing changes for requests until the states are switched.

Shapes: N linears that share one input, E experts of a generation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meteora_dist.adapters import Adapter
from meteora_dist.bank import Bank
from meteora_dist.errors import BankError
from meteora_dist.moe.dispatcher import targets_of
from meteora_dist.moe.experts import read_expert, read_gates, stack_experts, unread_expert
from meteora_dist.moe.layer import GroupState, RoutedGroup
from meteora_dist.moe.linears import layer_of
from meteora_dist.moe.residency import Residency
from meteora_dist.moe.routing import LiveGeneration, live_generations
from meteora_dist.moe.sharding import GroupShape
from meteora_kernels.routed_lora.plan import located
from meteora_kernels.routed_lora.stack import LoraStack


@dataclass(frozen=True, slots=True)
class Holdings:
    """A residency with its banks opened.

    Attributes:
        residency: What is held, and where.
        banks: The bank of each live generation.
    """

    residency: Residency
    banks: Mapping[int, Bank]

    @classmethod
    def open(cls, residency: Residency, known: Mapping[int, Bank]) -> Holdings:
        """Opens and checks the banks of a residency, except for those that are ``known``.

        Adapters are not hashed now, but by the ranks that read them, when they do.

        Raises:
            BankError: A bank is damaged, or not the one the residency was made for.
            AdapterError: An adapter is damaged.
        """
        banks = {
            number: known.get(number) or Bank.open(folder, hashing=False)
            for number, folder in residency.folders.items()
        }
        for number, digests in residency.roster.adapters.items():
            bank = banks[number]
            if (bank.manifest.generation, bank.digests) != (number, digests):
                raise BankError(
                    bank.path, f"should be generation {number} of the bank, with the adapters it was announced with"
                )
        return cls(residency, banks)

    @property
    def linears(self) -> frozenset[str]:
        """Module paths of all linears that an expert of a live generation adapts."""
        return frozenset(linear for bank in self.banks.values() for linear in bank.linears)

    def live(self, depth: int) -> dict[int, LiveGeneration]:
        """The live generations, as routing needs them; ``depth`` decoder layers have routed linears."""
        prototypes = {number: bank.prototypes for number, bank in self.banks.items()}
        layers = {number: Counter(map(layer_of, bank.linears)) for number, bank in self.banks.items()}
        linears = {number: tuple(counts[layer] for layer in range(depth)) for number, counts in layers.items()}
        return live_generations(self.residency.roster, prototypes, linears)

    def adapters(self) -> dict[str, Adapter]:
        """The adapters of all live generations by digest, each in the newest bank that has it."""
        return {adapter.digest: adapter for bank in self.banks.values() for adapter in bank.adapters}


@dataclass(frozen=True, slots=True)
class Resident:
    """Memory a rank uses for the bank.

    Attributes:
        expert_bytes: Matrices of its part of the experts.
        gate_bytes: Gates of all live generations.
    """

    expert_bytes: int
    gate_bytes: int


def first_states(
    shapes: Sequence[GroupShape], holdings: Holdings, group: int, dtype: torch.dtype, device: torch.device
) -> tuple[GroupState, ...]:
    """What every group of linears starts with.

    Args:
        shapes: The linears of each.
        holdings: What is to be held.
        group: This rank's expert-parallel group.
        dtype: Of the linears' inputs.
        device: Where the experts go.

    Raises:
        CheckpointError: A file has changed, or does not fit the base model.
    """
    nothing = [GroupState((), (), torch.empty(0), stack_experts([], shape, dtype, device)) for shape in shapes]
    return _states(shapes, nothing, Holdings(holdings.residency, {}), holdings, (), group)


def next_states(groups: Iterable[RoutedGroup], now: Holdings, then: Holdings, group: int) -> tuple[GroupState, ...]:
    """What every group of linears has to be switched to, for ``then`` to be in force; arguments as above.

    Raises:
        BankError: A bank targets a linear that is not routed: no expert adapted it when the model was loaded.
        CheckpointError: A file has changed, or does not fit the base model.
    """
    groups = list(groups)
    routed = {name for each in groups for name in each.names}
    for bank in then.banks.values():
        if unrouted := [linear for linear in bank.linears if linear not in routed]:
            raise BankError(
                bank.path,
                f"adapts {unrouted[0]}, which no expert did when this engine was started; start it anew with this bank",
            )
    shapes, states = [each.shape for each in groups], [each.state for each in groups]
    return _states(shapes, states, now, then, now.residency.held_by(group), group)


def resident(states: Sequence[GroupState]) -> Resident:
    """Memory behind the states; what several tensors share counts once, and what a tensor keeps alive counts whole."""
    return Resident(
        expert_bytes=_storage_bytes(matrix for state in states for matrix in state.stack.matrices),
        gate_bytes=_storage_bytes(gate_PH for state in states for gate_PH in state.gates),
    )


def _states(
    shapes: Sequence[GroupShape],
    before: Sequence[GroupState],
    now: Holdings,
    then: Holdings,
    held: Sequence[str],
    group: int,
) -> tuple[GroupState, ...]:
    """The states for ``then``, with the experts ``held`` and the gates of ``now`` as ``before`` has them.

    Memory is laid out first, for all groups; then every expert that is not here yet is read into its places, once.
    """
    adapters, wanted = then.adapters(), then.residency.held_by(group)
    places = {digest: place for place, digest in enumerate(held)}
    states = []
    for shape, old in zip(shapes, before, strict=True):
        dtype, device = old.stack.dtype, old.stack.scales_NE.device
        experts = [
            old.stack.experts[places[digest]]
            if digest in places
            else unread_expert(adapters[digest], shape, dtype, device)
            for digest in wanted
        ]
        gates = dict(zip(now.banks, zip(old.gates, old.absent, strict=True), strict=True))
        loaded = [
            gates[number] if number in gates else (read_gates(bank, shape, device), _absent(bank, shape, device))
            for number, bank in then.banks.items()
        ]
        states.append(
            GroupState(
                gates=tuple(gate_PH for gate_PH, _ in loaded),
                absent=tuple(absent_N1 for _, absent_N1 in loaded),
                targets_DG=targets_of(then.residency.placement, group, device),
                stack=located(_released(stack_experts(experts, shape, dtype, device))),
            )
        )
    for place, digest in enumerate(wanted):
        if digest not in places:
            own = [state.stack.experts[place] for state in states]
            read_expert(adapters[digest], zip(shapes, own, strict=True))
    return tuple(states)


def _absent(bank: Bank, shape: GroupShape, device: torch.device) -> Tensor | None:
    """Which of the linears no expert of the bank adapts; None when each has one."""
    absent_N = torch.tensor([name not in bank.gate_header.tensors for name in shape.names], device=device)
    return absent_N[:, None] if bool(absent_N.any()) else None


def _released(stack: LoraStack) -> LoraStack:
    """The stack without views of larger tensors, which would keep the matrices of forgotten experts alive."""
    if stack.packed is not None:
        return stack

    def own(matrix: Tensor) -> Tensor:
        return matrix if matrix.untyped_storage().nbytes() == matrix.nbytes else matrix.clone()

    experts = [
        tuple(part and replace(part, a_RH=own(part.a_RH), b_RO=own(part.b_RO)) for part in expert)
        for expert in stack.experts
    ]
    return replace(stack, experts=tuple(experts))


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
