#!/bin/bash
# The first run on a GPU, from the repository's root: bash jobs/gpu/first_run.sh [A|B|all]; see README.md beside this.
# On a CPU, to try it: FIRST_RUN_DEVICE=cpu FIRST_RUN_TINY=1 PY=.venv/bin/python bash jobs/gpu/first_run.sh
set -u

what=${1:-all}
python=$(command -v "${PY:-python3}") || { echo "error: no ${PY:-python3}; name a Python: PY=/path/to/python" >&2; exit 2; }
# Not resolved: an environment's Python is a link, and is known by where that lies.
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
device=${FIRST_RUN_DEVICE:-cuda}
tiny=${FIRST_RUN_TINY:-}
out=${OUT:-first_run_out}
mkdir -p "$out"
out=$(cd "$out" && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
began=$(date +%s)

export OUT=$out FIRST_RUN_DEVICE=$device
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$site/cache/triton} XDG_CACHE_HOME=${XDG_CACHE_HOME:-$site/cache}

# The package as an installation would lay it out; no pip is needed.
cp -r rollout tests jobs pyproject.toml "$site/"
cp -r batcher models conf "$site/rollout/"
export PYTHONPATH=$site

note() { echo "[$(($(date +%s) - began)) s] $*"; }

# part SECONDS NAME COMMAND...: run a command in the copy, its output in NAME.log.
part() {
  local limit=$1 name=$2 status
  shift 2
  (cd "$site" && FIRST_RUN_PART=$name timeout -s INT -k 6 "$limit" "$@" > "$out/$name.log" 2>&1)
  status=$?
  note "part $name, exit status $status" >> "$out/parts"
}

# show NAME [LINES]: what a part reported, or the end of its output.
show() {
  echo "=== $1"
  if [ -f "$out/$1.txt" ]; then cut -c1-330 "$out/$1.txt" | head -n "${2:-60}"; else tail -c 1500 "$out/$1.log"; fi
}

# tests NAME: the outcome of a part that pytest ran, and each distinct failure.
tests() {
  echo "=== $1: $(grep -c PASSED "$out/$1.log") passed; $(tail -n 1 "$out/$1.log" | cut -c1-120)"
  grep -E '^(FAILED|ERROR)|^E  ' "$out/$1.log" | cut -c1-240 | sort | uniq -c | sort -rn | head -n 25
}

if [ "$device" = cuda ]; then
  nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,clocks.mem --format=csv,noheader
  export ROLLOUT_TEST_DEVICE=cuda
  # Triton builds its launchers with these.
  ls "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h"
  command -v gcc cc | head -n 1
fi

[ "$device" = cpu ] && export TRITON_INTERPRET=1

smoke=(llama qwen2 qwen3 mistral gemma3_text gemma2 gpt_oss rest)
[ -n "$tiny" ] && smoke=(qwen2 rest)

if [ "$what" != B ]; then
  # Most of the time goes into compiling, so families run side by side.
  pids=()
  for family in "${smoke[@]}"; do
    part 75 "smoke_$family" "$python" -m jobs.gpu.smoke "$family" &
    pids+=($!)
  done
  wait "${pids[@]}"
  pytest=("$python" -m pytest -vv -rf --tb=short -p no:cacheprovider)
  parallel=()
  "$python" -c 'import xdist' 2> /dev/null && parallel=(-n 12)
  part 100 kernels "${pytest[@]}" "${parallel[@]}" --maxfail 30 --durations 5 tests/gpu \
    tests/models/attention/test_triton.py tests/models/attention/test_triton_buffers.py \
    tests/models/attention/test_select.py tests/models/sampling/test_gumbel.py tests/models/sampling/test_top_p.py \
    tests/models/patches/test_pointwise_triton.py --ignore tests/gpu/test_memory_pressure.py &
  pids=($!)
  if command -v compute-sanitizer > /dev/null; then
    kernels=()
    for name in attend locate write reduce sum_blocks draw norm rotate search; do
      kernels+=(--kernel-regex "kns=$name")
    done
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part 95 sanitize \
      compute-sanitizer --tool memcheck "${kernels[@]}" --print-limit 8 "$python" -m jobs.gpu.sanitize &
  else
    part 95 sanitize "$python" -m jobs.gpu.sanitize &
  fi
  pids+=($!)
  wait "${pids[@]}"
  # These take all of the memory, so nothing else may run.
  part 35 memory_pressure "${pytest[@]}" --durations 3 tests/gpu/test_memory_pressure.py
  part 45 contract "${pytest[@]}" "${parallel[@]}" --maxfail 15 tests/contract/test_model_parity.py \
    tests/contract/test_batch_independence.py tests/contract/test_untouched_trainer.py \
    tests/contract/test_async_tokens.py
fi

if [ "$what" != A ]; then
  shape=qwen2.5-1.5b
  [ -n "$tiny" ] && shape=tiny
  part 80 steps "$python" -m jobs.gpu.steps $shape --extras ${tiny:+--rows 3 --context 40 --steps 6}
  part 55 micro "$python" -m jobs.gpu.micro
  part 70 peers "$python" -m jobs.gpu.peers $shape ${tiny:+--requests 6 --max-new 12 --engines ours,static:4}
  if [ "$device" = cuda ]; then
    # So much that the engine must give way: nearly all that is free, but for the model and 8 GB.
    take=$("$python" -c 'import torch; print(int((0.95 * torch.cuda.mem_get_info()[0] - 12e9) / 1e9))')
    part 30 take_memory "$python" -m jobs.bench.memory_pressure random:qwen2.5-1.5b --rows 256 --context 256 \
      --new 400 --steps 60 --take "$take"
  fi
fi

echo
echo "################ figures"
cat "$out/parts"
if [ "$what" != B ]; then
  for family in "${smoke[@]}"; do show "smoke_$family" 30; done
  tests kernels
  show sanitize 20
  grep -E 'ERROR SUMMARY|Invalid' "$out/sanitize.log" | head -n 12
  tests memory_pressure
  tests contract
fi
if [ "$what" != A ]; then
  show steps
  show micro
  show peers 30
  if [ "$device" = cuda ]; then
    echo "=== $take GB taken"
    tail -n 12 "$out/take_memory.log" | cut -c1-200
  fi
fi
tar czf "$site/logs.tgz" -C "$out" --exclude logs.tgz . && find "$out" -maxdepth 1 -type f -delete && mv "$site/logs.tgz" "$out/"
note ended
