"""The nodes, on models and samplers with ComfyUI's calling conventions."""

from collections import Counter

import comfy_like
import pytest
import tiny
import torch

import dbcache
from dbcache.integrations import comfyui
from dbcache.integrations.comfyui.sampling import lane_of

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

PROMPTS = {"a": tiny.noise(1, 5, 8, seed=1), "b": tiny.noise(1, 5, 8, seed=2)}
ALWAYS = {"preset": "balanced", "threshold": 1.0, "warmup_steps": 2, "predictor": "none"}
IN_A_ROW = {"Flux": -1, "WanModel": 3}
"""Cached steps in a row that the presets allow."""

SHAPES = {"Flux": (1, 4, 4, 4), "WanModel": (1, 4, 3, 2, 2)}
LISTS = {"Flux": ("double_blocks", "single_blocks"), "WanModel": ("blocks",)}


def model(name="Flux", **options):
    torch.manual_seed(0)
    return comfy_like.Patcher(getattr(comfy_like, name)(**options).eval())


def cached(patcher, **inputs):
    node = comfyui.NODE_CLASS_MAPPINGS["DBCache"]()
    known = {name for part in node.INPUT_TYPES().values() for name in part}
    assert set(inputs) <= known
    return getattr(node, node.FUNCTION)(model=patcher, **inputs)[0]


def shown(patcher):
    node = comfyui.NODE_CLASS_MAPPINGS["DBCacheSummary"]()
    latent, text = getattr(node, node.FUNCTION)(model=patcher, latent={"samples": 1})["result"]
    assert latent == {"samples": 1}
    return text


def lanes(text):
    """Return (stack, branch) to (steps, cached steps), as the text of a summary says."""
    rows = [line.split("  ") for line in text.splitlines() if line.count("  ") > 4]
    table = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {(row[0], row[1]): (int(row[3]), int(row[4])) for row in table[1:]}


@torch.no_grad()
def by_hand(name, patcher, steps, batched):
    """Return what a sampling gives with `dbcache.enable` alone: own adapter, loop and lanes."""
    module, x = patcher.model.diffusion_model, tiny.noise(*SHAPES[name], seed=3)
    patterns = [dbcache.ForwardPattern.Pattern_0, dbcache.ForwardPattern.Pattern_3][
        -len(LISTS[name]) :
    ]
    adapter = dbcache.BlockAdapter(
        transformer=module,
        blocks=[getattr(module, path) for path in LISTS[name]],
        forward_pattern=patterns,
        streams=[("img", "txt"), ("x",)][-len(LISTS[name]) :],
    )
    options = {"Fn_compute_blocks": 1, "max_continuous_cached_steps": IN_A_ROW[name]}
    dbcache.enable(adapter, max_warmup_steps=2, residual_diff_threshold=1.0, **options)
    request = dbcache.start_request(module)
    for i in range(steps):
        t, found = torch.tensor([1 - i / steps]), []
        for group in ["ab"] if batched(i) else ["a", "b"]:
            with request.branch(group, step_index=i):
                context = torch.cat([PROMPTS[key] for key in group])
                found += module(torch.cat([x] * len(group)), t.repeat(len(group)), context=context)
        x = x - (found[1] + 2.5 * (found[0] - found[1]))[None] / steps
    request.close()
    dbcache.disable(module)
    return x


@pytest.mark.parametrize("name", ["Flux", "WanModel"])
def test_blocks_are_cached_while_a_model_samples(name):
    patcher = model(name)
    module, noise = patcher.model.diffusion_model, tiny.noise(*SHAPES[name], seed=3)
    own, calls = dict(module.__dict__), Counter()
    for path in LISTS[name]:
        for i, block in enumerate(getattr(module, path)):
            block.register_forward_hook(lambda *_, key=(path, i): calls.update([key]))
    plain = comfy_like.Guider(patcher, PROMPTS).sample(noise, 14)

    node = cached(patcher, **ALWAYS)
    assert patcher.model_options == {"transformer_options": {}}
    assert shown(node) == "nothing was sampled yet"
    never = cached(patcher, **(ALWAYS | {"threshold": 0.0}))
    assert torch.equal(comfy_like.Guider(never, PROMPTS).sample(noise, 14), plain)

    most = 12 if name == "Flux" else 9
    # free memory decides whether both prompts are in one forward, and may change
    for batched, full in (
        (lambda i: False, {"cond": (14, most), "uncond": (14, most)}),
        (lambda i: True, {"cond+uncond": (14, most)}),
        (
            lambda i: i >= 4,
            {"cond": (4, 2), "uncond": (4, 2), "cond+uncond": (10, 8 if name == "Flux" else 6)},
        ),
    ):
        calls.clear()
        image = comfy_like.Guider(node, PROMPTS, batched=batched).sample(noise, 14)
        ran = dict(calls)
        text = shown(node)
        found = lanes(text)
        assert found == {(p, lane): n for p in LISTS[name] for lane, n in full.items()}
        forwards = sum(steps for steps, _ in full.values())
        skipped = sum(count for _, count in full.values())
        for path in LISTS[name]:
            last = len(getattr(module, path)) - 1
            assert (ran[path, 0], ran[path, last]) == (forwards, forwards - skipped)
        assert torch.allclose(image, by_hand(name, patcher, 14, batched), atol=1e-6)
        assert not torch.equal(image, plain)
        assert module.__dict__ == own
    assert torch.equal(comfy_like.Guider(patcher, PROMPTS).sample(noise, 14), plain)


