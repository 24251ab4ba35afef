"""The rules of EasyCache, TeaCache, SeaCache and MagCache, once more in plain torch and NumPy.

Written from the papers' formulas, with the oracle's own loop over the blocks: no code of dbcache.
"""

import numpy
import oracle
import torch


def mean_abs(x) -> float:
    """Return mean|x| in float64."""
    return x.detach().double().abs().mean().item()


def filtered(x: torch.Tensor, sigma: float, axes: tuple[int, ...]) -> torch.Tensor:
    """Return one sample with SeaCache's gain along `axes`, by NumPy in float64."""
    power = 3 if len(axes) == 3 else 2
    sigma = min(max(sigma, 1e-6), 1 - 1e-6)
    gain = numpy.ones([1] * x.ndim)
    for axis in axes:
        n = x.shape[axis]
        k = numpy.minimum(numpy.arange(n), n - numpy.arange(n)) / n
        clean = 1 / (k**power + 1e-16)
        along = (1 - sigma) * clean / ((1 - sigma) ** 2 * clean + sigma**2 + 1e-16)
        gain = gain * along.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    gain = gain / gain.mean()
    spectrum = numpy.fft.fftn(x.detach().double().numpy(), axes=axes)
    return torch.from_numpy(numpy.fft.ifftn(spectrum * gain, axes=axes).real)


class State:
    """What a policy remembers of one lane."""

    def __init__(self):
        self.before = None  # what the step before measured
        self.full: list[tuple[torch.Tensor, torch.Tensor]] = []  # (input, output) of full steps
        self.ratio = 1.0


class PolicyOracle(oracle.Oracle):
    """An oracle whose steps are decided before the first block.

    Args:
        family: the tiny family that `model` is of.
        coefficients: TeaCache's polynomial, from the highest power down.
        ratios: MagCache's ratios by branch, one per step.
    """

    def __init__(self, model, family, rule, coefficients=None, ratios=None):
        super().__init__(model, family.lists, family.encoder_first, rule)
        self.family, self.coefficients, self.ratios = family, coefficients, ratios
        self.states: dict[int, State] = {}

    def __enter__(self):
        super().__enter__()
        self.plain_forward = self.model.forward
        self.model.forward = self.forward
        return self

    def __exit__(self, *error):
        del self.model.forward
        super().__exit__(*error)

    def forward(self, *args, **kwargs):
        """Note what goes in and what comes out of the transformer."""
        self.called_with = kwargs
        output = self.plain_forward(*args, **kwargs)
        if self.full:
            self.state.full.append((kwargs["hidden_states"].clone(), output[0].clone()))
        return output

    def after_probe(self, hidden, encoder):
        """Decide, before any block has run."""
        lane, self.hidden, self.encoder = self.lane, hidden, encoder
        self.state = self.states.setdefault(id(lane), State())
        now, step = getattr(self, self.rule.policy)(hidden), self.step
        before, state = self.state.before, self.state
        if self.rule.policy == "magcache":
            names = {id(lane): name for name, lane in self.requests[-1].items()}
            branch = names[id(lane)] or ""
            state.ratio *= self.ratios[branch][min(step, len(self.ratios[branch]) - 1)]

        def change() -> float | str:
            if lane.reference is None:
                return "no reference"
            if self.rule.policy == "magcache":
                return abs(1 - state.ratio)
            if self.rule.policy == "easycache":
                if len(state.full) < 2:
                    return "no reference"
                (x_old, v_old), (x, v) = state.full[-2:]
                rate = mean_abs(v.double() - v_old.double()) / mean_abs(x.double() - x_old.double())
                return rate * mean_abs(now.double() - before.double()) / mean_abs(v)
            change = mean_abs(now.double() - before.double()) / mean_abs(before)
            if self.rule.batch_reduce == "max":
                pairs = zip(now.double(), before.double(), strict=True)
                change = max(mean_abs(a - b) / mean_abs(b) for a, b in pairs)
            if self.rule.policy == "teacache":
                return sum(c * change**i for i, c in enumerate(self.coefficients[::-1]))
            return change

        self.full = lane.decider.decide(change)
        state.before = now
        if self.full:
            lane.reference, state.ratio = hidden, 1.0

    def easycache(self, hidden):
        """What is compared: the latents."""
        return self.called_with["hidden_states"].clone()

    def magcache(self, hidden):
        """Nothing is compared."""

    def teacache(self, hidden):
        """What is compared: the first block's modulated input, or the embedding of the time."""
        block, (args, kwargs) = self.blocks[0], self.block_arguments
        temb = kwargs["temb"] if "temb" in kwargs else args[0]
        if self.family.name == "wan":
            return temb.clone()
        linear, norm = (
            (block.norm1.linear, block.norm1.norm)
            if self.family.name == "flux"
            else (block.img_mod[1], block.img_norm1)
        )
        modulation = linear(torch.nn.functional.silu(temb))
        shift, scale = (modulation[:, i * 32 : (i + 1) * 32].unsqueeze(1) for i in range(2))
        return norm(hidden) * (1 + scale) + shift

    def seacache(self, hidden):
        """What is compared: the filtered latents."""
        x, t = self.called_with["hidden_states"], self.called_with["timestep"]
        if self.family.name == "wan":
            samples = [filtered(a, s / 1000, (1, 2, 3)) for a, s in zip(x, t.tolist(), strict=True)]
        else:
            shaped = x.unflatten(1, (4, 4))
            samples = [filtered(a, s, (0, 1)) for a, s in zip(shaped, t.tolist(), strict=True)]
        return torch.stack(samples)
