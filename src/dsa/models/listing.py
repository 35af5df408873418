"""Every causal language model of the installed transformers: whether dsa runs it sparse, and if not, why.

Made of the table (`dsa.models.families`) and the reasons (`dsa.models.refused`); `dsa info --models` and the page of
families print it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from dsa.models.families import BORN_WITH_DSA, FAMILIES, INSIDE
from dsa.models.refused import REFUSED

State = Literal["attached", "accelerated", "refused", "unknown"]


class Listed(NamedTuple):
    """One name of transformers' list.

    Args:
        model_type: The name.
        state: `"attached"` by `dsa.attach`, `"accelerated"` by `dsa.accelerate`, refused, or not known to this version.
        note: What kind of attention it has, or the reason.
    """

    model_type: str
    state: State
    note: str

    @property
    def works(self) -> bool:
        """Whether it runs sparse."""
        return self.state in ("attached", "accelerated")


def causal_models() -> list[Listed]:
    """All names, in alphabetical order."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [_listed(name) for name in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) | set(FAMILIES))]


def _listed(name: str) -> Listed:
    if name in INSIDE:
        return Listed(name, "attached", f"its text model is {INSIDE[name]}")
    if name in BORN_WITH_DSA:
        return Listed(name, "accelerated", "latent attention with indexers of its own")
    if name in FAMILIES:
        latent = FAMILIES[name].latent is not None
        return Listed(name, "attached", "latent attention" if latent else "keys and values")
    if name in REFUSED:
        return Listed(name, "refused", REFUSED[name])
    return Listed(name, "unknown", "newer than this version of dsa: try dsa check")
