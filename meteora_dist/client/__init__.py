"""A typed client of the service, over HTTP and gRPC; needs httpx and grpc alone."""

from meteora_dist.client.answers import Answer, Piece, Reply, RoutingTrace, TokenLogprob, TokenRouting, Usage
from meteora_dist.client.asynchronous import AsyncClient
from meteora_dist.client.failures import CallFailed, CallTimedOut
from meteora_dist.client.question import Message, Mode, Options, Prompt, Routing
from meteora_dist.client.retry import Retry
from meteora_dist.client.synchronous import Client
from meteora_dist.errors import (
    BodyTooLarge,
    EngineUnavailable,
    ExpertNotFound,
    Forbidden,
    InvalidRequest,
    MeteoraError,
    Overloaded,
    RateLimited,
    RequestExpired,
    Unauthenticated,
)

__all__ = [
    "Answer",
    "AsyncClient",
    "BodyTooLarge",
    "CallFailed",
    "CallTimedOut",
    "Client",
    "EngineUnavailable",
    "ExpertNotFound",
    "Forbidden",
    "InvalidRequest",
    "Message",
    "MeteoraError",
    "Mode",
    "Options",
    "Overloaded",
    "Piece",
    "Prompt",
    "RateLimited",
    "Reply",
    "RequestExpired",
    "Retry",
    "Routing",
    "RoutingTrace",
    "TokenLogprob",
    "TokenRouting",
    "Unauthenticated",
    "Usage",
]
