"""Custom pipelines: guided(PipelineClass) is that class with one more argument in its call, guidance=.

    pipe = GuidedStableDiffusion3Pipeline.from_pretrained(folder)
    image = pipe("a red circle", guidance=APG(scale=10)).images[0]

Ready: GuidedStableDiffusionPipeline, GuidedStableDiffusionXLPipeline, GuidedStableDiffusion3Pipeline, GuidedFluxPipeline;
any other by guided(StableDiffusionXLInpaintPipeline), or as guided.GuidedStableDiffusionXLInpaintPipeline from this module.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from diffgen.pipelines.guide import guide
from diffgen.table import DENOISERS, row_of

_DOC = """
    guidance (`diffgen.pipelines.Guidance`, *optional*): the rule that guides this call, such as `APG(scale=10)`. It
        switches CFG on at its own scale; a `guidance_scale` (or `true_cfg_scale`) beside it takes the scale's place. None:
        the call is {name}'s own. `pipe.nfe` then says how many denoiser rows a sample took in the last guided call.
"""


def guided(pipeline: Any) -> Any:
    """A subclass of a pipeline class whose call takes guidance=Guidance; guided(X) is always the same class.

    With guidance=None it is the stock pipeline. It loads from stock folders and saves such folders: its __name__ is the
    stock one. Raises TypeError for what isn't a pipeline class and ValueError for a class that cannot be guided.
    """
    from diffusers import DiffusionPipeline

    if not (isinstance(pipeline, type) and issubclass(pipeline, DiffusionPipeline)):
        hint = "; for a pipeline object use guide(pipe, rule)" if isinstance(pipeline, DiffusionPipeline) else ""
        raise TypeError(f"guided expects a diffusers pipeline class, got {pipeline!r:.200}{hint}")
    pipeline = getattr(pipeline, "_unguided", pipeline)  # the class of a pipeline that guide(pipe, rule) holds
    return pipeline if hasattr(pipeline, "_stock") else _subclass(pipeline)


@functools.cache
def _subclass(stock: Any) -> type:
    row_of(stock)
    if not set(DENOISERS) & set(inspect.signature(stock.__init__).parameters):
        raise ValueError(f"{stock.__name__} has no denoiser: expected a component {', '.join(DENOISERS)}")

    @functools.wraps(stock.__call__)
    def __call__(self, *args, guidance=None, **kwargs):
        if guidance is None:
            return stock.__call__(self, *args, **kwargs)
        if "_guidance_run" in vars(self):
            raise ValueError("guidance= in a call under guide(pipe, rule): take that rule off with guide(pipe, None)")
        with guide(self, guidance) as run:
            try:
                return self(*args, **kwargs)
            finally:
                self.nfe = run.nfe

    __call__.__signature__ = _with_guidance(inspect.signature(stock.__call__))  # type: ignore[attr-defined]
    __call__.__doc__ = inspect.cleandoc(stock.__call__.__doc__ or "") + "\n" + _DOC.format(name=stock.__name__)

    def __reduce_ex__(self, protocol):
        return _new, (stock,), vars(self).copy()

    members: dict[str, Any] = {
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__doc__": stock.__doc__,
        "__module__": __name__,
        "__qualname__": f"Guided{stock.__name__}",
        "_stock": stock,
        "nfe": 0.0,
    }
    return type(stock.__name__, (stock,), members)


def _with_guidance(signature: inspect.Signature) -> inspect.Signature:
    """The signature with a keyword `guidance` behind its arguments (and before **kwargs)."""
    parameters = list(signature.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    keyword = inspect.Parameter("guidance", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Guidance | None")
    return signature.replace(parameters=[*parameters[:at], keyword, *parameters[at:]])


def _new(stock: type) -> Any:
    cls = guided(stock)
    return cls.__new__(cls)


def __getattr__(name: str) -> Any:
    """GuidedX, for each pipeline class X of diffusers."""
    if name.startswith("Guided") and name.endswith("Pipeline"):
        import diffusers

        stock = getattr(diffusers, name.removeprefix("Guided"), None)
        if stock is not None:
            return guided(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
