"""The service of the client's tests is that of the interfaces' own."""

from tests.serving.conftest import make_service, tokenizer

__all__ = ["make_service", "tokenizer"]
