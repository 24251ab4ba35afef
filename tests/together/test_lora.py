"""LoRA: adapters that change within a request restart its lanes; between requests they do not."""

import pytest
import tiny
import torch

import dbcache

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

LISTS = tiny.FAMILIES["flux"].lists
ON = {"Fn_compute_blocks": 1, "residual_diff_threshold": 1.0, "max_warmup_steps": 1}


def with_adapter(model, name, seed):
    """Add a LoRA adapter whose weights are not those of a new one, which does nothing."""
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"])
    model.add_adapter(config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, weight in model.named_parameters():
        if f".{name}." in parameter_name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    return model


def both(family="flux"):
    model = with_adapter(tiny.FAMILIES[family].build(), "first", 1)
    with_adapter(model, "second", 2).set_adapters("first")
    return model.requires_grad_(False)


CHANGES = {
    "another one": lambda model: model.set_adapters("second"),
    "both": lambda model: model.set_adapters(["first", "second"]),
    "scale": lambda model: model.set_adapters("first", 0.3),
    "scale of blocks": lambda model: model.set_adapters("first", [{"transformer_blocks": 0.5}]),
    "off": lambda model: model.disable_adapters(),
    "deleted": lambda model: model.delete_adapters("first"),
    "fused": lambda model: model.fuse_lora(lora_scale=0.5),
    "unloaded": lambda model: model.unload_lora(),
    "a third one": lambda model: with_adapter(model, "third", 3),
}


@torch.no_grad()
def run(model, family, change, at=3, steps=6):
    """Denoise, with a change before the step `at`; return all outputs."""
    x, outputs = tiny.noise(*family.latent_shape, seed=5), []
    for step in range(steps):
        if step == at:
            change(model)
        with model.cache_context("cond"):
            outputs.append(model(**family.arguments(x, 1 - step / steps, "cond"))[0])
        x = x - outputs[-1] / steps
    return outputs


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_within_a_request_makes_the_next_step_full(kind):
    family = tiny.FAMILIES["flux"]
    model = dbcache.enable(both(), num_inference_steps=6, **ON)
    outputs = run(model, family, CHANGES[kind])
    summary = dbcache.summary(model)
    assert summary[0].cached_steps == [1, 2, 4, 5]
    assert "since the adapters of LoRA changed" in str(summary)
    # that step is what the changed model makes of what it gets, to the last bit
    plain = both()
    CHANGES[kind](plain)
    x = tiny.noise(*family.latent_shape, seed=5)
    for output in outputs[:3]:
        x = x - output / 6
    with torch.no_grad():
        expected = plain(**family.arguments(x, 0.5, "cond"))[0]
    assert torch.equal(outputs[3], expected)


def weights(model, seed):
    """Return those of an adapter of two layers, as a file has them."""
    layers = [(f"{name}.0.attn.to_q", model.get_submodule(f"{name}.0.attn.to_q")) for name in LISTS]
    sizes = {"A": lambda layer: (2, layer.in_features), "B": lambda layer: (layer.out_features, 2)}
    return {
        f"transformer.{name}.lora_{side}.weight": tiny.noise(*size(layer), seed=seed)
        for name, layer in layers
        for side, size in sizes.items()
    }


@pytest.mark.parametrize("target", ["pipeline", "model"])
def test_weights_that_are_exchanged_within_an_adapter(target):
    pipe = tiny.pipeline("flux")
    model, family = pipe.transformer, tiny.FAMILIES["flux"]
    pipe.load_lora_weights(weights(model, 1), adapter_name="one")

    def swap(*_):
        pipe.load_lora_weights(weights(model, 2), adapter_name="one", hotswap=True)
        return {}

    dbcache.enable(pipe if target == "pipeline" else model, num_inference_steps=4, **ON)
    for change, cached in ((swap, [1, 3]), (lambda *_: {}, [1, 2, 3])):
        if target == "model":
            run(model, family, change, at=2, steps=4)
        else:
            pipe(
                prompt_embeds=tiny.noise(1, tiny.TEXT_TOKENS, tiny.TEXT_DIM, seed=11),
                pooled_prompt_embeds=tiny.noise(1, 12, seed=12),
                height=64, width=64, num_inference_steps=4, output_type="latent",
                callback_on_step_end=lambda p, i, *_, f=change: f() if i == 1 else {},
            )  # fmt: skip
        assert dbcache.summary(pipe if target == "pipeline" else model)[0].cached_steps == cached
    dbcache.disable(pipe if target == "pipeline" else model)
    assert "load_lora_adapter" not in vars(model)


def test_a_scale_that_is_put_on_and_taken_off_in_each_call_is_no_change():
    """diffusers multiplies by it and divides by it, which need not give the same number."""
    assert (1 / 5) * 0.35 / 0.35 != 1 / 5
    model, family = tiny.flux(), tiny.FAMILIES["flux"]
    model.add_adapter(peft.LoraConfig(r=5, lora_alpha=1, target_modules=["to_q"]))
    dbcache.enable(model.requires_grad_(False), num_inference_steps=4, **ON)
    with torch.no_grad():
        for step in range(4):
            given = family.arguments(tiny.noise(1, 16, 16, seed=5), 1 - step / 4, "cond")
            model(**given, joint_attention_kwargs={"scale": 0.35})
    summary = dbcache.summary(model)
    assert summary[0].cached_steps == [1, 2, 3]
    assert "LoRA" not in str(summary)


def test_an_adapter_that_is_in_no_layer_of_another():
    model = with_adapter(tiny.flux(), "first", 1)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"]), adapter_name="second")
    model.set_adapters(["first", "second"], [1.0, 1.0])
    dbcache.enable(model.requires_grad_(False), num_inference_steps=6, **ON)
    weaken = lambda model: model.set_adapters(["first", "second"], [1.0, 0.3])  # noqa: E731
    run(model, tiny.FAMILIES["flux"], weaken)
    assert dbcache.summary(model)[0].cached_steps == [1, 2, 4, 5]


def test_no_change_and_changes_between_requests_cost_nothing():
    pipe = tiny.pipeline("wan")
    with_adapter(pipe.transformer, "first", 1)
    with_adapter(pipe.transformer, "second", 2).set_adapters("first")
    dbcache.enable(pipe, **ON)
    for change in (lambda model: None, *list(CHANGES.values())[:3], CHANGES["unloaded"]):
        change(pipe.transformer)
        tiny.generate(pipe, 4, guided=True)
        summary = dbcache.summary(pipe)
        assert [lane.cached_steps for lane in summary] == [[1, 2, 3]] * 2
        assert "LoRA" not in str(summary)


def test_a_callback_of_the_pipeline_may_change_them():
    pipe = tiny.pipeline("flux")
    with_adapter(pipe.transformer, "first", 1)
    dbcache.enable(pipe, **ON)

    def weaken(pipe, step, _, tensors):
        if step == 1:
            pipe.transformer.set_adapters("first", 0.1)
        return {}

    pipe(
        prompt_embeds=tiny.noise(1, tiny.TEXT_TOKENS, tiny.TEXT_DIM, seed=11),
        pooled_prompt_embeds=tiny.noise(1, 12, seed=12),
        height=64, width=64, num_inference_steps=5, output_type="latent",
        callback_on_step_end=weaken,
    )  # fmt: skip
    assert dbcache.summary(pipe)[0].cached_steps == [1, 3, 4]
