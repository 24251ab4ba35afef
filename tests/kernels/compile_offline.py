"""Compile the kernels for GPUs that are not there and print what their code looks like, as JSON.

    python tests/kernels/compile_offline.py cuda:90 hip:gfx942

Run by test_offline_compile.py in a process of its own, without Triton's interpreter.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dbcache.kernels.common import e4m3, launches, sums
from dbcache.kernels.common.launches import CONFIGS, configs_of
from dbcache.kernels.decision import decide, probe_and_decide, probe_diff, share_change
from dbcache.kernels.decision import transformation_rate as rate
from dbcache.kernels.prediction import (
    commit,
    fit_recurrence,
    predict,
    recurrence,
    scheduled_weights,
    spectrum,
)
from dbcache.kernels.pruning import (
    add_residuals,
    block_changes,
    decide_blocks,
    decide_step,
    decide_tail,
    store_block,
)

sys.path.append(str(Path(__file__).parents[1] / "support"))
from compile_limits import COUNTED

WIDE = re.compile(r"(ld|st)\.global[.\w:]*\.(?:v4\.[bfu]32|v2\.[bfu]64|v8\.b32|v4\.b64)\b")
WIDE_AMD = re.compile(r"(?:global|buffer)_(load|store)_(?:dwordx4|b128)\b")
LOAD = re.compile(r"tt\.load .*: tensor<")
LOCAL = re.compile(r"\.local\b|scratch_(?:load|store)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9]+)", re.MULTILINE)
SIZE = re.compile("size|width")
TOOLS = Path(nvidia.__file__).parent / "bin"
SPILLED_AMD = re.compile(r"\.(?:[sv]gpr_spill_count|private_segment_fixed_size): *(\d+)")

STATE = {"counters_ptr": "*i32", "values_ptr": "*fp32", "limits_ptr": "*i32"}
STATE |= {"thresholds_ptr": "*fp32", "plan_ptr": "*i32", "trace_reason_ptr": "*i32"}
STATE |= {"trace_diff_ptr": "*fp32", "capacity": "i32"}

COMMITS = (
    ("", False, ()),
    ("-replace", True, ()),
    ("-hidden", False, ("h_in_ptr",)),
    ("-ring", False, ("h_in_ptr", "p_ref_ptr")),
)
"""Forms of `commit`: name, whether hidden states take the residuals' place, what is not given."""

FULL = ("cuda:90",)
"""Targets of all variants; the others take those in bfloat16 only."""


def variants():
    """Yield name, kernel, arguments by name, constexprs and options of what is launched."""
    yield from probe_variants()
    yield from stream_variants()
    yield from decision_variants()
    yield from fp8_variants()
    yield from predictor_variants()
    yield from block_variants()
    yield from block_decision_variants()
    yield from shared_variants()


def each_dtype():
    """Yield dtype, pointer and the type of sizes: one dtype has those of 2**31 elements and up."""
    for dtype in ("bf16", "fp16", "fp32"):
        yield dtype, f"*{dtype}", "i64" if dtype == "fp16" else "i32"


def probe_variants():
    """Yield the same of the kernels that measure a change."""
    for dtype, x, size in each_dtype():
        for start in ("h_in_ptr", None) if dtype == "bf16" else ("h_in_ptr",):
            streams = dict.fromkeys(filter(None, (start, "h_fn_ptr", "p_ref_ptr")), x)
            measured = streams | {"partials_ptr": "*fp32"}
            measured |= {"size": size, "per_program": "i32"}
            form = f"{dtype}{'' if start else '-hidden'}"
            measured |= {"width": "i32"}
            constants = {"LOG_BLOCK": sums.log2(launches.BLOCK)}
            for by_token in (False, True):
                warps = configs_of(f"probe_diff{' tokens' * by_token}")[0].num_warps
                options = {"num_warps": warps, "enable_fp_fusion": False}
                name = f"{form}{'-tokens' * by_token}"
                yield (
                    f"probe_diff-{name}",
                    probe_diff._probe_diff_kernel,
                    measured | ({"thresholds_ptr": "*fp32"} if by_token else {}),
                    constants,
                    options,
                )
                yield (
                    f"probe_and_decide-{name}",
                    probe_and_decide._probe_and_decide_kernel,
                    measured | STATE,
                    constants | {"LOG_LANES": 10, "WIDTH": 4 if by_token else 2},
                    options,
                )


