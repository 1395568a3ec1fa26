"""What guidance rules do on "shapes": accuracy by the exact verifier, colours, distance to the data, denoiser evaluations."""

from __future__ import annotations

import functools
from typing import Any

import torch

from diffgen.claims import Check, Claim
from diffgen.pipelines import (
    APG,
    CFG,
    FDG,
    PAG,
    SEG,
    SLG,
    TCFG,
    AdaptiveGuidance,
    AutoGuidance,
    Guidance,
    Interval,
    LinearAG,
    MaG,
    Scheduled,
    ZeroStar,
    draw,
)
from diffgen.pipelines.draw import Drawn

N, STEPS = 240, 20
ACCURACY = f"share of {N} samples that pass the verifier"
SATURATION = "mean saturation, 0 to 1"
CLIPPED = "share of clipped values"
DISTANCE = f"Fréchet distance of {N} samples to 2,000 true images, EfficientNet-Lite0 features"
PSNR = "dB, PSNR to the images of CFG at 20 steps"
COST = "denoiser rows a sample"


@functools.cache
def _pipe():
    from diffgen.loading import load

    return load("shapes")


@functools.cache
def _reference() -> torch.Tensor:
    from diffgen.eval.extractors import get_extractor
    from diffgen.worlds import shapes

    images, _ = shapes.dataset(2000, seed=31, split="all")
    return get_extractor("efficientnet-lite0")(torch.from_numpy(images))


def _prompts(seed: int, n: int = N) -> list[str]:
    """Prompts of all colour-shape pairs; those that something is fitted on come from other seeds."""
    from diffgen.worlds import shapes

    return shapes.prompts(n, seed=seed, split="all")


def _sample(rule: Guidance, seed: int, steps: int = STEPS) -> Drawn:
    return draw(_pipe(), rule, _prompts(seed), seed=seed, num_inference_steps=steps)


def _measure(drawn: Drawn, seed: int, reference: Drawn | None = None) -> dict[str, float]:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    from diffgen.eval import functional
    from diffgen.eval.extractors import get_extractor
    from diffgen.worlds import shapes

    found = {
        "nfe": drawn.nfe,
        "ms": 1000 * drawn.seconds,
        "accuracy": float(shapes.verify(drawn.images, _prompts(seed)).mean()),
        "saturation": float(functional.saturation(drawn.images).mean()),
        "clipped": float(functional.clipping(drawn.images).mean()),
        "fd": functional.fd(get_extractor("efficientnet-lite0")(drawn.images), _reference()),
    }
    if reference is not None:
        ours, theirs = drawn.images.float(), reference.images.float()
        psnr = peak_signal_noise_ratio(ours, theirs, data_range=255.0, reduction="none", dim=(1, 2, 3))
        ssim: Any = structural_similarity_index_measure(ours, theirs, data_range=255.0)
        found |= {"psnr": float(psnr.clamp_max(60).mean()), "ssim": float(ssim)}
    return {k: round(v, 5) for k, v in found.items()}


# --- APG ---------------------------------------------------------------------------------------------------------

SCALES = (2.0, 4.0, 8.0, 12.0, 16.0)
HIGH = (8.0, 12.0, 16.0)


def _apg(seed: int) -> dict[str, Any]:
    rules = {"cfg": CFG(), "apg": APG(eta=0.0, momentum=-0.5, norm_threshold="auto")}
    curves = {
        name: [{"scale": w} | _measure(_sample(rule.with_scale(w), seed), seed) for w in SCALES]
        for name, rule in rules.items()
    }

    def least(measure: str) -> tuple[float, float]:
        """(CFG, APG) at the high scale where APG helps least."""
        sign = 1 if measure == "accuracy" else -1
        both = [(c[measure], a[measure]) for c, a in zip(*curves.values()) if c["scale"] in HIGH]
        return min(both, key=lambda pair: sign * (pair[1] - pair[0]))

    pairs = {m: least(m) for m in ("accuracy", "saturation", "clipped", "fd")}
    return pairs | {"details": {"curves": curves}}


