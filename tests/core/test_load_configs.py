"""Settings from files and dictionaries: what they give, and what is refused."""

import builtins
import json

import pytest
import tiny

import dbcache
from dbcache import CalibratorConfig, DBCacheConfig, TaylorSeerCalibratorConfig, load_configs

YAML = """
cache_config:
  max_warmup_steps: 8
  warmup_interval: 2
  max_cached_steps: -1
  max_continuous_cached_steps: 2
  Fn_compute_blocks: 1
  Bn_compute_blocks: 0
  residual_diff_threshold: 0.12
  enable_taylorseer: true
  taylorseer_order: 2
"""
SERVING = {
    "Fn_compute_blocks": 1,
    "Bn_compute_blocks": 0,
    "max_warmup_steps": 2,
    "max_cached_steps": -1,
    "max_continuous_cached_steps": 3,
    "residual_diff_threshold": 0.24,
    "num_inference_steps": None,
    "enable_taylorseer": False,
    "taylorseer_order": 1,
    "scm_steps_mask_policy": "slow",
    "scm_steps_policy": "static",
}


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_files_give_the_arguments_of_enable(tmp_path, suffix):
    import yaml

    path = tmp_path / f"cache.{suffix}"
    path.write_text(json.dumps(yaml.safe_load(YAML)) if suffix == "json" else YAML)
    expected = {
        "cache_config": DBCacheConfig(
            warmup_interval=2,
            max_continuous_cached_steps=2,
            Fn_compute_blocks=1,
            residual_diff_threshold=0.12,
        ),
        "calibrator_config": TaylorSeerCalibratorConfig(
            taylorseer_order=2, enable_encoder_calibrator=False
        ),
    }
    assert load_configs(path) == load_configs(str(path)) == expected


def test_agrees_with_cache_dit_on_the_fields(tmp_path):
    cache_dit = pytest.importorskip("cache_dit", minversion="1.5.3")
    path = tmp_path / "cache.yaml"
    path.write_text(YAML)
    peer, mine = cache_dit.load_configs(str(path)), load_configs(path)
    theirs = peer["cache_config"].as_dict()
    for name in mine["cache_config"].given:
        assert theirs[name] == getattr(mine["cache_config"], name), name
    for name in ("enable_calibrator", "enable_encoder_calibrator", "taylorseer_order"):
        got = getattr(mine["calibrator_config"], name)
        assert got == getattr(peer["calibrator_config"], name), name


def test_serving_engines_dictionary_runs():
    pipe = tiny.pipeline("flux")
    dbcache.enable(pipe, **load_configs(SERVING))
    tiny.generate(pipe, 8, guided=False)
    (lane,) = dbcache.summary(pipe).lanes
    assert lane.cached_steps == [5]
    dbcache.enable(pipe, **SERVING)
    tiny.generate(pipe, 8, guided=False)
    assert dbcache.summary(pipe).lanes[0].cached_steps == [5]


FLAT = {
    "taylorseer": (
        {"enable_taylorseer": True, "taylorseer_order": 3, "taylorseer_exact": True},
        TaylorSeerCalibratorConfig(
            taylorseer_order=3, exact=True, enable_encoder_calibrator=False
        ),
    ),
    "hermite": (
        {"enable_encoder_hermite": True, "hermite_order": 2, "hermite_sigma": 0.4},
        dbcache.HermiteCalibratorConfig(hermite_order=2, sigma=0.4, enable_calibrator=False),
    ),
    "foca": (
        {"enable_foca": True, "enable_encoder_foca": True, "foca_horizon": 2.0},
        dbcache.FoCaCalibratorConfig(foca_horizon=2.0),
    ),
    "dmd, with its encoder": (
        {"enable_dmd": True, "dmd_history": 6, "dmd_svd_precision": "low"},
        dbcache.DMDCalibratorConfig(dmd_history=6, dmd_svd_precision="low"),
    ),
    "dmd, without": (
        {"enable_dmd": True, "enable_encoder_dmd": False, "dmd_rank": 0, "dmd_ridge": 0.1},
        dbcache.DMDCalibratorConfig(dmd_ridge=0.1, enable_encoder_calibrator=False),
    ),
    "spectrum": (
        {"enable_spectrum": True, "spectrum_order": 3, "spectrum_window": 6}
        | {"spectrum_ridge": 0.1, "spectrum_blend": 1.0, "calibrator_cache_type": "hidden_states"},
        dbcache.SpectrumCalibratorConfig(
            spectrum_order=3, spectrum_window=6, spectrum_ridge=0.1, spectrum_blend=1.0,
            calibrator_cache_type="hidden_states", enable_encoder_calibrator=False,
        ),
    ),
    "another is off": (
        {"enable_taylorseer": False, "taylorseer_order": 1, "enable_foca": True},
        dbcache.FoCaCalibratorConfig(enable_encoder_calibrator=False),
    ),
    "custom, off": ({"enable_custom": False}, CalibratorConfig()),
}  # fmt: skip


