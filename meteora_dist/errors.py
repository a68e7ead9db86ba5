"""The errors users see. Each says what was wrong, where, and what would be right.

``meteora_dist.serving.status`` maps every class to one HTTP status and one gRPC code.
"""

from __future__ import annotations

from pathlib import Path


class MeteoraError(Exception):
    """Base of everything this package raises on purpose."""


class InvalidRequest(MeteoraError):
    """A request that cannot be served as it is written.

    Attributes:
        param: The field at fault, as the caller wrote it, or None.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(InvalidRequest):
    """Prompt and requested answer do not fit into the context."""


class ExpertNotFound(InvalidRequest):
    """The request names a model or an expert that is not served."""


class StaleGeneration(InvalidRequest):
    """A change that was meant for another generation of the bank than the newest."""


class BodyTooLarge(InvalidRequest):
    """A request has more bytes than this service reads."""


class Unauthenticated(MeteoraError):
    """A call without an API key, or with one that is not known."""


class Forbidden(MeteoraError):
    """A call that its API key does not allow."""


class Overloaded(MeteoraError):
    """There is no room for the request; it was not started.

    Attributes:
        retry_after_s: Seconds after which trying again makes sense; None for what the service says in general.
    """

    def __init__(self, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(Overloaded):
    """The caller's API key has used up what it may."""


class RequestExpired(MeteoraError):
    """The request took longer than this service gives one."""


class EngineUnavailable(MeteoraError):
    """The ranks cannot answer: they are starting, stopping or broken."""


class PlanError(MeteoraError):
    """A layout that cannot be: it does not fit, or its numbers do not go together."""


class CheckpointError(MeteoraError):
    """A file or folder on disk is not what it must be.

    Attributes:
        path: The file or folder at fault.
    """

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(path, message)
        self.path = path

    def __str__(self) -> str:
        return "{}: {}".format(*self.args)


class KeysError(CheckpointError):
    """A file of API keys that is missing or damaged."""


class AdapterError(CheckpointError):
    """A PEFT adapter that is damaged, or asks for what we do not do."""


class BankError(CheckpointError):
    """A bank that is damaged or does not fit its base model."""


class DatasetError(CheckpointError):
    """A data set that is missing or damaged, or belongs to no expert."""


class EvaluationError(MeteoraError):
    """An evaluation that cannot be: its options do not go together, or do not fit the tasks or the bank."""


class TrainingError(MeteoraError):
    """A training run that cannot be: its options do not go together, or do not fit the run it shall go on with."""


class ModelError(CheckpointError):
    """A base model that is damaged, missing or of an unsupported shape."""
