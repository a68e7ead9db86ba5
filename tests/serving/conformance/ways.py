"""Four ways to ask a service the same thing; each gives the same kind of outcome.

A question is a dictionary in the names of the HTTP fields, and each way writes it in its own notation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import httpx

from meteora_dist.serving.grpc_api import CallFailed, GrpcMethods
from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb

Question = Mapping[str, Any]

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}


@dataclass(frozen=True)
class Scored:
    """A produced token: itself and the most probable ones as (text, bytes, logprob)."""

    chosen: tuple[str, bytes, float]
    top: tuple[tuple[str, bytes, float], ...]


@dataclass(frozen=True)
class Told:
    """One answer."""

    text: str
    reason: str
    dominating: str | None
    shares: tuple[tuple[float, ...], ...]
    scored: tuple[Scored, ...]
    votes: tuple[int, ...] = ()

    @property
    def letters(self) -> list[str]:
        return [one.chosen[0] for one in self.scored]


@dataclass(frozen=True)
class Outcome:
    """The answers by index, and (prompt, completion) tokens of the call."""

    answers: tuple[Told, ...]
    usage: tuple[int, int]

    @property
    def text(self) -> str:
        (answer,) = self.answers
        return answer.text


class Refused(Exception):
    """The call was refused."""

    def __init__(self, status: int, message: str, param: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


@dataclass
class Http:
    """Over the HTTP application."""

    client: httpx.AsyncClient
    stream: bool

    async def ask(self, question: Question) -> Outcome:
        body = dict(question)
        chat = "messages" in body
        if chat and "logprobs" in body:
            body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        got = await self.client.post("/v1/chat/completions" if chat else "/v1/completions", json=body)
        if got.status_code != httpx.codes.OK:
            error = got.json()["error"]
            raise Refused(got.status_code, error["message"], error["param"])
        if not self.stream:
            return _outcome([got.json()], got.json()["usage"], "message")
        lines = [line.removeprefix("data: ") for line in got.text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        *chunks, last = map(json.loads, lines)
        assert last["choices"] == []
        assert all(chunk["usage"] is None for chunk in chunks)
        return _outcome(chunks, last["usage"], "delta")


@dataclass
class Grpc:
    """Over the gRPC methods, with every message through the wire's encoding."""

    servicer: GrpcMethods
    stream: bool

    async def ask(self, question: Question) -> Outcome:
        request = pb.GenerateRequest.FromString(message_of(question).SerializeToString())
        context = Context()
        try:
            if self.stream:
                messages = [one async for one in self.servicer.GenerateStream(request, context)]
                assert [one.HasField("usage") for one in messages] == [False] * (len(messages) - 1) + [True]
                return _told([one.choice for one in messages], messages[-1].usage)
            whole = await self.servicer.Generate(request, context)
            return _told(list(whole.choices), whole.usage)
        except CallFailed:
            status = next(status for status, code in CODES.items() if code is context.code)
            raise Refused(status, context.details, None) from None


@dataclass
class Context:
    """Remembers the status."""

    code: grpc.StatusCode | None = None
    details: str = ""

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def trailing_metadata(self) -> list[tuple[str, str]]:
        return []

    def set_details(self, details: str) -> None:
        self.details = details

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return []


def message_of(question: Question) -> pb.GenerateRequest:
    """The question as a gRPC message."""
    plain = {
        "max_tokens": question.get("max_tokens", 16 if "prompt" in question else None),
        **{name: question[name] for name in ("model", "n", "ignore_eos") if name in question},
    }
    message = pb.GenerateRequest(**plain, top_logprobs=question.get("logprobs"))
    stop = question.get("stop", [])
    message.stop.extend([stop] if isinstance(stop, str) else stop)
    for name in pb.Sampling.DESCRIPTOR.fields_by_name:
        if name == "logit_bias":
            message.sampling.logit_bias.update({int(token): v for token, v in question.get(name, {}).items()})
        elif name in question:
            setattr(message.sampling, name, question[name])
    _put_prompt(message, question)
    routing = dict(question.get("routing", {}))
    if "mode" in routing:
        message.routing.mode = pb.Mode.Value("MODE_" + routing.pop("mode").upper().replace("-", "_"))
    if "vote" in routing:
        vote = routing.pop("vote")
        message.routing.vote = vote if isinstance(vote, int) else pb.VoteRule.Value("VOTE_RULE_" + vote.upper())
    message.routing.experts.extend(pb.ChosenExpert(**expert) for expert in routing.pop("experts", []))
    for name, value in routing.items():
        setattr(message.routing, name, value)
    form = question.get("response_format", {})
    if form.get("type") == "json_object":
        message.response_format.json_object = True
    elif form.get("type") == "json_schema":
        message.response_format.json_schema = json.dumps(form["json_schema"]["schema"])
    return message


