#!/usr/bin/env bash
# All that only a GPU can show, in two calls for a machine that is lent by the minute:
#
#   bench/gpu_suite.sh OUTDIR first       at most 7:35; ask for 8 minutes
#   bench/gpu_suite.sh OUTDIR second      at most 3:40; ask for 4 minutes
#   bench/gpu_suite.sh OUTDIR wheels      where there is a network: fetch into OUTDIR what to bring along
#
# The first answers what is most uncertain and most valuable: whether steps recorded as CUDA graphs
# do the same to the last bit and never wait, what a step of a model of FLUX's size costs eagerly and
# as graphs beside cache-dit, the kernels against the memory's speed, and, in the time that is left,
# the kernel tests without the interpreter. The second: the other tests of graphs, host overhead, a
# whole loop as one graph, compile, offload and quantised weights beside the cache, and
# compute-sanitizer where it is installed.
#
#   WHEELS=dir         install the wheels in it first, without a network, into /tmp/dbcache-site,
#                      where a second call on the same machine finds them
#   PYTHON=python3     the interpreter
#   DEVICE=cpu         rehearse: every step runs on the CPU, to test this script; status 0 proves
#                      nothing about the kernels
#   STEPS="a b ..."    only these steps
#   LIMIT=seconds      another deadline of the call
#   LEAST=seconds      begin no step with less time left; else each step has a number of its own
#
# Needs torch, triton, diffusers, pytest, pytest-timeout and hypothesis; cache-dit is compared with
# where it is installed. Nothing is downloaded but by `wheels`. OUTDIR gets summary.txt, results.json
# and logs.tar.gz, which are written anew after each step, so that they are there however the call
# ends. A step that reaches its limit or the call's deadline is interrupted (killed 10 s later) and has
# failed, but what it measured until then counts; a step that finds no time left is named in the
# table. Status: 0 all passed, 1 a check failed or found no time, 2 no GPU or no way to run.
set -uo pipefail
usage="usage: bench/gpu_suite.sh OUTDIR first|second|wheels"
out=$(realpath -m "${1:?$usage}")
call=${2:?$usage}
case $call in
first) limit=${LIMIT:-455} ;;
second) limit=${LIMIT:-220} ;;
wheels) limit=0 ;;
*) printf '%s; got %s\n' "$usage" "$call" >&2 && exit 2 ;;
esac
deadline=$((SECONDS + limit))
wheels=${WHEELS:+$(realpath -m "$WHEELS")}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
device=${DEVICE:-cuda}

if [ "$call" = wheels ]; then
    # for the Python of the machine that is lent; both are pure Python
    mkdir -p "$out" && rm -f "$out"/{diffusers,cache_dit}-*.whl || exit 2
    # shellcheck disable=SC2046  # two words
    exec "$python" -m pip download --quiet --no-deps --only-binary=:all: \
        --python-version "${PYTHON_VERSION:-3.12}" --dest "$out" \
        $(grep -E '^(diffusers|cache-dit)==' .ci/constraints.txt)
fi

mkdir -p "$out" && work=$(mktemp -d) || exit 2
rm -f "$out"/{summary.txt,results.json,logs.tar.gz}
logs=$work/logs
mkdir "$logs"
: >"$logs/steps.tsv"
: >"$logs/left_out.tsv"
# the tests turn the interpreter on by themselves where there is no GPU
unset TRITON_INTERPRET DBCACHE_KERNELS DBCACHE_TUNING
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONPATH=${PYTHONPATH:-}

pack() { # writes all results; each file is there as a whole or not at all
    [ -s "$logs/about.json" ] || return 2
    "$python" -m bench.suite_report "$logs" --json "$work/results.json" >"$work/summary.txt"
    local status=$?
    tar -C "$work" -czf "$work/logs.tar.gz" logs
    mv "$work"/{summary.txt,results.json,logs.tar.gz} "$out"
    return $status
}
child=
name=

finish() { # the call ends, perhaps from outside and in the middle of a step
    local status=$?
    trap - EXIT TERM INT
    if [ -n "$child" ]; then
        pack # first of all: who ended the call may not wait
        kill -INT "$child" 2>/dev/null && wait "$child"
        printf '%s\t%d\t%d\t%d\n' "$name" 143 0 0 >>"$logs/steps.tsv"
    fi
    pack
    rm -rf "$work"
    exit $status
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

left_out() { # name, why
    case " ${STEPS:-$1} " in *" $1 "*) printf '%s\t%s\n' "$1" "$2" >>"$logs/left_out.tsv" ;; esac
}

