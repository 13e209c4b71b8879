#!/usr/bin/env bash
# What the loader delivers to a GPU, in one call: a table, then a line of JSON. Needs a GPU, and the
# package's own dependencies; nothing else in the project needs either this script or a GPU.
#   PYTHON=/path/to/python   uses that interpreter instead of .venv's
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-.venv/bin/python}" -m bench.loaders.on_gpu "$@"
