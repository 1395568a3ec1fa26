"""Metrics as plain functions of tensors.

Features are real tensors [N,D] or [M,D] (X generated, Y reference), and all arithmetic is float64. Images are uint8
[N,3,H,W]. Legend: N, M images or feature rows; D features; C classes; mu mean; sigma unbiased covariance (divisor N-1).

    frechet       fd, fd_from_stats; its noise floor fd_floor, fd_floor_split, spectrum; fd_infinity, fd_line
    kernel        kid, kid_subsets, cmmd, mind, inception_score
    neighbours    nearest, prdc; memorisation: authpct, ct_score, mann_whitney_z, mifid, nn_audit
    diversity     mean_pairwise, vendi, intra_prompt, zero_rows
    images        saturation, contrast, colourfulness, clipping
    uncertainty   bootstrap_sd, paired_bootstrap_difference, wilson

All functions raise TypeError for what is not a tensor of the right kind, and ValueError for a wrong shape, too few rows
(2, unless the function says otherwise) or non-finite features (with the rows' numbers). Rows are visited in blocks of
2048, so beside its input a function needs memory of order D^2 or of one block of pairs; only `cmmd`, `mifid` and
`nn_audit` hold the scaled rows, and `ct_score` the projected ones.
"""

from diffgen.eval.functional.diversity import IntraPrompt, intra_prompt, mean_pairwise, vendi, zero_rows
from diffgen.eval.functional.frechet import (
    fd,
    fd_floor,
    fd_floor_split,
    fd_from_stats,
    fd_infinity,
    fd_line,
    spectrum,
)
from diffgen.eval.functional.images import clipping, colourfulness, contrast, saturation
from diffgen.eval.functional.kernel import cmmd, inception_score, kid, kid_subsets, mind
from diffgen.eval.functional.neighbours import (
    PRDC,
    NNAudit,
    authpct,
    ct_score,
    mann_whitney_z,
    mifid,
    nearest,
    nn_audit,
    prdc,
)
from diffgen.eval.functional.uncertainty import bootstrap_sd, paired_bootstrap_difference, wilson

__all__ = [
    "PRDC",
    "IntraPrompt",
    "NNAudit",
    "authpct",
    "bootstrap_sd",
    "clipping",
    "cmmd",
    "colourfulness",
    "contrast",
    "ct_score",
    "fd",
    "fd_floor",
    "fd_floor_split",
    "fd_from_stats",
    "fd_infinity",
    "fd_line",
    "inception_score",
    "intra_prompt",
    "kid",
    "kid_subsets",
    "mann_whitney_z",
    "mean_pairwise",
    "mifid",
    "mind",
    "nearest",
    "nn_audit",
    "paired_bootstrap_difference",
    "prdc",
    "saturation",
    "spectrum",
    "vendi",
    "wilson",
    "zero_rows",
]
