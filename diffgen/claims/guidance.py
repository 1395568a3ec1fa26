"""What guidance rules do on "shapes": accuracy by the exact verifier, colours, distance to the data, denoiser evaluations."""

from __future__ import annotations

import functools
from dataclasses import replace
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
    Coefficients,
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
    """Prompts of all colour-shape pairs. What something is fitted on has other seeds: other noise, but texts may recur."""
    from diffgen.worlds import shapes

    return shapes.prompts(n, seed=seed, split="all")


def _sample(rule: Guidance, seed: int, steps: int = STEPS) -> Drawn:
    return draw(_pipe(), rule, _prompts(seed), seed=seed, num_inference_steps=steps)


def _measure(drawn: Drawn, seed: int, reference: Drawn | None = None) -> dict[str, float]:
    from diffgen.eval import functional
    from diffgen.eval.extractors import get_extractor
    from diffgen.eval.similarity import similarity
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
        found |= similarity(drawn.images, reference.images)
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

    cfg, apg = ({p["scale"]: p for p in points} for points in curves.values())
    pairs = {m: least(m) for m in ("accuracy", "saturation", "clipped", "fd")}
    pairs["best"] = max(p["accuracy"] for p in cfg.values()), max(p["accuracy"] for p in apg.values())
    pairs["near: fd"], pairs["near: accuracy"] = ((cfg[2.0][m], apg[8.0][m]) for m in ("fd", "accuracy"))
    return pairs | {"details": {"curves": curves}}


# --- AG and LinearAG ---------------------------------------------------------------------------------------------


def _ag(seed: int) -> dict[str, Any]:
    paper = AdaptiveGuidance(CFG(3.0), warmup=2).calibrated(
        _pipe(), _prompts(1000 + seed, 128), saving=0.27, batch_size=64, num_inference_steps=STEPS
    )
    cfg = _sample(CFG(3.0), seed)
    before = _measure(cfg, seed)
    ours = {name: _measure(_sample(replace(paper, after=name), seed), seed, cfg) for name in ("cond", "hold")}
    cheaper = {f"cfg, {n} steps": _measure(_sample(CFG(3.0), seed, n), seed, cfg) for n in (14, 15)}
    half = _measure(_sample(Interval(CFG(3.0), 0.0, 0.45), seed), seed, cfg)
    rows, seconds = (1 - ours["hold"][m] / before[m] for m in ("nfe", "ms"))
    pairs = {
        "saved": (0.0, rows),
        "time": (0.6 * rows, seconds),
        "accuracy": (before["accuracy"], ours["hold"]["accuracy"]),
        "cond": (before["accuracy"], ours["cond"]["accuracy"]),
        "fixed": (half["psnr"], ours["cond"]["psnr"]),
        "fewer": (cheaper["cfg, 15 steps"]["psnr"], ours["hold"]["psnr"]),
    }
    details = {f"ag, {name}": found for name, found in ours.items()} | cheaper | {"cfg at the first 9 steps": half}
    return pairs | {"details": {"threshold": paper.threshold, "cfg": before} | details}


POLICIES: dict[str, dict[str, Any]] = {
    "25 rows (the paper's: every 2, until 0.5)": {},
    "24 rows (every 7 after 3, until 0.7)": {"warmup": 3, "every": 7, "until": 0.7},
    "26 rows (every 6 after 4, until 0.7)": {"warmup": 4, "every": 6, "until": 0.7},
    "28 rows (every 8 after 6)": {"warmup": 6, "every": 8, "until": 1.0},
}


