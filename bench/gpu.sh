#!/usr/bin/env bash
# What needs a GPU, for a machine that is there for minutes: build, tests, memory and race checks, benchmarks, tuning, profiles.
#   bench/gpu.sh [all|tests|bench|profile] [OUT]
# Each run ends within LIMIT seconds (default 530; the parts one by one do everything, `all` what fits). OUT (default: $OUT, or
# build/gpu) gets summary.txt and results-<part>.tar.gz: logs, figures, tuned configurations, the profiler's report. The archive
# is renewed after every section, so a run that is cut short loses one section. Unpacked at the top of the tree, it is what the
# next part's table of aims continues from. A section that fails is reported and the rest goes on; exit status: failed sections.
# RAS_FAST_COMMIT names the commit in the figures of a tree that came without its history. Needs no network. PYTHON (default
# python3) must have torch with CUDA, triton, transformers, pillow, ninja and pytest; matplotlib draws the roofline, pytest-xdist
# makes the tests quick. nvcc must be there; wheels in wheels/ (Liger, …) are used.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
part=${1:-all}
out=${2:-${OUT:-build/gpu}}
python=${PYTHON:-python3}
limit=${LIMIT:-530}
case $part in all | tests | bench | profile) ;; *) sed -n '2,10p' "$0" && exit 2 ;; esac
logs=bench/results/logs
mkdir -p "$out" "$logs" build
summary="$out/summary.txt"
: >"$summary"
failures=0

# Everything that is to survive the machine. The figures' folder is named by bench/harness.py.
bundle() { tar -czf "$out/results-$part.tar.gz" bench/results; }

# section NAME SECONDS COMMAND...: runs it with a time limit, output to its log; nothing if too little time is left
section() {
  local name=$1 seconds=$2 start=$SECONDS status left=$((limit - SECONDS - 10))
  shift 2
  if [ $left -lt 15 ]; then
    printf '%-16s skipped: no time left\n' "$name" >>"$summary"
    failures=$((failures + 1))
    return 1
  fi
  timeout --kill-after=15 $((seconds < left ? seconds : left)) "$@" >"$logs/$name.log" 2>&1
  status=$?
  if [ $status -eq 0 ]; then
    printf '%-16s ok      %4d s\n' "$name" $((SECONDS - start)) >>"$summary"
  else
    printf '%-16s FAILED  %4d s  (status %d%s)\n' "$name" $((SECONDS - start)) $status \
      "$(case $status in 124 | 137) echo ', time limit' ;; esac)" >>"$summary"
    failures=$((failures + 1))
    echo "--- $name failed; the end of its log:"
    tail -n 12 "$logs/$name.log"
  fi
  bundle
  return $status
}

# The package from this tree, without an installation.
ln -sfn ../triton_kernels ras_fast/triton_kernels
site="$PWD/build/site"
if compgen -G 'wheels/*.whl' >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" wheels/*.whl
fi
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
arch=$("$python" -c 'import torch; major, minor = torch.cuda.get_device_capability(); print(f"{major}{minor}" + "a" * (major == 9))') ||
  { echo "$python has no torch that sees a GPU: nothing to do" | tee "$summary"; exit 1; }
export RAS_FAST_CUDA_ARCHS=${RAS_FAST_CUDA_ARCHS:-$arch}

run_tests() {
  local workers
  workers=$("$python" -c 'import xdist; print("-n 12")' 2>/dev/null)
  # A file that cannot be imported is one failure, not the end of the others.
  # shellcheck disable=SC2086  # two words, or none
  section tests 260 "$python" -m pytest -q -m "" -p no:cacheprovider --continue-on-collection-errors $workers \
    -k "not hopper" tests/cuda tests/ops/test_*_triton.py
  # Without torch's pool every tensor is an allocation of its own, whose ends the checker knows.
  section memcheck 100 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool memcheck --error-exitcode 9 "$python" tests/cuda/small_shapes.py "${families[@]}"
  section racecheck 100 compute-sanitizer --tool racecheck --error-exitcode 9 \
    "$python" tests/cuda/small_shapes.py "${families[@]}"
}

