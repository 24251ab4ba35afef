"""As compile_offline.py, for the kernels by row.

    python tests/kernels/compile_offline_rows.py cuda:90 hip:gfx942

Run by test_offline_compile_rows.py in a process of its own, without Triton's interpreter.
"""

from compile_offline import each_dtype, main

from dbcache.kernels.by_row import commit_rows, decide_rows, predict_rows
from dbcache.kernels.by_row.table import KINDS
from dbcache.kernels.common import launches, sums
from dbcache.kernels.common.launches import configs_of
from dbcache.kernels.prediction import commit, predict

TABLE = {"table_ptr": "*i64"}
TYPES = {kind.name: kind for kind in KINDS.values()}
COMMITTED = ("h_fn_ptr", "h_out_ptr", "h_in_ptr", "encoder_fn_ptr", "encoder_out_ptr")
TOKENS = dict.fromkeys(("tokens", "width", "blocks", "encoder_tokens", "encoder_width"), "i32")


def variants():
    """Yield name, kernel, arguments by name, constexprs and options of what is launched."""
    for dtype, x, size in each_dtype():
        yield from decisions(dtype, x, size)
        yield from streams(dtype, x, size)
    for width in (128, 3072):
        yield from fp8_streams("bf16", width)


def decisions(dtype, x, size):
    """Yield the forms of `decide_rows`."""
    constants = {"LOG_BLOCK": sums.log2(launches.BLOCK), "LOG_LANES": 10, "P_REF": TYPES[dtype]}
    numbers = {"size": size, "per_program": "i32", "width": "i32"}
    for by_token in (False, True) if dtype == "bf16" else (False,):
        warps = configs_of(f"probe_and_decide{' tokens' * by_token}")[0].num_warps
        yield (
            f"decide_rows-{dtype}{'-tokens' * by_token}",
            decide_rows._decide_rows_kernel,
            TABLE | {"h_fn_ptr": x, "h_in_ptr": x, "partials_ptr": "*fp32"} | numbers,
            constants | {"WIDTH": 4 if by_token else 2},
            {"num_warps": warps, "enable_fp_fusion": False}
            | ({"maxnreg": decide_rows.REGISTERS} if dtype == "bf16" and not by_token else {}),
        )
    if dtype != "bf16":
        return
    yield (
        f"plan_rows-{dtype}",  # nothing is measured
        decide_rows._decide_rows_kernel,
        TABLE | {"h_fn_ptr": x} | numbers,
        constants | {"WIDTH": 2},
        {"num_warps": 4, "enable_fp_fusion": False, "maxnreg": decide_rows.REGISTERS},
    )


def streams(dtype, x, size):
    """Yield the forms of `predict_rows` and `commit_rows` for rings without scales."""
    kinds = {"RING": TYPES[dtype], "ENCODER_RING": TYPES[dtype]}
    sizes = {"size": size, "blocks": "i32", "encoder_size": "i32"}
    both = dict.fromkeys(("h_ptr", "out_ptr", "encoder_ptr", "encoder_out_ptr"), x)
    for slots in (2, 8):
        launch = configs_of("predict", slots)[0]
        yield (
            f"predict_rows-{dtype}-k{slots}-encoder",
            predict_rows._predict_rows_kernel,
            TABLE | both | sizes,
            kinds | {"K": slots, "REPLACE": False, "BLOCK": launch.block},
            {"num_warps": launch.num_warps, "enable_fp_fusion": True},
        )
    yield (
        f"commit_rows-{dtype}-encoder",
        commit_rows._commit_rows_kernel,
        TABLE | dict.fromkeys(COMMITTED, x) | sizes,
        kinds | {"P_REF": TYPES[dtype], "REPLACE": False, "BLOCK": configs_of("commit")[0].block},
        {"num_warps": configs_of("commit")[0].num_warps, "enable_fp_fusion": False},
    )


def fp8_streams(dtype, width):
    """Yield the same for rings in fp8, with both streams."""
    x = f"*{dtype}"
    rows, columns, warps = predict.fp8_tile(width, 4 if dtype == "fp32" else 2)
    yield (
        f"fp8_predict_rows-{dtype}-{width}-k2",
        predict_rows._predict_rows_fp8_kernel,
        TABLE | dict.fromkeys(("h_ptr", "out_ptr", "encoder_ptr", "encoder_out_ptr"), x) | TOKENS,
        {"K": 2, "REPLACE": False, "ROWS": rows, "COLUMNS": columns},
        {"num_warps": warps, "enable_fp_fusion": True},
    )
    rows, columns, warps = commit.fp8_tile(width, 4 if dtype == "fp32" else 2)
    yield (
        f"fp8_commit_rows-{dtype}-{width}",
        commit_rows._commit_rows_fp8_kernel,
        TABLE | dict.fromkeys(COMMITTED, x) | TOKENS,
        {"P_REF": TYPES[dtype], "REPLACE": False, "ROWS": rows, "COLUMNS": columns},
        {"num_warps": warps, "enable_fp_fusion": False},
    )


if __name__ == "__main__":
    main(variants)
