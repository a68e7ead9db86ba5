"""Lines of JSON."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from io import StringIO

from meteora_dist.observability.logs import log_json


def test_a_line_is_one_object_with_its_fields_and_its_exception() -> None:
    stream = StringIO()
    log = logging.getLogger("test_logs.inner")
    log_json(StringIO(), "test_logs")
    log_json(stream, "test_logs")
    log.info("it is %s", "done", extra={"fields": {"tokens": 3}})
    log.debug("not this")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("it failed")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert datetime.fromisoformat(first.pop("time")).tzinfo is not None
    assert first == {"level": "INFO", "logger": "test_logs.inner", "message": "it is done", "tokens": 3}
    assert second["exception"].endswith("ValueError: two\nlines")
