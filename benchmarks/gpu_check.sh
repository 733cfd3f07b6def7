#!/usr/bin/env bash
# Everything that needs a GPU, in one offline call under nine minutes:
#
#   bash benchmarks/gpu_check.sh [--dry-run] OUTDIR [part ...]
#
#   build      pip install without isolation, network and dependencies, into build/gpu_check/site
#   tests      the parity tests, every row of the table for CUDA on the device
#   sanitizer  compute-sanitizer: memcheck, racecheck, synccheck, initcheck; finds a planted error
#   graph      a whole QAT step captured in a CUDA graph
#   large      tensors of more than 2^31 elements
#   bench      the benchmark suite in its short form
#   summary    OUTDIR/summary.md from what the last call left (it is written after every part too)
#
# Without a part, all. A failing part does not stop the others. Exit code: 0 if all chosen parts
# passed, 1 if one failed or could not run, 2 for a wrong call. Without a GPU the parts that need
# one are "not run", which is 1, but with --dry-run: then the CPU rows are tested, and what cannot
# run does not count. OUTDIR gets summary.md, gpu_check.json, log.txt, bench.json, bench_step.json
# and report.md.
#
# Environment: PYTHON (python3), JOBS (all cores), QKERNELS_COMMIT (where there is no .git),
# QKERNELS_GPU_CHECK_WORK (build/gpu_check), QKERNELS_GPU_CHECK_SECONDS (530, shared out among the
# chosen parts; what a part leaves goes on to the next).
set -uo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
PARTS=(build tests sanitizer graph large bench)
declare -A SHARE=([build]=110 [tests]=140 [sanitizer]=70 [graph]=30 [large]=45 [bench]=135)

wrong_call() {
  printf 'gpu_check: %s\nusage: gpu_check.sh [--dry-run] OUTDIR [part ...]; parts: %s summary\n' \
    "$1" "${PARTS[*]}" >&2
  exit 2
}

