"""Messages nobody would send: drawn field by field from the proto itself, and mutated byte by byte."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from hypothesis import strategies as st

from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb

_LETTERS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
_TEXTS = st.one_of(
    st.sampled_from(["Hi", "\0", "</s>", "<s><s>", "\u202e\ufeff", "e\u0301", "\U0001f999" * 5]), _LETTERS
)
_WILD_TEXTS = st.one_of(st.sampled_from(["", "NaN", "x" * 5000, "a:1,b:2", "system"]), _TEXTS)
_SCHEMAS = st.recursive(
    st.sampled_from(
        [
            *(
                {},
                {"type": "string"},
                {"type": "boolean"},
                {"enum": ["a", 1, None]},
                {"type": "string", "format": "date"},
            ),
            *(
                {"type": "integer", "minimum": -5},
                {"type": "array", "maxItems": 2},
                {"type": "null"},
                {"type": "number"},
            ),
            *({"type": "integer", "multipleOf": 99991}, {"not": {}}, {"uniqueItems": True}),
            *(
                {"$ref": "#"},
                {"$ref": "#/$defs/x"},
                {"$ref": "file:///etc/passwd"},
                {"type": "objekt"},
                {"const": 1e300},
            ),
            *({"type": "string", "pattern": "^(a|b)*a(a|b){20}$"}, {"type": "string", "pattern": "(?=x"}),
            *({"minItems": 2**40, "type": "array"}, {"type": "number", "minimum": 3, "maximum": 2}, {"anyOf": []}),
        ]
    ),
    lambda inner: st.one_of(
        st.builds(lambda one: {"type": "object", "properties": {"a": one}, "required": ["a"]}, inner),
        st.builds(lambda one: {"type": "array", "items": one}, inner),
        st.builds(lambda some: {"anyOf": some}, st.lists(inner, max_size=3)),
        st.builds(lambda one: {"$defs": {"x": one}, "$ref": "#/$defs/x"}, inner),
    ),
    max_leaves=5,
)
_BROKEN = ["", "{", "[]", "NaN", '{"const": NaN}', '{"const": "\\ud800"}', '{"a":' * 3000 + "1" + "}" * 3000]
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-1, 9),
}
_TAME: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(
        ["", "auto", "auto-sequence", "base", "plain", "partial", "wide:0.5,plain:2", "rooted:-16"]
    ),
    "max_tokens": st.integers(1, 6),
    **dict.fromkeys(["n", "Routing.top_k"], st.integers(1, 3)),
    **dict.fromkeys(["temperature", "min_p", "presence_penalty", "frequency_penalty"], st.floats(0, 1)),
    **dict.fromkeys(["top_p", "repetition_penalty", "Routing.temperature"], st.floats(0.1, 1)),
    **dict.fromkeys(["ids", "key"], st.integers(0, 259)),
    **{"top_k": st.integers(0, 9), "top_logprobs": st.integers(0, 20), "value": st.floats(-9, 9)},
    **{"mode": st.just(0), "name": st.sampled_from(["plain", "wide"]), "weight": st.floats(-2, 2)},
    **{"role": st.sampled_from(["system", "user", "assistant"]), "stop": _LETTERS},
    **dict.fromkeys(["prompt", "texts", "content"], _TEXTS),
    "json_schema": _SCHEMAS.map(json.dumps),
    "PutExpertRequest.name": st.sampled_from(["new", "more", "new", "more", "nobody", "auto"]),
    "RemoveExpertRequest.name": st.sampled_from(["new", "more", "nobody"]),
    "PutExpertRequest.adapter": st.sampled_from(
        [
            *(*["team/good", "other", "inner-link"] * 3, "pickled", "lying", "truncated", "dora", "link"),
            *("linked-file", "team", "nowhere", "../outside", "team/../other", "/etc"),
        ]
    ),
    "generation": st.integers(1, 60),
}
"""Values that are fine, by field: one wild value refuses the whole message, and with it whatever else was in it."""
_NEEDED = {
    *("max_tokens", "messages", "texts", "prompts", "ids", "role", "content"),
    *("PutExpertRequest.name", "RemoveExpertRequest.name", "adapter"),
}
"""Fields that a tame message always has."""


@st.composite
def messages(draw: st.DrawFn, kind: type[Message] = pb.GenerateRequest) -> Any:
    """A request with some of its fields set; in most of them all to fine values, in the others some to wild ones."""
    message = kind()
    _fill(draw, message, wild=draw(st.integers(0, 2)) == 0)
    return message


def _fill(draw: st.DrawFn, message: Message, wild: bool) -> None:
    descriptor: Descriptor = message.DESCRIPTOR
    choices = [[field.name for field in oneof.fields] for oneof in descriptor.oneofs if len(oneof.fields) > 1]
    chosen = {draw(st.sampled_from(names)) for names in choices}
    left_out = {name for names in choices for name in names} - chosen
    for field in descriptor.fields:
        needed = field.name in chosen or (not wild and not _NEEDED.isdisjoint(_names(field)))
        if field.name not in left_out and (needed or draw(st.integers(0, 2)) == 0):
            _set(draw, message, field, wild)


def _set(draw: st.DrawFn, message: Message, field: FieldDescriptor, wild: bool) -> None:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        for _ in range(draw(st.integers(0, 3))):
            key, value = (draw(_values(part, wild)) for part in kind.fields)
            getattr(message, field.name)[key] = value
    elif kind is not None and field.is_repeated:
        for _ in range(draw(st.integers(int(not wild), 3))):
            _fill(draw, getattr(message, field.name).add(), wild)
    elif kind is not None:
        getattr(message, field.name).SetInParent()
        _fill(draw, getattr(message, field.name), wild)
    elif field.is_repeated:
        getattr(message, field.name).extend(draw(st.lists(_values(field, wild), min_size=int(not wild), max_size=4)))
    else:
        setattr(message, field.name, draw(_values(field, wild)))


def _values(field: FieldDescriptor, wild: bool) -> st.SearchStrategy[Any]:
    """Values of one field, elements of a repeated one; of every third field of a wild message truly wild ones."""
    tame = next((_TAME[name] for name in _names(field) if name in _TAME), None)
    if tame is None:
        return _wild(field)
    return st.integers(0, 2).flatmap(lambda third: tame if third else _wild(field)) if wild else tame


def _names(field: FieldDescriptor) -> tuple[str, str]:
    """With its message's name, and without."""
    return f"{field.containing_type.name}.{field.name}", field.name