# --- AG and LinearAG ---------------------------------------------------------------------------------------------


def _ag(seed: int) -> dict[str, Any]:
    rule = AdaptiveGuidance(CFG(3.0), warmup=2).calibrated(
        _pipe(), _prompts(1000 + seed, 128), saving=0.27, batch_size=64, num_inference_steps=STEPS
    )
    cfg, ag = _sample(CFG(3.0), seed), _sample(rule, seed)
    before, after = _measure(cfg, seed), _measure(ag, seed, cfg)
    conditional = _measure(_sample(Interval(CFG(3.0), 0.0, 1 / STEPS), seed), seed, cfg)
    pairs = {m: (before[m], after[m]) for m in ("nfe", "accuracy", "fd")}
    pairs["saved"] = (0.0, 1 - after["nfe"] / before["nfe"])
    pairs["time"] = (1 - after["nfe"] / before["nfe"], 1 - after["ms"] / before["ms"])
    details = {"threshold": rule.threshold, "cfg": before, "ag": after, "guided at the first step only": conditional}
    return pairs | {"details": details}


def _linear_ag(seed: int) -> dict[str, Any]:
    policies = {
        "every 2, until 0.5 (the paper's)": (2, 0.5),
        "every 2, until 0.4": (2, 0.4),
        "every 3, until 0.5": (3, 0.5),
    }
    fitted = LinearAG(CFG(3.0)).fitted(_pipe(), _prompts(1000 + seed, 192), batch_size=64, num_inference_steps=STEPS)
    cfg = _sample(CFG(3.0), seed)
    found = {"cfg": _measure(cfg, seed)}
    for name, (every, until) in policies.items():
        rule = LinearAG(CFG(3.0), fitted.coefficients, every=every, until=until)
        found[name] = _measure(_sample(rule, seed), seed, cfg)
    fewer = {f"cfg, {n} steps": _measure(_sample(CFG(3.0), seed, n), seed, cfg) for n in (12, 13)}
    first = {
        f"cfg at the first {n} steps": _measure(_sample(Interval(CFG(3.0), 0, n / STEPS), seed), seed, cfg)
        for n in (4, 5)
    }
    ours, theirs, cut = found["every 2, until 0.4"], fewer["cfg, 12 steps"], first["cfg at the first 4 steps"]
    assert ours["nfe"] == theirs["nfe"] == cut["nfe"] == 24
    pairs = {
        "saved": (0.0, 1 - ours["nfe"] / found["cfg"]["nfe"]),
        "psnr": (theirs["psnr"], ours["psnr"]),
        "truncated": (cut["psnr"], ours["psnr"]),
        "accuracy": (theirs["accuracy"], ours["accuracy"]),
    }
    assert not isinstance(fitted.coefficients, (str, type(None)))
    return pairs | {"details": {**found, **fewer, **first, "r2": [round(x, 6) for x in fitted.coefficients.r2[1:]]}}


# --- reported, whatever they do ----------------------------------------------------------------------------------


def _reported(text: str, rules: dict[str, Guidance]) -> Claim:
    """Each rule against CFG at its scale."""

    def measure(seed: int) -> dict[str, Any]:
        cfg = {w: _measure(_sample(CFG(w), seed), seed) for w in sorted({r.scale for r in rules.values()})}
        found = {name: _measure(_sample(rule, seed), seed) for name, rule in rules.items()}
        pairs = {f"{k}: {m}": (cfg[r.scale][m], found[k][m]) for k, r in rules.items() for m in ("accuracy", "fd")}
        return pairs | {"details": {f"cfg {w:g}": v for w, v in cfg.items()} | found}

    checks = {}
    for name in rules:
        checks[f"{name}: accuracy"] = Check(f"{name}, against CFG", ACCURACY, report=True)
        checks[f"{name}: fd"] = Check(f"{name}, against CFG", DISTANCE, better="lower", report=True)
    return Claim(text, ONE_CORE, measure, checks)


