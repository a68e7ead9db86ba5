"""docs/api.md, made from the OpenAPI document and the protos."""