def _wild(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.name == "json_schema":
        return st.sampled_from(_BROKEN)
    if field.cpp_type in _INTEGERS:
        low, high = _INTEGERS[field.cpp_type]
        return st.one_of(st.integers(max(low, -2), 300), st.sampled_from([low, high]), st.integers(low, high))
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return _WILD_TEXTS if field.type == FieldDescriptor.TYPE_STRING else st.binary(max_size=9)
    return st.one_of(st.floats(), st.sampled_from([0.0, -0.0, 1e-320, 5e-324, 1e-40, 1e300, 1.0, 2.0]))


@st.composite
def mutants(draw: st.DrawFn, kind: type[Message] = pb.GenerateRequest) -> Any:
    """What a message reads as after a few of its bytes have changed; None when it cannot be read."""
    wire = bytearray(draw(messages(kind)).SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(wire)))
        change = draw(st.sampled_from(["flip", "insert", "delete", "repeat", "cut"]))
        if change == "flip" and place < len(wire):
            wire[place] ^= 1 << draw(st.integers(0, 7))
        elif change == "insert":
            wire[place:place] = draw(st.binary(min_size=1, max_size=6))
        elif change == "delete":
            del wire[place : place + draw(st.integers(1, 6))]
        elif change == "repeat":
            wire += wire[place:]
        elif draw(st.booleans()):
            del wire[place:]
    try:
        return kind.FromString(bytes(wire))
    except DecodeError:
        return None