def test_other_nodes_patches_and_controlnet_keep_working():
    """A model that does not know the time, and latents that stand still: all steps are alike."""
    patcher = model(knows_time=False)
    seen = Counter()

    def patch(args, extra):
        seen["patch"] += 1
        out = extra["original_block"](args)
        return out | {"img": out["img"] * 1.5}

    for block, index in (("double_block", 1), ("double_block", 2), ("single_block", 3)):
        patcher.set_model_patch_replace(patch, "dit", block, index)
    control = {
        "input": [tiny.noise(1, 16, 16, seed=i) for i in range(3)],
        "output": [tiny.noise(1, 16, 16, seed=9 + i) for i in range(2)],
    }
    noise, options = tiny.noise(*SHAPES["Flux"], seed=3), {"control": control, "moves": False}
    node = cached(patcher, **ALWAYS)
    for prompts in ({"a": PROMPTS["a"]}, PROMPTS):
        plain = comfy_like.Guider(patcher, prompts, **options).sample(noise, 1)
        seen.clear()
        image = comfy_like.Guider(node, prompts, **options).sample(noise, 14)  # the last is cached
        assert torch.allclose(image, plain, atol=1e-5)
        assert all(count == (14, 12) for count in lanes(shown(node)).values())
        assert seen["patch"] == 14 * 3 * len(prompts)
        other = comfy_like.Guider(node, prompts, moves=False).sample(noise, 14)
        assert not torch.allclose(other, plain, atol=1e-2)


def test_nodes_after_it_share_the_cache_and_its_summary():
    patcher, noise = model(), tiny.noise(*SHAPES["Flux"], seed=3)
    node = cached(patcher, **ALWAYS)
    image = comfy_like.Guider(node, PROMPTS).sample(noise, 6)
    later = node.clone()  # as LoRA and other patches of a model do
    later.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "x", 1)
    assert torch.equal(comfy_like.Guider(later, PROMPTS).sample(noise, 6), image)
    comfy_like.Guider(later, {"a": PROMPTS["a"]}).sample(noise, 14)
    assert shown(node) == shown(later)
    assert lanes(shown(node)) == {(p, "cond"): (14, 12) for p in LISTS["Flux"]}
    with pytest.raises(ValueError, match="must not be cached yet"):
        cached(later, preset="fast")
    assert shown(patcher) == "no DBCache node is connected"


def test_lanes_are_known_by_prompt_and_side():
    """A prompt for an area gives its uuid to the negative one that ComfyUI makes for the area."""
    names, calls = {}, [([1], "n"), ([0], "p"), ([0], "area"), ([1], "area"), ([1, 0], "np")]
    seen = ["uncond", "cond", "cond (2)", "uncond (2)", "uncond+cond"]
    for _ in range(2):
        for (kinds, uuids), name in zip(calls, seen, strict=True):
            options = {"cond_or_uncond": kinds, "uuids": list(uuids)}
            assert lane_of(names, (None, options)) == name
    assert lane_of(names, ({}, None)) is None


def test_caching_begins_and_ends_where_the_node_says():
    patcher, noise = model("WanModel"), tiny.noise(*SHAPES["WanModel"], seed=3)
    node = cached(patcher, **ALWAYS, start_percent=0.4, end_percent=0.8)
    comfy_like.Guider(node, {"a": PROMPTS["a"]}).sample(noise, 14)
    # of sigmas from 1 on, those above 0.6 are before the start, 0.2 and below after the end
    assert lanes(shown(node)) == {("blocks", "cond"): (14, 5)}
    named = cached(patcher, preset="fast", start_percent=0.5)  # 10 steps: its mask is "fast"
    comfy_like.Guider(named, {"a": PROMPTS["a"]}).sample(noise, 10)
    assert 0 < lanes(shown(named))["blocks", "cond"][1] <= 5