read_arguments() {
  DRY_RUN=0 CHOSEN=() OUTDIR=""
  local word
  for word in "$@"; do
    case $word in
      --dry-run) DRY_RUN=1 ;;
      -*) wrong_call "option must be --dry-run, got $word" ;;
      *) if [[ -z $OUTDIR ]]; then OUTDIR=$word; else CHOSEN+=("$word"); fi ;;
    esac
  done
  [[ -n $OUTDIR ]] || wrong_call "OUTDIR must be a folder, got nothing"
  for word in "${CHOSEN[@]}"; do
    [[ " ${PARTS[*]} summary " == *" $word "* ]] ||
      wrong_call "part must be one of ${PARTS[*]} summary, got $word"
  done
  [[ ${#CHOSEN[@]} -gt 0 ]] || CHOSEN=("${PARTS[@]}")
  mkdir -p "$OUTDIR" || wrong_call "OUTDIR must be a folder that can be written, got $OUTDIR"
  OUTDIR=$(cd "$OUTDIR" && pwd)
}

prepare() {
  PYTHON=${PYTHON:-python3}
  WORK=${QKERNELS_GPU_CHECK_WORK:-$ROOT/build/gpu_check}
  JOBS=${JOBS:-$(nproc)}
  mkdir -p "$WORK/parts"
  # the installed package comes before the source tree's qkernels/, which has no compiled module;
  # a safe path keeps Python from putting the current folder first
  export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
  export PYTHONPATH="$WORK/site:$HERE${PYTHONPATH:+:$PYTHONPATH}:$ROOT"
  export PIP_DISABLE_PIP_VERSION_CHECK=1 TRITON_CACHE_DIR="$WORK/triton"
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
  unset TRITON_INTERPRET QKERNELS_BACKEND
  local toolkit=${CUDA_HOME:-/usr/local/cuda}
  export PATH="$PATH:$toolkit/bin:$toolkit/compute-sanitizer"
}

# what the machine is: JSON; 0 with a GPU that torch can use, 3 without
look_around() {
  timeout -k 5 60 "$PYTHON" "$HERE/gpu_check/info.py" "$WORK/info.json" "$WORK/site" >"$WORK/info.log" 2>&1
  HAS_GPU=$(($? == 0))
}

part_build() {
  local cuda=AUTO
  if ((HAS_GPU)); then cuda=ON; fi
  rm -rf "$WORK/site"
  QKERNELS_CUDA=${QKERNELS_CUDA:-$cuda} CMAKE_BUILD_PARALLEL_LEVEL=$JOBS MAX_JOBS=$JOBS \
    "$PYTHON" -m pip install -v --no-build-isolation --no-deps --no-index --no-cache-dir \
    --target "$WORK/site" "$ROOT" || return 1
  cd "$WORK" && "$PYTHON" "$HERE/gpu_check/info.py" "$WORK/info.json" "$WORK/site" --built
}

# pytest in several processes: NAME, number of processes, arguments of pytest
tested() {
  local name=$1 jobs=$2
  shift 2
  cd "$ROOT" && "$PYTHON" "$HERE/gpu_check/tests.py" "$WORK/$name.json" --jobs "$jobs" \
    --seconds $((LIMIT - 12)) "$@"
}

part_tests() {
  local files=(parity parity_noise fake_quant fake_quant_inplace quant_range error_stats foreach
    philox triton_noise triton_foreach)
  if ((HAS_GPU)); then
    tested tests "$JOBS" --every-row -- "${files[@]/#/tests/test_}.py" -k "not compiled"
  else # the CPU rows of the main operations: the script is tried, not the library
    tested tests "$JOBS" -- tests/test_parity.py tests/test_gpu.py -k "cpu-native or gpu"
  fi
}

part_graph() {
  tested graph 4 -- tests/test_gpu.py tests/test_nn_graph.py tests/test_nn_noise_steps.py \
    tests/test_noise_source.py -k "cuda_graph or captured"
}

part_large() {
  tested large 1 -- tests/test_gpu.py -k "2_31"
}

# a tool, whether its log shall say "clean" or "found", words that must be there, and what is run
sanitized() {
  local tool=$1 wanted=$2 words=$3 code=0 log
  shift 3
  log=$WORK/sanitizer.$tool.$wanted.log
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 $((LIMIT - 10)) compute-sanitizer --tool "$tool" \
    --error-exitcode 86 --report-api-errors no --print-limit 20 --target-processes application-only \
    "$PYTHON" "$@" >"$log" 2>&1 || code=$?
  # a program that meets an error may end with a code of its own, so "found" takes any but 0
  if [[ $wanted == clean && $code != 0 || $wanted == found && $code == 0 ]] ||
    ! grep -q "$words" "$log"; then
    echo "FAILED $tool: wanted $wanted and the words: $words; got exit code $code"
    tail -n 40 "$log"
    return 1
  fi
  echo "passed $tool: $wanted; $(grep -h 'SUMMARY\|all cases' "$log" | tr '\n' ';')"
}

part_sanitizer() {
  if ! command -v compute-sanitizer; then
    echo "compute-sanitizer is not on the PATH"
    return 3
  fi
  cd "$ROOT" || return 1
  local pids=() bad=0 pid tool
  # an error made on purpose, which must be seen
  sanitized memcheck found "Invalid __global__ write" "$HERE/gpu_check/planted.py" & pids+=($!)
  sanitized memcheck clean "all cases were run" "$HERE/gpu_check/sanitizer.py" all & pids+=($!)
  for tool in racecheck synccheck initcheck; do
    sanitized $tool clean "all cases were run" "$HERE/gpu_check/sanitizer.py" some & pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || bad=1; done
  if grep -q 'Device not supported' "$WORK"/sanitizer.*.log; then
    echo "compute-sanitizer does not support this device or its driver"
    return 3
  fi
  return $bad
}

part_bench() {
  cd "$ROOT" || return 1
  local step=$((LIMIT / 4)) bad=0 results
  rm -f "$OUTDIR"/{bench,bench_step}.json "$OUTDIR/report.md" # of a run before this one
  # an interrupted run still writes its JSON
  timeout -s INT -k 10 $((LIMIT - step - 12)) "$PYTHON" -m pytest benchmarks -q -p no:cacheprovider \
    --ignore benchmarks/bench_step.py --short --benchmark-json="$OUTDIR/bench.json" || bad=1
  timeout -s INT -k 10 "$step" "$PYTHON" -m pytest benchmarks/bench_step.py -q \
    -p no:cacheprovider --short --benchmark-json="$OUTDIR/bench_step.json" || bad=1
  results=$(find "$OUTDIR" -name 'bench*.json')
  # shellcheck disable=SC2086
  "$PYTHON" -m benchmarks.report $results --no-plots --out "$OUTDIR" || bad=1
  return $bad
}

summary() {
  "$PYTHON" "$HERE/gpu_check/summary.py" "$WORK" "$OUTDIR" "${CHOSEN[@]}"
}

# verdict of a part: PART, verdict, seconds, limit, reason
note() {
  printf '%s\n%s\n%s\n%s\n' "$2" "$3" "$4" "${5:-}" >"$WORK/parts/$1"
  printf '%-10s %-8s %4ss of %ss  %s\n' "$1" "$2" "$3" "$4" "${5:-}"
  if [[ $2 == failed || ($2 == "not run" && $DRY_RUN == 0) ]]; then BAD=1; fi
}

# why a part cannot run here, or nothing
why_not() {
  if [[ $1 == build ]]; then return; fi
  if ((!HAS_GPU)) && [[ $1 != tests || $DRY_RUN == 0 ]]; then
    echo "no GPU: $(tail -n 1 "$WORK/info.log")"
  elif ! compgen -G "$WORK/site/qkernels/_C*.so" >/dev/null &&
    ! "$PYTHON" -c 'from qkernels import _native as n; raise SystemExit(n.C is None)' \
      >/dev/null 2>&1; then
    echo "qkernels is not built: run the part build first"
  fi
}

run_part() {
  local part=$1 start=$SECONDS why code=0
  why=$(why_not "$part")
  LIMIT=$((DEADLINE - SECONDS))
  if [[ -z $why && $LIMIT -lt 20 ]]; then why="no time left"; fi
  if [[ -n $why ]]; then
    note "$part" "not run" 0 "$LIMIT" "$why"
    return
  fi
  export LIMIT HAS_GPU DRY_RUN OUTDIR WORK PYTHON JOBS ROOT HERE
  timeout -k 5 "$LIMIT" bash -c "$(declare -f); part_$part" >"$WORK/$part.log" 2>&1 || code=$?
  case $code in
    0) note "$part" passed $((SECONDS - start)) "$LIMIT" ;;
    3) note "$part" "not run" $((SECONDS - start)) "$LIMIT" "$(tail -n 1 "$WORK/$part.log")" ;;
    124 | 137) note "$part" failed $((SECONDS - start)) "$LIMIT" "it ran past its time" ;;
    *) note "$part" failed $((SECONDS - start)) "$LIMIT" "exit code $code; see log.txt" ;;
  esac
}

main() {
  read_arguments "$@"
  prepare
  BAD=0
  if [[ ${CHOSEN[*]} != summary ]]; then
    rm -f "$WORK"/parts/* "$WORK"/*.log "$WORK"/*.json
    look_around
    local part total=0 spent=0 seconds=${QKERNELS_GPU_CHECK_SECONDS:-530}
    for part in "${CHOSEN[@]}"; do total=$((total + ${SHARE[$part]:-0})); done
    for part in "${PARTS[@]}"; do
      if [[ " ${CHOSEN[*]} " == *" $part "* ]]; then
        spent=$((spent + SHARE[$part]))
        # each part ends by the time at which it would if all before it took their shares
        DEADLINE=$((seconds * spent / total))
        run_part "$part"
        summary >/dev/null || BAD=1
      fi
    done
  fi
  summary || BAD=1
  exit $BAD
}

main "$@"
