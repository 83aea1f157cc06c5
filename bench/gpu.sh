#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, with one command and without a network, in less than eight
# minutes: build, test, look for races and bad accesses, compare with the CPU, measure.
#
#   bash bench/gpu.sh [--quick] [FOLDER]
#
# Needs CUDA's compiler (12.1 or later), a C++ compiler, and a Python with NumPy, torch, pybind11,
# scikit-build-core, CMake and pytest; CuPy, ninja and compute-sanitizer are used where they are.
# What a test needs beyond that and does not find is left out, with a line that says so.
#
# FOLDER, else $OUT, else bench/results/GPU-DATE, gets
#   summary.txt                the machine, and how each stage went
#   build.log tests.log cpp.log checksums.log bench.log
#   gpu.json gpu.txt           what was measured, and whether the goals are met
#
# Every stage runs, whatever became of those before. The exit status is 1 if one of them failed; else
# 2 if one was left out, as most are without a GPU; else 0. Goals that are not met are no failure.
#
#   --quick                    a benchmark of 40 seconds, rather than two and a half minutes
#   PYTHON                     the Python to use; python3 by default
#   FUSESTEP_GPU_SECONDS       how long everything together may take; 470 by default
#   FUSESTEP_GPU_BUILD         a folder to build in, which is kept: the next run need not compile
#   FUSESTEP_GPU_ARCHITECTURE  what to compile for where there is no GPU; 90 by default
#   FUSESTEP_COMMIT            of the sources, where git does not know
# shellcheck disable=SC2329 # stages are called by name
set -uo pipefail

quick=()
out=
for argument in "$@"; do
  case $argument in
    --quick) quick=(--quick) ;;
    -*) echo "gpu.sh: unknown option $argument; see the top of the file" >&2; exit 64 ;;
    *) out=$argument ;;
  esac
done

called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
root=$PWD
python=${PYTHON:-python3}
deadline=${FUSESTEP_GPU_SECONDS:-470}
jobs=$(nproc)

# ---- the machine ---------------------------------------------------------------------------------

# ask_torch EXPRESSION: what torch says of the first GPU; nothing where it sees none.
ask_torch() {
  "$python" -c "import torch
if torch.cuda.is_available():
    print($1)" 2>/dev/null
}

# ask_driver FIELD: what nvidia-smi says of each GPU; nothing where there is none.
ask_driver() {
  command -v nvidia-smi >/dev/null || return 0
  local answer
  answer=$(nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null) && echo "$answer"
}

# toolkits: folders that CUDA's programs may be in.
toolkits() {
  local nvcc=${CUDACXX:-$(command -v nvcc)}
  printf '%s\n' "${CUDA_HOME:-}" "${CUDA_PATH:-}"
  if [ -n "$nvcc" ]; then
    dirname "$(dirname "$(readlink -f "$nvcc")")"
    # It may be a script that calls another one.
    "$nvcc" --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ *TOP=//p' | head -n 1
  fi
  printf '%s\n' /usr/local/cuda /usr/local/cuda-* /opt/cuda
  "$python" -c 'import glob, sys
for folder in sys.path:
    print(*glob.glob(folder + "/nvidia/*/"), sep="\n")' 2>/dev/null
}

# find_program NAME: prints where one of CUDA's programs is.
find_program() {
  command -v "$1" && return
  local folder candidate
  while read -r folder; do
    [ -n "$folder" ] || continue
    for candidate in "$folder/bin/$1" "$folder/compute-sanitizer/$1"; do
      if [ -x "$candidate" ]; then echo "$candidate"; return; fi
    done
  done < <(toolkits)
  return 1
}

capabilities=$(ask_driver compute_cap | tr -d '. ' | sort -un | paste -sd ' ')
if [[ ! $capabilities =~ ^[0-9\ ]+$ ]]; then
  capabilities=$(ask_torch '"%d%d" % torch.cuda.get_device_capability()')
fi
has_gpu=no
[ -n "$capabilities" ] && has_gpu=yes
architectures=
for capability in ${capabilities:-${FUSESTEP_GPU_ARCHITECTURE:-90}}; do
  architectures+=${architectures:+;}$capability-real
