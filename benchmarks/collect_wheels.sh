#!/usr/bin/env bash
# Collect the wheels missing on a Linux x86-64 machine without a network, and check that the set is complete.
#
#   bash benchmarks/collect_wheels.sh HAVE.txt [WHEELS]
#
# HAVE.txt lists the packages of the machine, one per line: run `python3 -m pip list --format=freeze` there.
# WHEELS (default: benchmarks/wheels) is the folder to fill; existing wheels in it are replaced.
#
# Settings, as environment variables:
#   TARGET=3.12      the machine's Python: 3.11, 3.12 or 3.13
#   LOCK=...         `name==version` lines (default: requirements.lock)
#   TORCH=2.13.0     also collect torch with its CUDA packages (5 GB; not collected by default)
#   SKIP="..."       packages to leave out (default: those that check the code or build the documentation)
#   PYTHON=...       the Python that runs pip and the check (default: .venv/bin/python, else python3)
#
# Exit code: 0 if the set is complete, 1 if a package has no wheel or the set is incomplete (each named), 2 for a
# wrong argument. The last line of standard output is a summary in JSON.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

refuse() { echo "$1" >&2; exit 2; }
canonical() { sed -E 's/[-_.]+/-/g' | tr '[:upper:]' '[:lower:]'; }

case "${1:-}" in
  -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
if [ $# -lt 1 ] || [ $# -gt 2 ]; then refuse "usage: collect_wheels.sh HAVE.txt [WHEELS]"; fi
have=$1 wheels=${2:-$project/benchmarks/wheels} target=${TARGET:-3.12} lock=${LOCK:-$project/requirements.lock}
checkers="ruff mypy mypy_extensions librt ast_serialize pathspec types-psutil import-linter grimp"
documentation="mkdocs mkdocs-material mkdocs-material-extensions mkdocs-get-deps babel backrefs colorama ghp-import
  Markdown mergedeep paginate platformdirs pymdown-extensions pyyaml_env_tag watchdog"
skip=${SKIP-$checkers $documentation hydra-joblib-launcher}
case "$target" in 3.11 | 3.12 | 3.13) ;; *) refuse "TARGET=$target: must be 3.11, 3.12 or 3.13" ;; esac
[ -f "$have" ] || refuse "$have: no such file; make it on the machine with: python3 -m pip list --format=freeze"
[ -f "$lock" ] || refuse "$lock: no such file; LOCK names a file of name==version lines"
python=${PYTHON:-}
if [ -z "$python" ]; then
  if [ -x "$project/.venv/bin/python" ]; then python=$project/.venv/bin/python; else python=python3; fi
fi
"$python" -c 'import packaging, pip' 2>/dev/null || refuse "$python: has no pip or no packaging; set PYTHON"

mkdir -p "$wheels"
if find "$wheels" -mindepth 1 ! -name '*.whl' -print -quit | grep -q .; then
  refuse "$wheels: contains files that are not a wheel; name an empty folder"
fi
find "$wheels" -name '*.whl' -delete  # avoids duplicates

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
platforms=()
for tag in manylinux_2_34 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 \
  manylinux_2_12 manylinux2010 manylinux_2_5 manylinux1 linux; do
  platforms+=(--platform "${tag}_x86_64")
done
quiet=(--quiet --disable-pip-version-check)
download=("${quiet[@]}" --only-binary=:all: --implementation cp --python-version "$target" "${platforms[@]}")

# The pins of the lock file, except installed packages, those in SKIP, and torch with its CUDA packages.
sed -E 's/[[:space:]]*#.*//; s/^[[:space:]]*(-e[[:space:]]+)?//; s/[^A-Za-z0-9._-].*//' "$have" | canonical >"$work/have"
tr -s ' \n' '\n' <<<"$skip" | canonical >>"$work/have"
grep -E '^[A-Za-z0-9._-]+==' "$lock" | sed -E 's/[[:space:];].*//' >"$work/lock" || refuse "$lock: has no name==version line"
while read -r pin; do
  name=$(canonical <<<"${pin%%==*}")
  case "$name" in
    nvidia-ml-py) ;;
    torch | triton | nvidia-* | cuda-*) continue ;;
  esac
  grep -qxF -- "$name" "$work/have" || echo "$pin"
done <"$work/lock" >"$work/pins"

missing=0
if ! "$python" -m pip download "${download[@]}" --no-deps -d "$wheels" -r "$work/pins" >"$work/log" 2>&1; then
  while read -r pin; do  # one by one: some have no wheel
    "$python" -m pip download "${download[@]}" --no-deps -d "$wheels" "$pin" >"$work/log" 2>&1 && continue
    rm -rf "$work/built"
    if "$python" -m pip wheel "${quiet[@]}" --no-deps -w "$work/built" "$pin" >"$work/log" 2>&1 &&
      compgen -G "$work/built/*-none-any.whl" >/dev/null; then
      mv "$work"/built/*-none-any.whl "$wheels/"
      echo "$pin: no wheel for Python $target; built from source (pure Python)" >&2
    else
      echo "$pin: no wheel for Python $target, and it cannot be built; install it on the machine, or add it to SKIP" >&2
      missing=1
    fi
  done <"$work/pins"
fi
if [ -n "${TORCH:-}" ]; then  # with its dependencies, constrained to the versions in the lock
  grep -vE '^(torch|triton)==' "$work/lock" >"$work/constraints"
  "$python" -m pip download "${download[@]}" -c "$work/constraints" -d "$wheels" "torch==$TORCH" >"$work/log" 2>&1 ||
    { echo "torch==$TORCH: cannot be collected: $(grep -m1 ERROR "$work/log" || tail -n1 "$work/log")" >&2; missing=1; }
fi

"$python" "$project/benchmarks/check_wheels.py" "$wheels" --have "$have" --python "$target" \
  --also pytest --also hypothesis || missing=1
exit "$missing"
