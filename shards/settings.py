"""Settings of access to shards, importable without torch."""

from typing import Literal

AccessMode = Literal["auto", "map", "stream", "cache"]
ReadMode = Literal["auto", "map", "pread"]
"""How files on a local path are read: memory-mapped, or by positioned reads."""
Verify = Literal["lazy", "full", "none"]
"""When shards are hashed: in the background after their first use, on opening, or never."""
CACHE_BYTES = 100_000_000_000
WINDOW_RECORDS = 1000