@pytest.mark.parametrize("case", FLAT)
def test_every_predictor_has_flat_options(case):
    options, expected = FLAT[case]
    calibrator = load_configs(options)["calibrator_config"]
    assert (type(calibrator), calibrator) == (type(expected), expected)


def test_a_predictor_of_the_user_has_flat_options():
    dbcache.register_predictor("from a file")(lambda steps, step: [1.0])
    loaded = load_configs({"enable_custom": True, "predictor_name": "from a file"})
    assert loaded["calibrator_config"].strify() == "Custom_from a file"


def test_only_what_was_given_counts_and_switched_off_is_said():
    loaded = load_configs(SERVING)
    assert type(loaded["calibrator_config"]) is CalibratorConfig
    assert loaded["cache_config"].steps_computation_policy == "static"
    loaded = load_configs({"max_warmup_steps": 3})
    assert loaded["cache_config"].given == {"max_warmup_steps": 3}
    assert loaded["calibrator_config"] is None


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        ({"residual_diff_treshold": 0.1}, TypeError, "did you mean 'residual_diff_threshold'"),
        ({"enable_sperate_cfg": True}, TypeError, "did you mean 'enable_separate_cfg'"),
        ({"scm_step_policy": "static"}, TypeError, "did you mean 'scm_steps_policy'"),
        ({"cache_config": {"enable_taylorser": True}}, TypeError, "'enable_taylorseer'"),
        ({"cache_config": {}, "Fn_compute_blocks": 1}, TypeError, "unknown option 'Fn_comp"),
        ({"parallelism_config": {"ulyses": 2}}, TypeError, "did you mean 'ulysses_size'"),
        ({"parallelism_config": {"tp": 2, "tp_size": 2}}, ValueError, "must not both be given"),
        ({"parallelism_config": 2}, TypeError, "must be a mapping of options, got 2"),
        ({"cache_config": [1]}, TypeError, r"must be a mapping of options, got \[1\]"),
        ({"cache_type": "Cache"}, ValueError, "cache_type"),
        ({"taylorseer_order": 2}, ValueError, "add enable_taylorseer=True"),
        ({"foca_horizon": 2.0}, ValueError, "add enable_foca=True"),
        ({"enable_foca": True, "enable_dmd": True}, ValueError, "switched on, got foca, dmd"),
        ({"enable_foca": True, "dmd_history": 5}, ValueError, "dmd_history must not be given with"),
        (
            {"enable_taylorseer": True, "taylorseer_cache_type": "residual"}
            | {"calibrator_cache_type": "hidden_states"},
            ValueError,
            "must not both be given",
        ),
        ({"enable_taylorseer": "yes"}, TypeError, "must be True or False, got 'yes'"),
        ({"scm_steps_mask_policy": "quick"}, ValueError, "got 'quick'"),
        (
            {"scm_steps_policy": "static", "steps_computation_policy": "static"},
            ValueError,
            "must not both be given",
        ),
        (3, TypeError, "a path or a mapping must be given, got 3"),
        ("cache.toml", ValueError, r"\.yaml, \.yml or \.json, got 'cache\.toml'"),
        ("missing.json", FileNotFoundError, r"missing\.json"),
    ],
)
def test_refuses_what_it_does_not_know(source, error, match):
    with pytest.raises(error, match=match):
        load_configs(source)


@pytest.mark.parametrize(
    ("name", "text", "error", "match"),
    [
        ("a.json", "{", ValueError, "must be JSON"),
        ("a.yaml", "a: [", ValueError, "must be YAML"),
        ("a.yaml", "- 1", TypeError, r"a mapping of options must be given, got \[1\]"),
        ("a.yaml", "", TypeError, "got None"),
    ],
)
def test_refuses_files_that_hold_no_options(tmp_path, name, text, error, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=match):
        load_configs(tmp_path / name)


