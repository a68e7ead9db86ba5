"""What a training run is told: the loop's options, those of its objective, and what both are applied to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from meteora_dist.adapters.files import sha256_file
from meteora_dist.bank.manifest import Pooling
from meteora_dist.config import StrictModel
from meteora_dist.errors import DatasetError
from meteora_dist.model.load import Dtype

Share = Annotated[float, Field(ge=0, le=1)]


class LoopSettings(StrictModel):
    """How any objective is optimised; a step is one update of the parameters.

    Attributes:
        steps: Updates in all.
        micro_batch: Sequences a worker passes at once.
        accumulation: Passes of a worker before an update; a step sees micro_batch * accumulation * workers sequences.
        zero_stage: DeepSpeed ZeRO. 1 shards the optimizer's state, 2 gradients as well, 3 all weights, the frozen
            base model's included.
        dtype: Of the frozen base model and of what it computes; trained parameters are fp32.
        learning_rate: Peak of AdamW's rate; cosine to 0 after the warm-up.
        warm_up: Share of the steps with a rising rate.
        weight_decay: Of AdamW.
        clip: Largest norm of the gradient; 0 for no limit.
        activation_checkpointing: Whether layers are run again in the backward pass rather than kept.
        log_every: Steps from one line of metrics to the next.
        checkpoint_every: Steps from one checkpoint to the next; 0 for none before the last step.
        evaluate_every: Steps from one look at held-out rows to the next, the first one before training; 0 for one after
            the last step.
        seed: Of the order of rows, random gates and dropout.
        threads: Torch threads of a worker on a CPU; 0 leaves torch's choice.
    """

    steps: PositiveInt = 1000
    micro_batch: PositiveInt = 4
    accumulation: PositiveInt = 1
    zero_stage: Literal[1, 2, 3] = 2
    dtype: Dtype = "bfloat16"
    learning_rate: PositiveFloat = 7e-3
    warm_up: Share = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(ge=0)] = 0.3
    activation_checkpointing: bool = False
    log_every: PositiveInt = 10
    checkpoint_every: NonNegativeInt = 100
    evaluate_every: NonNegativeInt = 0
    seed: int = 0
    threads: NonNegativeInt = 0


class DataSettings(StrictModel):
    """What any objective learns from.

    Attributes:
        sampler: ``balanced`` takes as many sequences of every expert, ``proportional`` as many as it has rows.
        rows: Most training rows taken of a data set; 0 for all.
        hold_out: Share of a data set, at its end, that training never sees.
        hold_out_rows: Most held-out rows a data set that are looked at; 0 for none.
        max_tokens: Of a sequence; longer ones lose the beginning of their prompt.
    """

    sampler: Literal["balanced", "proportional"] = "balanced"
    rows: NonNegativeInt = 0
    hold_out: Annotated[float, Field(ge=0, lt=1)] = 0.2
    hold_out_rows: NonNegativeInt = 16
    max_tokens: Annotated[int, Field(ge=2)] = 1024


class GateSettings(DataSettings):
    """What gates learn.

    Attributes:
        objective: ``end-to-end`` differentiates ``L_LM + beta * L_gate`` through the model. ``local`` fits every gate
            on its own detached input by cross-entropy: no backward pass through the model.
        beta: Weight of L_gate.
        lm: Whether L_LM counts.
        count_prompt: Whether prompt positions count, in both losses.
        top_k: Experts of a token that the gates route.
        teacher_forced: Share of the sequences that run with their own experts; the gates route the others.
        composites: Share of the sequences, on average, that ask rows of several experts in one; each token then has
            the label of its part.
        composite_parts: Most rows in one of them; their number is drawn evenly from 2 on.
        lora_dropout: Dropout before the adapters, not before the gates.
        lora_learning_rate: Trains the adapters as well, at this peak rate; None keeps them frozen.
        init: What untrained gate rows start from: zeros (L_gate is ln E), or normal(0, 1) as in the paper.
    """

    objective: Literal["end-to-end", "local"] = "end-to-end"
    beta: Annotated[float, Field(ge=0)] = 50.0
    lm: bool = True
    count_prompt: bool = True
    top_k: PositiveInt = 2
    teacher_forced: Share = 0.0
    composites: Share = 0.0
    composite_parts: Annotated[int, Field(ge=2)] = 3
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lora_learning_rate: PositiveFloat | None = None
    init: Literal["zeros", "normal"] = "zeros"

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.objective == "local" and (self.lm or self.lora_learning_rate):
            raise ValueError(
                "the local objective has no backward pass through the model: it needs lm off (lm=false) "
                "and frozen adapters"
            )
        if self.objective == "end-to-end" and not self.lm and not self.beta:
            raise ValueError("with beta 0 and the LM term off there is nothing to learn")
        return self


class MoaSettings(DataSettings):
    """What routers learn, and the LoRAs with them.

    Attributes:
        eta: Weight of the routers' loss.
        pooling: What of a prompt routers read, ``last`` or ``mean``; the bank will say so.
        router_input: Whose hidden states routers learn from: the ``base`` model's, which is what they see when they
            vote; or, in the one pass of the paper, those with the labelled ``expert`` at work, so that the routers'
            loss reaches the LoRAs of the layers below as well.
        lora_learning_rate: Peak of the LoRAs' rate; None keeps them frozen. Routers have the loop's.
    """

    eta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    pooling: Pooling = "last"
    router_input: Literal["base", "expert"] = "base"
    lora_learning_rate: PositiveFloat | None = 1e-4


class Source(StrictModel):
    """The data set of one expert.

    Attributes:
        expert: Its name.
        path: ``.jsonl`` or ``.jsonl.gz`` file.
        sha256: Of the file.
        unlabelled: Whether its rows are plain text, {"text": ...}, rather than questions with answers.
    """

    expert: str
    path: Path
    sha256: str
    unlabelled: bool = False

    @classmethod
    def of(cls, expert: str, path: Path, unlabelled: bool = False) -> Source:
        """The data set in a file; ``DatasetError`` when it cannot be read."""
        return cls(expert=expert, path=path.resolve(), sha256=sha256_file(path, DatasetError), unlabelled=unlabelled)


class Run(StrictModel):
    """All that a worker is given. Paths are the same on every worker.

    Attributes:
        base: Folder of the base model.
        draft: Bank with every expert, and the gates and routers that training starts from.
        folder: Of the run: its metrics and its checkpoints.
        sources: Data sets; experts without one are told apart from, but not trained towards.
        trained: Names of the experts that are trained.
        loop: The loop's options.
    """

    base: Path
    draft: Path
    folder: Path
    sources: tuple[Source, ...]
    trained: tuple[str, ...]
    loop: LoopSettings


class GateRun(Run):
    """A training of gates; ``trained`` are the last experts of the draft, and ``gates`` the gates' options."""

    gates: GateSettings


class MoaRun(Run):
    """A training of routers, and of LoRAs with them; ``moa`` are its options."""

    moa: MoaSettings
