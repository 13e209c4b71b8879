"""Shows this machine's hardware, missing packages and the presets that fit.

    latent-t2i doctor
    latent-t2i doctor --json

The estimates run each preset's network on FakeTensors: about 15 s for all presets.
"""

import argparse
import importlib.util
import json
import os
import platform
import textwrap
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch

from latent_t2i import __version__
from latent_t2i.configs.presets import PRESETS_DIR
from latent_t2i.model.build_tools import find_build_tools
from latent_t2i.model.paths import ROOT, format_bytes, free_bytes, output_root
from latent_t2i.sizes import size_preset
from latent_t2i.train.estimate import available_bytes

CORE = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "webdataset", "numpy")
# Feature, the modules it needs, and the requirement that installs them.
OPTIONAL = (
    ("parquet sources", ("pyarrow",), "latent-t2i[parquet]"),
    ("TensorBoard logs", ("tensorboard",), "latent-t2i[track]"),
    ("evaluation reports", ("jinja2", "matplotlib", "scipy", "torchmetrics"), "latent-t2i[eval]"),
    ("web page", ("gradio",), "latent-t2i[app]"),
    ("8-bit AdamW", ("bitsandbytes",), "latent-t2i[8bit]"),
    ("shards over HTTP", ("aiohttp",), "latent-t2i[remote]"),
    ("shards on S3", ("s3fs",), "latent-t2i[remote]"),
)


def main(prog: str | None = None) -> int:
    """Prints the findings; the exit code is 0 even if something is missing."""
    description = "Shows this machine's hardware, missing packages and the presets that fit."
    parser = argparse.ArgumentParser(prog=prog or "latent-t2i doctor", description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    if parser.parse_args().json:
        print(json.dumps(inspect_machine() | {"presets": list(size_presets())}, indent=2))
        return 0
    machine = inspect_machine()
    for line in describe(machine):
        print(line)
    print("\npreset     parameters  batch  training memory per process (estimate)", flush=True)
    for row in size_presets():
        print(describe_preset(row), flush=True)
    return 0


def inspect_machine() -> dict[str, Any]:
    """Returns hardware, packages and free space as JSON values."""
    root = output_root()
    return {
        "latent-t2i": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: version(name) for name in CORE},
        "num_cpu_cores": _count_cores(),
        "memory_bytes": available_bytes(torch.device("cpu")),
        "output_root": str(root),
        "disk_bytes": free_bytes(root),
        "gpus": _list_gpus(),
        "compile": find_build_tools(),
        "optional": [_check_feature(*feature) for feature in OPTIONAL],
    }


def size_presets() -> Iterator[dict[str, Any]]:
    """Yields the sizes of each preset, and whether its memory fits the device it would use."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    available = available_bytes(device)
    for path in sorted(PRESETS_DIR.glob("*.yaml")):
        row = size_preset(path.stem, device=device.type)
        fits = None if available is None else row["memory_bytes"] <= available
        yield row | {"device": device.type, "available_bytes": available, "fits": fits}


def describe(machine: dict[str, Any]) -> Iterator[str]:
    """Yields the lines that describe the machine, at most 80 columns wide."""
    memory = machine["memory_bytes"]
    free = "unknown" if memory is None else format_bytes(memory)
    gpus = [
        f"{gpu['name']}, {format_bytes(gpu['free_bytes'])} "
        f"of {format_bytes(gpu['total_bytes'])} free"
        for gpu in machine["gpus"]
    ]
    lacks = [name for name, path in machine["compile"].items() if path is None]
    facts = {
        "latent-t2i": f"{machine['latent-t2i']} on Python {machine['python']}, {machine['system']}",
        "packages": ", ".join(f"{name} {found}" for name, found in machine["packages"].items()),
        "CPU": f"{machine['num_cpu_cores']} cores, {free} of memory available",
        "GPU": "; ".join(gpus) or "none found; training runs on the CPU",
        "disk": f"{format_bytes(machine['disk_bytes'])} free at {machine['output_root']}",
        "compile": f"--compile needs {', '.join(lacks)}: not found" if lacks else "available",
    } | {
        row["feature"]: f"missing {', '.join(row['missing'])}: {row['pip']}"
        if row["pip"]
        else "yes"
        for row in machine["optional"]
    }
    for name, text in facts.items():
        yield from textwrap.wrap(f"{name:<20}{text}", 80, subsequent_indent=" " * 20)


def describe_preset(row: dict[str, Any]) -> str:
    """Returns a preset's line."""
    advice = "too large: lower --micro-batch-size"
    verdict = {True: "fits", False: advice, None: "fits if the device has it"}[row["fits"]]
    weights = f"{row['num_parameters'] / 1e6:.1f} M"
    memory = format_bytes(row["memory_bytes"])
    return f"{row['preset']:<12}{weights:>9}{row['batch_size']:>7}  {memory:>8}  {verdict}"


def _check_feature(feature: str, modules: Sequence[str], requirement: str) -> dict[str, Any]:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if (ROOT / "pyproject.toml").is_file():  # a checkout, which pip installs as "."
        requirement = requirement.replace("latent-t2i", ".")
    pip = f"pip install '{requirement}'" if missing else None
    return {"feature": feature, "missing": missing, "pip": pip}


def _count_cores() -> int | None:
    # The cores this process may use, where the system says so (not on macOS).
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _list_gpus() -> list[dict[str, Any]]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        gpus.append({"name": name, "free_bytes": free, "total_bytes": total})
    return gpus