done
gpu=$(ask_driver name | head -n 1)
gpu=${gpu:-$(ask_torch 'torch.cuda.get_device_name()')}

if [ -z "${CUDACXX:-}" ] && nvcc=$(find_program nvcc); then export CUDACXX=$nvcc; fi

describe() {
  echo "date       $(date -u +%Y-%m-%dT%H:%MZ)"
  echo "commit     ${FUSESTEP_COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}"
  if [ "$has_gpu" = yes ]; then
    echo "GPU        ${gpu:-unknown}; compute capability $capabilities"
    ask_driver driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,mig.mode.current |
      sed 's/^/           driver, memory, clocks, power, MIG: /'
  else
    echo "GPU        none that nvidia-smi or torch can see; compiling for $architectures"
  fi
  echo "nvcc       $("${CUDACXX:-nvcc}" --version 2>/dev/null | grep release || echo 'not found')"
  echo "C++        $("${CXX:-c++}" --version 2>/dev/null | head -n 1)"
  echo "processor  $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $jobs in use; $(sed -n \
    's/^MemTotal: *//p' /proc/meminfo)"
  "$python" - <<'END'
import importlib.metadata
import sys

names = "numpy torch cupy pybind11 scikit-build-core cmake ninja pytest safetensors hypothesis ml_dtypes"
print("Python    ", sys.version.split()[0])
found = {(d.metadata["Name"] or "").lower().replace("-", "_"): d.version
         for d in importlib.metadata.distributions()}
for name in names.split():
    key = name.replace("-", "_")
    print("          ", name, next((v for n, v in found.items() if n == key or
          n.startswith(key + "_cuda")), "not installed"))
END
}

# ---- stages --------------------------------------------------------------------------------------

