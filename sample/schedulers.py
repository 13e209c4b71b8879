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
    unfit: tuple[str, ...]
    """Predictions, `zero_snr` (the last noise level of training is pure noise) and `cosine` (the
    noise schedule of this name, whose first step of sampling spans most noise levels)."""


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(kind="DDIMScheduler", unfit=("flow",)),
    "ddpm": Sampler(kind="DDPMScheduler", unfit=("flow",)),
    "deis": Sampler(
        kind="DEISMultistepScheduler", overrides={"algorithm_type": "deis"}, unfit=("zero_snr",)
    ),
    "dpmpp": Sampler(
        kind="DPMSolverMultistepScheduler", overrides={"algorithm_type": "dpmsolver++"}, unfit=()
    ),
    "dpmpp-sde": Sampler(
        kind="DPMSolverMultistepScheduler",
        overrides={"algorithm_type": "sde-dpmsolver++"},
        unfit=(),
    ),
    "dpmpp-singlestep": Sampler(
        kind="DPMSolverSinglestepScheduler",
        overrides={"algorithm_type": "dpmsolver++"},
        unfit=("zero_snr",),
    ),
    "dpmpp-singlestep-3": Sampler(
        kind="DPMSolverSinglestepScheduler",
        # As DPM-Solver's own code does by default, it ends at the first noise level of training. At
        # the end 0 of diffusers' default the last step would have the first order only.
        overrides={
            "algorithm_type": "dpmsolver++",
            "solver_order": 3,
            "lower_order_final": True,
            "final_sigmas_type": "sigma_min",
        },
        unfit=("zero_snr",),
    ),
    "euler": Sampler(
        kind="DPMSolverMultistepScheduler",
        overrides={"algorithm_type": "dpmsolver++", "solver_order": 1},
        unfit=(),
    ),
    "euler-ancestral": Sampler(kind="EulerAncestralDiscreteScheduler", unfit=("sample", "flow")),
    "euler-discrete": Sampler(kind="EulerDiscreteScheduler", unfit=("flow",)),
    "heun": Sampler(kind="HeunDiscreteScheduler", unfit=("flow", "zero_snr", "cosine")),
    "kdpm2": Sampler(kind="KDPM2DiscreteScheduler", unfit=("sample", "flow", "zero_snr")),
    "kdpm2-ancestral": Sampler(
        kind="KDPM2AncestralDiscreteScheduler", unfit=("sample", "flow", "zero_snr", "cosine")
    ),
    "lms": Sampler(kind="LMSDiscreteScheduler", unfit=("flow", "zero_snr")),
    "pndm": Sampler(kind="PNDMScheduler", unfit=("sample", "flow", "zero_snr")),
    "sa-solver": Sampler(
        kind="SASolverScheduler",
        overrides={"algorithm_type": "data_prediction"},
        unfit=("zero_snr",),
    ),
    "unipc": Sampler(kind="UniPCMultistepScheduler", unfit=()),
}


def choose_scheduler(own: Any, name: SchedulerName) -> Any:
    """Returns the named sampler for the noise schedule of `own`, the bundle's scheduler.

    Raises ValueError, which names the samplers that fit, for one that does not.
    """
    if name == "bundle":
        return own
    if unfit := [trait for trait in SAMPLERS[name].unfit if trait in traits(own)]:
        raise ValueError(
            f"--scheduler: found {name}, which does not fit this bundle ({', '.join(unfit)}); "
            f"expected one of {', '.join(fitting(own))}"
        )
    return make_scheduler(own, name)


def fitting(own: Any) -> list[str]:
    """Returns the names of the samplers that fit the bundle's scheduler."""
    found = traits(own)
    return ["bundle", *(name for name, s in SAMPLERS.items() if not found.intersection(s.unfit))]


def make_scheduler(own: Any, name: str) -> Any:
    """Returns the named sampler, whether it fits or not."""
    sampler = SAMPLERS[name]
    return getattr(diffusers, sampler.kind).from_config(own.config, **sampler.overrides)


def traits(own: Any) -> set[str]:
    """Returns what a sampler has to fit: the prediction and the kind of noise schedule."""
    config = own.config
    prediction = config.prediction_type.removesuffix("_prediction")
    if prediction == "flow":  # its config has betas, too, which are not used
        return {prediction}
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    cosine = config.beta_schedule == "squaredcos_cap_v2"
    return {prediction} | ({"zero_snr"} if zero_snr else set()) | ({"cosine"} if cosine else set())


def check_partial(scheduler: Any) -> None:
    """Raises ValueError for a sampler that fails if it starts in the middle of its schedule.

    PNDM takes the first steps for those of its Runge-Kutta start, and the noise that diffusers'
    SA-Solver adds to an image is not that of rectified flow.
    """
    kind, config = type(scheduler), scheduler.config
    flow = config.prediction_type == "flow_prediction"
    if (kind is diffusers.PNDMScheduler and not config.skip_prk_steps) or (
        kind is diffusers.SASolverScheduler and flow
    ):
        raise ValueError(
            f"--scheduler: {kind.__name__} cannot start in the middle of this bundle's schedule, "
            "as a --strength below 1 needs; expected another, such as dpmpp"
        )