def stream_variants():
    """Yield the same of `predict` and `commit` for rings without scales."""
    for dtype, x, size in each_dtype():
        for slots, encoder, replace in (
            (1, False, False), (1, True, False), (5, True, True), (8, True, False), (8, True, True),
        ):  # fmt: skip
            launch = configs_of("predict", slots)[0]
            stream = {"h_ptr": x, "ring_ptr": x, "weights_ptr": "*fp32", "out_ptr": x}
            extra = {f"encoder_{name}": kind for name, kind in stream.items()}
            extra["encoder_ptr"] = extra.pop("encoder_h_ptr")
            yield (
                f"predict-{dtype}-k{slots}{'-encoder' * encoder}{'-replace' * replace}",
                predict._predict_kernel,
                stream | {"size": size, "blocks": "i32"} | (extra if encoder else {})
                | {"encoder_size": "i32"},
                {"K": slots, "REPLACE": replace, "BLOCK": launch.block},
                {"num_warps": launch.num_warps, "enable_fp_fusion": True},
            )  # fmt: skip
            if slots > 1:
                continue
            stream = {f"{name}_ptr": x for name in ("h_in", "h_fn", "h_out", "p_ref", "ring")}
            extra = {f"encoder_{name}_ptr": x for name in ("fn", "out", "ring")}
            for form, replace, missing in COMMITS:
                given = {k: v for k, v in stream.items() if k not in missing}
                yield (
                    f"commit-{dtype}{'-encoder' * encoder}{form}",
                    commit._commit_kernel,
                    given | {"counters_ptr": "*i32", "size": size, "blocks": "i32"}
                    | (extra if encoder else {}) | {"encoder_size": "i32"},
                    {"REPLACE": replace, "BLOCK": configs_of("commit")[0].block},
                    {"num_warps": configs_of("commit")[0].num_warps, "enable_fp_fusion": False},
                )  # fmt: skip


def decision_variants():
    """Yield the same of the kernels that add up partial sums."""
    for log_lanes in (None, 7, 10):
        partials = {} if log_lanes is None else {"partials_ptr": "*fp32"}
        yield (
            f"decide-{'none' if log_lanes is None else 2**log_lanes}-bf16",
            decide._decide_kernel,
            STATE | partials | {"samples": "i32", "programs": "i32"},
            {"LOG_LANES": log_lanes or 7, "WIDTH": 4 if log_lanes == 10 else 2},
            {"num_warps": 4 if log_lanes == 10 else 1, "enable_fp_fusion": False},
        )
    sizes = [f"{stream}_{what}" for stream in ("output", "input") for what in SUMS]
    for log_lanes in (7, 10):
        yield (
            f"decide_rate-{2**log_lanes}-bf16",
            rate._transformation_rate_kernel,
            {"counters_ptr": "*i32"}
            | dict.fromkeys(("values_ptr", "output_ptr", "input_ptr"), "*fp32")
            | dict.fromkeys(sizes, "i32"),
            {"LOG_LANES": log_lanes},
            {"num_warps": 4 if log_lanes == 10 else 1, "enable_fp_fusion": False},
        )


SUMS = ("samples", "programs")

TUNED = {
    "probe_diff-bf16": "probe_diff",
    "probe_diff-bf16-tokens": "probe_diff tokens",
    "probe_and_decide-bf16": "probe_and_decide",
    "predict-bf16-k5-encoder-replace": "predict",
    "predict-fp32-k1-encoder": "predict",
    "commit-bf16-encoder": "commit",
    "commit-fp32-encoder": "commit",
}
"""What is compiled with every config of an op, by the name of the variant."""


def with_configs(variants):
    """Yield the variants, and those of TUNED once more with each config but the default."""
    for name, kernel, arguments, constexprs, options in variants:
        yield name, kernel, arguments, constexprs, options
        for block, warps in CONFIGS[TUNED[name]][1:] if name in TUNED else ():
            blocks = {"BLOCK": block} if "BLOCK" in constexprs else {}
            tuned = constexprs | blocks, options | {"num_warps": warps}
            yield f"{name}-block{block}-warps{warps}", kernel, arguments, *tuned


