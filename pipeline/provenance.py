"""Says what decides the content of the shards, so that another set is never taken for this one."""

from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.pipeline.encode import Encoders
from latent_t2i.pipeline.images import describe
from latent_t2i.pipeline.index import Index
from latent_t2i.pipeline.plan import SetPlan
from latent_t2i.shards.schema import Identity, Provenance


def make_provenance(
    config: PipelineConfig, encoders: Encoders, index: Index, part: SetPlan
) -> Provenance:
    """Says what decides the content of the shards: weights by their hashes, and settings.

    Batch size, device and number of processes are not among it: a device may change the last bit of
    a float16, and so may another batch size.
    """
    text = encoders.text
    return Provenance(
        vae=Identity(name=config.vae, revision=config.vae_revision, sha256=encoders.vae_sha256),
        text_encoder=Identity(name=text.name, revision=text.revision, sha256=text.fingerprint),
        tokenizer=Identity(
            name=text.name, revision=text.revision, sha256=text.tokenizer_fingerprint
        ),
        latent_kind=encoders.kind,
        text_dtype=config.text_dtype,
        max_tokens=config.max_tokens,
        preprocessing=describe(part.how) | {"views": config.views, "vae_dtype": config.vae_dtype},
        source={
            "kind": config.source.kind,
            "num_records": index.num_source,
            "sha256": index.sha256,
            **({"bucket": part.bucket} if part.bucket else {}),
        },
        records_per_shard=config.records_per_shard,
        max_shard_bytes=config.max_shard_bytes,
    )
