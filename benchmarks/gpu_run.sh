#!/usr/bin/env bash
# Run one call of the GPU session, or the gpu tests, on a machine with a GPU and without a network.
#
#   bash benchmarks/gpu_run.sh --call 1 --seconds 240 --predictions predictions.json --out session.json
#   bash benchmarks/gpu_run.sh --call 2 --seconds 150 --out session.json        the same file again: it is added to
#   bash benchmarks/gpu_run.sh --call 1 --dry-run --out dry.json                on the CPU, with small numbers
#   bash benchmarks/gpu_run.sh pytest -m gpu                                    the tests that need a GPU
#
# It installs the wheels of benchmarks/wheels (collect_wheels.sh fills that folder) into benchmarks/.site, without a
# network and without touching the machine's own packages; the next call finds them there. Then it runs
# gpu_session.py with these arguments, and prints a table of the parts last.
#
# FILE of --out is written after each part, so that it is there however the call ends. FILE.log has what the call
# printed. If the call ends without a readable FILE, FILE.failed.json says why and FILE is left as it is.
#
# Settings, as environment variables:
#   PYTHON=python3   the Python that has torch
#   WHEELS=DIR       the folder of wheels; without one, the machine's own packages must do
#   SITE=DIR         where they are installed; it is replaced when the wheels change
#   GRACE=20         seconds after --seconds until a call that does not end is stopped
#
# Exit code: that of gpu_session.py or pytest; 2 for a wrong argument; 3 if the wheels cannot be installed;
# 124 or 137 if the call was stopped after --seconds and GRACE; 143 after SIGTERM, 130 after Ctrl-C.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3} wheels=${WHEELS:-$project/benchmarks/wheels} site=${SITE:-$project/benchmarks/.site}
grace=${GRACE:-20} session=$project/benchmarks/gpu_session.py

refuse() { echo "$1" >&2; exit 2; }
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

absolute() { case "$1" in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

# Leave FILE.failed.json: why there is no session.
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

# Install the wheels into $site, unless those very wheels are there.
install() {
  local stamp
  compgen -G "$wheels/*.whl" >/dev/null || { echo "no wheels in $wheels: the machine's own packages are used"; return 0; }
  stamp=$("$python" -VV && cd "$wheels" && wc -c -- *.whl) || return 1
  if [ -f "$site/.stamp" ] && [ "$(cat "$site/.stamp")" = "$stamp" ]; then return 0; fi
  if [ -e "$site" ] && [ ! -f "$site/.stamp" ]; then
    echo "$site: was not made by this script; delete it, or name another folder with SITE" >&2
    return 1
  fi
  rm -rf "$site" "$site.partial"
  PIP_CONFIG_FILE=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site.partial" "$wheels"/*.whl || return 1
  printf '%s\n' "$stamp" >"$site.partial/.stamp"
  mv "$site.partial" "$site"
}

# Print a line for each part of the session: seconds, and what is wrong with it. Fails if FILE is not a session.
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
  for argument in "$@"; do  # paths are those of the caller's folder
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
command -v "$python" >/dev/null || refuse "$python: no such program; set PYTHON to the Python that has torch"

began=$SECONDS
if ! install 2>&1 | tee "$log"; then
  echo "the wheels of $wheels cannot be installed; collect them for $("$python" -V 2>&1)" >&2
  failed 3 "the wheels cannot be installed"
  exit 3
fi
echo "wheels ready after $((SECONDS - began)) s"

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
# In the background, so that a signal reaches it at once; the session then writes what it has. Its output goes to a
# file and is shown from there: a pipe would stay open as long as any process that the session left behind.
shown=$(wc -c <"$log")
"${command[@]}" >>"$log" 2>&1 &
child=$!
tail --quiet --bytes=+"$((shown + 1))" --follow --sleep-interval=0.2 --pid="$child" "$log" &
display=$!
received=0
trap 'received=143; kill -TERM "$child" 2>/dev/null' TERM HUP
trap 'received=130; kill -TERM "$child" 2>/dev/null' INT  # on SIGTERM the session writes what it has
code=0
wait "$child" || code=$?
while [ "$received" -ne 0 ] && kill -0 "$child" 2>/dev/null; do wait "$child" || true; done  # a trap ends a wait
if [ "$received" -ne 0 ]; then code=$received; fi
wait "$display" || true

echo
table || failed "$code" "the call ended with exit code $code and left no session in $(basename "$out")"
exit "$code"
