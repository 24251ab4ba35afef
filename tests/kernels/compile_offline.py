"""Compile the kernels for GPUs that are not there and print what their code looks like, as JSON.

    python tests/kernels/compile_offline.py cuda:90 hip:gfx942

Run by test_offline_compile.py in a process of its own, without Triton's interpreter.
"""

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dbcache.kernels import commit, decide, predict, probe_diff

WIDE = re.compile(r"(ld|st)\.global[.\w:]*\.(?:v4\.[bfu]32|v2\.[bfu]64|v8\.b32|v4\.b64)\b")
WIDE_AMD = re.compile(r"(?:global|buffer)_(load|store)_(?:dwordx4|b128)\b")
LOCAL = re.compile(r"\.local\b|scratch_(?:load|store)")

FULL = ("cuda:90",)
"""Targets of all variants; the others take those in bfloat16 only."""


def variants():
    """Yield name, kernel, arguments by name, constexprs and options of what is launched."""
    for dtype in ("bf16", "fp16", "fp32"):
        x = f"*{dtype}"
        yield (
            f"probe_diff-{dtype}",
            probe_diff._probe_diff_kernel,
            {"h_in_ptr": x, "h_fn_ptr": x, "p_ref_ptr": x, "partials_ptr": "*fp32"}
            | {"size": "i64" if dtype == "fp16" else "i32", "per_program": "i32"},
            {"BLOCK": probe_diff.BLOCK},
            {"num_warps": 4, "enable_fp_fusion": False},
        )
        for slots, encoder, replace in ((1, False, False), (1, True, False), (5, True, True)):
            stream = {"h_ptr": x, "ring_ptr": x, "weights_ptr": "*fp32", "out_ptr": x}
            extra = {f"encoder_{name}": kind for name, kind in stream.items()}
            extra["encoder_ptr"] = extra.pop("encoder_h_ptr")
            yield (
                f"predict-{dtype}-k{slots}{'-encoder' * encoder}{'-replace' * replace}",
                predict._predict_kernel,
                stream | {"size": "i32", "blocks": "i32"} | (extra if encoder else {})
                | {"encoder_size": "i32"},
                {"K": slots, "REPLACE": replace, "BLOCK": predict.BLOCK},
                {"num_warps": 4, "enable_fp_fusion": True},
            )  # fmt: skip
            if slots > 1:
                continue
            stream = {f"{name}_ptr": x for name in ("h_in", "h_fn", "h_out", "p_ref", "ring")}
            extra = {f"encoder_{name}_ptr": x for name in ("fn", "out", "ring")}
            for replace in (False, True):
                yield (
                    f"commit-{dtype}{'-encoder' * encoder}{'-replace' * replace}",
                    commit._commit_kernel,
                    stream | {"counters_ptr": "*i32", "size": "i32", "blocks": "i32"}
                    | (extra if encoder else {}) | {"encoder_size": "i32"},
                    {"REPLACE": replace, "BLOCK": commit.BLOCK},
                    {"num_warps": 4, "enable_fp_fusion": False},
                )  # fmt: skip
    for log_lanes in (None, 0, 10):
        state = {"counters_ptr": "*i32", "values_ptr": "*fp32", "limits_ptr": "*i32"}
        state |= {"thresholds_ptr": "*fp32", "plan_ptr": "*i32", "trace_reason_ptr": "*i32"}
        state |= {"trace_diff_ptr": "*fp32", "capacity": "i32"}
        partials = {} if log_lanes is None else {"partials_ptr": "*fp32"}
        yield (
            f"decide-{'none' if log_lanes is None else 2**log_lanes}-bf16",
            decide._decide_kernel,
            state | partials | {"samples": "i32", "programs": "i32"},
            {"LOG_LANES": log_lanes or 0},
            {"num_warps": 4 if log_lanes == 10 else 1, "enable_fp_fusion": False},
        )


def compile_for(target: GPUTarget, kernel, arguments, constexprs, options) -> str:
    """Return the PTX or AMD assembly of `kernel`, all pointers and sizes divisible by 16."""
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = arguments.get(name, "constexpr")
        if signature[name].startswith("*") or "size" in name:
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif signature[name] == "constexpr":
            constexprs = {name: None} | constexprs
            attrs.pop((i,), None)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    compiled = triton.compile(source, target=target, options=options)
    return compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]


def main(targets: list[str]) -> None:
    rows = []
    for target in targets:
        backend, arch = target.split(":")
        cuda = backend == "cuda"
        gpu = GPUTarget(backend, int(arch) if cuda else arch, 32 if cuda else 64)
        for name, *variant in variants():
            if target not in FULL and "bf16" not in name:
                continue
            asm = compile_for(gpu, *variant)
            wide = (WIDE if cuda else WIDE_AMD).findall(asm)
            rows.append(
                {
                    "target": target,
                    "kernel": name,
                    "wide_loads": sum(w in ("ld", "load") for w in wide),
                    "wide_stores": sum(w in ("st", "store") for w in wide),
                    "local": bool(LOCAL.search(asm)),
                    "fma": "fma.rn.f32" in asm,
                }
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
