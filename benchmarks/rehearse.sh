#!/usr/bin/env bash
# Rehearse the GPU session on the CPU: an environment like the GPU machine, no network, three dry-run calls.
#
#   bash benchmarks/rehearse.sh HAVE.txt [WORK]
#
# HAVE.txt is the list for collect_wheels.sh. WORK (default: build/rehearsal) is the folder for all files. It
#   1. makes a virtual environment with torch (5 GB with its CUDA packages), or uses TORCH_ENV, and installs
#      the packages of HAVE.txt that the project needs, in the versions of the list or of the lock;
#   2. collects the wheels for that Python, and checks them;
#   3. predicts, and runs the three calls of gpu_session.py with --dry-run through gpu_run.sh, without a network
#      where `unshare --net` is allowed, and prints the wall time of each.
#
# Settings, as environment variables:
#   PYTHON=python3   the Python of the new environment: 3.11, 3.12 or 3.13
#   TORCH=2.11.0     the version of torch in it
#   TORCH_ENV=DIR    an existing virtual environment with torch (packages are added to it)
#   WHEELS=DIR       collected wheels, instead of step 2
#   TESTS="..."      tests to run too, without a network, e.g. TESTS="tests/memory/test_trace.py tests/model/test_step.py"
#
# Exit code: 0 if every call ended with 0; 1 if a step failed; 2 for an invalid argument.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

refuse() { echo "$1" >&2; exit 2; }
canonical() { sed -E 's/[-_.]+/-/g' | tr '[:upper:]' '[:lower:]'; }

case "${1:-}" in -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
if [ $# -lt 1 ] || [ $# -gt 2 ]; then refuse "usage: rehearse.sh HAVE.txt [WORK]"; fi
[ -f "$1" ] || refuse "$1: no such file; make it on the machine with: python3 -m pip list --format=freeze"
have=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
mkdir -p "${2:-$project/build/rehearsal}"
work=$(cd "${2:-$project/build/rehearsal}" && pwd)
environment=${TORCH_ENV:-$work/venv} wheels=${WHEELS:-$work/wheels}
pip=(-m pip install --quiet --disable-pip-version-check)

if [ -z "${TORCH_ENV:-}" ] && [ ! -x "$environment/bin/python" ]; then
  echo "Creating $environment with torch ${TORCH:-2.11.0}: several GB"
  "${PYTHON:-python3}" -m venv "$environment"
  "$environment/bin/python" "${pip[@]}" "torch==${TORCH:-2.11.0}"
fi
python=$environment/bin/python
[ -x "$python" ] || refuse "$environment: has no bin/python; set TORCH_ENV to a virtual environment"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

# The packages of the lock that the machine has, in the version of the list or else of the lock; the others come
# from the wheels.
sed -E 's/[[:space:]]*#.*//; s/[[:space:]]+//g; s/;.*//; s/@.*//' "$have" >"$work/lines"
sed -E 's/==.*//' "$work/lines" | canonical | paste -d ' ' - "$work/lines" >"$work/have"
while read -r pin; do
  name=$(canonical <<<"${pin%%==*}")
  case "$name" in
    nvidia-ml-py) ;;
    torch | triton | nvidia-* | cuda-*) continue ;;
  esac
  line=$(grep -m1 -- "^$name " "$work/have" || true)
  case "$line" in
    '') ;;
    *==*) echo "${line#* }" ;;
    *) echo "$pin" ;;
  esac
done < <(grep -E '^[A-Za-z0-9._-]+==' "$project/requirements.lock") >"$work/machine"
"$python" "${pip[@]}" -r "$work/machine" 2>"$work/machine.log" || { cat "$work/machine.log" >&2; exit 1; }

if [ -z "${WHEELS:-}" ]; then
  TARGET=$version bash "$project/benchmarks/collect_wheels.sh" "$have" "$wheels"
fi

offline=()
if unshare --net true 2>/dev/null; then
  offline=(unshare --net)
  echo "without a network"
else
  echo "unshare --net is not allowed here: the network is reachable"
fi
"$python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)' 2>/dev/null

code=0 total=0 out=$work/dry.json predictions=$work/predictions.json
: >"$work/times"
rm -rf "$out" "$out".* "$predictions" "$work/site"
export PYTHON=$python WHEELS=$wheels SITE=$work/site
run() { "${offline[@]}" bash "$project/benchmarks/gpu_run.sh" "$@"; }
run --parts predictions --dry-run --out "$predictions" || { echo "the predictions failed" >&2; exit 1; }
for call in 1 2 3; do
  arguments=(--call "$call" --seconds "$((call == 1 ? 240 : 150))" --dry-run --out "$out")
  if [ "$call" -eq 1 ]; then arguments+=(--predictions "$predictions"); fi
  began=$(date +%s%N)
  result=0
  run "${arguments[@]}" || result=$?
  milliseconds=$((($(date +%s%N) - began) / 1000000))
  total=$((total + milliseconds))
  printf 'call %s: exit code %s, %s.%03d s\n' "$call" "$result" $((milliseconds / 1000)) $((milliseconds % 1000)) |
    tee -a "$work/times"
  if [ "$result" -ne 0 ]; then code=1; fi
done
if [ -n "${TESTS:-}" ]; then
  read -ra tests <<<"$TESTS"
  run pytest "${tests[@]}" || code=1
fi
echo
cat "$work/times"
printf 'three calls: %s.%03d s\n' $((total / 1000)) $((total % 1000))
exit "$code"
