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
logs=$site/logs
mkdir "$logs"
trap 'rm -rf "$site"' EXIT
began=$(date +%s)
figures=$out/figures.txt
: > "$figures"

export OUT=$logs FIRST_RUN_DEVICE=$device
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Part B finds what part A has compiled.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/first_run_cache/triton}
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-${TMPDIR:-/tmp}/first_run_cache}

# A CPU interprets kernels, so there limits only end what hangs.
slower=1
if [ "$device" = cpu ]; then
  slower=12
  export TRITON_INTERPRET=1
fi

needed=(torch triton transformers numpy pyarrow psutil pynvml rich accelerate pytest)
missing=$("$python" -c 'import importlib.util as i, sys; print(*(m for m in sys.argv[1:] if not i.find_spec(m)))' "${needed[@]}")
[ -z "$missing" ] || { echo "error: $python lacks $missing" >&2; exit 2; }

# The package as an installation would lay it out; no pip is needed.
cp -r rollout tests jobs pyproject.toml "$site/"
cp -r batcher models conf "$site/rollout/"
export PYTHONPATH=$site

# part SECONDS NAME COMMAND...: run a command in the copy, its output in NAME.log.
part() {
  local limit=$(($1 * slower)) name=$2 status
  shift 2
  # Bash lets what it starts in the background ignore interrupts, and these end parts.
  (cd "$site" && FIRST_RUN_PART=$name timeout -s INT -k 4 "$limit" env --default-signal=INT "$@" > "$logs/$name.log" 2>&1)
  status=$?
  echo "[$(($(date +%s) - began)) s] part $name, exit status $status" | tee -a "$logs/parts"
}

# show NAME [LINES]: what a part reported, or the end of its output.
show() {
  echo "=== $1"
  if [ -f "$logs/$1.txt" ]; then
    grep -v '^  done ' "$logs/$1.txt" | cut -c1-300 | head -n "${2:-60}"
  else
    tail -c 1500 "$logs/$1.log"
  fi
}

# tests NAME: the outcome of a part that pytest ran, by module, and each distinct failure.
tests() {
  echo "=== $1: $(tail -n 1 "$logs/$1.log" | cut -c1-120)"
  grep PASSED "$logs/$1.log" | sed -E 's#.*tests/([a-z0-9_/]+)\.py.*#\1#' | sort | uniq -c | sed 's/^ */  passed /'
  grep -E '^(FAILED|ERROR) |^E  ' "$logs/$1.log" | cut -c1-220 | sort | uniq -c | sort -rn | head -n 20
}

# report COMMAND...: keep what it prints in the file that comes back even if this script is ended.
report() { "$@" >> "$figures"; }

# all NAME...: run `show` for each.
all() { for each in "$@"; do show "$each" 24; done; }

if [ "$device" = cuda ]; then
  nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,clocks.mem --format=csv,noheader
  export ROLLOUT_TEST_DEVICE=cuda
  # Triton builds its launchers with these.
  ls "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h"
  command -v gcc cc | head -n 1
fi

run_a() {
  # Most of the time goes into compiling, so families run side by side.
  local smoke=(llama qwen2 qwen3 mistral gemma3_text gemma2 gpt_oss rest invariant calls) pids=() parallel=() family
  [ -n "$tiny" ] && smoke=(qwen2 rest invariant calls)
  for family in "${smoke[@]}"; do
    part 70 "smoke_$family" "$python" -m jobs.gpu.smoke "$family" &
    pids+=($!)
  done
  wait "${pids[@]}"
  report all "${smoke[@]/#/smoke_}"

  local pytest=("$python" -m pytest -vv -rf --tb=short -p no:cacheprovider)
  # The cores that are left by the sanitizer, and one at least.
  "$python" -c 'import xdist' 2> /dev/null && parallel=(-n "$((($(nproc) * 3 + 3) / 4))")
  local kernels=()
  mapfile -t kernels < "$site/tests/gpu/kernel_tests.txt"
  # In the interpreter the tests of attention take minutes, and `make test` runs all of these.
  [ -n "$tiny" ] && kernels=(tests/gpu tests/models/sampling/test_top_p.py)
  part 100 kernels "${pytest[@]}" "${parallel[@]}" --maxfail 30 --durations 5 "${kernels[@]}" \
    --ignore tests/gpu/test_memory_pressure.py &
  pids=($!)
  # No filter by kernels' names: one that is new would be left out.
  local sanitizer
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 part 100 sanitize \
    ${sanitizer:+"$sanitizer" --tool memcheck --print-limit 8} "$python" -m jobs.gpu.sanitize &
  pids+=($!)
  wait "${pids[@]}"
  report tests kernels
  report show sanitize 20
  report echo "  compute-sanitizer: ${sanitizer:-none}"
  report grep -m 12 -E 'ERROR SUMMARY|Invalid|Misaligned|Internal|not supported' "$logs/sanitize.log"

  if [ "$device" = cuda ]; then
    # These take all of the memory, so nothing else may run.
    part 30 memory_pressure "${pytest[@]}" --durations 3 tests/gpu/test_memory_pressure.py
    report tests memory_pressure
  fi
  local contract=(model_parity batch_independence batch_invariance_on_gpu long_sequences scoring sessions untouched_trainer async_tokens)
  [ -n "$tiny" ] && contract=(batch_independence)
  contract=("${contract[@]/#/tests/contract/test_}")
  part 40 contract "${pytest[@]}" "${parallel[@]}" --maxfail 15 "${contract[@]/%/.py}"
  report tests contract
}

run_b() {
  local shape=qwen2.5-1.5b take
  [ -n "$tiny" ] && shape=tiny
  part 65 steps "$python" -m jobs.gpu.steps $shape
  report show steps
  part 40 invariant "$python" -m jobs.gpu.invariant $shape
  report show invariant
  part 58 peers "$python" -m jobs.gpu.peers $shape ${tiny:+--requests 6 --max-new 12 --engines ours,ours:3,static:4}
  report show peers 30
  part 30 micro "$python" -m jobs.gpu.micro
  report show micro
  if [ "$device" = cuda ]; then
    # So much that the engine must give way: nearly all that is free, but for the model and 8 GB.
    take=$("$python" -c 'import torch; print(int((0.95 * torch.cuda.mem_get_info()[0] - 12e9) / 1e9))')
    part 24 take_memory "$python" -m jobs.bench.memory_pressure random:qwen2.5-1.5b --rows 256 --context 256 \
      --new 400 --steps 60 --take "$take"
  else
    part 24 take_memory "$python" -m jobs.bench.memory_pressure random:tiny --device cpu --dtype float32 --rows 4 \
      --context 40 --new 40 --steps 10 --take 0.3
  fi
  report echo "=== ${take:-0.3} GB taken"
  report tail -n 9 "$logs/take_memory.log"
  part 23 cuts "$python" -m jobs.gpu.cuts
  report show cuts 20
}

[ "$what" = B ] || run_a
[ "$what" = A ] || run_b

echo
echo "################ figures"
cat "$logs/parts" "$figures"
cat "$logs/parts" >> "$figures"
tar czf "$out/logs.tgz" -C "$site" logs
echo "[$(($(date +%s) - began)) s] ended"
