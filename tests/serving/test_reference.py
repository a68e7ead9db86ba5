"""docs/api.md is what its generator prints, and no field goes without a meaning."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from pydantic import BaseModel

from meteora_dist.serving.documented import DocumentedSchema, field_texts
from meteora_dist.serving.reference.grpc_page import grpc_section, read_protos
from meteora_dist.serving.reference.http_page import http_section, openapi_document
from meteora_dist.serving.reference.page import api_page
from meteora_dist.serving.status import STATUS_OF

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


class Fruit(BaseModel):
    """A fruit.

    It grows.

    Attributes:
        name: What people
            call it.
        colour: While it
            is ripe; None for green.
    """

    name: str
    colour: str | None = None


class Peach(Fruit):
    """A peach.

    Attributes:
        name: Always this one.
    """

    stone: bool = True


def test_the_page_is_what_the_generator_prints() -> None:
    assert PAGE.read_text() == api_page(), "run make reference"


def test_every_field_of_every_object_has_a_meaning() -> None:
    schemas = openapi_document()["components"]["schemas"]
    assert len(schemas) > 30
    for name, schema in schemas.items():
        assert schema["description"], name
        assert "Attributes:" not in schema["description"], name
        for field, described in schema["properties"].items():
            assert described["description"].strip(), f"{name}.{field}"


def test_texts_of_fields_are_those_of_the_docstring_and_of_what_it_extends() -> None:
    colour = "While it is ripe; None for green."
    assert field_texts(Fruit) == {"name": "What people call it.", "colour": colour}
    assert field_texts(Peach) == {"name": "Always this one.", "colour": colour}
    schema = Peach.model_json_schema(schema_generator=DocumentedSchema)
    assert schema["description"] == "A peach."
    assert schema["properties"]["colour"]["description"] == colour
    assert "description" not in schema["properties"]["stone"]


def test_a_field_of_an_object_without_a_meaning_is_refused() -> None:
    document = openapi_document()
    del document["components"]["schemas"]["Usage"]["properties"]["total_tokens"]["description"]
    with pytest.raises(RuntimeError, match=r"Usage\.total_tokens has no meaning"):
        list(http_section(document))


def test_a_field_of_a_proto_without_a_comment_is_refused() -> None:
    (file,) = (file for file in read_protos() if file.name.endswith("inference.proto"))
    bare = FileDescriptorProto.FromString(file.SerializeToString())
    places = [place for place in bare.source_code_info.location if tuple(place.path[:3]) == (4, 0, 2)]
    (prompt,) = (place for place in places if tuple(place.path) == (4, 0, 2, 1))
    prompt.leading_comments = ""
    with pytest.raises(RuntimeError, match=r"GenerateRequest\.prompt has no comment"):
        list(grpc_section([bare]))


def test_every_error_of_the_wire_is_in_the_table() -> None:
    rows = [line for line in PAGE.read_text().split("## HTTP")[0].splitlines() if line.startswith("| 4")]
    for status in STATUS_OF.values():
        if status.http < 500:
            assert any(f"`{status.code}`" in row and status.grpc.name in row for row in rows), status.code
