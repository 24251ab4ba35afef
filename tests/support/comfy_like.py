"""Models, samplers and wrappers with ComfyUI's calling conventions; own code, same signatures.

As in ComfyUI 0.3.64 (`comfy.model_patcher`, `comfy.patcher_extension`, `comfy.samplers`). Its
blocks take `img`, `txt` or `x`, the forward of a model runs the wrappers of the type
"diffusion_model" around its own, other nodes replace blocks by `patches_replace`, ControlNet adds
to it in place.
"""

import copy
import types

import torch
from torch import nn

NOTHING: dict = {}


class Executor:
    """Calls wrappers from the outside in, then the function that they wrap."""

    def __init__(self, original, class_obj, wrappers):
        self.original, self.class_obj, self.wrappers = original, class_obj, list(wrappers)

    def execute(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        inner = Executor(self.original, self.class_obj, self.wrappers[1:])
        return self.wrappers[0](inner, *args, **kwargs)

    __call__ = execute


def wrappers_of(kind, options):
    return [w for found in options.get("wrappers", {}).get(kind, {}).values() for w in found]


class Patcher:
    """What a node is given as MODEL."""

    def __init__(self, diffusion_model):
        # a sigma of 1 to 0, as of flow matching
        sampling = types.SimpleNamespace(percent_to_sigma=lambda p: 1e9 if p <= 0 else 1.0 - p)
        self.model = types.SimpleNamespace(diffusion_model=diffusion_model, model_sampling=sampling)
        self.model_options = {"transformer_options": {}}
        self.wrappers = {}

    def clone(self):
        new = Patcher(self.model.diffusion_model)
        new.model = self.model
        new.model_options = copy.deepcopy(self.model_options)
        new.wrappers = {
            kind: {key: list(found) for key, found in wrappers.items()}
            for kind, wrappers in self.wrappers.items()
        }
        return new

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def get_wrappers(self, kind, key):
        return self.wrappers.get(kind, {}).get(key, [])

    def set_model_patch_replace(self, patch, name, block, index):
        options = self.model_options["transformer_options"]
        options.setdefault("patches_replace", {}).setdefault(name, {})[block, index] = patch


class Guider:
    """Samples with Euler steps, with both prompts in one forward or in one each.

    Args:
        patcher: the model.
        conditions: name of the condition (its uuid) to the tensor; the first is the positive one.
        batched: says per step whether all are in one forward.
        control: of a ControlNet.
        moves: whether the latents follow what the model says.
    """

    scale = 2.5

    def __init__(self, patcher, conditions, *, batched=lambda i: False, control=None, moves=True):
        self.model_patcher = patcher
        options = patcher.model_options["transformer_options"]
        self.model_options = {"transformer_options": options | {"wrappers": patcher.wrappers}}
        self.conditions, self.batched = conditions, batched
        self.control, self.moves = control, moves

    @torch.inference_mode()  # as ComfyUI runs its nodes
    def sample(self, noise, steps):
        sigmas = 1 - torch.arange(steps + 1) / steps
        wrappers = wrappers_of("outer_sample", self.model_options["transformer_options"])
        run = Executor(self._sample, self, wrappers).execute
        return run(noise, torch.zeros_like(noise), None, sigmas, None, None, True, 0)

    def _sample(self, x, latents, sampler, sigmas, mask, callback, no_bar, seed):
        for i in range(len(sigmas) - 1):
            v = self._predict(x, sigmas[i], i, sigmas)
            if self.moves:
                x = x + (sigmas[i + 1] - sigmas[i]) * v
        return x if self.moves else v

    def _predict(self, x, sigma, step, sigmas):
        names, found = list(self.conditions), {}
        groups = [names] if self.batched(step) else [[name] for name in names]
        for group in groups:
            context = torch.cat([self.conditions[name] for name in group])
            options = self.model_options["transformer_options"] | {
                "cond_or_uncond": [names.index(name) for name in group],
                "uuids": group,
                "sigmas": sigma[None],
                "sample_sigmas": sigmas,
            }
            out = self.model_patcher.model.diffusion_model(
                torch.cat([x] * len(group)),
                sigma.expand(len(group)),
                context=context,
                control=copy.deepcopy(self.control),
                transformer_options=options,
            )
            found |= zip(group, out.chunk(len(group)), strict=True)
        if len(names) == 1:
            return found[names[0]]
        cond, uncond = (found[name] for name in names)
        return uncond + self.scale * (cond - uncond)


class DoubleBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(2 * width, width), nn.Linear(2 * width, width)

    def forward(self, img, txt, vec, pe, attn_mask=None, transformer_options=NOTHING):
        seen = (txt.mean(1, keepdim=True) + vec[:, None]).expand_as(img)
        told = (img.mean(1, keepdim=True) + vec[:, None]).expand_as(txt)
        img = img + 0.3 * torch.tanh(self.a(torch.cat([img, seen], -1)))
        txt = txt + 0.3 * torch.tanh(self.b(torch.cat([txt, told], -1)))
        return img, txt


class SingleBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a = nn.Linear(width, width)

    def forward(self, x, vec, pe, attn_mask=None, transformer_options=NOTHING):
        x = x.clone()
        x += 0.3 * torch.tanh(self.a(x + vec[:, None]))
        return x


class Flux(nn.Module):
    """Double and single blocks, latents (batch, channels, height, width)."""

    def __init__(self, width=16, *, knows_time=True):
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(4, width), nn.Linear(8, width)
        self.time_in, self.final_layer = nn.Linear(1, width), nn.Linear(width, 4)
        self.double_blocks = nn.ModuleList(DoubleBlock(width) for _ in range(3))
        self.single_blocks = nn.ModuleList(SingleBlock(width) for _ in range(5))
        self.knows_time = knows_time

    def forward(
        self,
        x,
        timestep,
        context,
        y=None,
        guidance=None,
        control=None,
        transformer_options=NOTHING,
        **kwargs,
    ):
        run = Executor(self._forward, self, wrappers_of("diffusion_model", transformer_options))
        return run.execute(
            x, timestep, context, y, guidance, control, transformer_options, **kwargs
        )

    def _forward(self, x, timestep, context, y, guidance, control, transformer_options, **kwargs):
        replace = transformer_options.get("patches_replace", {}).get("dit", {})
        img, txt = self.img_in(x.flatten(2).mT), self.txt_in(context)
        vec, pe = self.time_in(timestep[:, None] * self.knows_time), None
        for i, block in enumerate(self.double_blocks):
            if ("double_block", i) in replace:

                def original(args, block=block):
                    img, txt = block(
                        img=args["img"], txt=args["txt"], vec=args["vec"], pe=args["pe"]
                    )
                    return {"img": img, "txt": txt}

                args = {"img": img, "txt": txt, "vec": vec, "pe": pe}
                out = replace["double_block", i](args, {"original_block": original})
                img, txt = out["img"], out["txt"]
            else:
                img, txt = block(img=img, txt=txt, vec=vec, pe=pe, attn_mask=None)
            if control is not None and i < len(control["input"]):
                img += control["input"][i]
        img = torch.cat((txt, img), 1)
        for i, block in enumerate(self.single_blocks):
            if ("single_block", i) in replace:

                def original(args, block=block):
                    return {"img": block(args["img"], vec=args["vec"], pe=args["pe"])}

                args = {"img": img, "vec": vec, "pe": pe}
                img = replace["single_block", i](args, {"original_block": original})["img"]
            else:
                img = block(img, vec=vec, pe=pe, attn_mask=None)
            if control is not None and i < len(control["output"]):
                img[:, txt.shape[1] :] += control["output"][i]
        return self.final_layer(img[:, txt.shape[1] :]).mT.unflatten(2, x.shape[2:])


class WanBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a = nn.Linear(2 * width, width)

    def forward(self, x, e, freqs, context, context_img_len=257, transformer_options=NOTHING):
        x = x.contiguous()
        seen = (context.mean(1, keepdim=True) + e[:, None]).expand_as(x)
        y = torch.tanh(self.a(torch.cat([x, seen], -1)))
        x = torch.addcmul(x, y, torch.tensor(0.3))
        return x


class WanModel(nn.Module):
    """One list of blocks, latents (batch, channels, frames, height, width)."""

    def __init__(self, width=16):
        super().__init__()
        self.patch_embedding, self.text_embedding = nn.Linear(4, width), nn.Linear(8, width)
        self.time_embedding, self.head = nn.Linear(1, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(WanBlock(width) for _ in range(6))

    def forward(
        self,
        x,
        timestep,
        context,
        clip_fea=None,
        time_dim_concat=None,
        transformer_options=NOTHING,
        **kwargs,
    ):
        run = Executor(self._forward, self, wrappers_of("diffusion_model", transformer_options))
        return run.execute(
            x, timestep, context, clip_fea, time_dim_concat, transformer_options, **kwargs
        )

    def _forward(
        self, x, timestep, context, clip_fea, time_dim_concat, transformer_options, **kwargs
    ):
        replace = transformer_options.get("patches_replace", {}).get("dit", {})
        shape = x.shape[2:]
        x, context = self.patch_embedding(x.flatten(2).mT), self.text_embedding(context)
        e = self.time_embedding(timestep[:, None])
        for i, block in enumerate(self.blocks):
            if ("double_block", i) in replace:

                def original(args, block=block):
                    return {
                        "img": block(
                            args["img"], context=args["txt"], e=args["vec"], freqs=args["pe"]
                        )
                    }

                args = {"img": x, "txt": context, "vec": e, "pe": None}
                x = replace["double_block", i](args, {"original_block": original})["img"]
            else:
                x = block(x, e=e, freqs=None, context=context, context_img_len=None)
        return self.head(x).mT.unflatten(2, shape)
