"""The console command `latent-t2i`: one subcommand for each stage and tool.

    latent-t2i encode --config demo
    latent-t2i encode --help

A subcommand's module is imported when the subcommand runs, so `latent-t2i --help` is fast.
"""

import difflib
import importlib
import sys

from latent_t2i import __version__

PROG = "latent-t2i"
# Name: the module whose `main(prog=...)` runs it, and its line of help.
COMMANDS = {
    "encode": ("latent_t2i.pipeline.run", "encode captioned images into shards (stage one)"),
    "train": ("latent_t2i.train.run", "train a denoiser from shards, in one process (stage two)"),
    "sample": ("latent_t2i.sample.run", "generate images from a bundle"),
    "grid": ("latent_t2i.sample.grid", "compare guidance scales, seeds, steps or bundles"),
    "edit": ("latent_t2i.sample.edit", "change an image: image to image, inpainting, variations"),
    "interpolate": ("latent_t2i.sample.interpolate", "draw the way between prompts or seeds"),
    "export": ("latent_t2i.sample.export", "write a model card and float16 files, and upload"),
    "app": ("latent_t2i.sample.app", "serve a web page that generates images"),
    "evaluate": ("latent_t2i.evaluation.run", "compute metrics of a bundle and write a report"),
    "compare": ("latent_t2i.evaluation.compare", "compare evaluations of one protocol"),
    "reference": ("latent_t2i.evaluation.reference", "make statistics of real images, for FID"),
    "verify": ("latent_t2i.shards.verify", "check every byte of a shard folder"),
    "summary": ("latent_t2i.shards.summary", "print what a shard folder contains"),
    "doctor": ("latent_t2i.doctor", "show hardware, missing packages and the presets that fit"),
    "completion": ("latent_t2i.completion", "print a completion script: completion bash|zsh|fish"),
}
# Section names of presets, which users try as commands.
ALIASES = {"pipeline": "encode", "evaluation": "evaluate", "inspect": "summary"}
LISTING = "\n".join(f"  {name:<12}{about}" for name, (_, about) in COMMANDS.items())
HELP = f"""\
usage: {PROG} COMMAND [flags]

Trains text-to-image latent diffusion from precomputed latents and text embeddings.

{LISTING}
  --version   print the version
  --help      print this help; `{PROG} COMMAND --help` lists a command's flags

Several GPUs:      accelerate launch --num_processes 8 -m latent_t2i.train.run [flags]
Shell completion:  source <({PROG} completion bash)
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the subcommand named by the first argument and returns the exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if name == "--version":
        print(f"{PROG} {__version__}")
        return 0
    if name not in COMMANDS:
        print(_describe_unknown(name), file=sys.stderr)
        return 2
    sys.argv = [f"{PROG} {name}", *rest]
    module = importlib.import_module(COMMANDS[name][0])
    return int(module.main(prog=sys.argv[0]) or 0)


def _describe_unknown(name: str) -> str:
    if not name:
        return f"error: no command given, expected one of {', '.join(COMMANDS)} (see {PROG} --help)"
    near = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], n=1)
    suggestion = f", did you mean {ALIASES.get(near[0], near[0])}?" if near else ""
    return f"error: unknown command {name!r}{suggestion} (see {PROG} --help)"
