"""torch's compiler: is it at work here?"""

from __future__ import annotations


def why_not(device) -> str | None:
    """What torch's compiler lacks on `device`, found by a small function; None: nothing."""
    import torch

    try:
        found = torch.compile(lambda x: x * 2 + 1)(torch.ones(3, device=device)).tolist()
        return None if found == [3.0] * 3 else f"2 * 1 + 1 is {found}"
    except Exception as problem:  # no Triton, no C compiler, a GPU that it does not know: it fails in any way
        told = str(problem).strip().splitlines()
        return f"{type(problem).__name__}: {told[0][:200] if told else ''}"
