"""The samplers that `--scheduler` offers, and which of them fit a bundle.

What fits is measured, not declared by diffusers: `tests/sample/test_sample_diffusers.py` compares
each sampler with the exact solution and with docs/samplers.md. DDIM: Song et al. 2020 (2010.02502).
DPM-Solver++: Lu et al. 2022 (2211.01095), whose first order is DDIM, or Euler's method on rectified
flow. UniPC: Zhao et al. 2023 (2302.04867).
"""

from dataclasses import dataclass, field
from typing import Any

import diffusers

from latent_t2i.sample.config import SchedulerName


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A scheduler of diffusers, changes of its config, and the bundles it does not fit."""

    kind: str
    overrides: dict[str, Any] = field(default_factory=dict)
    unfit: frozenset[str] = frozenset({"flow"})
    """Of epsilon, v, sample, flow, and "zero snr": schedules whose last level is pure noise."""


ANYTHING: frozenset[str] = frozenset()
SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(kind="DDIMScheduler"),
    "ddpm": Sampler(kind="DDPMScheduler"),
    "deis": Sampler(kind="DEISMultistepScheduler", unfit=ANYTHING),
    "dpmpp": Sampler(kind="DPMSolverMultistepScheduler", unfit=ANYTHING),
    "dpmpp-sde": Sampler(
        kind="DPMSolverMultistepScheduler", overrides={"algorithm_type": "sde-dpmsolver++"}
    ),
    "dpmpp-singlestep": Sampler(kind="DPMSolverSinglestepScheduler", unfit=ANYTHING),
    "euler": Sampler(
        kind="DPMSolverMultistepScheduler", overrides={"solver_order": 1}, unfit=ANYTHING
    ),
    "euler-ancestral": Sampler(kind="EulerAncestralDiscreteScheduler"),
    "euler-discrete": Sampler(kind="EulerDiscreteScheduler"),
    "heun": Sampler(kind="HeunDiscreteScheduler"),
    "kdpm2": Sampler(kind="KDPM2DiscreteScheduler"),
    "kdpm2-ancestral": Sampler(kind="KDPM2AncestralDiscreteScheduler"),
    "lcm": Sampler(kind="LCMScheduler"),
    "lms": Sampler(kind="LMSDiscreteScheduler"),
    "pndm": Sampler(kind="PNDMScheduler"),
    "sa-solver": Sampler(kind="SASolverScheduler"),
    "tcd": Sampler(kind="TCDScheduler"),
    "unipc": Sampler(kind="UniPCMultistepScheduler", unfit=ANYTHING),
}


def choose_scheduler(own: Any, name: SchedulerName) -> Any:
    """Returns the named sampler for the noise schedule of `own`, the bundle's scheduler.

    Raises ValueError, which names the samplers that fit, for one that does not.
    """
    if name == "bundle":
        return own
    traits = describe(own)
    if unfit := sorted(SAMPLERS[name].unfit & traits):
        raise ValueError(
            f"--scheduler: found {name}, which gives wrong images for this bundle "
            f"({', '.join(unfit)}); expected one of {', '.join(fitting(own))}"
        )
    return make_scheduler(own, name)


def fitting(own: Any) -> list[str]:
    """Returns the names of the samplers that fit the bundle's scheduler."""
    traits = describe(own)
    return ["bundle", *(name for name, sampler in SAMPLERS.items() if not sampler.unfit & traits)]


def make_scheduler(own: Any, name: str) -> Any:
    """Returns the named sampler, whether it fits or not."""
    sampler = SAMPLERS[name]
    return getattr(diffusers, sampler.kind).from_config(own.config, **sampler.overrides)


def describe(own: Any) -> frozenset[str]:
    """Returns what a sampler has to fit: the prediction, and "zero snr" if that applies."""
    prediction = own.config.prediction_type.removesuffix("_prediction")
    zero_snr = own.config.get("rescale_betas_zero_snr") and prediction != "flow"
    return frozenset({prediction} | ({"zero snr"} if zero_snr else set()))
