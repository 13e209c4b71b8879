"""Says what decides the content of the shards, so that another set is never taken for this one."""

import hashlib
from collections.abc import Sequence

from model.encoders import fingerprint, tokenizer_fingerprint
from pipeline.config import PipelineConfig
from pipeline.encode import Encoders
from pipeline.images import CROP, RESIZE
from pipeline.record import Record
from shards.schema import Identity, Provenance, hash_json


def make_provenance(
    config: PipelineConfig, encoders: Encoders, records: Sequence[Record]
) -> Provenance:
    """Says what decides the content of the shards: weights by their hashes, and settings.

    Batch size and device are not among it: they may change the last bit of a float16.
    """
    return Provenance(
        vae=Identity(
            name=config.vae, revision=config.vae_revision, sha256=fingerprint(encoders.vae)
        ),
        text_encoder=Identity(
            name=config.text_encoder,
            revision=config.text_encoder_revision,
            sha256=fingerprint(encoders.text_encoder),
        ),
        tokenizer=Identity(
            name=config.text_encoder,
            revision=config.text_encoder_revision,
            sha256=tokenizer_fingerprint(encoders.tokenizer),
        ),
        latent_kind="moments",
        text_dtype=config.text_dtype,
        max_tokens=config.max_tokens,
        preprocessing={
            "image_size_px": config.image_size_px,
            "resize": RESIZE,
            "crop": CROP,
            "views": config.views,
        },
        source={
            "kind": config.source.kind,
            "num_records": len(records),
            "sha256": hash_records(records),
        },
        records_per_shard=config.records_per_shard,
        max_shard_bytes=config.max_shard_bytes,
    )


def hash_records(records: Sequence[Record]) -> str:
    """Returns the sha256 of all that the source tells; the images' content is not read for it."""
    digest = hashlib.sha256()
    for record in records:
        told = hash_json([record.key, record.path.name, record.captions, record.extra])
        digest.update(bytes.fromhex(told))
    return digest.hexdigest()
