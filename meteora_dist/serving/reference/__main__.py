"""Writes docs/api.md: ``python -m meteora_dist.serving.reference FILE``."""

from __future__ import annotations

import sys
from pathlib import Path

from meteora_dist.serving.reference.page import api_page

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(api_page())