def _linear_ag(seed: int) -> dict[str, Any]:
    fitted = LinearAG(CFG(3.0)).fitted(_pipe(), _prompts(1000 + seed, 192), batch_size=64, num_inference_steps=STEPS)
    coefficients = fitted.coefficients
    assert isinstance(coefficients, Coefficients)
    no_c = [[0.0], *[[0.0, 0.0]] * (STEPS - 1)]
    last_u: list[list[float]] = [[], *[[1.0]] * (STEPS - 1)]
    reuse = replace(coefficients, cond=no_c, uncond=last_u, intercept=[0.0] * STEPS)  # u_t = u_{t-1}
    cfg = _sample(CFG(3.0), seed)
    found = {"cfg": _measure(cfg, seed)}

    def linear(given: Coefficients, policy: str) -> dict[str, float]:
        return _measure(_sample(LinearAG(CFG(3.0), given, **POLICIES[policy]), seed), seed, cfg)

    ours = {policy.split(" rows")[0]: linear(coefficients, policy) for policy in POLICIES}
    steps = {n: _measure(_sample(CFG(3.0), seed, n), seed, cfg) for n in (12, 13, 14)}
    same = linear(reuse, "28 rows (every 8 after 6)")
    assert [ours[f"{2 * n}"]["nfe"] for n in steps] == [row["nfe"] for row in steps.values()] == [24, 26, 28]
    pairs = {
        "saved": (0.0, 1 - ours["24"]["nfe"] / found["cfg"]["nfe"]),
        "accuracy": (found["cfg"]["accuracy"], ours["24"]["accuracy"]),
        "at 24": (steps[12]["psnr"], ours["24"]["psnr"]),
        "at 26": (steps[13]["psnr"], ours["26"]["psnr"]),
        "at 28": (steps[14]["psnr"], ours["28"]["psnr"]),
        "reuse": (same["psnr"], ours["28"]["psnr"]),
    }
    found |= {f"linear_ag, {k} rows": v for k, v in ours.items()} | {f"cfg, {n} steps": v for n, v in steps.items()}
    details = found | {"the last u again, 28 rows": same, "policies": POLICIES}
    return pairs | {"details": details | {"r2": [round(x, 6) for x in coefficients.r2[1:]]}}


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
            "near: accuracy": Check("APG at 8 is as near to the data as CFG at 2, and more accurate", ACCURACY, 0.03),
            "near: fd": Check("(that distance)", DISTANCE, better="lower", slack=20.0),
            "best": Check("best accuracy of any scale", ACCURACY, report=True),
        },
    ),
    "guidance.ag": Claim(
        "Adaptive guidance that holds its last difference (after='hold') saves a quarter of the evaluations at CFG's accuracy",
        f"{ONE_CORE}; threshold calibrated on 128 other prompts",
        _ag,
        {
            "saved": Check("at least 25% fewer", "share of CFG's denoiser rows left out", 0.25),
            "time": Check("at least 60% of that in seconds", "0.6 share of rows, share of seconds", 0.0),
            "accuracy": Check("accuracy not worse", ACCURACY),
            "cond": Check("the paper's after='cond', at the same evaluations", ACCURACY, report=True),
            "fixed": Check("after='cond', against CFG at the first 9 of 20 steps (29 rows)", PSNR, report=True),
            "fewer": Check("after='hold', against CFG at 15 steps (30 rows)", PSNR, report=True),
        },
    ),
    "guidance.linear_ag": Claim(
        "LinearAG saves up to 40% of the evaluations; at 26 and 28 of 40 it beats CFG with fewer steps at the same cost",
        f"{ONE_CORE}; coefficients fitted on 192 other prompts",
        _linear_ag,
        {
            "saved": Check("40% fewer with 24 rows a sample", "share of CFG's denoiser rows left out", 0.4),
            "accuracy": Check("accuracy not worse than CFG's with 24 rows", ACCURACY),
            "at 26": Check("26 rows: nearer to CFG at 20 steps than CFG at 13 is", PSNR, 1.0),
            "at 28": Check("28 rows: than CFG at 14", PSNR, 3.0),
            "reuse": Check("28 rows: than with the last u again instead of the estimate", PSNR, 1.0),
            "at 24": Check("24 rows: against CFG at 12", PSNR, report=True),
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
        "TCFG, MAMBO-G, FDG (a lower mean scale) and a cosine schedule against CFG",
        {
            "tcfg, scale 6": TCFG(CFG(6.0)),
            "mag, scale 6": MaG(6.0, alpha=1.0),
            "fdg, scales 6 and 3": FDG(scales=(6.0, 3.0)),
            "cosine schedule, scale 6": Scheduled(CFG(6.0), shape="cosine"),
        },
    ),
}
