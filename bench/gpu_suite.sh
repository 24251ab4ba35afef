#!/usr/bin/env bash
# All that only a GPU can show, in one call: the kernel tests without the interpreter, the runtime's
# tests, the kernels against PyTorch and the memory's speed (tuned first, for at most 20 s of that
# step), CUDA graphs (tests, latency of steps, a captured loop, compute-sanitizer where it is
# installed), host overhead on the device, and the trained model: the demo, and all methods beside
# cache-dit at one level.
#
#   bench/gpu_suite.sh OUTDIR
#
#   WHEELS=dir         install the wheels in it first, into a temporary folder, without a network
#   PYTHON=python3     the interpreter
#   SHAPES="a b ..."   shapes of the kernel benchmark
#   DEVICE=cpu         rehearse: every step runs on the CPU, to test this script; status 0 proves
#                      nothing about the kernels
#   STEPS="a b ..."    only these steps; all of them, in three calls of at most ten minutes:
#                      STEPS="kernel-tests kernels overhead methods demo"
#                      STEPS="graph-tests graphs loop"
#                      STEPS="sanitizer runtime-tests"
#   PYTEST_ARGS="..."  words passed to the steps that are tests, as in "-k fp8"
#
# Needs torch, triton, diffusers, pytest, pytest-timeout, hypothesis, scikit-learn and Pillow;
# cache-dit is compared with where it is installed; a step that needs what is not there is named in
# the table. Nothing is downloaded. OUTDIR gets summary.txt, results.json, tuning.json, the plots and
# logs.tar.gz. Status: 0 all passed, 1 a check failed, 2 no GPU or no way to run. A step that reaches
# its limit is ended and has failed; the limits add up to
# 22:05.
set -uo pipefail
out=$(realpath -m "${1:?usage: bench/gpu_suite.sh OUTDIR}")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
logs=$out/logs
rm -rf "$logs" && mkdir -p "$logs" || exit 2
steps=$logs/steps.tsv
: >"$steps"
# the tests turn the interpreter on by themselves where there is no GPU
unset TRITON_INTERPRET DBCACHE_KERNELS
# choices are made anew, after the kernel tests, and the steps after the benchmark use them, too
export DBCACHE_TUNING=$out/tuning.json
rm -f "$DBCACHE_TUNING"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONPATH=${PYTHONPATH:-}

step() { # name, limit in seconds, command...
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    case " ${STEPS:-$name} wheels " in *" $name "*) ;; *) return 0 ;; esac
    printf '== %s (at most %d s)\n' "$name" "$limit"
    timeout --kill-after=5 "$limit" "$@" >"$logs/$name.log" 2>&1
    status=$?
    printf '%s\t%d\t%d\t%d\n' "$name" "$status" $((SECONDS - start)) "$limit" >>"$steps"
    [ $status -eq 0 ] || tail -n 15 "$logs/$name.log"
    return $status
}

left_out() { # name, why
    case " ${STEPS:-$1} " in *" $1 "*) printf '%s\t%s\n' "$1" "$2" >>"$logs/left_out.tsv" ;; esac
}

if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    step wheels 30 "$python" -m pip install --quiet --no-index --no-deps --no-compile \
        --no-cache-dir --target "$site" "$WHEELS"/*.whl || exit 2
    PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

"$python" - "$device" <<'PY' || exit 2
import importlib.util
import sys

needed = ("torch", "triton", "diffusers", "pytest", "hypothesis")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu_suite: {', '.join(missing)} not installed; hand wheels in as WHEELS=folder")
import torch

if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("gpu_suite: there is no GPU here (torch.cuda.is_available() is False); nothing was run")
PY
if [ "$device" = cuda ]; then
    shapes=${SHAPES:-flux-1024 wan-720p few-step-512 flux-2048 hunyuanvideo-720p qwen-1328}
    demo=()
    methods=()
    tune=(--tune 20)
    # alone on the GPU: they look at its memory and hold its stream up
    graph_tests=(tests/graphs/test_on_gpu.py)
    others=(tests/graphs --deselect tests/graphs/test_on_gpu.py)
else
    echo "gpu_suite: a rehearsal on the CPU: it tests this script, not the kernels"
    shapes=${SHAPES:-256+32x384}
    tune=()
    demo=(--steps 8 --per-digit 1 --repeats 1)
    methods=(--steps 8)
    graph_tests=(tests/graphs)
    others=()
fi
parallel=()
all_cores=()
if "$python" -c 'import xdist' 2>/dev/null; then
    parallel=(-n "$(($(nproc) < 6 ? $(nproc) : 6))")
    all_cores=(-n "$(nproc)")
fi
engines=(dbcache)
"$python" -c 'import cache_dit' 2>/dev/null && engines+=(cache-dit)
requests=$([ "$device" = cuda ] && echo 10 || echo 2)
seconds=$([ "$device" = cuda ] && echo 1 || echo 0.05)

# shellcheck disable=SC2086  # lists of words
{
    step kernel-tests 170 "$python" -m pytest -q "${parallel[@]}" --junitxml="$logs/kernel-tests.xml" \
        --ignore-glob='*offline_compile*' ${PYTEST_ARGS:-} tests/kernels
    step kernels 130 "$python" -m bench.run kernels --device "$device" "${tune[@]}" --seconds 75 \
        --shapes $shapes --json "$logs/kernels.json" --plot "$out/kernels.png"
    step overhead 40 "$python" -m bench.run overhead --device "$device" --requests "$requests" \
        --engines "${engines[@]}" --json "$logs/overhead.json"
    if [ "${engines[1]:-}" = cache-dit ]; then
        step methods 60 "$python" -m bench.run methods --device "$device" --batches 1 --levels 3x \
            "${methods[@]}" --out "$logs/methods.json"
    else
        left_out methods "cache-dit is not installed"
    fi
    step demo 65 "$python" -m dbcache demo --device "$device" --out "$logs/demo" "${demo[@]}"
    step graph-tests 200 "$python" -m pytest -q --junitxml="$logs/graph-tests.xml" \
        ${PYTEST_ARGS:-} "${graph_tests[@]}"
    step graphs 200 "$python" -m bench.run graphs --device "$device" --seconds "$seconds" \
        --engines "${engines[@]}" --json "$logs/graphs.json"
    if [ "$device" = cuda ]; then
        step loop 80 "$python" -m bench.run loop --json "$logs/loop.json"
    else
        left_out loop "needs a GPU"
    fi
    if [ "$device" != cuda ]; then
        left_out sanitizer "needs a GPU"
    elif command -v compute-sanitizer >/dev/null; then
        step sanitizer 150 compute-sanitizer --error-exitcode 1 "$python" -m pytest -q \
            --junitxml="$logs/sanitizer.xml" tests/graphs/test_on_gpu.py -k "fifty and (steps-device or blocks-device)"
    else
        left_out sanitizer "compute-sanitizer is not installed"
    fi
    # most of them on the CPU: what runs there with this build of torch, and attention on the GPU
    step runtime-tests 200 env OMP_NUM_THREADS=1 "$python" -m pytest -q "${all_cores[@]}" \
        --junitxml="$logs/runtime-tests.xml" ${PYTEST_ARGS:-} tests/adapters tests/core \
        tests/parallel/test_local_attention.py "${others[@]}"
}
cp "$logs/demo/digits.png" "$out/demo.png" 2>/dev/null

"$python" -m bench.suite_report "$logs" --device "$device" --json "$out/results.json" >"$out/summary.txt"
status=$?
tar -C "$out" -czf "$out/logs.tar.gz" logs && rm -rf "$logs"
cat "$out/summary.txt"
exit $status