# A kernel that waits for itself would take everything with it: it comes alone, each test named before it runs, and afterwards
# only if it came through.
families=(norm attention rotary linear cache)
without=(--without hopper "hopper no mass")
try_hopper() {
  section hopper 120 "$python" -m pytest -v -m "" -p no:cacheprovider -k hopper tests/cuda/test_attention_cuda.py &&
    families+=(hopper) && without=()
}

run_bench() {
  section norm 110 "$python" bench/bench_norm.py --seconds 0.15
  section rotary 75 "$python" bench/bench_rotary.py --quick --seconds 0.15
  section linear 45 "$python" bench/bench_linear.py --quick --seconds 0.15
  section engine 190 "$python" bench/bench_engine.py --gpu --tokens 128 --budget 140
  section attention 240 "$python" bench/bench_attention.py --full --seconds 0.15 "${without[@]}"
}

# What is small comes first: the tuner takes whatever time is left.
run_profile() {
  section crossovers 90 "$python" bench/bench_crossovers.py
  section gated_linear 30 "$python" bench/bench_gated_linear.py --quick --seconds 0.2
  section towers 30 "$python" bench/bench_towers.py --seconds 0.1
  section image_masks 30 "$python" bench/bench_image_masks.py --seconds 0.1
  section autosteer 90 "$python" bench/bench_autosteer.py --shape 7b --dtype bfloat16
  section decode 90 "$python" bench/bench_decode.py --shape 7b --dtype bfloat16 --batch 1 32 --tokens 48 --rounds 1
  section qwen 110 "$python" bench/bench_engine.py --gpu --shape qwen3-vl-8b --tokens 64 --batches 1
  section roofline 20 "$python" bench/roofline.py
  section ncu 110 ncu --force-overwrite --export bench/results/logs/ncu --clock-control none \
    --section SpeedOfLight --section LaunchStats --section Occupancy --section WarpStateStats --section MemoryWorkloadAnalysis \
    --section ComputeWorkloadAnalysis --launch-count 48 \
    --kernel-name 'regex:add_norm|attention_kernel|decode_kernel|prefill_kernel|merge|rotary_kernel|linear_kernel|write_cache|region_mass|selected_rows|sum_parts' \
    "$python" bench/profile_targets.py "${families[@]}"
  # Beside configs.json, not over it: an entry is taken over when its figures have been looked at.
  section tune 380 "$python" -m ras_fast.cli bench --tune --out bench/results/logs/configs.json
}

profile_table() {
  ncu --import bench/results/logs/ncu.ncu-rep --page raw --csv >"$logs/ncu.csv" && "$python" bench/ncu_table.py "$logs/ncu.csv"
}

# shellcheck disable=SC2016  # the inner shell expands it
section facts 30 bash -c 'nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu --format=csv
  nvcc --version | tail -2; "$0" -m ras_fast.cli doctor' "$python"
# Libraries brought along (ras_fast/_lib, of these sources) need no build. One that is not there would make every GPU test a
# skipped one, or the engine's figures another machine's.
usable='import ras_fast
for backend in ras_fast.backends().values(): print(backend)
raise SystemExit(not all(backend.available for backend in ras_fast.backends().values()))'
"$python" -c "$usable" >/dev/null 2>&1 || section build 180 "$python" -m ras_fast.cli build
section backends 60 "$python" -c "$usable"
try_hopper
[ "$part" = bench ] || [ "$part" = profile ] || run_tests
[ "$part" = tests ] || [ "$part" = profile ] || run_bench
[ "$part" = tests ] || [ "$part" = bench ] || run_profile

{
  for name in norm rotary linear attention engine crossovers image_masks autosteer decode qwen tune; do
    [ -s "$logs/$name.log" ] && echo "== $name" && tail -n 34 "$logs/$name.log" | cut -c -240
  done
  [ -f "$logs/ncu.ncu-rep" ] && echo "== ncu" && profile_table
  echo "== sections"
  grep -hE "passed|failed|ERROR SUMMARY|RACECHECK SUMMARY" "$logs"/{tests,memcheck,racecheck}.log 2>/dev/null
} >"$logs/tables.txt" 2>&1
cat "$logs/tables.txt"
{
  echo "== aims for an H200"
  "$python" bench/aims.py
} >>"$summary" 2>&1
cat "$summary"
cp "$summary" "$logs/summary-$part.txt"
bundle
exit $failures
