"""A further field's description."""

from dataclasses import dataclass
from typing import Literal

from latent_t2i.shards.schema import FileEntry, Identity

FieldDtype = Literal["uint8", "int8", "int32", "float16", "float32"]
Per = Literal["view", "caption", "record"]


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """A further array of each record."""

    name: str
    dtype: FieldDtype
    shape: tuple[int, ...]
    per: Per
    made_by: Identity
    scale: FileEntry | None = None
