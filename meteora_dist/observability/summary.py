"""What is left of a call when it has ended: the same facts for its log line and its span."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class CallSummary:
    """One call that has ended. None of it is text of a prompt or of an answer.

    Attributes:
        request_id: The caller's ``x-request-id``, or one of ours.
        completion_id: Id of the answer, without its prefix; None when none was begun.
        protocol: ``http`` or ``grpc``.
        operation: Route or method that was called.
        key: Name of the caller's API key, or ``anonymous``; None when nobody was let in.
        model: As the caller wrote it; None when no tokens were asked for, or the model is not served.
        mode: Routing mode, or ``none``.
        prompt_tokens: Of all its prompts.
        completion_tokens: Of all its answers.
        ttft_ms: Milliseconds from its arrival to its first token; None when there was none.
        duration_ms: Milliseconds from its arrival to its end.
        outcome: What came of it: a label of ``meteora_requests``.
        status: HTTP status; for gRPC the one its status corresponds to.
        code: Code of the error, as callers see it; None without.
    """

    request_id: str
    completion_id: str | None
    protocol: str
    operation: str
    key: str | None
    model: str | None
    mode: str
    prompt_tokens: int
    completion_tokens: int
    ttft_ms: float | None
    duration_ms: float
    outcome: str
    status: int
    code: str | None

    def fields(self) -> dict[str, object]:
        """What there is to tell, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}
