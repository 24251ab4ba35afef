#!/usr/bin/env bash
# All that only a GPU can show, in one call: the kernel tests without the interpreter, the adapter and
# core tests, host overhead on the device, and the demo on the trained model.
#
#   bench/gpu_suite.sh OUTDIR
#
# Needs torch, triton, diffusers, pytest, hypothesis and scikit-learn; cache-dit is compared with where
# it is installed. Writes logs and JSON into OUTDIR, prints one table last, exits non-zero on a failure.
set -uo pipefail
out=$(realpath -m "${1:?usage: bench/gpu_suite.sh OUTDIR}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$out"
python=${PYTHON:-python3}
engines=dbcache
"$python" -c 'import cache_dit' 2>/dev/null && engines="dbcache cache-dit"

"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU"' || exit 2
declare -A result
names=()
step() { # name, seconds, command...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    names+=("$name")
    if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
        result[$name]="passed  $((SECONDS - start)) s"
    else
        result[$name]="FAILED  $((SECONDS - start)) s  (see $name.log)"
    fi
}
step kernels 180 "$python" -m pytest -q tests/kernels
step runtime 120 "$python" -m pytest -q tests/adapters tests/core
# shellcheck disable=SC2086
step overhead 90 "$python" -m bench.overhead --device cuda --engines $engines --json "$out/overhead.json"
step demo 120 "$python" -m dbcache demo --device cuda --out "$out/demo"

for name in overhead demo; do [ -f "$out/$name.log" ] && grep -v '^\[\|it/s\]' "$out/$name.log" | tail -25; done
"$python" - <<'PY'
import torch, triton
print(f"{torch.cuda.get_device_name()} | torch {torch.__version__} | triton {triton.__version__}")
PY
failed=0
for name in "${names[@]}"; do
    printf '%-10s %s\n' "$name" "${result[$name]}"
    [[ ${result[$name]} == passed* ]] || failed=1
done
exit $failed
