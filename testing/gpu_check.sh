#!/usr/bin/env bash
# Check bitblas on a graphics card, most important things first, within ten minutes, and keep what was found:
#
#   testing/gpu_check.sh [--dry-run] [--list]
#
# The machine needs python3 with torch, and nvcc or NVRTC; no package index. What else is missing is brought:
# SITE=dir names a folder of packages (apache-tvm and apache-tvm-ffi: see pack_site.sh), EXTRAS=dir one that is used only
# where the machine lacks a package that the tests import. The rest of what can be set:
#
#   OUT=dir       results (gpu_results): gpu_check.md, for docs/performance.md; stages.tsv, logs.txt, gpu.*, attention.*
#   SECONDS_ALL   seconds for everything (570); stages that do not fit are left out, and said so
#   JOBS          processes that build and test at once (the CPUs but two, at most 14)
#   PYTHON        the interpreter (python3)
#
# --dry-run goes through all that needs no card: it collects the tests and lists the cells. --list names the stages.
# The status is 0 where every stage that ran was well, and 1 else.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
dry=""
list=""
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry=1 ;;
    --list) list=1 ;;
    *)
      echo "usage: gpu_check.sh [--dry-run] [--list]" >&2
      exit 2
      ;;
  esac
done

python=${PYTHON:-python3}
out=${OUT:-$root/gpu_results}
total=${SECONDS_ALL:-570}
cpus=$(nproc 2>/dev/null || echo 2)
jobs=${JOBS:-$((cpus > 16 ? 14 : cpus > 2 ? cpus - 2 : 1))}
began=$(date +%s)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ -n "$list" ] && out=$work/list
mkdir -p "$out"
out=$(cd "$out" && pwd)
mkdir -m 700 "$work/store"
: > "$out/stages.tsv"
: > "$out/logs.txt"

export PYTHONPATH="$root/python:$root${SITE:+:$SITE}${PYTHONPATH:+:$PYTHONPATH}"
export BITBLAS_CACHE_DIR="$work/store" PYTHONUNBUFFERED=1
needed="pytest, xdist, pytest_timeout, hypothesis, filelock, tqdm, psutil, cloudpickle, numpy"
if [ -n "${EXTRAS:-}" ] && ! "$python" -c "import $needed" 2>/dev/null; then
  export PYTHONPATH="$PYTHONPATH:$EXTRAS"
fi

left() { echo $((total - $(date +%s) + began)); }

# collect: what there is so far, in files of which the folder has few
collect() {
  for name in gpu.json gpu.md attention.json attention.md; do
    [ -e "$work/bench/$name" ] && cp "$work/bench/$name" "$out/$name"
  done
  "$python" "$root/testing/gpu_summary.py" "$out" > "$out/.gpu_check.md" 2>> "$out/logs.txt" \
    && mv "$out/.gpu_check.md" "$out/gpu_check.md"
}

# stage NAME SECONDS COMMAND...: run a command for at most so long; its end, its time and its last line are kept
failed=0
stage() {
  local name=$1 limit=$2 log="$work/$1.log" status first seconds
  shift 2
  if [ -n "$list" ]; then
    echo "$name ($limit s): ${*//"$root/"/}"
    return 0
  fi
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  if [ "$limit" -lt 15 ]; then
    printf '%s\t%s\t%s\t%s\n' "$name" "left out" 0 "no time was left" >> "$out/stages.tsv"
    return 0
  fi
  echo "== $name, at most $limit s"
  first=$(date +%s)
  timeout --signal=INT --kill-after=10 "$limit" "$@" > "$log" 2>&1
  status=$?
  seconds=$(($(date +%s) - first))
  {
    echo "===== $name: $*"
    tail -c 1500000 "$log"
    echo
  } >> "$out/logs.txt"
  local word=well
  [ "$status" -eq 124 ] || [ "$status" -eq 137 ] && word="cut"
  [ "$status" -ne 0 ] && [ "$word" = well ] && word="failed ($status)"
  [ "$word" = well ] || [ "$word" = cut ] || failed=1
  printf '%s\t%s\t%s\t%s\n' "$name" "$word" "$seconds" "$(grep -v '^\s*$' "$log" | tail -n 1 | tr '\t' ' ' | cut -c 1-300)" \
    >> "$out/stages.tsv"
  tail -n 3 "$log"
  collect
  return 0
}

