"""How a bank routes data sets: who is chosen in which layer, for which task, how surely, token by token.

Shapes: T tokens of a passage, E experts, L decoder layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from meteora_dist.evaluation.forced import Passage, answer_nll, watched_logits
from meteora_dist.evaluation.gates import layer_of
from meteora_dist.evaluation.prompts import encode
from meteora_dist.evaluation.suite import Task
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.moe.routing import RoutingChoice


@dataclass(frozen=True, slots=True)
class Example:
    """One passage of a task.

    Attributes:
        tokens: Text of its tokens.
        prompt_tokens: How many of them are the prompt.
        votes: For each token, the share [E] of the linears whose gate chooses the expert first.
    """

    tokens: tuple[str, ...]
    prompt_tokens: int
    votes: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class TaskRouting:
    """How the rows of one task are routed.

    Attributes:
        task: Its name.
        rows: How many.
        chosen: Share [E] of each expert in the first choices of all gates and tokens.
        answer_chosen: The same, of the choices that concern tokens of the answer.
        entropy: Of the gates' softmax over all experts, as a part of its most, ln E; the mean over gates and tokens.
        example: Its first row.
    """

    task: str
    rows: int
    chosen: tuple[float, ...]
    answer_chosen: tuple[float, ...]
    entropy: float
    example: Example


@dataclass(frozen=True, slots=True)
class RoutingSummary:
    """How a bank routes all tasks.

    Attributes:
        experts: Names.
        load: For each layer the share [E] of each expert in the first choices; every token counts the same.
        layer_entropy: [L], as ``TaskRouting.entropy``.
        tasks: One by one.
    """

    experts: tuple[str, ...]
    load: tuple[tuple[float, ...], ...]
    layer_entropy: tuple[float, ...]
    tasks: tuple[TaskRouting, ...]


def routing_summary(
    routed: RoutedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    tasks: Sequence[Task],
    choice: RoutingChoice,
    passed: Callable[[], None] = lambda: None,
) -> RoutingSummary:
    """Passes over prompts and gold answers, routed as ``choice`` says, and counts what the gates choose.

    As in the gate loss, the choice at a token concerns the next one, so the last token of a passage does not count.

    Args:
        routed: The model with the bank's experts.
        tokenizer: Of the model.
        names: Of the experts.
        tasks: Their rows.
        choice: How the passes are routed.
        passed: Called after each row.
    """
    layers: dict[int, _Tally] = {}
    found = []
    with watched_logits(routed) as logits:
        for task in tasks:
            total, answers, example = _Tally(len(names)), _Tally(len(names)), None
            for row in task.rows:
                passage = Passage(*encode(tokenizer, row))
                answer_nll(routed, passage, choice)
                start = len(passage.prompt) - 1
                for linear, logits_TE in logits.items():
                    total.add(logits_TE[:-1])
                    answers.add(logits_TE[start:-1])
                    layers.setdefault(layer_of(linear), _Tally(len(names))).add(logits_TE[:-1])
                example = example or _example(tokenizer, passage, list(logits.values()))
                passed()
            assert example is not None, "a task has at least one row"
            chosen = TaskRouting(task.name, len(task.rows), total.shares, answers.shares, total.entropy, example)
            found.append(chosen)
    ordered = [tally for _, tally in sorted(layers.items())]
    return RoutingSummary(
        experts=tuple(names),
        load=tuple(tally.shares for tally in ordered),
        layer_entropy=tuple(tally.entropy for tally in ordered),
        tasks=tuple(found),
    )


@dataclass(slots=True)
class _Tally:
    """First choices and entropies, added up.

    Attributes:
        experts: E.
        picks_E: How often each was chosen.
        nats: Sum of the entropies.
    """

    experts: int
    picks_E: Tensor = field(init=False)
    nats: float = 0.0

    def __post_init__(self) -> None:
        self.picks_E = torch.zeros(self.experts, dtype=torch.int64)

    def add(self, logits_TE: Tensor) -> None:
        self.picks_E += torch.bincount(logits_TE.argmax(-1), minlength=self.experts).cpu()
        logs_TE = logits_TE.float().log_softmax(-1)
        self.nats -= float((logs_TE.exp() * logs_TE).sum())

    @property
    def shares(self) -> tuple[float, ...]:
        return tuple((self.picks_E / max(1, int(self.picks_E.sum()))).tolist())

    @property
    def entropy(self) -> float:
        """The mean, as a part of ln E; 0 where there is one expert, or nothing was added."""
        most = math.log(self.experts) * int(self.picks_E.sum())
        return self.nats / most if most else 0.0


def _example(tokenizer: PreTrainedTokenizerBase, passage: Passage, logits: Sequence[Tensor]) -> Example:
    """Every token with the votes that concern it: those at the token before; the first has those of its own."""
    experts = logits[0].shape[-1]
    picks_NT = torch.stack([logits_TE.argmax(-1) for logits_TE in logits])
    votes = [torch.bincount(picks_N, minlength=experts) / len(logits) for picks_N in picks_NT.T]
    tokens = tuple(str(tokenizer.decode([one])) for one in passage.ids)
    return Example(tokens, len(passage.prompt), tuple(tuple(vote_E.tolist()) for vote_E in (votes[0], *votes[:-1])))
