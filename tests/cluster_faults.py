"""Encoders that fail in an actor of a Ray cluster, for tests.

    monkeypatch.setattr(stage, "load_encoders", partial(load_failing, fault="die", folder=folder))

Ray's processes import this module by name, which they cannot do with a module of tests.
"""

import os
import signal
import time
from pathlib import Path

import torch

from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.pipeline.encode import Encoders
from latent_t2i.pipeline.stage import load_encoders

CALL = 3
"""The call of the VAE's encoder that fails once, counted from 1 in each process."""


def load_failing(
    config: PipelineConfig, device: torch.device, *, fault: str, folder: Path
) -> Encoders:
    """Loads encoders that fail.

    `die`: calls with a black image kill the process. `die_once`: one call of one process kills it.
    `wait`: each call writes `started-PID` and waits while `wait` exists in `folder`.
    """
    encoders = load_encoders(config, device)
    num_calls = 0

    def fail(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        nonlocal num_calls
        num_calls += 1
        if fault == "die" and (arguments[0] == -1).all(dim=(1, 2, 3)).any():
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "die_once" and num_calls == CALL and _is_first(folder / "died"):
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "wait":
            (folder / f"started-{os.getpid()}").touch()
        while (folder / "wait").exists():
            time.sleep(0.05)

    encoders.vae.network.get_submodule("encoder").register_forward_pre_hook(fail)
    return encoders


def _is_first(path: Path) -> bool:
    """Returns whether no process has created a file before."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
