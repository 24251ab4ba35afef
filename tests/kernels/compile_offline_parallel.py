"""As compile_offline.py, for the kernels that parallelism uses.

    python tests/kernels/compile_offline_parallel.py cuda:90 hip:gfx942

Run by test_offline_compile_parallel.py in a process of its own, without Triton's interpreter.
"""

import math

import triton
from compile_offline import main

from dbcache.kernels.distributed import fp8_pack, merge_attention

WIDTHS = (40, 72, 128)
"""Of a head: multiples of 8, which is 16 bytes of bfloat16."""


def variants():
    """Yield name, kernel, arguments by name, constexprs and options of what is launched."""
    for dtype in ("bf16", "fp16", "fp32"):
        for width in WIDTHS:
            yield merge_variant(dtype, dtype, width)
            if dtype == "bf16":
                yield merge_variant("fp32", dtype, width)
            for packs in (True, False):
                for quantize in (True, False):
                    yield pack_variant(packs, dtype, width, quantize)


def merge_variant(a, b, width):
    """Merge out_a of dtype `a`, which the output has too, with out_b of dtype `b`."""
    kernel = merge_attention._merge_attention_kernel
    pointers = {"out_a_ptr": f"*{a}", "out_b_ptr": f"*{b}", "out_ptr": f"*{a}"}
    pointers |= dict.fromkeys(("lse_a_ptr", "lse_b_ptr", "lse_ptr"), "*fp32")
    name = f"merge_attention-{width}-{a}" + (f"-{b}" if a != b else "")
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return name, kernel, pointers | sizes(kernel), blocks(merge_attention, width), options


def pack_variant(packs, dtype, width, quantize):
    kernel = fp8_pack._fp8_kernel
    pointers = {"x_ptr": f"*{dtype}", "buffer_ptr": "*u8" if quantize else f"*{dtype}"}
    if quantize:
        pointers["scales_ptr"] = "*fp32"
    name = f"fp8_{'' if packs else 'un'}pack-{width}-{dtype}{'' if quantize else '-layout'}"
    constants = blocks(fp8_pack, width) | {"PACK": packs}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return name, kernel, pointers | sizes(kernel), constants, options


def sizes(kernel):
    names = ("rows", "heads", "chunk_size", "scales_size")
    return {arg: "i32" for arg in kernel.arg_names if arg in names or "stride" in arg}


def blocks(module, width):
    block_d = triton.next_power_of_2(width)
    block_rows = module.BLOCK // block_d
    return {
        "D": width, "ALIGN": math.gcd(16, width), "BLOCK_ROWS": block_rows, "BLOCK_D": block_d,
    }  # fmt: skip


if __name__ == "__main__":
    main(variants)