step() { # name, limit in seconds, least seconds to begin with, command...
    local limit=$2 least=${LEAST:-$3} start=$SECONDS status
    local left=$((deadline - SECONDS))
    name=$1
    shift 3
    case " ${STEPS:-$name} wheels about " in *" $name "*) ;; *) return 0 ;; esac
    if [ "$left" -lt "$least" ]; then
        printf '%s\t%d\t%d\t%d\n' "$name" 125 0 "$limit" >>"$logs/steps.tsv"
        return 1
    fi
    [ "$left" -lt "$limit" ] && limit=$left
    printf '== %s (at most %d s)\n' "$name" "$limit"
    # in the background, for traps wait until the foreground is through
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$logs/$name.log" 2>&1 &
    child=$!
    wait "$child"
    status=$?
    child=
    # what only prepares is in the table where it failed
    case $status$name in 0about | 0wheels) return 0 ;; esac
    printf '%s\t%d\t%d\t%d\n' "$name" "$status" $((SECONDS - start)) "$limit" >>"$logs/steps.tsv"
    [ $status -eq 0 ] || tail -n 15 "$logs/$name.log"
    pack
    return $status
}

if [ -n "$wheels" ]; then
    site=${SITE:-/tmp/dbcache-site}
    brought=$(cd "$wheels" && echo *.whl) || exit 2
    if [ "$(cat "$site/brought" 2>/dev/null)" != "$brought" ]; then
        rm -rf "$site"
        step wheels 30 0 "$python" -m pip install --quiet --no-index --no-deps --no-compile \
            --no-cache-dir --target "$site" "$wheels"/*.whl || exit 2
        echo "$brought" >"$site/brought"
    fi
    PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
step about 60 0 "$python" -m bench.suite_report "$logs" --about "$device" ||
    { cat "$logs/about.log" >&2 && exit 2; }
[ "$device" = cuda ] && nvidia-smi >"$logs/nvidia-smi.log" 2>&1

engines=(dbcache)
grep -q '"cache-dit": "not' "$logs/about.json" || engines+=(cache-dit)
same="same_bit_for_bit and (steps-host or steps-device or blocks-device or last-device)"
waits="never_wait or fresh_process"
if [ "$device" = cuda ]; then
    graph_tests=tests/graphs/test_on_gpu.py
    models=(--models flux-1024 small-256 --rounds 24 --seconds 0.4)
    shapes=(flux-1024 wan-720p few-step-512)
    kernel_tests=()
    for name in probe_diff probe_and_decide decide commit predict by_row model_sizes fp8_ring fp8_pack graph; do
        kernel_tests+=("tests/kernels/test_$name.py")
    done
    rest="not ($same) and not ($waits)"
    requests=5
    images=(--size 512 --images 3)
else
    echo "gpu_suite: a rehearsal on the CPU: it tests this script, not the kernels"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    graph_tests=tests/graphs/test_gpu_rehearsal.py
    models=(--rounds 8 --seconds 0.05)
    shapes=(256+32x384)
    kernel_tests=(tests/kernels/test_commit.py)
    rest="the_whole_loop or new_shapes"
    requests=1
    images=(--size 64 --images 1)
fi
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
    workers=(-n "$(($(nproc) < 14 ? $(nproc) : 14))")
fi
# -p no:cacheprovider: nothing is written into the checkout
pytest=("$python" -m pytest -q -p no:cacheprovider)

if [ "$call" = first ]; then
    step graphs-equal 70 20 "${pytest[@]}" --junitxml="$logs/graphs-equal.xml" \
        "$graph_tests" -k "$same"
    step graphs-wait 50 20 "${pytest[@]}" --junitxml="$logs/graphs-wait.xml" \
        "$graph_tests" -k "$waits"
    step graphs 130 30 "$python" -m bench.run graphs --device "$device" "${models[@]}" \
        --engines "${engines[@]}" --json "$logs/graphs.json"
    step kernels 110 30 "$python" -m bench.run kernels --device "$device" --no-compile \
        --repeats 12 --seconds 90 --shapes "${shapes[@]}" --json "$logs/kernels.json"
    step kernel-tests 300 20 "${pytest[@]}" "${workers[@]}" --junitxml="$logs/kernel-tests.xml" \
        "${kernel_tests[@]}"
else
    step graphs-rest 70 20 "${pytest[@]}" --junitxml="$logs/graphs-rest.xml" \
        "$graph_tests" -k "$rest"
    step overhead 20 10 "$python" -m bench.run overhead --device "$device" --requests "$requests" \
        --engines "${engines[@]}" --json "$logs/overhead.json"
    step loop 40 15 "$python" -m bench.run loop --device "$device" "${images[@]}" \
        --json "$logs/loop.json"
    step together 35 15 "${pytest[@]}" --junitxml="$logs/together.xml" \
        tests/together/test_devices.py tests/together/test_cache_device.py -k "$device or on_a_gpu"
    if [ "$device" != cuda ]; then
        left_out sanitizer "needs a GPU"
    elif command -v compute-sanitizer >/dev/null; then
        step sanitizer 40 20 compute-sanitizer --error-exitcode 1 "${pytest[@]}" \
            --junitxml="$logs/sanitizer.xml" "$graph_tests" -k "same_bit_for_bit and blocks-device"
    else
        left_out sanitizer "compute-sanitizer is not installed"
    fi
fi

pack
status=$?
cat "$out/summary.txt"
exit $status
