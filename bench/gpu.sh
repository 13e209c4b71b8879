#!/usr/bin/env bash
# Everything that is measured with a GPU, in one call of half an hour: what the loader delivers, stage
# one, and a training step with Stable Diffusion's networks and with the embedded ones at the seed
# recipe's batch. Needs a GPU, and the package's own dependencies; nothing else in the project needs
# either this script or a GPU.
#   bench/gpu.sh [FOLDER]    where each part's table and JSON go; default: runs/bench-gpu
#   PYTHON=/path/to/python   that interpreter in place of .venv's
#   PARTS="loader steps512"  these parts only
#   PART_S=400               the seconds that a part may take
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-.venv/bin/python}
folder=${1:-runs/bench-gpu}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
  || { echo "error: no GPU that torch can use" >&2; exit 1; }
mkdir -p "$folder" || exit 1

failed=()
part() {
  local name=$1 began=$SECONDS
  shift
  case " ${PARTS:-$name} " in *" $name "*) ;; *) return ;; esac
  echo "=== $name: $*"
  # A part's last line is its figures as JSON.
  if timeout "${PART_S:-400}" "$python" "$@" 2> "$folder/$name.log" | tee "$folder/$name.txt" \
    && [ "${PIPESTATUS[0]}" -eq 0 ] && tail -n 1 "$folder/$name.txt" > "$folder/$name.json"; then
    echo "=== $name: done in $((SECONDS - began)) s"
  else
    echo "=== $name: FAILED after $((SECONDS - began)) s; the end of $folder/$name.log:"
    tail -n 5 "$folder/$name.log"
    failed+=("$name")
  fi
}

step=bench/train_step.py
part loader -m bench.loaders.on_gpu
part stage_one bench/stage_one.py --size 64 256
part steps64 $step --size 64 --rounds 8
part steps256 $step --size 256 --rounds 8
part steps512 $step --size 512 --rounds 6 --records 128
part steps512-fp16 $step --size 512 --precision fp16 --rounds 6 --records 128 --no-changes
seed="--networks embedded --size 64 --batch-size 8 --precision fp16 --rounds 8"
part seed $step $seed
part seed-graph $step $seed --cuda-graph --no-changes

if [ ${#failed[@]} -gt 0 ]; then
  echo "=== failed: ${failed[*]}"
  exit 1
fi
echo "=== all measured; figures in $folder"
