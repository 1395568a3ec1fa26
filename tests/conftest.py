import pytest
import torch


class Scene:
    """A tiny pipeline and the arguments of one call: two prompts of different length, three steps, latents out."""

    STEPS = 3

    def __init__(self, name, scale=4.0, dtype=torch.float32, call=None, **variants):
        from diffgen.pipelines import CFG
        from diffgen.pipelines.guide import apply_rule
        from diffgen.table import row_for
        from diffgen.tiny import call_kwargs, tiny_pipeline

        self.name, self.pipe = name, tiny_pipeline(name, **variants).to(dtype)
        self.row = row_for(self.pipe)
        self.rule = None if scale is None else CFG(scale)
        self.call = {
            "prompt": ["a red circle", "two large blue squares left of a cross"],
            "num_inference_steps": self.STEPS,
            "output_type": "latent",
            "return_dict": False,
            **call_kwargs(name),
            **(call or {}),
        }
        self.plain = apply_rule(self.row, None, self.call)[1]  # CFG off
        if scale is not None:
            self.call.setdefault("negative_prompt", ["green", "dark background"])
        self.arguments = apply_rule(self.row, self.rule, self.call)[1]

    def run(self, arguments=None, seed=0, **more):
        """Latents of the pipeline as it is, or under whatever is opened around this call."""
        generator = torch.Generator().manual_seed(seed)
        arguments = {"generator": generator, **(self.arguments if arguments is None else arguments), **more}
        # fresh lists: Z-Image writes its chat template into the caller's
        return self.pipe(**{k: list(v) if isinstance(v, list) else v for k, v in arguments.items()})[0]

    def tapped(self, rule="own", arguments=None, options=None, **more):
        """(latents, the tap that was open)."""
        from diffgen.pipelines.guide import tap

        rule = self.rule if rule == "own" else rule
        arguments = {**(self.arguments if arguments is None else arguments), **more}
        with tap(self.pipe, rule, self.row, arguments, **(options or {})) as opened:
            latents = self.run(arguments)
        return latents, opened

    def record(self, rule="own", arguments=None, **more):
        """{step: (transition, recorded call)} of a run with a stochastic scheduler."""
        from diffgen.schedulers import stochastic

        self.pipe.scheduler = stochastic(self.pipe.scheduler)
        with self.pipe.scheduler.recording() as transitions:
            _, opened = self.tapped(rule, arguments, {"record": lambda i: True}, **more)
        return {t.index: (t, opened.recorded[t.index]) for t in transitions}


@pytest.fixture(scope="session")
def scene():
    return Scene


def relative(a, b):
    """Largest difference of two tensors relative to the largest value of the second."""
    return float(((a - b).abs().max() / b.abs().max()).detach())


@pytest.fixture(scope="session", name="relative")
def _relative():
    return relative
