"""One configuration checked: a small random model of it is made, attached and put through the claims."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from dsa.check.claims import CLAIMS, IN_FP32, Case, NotTheModels
from dsa.check.discovery import find_family
from dsa.check.miniature import miniature, random_model
from dsa.models.families import ATTACHABLE, Family, born_with_dsa
from dsa.models.refused import REFUSED

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Result = Literal["holds", "fails", "not the model's"]
FIRST = next(iter(CLAIMS))


@dataclass(frozen=True)
class Outcome:
    """What came of one claim.

    Args:
        claim: Its name.
        result: `"not the model's"`: transformers' own attention does not keep it either.
        note: Why, where it does not hold.
    """

    claim: str
    result: Result
    note: str = ""


@dataclass(frozen=True)
class CheckReport:
    """What `check_config` found.

    Args:
        model: Class of the model.
        family: The row that describes it.
        known: Whether the table has it.
        outcomes: Of every claim that was tried; the first that fails is the last.
    """

    model: str
    family: Family
    known: bool
    outcomes: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        """Whether no claim fails."""
        return all(outcome.result != "fails" for outcome in self.outcomes)

    @property
    def row(self) -> str:
        """The row as Python."""
        others = [each for each in fields(Family) if each.name != "model_type"]
        given = {each.name: getattr(self.family, each.name) for each in others}
        said = [f"{each.name}={given[each.name]!r}" for each in others if given[each.name] != each.default]
        return f"Family({', '.join([repr(self.family.model_type), *said])})"

    def verdict(self) -> str:
        """What to do now, in a sentence or two."""
        if not self.passed:
            reason = REFUSED.get(self.family.model_type)
            return f"dsa does not run {self.model}" + (f": {reason}" if reason else "")
        if self.known:
            return f"{self.model} is in the table of families: dsa.attach(model) takes it"
        return (
            f"{self.model} is not in the table, and keeps every claim. dsa.attach(model, family=dsa.{self.row}) goes "
            "on with it; nothing but this check vouches for it. To add it for good, put the row into "
            "src/dsa/models/families.py"
        )


def check_config(config: PreTrainedConfig, step: Callable[[], None] = lambda: None) -> CheckReport:
    """Tries a configuration's architecture.

    Args:
        config: Of a causal language model; its sizes are made small, its kinds of layers kept.
        step: Called after each claim.

    Raises:
        ValueError: No model of this configuration can be made, or none that can be attached: it is attached, born with
            DSA or quantised, its fields contradict each other, or nothing in it can be selected; the message says so.
    """
    config, model_class = _plain(config)
    small = _made(f"no small model of {model_class.__name__}", lambda: random_model(model_class, miniature(config)))
    model_type = small.config.model_type
    known = ATTACHABLE.get(model_type)
    families = [known] if known is not None else _candidates(small)
    for family in families:
        outcomes = [_outcome(FIRST, small, family)]
        if outcomes[0].result != "fails":
            break
    step()
    exact = copy.deepcopy(small).double()
    for claim in list(CLAIMS)[1:]:
        if outcomes[-1].result == "fails":
            break
        outcomes.append(_outcome(claim, small if claim in IN_FP32 else exact, family))
        step()
    return CheckReport(model_class.__name__, family, known is not None, tuple(outcomes))


def _plain(config: PreTrainedConfig) -> tuple[PreTrainedConfig, Any]:
    """A configuration that can be checked, and the class of its models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if hasattr(config, "dsa"):
        raise ValueError("model: this one is attached already; check the model that it was made from")
    if born_with_dsa(config):
        raise ValueError(f"model: {config.model_type!r} has indexers of its own; dsa.accelerate(model) runs it sparse")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("model: a quantised checkpoint; check the configuration that it was made from")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    text = config.get_text_config(decoder=True)
    if model_class.config_class is not type(text) and type(text) is not type(config):
        raise ValueError(
            f"model: {model_class.__name__}: {REFUSED.get(config.model_type, 'not a model of text alone')}"
        )

    def build() -> None:
        with torch.device("meta"):
            model_class(copy.deepcopy(text))

    _made(f"no {model_class.__name__} of this configuration", build)
    return text, model_class


def _made(what: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:  # whatever a model's classes raise
        said = " ".join(str(error).split())
        raise ValueError(f"model: {what} can be made: {type(error).__name__}: {said[:300]}") from error


def _candidates(model: Any) -> list[Family]:
    """The rows that may describe a model which the table has none for."""
    found = find_family(model)
    if found.latent != "half":
        return [found]
    return [found, replace(found, latent="interleaved")]


def _outcome(claim: str, model: Any, family: Family) -> Outcome:
    try:
        CLAIMS[claim](Case(model, family))
    except NotTheModels as reason:
        return Outcome(claim, "not the model's", str(reason))
    except Exception as error:  # whatever a model's classes raise
        said = " ".join(str(error).split())
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return Outcome(claim, "fails", f"{kind}{said[:300]}")
    return Outcome(claim, "holds")
