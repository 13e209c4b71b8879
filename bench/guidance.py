"""Guidance in an interval, and by a weaker model, against plain guidance at equal cost.

    python -m bench.guidance                            # the shipped bundle, noisy weights
    python -m bench.guidance --guide runs/early/bundle  # a guide that was trained less
    python -m bench.guidance --quick

The oracle of the embedded scenes checks every image against its prompt, with no human judge. The
cost is the number of denoiser evaluations per image: two for a guided step, one for another.
Guidance in an interval spends what it saves on more steps. Without --guide the weaker model is the
bundle with noise added to its weights, which is not how autoguidance is meant to be used: a model
that was trained less errs in the same places, a noisy one need not. The intervals of figures are
those of a paired bootstrap over the prompts.
"""

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latent_t2i.model.generate import Guidance, generate, noise_levels
from latent_t2i.sample import sampler
from latent_t2i.sample.schedulers import choose_scheduler
from latent_t2i.scenes import oracle
from latent_t2i.scenes.prompts import Kind, Prompt, make_prompts

BUNDLE = Path(__file__).resolve().parent.parent / "scenes" / "bundle"
PLAIN_SCALES = (2.0, 4.0, 7.0)
INTERVALS = ((0.2, 3.0), (0.5, 5.0), (0.2, 10.0))
INTERVAL_SCALES = (4.0, 7.0)
GUIDE_SCALES = (1.5, 2.0, 3.0)
BASE = "plain 4"
KINDS: tuple[Kind, ...] = ("single", "pair")
NUM_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Method:
    """A kind of guidance, with as many steps as its evaluations allow."""

    guidance: Guidance
    num_steps: int
    num_evaluations: int


def main() -> None:
    """Measures all methods and prints the table."""
    args = parse()
    pipeline: Any = sampler.load(args.bundle, device=args.device, dtype=args.dtype)
    pipeline.scheduler = choose_scheduler(pipeline.scheduler, "dpmpp")
    guide = (
        add_noise(pipeline.unet, args.weight_noise)
        if args.guide is None
        else sampler.load_guide(args.guide, pipeline)
    )
    methods = plan(pipeline.scheduler, guide, 2 * args.num_steps, quick=args.quick)
    prompts = {kind: make_prompts("full", kind, args.num_prompts, args.seed) for kind in KINDS}
    results = {}
    for name, method in methods.items():
        began = time.perf_counter()
        results[name] = {
            kind: check(pipeline, method, prompts[kind], args.batch_size) for kind in KINDS
        }
        print(f"[{name}: {time.perf_counter() - began:.0f} s]", file=sys.stderr, flush=True)
    print(json.dumps(describe_setup(args) | {"methods": show(methods, results)}))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Compares kinds of guidance by the oracle.")
    parser.add_argument("--quick", action="store_true", help="about a minute, rough figures")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--guide", type=Path, help="bundle of a weaker model of the same run")
    parser.add_argument(
        "--weight-noise",
        type=float,
        default=0.1,
        help="noise of the guide, relative to each weight",
    )
    parser.add_argument("--num-prompts", type=int, help="of each kind; default: 256")
    parser.add_argument("--num-steps", type=int, default=20, help="steps of plain guidance")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args(argv)
    args.num_prompts = args.num_prompts or (4 if args.quick else 256)
    args.num_steps = 4 if args.quick else args.num_steps
    return args


