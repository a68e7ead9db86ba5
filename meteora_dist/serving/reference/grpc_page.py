"""The gRPC part of docs/api.md: services, messages and enums of the protos with their comments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

from meteora_dist.serving.proto.generate import PROTOS, ROOT

# Numbers of fields of descriptor.proto, of which the paths of comments are made.
_MESSAGE, _ENUM, _SERVICE = 4, 5, 6
_FIELD, _VALUE, _METHOD = 2, 2, 2
_SYNTAX = 12

Path_ = tuple[int, ...]


def read_protos() -> list[FileDescriptorProto]:
    """The protos with their comments; needs ``grpcio-tools``."""
    from grpc_tools import protoc

    with TemporaryDirectory() as folder:
        target = Path(folder, "protos.bin")
        options = [f"--proto_path={ROOT}", "--include_source_info", f"--descriptor_set_out={target}"]
        if protoc.main(["protoc", *options, *map(str, PROTOS)]) != 0:
            raise RuntimeError(f"protoc refused the protos in {ROOT}")
        return list(FileDescriptorSet.FromString(target.read_bytes()).file)


def grpc_section(files: list[FileDescriptorProto]) -> Iterator[str]:
    """The lines of the gRPC part."""
    for file in files:
        notes = _comments(file)
        yield from (notes[(_SYNTAX,)], "")
        for index, service in enumerate(file.service):
            yield from _service(file.package, service, (_SERVICE, index), notes)
    yield from ("### gRPC messages", "")
    for file in files:
        notes = _comments(file)
        for index, message in enumerate(file.message_type):
            yield from _message(message, (_MESSAGE, index), notes)
        for index, enum in enumerate(file.enum_type):
            yield from _enum(enum, (_ENUM, index), notes)


def _comments(file: FileDescriptorProto) -> dict[Path_, str]:
    notes = {}
    for location in file.source_code_info.location:
        texts = [*location.leading_detached_comments, location.leading_comments, location.trailing_comments]
        if text := "\n".join(_paragraphs(part) for part in texts if part.strip()):
            notes[tuple(location.path)] = text
    return notes


def _paragraphs(text: str) -> str:
    parts = "\n".join(line.strip() for line in text.splitlines()).split("\n\n")
    return "\n\n".join(" ".join(part.split()) for part in parts if part.strip())


def _service(package: str, service: ServiceDescriptorProto, path: Path_, notes: dict[Path_, str]) -> Iterator[str]:
    yield from (f"### {package}.{service.name}", "", "| method | takes | returns | does |", "|---|---|---|---|")
    for index, method in enumerate(service.method):
        stream = "stream of " if method.server_streaming else ""
        takes, gives = _link(method.input_type), f"{stream}{_link(method.output_type)}"
        yield f"| `{method.name}` | {takes} | {gives} | {_note(notes, (*path, _METHOD, index), method.name)} |"
    yield ""


def _message(message: DescriptorProto, path: Path_, notes: dict[Path_, str]) -> Iterator[str]:
    yield from (f"#### message {message.name}", "")
    if path in notes:
        yield from (notes[path], "")
    if not message.field:
        yield from ("No fields.", "")
        return
    yield from ("| field | number | type | meaning |", "|---|---|---|---|")
    for index, field in enumerate(message.field):
        note = _note(notes, (*path, _FIELD, index), f"{message.name}.{field.name}")
        yield f"| `{field.name}` | {field.number} | {_kind(field, message)} | {note} |"
    yield ""


def _enum(enum: EnumDescriptorProto, path: Path_, notes: dict[Path_, str]) -> Iterator[str]:
    yield from (f"#### enum {enum.name}", "")
    if path in notes:
        yield from (notes[path], "")
    yield from ("| value | number | meaning |", "|---|---|---|")
    for index, value in enumerate(enum.value):
        note = "Not set." if value.number == 0 else _note(notes, (*path, _VALUE, index), value.name)
        yield f"| `{value.name}` | {value.number} | {note} |"
    yield ""


def _kind(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    entries = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    if (entry := entries.get(field.type_name.rpartition(".")[2])) is not None:
        key, value = entry.field
        return f"map of {_kind(key, entry)} to {_kind(value, entry)}"
    named = field.type in (FieldDescriptorProto.TYPE_MESSAGE, FieldDescriptorProto.TYPE_ENUM)
    kind = _link(field.type_name, field.type) if named else FieldDescriptorProto.Type.Name(field.type)[5:].lower()
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {kind}"
    if field.proto3_optional:
        return f"optional {kind}"
    return f"{kind}, one of `{message.oneof_decl[field.oneof_index].name}`" if field.HasField("oneof_index") else kind


def _link(type_name: str, kind: int = FieldDescriptorProto.TYPE_MESSAGE) -> str:
    name = type_name.rpartition(".")[2]
    word = "enum" if kind == FieldDescriptorProto.TYPE_ENUM else "message"
    return f"[{name}](#{word}-{name.lower()})"


def _note(notes: dict[Path_, str], path: Path_, name: str) -> str:
    if path not in notes:
        raise RuntimeError(f"{name} has no comment in its proto")
    return " ".join(notes[path].split()).replace("|", "\\|")
