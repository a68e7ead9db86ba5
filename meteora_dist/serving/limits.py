"""How much one request may ask for, and how much this service does at once."""

from __future__ import annotations

from dataclasses import dataclass

from meteora_dist.errors import BodyTooLarge, InvalidRequest
from meteora_dist.serving.request import TextRequest

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """The numbers of :class:`~meteora_dist.serving.config.ServiceConfig` that bound requests.

    Attributes:
        max_model_len: Most tokens of prompt and answer together.
        max_prompt_tokens: Most tokens of a prompt; None for as many as fit into the context.
        max_answer_tokens: Most tokens a request may ask for; None for as many as fit into the context.
        max_stops: Most stop texts of a request.
        max_stop_chars: Most characters of a stop text.
        max_body_bytes: Most bytes of an HTTP body or a gRPC message.
        max_request_s: Seconds a request gets, from its first byte to its last, waiting included.
        max_live_requests: Answers that are generated at once.
        max_waiting_requests: Requests that wait for one of those places.
    """

    max_model_len: int
    max_prompt_tokens: int | None = None
    max_answer_tokens: int | None = None
    max_stops: int = 4
    max_stop_chars: int = 256
    max_body_bytes: int = 4 * MIB
    max_request_s: float = 570.0
    max_live_requests: int = 128
    max_waiting_requests: int = 128

    def check(self, request: TextRequest) -> None:
        """Raises InvalidRequest, naming the field, for what can be told before the prompt is tokenized."""
        if len(request.stop) > self.max_stops:
            raise InvalidRequest(f"stop is {len(request.stop)} texts, but must be at most {self.max_stops}", "stop")
        longest = max(map(len, request.stop), default=0)
        if longest > self.max_stop_chars:
            raise InvalidRequest(
                f"stop has a text of {longest} characters, but must have at most {self.max_stop_chars}", "stop"
            )
        asked, limit = request.max_tokens, self.max_answer_tokens
        if asked is not None and limit is not None and asked > limit:
            raise InvalidRequest(f"max_tokens is {asked}, but must be at most {limit}", "max_tokens")

    def check_size(self, size: int) -> None:
        """Raises BodyTooLarge for a body or a message of more than ``max_body_bytes``."""
        if size > self.max_body_bytes:
            raise BodyTooLarge(f"a request may have {self.max_body_bytes} bytes at most; this one has more")