def elements_per_thread(constexprs, options, gpu: GPUTarget) -> int | None:
    """Return how many elements of a tensor a thread holds, None for what has no block."""
    if "LOG_BLOCK" in constexprs:
        constexprs = {"BLOCK": 1 << constexprs["LOG_BLOCK"]}
    if "BLOCK" not in constexprs:
        return None
    return constexprs["BLOCK"] // (options["num_warps"] * gpu.warp_size)


def fp8_variants():
    """Yield the same of the kernels for rings in fp8."""
    sizes = {"tokens": "i32", "width": "i32", "blocks": "i32"}
    sizes |= {"encoder_tokens": "i32", "encoder_width": "i32"}
    for dtype, width, encoder in (
        ("bf16", 128, True), ("bf16", 3072, False), ("bf16", 5120, True),
        ("bf16", e4m3.MAX_WIDTH, True), ("fp16", 3072, False), ("fp32", 3072, True),
    ):  # fmt: skip
        x, ring = f"*{dtype}", {"ring_ptr": "*u8", "scales_ptr": "*fp32"}
        form = f"{dtype}-{width}{'-encoder' * encoder}"
        rows, columns, warps = commit.fp8_tile(width, 4 if dtype == "fp32" else 2)
        stream = {f"{name}_ptr": x for name in ("h_in", "h_fn", "h_out", "p_ref")} | ring
        extra = {f"encoder_{name}_ptr": x for name in ("fn", "out")}
        extra |= {f"encoder_{name}": kind for name, kind in ring.items()}
        for suffix, replace, missing in COMMITS:
            given = {k: v for k, v in stream.items() if k not in missing}
            yield (
                f"fp8_commit-{form}{suffix}",
                commit._commit_fp8_kernel,
                given | {"counters_ptr": "*i32"} | sizes | (extra if encoder else {}),
                {"REPLACE": replace, "ROWS": rows, "COLUMNS": columns},
                {"num_warps": warps, "enable_fp_fusion": False},
            )
        rows, columns, warps = predict.fp8_tile(width, 4 if dtype == "fp32" else 2)
        stream = {"h_ptr": x, "weights_ptr": "*fp32", "out_ptr": x} | ring
        extra = {f"encoder_{name}": kind for name, kind in stream.items()}
        extra["encoder_ptr"] = extra.pop("encoder_h_ptr")
        for slots in (2, 8):
            yield (
                f"fp8_predict-{form}-k{slots}",
                predict._predict_fp8_kernel,
                stream | sizes | (extra if encoder else {}),
                {"K": slots, "REPLACE": False, "ROWS": rows, "COLUMNS": columns},
                {"num_warps": warps, "enable_fp_fusion": True},
            )


def predictor_variants():
    """Yield the same of the kernels of predictors that `decide` does not weigh."""
    scalars = {"counters_ptr": "*i32", "values_ptr": "*fp32", "limits_ptr": "*i32"}
    options = {"num_warps": 1, "enable_fp_fusion": False}
    fits = {"fit_ptr": "*fp64", "encoder_fit_ptr": "*fp64"}
    yield "weights-bf16-recurrence", recurrence._recurrence_kernel, scalars | fits, {}, options
    parameters = {"parameters_ptr": "*fp64"}
    yield "weights-bf16-spectrum", spectrum._spectrum_kernel, scalars | parameters, {}, options
    table = {"table_ptr": "*fp32", "rows": "i32"}
    kernel = scheduled_weights._scheduled_weights_kernel
    yield "weights-bf16-scheduled", kernel, scalars | table, {}, {"num_warps": 1}
    for dtype in ("bf16", "fp16", "fp32"):
        warps = fit_recurrence.num_warps(4 if dtype == "fp32" else 2)
        yield (
            f"fit_recurrence-{dtype}",
            fit_recurrence._fit_recurrence_kernel,
            {"ring_ptr": f"*{dtype}", "counters_ptr": "*i32", "partials_ptr": "*fp32"}
            | {"fit_ptr": "*fp64", "size": "i64" if dtype == "fp16" else "i32"}
            | {"per_program": "i32", "slots": "i32", "ridge": "fp32"},
            {"LOG_BLOCK": sums.log2(fit_recurrence.BLOCK), "LOG_LANES": 10},
            {"num_warps": warps, "enable_fp_fusion": False},
        )


