"""Counters per model: as a dictionary, and as Prometheus metrics of one or more processes."""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import prometheus_client
import pytest
import tiny
import torch

import dbcache
from dbcache.integrations import prometheus

NAME = "QwenImageTransformer2DModel"
OPTIONS = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0}

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")


@torch.no_grad()
def run(model, request, steps):
    with request:
        for step in range(steps):
            model(
                **tiny.FAMILIES["qwen"].arguments(
                    tiny.noise(1, 16, 16, seed=step), 1 - step / steps, "cond"
                )
            )
    request.close()


def values(registry):
    return {
        (sample.name, *sample.labels.values()): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


def test_what_requests_did_is_counted_per_model():
    registry = prometheus_client.CollectorRegistry()
    gc.collect()  # models of other tests
    before = dbcache.counters().get(
        NAME, {"requests": 0, "steps_full": 0, "steps_cached": 0, "bytes": 0}
    )
    prometheus.publish(registry)
    start = values(registry)
    model = dbcache.enable(tiny.qwen(layers=3), **OPTIONS)
    assert dbcache.counters(model)[NAME]["requests"] == 0
    run(model, dbcache.start_request(model), 6)
    run(model, dbcache.start_request(model, residual_diff_threshold=0), 5)
    held = dbcache.start_request(model)
    with held, torch.no_grad():
        model(**tiny.FAMILIES["qwen"].arguments(tiny.noise(1, 16, 16, seed=0), 1.0, "cond"))
    own = dbcache.counters(model)[NAME]
    assert own == {
        "requests": 2,
        "requests_without_cached_steps": 1,
        "steps_full": 7,
        "steps_cached": 4,
        "reasons": {"warm-up": 4, "threshold is 1 or more": 4, "threshold is 0": 3},
        "bytes": dbcache.summary(model, logging=False).nbytes,
    }
    assert own["bytes"] >= held.nbytes > 0
    after = dbcache.counters()[NAME]
    for name in ("requests", "steps_full", "steps_cached"):
        assert after[name] - before[name] == own[name]
    prometheus.publish(registry)
    prometheus.publish(registry)  # again counts nothing twice
    now = values(registry)
    assert now["dbcache_buffer_bytes", NAME] == after["bytes"]
    for key, count in {
        ("dbcache_requests_total", NAME): 2,
        ("dbcache_requests_without_cached_steps_total", NAME): 1,
        ("dbcache_steps_total", NAME, "full"): 7,
        ("dbcache_steps_total", NAME, "cached"): 4,
        ("dbcache_decisions_total", NAME, "threshold is 0"): 3,
    }.items():
        assert now[key] - start.get(key, 0) == count
    assert (
        f'dbcache_requests_total{{model="{NAME}"}} {after["requests"]:.1f}\n' in prometheus.text()
    )

    held.close()
    dbcache.disable(model)
    del model, held
    gc.collect()
    gone = dbcache.counters()[NAME]
    assert gone["requests"] == after["requests"] + 1
    assert gone["bytes"] == before["bytes"]
    with pytest.raises(RuntimeError, match="counters: the cache must be enabled on it first"):
        dbcache.counters(tiny.qwen(layers=2))


WORKER = f"""
from dbcache.integrations import prometheus
found = dict.fromkeys(("requests_without_cached_steps", "steps_full", "bytes"), 3)
found |= dict(requests=2, steps_cached=4, reasons={{}})
prometheus.publish(counts={{"{NAME}": found}})
"""


def test_counts_that_are_published_late_count_nothing_twice():
    registry = prometheus_client.CollectorRegistry()
    for requests in (2, 5, 3, 5, 6):  # threads count first, and publish in any order
        found = dict.fromkeys(("requests_without_cached_steps", "steps_full", "bytes"), requests)
        found |= {"requests": requests, "steps_cached": 0, "reasons": {"warm-up": requests}}
        prometheus.publish(registry, {NAME: found})
    now = values(registry)
    assert now["dbcache_requests_total", NAME] == 6
    assert now["dbcache_decisions_total", NAME, "warm-up"] == 6


def test_requests_of_many_threads_are_all_counted():
    model = dbcache.enable(tiny.qwen(layers=2), **OPTIONS)
    registry = prometheus_client.CollectorRegistry()

    def serve(steps):
        for _ in range(3):
            run(model, dbcache.start_request(model), steps)
            prometheus.publish(registry)

    prometheus.publish(registry)
    before = values(registry).get(("dbcache_requests_total", NAME), 0)
    threads = [threading.Thread(target=serve, args=(steps,)) for steps in (2, 3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own = dbcache.counters(model)[NAME]
    assert own["requests"] == 12
    assert own["steps_full"] + own["steps_cached"] == 3 * (2 + 3 + 4 + 5)
    assert values(registry)["dbcache_requests_total", NAME] - before == 12
    dbcache.disable(model)


def test_an_engine_adds_up_what_its_workers_count(tmp_path):
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    collect = (
        "import prometheus_client as p, prometheus_client.multiprocess as m\n"
        "r = p.CollectorRegistry(); m.MultiProcessCollector(r)\n"
        "print(p.generate_latest(r).decode())"
    )
    root = Path(__file__).parents[2]
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=env,
            cwd=root,
            check=True,
            capture_output=True,
            text=True,
        )
        for code in (WORKER, WORKER, collect)
    ][-1].stdout
    assert f'dbcache_requests_total{{model="{NAME}"}} 4.0' in said
    assert f'dbcache_steps_total{{kind="cached",model="{NAME}"}} 8.0' in said


FAILS = f"""
import logging
from dbcache.integrations import prometheus
logging.basicConfig(level="WARNING")
import dbcache.totals
found = dict.fromkeys(("requests", "requests_without_cached_steps", "steps_full", "bytes"), 3)
dbcache.totals.counters = lambda: {{"{NAME}": found | dict(steps_cached=4, reasons={{}})}}
for _ in range(3):
    prometheus.publish_where_installed()
"""


def test_metrics_that_fail_are_said_once_and_fail_no_request(tmp_path):
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "gone")}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FAILS],
        env=env, cwd=root, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("metrics are not published: FileNotFoundError") == 1
    assert "make the folder that PROMETHEUS_MULTIPROC_DIR names" in done.stderr


def test_without_prometheus_client_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImportError, match="pip install prometheus-client"):
        prometheus.text()