def describe_setup(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the versions and settings that the figures depend on."""
    return {
        "benchmark": "guidance",
        "versions": {name: version(name) for name in ("torch", "diffusers")}
        | {"python": platform.python_version()},
        "bundle": str(args.bundle),
        "guide": str(args.guide) if args.guide else f"weights with noise {args.weight_noise}",
        "num_prompts": args.num_prompts,
        "num_evaluations": 2 * args.num_steps,
        "dtype": args.dtype,
        "seed": args.seed,
    }


def add_noise(unet: Any, amount: float) -> Any:
    """Returns a copy of a denoiser with Gaussian noise relative to each tensor's deviation."""
    noisy = copy.deepcopy(unet)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in noisy.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(amount * parameter.std() * noise)
    return noisy


def plan(
    scheduler: Any, guide: Any, num_evaluations: int, *, quick: bool = False
) -> dict[str, Method]:
    """Returns the methods by name, each with at most `num_evaluations` per image."""
    methods = {"none": fit(scheduler, Guidance(), num_evaluations)}
    for scale in PLAIN_SCALES:
        methods[f"plain {scale:g}"] = fit(scheduler, Guidance(scale=scale), num_evaluations)
    for interval in INTERVALS[: 1 if quick else None]:
        for scale in INTERVAL_SCALES:
            name = f"interval {interval[0]:g} to {interval[1]:g}, {scale:g}"
            guidance = Guidance(scale=scale, interval=interval)
            methods[name] = fit(scheduler, guidance, num_evaluations)
    for scale in GUIDE_SCALES:
        guidance = Guidance(scale=scale, network=guide)
        methods[f"guide {scale:g}"] = fit(scheduler, guidance, num_evaluations)
    return methods


def fit(scheduler: Any, guidance: Guidance, most: int) -> Method:
    """Returns the guidance with the largest number of steps that costs at most `most`."""
    costs = {num: evaluations(scheduler, guidance, num) for num in range(1, most + 1)}
    num_steps = max(num for num, cost in costs.items() if cost <= most)
    return Method(guidance=guidance, num_steps=num_steps, num_evaluations=costs[num_steps])


def evaluations(scheduler: Any, guidance: Guidance, num_steps: int) -> int:
    """Returns the denoiser evaluations per image."""
    scheduler.set_timesteps(num_steps)
    sigmas = noise_levels(scheduler, scheduler.timesteps)
    return sum(2 if guidance.is_active(sigma) else 1 for sigma in sigmas)


def check(
    pipeline: Any, method: Method, prompts: Sequence[Prompt], batch_size: int
) -> NDArray[np.bool_]:
    """Returns whether each image has everything that its prompt mentions."""
    images = generate(
        pipeline,
        [prompt.text for prompt in prompts],
        list(range(len(prompts))),
        guidance=method.guidance,
        num_steps=method.num_steps,
        batch_size=min(batch_size, len(prompts)),
    )
    return np.array(list(_check(prompts, images)))


def _check(prompts: Sequence[Prompt], images: Iterator[Any]) -> Iterator[bool]:
    for prompt, image in zip(prompts, images, strict=True):
        (detected,) = oracle.detect(np.asarray(image)[None])
        assert prompt.scene is not None
        yield oracle.check(prompt.scene, detected, prompt.mentions)["all"]


def show(
    methods: dict[str, Method], results: dict[str, dict[str, NDArray[np.bool_]]]
) -> dict[str, Any]:
    """Prints the table; returns its figures."""
    print(f"\nimages with everything right, and the difference to {BASE} (95 % interval)")
    print(f"{'':26}{'steps':>6}{'cost':>6}" + "".join(f"{kind:>28}" for kind in KINDS))
    figures: dict[str, Any] = {}
    for name, method in methods.items():
        row = f"{name:26}{method.num_steps:>6}{method.num_evaluations:>6}"
        figures[name] = {"num_steps": method.num_steps, "num_evaluations": method.num_evaluations}
        for kind in KINDS:
            share = float(results[name][kind].mean())
            low, high = compare(results[name][kind], results[BASE][kind])
            row += f"{share:>9.1%} ({low:>+7.1%} to {high:>+7.1%})"
            figures[name][kind] = {"all": share, "low": low, "high": high}
        print(row)
    sys.stdout.flush()
    return figures


def compare(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> tuple[float, float]:
    """Returns the 95 % interval of the difference, by a bootstrap over the common prompts."""
    difference = one.astype(float) - other.astype(float)
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(difference), (NUM_RESAMPLES, len(difference)))
    low, high = np.percentile(difference[picks].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


if __name__ == "__main__":
    main()