def block_variants():
    """Yield the same of the kernels that leave single blocks out."""
    for dtype, x, size in each_dtype():
        log_block = {"LOG_BLOCK": sums.log2(launches.BLOCK)}
        options = {"num_warps": 4, "enable_fp_fusion": False}
        yield (
            f"block_changes-{dtype}",
            block_changes._block_changes_kernel,
            {"h_ptr": x, "inputs_ptr": x, "residuals_ptr": x, "stamps_ptr": "*i32"}
            | {"partials_ptr": "*fp32", "size": size, "per_program": "i32", "blocks": "i32"},
            log_block,
            options,
        )
        for encoder in (False, True):
            extra = {"encoder_ptr": x, "encoder_residuals_ptr": x, "encoder_out_ptr": x}
            yield (
                f"block_add-{dtype}{'-encoder' * encoder}",
                add_residuals._add_residuals_kernel,
                {"h_ptr": x, "residuals_ptr": x, "out_ptr": x, "size": size, "first": "i32"}
                | {"count": "i32", "blocks": "i32", "encoder_size": "i32"}
                | (extra if encoder else {}),
                {"BLOCK": launches.BLOCK},
                options,
            )
            extra = {f"encoder_{name}_ptr": x for name in ("in", "out", "added")}
            yield (
                f"block_store-{dtype}{'-encoder' * encoder}",
                store_block._store_block_kernel,
                {f"{name}_ptr": x for name in ("h_in", "h_out", "x", "added")}
                | {"sums_ptr": "*fp32", "stamps_ptr": "*i32", "store_ptr": "*i32", "index": "i32"}
                | {"size": size, "per_program": "i32", "programs": "i32"}
                | {"encoder_size": "i32"} | (extra if encoder else {}),
                log_block,
                options | {"num_warps": store_block.WARPS},
            )  # fmt: skip


def block_decision_variants():
    """Yield the same of the kernels that decide which blocks are left out."""
    pointers = ("partials", "growth", "rule", "changes", "decisions")
    for lanes in (7, 10):
        yield (
            f"decide_blocks-{2**lanes}-bf16",
            decide_blocks._decide_blocks_kernel,
            {f"{name}_ptr": "*fp32" for name in pointers}
            | {"prunable_ptr": "*i32", "ticket_ptr": "*i32"}
            | dict.fromkeys(("samples", "programs", "parts"), "i32"),
            {"LOG_LANES": lanes},
            {"num_warps": 4 if lanes == 10 else 1, "enable_fp_fusion": False},
        )
    own = ("trace", "prunable", "flags", "store")
    for measured in (False, True):
        yield (
            f"decide_step-{'measured' if measured else 'none'}-bf16",
            decide_step._decide_step_kernel,
            STATE | {f"{name}_ptr": "*i32" for name in own} | {"blocks": "i32"}
            | ({"decisions_ptr": "*fp32"} if measured else {}),
            {},
            {"num_warps": 1, "enable_fp_fusion": False},
        )  # fmt: skip
        yield (
            f"decide_tail-{'measured' if measured else 'none'}-bf16",
            decide_tail._decide_tail_kernel,
            {f"{name}_ptr": "*i32" for name in ("counters", "flags", "store")} | {"blocks": "i32"}
            | ({"decisions_ptr": "*fp32"} if measured else {}),
            {"LOG_BLOCKS": 6},
            {"num_warps": 1},
        )  # fmt: skip


def shared_variants():
    """Yield the same of the kernel by which branches share a change."""
    state = {name: STATE[name] for name in ("counters_ptr", "values_ptr", "limits_ptr")}
    state |= {name: STATE[name] for name in ("thresholds_ptr", "plan_ptr", "capacity")}
    numbers = dict.fromkeys(("branch", "kind", "numel"), "i32")
    for by_rules in (False, True):
        yield (
            f"decide_shared-bf16{'-rules' * by_rules}",
            share_change._share_change_kernel,
            {"own_ptr": "*fp32", "kept_ptr": "*fp32", "stamps_ptr": "*i32"} | state | numbers,
            {"BY_RULES": by_rules, "BLOCK": share_change.BLOCK},
            {"num_warps": 4, "enable_fp_fusion": False},
        )