@pytest.mark.filterwarnings("ignore:.*leaves none of the")
def test_presets_predictors_and_policies_are_those_of_enable():
    noise = tiny.noise(*SHAPES["Flux"], seed=3)
    seen = []

    class Spy(comfy_like.Flux):
        def _forward(self, *args, **kwargs):
            seen.append(dbcache.strify(self))
            return super()._forward(*args, **kwargs)

    torch.manual_seed(0)
    patcher = comfy_like.Patcher(Spy().eval())
    for inputs in (
        {"preset": "high"},
        {"preset": "balanced", "threshold": 0.3, "predictor": "foca"},
        {"preset": "fast", "policy": "easycache", "warmup_steps": 3},
    ):
        seen.clear()
        comfy_like.Guider(cached(patcher, **inputs), PROMPTS).sample(noise, 20)
        expected = dbcache.preset("flux", inputs["preset"], num_inference_steps=20)
        config = expected["cache_config"]
        policy = inputs.get("policy", config.policy)
        threshold = inputs.get("threshold", config.residual_diff_threshold)
        warmup = inputs.get("warmup_steps", config.max_warmup_steps)
        label = {"dbcache": "DBCache", "easycache": "EasyCache"}[policy]
        assert seen[0].startswith(f"{label}_")
        assert f"_R{threshold:g}" in seen[0]
        assert f"_W{warmup}I" in seen[0]
        assert ("foca" in seen[0].lower()) == ("predictor" in inputs)
    node = comfyui.NODE_CLASS_MAPPINGS["DBCache"]
    inputs = {name: kind for part in node.INPUT_TYPES().values() for name, kind in part.items()}
    assert inputs["preset"][0] == ["balanced", "high", "fast"]
    # ComfyUI checks values only against what is a list
    assert [name for name, kind in inputs.items() if not isinstance(kind[0], str)] == [
        name for name, kind in inputs.items() if isinstance(kind[0], list)
    ]
    with pytest.raises(ValueError, match="end_percent"):
        cached(patcher, preset="high", end_percent=1.5)
    with pytest.raises(ValueError, match="level must be one of"):
        cached(patcher, preset="best")
    with pytest.raises(ValueError, match="must not be cached yet"):
        cached(cached(patcher, preset="fast"), preset="fast")


def test_a_sampling_that_ends_early_or_within_another_leaves_nothing(caplog):
    patcher, noise = model("WanModel"), tiny.noise(*SHAPES["WanModel"], seed=3)
    module, node = patcher.model.diffusion_model, cached(patcher, **ALWAYS)
    own = dict(module.__dict__)

    class Interrupted(comfy_like.Guider):
        until = 1

        def _predict(self, x, sigma, step, sigmas):
            if step == self.until:
                raise InterruptedError
            return super()._predict(x, sigma, step, sigmas)

    for Interrupted.until in (1, 3):
        with pytest.raises(InterruptedError):
            Interrupted(node, PROMPTS).sample(noise, 14)
    assert module.__dict__ == own
    assert lanes(shown(node))["blocks", "cond"] == (3, 1)
    assert caplog.text == ""

    class Nested(comfy_like.Guider):
        def _predict(self, x, sigma, step, sigmas):
            if step == 5:
                comfy_like.Guider(node, {"c": PROMPTS["a"]}).sample(noise, 4)
                assert dbcache.is_enabled(module)
            return super()._predict(x, sigma, step, sigmas)

    alone = comfy_like.Guider(node, PROMPTS).sample(noise, 14)
    assert torch.allclose(Nested(node, PROMPTS).sample(noise, 14), alone)
    assert module.__dict__ == own

    comfy_like.Guider(cached(patcher, **(ALWAYS | {"warmup_steps": 20})), PROMPTS).sample(noise, 6)
    assert "in 6 steps: all of them were fixed as full by warm-up" in caplog.text
    unet = cached(comfy_like.Patcher(torch.nn.Conv2d(4, 4, 1)), preset="fast")
    with pytest.raises(ValueError, match="must have a ModuleList of blocks"):
        comfy_like.Guider(unet, PROMPTS).sample(noise, 4)
