"""A budget for every layer, by what it costs in quality on the user's own text.

1. One pass of the dense model per text measures what each layer's selection keeps, at every budget, and what an
   earlier layer's selection would keep (`measure.py`).
2. With a perplexity target, one pass per layer, from that layer on, measures what it does to the predictions if it
   alone is sparse (`effects.py`): attention mass does not tell which layer's losses matter.
3. Both make a table of harm; for any price of harm the cheapest arrangement follows (`choose.py`). A range of prices
   gives a ladder of proposals from cheap to faithful.
4. The perplexity of a few rungs is measured, each in one pass per text, to find the cheapest that reaches the target.
   With a mass target there is one arrangement, and one pass measures its perplexity.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dsa.calibrate.choose import Choice, Problem, choose, ladder
from dsa.calibrate.measure import Curves
from dsa.calibrate.passes import Passes, Text
from dsa.calibrate.result import Calibration, LayerProposal, Probe, UniformBudget
from dsa.calibrate.settings import CalibrationSettings, resolve_budgets
from dsa.config import DSAConfig, LayerConfig
from dsa.cost import Cost, layer_cost, model_cost
from dsa.eval.ratio import PerplexityRatio, perplexity_ratio
from dsa.models.attached import AttachReport, is_attached
from dsa.models.attachment import detach, put_on, take_off
from dsa.models.families import born_with_dsa
from dsa.models.loading import LoadedModel
from dsa.models.sparse import sparse_while
from dsa.runs.inputs import Document, encode
from dsa.runs.machine import describe_machine
from dsa.runs.progress import Progress, silent

DEFAULT_TOKENS = 8192
SMALLEST_WEIGHT = 0.05
"""Of the median layer's harm per lost attention: no layer is taken to be harmless because it was so on one text."""

SHARED_HARM = 1.5
"""A selection made for another layer does more harm than the attention it loses tells: with 17 of 27 layers sharing,
the predictions changed 1.2 times as much as predicted on the calibration text and 1.4 times as much on another, with
none sharing 1.0 times."""

FORBIDDEN = 1e6
"""Harm of falling short of the attention mass asked for: no cost outweighs it."""

Report = Callable[[str], None]


def calibrate(
    loaded: LoadedModel,
    documents: Sequence[Document],
    settings: CalibrationSettings,
    *,
    indexers: str | Path | None = None,
    verify: Sequence[Document] = (),
    progress: Progress = silent,
    report: Report = lambda message: None,
) -> Calibration:
    """Finds how much each layer has to read, and leaves the model attached that way, ready to be saved.

    Args:
        loaded: The model; one that is attached is calibrated with its own indexers.
        documents: What to measure on, each a sequence of its own.
        settings: The target and what may be done for it.
        indexers: As in `dsa.attach`; `None` takes those of an attached model or those shipped with the default one.
        verify: Texts to judge the result on; the calibration texts by default.
        progress: Shows the steps.
        report: Is given sentences: how long the rest will take, and what was found.

    Raises:
        ValueError: Nothing to measure on, texts or budgets that do not fit, indexers that are untrained or calibrated
            already, or a target that cannot be reached; the message then says what came nearest. The model is
            afterwards as it was.
        OSError: The indexers cannot be read.
    """
    began = time.perf_counter()
    _refuse_born_with_dsa(loaded)
    if not documents:
        raise ValueError("data: no text was given; expected UTF-8 text files")
    texts = [_text(loaded, document, settings.tokens, "data") for document in documents]
    others = [_text(loaded, document, settings.tokens, "verify") for document in verify]
    model = loaded.model
    with sparse_while(loaded, indexers) as (attached, source):
        calibrator = _Calibrator(loaded, settings, attached, source, texts, others, progress, report)
        result = calibrator.run()
    if is_attached(model):
        detach(model)
    put_on(model, calibrator.passes.taken, top_k=result.config.top_k, layers=result.config.layers)
    result.seconds = time.perf_counter() - began
    return result