def resources(cubin: bytes, counted: bool) -> dict[str, int]:
    """Return what an NVIDIA kernel takes: registers, bytes of stack; if `counted`, instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), *["-sass"] * counted, "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    text = done.stdout + done.stderr
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    taken = {"registers": int(usage[1]), "spilled": int(usage[2]) + int(usage[3])}
    sass = INSTRUCTION.findall(text)
    if not counted:
        return taken
    return taken | {
        "instructions": len(sass),
        "barriers": sum(name == "BAR" for name in sass),
        "calls": sum(name == "CALL" for name in sass),
    }


def divisible(kernel, arguments: dict[str, str]) -> set[str]:
    """Return which of `arguments` a launch with aligned tensors says to be divisible by 16."""
    sizes = {p.name for p in kernel.params if not p.do_not_specialize and SIZE.search(p.name)}
    return {name for name, kind in arguments.items() if kind.startswith("*") or name in sizes}


def compile_for(target: GPUTarget, kernel, arguments, constexprs, options):
    """Return `kernel`, compiled for pointers and sizes that are divisible by 16."""
    if "NATIVE" in kernel.arg_names:  # as `e4m3.is_native`
        is_native = target.backend == "cuda" and target.arch >= 89
        constexprs = constexprs | {"NATIVE": is_native}
    signature, attrs, hints = {}, {}, divisible(kernel, arguments)
    for i, name in enumerate(kernel.arg_names):
        signature[name] = arguments.get(name, "constexpr")
        if name in hints:
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif signature[name] == "constexpr":
            constexprs = {name: None} | constexprs
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=target, options=options)


def row_of(target: str, gpu: GPUTarget, name: str, variant) -> dict[str, object]:
    """Compile a variant and return what its code looks like."""
    compiled = compile_for(gpu, *variant)
    cuda = gpu.backend == "cuda"
    asm = compiled.asm["ptx" if cuda else "amdgcn"]
    wide = (WIDE if cuda else WIDE_AMD).findall(asm)
    counted = target in FULL and name in COUNTED
    used = {} if not cuda else resources(compiled.asm["cubin"], counted)
    return {
        "target": target,
        "kernel": name,
        "per_thread": elements_per_thread(*variant[2:], gpu),
        "wide_loads": sum(w in ("ld", "load") for w in wide),
        "wide_stores": sum(w in ("st", "store") for w in wide),
        "loads_after_sums": len(LOAD.findall(compiled.asm["ttir"].partition('"tt.reduce"')[2])),
        "local": bool(LOCAL.search(asm)),
        "spilled": sum(map(int, SPILLED_AMD.findall(asm))),
        "fma": "fma.rn.f32" in asm or "fma.rn.f64" in asm,
        "e4m3": "cvt.rn.satfinite.e4m3x2" in asm or "e4m3x2" in asm,
    } | used


def cached_row(cache: Path | None, target: str, gpu: GPUTarget, name: str, variant):
    """Return a row from the cache, which knows it by its source, Triton and this file."""
    if cache is None:
        return row_of(target, gpu, name, variant)
    kernel, *rest = variant
    parts = (triton.__version__, kernel.cache_key, target, name, *rest, name in COUNTED, SOURCE)
    parts += (sorted(divisible(kernel, rest[0])),)  # the decorator is no part of Triton's key
    path = cache / f"{hashlib.sha256(repr(parts).encode()).hexdigest()}.json"
    if path.exists():
        return json.loads(path.read_text())
    row = row_of(target, gpu, name, variant)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(row))
    temporary.replace(path)  # at once: another process may read it
    return row


SOURCE = Path(__file__).read_text()


def main(variants=variants) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--cache", type=Path, help="folder of what was compiled before")
    arguments = parser.parse_args()
    if arguments.cache is not None:
        arguments.cache.mkdir(parents=True, exist_ok=True)
    rows = []
    for target in arguments.targets:
        backend, arch = target.split(":")
        cuda = backend == "cuda"
        gpu = GPUTarget(backend, int(arch) if cuda else arch, 32 if cuda else 64)
        for name, *variant in with_configs(variants()):
            if target in FULL or "bf16" in name:
                rows.append(cached_row(arguments.cache, target, gpu, name, variant))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
