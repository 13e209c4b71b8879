"""Estimates of the memory, compute and shard size of a preset, without its shards."""

import json
from dataclasses import dataclass
from typing import Any

from latent_t2i.configs import cli
from latent_t2i.model.paths import find_path
from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.shards.schema import make_layout
from latent_t2i.train.config import TrainConfig
from latent_t2i.train.estimate import count_memory, measure

# A record's JSON with five captions.
JSON_BYTES = 1024


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """Shapes of encoders that are not on this machine: Stable Diffusion 1's VAE, CLIP ViT-L/14."""

    latent_channels: int = 4
    vae_downscale: int = 8
    text_width: int = 768


def size_preset(
    name: str, *, device: str, num_captions: int = 5, encoders: Encoders | None = None
) -> dict[str, Any]:
    """Returns the sizes of a preset; memory is one process's with the whole batch.

    Latent and text shapes are those of the preset's encoders where these are local folders, else
    those of `encoders`.
    """
    encoders = encoders or Encoders()
    train = cli.parse(TrainConfig, "train", ["--config", name])
    stage_one = cli.parse(PipelineConfig, "pipeline", ["--config", name])
    vae, text = (_read_config(encoder) for encoder in (stage_one.vae, stage_one.text_encoder))
    channels = vae.get("latent_channels", encoders.latent_channels)
    downscale = 2 ** (len(vae["block_out_channels"]) - 1) if vae else encoders.vae_downscale
    text_width = text.get("text_config", text).get("hidden_size", encoders.text_width)
    side = stage_one.image_size_px // downscale
    batch_size = train.micro_batch_size or train.batch_size
    keeps_gradients = batch_size < train.batch_size
    passes = measure(
        train.model,
        latent_shape=(channels, side, side),
        text_shape=(stage_one.max_tokens, text_width),
        micro_batch_size=batch_size,
        precision=train.mixed_precision,
        device_type=device,
        checkpointing=train.gradient_checkpointing,
        keeps_gradients=keeps_gradients,
    )
    num_averages = len(train.ema.sigma_rels) + (train.ema.decay is not None)
    layout = make_layout(
        latent=(stage_one.views.num, 2 * channels, side, side),
        text=(num_captions, stage_one.max_tokens, text_width),
        json_bytes=JSON_BYTES,
        text_dtype=stage_one.text_dtype,
    )
    return {
        "preset": name,
        "latents": [channels, side, side],
        "num_parameters": passes.num_parameters,
        "forward_gflop": passes.forward_flop / 1e9,
        "record_bytes": layout.record_bytes,
        "memory_bytes": sum(count_memory(passes, num_averages, keeps_gradients=keeps_gradients)),
        "batch_size": batch_size,
    }


def _read_config(name: str) -> dict[str, Any]:
    """Returns an encoder's config.json, or an empty dictionary if it is not a local folder."""
    folder = find_path(name)
    path = None if folder is None else folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path and path.is_file() else {}
    return config
