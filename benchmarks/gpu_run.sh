#!/usr/bin/env bash
# Run one call of the GPU session, or the gpu tests, on a machine with a GPU and without a network.
#
#   bash benchmarks/gpu_run.sh --call 1 --seconds 240 --predictions predictions.json --out session.json
#   bash benchmarks/gpu_run.sh --call 2 --seconds 150 --out session.json        adds to the same file
#   bash benchmarks/gpu_run.sh --call 1 --dry-run --out dry.json                on the CPU, with small sizes
#   bash benchmarks/gpu_run.sh pytest -m gpu                                    the tests that need a GPU
#
# Installs the wheels of benchmarks/wheels (see collect_wheels.sh) into benchmarks/.site, without a network and
# without changing the installed packages; later calls reuse them. Then runs gpu_session.py with these arguments
# and prints a table of the parts.
#
# The --out FILE is written after each part. FILE.log has the output of the call. If the call ends without a
# readable FILE, FILE.failed.json has the reason, and FILE is not changed.
#
# Settings, as environment variables:
#   PYTHON=python3   a Python with torch
#   WHEELS=DIR       the folder of wheels; if empty, the installed packages are used
#   SITE=DIR         the folder to install them to; replaced when the wheels change
#   GRACE=20         seconds after --seconds until a call is stopped
#
# Exit code: that of gpu_session.py or pytest; 2 for an invalid argument; 3 if the wheels cannot be installed;
# 124 or 137 if the call was stopped after --seconds and GRACE; 143 after SIGTERM, 130 after Ctrl-C.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3} wheels=${WHEELS:-$project/benchmarks/wheels} site=${SITE:-$project/benchmarks/.site}
grace=${GRACE:-20} session=$project/benchmarks/gpu_session.py

refuse() { echo "$1" >&2; exit 2; }
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

absolute() { case "$1" in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

# Write the reason of a failure to FILE.failed.json.
failed() {
  [ -n "$out" ] || return 0
  "$python" - "$out" "$1" "$2" "$log" <<'PY' || echo "$out.failed.json: cannot be written" >&2
import json, sys
from pathlib import Path
out, code, reason, log = sys.argv[1:]
lines = Path(log).read_text(errors="replace").splitlines()[-30:] if Path(log).is_file() else []
text = json.dumps({"benchmark": "gpu_run", "exit_code": int(code), "error": reason, "log": lines}, indent=1)
Path(out + ".failed.json").write_text(text + "\n")
print(f"{out}.failed.json: {reason}", file=sys.stderr)
PY
}

# Install the wheels into $site, unless the same wheels are installed.
install() {
  local stamp
  compgen -G "$wheels/*.whl" >/dev/null || { echo "no wheels in $wheels: using the installed packages"; return 0; }
  stamp=$("$python" -VV && cd "$wheels" && wc -c -- *.whl) || return 1
  if [ -f "$site/.stamp" ] && [ "$(cat "$site/.stamp")" = "$stamp" ]; then return 0; fi
  if [ -e "$site" ] && [ ! -f "$site/.stamp" ]; then
    echo "$site: was not created by this script; delete it, or set SITE to another folder" >&2
    return 1
  fi
  rm -rf "$site" "$site.partial"
  PIP_CONFIG_FILE=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site.partial" "$wheels"/*.whl || return 1
  printf '%s\n' "$stamp" >"$site.partial/.stamp"
  mv "$site.partial" "$site"
}

# Print a line per part of the session: seconds and error. Fails if FILE is not a session.
table() {
  "$python" - "$out" <<'PY'
import json, sys
try:
    with open(sys.argv[1]) as file:
        session = json.load(file)
    parts = session["parts"].items()
except (OSError, ValueError, KeyError, TypeError, AttributeError):
    sys.exit(1)
done = 0
print(f"{'part':34} {'seconds':>8}  result")
for name, part in parts:
    error = None if "figures" in part else str(part.get("error", "no figures")).strip().splitlines()[-1][:90]
    done += error is None
    print(f"{name:34} {part.get('wall_seconds', 0):8.1f}  {error or 'done'}")
machine = session.get("machine") or {}
print(f"{done} of {len(parts)} parts have figures; {machine.get('gpu') or 'no GPU'}, torch {machine.get('torch')}")
PY
}

out='' seconds='' previous=''
tests=false
case "${1:-}" in
  '' | -h | --help) usage; if [ $# -eq 0 ]; then exit 2; fi; exit 0 ;;
  pytest) tests=true; shift ;;
esac
if ! $tests; then
  words=()
  for argument in "$@"; do  # paths are relative to the caller's folder
    case "$previous" in
      --out) argument=$(absolute "$argument"); out=$argument ;;
      --predictions) argument=$(absolute "$argument") ;;
      --seconds) seconds=$argument ;;
    esac
    case "$argument" in
      --out=*) out=$(absolute "${argument#*=}"); argument=--out=$out ;;
      --predictions=*) argument=--predictions=$(absolute "${argument#*=}") ;;
      --seconds=*) seconds=${argument#*=} ;;
    esac
    words+=("$argument")
    previous=$argument
  done
  set -- "${words[@]}"
  [ -n "$out" ] || refuse "--out FILE is missing: where to write the session"
  case "$seconds" in *[!0-9.]* | *.*.* | .) refuse "--seconds $seconds: must be a number of seconds" ;; esac
  mkdir -p "$(dirname "$out")"
  rm -f "$out.failed.json"
fi
log=${out:+$out.log}
log=${log:-/dev/null}
command -v "$python" >/dev/null || refuse "$python: no such program; set PYTHON to a Python with torch"

began=$SECONDS
if ! install 2>&1 | tee "$log"; then
  echo "the wheels of $wheels cannot be installed; collect them for $("$python" -V 2>&1)" >&2
  failed 3 "the wheels cannot be installed"
  exit 3
fi
echo "Wheels ready after $((SECONDS - began)) s"

export PYTHONPATH="$project:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=1 MPLBACKEND=Agg PIP_NO_INDEX=1
unset MLFLOW_TRACKING_URI MLFLOW_RUN_ID MLFLOW_EXPERIMENT_ID MLFLOW_EXPERIMENT_NAME
cd "$project"

if $tests; then exec "$python" -m pytest -p no:cacheprovider "$@"; fi

command=("$python" "$session" "$@")
if [ -n "$seconds" ]; then
  limit=$("$python" -c 'import sys; print(float(sys.argv[1]) + float(sys.argv[2]))' "$seconds" "$grace")
  command=(timeout --kill-after=10 "$limit" "${command[@]}")
fi
# Run in the background, to receive signals immediately; the session then saves its parts. The output is shown from
# a file: a pipe would stay open as long as any process left by the session.
shown=$(wc -c <"$log")
"${command[@]}" >>"$log" 2>&1 &
child=$!
tail --quiet --bytes=+"$((shown + 1))" --follow --sleep-interval=0.2 --pid="$child" "$log" &
display=$!
received=0
trap 'received=143; kill -TERM "$child" 2>/dev/null' TERM HUP
trap 'received=130; kill -TERM "$child" 2>/dev/null' INT  # on SIGTERM the session saves its parts
code=0
wait "$child" || code=$?
while [ "$received" -ne 0 ] && kill -0 "$child" 2>/dev/null; do wait "$child" || true; done  # a trap interrupts wait
if [ "$received" -ne 0 ]; then code=$received; fi
wait "$display" || true

echo
table || failed "$code" "the call ended with exit code $code and left no session in $(basename "$out")"
exit "$code"