def _refuse_born_with_dsa(loaded: LoadedModel) -> None:
    """Raises `ValueError` for models born with DSA."""
    model_type = loaded.model.config.model_type
    if born_with_dsa(loaded.model.config):
        raise ValueError(
            f"model: {loaded.name} was born with DSA ({model_type}): its layers were trained with their budget and "
            "with the selections that they share, and its files have no place for others. Try one budget for all of "
            "them with dsa eval --top-k"
        )


def _text(loaded: LoadedModel, document: Document, tokens: int | None, argument: str) -> Text:
    ids = encode(document, loaded.tokenizer, tokens, default=DEFAULT_TOKENS, argument=argument)
    return Text(document.name, ids)


class _Calibrator:
    """One calibration."""

    def __init__(
        self,
        loaded: LoadedModel,
        settings: CalibrationSettings,
        attached: AttachReport,
        source: str | None,
        texts: list[Text],
        others: list[Text],
        progress: Progress,
        report: Report,
    ) -> None:
        self.loaded, self.model, self.settings, self.source = loaded, loaded.model, settings, source
        self.texts, self.others, self.report = texts, others, report
        self.config = attached.config
        self.full = [row.layer for row in attached.layers if row.kind not in ("sliding", "other")]
        self.layers = [row.layer for row in attached.layers if row.kind == "sparse"]
        _check_report(attached, settings)
        shortest = min(text.tokens for text in texts)
        self.budgets = resolve_budgets(settings, self.config, self.layers, shortest)
        self.curves = Curves.empty(self.layers, self.budgets)
        self.effects = torch.zeros(len(self.layers), dtype=torch.float64)
        self.has_effects = settings.perplexity_ratio is not None and settings.effects
        self.probe_level = len(self.budgets) // 4
        self.probes: list[Probe] = []
        self.passes = Passes(self.model, take_off(self.model), self.full, progress)

    def run(self) -> Calibration:
        for number, text in enumerate(self.texts):
            self._measure(text, number)
        problem = self._problem()
        if self.settings.mass is not None:
            chosen, losses = self._reach_mass(problem), None
        else:
            chosen, losses = self._reach_ratio(problem)
        config = self._config(chosen)
        verified = self._verify(config, losses)
        uniform = self._uniform(verified) if self.settings.compare_uniform else None
        return Calibration(
            model=self.loaded.name,
            indexers=self.source,
            settings=self.settings,
            config=config,
            texts={text.name: text.tokens for text in self.texts},
            verified_on={text.name: text.tokens for text in self.others or self.texts},
            ratio=verified,
            layers=tuple(self._rows(chosen, config)),
            budgets=tuple(self.budgets),
            cost=self._cost(config),
            dense_cost=self._cost(None),
            probes=tuple(self.probes),
            uniform=uniform,
            environment=describe_machine(self.model.device),
        )

    # What is measured.

    def _measure(self, text: Text, number: int) -> None:
        """Steps 1 and 2 on one text; means over texts."""
        share, largest = self.settings.may_share, self.budgets[-1]
        dense = self.passes.measure(text, self.curves, largest, share=share, record=self.has_effects)
        if number == 0:
            self._estimate(dense.seconds)
        if self.has_effects:
            effects = self.passes.effects(text, dense, self.layers, self.budgets[self.probe_level])
            self.effects += (torch.tensor(effects, dtype=torch.float64) - self.effects) / (number + 1)

    def _estimate(self, seconds: float) -> None:
        """Says how long the rest takes, from the first pass."""
        total = sum(text.tokens for text in self.texts) / self.texts[0].tokens
        passes = {"dense": total - 1}
        if self.has_effects:
            deepest = max(self.full) + 1
            passes["layers"] = total * sum((deepest - layer) / deepest for layer in self.layers)
        passes["probes"] = total * (6 if self.settings.perplexity_ratio is not None else 1)
        passes["verify"] = 2 * sum(text.tokens for text in self.others) / self.texts[0].tokens
        if self.settings.compare_uniform:
            judged = self.others or self.texts
            rounds = math.ceil(math.log2(len(self.budgets) + 1))
            passes["uniform"] = rounds * sum(text.tokens for text in judged) / self.texts[0].tokens
        left = seconds * sum(passes.values())
        self.report(f"A pass over the model takes {_duration(seconds)}; about {_duration(left)} to go")

    # What is chosen.

    def _problem(self) -> Problem:
        shape, settings = self.curves.shape, self.settings
        assert shape is not None

        measure = "tokens_read" if settings.minimise == "tokens" else settings.minimise

        def cost(kind: Any, top_k: int | None) -> float:
            each = self._mean_cost(lambda first, last: layer_cost(shape, kind, first, last, top_k))
            return float(getattr(each, measure))

        dense = cost("dense", None)
        read = torch.tensor([cost("shared", top_k) for top_k in self.budgets], dtype=torch.float64) / dense
        both = torch.tensor([cost("sparse", top_k) for top_k in self.budgets], dtype=torch.float64) / dense
        if settings.mass is not None:
            # Finite, so that the search can repair one layer at a time.
            harm = torch.where(self.curves.kept >= settings.mass, 0.0, FORBIDDEN).double()
        else:
            own = torch.eye(len(self.layers), dtype=torch.bool)[..., None]
            harm = self._weights()[:, None, None] * self.curves.harm.where(own, SHARED_HARM * self.curves.harm)
        without_indexer = len(self.full) - len(self.layers)
        return Problem(
            read=read,
            scan=both - read,
            dense=1.0,
            harm=harm.nan_to_num(torch.inf, posinf=torch.inf),
            max_dense=settings.max_dense - without_indexer,
            min_shared=math.ceil(settings.min_shared * len(self.full)),
            may_share=settings.may_share,
        )

    def _weights(self) -> torch.Tensor:
        """Nats per unit of a layer's harm, `[L]`; all 1 where effects were not measured."""
        if not self.has_effects:
            return torch.ones(len(self.layers), dtype=torch.float64)
        lost = self.curves.harm.diagonal()[self.probe_level]
        weights = torch.where(lost > 0, self.effects / lost.clamp_min(1e-12), 0.0)
        return weights.clamp_min(max(SMALLEST_WEIGHT * float(weights.median()), 1e-12))

    def _reach_mass(self, problem: Problem) -> Choice:
        mass = self.settings.mass
        assert mass is not None
        chosen = choose(problem, 1.0)
        if chosen is not None and problem.harm_of(chosen) == 0:
            return chosen
        best = self.curves.kept.diagonal()[-1]
        short = int((best < mass).sum())
        if short <= problem.max_dense:
            raise ValueError(
                f"min-shared: fewer than {problem.min_shared} of {len(self.full)} layers keep {mass} of their "
                "attention with an earlier layer's selection; lower --min-shared or --mass"
            )
        reachable = float(best.sort().values[problem.max_dense])
        worst = self.layers[int(best.argmin())]
        raise ValueError(
            f"mass: {mass} is not reachable with K up to {self.budgets[-1]:,} and at most {self.settings.max_dense} "
            f"dense layers: {short} layers keep less, layer {worst} the least, {float(best.min()):.4f}. The nearest "
            f"target that can be reached is {math.floor(reachable * 1e4) / 1e4:.4f}; else raise --max-dense to "
            f"{short + len(self.full) - len(self.layers)} or give a larger --top-k"
        )

    def _reach_ratio(self, problem: Problem) -> tuple[Choice, list[torch.Tensor]]:
        """The cheapest rung of the ladder within the target, by prediction and by the perplexity measured."""
        target = self.settings.perplexity_ratio
        assert target is not None
        rungs = ladder(problem)
        if not rungs:
            raise ValueError(
                f"min-shared: {problem.min_shared} of {len(self.full)} layers cannot share; lower --min-shared"
            )
        predicted = [problem.harm_of(rung) for rung in rungs]
        if self.has_effects:
            # The measured ratio of a short text may be low by luck, the prediction is not.
            allowed = next(
                (number for number, harm in enumerate(predicted) if harm <= math.log(target)), len(rungs) - 1
            )
            rungs, predicted, guess = rungs[allowed:], predicted[allowed:], 0
        else:
            guess = len(rungs) // 2
        dense = [text.losses for text in self.texts]
        found: dict[int, tuple[PerplexityRatio, list[torch.Tensor]]] = {}

        def reaches(number: int) -> bool:
            config = self._config(rungs[number])
            losses = self.passes.losses_with(config, self.texts, f"Proposal {len(found) + 1}")
            ratio = perplexity_ratio(losses, dense)
            found[number] = ratio, losses
            cost = self._cost(config)
            self.probes.append(Probe(cost.tokens_read, cost.operations, predicted[number], ratio.ratio))
            share = cost.operations / self._cost(None).operations
            self.report(f"Proposal {len(found)}: {share:.0%} of the dense cost, perplexity ratio {ratio.ratio:.4f}")
            return ratio.ratio <= target

        number = first_true(reaches, len(rungs), guess)
        if number is not None:
            return rungs[number], found[number][1]
        nearest = min(each.ratio for each, _ in found.values())
        raise ValueError(
            f"perplexity-ratio: {target} is not reachable with K up to {self.budgets[-1]:,} and at most "
            f"{self.settings.max_dense} dense layers; the nearest came to {nearest:.4f}. Ask for "
            f"{math.ceil(nearest * 1e4) / 1e4:.4f}, raise --max-dense, give a larger --top-k, or train the "
            "indexers longer"
        )

    def _config(self, chosen: Choice) -> DSAConfig:
        """The configuration of a choice: `top_k` is the largest of any layer, the others are exceptions."""
        top_k = max((self.budgets[level] for level in chosen.level.values()), default=self.budgets[-1])
        layers = {layer: exception for layer, exception in self.config.layers.items() if exception.dense}
        for row, layer in enumerate(self.layers):
            if row in chosen.dense:
                layers[layer] = LayerConfig(dense=True)
            elif row in chosen.source:
                layers[layer] = LayerConfig(share=self.layers[chosen.source[row]])
            else:
                budget = self.budgets[chosen.level[row]]
                own = LayerConfig(
                    top_k=None if budget == top_k else budget,
                    local=self.config.layers.get(layer, LayerConfig()).local,
                )
                if own != LayerConfig():
                    layers[layer] = own
        return self.config.replace(top_k=top_k, layers=layers)

    # What is reported.

    def _verify(self, config: DSAConfig, losses: list[torch.Tensor] | None) -> PerplexityRatio:
        """The proposal's perplexity on the texts to judge it on."""
        for text in self.others:
            self.passes.read_dense(text)
        if self.others or losses is None:
            losses = self.passes.losses_with(config, self.others or self.texts, "Verifying")
        return perplexity_ratio(losses, [text.losses for text in self.others or self.texts])

    def _uniform(self, reached: PerplexityRatio) -> UniformBudget | None:
        """The smallest single budget that is as good as the result on the texts that judged it."""
        texts = self.others or self.texts
        ratios: dict[int, float] = {}

        def reaches(number: int) -> bool:
            config = self.config.replace(top_k=self.budgets[number])
            losses = self.passes.losses_with(config, texts, f"K = {self.budgets[number]:,} everywhere")
            ratios[number] = perplexity_ratio(losses, [text.losses for text in texts]).ratio
            return ratios[number] <= reached.ratio

        number = first_true(reaches, len(self.budgets), len(self.budgets) // 2)
        if number is None:
            return UniformBudget(None, min(ratios.values()), None)
        cost = self._cost(self.config.replace(top_k=self.budgets[number]))
        return UniformBudget(self.budgets[number], ratios[number], cost)

    def _cost(self, config: DSAConfig | None) -> Cost:
        shape = self.curves.shape
        assert shape is not None
        return self._mean_cost(lambda first, last: model_cost(config, shape, self.full, first, last))

    def _mean_cost(self, cost: Callable[[int, int], Cost]) -> Cost:
        """Mean over the queries that count, of all texts."""
        queries = [text.tokens - text.start for text in self.texts]
        total = Cost(0.0, 0.0, 0.0, 0.0)
        for text, count in zip(self.texts, queries):
            each = cost(text.start + 1, text.tokens)
            share = count / sum(queries)
            total += Cost(
                each.tokens_read * share, each.tokens_scanned * share, each.operations * share, each.bytes * share
            )
        return total

    def _rows(self, chosen: Choice, config: DSAConfig) -> Iterator[LayerProposal]:
        for layer in self.full:
            if layer not in self.layers:
                yield LayerProposal(layer, "dense", None, None, 1.0, None, None, has_indexer=False)
                continue
            row = self.layers.index(layer)
            effect = float(self.effects[row]) if self.has_effects else None
            served = chosen.served_by(row)
            if served is None:
                yield LayerProposal(layer, "dense", None, None, 1.0, None, effect, self._own(row))
                continue
            source, level = served
            kept = float(self.curves.kept[row, source, level])
            yield LayerProposal(
                layer=layer,
                kind="sparse" if source == row else "shared",
                top_k=config.layer_top_k(layer),
                share=None if source == row else self.layers[source],
                kept=kept,
                kept_of_oracle=kept / float(self.curves.oracle[row, level]),
                effect=effect,
                own_kept=self._own(row),
            )

    def _own(self, row: int) -> tuple[float, ...]:
        return tuple(self.curves.kept[row, row].tolist())


def first_true(reaches: Callable[[int], bool], count: int, guess: int) -> int | None:
    """The first of `count` numbers that `reaches`, if from some number on all do, asking as few as possible.

    Args:
        reaches: The question; asked once per number at most.
        count: How many numbers there are.
        guess: Where to begin.

    Returns:
        `None` where not even the last one does.
    """
    low, high, step = -1, count, 1
    number = guess
    while high - low > 1:
        if reaches(number):
            high = number
        else:
            low = number
        if low >= 0 and high < count:
            number = (low + high) // 2
            continue
        number = max(low + 1, high - 1 - step // 2) if high < count else min(count - 1, low + step)
        step *= 2
    return high if high < count else None


def _check_report(report: AttachReport, settings: CalibrationSettings) -> None:
    """Refuses indexers that there is nothing to calibrate about."""
    if not report.trained:
        raise ValueError(
            f"indexers: those of {report.model} are untrained, so there is nothing to calibrate; train them with "
            "`dsa train`, then pass --indexers"
        )
    shared = [row.layer for row in report.layers if row.kind == "shared"]
    if shared:
        raise ValueError(
            f"indexers: these were calibrated already (layer {shared[0]} shares another's selection and has no indexer "
            "of its own); give the ones that `dsa train` wrote"
        )
    several = [row.layer for row in report.layers if row.selections > 1]
    if several:
        raise ValueError(
            f"indexers: layer {several[0]} makes {report.layers[several[0]].selections} selections for each query, and "
            "calibration measures one for all heads; train indexers with selections=1 to calibrate them"
        )
    if not report.count("sparse"):
        raise ValueError(f"indexers: no layer of {report.model} has one, so there is nothing to calibrate")
    dense = [row.layer for row in report.layers if row.kind == "dense"]
    if len(dense) > settings.max_dense:
        raise ValueError(
            f"max-dense: {len(dense)} layers have no indexer and stay dense ({', '.join(map(str, dense))}), more than "
            f"max-dense={settings.max_dense}; raise it to {len(dense)}, or train indexers for them"
        )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