def _put_prompt(message: pb.GenerateRequest, question: Question) -> None:
    if "messages" in question:
        message.chat.messages.extend(pb.ChatMessage(**turn) for turn in question["messages"])
        return
    prompt = question["prompt"]
    if isinstance(prompt, str):
        message.prompt = prompt
    elif all(isinstance(part, str) for part in prompt):
        message.texts.SetInParent()
        message.texts.texts.extend(prompt)
    else:
        prompts = [prompt] if isinstance(prompt[0], int) else prompt
        message.token_prompts.prompts.extend(pb.TokenIds(ids=ids) for ids in prompts)


def _outcome(parts: list[Any], usage: Any, content: str) -> Outcome:
    by_index: dict[int, list[Any]] = {}
    for part in parts:
        for choice in part["choices"]:
            by_index.setdefault(choice["index"], []).append(choice)
    answers = []
    for _, choices in sorted(by_index.items()):
        reasons = [choice["finish_reason"] for choice in choices]
        assert all(reason is None for reason in reasons[:-1])
        traces = [choice["routing"] for choice in choices if "routing" in choice]
        texts = [choice[content]["content"] if content in choice else choice["text"] for choice in choices]
        answers.append(
            Told(
                "".join(texts),
                reasons[-1],
                traces[-1]["dominating"] if traces else None,
                tuple(tuple(token["shares"]) for trace in traces for token in trace["tokens"]),
                tuple(one for choice in choices for one in _scored(choice["logprobs"])),
                tuple(traces[-1].get("votes", ())) if traces else (),
            )
        )
    return Outcome(tuple(answers), (usage["prompt_tokens"], usage["completion_tokens"]))


def _scored(logprobs: Any) -> list[Scored]:
    if logprobs is None:
        return []
    if "content" in logprobs:

        def read(token: Any) -> tuple[str, bytes, float]:
            return token["token"], bytes(token["bytes"]), token["logprob"]

        return [Scored(read(token), tuple(map(read, token["top_logprobs"]))) for token in logprobs["content"]]
    columns = (logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"])
    return [
        Scored((token, b"", value), tuple((name, b"", other) for name, other in top.items()))
        for token, value, top in zip(*columns, strict=True)
    ]


def _told(choices: list[pb.Choice], usage: pb.Usage) -> Outcome:
    by_index: dict[int, list[pb.Choice]] = {}
    for choice in choices:
        by_index.setdefault(choice.index, []).append(choice)
    answers = []
    for _, parts in sorted(by_index.items()):
        assert not any(part.finish_reason for part in parts[:-1])
        reason = pb.FinishReason.Name(parts[-1].finish_reason).removeprefix("FINISH_REASON_").lower()
        scored = [
            Scored(
                (one.token.text, one.token.raw, one.token.logprob),
                tuple((other.text, other.raw, other.logprob) for other in one.top),
            )
            for part in parts
            for one in part.logprobs
        ]
        assert all(math.isfinite(one.chosen[2]) for one in scored)
        answers.append(
            Told(
                "".join(part.text for part in parts),
                reason,
                parts[-1].routing.dominating or None,
                tuple(tuple(token.shares) for part in parts for token in part.routing.tokens),
                tuple(scored),
                tuple(parts[-1].routing.votes),
            )
        )
    return Outcome(tuple(answers), (usage.prompt_tokens, usage.completion_tokens))
