"""Large-minibatch SGD on supercomputers: plan, submit, train, measure, report.

`import hpc_lbsgd as lb` for scripts of your own: what api/ has is loaded at its first use, for it brings torch.
"""

__version__ = "0.1.0"

API = (
    "GlobalShuffle",
    "Keyed",
    "Loader",
    "NoiseScale",
    "Part",
    "RequestError",
    "Run",
    "RunError",
    "Schedule",
    "Stage",
    "Step",
    "Verdict",
    "World",
    "close",
    "distribute",
    "evaluate",
    "init",
    "load",
    "save",
)


LIGHT = {"Stage": "hpc_lbsgd.theory.schedule"}  # a recipe's schedule of one's own is planned without torch


def __getattr__(name: str):
    if name in API:
        from importlib import import_module

        return getattr(import_module(LIGHT.get(name, "hpc_lbsgd.api")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *API})
