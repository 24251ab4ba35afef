"""Runs a tiny model with the oracle, dbcache or cache-dit and brings the results to one form."""

from dataclasses import asdict, dataclass, fields, replace

import oracle
import tiny
import torch


@dataclass
class Lane:
    """What an engine says about one lane; cache-dit gives no reasons and no branch."""

    cached_steps: list[int]
    diffs: dict[int, float]
    reasons: list[str] | None = None
    branch: str | None = None


@dataclass
class Run:
    """Outputs per call (latents per step for a pipeline), lanes in the order they first ran."""

    outputs: list[torch.Tensor]
    lanes: list[Lane]


def options(rule: oracle.Rule) -> dict:
    """Return the keyword arguments of dbcache's `DBCacheConfig`."""
    values = asdict(rule)
    for name in ("order", "exact", "sigma"):
        values.pop(name)  # of the calibrator
    if rule.steps_computation_mask is not None:
        values["steps_computation_mask"] = list(rule.steps_computation_mask)
    return values


def transformers(target) -> list[torch.nn.Module]:
    """Return the transformers of a pipeline in the order they run, or the module itself."""
    if isinstance(target, torch.nn.Module):
        return [target]
    return [target.transformer, *filter(None, [getattr(target, "transformer_2", None)])]


def drive(target, family: tiny.Family, rule: oracle.Rule, steps: int, **how) -> list[torch.Tensor]:
    """Call a pipeline once, or a bare transformer in a closed loop."""
    if not isinstance(target, torch.nn.Module):
        return tiny.generate(target, steps, **how)
    if rule.enable_separate_cfg and "branches" not in how:
        how["branches"] = tiny.BRANCHES[::-1] if rule.cfg_compute_first else tiny.BRANCHES
    return tiny.denoise(target, family, steps, **how)


def run_oracle(target, family: tiny.Family, rule: oracle.Rule, steps: int, **how) -> Run:
    """Run with the oracle."""
    oracles = [
        oracle.Oracle(model, family.lists, family.encoder_first, rule)
        for model in transformers(target)
    ]
    for each in oracles:
        each.__enter__()
    outputs = drive(target, family, rule, steps, **how)
    for each in oracles:
        each.__exit__()
    traces = [item for each in oracles for item in each.lanes.items()]
    for _, trace in traces:
        margins = [abs(d - rule.residual_diff_threshold) for d in trace.diffs.values()]
        assert min(margins, default=1) > 1e-6, "a diff on the threshold decides nothing: move it"
    return Run(outputs, [Lane(t.cached_steps, t.diffs, t.reasons, branch) for branch, t in traces])


def run_dbcache(target, family: tiny.Family, rule: oracle.Rule, steps: int, **how) -> Run:
    """Run with dbcache, and leave it enabled."""
    import dbcache

    calibrator = None
    if rule.order and rule.sigma is not None:
        calibrator = dbcache.HermiteCalibratorConfig(hermite_order=rule.order, sigma=rule.sigma)
    elif rule.order:
        calibrator = dbcache.TaylorSeerCalibratorConfig(
            taylorseer_order=rule.order, exact=rule.exact
        )
    dbcache.enable(
        target,
        cache_config=dbcache.DBCacheConfig(**options(rule)),
        calibrator_config=calibrator,
    )
    outputs = drive(target, family, rule, steps, **how)
    return Run(outputs, dbcache_lanes(target))


def dbcache_lanes(target) -> list[Lane]:
    """Return what `dbcache.summary` reports of the newest request."""
    import dbcache

    return [
        Lane(list(lane.cached_steps), dict(lane.diffs), list(lane.reasons), lane.branch)
        for lane in dbcache.summary(target).lanes
    ]


def run_peer(target, family: tiny.Family, rule: oracle.Rule, steps: int, **how) -> Run:
    """Run with cache-dit, from `enable_cache` to `disable_cache`.

    `enable_separate_cfg` must be set in `rule`: cache-dit does not see `cache_context`.
    """
    import cache_dit

    calibrator = None
    if rule.order:
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=rule.order)
    values = options(replace(rule, num_inference_steps=steps))
    theirs = {field.name for field in fields(cache_dit.DBCacheConfig)}
    for name in values.keys() - theirs:
        assert values[name] == options(oracle.Rule())[name], f"{name} is not in cache-dit's config"
        values.pop(name)  # the default is what it does
    config = cache_dit.DBCacheConfig(**values)
    cache_dit.enable_cache(target, cache_config=config, calibrator_config=calibrator)
    outputs = drive(target, family, rule, steps, **how)
    lanes = []
    for model in transformers(target):
        stats = cache_dit.summary(model, logging=False)[-1]
        lanes.append(Lane(stats.cached_steps, _numbers(stats.residual_diffs)))
        if rule.enable_separate_cfg:
            lanes.append(Lane(stats.cfg_cached_steps, _numbers(stats.cfg_residual_diffs)))
    if rule.cfg_compute_first:
        lanes.reverse()
    cache_dit.disable_cache(target)
    return Run(outputs, lanes)


def _numbers(diffs: dict) -> dict[int, float]:
    # negative values stand for "not measured"
    return {int(step): float(value) for step, value in diffs.items() if float(value) > 0}


def assert_same(mine: Run, reference: Run, tolerance: float = 1e-5) -> None:
    """Check decisions exactly, diffs and every output to `tolerance` relative."""
    assert [lane.cached_steps for lane in mine.lanes] == [
        lane.cached_steps for lane in reference.lanes
    ]
    for lane, expected in zip(mine.lanes, reference.lanes, strict=True):
        if expected.reasons is not None:
            assert (lane.branch, lane.reasons) == (expected.branch, expected.reasons)
        assert expected.diffs.keys() <= lane.diffs.keys()
        for step, diff in expected.diffs.items():
            assert abs(lane.diffs[step] - diff) <= 1e-5 * diff + 1e-7, (step, diff)
    for call, (output, expected) in enumerate(zip(mine.outputs, reference.outputs, strict=True)):
        error = (output - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"output {call} differs by {error:.2e}"
