"""JSON schemas whose fields say what they mean: a model's docstring, taken apart into its own words and its fields'."""

from __future__ import annotations

import inspect
import re

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import ModelSchema

_FIELD = re.compile(r"^    (\w+): (.*)$")


def field_texts(model: type[BaseModel]) -> dict[str, str]:
    """What the ``Attributes`` of a model and of the models it extends say of each field, in one line each."""
    texts: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if issubclass(kind, BaseModel) and kind is not BaseModel:
            texts |= _attributes(inspect.cleandoc(kind.__dict__.get("__doc__") or ""))
    return texts


def own_text(model: type[BaseModel]) -> str:
    """What a model's docstring says before its fields."""
    return inspect.cleandoc(model.__doc__ or "").partition("\n\nAttributes:")[0]


class DocumentedSchema(GenerateJsonSchema):
    """pydantic's generator, with a description for every field that the docstring of its model has."""

    def model_schema(self, schema: ModelSchema) -> JsonSchemaValue:
        """The schema of one model, described."""
        made = super().model_schema(schema)
        model: type[BaseModel] = schema["cls"]
        if made.get("description"):
            made["description"] = own_text(model)
        texts = field_texts(model)
        aliases = {info.alias or name: name for name, info in model.model_fields.items()}
        for name, described in made.get("properties", {}).items():
            if (text := texts.get(aliases.get(name, name))) is not None:
                described["description"] = text
        return made


def _attributes(text: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    name = ""
    for line in text.partition("\nAttributes:\n")[2].splitlines():
        if match := _FIELD.match(line):
            name, texts[match[1]] = match[1], match[2]
        elif line.startswith("        ") and name:
            texts[name] += f" {line.strip()}"
    return texts
