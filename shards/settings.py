"""Settings of access to shards, importable without torch."""

from typing import Literal

AccessMode = Literal["auto", "map", "stream", "cache"]
CACHE_BYTES = 100_000_000_000
WINDOW_RECORDS = 1000