# tests SECONDS-LIMITED pytest over the card's tests; in a dry run they are only collected
tests() {
  local name=$1 limit=$2
  shift 2
  local how=(-n "$jobs")
  [ -n "$dry" ] && how=(--collect-only -p no:xdist)
  stage "$name" "$limit" "$python" -m pytest -q -m cuda -p no:cacheprovider --store "$work/store" "${how[@]}" "$@"
}

# benchmark NAME SECONDS OPTIONS...: again with what is left where a kernel of ours has lost the card (status 3)
benchmark() {
  local name=$1 limit=$2
  shift 2
  if [ -n "$dry$list" ]; then
    stage "$name" "$limit" "$python" -m benchmark.gpu --list "$@"
    return
  fi
  local minutes
  minutes=$(awk "BEGIN { print ($limit > $(left) ? $(left) : $limit) / 60 - 0.5 }")
  stage "$name" "$limit" bash -c '
    for attempt in 1 2 3 4 5 6; do
      "$@"
      status=$?
      [ "$status" -eq 3 ] || exit "$status"
    done
    exit 3' benchmark "$python" -m benchmark.gpu --out "$work/bench" --resume --jobs "$jobs" --minutes "$minutes" "$@"
}

environment() {
  nvidia-smi || echo "there is no nvidia-smi"
  nvcc --version || echo "there is no nvcc on the PATH"
  "$python" -VV
  "$python" -c "import $needed" || echo "bring these packages in EXTRAS"
  "$python" -c "
import torch
print('torch', torch.__version__, 'CUDA', torch.version.cuda)
for index in range(torch.cuda.device_count()):
    print(index, torch.cuda.get_device_properties(index))
"
  "$python" -c "import tvm, tvm_ffi; print('tvm', tvm.__version__, 'tvm_ffi', tvm_ffi.__version__)"
  "$python" -c "import sys; from bitblas.cli import main; sys.exit(main(['info']))" || true
  git -C "$root" log -1 --format='commit %h of %cs' 2>/dev/null || true
  if [ -z "${DRY:-}" ]; then "$python" -c "import torch; assert torch.cuda.is_available(), 'there is no CUDA device'"; fi
}
export -f environment
export python root needed DRY="$dry"

run=$root/testing/python/run
stage environment 60 bash -c environment
if [ "$failed" -ne 0 ]; then
  echo "there is no CUDA device, or no torch that sees it: see $out/logs.txt" >&2
  exit 1
fi
both=("$run/test_cuda_operator.py" "$run/test_cuda_attention.py")
tests rules 150 "${both[@]}" -k "(test_each or test_beside) and not sanitizer"
if [ -n "$dry" ]; then
  tests streams 100 "$run/test_cuda_streams.py"
else
  # one after the other: they take the time of calls, and share nothing
  stage streams 100 "$python" -m pytest -q -m cuda -p no:cacheprovider --store "$work/store" "$run/test_cuda_streams.py"
fi
benchmark goals 210 --goals
# beside torch's scaled_dot_product_attention
if [ -n "$dry$list" ]; then
  stage attention 100 "$python" -m benchmark.attention --help
else
  stage attention 100 "$python" -m benchmark.attention --device cuda --out "$work/bench" --resume --minutes 1.3
fi
tests sanitizer 120 "${both[@]}" -k sanitizer
tests operators 60 "${both[@]}" -k "not test_each and not test_beside and not tiling and not sanitizer"
tests run 150 "$run" --every 5 --examples 5 -k "not test_cuda_"
tests tuning 60 "$run/test_cuda_tuning.py"
benchmark formats 300 --quick

[ -n "$list" ] && exit 0
collect
echo "results are in $out"
exit "$failed"
