"""What training does on "shapes"."""

from __future__ import annotations

from typing import Any

from diffgen.claims import Check, Claim


def _flow_grpo(seed: int) -> dict[str, Any]:
    """Held-out verifier accuracy (480 samples, no guidance, no noise) before and after the default recipe."""
    import tempfile

    from diffgen.training import Trainer, load_config
    from diffgen.worlds import shapes

    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"output_dir={folder}", f"seed={seed}", "checkpoint.every=0", "logging.tracker=none"]
        trainer = Trainer(load_config("shapes_flow_grpo", overrides))
        prompts = shapes.prompts(480, seed=999, split="held_out")
        before = shapes.verify(trainer.draw(prompts, seed=seed), prompts).mean()
        trainer.fit()
        after = shapes.verify(trainer.draw(prompts, seed=seed), prompts).mean()
    return {"accuracy": (before, after)}


CLAIMS: dict[str, Claim] = {
    "flow_grpo_shapes": Claim(
        text="Flow-GRPO raises verifier accuracy on prompts whose colour-shape pairs were never trained on",
        budget="configs/shapes_flow_grpo.yaml, at most 20 minutes a seed on one core",
        measure=_flow_grpo,
        checks={
            "accuracy": Check(
                "at least 25 points more", "share of 480 held-out samples that pass the verifier", margin=0.25
            )
        },
    ),
}