BAD = {
    "latin-1 JSON": ("a.json", '{"policy": "é"}'.encode("latin-1"), r"UTF-8, got .*save it so"),
    "latin-1 YAML": ("a.yaml", "policy: é".encode("latin-1"), r"UTF-8, got .*save it so"),
    "deep JSON": ("a.json", b"[" * 200_000, "a few levels, got a deeply nested one"),
    "deep YAML": ("a.yaml", b"[" * 20_000, "a few levels, got a deeply nested one"),
    "long number": ("a.yaml", b"max_warmup_steps: " + b"9" * 5000, "must be YAML, got Exceeds"),
    "numbers for keys": ("a.yaml", b"1: 2", "unknown option 1; known"),
    "numbers for keys of a section": ("a.yaml", b"cache_config: {1: 2}", "unknown option 1; known"),
    "a key of None": ("a.yaml", b"parallelism_config: {null: 2}", "unknown option None; known"),
    "a list for a key": ("a.yaml", b"? [1]\n: 2", "must be YAML, got .*unhashable"),
    "a value": ("a.json", b'{"Fn_compute_blocks": 0}', "Fn_compute_blocks must be .* got 0"),
    "a short exponent": ("a.yaml", b"residual_diff_threshold: 1e-2", r"in YAML .* as in 1\.0e-2"),
    "a key twice": ("a.yaml", b"a: {b: 1, c: 2, b: 1}", "the key 'b' twice"),
    "an option twice": ("a.json", b'{"policy": "dbcache", "policy": "magcache"}', "'policy' twice"),
    "a number in quotes": ("a.json", b'{"max_warmup_steps": "4"}', "write it without quotes"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_file_and_what_to_do(tmp_path, case):
    name, content, match = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises((TypeError, ValueError), match=f"(?s)^load_configs: .*{match}") as caught:
        load_configs(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.timeout(20)
def test_aliases_that_stand_for_billions_of_entries_are_refused_at_once(tmp_path):
    lines = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join([*lines, "policy: *a59"]))
    with pytest.raises(TypeError, match=r"bomb\.yaml: unknown option 'a0'"):
        load_configs(path)
    aliases = "\n".join(f"  - &a{i} [{f'*a{i - 1}, *a{i - 1}' if i else 1}]" for i in range(60))
    path.write_text(f"cache_config:\n  Bn_compute_blocks_ids:\n{aliases}")
    with pytest.raises(TypeError, match=r"bomb\.yaml: .*must be a list of block numbers, got \[\["):
        load_configs(path)


def test_parts_are_loaded_by_cache_dits_names(tmp_path):
    given = {"cache_config": {"enable_foca": True, "max_warmup_steps": 3}}
    given["parallelism_config"] = {"ring": 2}
    path = tmp_path / "all.json"
    path.write_text(json.dumps(given))
    for source in (path, given):
        config, predictor = dbcache.load_cache_config(source)
        assert (config.given, predictor.strify()) == ({"max_warmup_steps": 3}, "FoCa")
        assert dbcache.load_parallelism_config(source).ring_size == 2
    assert dbcache.load_parallelism_config(given["cache_config"]) is None
    config, predictor = dbcache.load_cache_config({"parallelism_config": {"ring": 2}})
    assert (config.given, predictor) == ({}, None)
    assert dbcache.load_options is load_configs
    with pytest.raises(TypeError, match=r"^load_cache_config: unknown option 'Fn'"):
        dbcache.load_cache_config({"Fn": 1})


def test_without_pyyaml_names_the_extra(tmp_path, monkeypatch):
    path, real = tmp_path / "cache.yaml", builtins.__import__
    path.write_text(YAML)

    def no_yaml(name, *args, **kwargs):
        if name == "yaml":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_yaml)
    with pytest.raises(ImportError, match=r"pip install 'dbcache-dit\[yaml\]'"):
        load_configs(path)


def test_enable_refuses_two_predictors():
    pipe = tiny.pipeline("flux")
    with pytest.raises(ValueError, match="together with a predictor's options"):
        dbcache.enable(pipe, calibrator_config=TaylorSeerCalibratorConfig(), enable_taylorseer=True)
    assert "_dbcache" not in pipe.__dict__


def test_a_section_says_how_ranks_share_the_model():
    given = {"ulysses": 2, "tp_size": "auto", "parallel_kwargs": {"attention_backend": "native"}}
    configs = load_configs({"cache_config": {"Fn_compute_blocks": 1}, "parallelism_config": given})
    assert configs["cache_config"].given == {"Fn_compute_blocks": 1}
    config = configs["parallelism_config"]
    assert (config.ulysses_size, config.tp_size) == (2, "auto")
    assert config.context.attention_backend == "native"
    assert load_configs({"parallelism_config": {"ring": 2}})["parallelism_config"].ring_size == 2
    assert "parallelism_config" not in load_configs({"cache_config": {}})
