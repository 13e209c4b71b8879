#!/usr/bin/env bash
# Checks that everything runs on a GPU, and runs every benchmark that needs one.
#   bench/gpu.sh [--rehearse] [FOLDER]   tables and JSON go to FOLDER; default: runs/bench-gpu
#   --rehearse               try all parts, at the same time, on a CPU with tiny networks
#   PARTS="smoke steps512"   run only these of: smoke steps512 steps64 data changes
#   PART_S=480               time limit of a part in seconds
#   PYTHON=/path/to/python   use this interpreter instead of .venv
#   WHEELS=build/wheels      unpack these wheels and use them before installed packages
# A measurement prints its figures so far as JSON lines, so that a stopped one has figures too.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
rehearse=
[ "${1:-}" = --rehearse ] && rehearse=1 && shift
folder=${1:-runs/bench-gpu}
python=${PYTHON:-.venv/bin/python}
parts=${PARTS:-smoke steps512 steps64 data changes}
part_s=${PART_S:-480}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
for name in $parts; do
  case " smoke steps512 steps64 data changes " in *" $name "*) ;; *)
    echo "error: PARTS: found $name, expected smoke, steps512, steps64, data or changes" >&2
    exit 2
  esac
done

if [ -n "${WHEELS:-}" ]; then
  for wheel in "$WHEELS"/*.whl; do
    "$python" -m zipfile -e "$wheel" build/bench-site || exit 1
  done
  PYTHONPATH=$PWD/build/bench-site:$PYTHONPATH
fi
"$python" - << 'END' || exit 1
from importlib.util import find_spec
import sys

needed = """accelerate braceexpand diffusers docstring_parser fsspec numpy PIL psutil pycocotools
safetensors tenacity torch tqdm transformers typeguard tyro webdataset yaml""".split()
if missing := [name for name in needed if find_spec(name) is None]:
    sys.exit(f"error: missing packages: {' '.join(missing)}; see WHEELS in docs/benchmarks.md")
END
if [ -z "$rehearse" ]; then
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
    || { echo "error: no GPU that torch can use" >&2; exit 1; }
fi
mkdir -p "$folder" || exit 1
rm -f "$folder"/*.{txt,json,log,failed}

part() {  # NAME: runs the function of this name, if it is asked for
  case " $parts " in *" $1 "*) ;; *) return ;; esac
  echo "=== part $1"
  if [ -n "$rehearse" ]; then "$1" & else "$1"; fi
}

measure() {  # NAME COMMAND...: runs a command in what is left of the part's time
  local name=$1 start=$SECONDS left=$((part_s - SECONDS + began))
  shift
  echo "=== $name: $*"
  if [ $left -le 0 ]; then
    echo "not started: the part's $part_s s were over" | tee "$folder/$name.failed"
  elif timeout $left "$python" "$@" 2> "$folder/$name.log" | tee "$folder/$name.txt" \
    && [ "${PIPESTATUS[0]}" -eq 0 ]; then
    echo "=== $name: done in $((SECONDS - start)) s"
  else
    echo "stopped or failed after $((SECONDS - start)) s" > "$folder/$name.failed"
    echo "=== $name: $(cat "$folder/$name.failed"); the end of $folder/$name.log:"
    tail -n 5 "$folder/$name.log"
  fi
}

measure_on_gpu() {  # like measure, for what a CPU cannot do, or takes minutes for
  if [ -n "$rehearse" ]; then echo "=== $1: needs a GPU, skipped"; else measure "$@"; fi
}

step=bench/train_step.py
sd="--networks sd" seed="--networks embedded --size 64 --batch-size 8 --parts bare"
large=512 changed="512 64 256"
few="--rounds 6 --records 128" some="--rounds 8" fewest="--rounds 4 --records 128"
loader="--seconds 1" stage="--networks sd --size 64 256 --records 1024 --rounds 2"
if [ -n "$rehearse" ]; then
  export OMP_NUM_THREADS=1  # the networks are too small for more
  # Processors without instructions for bf16 take seconds for a step in it.
  some="--records 2 --rounds 2 --turn 0.01 --workers 1 --batch-size 1 --precision no"
  few=$some fewest=$some
  sd="--networks tiny"
  large=256 changed="256 64"
  loader="--device cpu --seconds 0.01 --records 512"
  stage="--networks tiny --size 64 --records 8 --rounds 1"
fi

# shellcheck disable=SC2086  # the variables hold several words
smoke() {
  local began=$SECONDS
  measure smoke -m bench.steps.smoke ${rehearse:+--rehearse}
  if "$python" -c 'import pytest' 2> /dev/null && [ -d tests/gpu ]; then
    measure tests -m pytest -q -W ignore::DeprecationWarning -W ignore::FutureWarning tests/gpu
  fi
}

# shellcheck disable=SC2086
steps512() {
  local began=$SECONDS
  measure steps512-bf16 $step $sd --size $large --parts bare online $few
  measure_on_gpu steps512-fp16 $step $sd --size $large --parts bare --precision fp16 $few
  measure_on_gpu steps512-compiled $step $sd --size $large --parts bare --compiled $few
}

# shellcheck disable=SC2086
steps64() {
  local began=$SECONDS
  measure steps64 $step $sd --size 64 --parts bare online $some
  measure_on_gpu seed $step $seed --precision fp16 $some
  measure_on_gpu seed-graph $step $seed --precision fp16 --cuda-graph $some
}

# shellcheck disable=SC2086
data() {
  local began=$SECONDS
  measure loader -m bench.loaders.on_gpu $loader
  measure stage_one bench/stage_one.py $stage
}

# shellcheck disable=SC2086
changes() {
  local began=$SECONDS
  measure changes $step $sd --parts changes --size $changed $fewest
}

for name in smoke steps512 steps64 data changes; do
  part $name
done
wait

echo "=== figures in $folder"
if "$python" -m bench.steps.attempts "$folder"; then
  echo "=== all parts passed"
else
  exit 1
fi