ONE_CORE = f"{N} samples a setting, {STEPS} steps, one core"

CLAIMS: dict[str, Claim] = {
    "guidance.apg": Claim(
        "At scales 8, 12 and 16 (each check: where it helps least) APG keeps the colours that CFG oversaturates, at equal or "
        "better accuracy",
        f"{ONE_CORE}; equal evaluations",
        _apg,
        {
            "saturation": Check("less saturated, by at least 0.03", SATURATION, 0.03, "lower"),
            "clipped": Check("fewer clipped values, by at least half a point", CLIPPED, 0.005, "lower"),
            "accuracy": Check("accuracy not worse", ACCURACY),
            "fd": Check("nearer to the data, by at least 100", DISTANCE, 100.0, "lower"),
        },
    ),
    "guidance.ag": Claim(
        "Adaptive guidance saves a quarter of the evaluations, and of the time, at CFG's accuracy",
        f"{ONE_CORE}; threshold calibrated on 128 other prompts",
        _ag,
        {
            "saved": Check("at least 25% fewer", "share of CFG's denoiser rows left out", 0.25),
            "time": Check("time saved is at least the share of rows less 5 points", "share of rows, of seconds", -0.05),
            "accuracy": Check("accuracy not worse", ACCURACY),
        },
    ),
    "guidance.linear_ag": Claim(
        "LinearAG saves 40% of the evaluations and beats CFG with fewer steps at the same cost",
        f"{ONE_CORE}; coefficients fitted on 192 other prompts",
        _linear_ag,
        {
            "saved": Check("at least 40% fewer", "share of CFG's denoiser rows left out", 0.4),
            "psnr": Check("nearer to CFG at 20 steps than CFG at 12, both 24 rows a sample", PSNR, 0.5),
            "truncated": Check("and than CFG at the first 4 of 20 steps, 24 rows", PSNR, 0.5),
            "accuracy": Check("accuracy not worse than CFG at 12 steps", ACCURACY),
        },
    ),
    "guidance.zero_star": _reported(
        "CFG-Zero* against CFG: the optimised scale alone, and with the first step zeroed",
        {"zero_star, scale 3": ZeroStar(CFG(3.0), zero_steps=0), "zero_star, scale 3, zero-init": ZeroStar(CFG(3.0))},
    ),
    "guidance.interval": _reported(
        "CFG in an interval of the steps against CFG in all",
        {
            "first half (StepAG)": Interval(CFG(3.0), 0.0, 0.5),
            "0.2 to 0.8": Interval(CFG(3.0), 0.2, 0.8),
            "scale 6, 0.2 to 0.8": Interval(CFG(6.0), 0.2, 0.8),
        },
    ),
    "guidance.autoguidance": _reported(
        "AutoGuidance by the model without one of its blocks (no weaker model ships) against CFG, equal evaluations",
        {f"without block {i}, scale {w:g}": AutoGuidance(CFG(w), layers=(i,)) for i, w in ((1, 3.0), (2, 3.0))},
    ),
    "guidance.perturbed": _reported(
        "PAG, SEG and SLG on top of CFG against CFG (half as many evaluations again where they act)",
        {"pag": PAG(CFG(3.0)), "seg": SEG(CFG(3.0)), "slg": SLG(CFG(3.0))},
    ),
    "guidance.others": _reported(
        "TCFG, MAMBO-G, FDG and a cosine schedule against CFG",
        {
            "tcfg, scale 6": TCFG(CFG(6.0)),
            "mag, scale 6": MaG(6.0, alpha=1.0),
            "fdg, scales 6 and 3": FDG(scales=(6.0, 3.0)),
            "cosine schedule, scale 6": Scheduled(CFG(6.0), shape="cosine"),
        },
    ),
}
