#!/usr/bin/env bash
# Runs every benchmark that needs a GPU, in about half an hour: the loader, stage one, and training
# steps with networks of Stable Diffusion's size and with the embedded ones.
#   bench/gpu.sh [FOLDER]    folder for the tables and JSON; default: runs/bench-gpu
#   PYTHON=/path/to/python   use this interpreter instead of .venv
#   PARTS="loader steps512"  run only these parts
#   PART_S=400               time limit of a part in seconds
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
  # The last line of a part's output holds its figures as JSON.
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
echo "=== all parts passed; figures in $folder"
