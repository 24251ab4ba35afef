"""The example of docs/video.md for LongCat-Video, on a toy with its blocks' signature."""

import pathlib
import re
import textwrap

import pytest
import tiny
import torch
from torch.nn.functional import scaled_dot_product_attention as attend

import dbcache

STEPS, WIDTH, BLOCKS = 5, 16, 12
DOC = pathlib.Path(__file__).parents[2] / "docs" / "video.md"
FORCED = {
    "num_inference_steps": STEPS,
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 1,
    "residual_diff_threshold": 1.0,
}


class Block(torch.nn.Module):
    """Attention within the video and to the text, modulated per frame."""

    def __init__(self):
        super().__init__()
        self.modulation = torch.nn.Linear(8, 3 * WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.query = torch.nn.Linear(WIDTH, WIDTH)
        self.ffn = torch.nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(
        self,
        x,
        y,
        t,
        y_seqlen,
        latent_shape,
        num_cond_latents=None,
        return_kv=False,
        kv_cache=None,
        skip_crs_attn=False,
    ):
        self.calls += 1
        frames = latent_shape[0]
        shift, scale, gate = self.modulation(t).unsqueeze(2).chunk(3, dim=-1)
        inner = self.norm(x).unflatten(1, (frames, -1)) * (1 + scale) + shift
        query, key, value = self.qkv(inner.flatten(1, 2)).chunk(3, dim=-1)
        kept = key, value
        if kv_cache is not None:
            key, value = (torch.cat(pair, 1) for pair in zip(kv_cache, kept, strict=True))
        x = x + (gate * attend(query, key, value).unflatten(1, (frames, -1))).flatten(1, 2)
        if not skip_crs_attn:
            x = x + attend(self.query(x), y[:, : y_seqlen[0]], y[:, : y_seqlen[0]])
        x = x + self.ffn(self.norm(x)).tanh()
        return (x, kept) if return_kv else x


class LongCatVideoTransformer3DModel(torch.nn.Module):
    """Its loop hands on one stream; with `return_kv` the blocks' keys and values come out too."""

    def __init__(self):
        super().__init__()
        self.x_embedder = torch.nn.Linear(4, WIDTH)
        self.t_embedder = torch.nn.Linear(1, 8)
        self.y_embedder = torch.nn.Linear(tiny.TEXT_DIM, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(BLOCKS))
        self.final_layer = torch.nn.Linear(WIDTH, 4)

    def forward(
        self,
        hidden_states,
        timestep,
        encoder_hidden_states,
        num_cond_latents=0,
        return_kv=False,
        kv_cache_dict=None,
        skip_crs_attn=False,
    ):
        shape = hidden_states.shape[1:4]
        x = self.x_embedder(hidden_states.flatten(1, 3))
        t = self.t_embedder(timestep[:, None, None].expand(-1, shape[0], -1))
        y = self.y_embedder(encoder_hidden_states)
        kept, lengths = {}, [y.shape[1]]
        for index, block in enumerate(self.blocks):
            cache = (kv_cache_dict or {}).get(index)
            outputs = block(
                x, y, t, lengths, shape, num_cond_latents, return_kv, cache, skip_crs_attn
            )
            if return_kv:
                x, kept[index] = outputs
            else:
                x = outputs
        output = self.final_layer(x).unflatten(1, shape)
        return (output, kept) if return_kv else output


class Pipeline:
    """Makes a video, or continues one."""

    def __init__(self):
        self.dit = tiny.fill(LongCatVideoTransformer3DModel(), seed=3)
        self.text = tiny.noise(1, tiny.TEXT_TOKENS, tiny.TEXT_DIM, seed=1)

    @torch.no_grad()
    def generate_t2v(self, prompt, num_inference_steps, same=False, **more):
        """Return the predictions of all steps; with `same` each is for the same input."""
        x, outputs = tiny.noise(1, 2, 2, 2, 4, seed=5), []
        for step in range(num_inference_steps):
            time = torch.tensor([1.0 if same else 1 - step / num_inference_steps])
            outputs.append(self.dit(x, time, self.text, **more))
            x = x if same else x - outputs[-1] / num_inference_steps
        return outputs

    @torch.no_grad()
    def generate_vc(self, video, prompt, num_inference_steps, same=False):
        """Return the keys that were kept of `video`, and the predictions of all steps."""
        _, kept = self.dit(video, torch.zeros(1), self.text, return_kv=True, skip_crs_attn=True)
        outputs = self.generate_t2v(prompt, num_inference_steps, same, kv_cache_dict=kept)
        return [key for key, _ in kept.values()] + outputs


@pytest.fixture
def pipe():
    """A pipeline on which the example of the documentation has run."""
    pipe = Pipeline()
    section = DOC.read_text().split("## LongCat-Video")[1]
    code = re.search(r"\n\n((?:    .*\n|\n)+)", section)[1]
    exec(textwrap.dedent(code), {"pipe": pipe, "prompt": "a cat"})
    assert dbcache.summary(pipe.dit).lanes[0].steps == 50
    return pipe


def old_video():
    return tiny.noise(1, 1, 2, 2, 4, seed=9)


def test_never_caching_is_bit_identical(pipe):
    plain = Pipeline()
    dbcache.refresh_context(pipe.dit, num_inference_steps=STEPS, residual_diff_threshold=0.0)
    outputs = pipe.generate_t2v("", STEPS), pipe.generate_vc(old_video(), "", STEPS)
    expected = plain.generate_t2v("", STEPS), plain.generate_vc(old_video(), "", STEPS)
    for output, wanted in zip(outputs, expected, strict=True):
        assert all(map(torch.equal, output, wanted))


def test_each_video_is_a_request_and_the_call_that_keeps_frames_is_none_of_its_steps(pipe):
    dbcache.refresh_context(pipe.dit, **FORCED)
    for _ in range(2):
        pipe.generate_t2v("", STEPS)
        assert dbcache.summary(pipe.dit).lanes[0].cached_steps == [1, 2, 3, 4]
    for block in pipe.dit.blocks:
        block.calls = 0
    pipe.generate_vc(old_video(), "", STEPS)
    (lane,) = dbcache.summary(pipe.dit).lanes
    assert (lane.steps, lane.cached_steps) == (STEPS, [1, 2, 3, 4])
    assert [block.calls for block in pipe.dit.blocks] == [1 + STEPS] + [2] * (BLOCKS - 1)


def test_the_same_input_gives_the_same_output_full_and_cached(pipe):
    plain = Pipeline().generate_vc(old_video(), "", STEPS, same=True)
    dbcache.refresh_context(pipe.dit, **FORCED)
    pipe.generate_t2v("", STEPS)
    cached = pipe.generate_vc(old_video(), "", STEPS, same=True)
    torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-5)


def test_what_tells_filling_calls_must_be_a_function(pipe):
    adapter = dbcache.BlockAdapter(
        transformer=pipe.dit,
        blocks=pipe.dit.blocks,
        forward_pattern=dbcache.ForwardPattern.Pattern_3,
        fills="return_kv",
    )
    with pytest.raises(TypeError, match=r"BlockAdapter\.fills must be a function"):
        dbcache.enable(adapter)


@pytest.mark.parametrize("whole", [True, False])
def test_the_class_is_known_without_an_adapter(pipe, whole):
    other = Pipeline()
    target = other if whole else other.dit
    dbcache.enable(target, **FORCED)
    dbcache.refresh_context(pipe.dit, **FORCED)
    outputs = [one.generate_vc(old_video(), "", STEPS) for one in (other, pipe)]
    assert all(map(torch.equal, *outputs))
    (lane,) = dbcache.summary(target, logging=False).lanes
    assert (lane.stack, lane.cached_steps) == ("blocks", [1, 2, 3, 4])
    dbcache.disable(target)
    assert all(map(torch.equal, other.generate_t2v("", 2), Pipeline().generate_t2v("", 2)))
    assert not any("_dbcache" in part.__dict__ for part in (other, other.dit))
