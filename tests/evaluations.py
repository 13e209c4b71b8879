"""Finished evaluations, made by hand: evaluation.json, per_image.jsonl and small pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latent_t2i.scenes import prompts as scene_prompts
from latent_t2i.scenes.draw import draw

NUM_PER_GROUP = 6
SCALES = (1.0, 2.0, 4.0, 8.0)
PROTOCOL = {
    "protocol": "own",
    "prompts_sha256": "0" * 64,
    "num_images": 3 * NUM_PER_GROUP,
    "resize": "legacy",
    "drawn/guidance_scale": 4.0,
    "drawn/num_steps": 20,
    "drawn/scheduler": "dpmpp",
    "drawn/seed": 0,
    "metrics/cmmd/weights_sha256": "a" * 64,
    "versions/torch": "2.13.0",
}
SAMPLES = {
    "oracle/single/shape_and_colour": 0.94,
    "oracle/pair/colours": 0.88,
    "oracle/pair/shapes_colours_relation": 0.8,
    "oracle/held_out/shape_and_colour": 0.83,
    "clip_score": 70.0,
    "r_precision/of_18": 0.9,
    "consistency/presence": 0.7,
    "fid": 31.25,
    "kid": 0.00123,
    "cmmd": 0.512,
    "coverage": 0.81,
}

DESCRIPTION = {"image": "0.png", "caption": "a cross", "references": ["a red cross", "a plus"]}
_RATIOS = {"num": 18, "mean": 1.1, "quantiles": {"0.0": 0.4, "0.5": 1.0}, "own_image": 0.0}
MEMORISATION = {
    "pairs": [
        {"file": "memorisation/samples-00.png", "position": 1, "group": "single", "ratio": 0.4,
         "prompt": "a red cross", "train_key": "train-7", "train_caption": "a red cross"}
    ],
    "num_train_images": 100,
    "num_train_records": 8000,
    "edges": [0.0, 0.5, 1.0, 1.5],
    "groups": {
        "held_out": _RATIOS | {"histogram": [1, 12, 5]},
        "single": _RATIOS | {"histogram": [2, 12, 4], "closer": 0.55, "tail": 0.0},
    },
}  # fmt: skip


SWEPT = ("oracle/pair/shapes_colours_relation", "kid", "cmmd")


def figures(quality: float, alignment: float) -> dict[str, float]:
    """The figures of a sweep; larger arguments are worse for quality and better for alignment."""
    return {name: SAMPLES[name] * (quality if n else alignment) for n, name in enumerate(SWEPT)}


def make_evaluation(
    folder: Path, *, shift: float = 0.0, with_sweeps: bool = False, **protocol: Any
) -> dict[str, Any]:
    """Writes an evaluation of drawn scenes and returns its evaluation.json.

    `shift` is added to every image's CLIP score; `protocol` replaces fields of its record.
    """
    rng = np.random.default_rng(3)
    lines = []
    for position, (group, prompt) in enumerate(_prompts()):
        name = f"pictures/main-1/{position:06d}.png"
        _save(folder / name, draw(prompt.scene), noise=0, rng=rng)
        passed = float(position % 3 > 0)
        checks = {"shape": passed, "colour": 1.0, "shape_and_colour": passed}
        values = {f"oracle/{group}/{check}": value for check, value in checks.items()}
        values["clip_score"] = 60 + position + shift
        lines.append(
            {"position": position, "file": name, "key": name, "prompt": prompt.text,
             "group": group, "values": values}
        )  # fmt: skip
    _save(folder / "memorisation/samples-00.png", Image.new("RGB", (128, 64)), noise=9, rng=rng)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "per_image.jsonl").write_text(text)
    results = _results(PROTOCOL | protocol, shift) | {
        "sweeps": _sweeps(folder, rng) if with_sweeps else {}
    }
    (folder / "evaluation.json").write_text(json.dumps(results))
    return results


def _prompts() -> list[tuple[str, Any]]:
    return [
        (kind, prompt)
        for kind in scene_prompts.KINDS
        for prompt in scene_prompts.make_prompts("easy", kind, NUM_PER_GROUP, 0)
    ]


def _save(path: Path, image: Image.Image, *, noise: float, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.asarray(image, np.float64)
    pixels = np.clip(pixels + noise * rng.standard_normal(pixels.shape), 0, 255)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def _results(protocol: dict[str, Any], shift: float) -> dict[str, Any]:
    samples = SAMPLES | {"clip_score": 70.0 + shift}
    real = {name: 1.0 for name in SAMPLES if "oracle" in name}
    consistency = {"num": 12.0, "num_counts": 3.0, "presence": 0.75, "count": 1 / 3}
    return {
        "name": "tiny",
        "protocol": protocol,
        "protocol_id": "".join(map(str, protocol.values())).encode().hex()[:12],
        "rows": {
            "samples": samples,
            "real": real | {"clip_score": 70.9, "fid": 3.1, "kid": 0.0, "cmmd": 0.01},
            "reconstruction": {"fid": 4.2, "kid": 0.0001, "cmmd": 0.02, "lpips": 0.05},
            "shuffled": {"clip_score": 55.0},
            "diverse": {"lpips": 0.31},
        },
        "num_images": {"samples": 18, "real": 18, "reconstruction": 18},
        "intervals": {name: [0.7, 0.98] for name in SAMPLES if "oracle" in name}
        | {"clip_score": [69.0 + shift, 71.0 + shift]},
        "spread": {"kid": {"mean": 0.0013, "std": 0.0002, "values": [0.0011, 0.0013, 0.0015]}},
        "skipped": {"caption_similarity": "needs a captioner: --weights.captioner"},
        "contamination": {
            "status": "checked",
            "reason": None,
            "count": 0,
            "examples": [],
            "num_images": 18,
            "num_images_compared": 18,
        },
        "details": {
            "consistency": {
                "samples": {
                    "threshold": {"presence": 0.35, "source": "highest F1 on 18 real images"},
                    "categories": {"dog": consistency, "cat": {"num": 2.0, "presence": 1.0}},
                },
                "real": {"categories": {"dog": {"num": 12.0, "presence": 0.9}}},
            },
            "memorisation": {"samples": MEMORISATION},
            "caption_similarity": {"samples": {"examples": [DESCRIPTION]}},
            "fid": {"samples": {"fid_infinity": 27.5}},
        },
        "identities": {"cmmd": {"weights_sha256": "a" * 64}},
        "metrics": samples | {"bundle": "runs/tiny/bundle", "bundle_sha256": "b" * 64},
    }


def _sweeps(folder: Path, rng: np.random.Generator) -> dict[str, Any]:
    def entry(name: str, noise: float, quality: float, alignment: float) -> dict[str, Any]:
        files = {}
        for position, (_, prompt) in list(enumerate(_prompts()))[::4]:
            files[str(position)] = f"pictures/{name}/{position:06d}.png"
            _save(folder / files[str(position)], draw(prompt.scene), noise=noise, rng=rng)
        return {"num_images": 9, "files": files, "figures": figures(quality, alignment)}

    curve = {1.0: (1.3, 0.7), 2.0: (1.0, 0.95), 4.0: (1.2, 1.0), 8.0: (1.9, 0.85)}
    return {
        "guidance_scale": [
            {"value": scale, **entry(f"guidance-{scale:g}", 5 * scale, *curve[scale])}
            for scale in SCALES
        ],
        "guidance_interval": [
            {"value": [low, 5.0], **entry(f"interval-{low:g}", 9, 0.95 + low / 10, 0.98)}
            for low in (0.2, 0.5)
        ],
        "guide": [{"value": "runs/tiny/early", **entry("guide-0", 3, 0.9, 0.99)}],
        "sampler": [
            {"scheduler": name, "num_steps": steps,
             **entry(f"sampler-{name}-{steps}", 60 / steps, 1 + factor / steps, 1 - 1 / steps)}
            for name, factor in (("dpmpp", 4.0), ("ddim", 12.0))
            for steps in (5, 10, 20)
        ],
        "checkpoints": [
            {"bundle": f"runs/tiny/snapshots/{step}", "step": step, "images_seen": 64 * step,
             "hours": step / 7200, "validation_loss": 0.1 + 10 / step,
             **entry(f"step-{step}", 9000 / step, 1 + 400 / step, 1 - 100 / step)}
            for step in (300, 600, 900, 1200)
        ],
    }  # fmt: skip


def history() -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    lines: list[dict[str, Any]] = []
    for step in range(50, 1250, 50):
        lines.append(
            {"step": step, "loss": 0.1 + 20 / step, "grad_norm": 1.0, "skipped": step // 600,
             "images_per_s": 120.0 + step % 7,
             "time_breakdown": {"denoise": 0.9, "data": 0.04, "optimiser": 0.06}}
        )  # fmt: skip
        if step % 300 == 0:
            quarters = {f"t{number}of4": 0.1 + (number + 9) / step for number in range(1, 5)}
            validation = {"loss": 0.1 + 22 / step, "loss_by_quarter": quarters}
            lines.append({"step": step, "validation": validation})
    return lines


INFO = {
    "name": "tiny",
    "step": 1200,
    "num_parameters": 6_000_000,
    "train_seconds": 590.0,
    "config": {"seed": 0, "optim": {"learning_rate": 0.1}},
}
"""A bundle.json."""