name=$(echo "${gpu:-no-gpu}" | tr '[:upper:] ' '[:lower:]-' | tr -cd '[:alnum:]-')
out=${out:-${OUT:-$root/bench/results/$name-$(date -u +%Y-%m-%d)}}
case $out in /*) ;; *) out=$called_from/$out ;; esac
mkdir -p "$out" || exit 1

scratch=${FUSESTEP_GPU_BUILD:-}
if [ -n "$scratch" ]; then
  mkdir -p "$scratch" || exit 1
  scratch=$(cd "$scratch" && pwd)
else
  scratch=$(mktemp -d) || exit 1
  trap 'rm -rf "$scratch"' EXIT
fi
venv=$scratch/venv
build=$scratch/build
site_python=$venv/bin/python
test_cuda=$build/tests/cpp/test_cuda
unset MAKEFLAGS
export CMAKE_BUILD_PARALLEL_LEVEL=$jobs PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

failures=0
omissions=0
stage_end=0
note=

LEFT_OUT=3 # what a stage returns that cannot be done here; $note says why

say() { echo "$*" | tee -a "$out/summary.txt"; }

# limited COMMAND...: runs it for as long as the stage may still take.
limited() {
  local seconds=$((stage_end - SECONDS)) status
  timeout --kill-after=5 "$((seconds > 1 ? seconds : 1))" "$@"
  status=$?
  if [ "$status" = 124 ] || [ "$status" = 137 ]; then
    note="stopped after $seconds s"
  fi
  return "$status"
}

# stage NAME SECONDS RESERVE LOG FUNCTION: does a stage, but no longer than SECONDS, and so that
# RESERVE seconds are left for the stages after it.
stage() {
  local name=$1 seconds=$2 reserve=$3 log=$out/$4 function=$5 begin=$SECONDS status result lines
  local left=$((deadline - reserve - SECONDS))
  ((seconds > left)) && seconds=$left
  stage_end=$((SECONDS + seconds))
  note=
  if ((seconds < 5)); then
    note="there was no time left for it"
    status=$LEFT_OUT
  else
    echo "==== $name" >>"$log"
    lines=$(wc -l <"$log")
    "$function" >>"$log" 2>&1
    status=$?
  fi
  case $status in
    0) result=ok ;;
    "$LEFT_OUT") result="left out" omissions=$((omissions + 1)) ;;
    *) result="FAILED ($status)" failures=$((failures + 1)) ;;
  esac
  say "$(printf '%-28s %-12s %4d s  %s' "$name" "$result" $((SECONDS - begin)) "$note")"
  if [[ $result = FAILED* ]]; then
    tail -n "+$((lines + 1))" "$log" | tail -n 25 | cut -c 1-300 | sed 's/^/    /'
  fi
}

# needs_gpu: for a stage that is senseless without.
needs_gpu() {
  [ "$has_gpu" = yes ] && return
  note="no GPU${note:+: $note}"
  return "$LEFT_OUT"
}

# needs_build: for a stage that uses the installed package.
needs_build() {
  "$site_python" -c 'import fusestep._cuda' && return
  note="fusestep was not installed"
  return "$LEFT_OUT"
}

# ---- build ---------------------------------------------------------------------------------------

# make_environment: an environment that sees all that $python sees, and that can be written to. Not
# with --system-site-packages: $python may be of a virtual environment, whose packages are not the
# system's.
make_environment() {
  "$python" -m venv --without-pip --clear "$venv" || return
  "$python" - "$("$site_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'END'
import pathlib
import sys

folders = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
pathlib.Path(sys.argv[1], "packages_of_the_parent.pth").write_text("".join(lines))
END
  "$site_python" -m pip --version || "$site_python" -m ensurepip
}

install() {
  local pybind11
  make_environment || return
  pybind11=$("$site_python" -m pybind11 --cmakedir) || return # its folder may be the parent's
  limited "$site_python" -m pip install -v --no-index --no-build-isolation --no-deps \
    --no-cache-dir --ignore-installed \
    --config-settings=build-dir="$build" \
    --config-settings=cmake.define.FUSESTEP_CUDA=ON \
    --config-settings=cmake.define.FUSESTEP_PYTHON=ON \
    --config-settings=cmake.define.FUSESTEP_TESTS=OFF \
    --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="$architectures" \
    --config-settings=cmake.define.pybind11_DIR="$pybind11" \
    . || return
  limited "$site_python" -m fusestep || return
  check_origin
}

# check_origin: the package that later stages import is the one that was just installed.
check_origin() {
  local origin
  origin=$("$site_python" -c 'import fusestep._cuda as c; print(c.__file__)') || return
  echo "fusestep is imported from $origin"
  [[ $origin = "$venv"/* ]] && return
  note="another fusestep is imported: mend PYTHONPATH"
  return 1
}

# cached NAME: a value in CMake's cache of the build.
cached() { sed -n "s/^$1:[A-Z]*=//p" "$build/CMakeCache.txt" 2>/dev/null; }

# find_cmake: the one that has built the extensions, or any.
find_cmake() {
  local found
  found=$(cached CMAKE_COMMAND)
  if [ -x "$found" ]; then echo "$found"; return; fi
  command -v cmake || ls "$(dirname "$(command -v "$python")")/cmake"
}

# build_cpp: goes on where the extensions' build has ended, so that no kernel is compiled twice.
build_cpp() {
  local cmake generator=()
  cmake=$(find_cmake) || { note="CMake was not found"; return 1; }
  if [ ! -f "$build/CMakeCache.txt" ] && command -v ninja >/dev/null; then generator=(-G Ninja); fi
  limited "$cmake" -S "$root" -B "$build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release \
    -DFUSESTEP_CUDA=ON -DFUSESTEP_PYTHON=OFF -DFUSESTEP_TESTS=ON \
    "-DCMAKE_CUDA_ARCHITECTURES=$architectures" || return
  limited "$cmake" --build "$build" --target test_cuda test_checksums
}

# ---- tests ---------------------------------------------------------------------------------------

run_tests() {
  local status
  needs_build || return
  limited "$site_python" bench/gpu_tests.py -m gpu -q -p no:cacheprovider -o log_cli=false \
    -o faulthandler_timeout=60 --durations=5 tests
  status=$?
  note="${note:+$note; }$(grep -E '[0-9]+ (passed|failed|skipped|deselected|errors?)' \
    "$out/tests.log" | tail -n 1)"
  if [ "$has_gpu" = no ] && [ "$status" = 5 ]; then needs_gpu; return; fi
  if [ "$status" = 5 ]; then note="no test marked gpu has passed; $note"; fi
  return "$status"
}

# run_test_cuda COMMAND...: the C++ test, which says with 77 that it finds no GPU.
run_test_cuda() {
  local status
  if [ ! -x "$test_cuda" ]; then note="test_cuda was not built"; return "$LEFT_OUT"; fi
  limited "$@"
  status=$?
  if [ "$status" != 77 ]; then return "$status"; fi
  needs_gpu || return
  note="the test finds no GPU that it can use"
  return 77
}

run_cpp() { run_test_cuda "$test_cuda" tests/cpp/checksums.txt; }

# sanitize TOOL: the C++ test under one of compute-sanitizer's tools.
sanitize() {
  local sanitizer status
  needs_gpu || return
  sanitizer=$(find_program compute-sanitizer) || {
    note="compute-sanitizer was not found"
    return "$LEFT_OUT"
  }
  run_test_cuda "$sanitizer" --tool "$1" --error-exitcode 9 "$test_cuda" quick
  status=$?
  if [ "$status" != 0 ] && tail -n 40 "$out/cpp.log" | grep -q 'Device not supported'; then
    note="compute-sanitizer does not support this machine"
    return "$LEFT_OUT"
  fi
  return "$status"
}

run_memcheck() { sanitize memcheck; }
run_racecheck() { sanitize racecheck; }

# ---- the same bits, and how fast -----------------------------------------------------------------

# compare_kernels: the CPU's side; the GPU's is a part of test_cuda.
compare_kernels() {
  if [ ! -x "$build/tests/cpp/test_checksums" ]; then
    note="test_checksums was not built"
    return "$LEFT_OUT"
  fi
  limited "$build/tests/cpp/test_checksums" tests/cpp/checksums.txt
}

compare_classes() {
  local device=cuda status
  needs_build || return
  [ "$has_gpu" = no ] && device=cpu
  limited "$site_python" bench/gpu_checksums.py --device "$device"
  status=$?
  note="${note:+$note; }$(grep agree "$out/checksums.log" | tail -n 1)"
  [ "$status" != 0 ] && return "$status"
  needs_gpu
}

measure() {
  local device=cuda status
  needs_build || return
  if [ "$has_gpu" = no ]; then device=cpu quick=(--quick); fi
  rm -f "$out/gpu.json" "$out/gpu.txt"
  limited "$site_python" bench/gpu.py --out "$out" --device "$device" "${quick[@]}" \
    --seconds $((stage_end - SECONDS - 30))
  status=$?
  note="${note:+$note; }$(tail -n 1 "$out/gpu.txt" 2>/dev/null)"
  [ "$status" != 0 ] && return "$status"
  needs_gpu
}

# ---- all of it -----------------------------------------------------------------------------------

for log in summary.txt build.log tests.log cpp.log checksums.log bench.log; do : >"$out/$log"; done
describe 2>&1 | tee "$out/summary.txt"
say ""

bench_seconds=$([ ${#quick[@]} = 1 ] && echo 80 || echo 180)
stage "build, install" 300 60 build.log install
stage "tests marked gpu" 150 $((bench_seconds + 80)) tests.log run_tests
stage "C++ test, build" 60 $((bench_seconds + 60)) cpp.log build_cpp
stage "C++ test" 45 $((bench_seconds + 45)) cpp.log run_cpp
stage "C++ test, memcheck" 60 $((bench_seconds + 30)) cpp.log run_memcheck
stage "C++ test, racecheck" 60 $((bench_seconds + 30)) cpp.log run_racecheck
stage "CPU's checksums, kernels" 20 $((bench_seconds + 20)) checksums.log compare_kernels
stage "CPU and GPU, torch classes" 40 "$bench_seconds" checksums.log compare_classes
stage "benchmark" 240 0 bench.log measure

say ""
say "$failures failed, $omissions left out, $SECONDS s"
if [ -s "$out/gpu.txt" ]; then echo; cat "$out/gpu.txt"; fi
if ((failures > 0)); then exit 1; fi
if ((omissions > 0)); then exit 2; fi
exit 0
