"""Dense attention, DSA and "4 sinks + sliding window" compared on one text: what `dsa demo` and `dsa eval` show.

Four passes over the text, each as cheap as an honest figure allows:

1. Attached, `mode="sparse"`: DSA's prefill time, perplexity, decode speed and continuation.
2. Attached, `mode="dense"`, with an observer: the attention mass that three selections keep on the dense model's
   activations. Nothing is timed here.
3. Detached: the same figures of the plain model with its own attention (SDPA), so that dense is not slowed down by
   hooks or observers.
4. Detached, inside `window_attention`: the same figures of sinks and window.

A model born with DSA is accelerated throughout: detached it would be a mask over dense attention. Its dense figures are
those of the same modules reading every row of the latent cache, its window's those of the same modules over a window.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dsa.cost import mean_read
from dsa.eval.comparison import contexts
from dsa.eval.mass import LayerMass, MassObserver
from dsa.eval.reading import Reading, read
from dsa.eval.window import window_attention
from dsa.models.acceleration import AccelerateReport
from dsa.models.attached import AttachReport, LayerReport
from dsa.models.attachment import detach
from dsa.models.context import DSAContext
from dsa.models.decoder import layer_progress
from dsa.models.loading import LoadedModel
from dsa.models.sparse import sparse_while
from dsa.runs.inputs import Document, encode
from dsa.runs.machine import describe_machine, peak_rss_mb, reset_peak_rss
from dsa.runs.progress import Progress, silent

ABSORBED = "absorbed"
"""Dense attention of a model born with DSA: each query, mapped into their frame, reads all rows of the cache."""

DEFAULT_TOKENS = 8192
DEFAULT_NEW_TOKENS = 32


@dataclass(frozen=True)
class Evaluation:
    """What reading one text came to with dense attention, with DSA and with a window.

    Perplexities are over the tokens after position `start` of the prompt. Masses are means over heads, over the
    queries from `start` on and over the layers that select for themselves; `layers` has them one by one. Layers
    left dense, sliding or sharing another's selection are named and not counted.

    Args:
        model: What the model was asked for by.
        document: The text's name.
        tokens: Positions in all: `prompt_tokens` read and `new_tokens` decoded.
        top_k: Tokens read per query.
        start: First evaluated position.
        indexers: Where the indexers came from; `None` for untrained ones.
        report: What attaching did.
        dense: The plain model's reading.
        dsa: The attached model's.
        window: The plain model's (or the accelerated one's), reading sinks and window in the layers that are sparse.
        layers: Attention mass and tokens read, by layer.
        peak_rss_mb: Peak resident memory over everything, MB.
        extrapolated: Positions beyond those the model was trained on.
        dense_attention: transformers' name of the plain model's attention; `"absorbed"` for models born with DSA.
        texts: The three continuations as text.
        seconds: Wall time of the whole evaluation.
        environment: Commit, machine, threads, versions.
    """

    model: str
    document: str
    tokens: int
    prompt_tokens: int
    new_tokens: int
    top_k: int
    start: int
    indexers: str | None
    report: AttachReport
    dense: Reading
    dsa: Reading
    window: Reading
    layers: tuple[LayerMass, ...]
    peak_rss_mb: float
    extrapolated: int
    dense_attention: str
    texts: dict[str, str]
    seconds: float
    environment: dict[str, Any]

    @property
    def born_with_dsa(self) -> bool:
        """Whether the model was born with DSA."""
        return isinstance(self.report, AccelerateReport)

    def mass(self, selection: str) -> float | None:
        """Mean share of the attention mass kept by `"dsa"`, `"window"` or `"oracle"`; `None` without such layers."""
        shares = [getattr(row, selection) for row in self.layers]
        return sum(shares) / len(shares) if shares else None

    def tokens_read(self, attention: str) -> tuple[float, int]:
        """Mean and most tokens read per query from `start` on, in the sparse layers, those that share included."""
        if attention == "dsa" and self.layers:
            measured = {row.layer: row for row in self.layers}
            sources = [row.layer if row.share is None else row.share for row in self._sparse()]
            mean = sum(measured[layer].tokens_mean for layer in sources) / len(sources)
            return mean, max(row.tokens_max for row in self.layers)
        budgets = [row.top_k or self.tokens for row in self._sparse()]
        if attention == "dense" or not budgets:
            budgets = [self.tokens]
        read = [mean_read(self.start + 1, self.prompt_tokens, budget) for budget in budgets]
        return sum(read) / len(read), min(self.prompt_tokens, max(budgets))

    def tokens_read_everywhere(self) -> float:
        """Mean tokens read per query with DSA over all layers with full attention, those left dense included."""
        dense = len(self.layers_of("dense"))
        sparse = len(self._sparse())
        read = dense * self.tokens_read("dense")[0] + (sparse * self.tokens_read("dsa")[0] if sparse else 0.0)
        return read / (dense + sparse)

    def budgets(self) -> list[int]:
        """The different `K` of the sparse layers, ascending."""
        return sorted({row.top_k for row in self._sparse() if row.top_k is not None}) or [self.top_k]

    def _sparse(self) -> list[LayerReport]:
        return [row for row in self.report.layers if row.kind in ("sparse", "shared")]

    def layers_of(self, kind: str) -> list[int]:
        """Numbers of the layers of a kind, as `dsa.models.attached.LayerReport` has it."""
        return [row.layer for row in self.report.layers if row.kind == kind]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types. Times in seconds, memory in MB, shares between 0 and 1."""
        readings = {"dense": self.dense, "dsa": self.dsa, "window": self.window}
        plain: dict[str, Any] = {"model": self.model, "tokens": self.tokens, "top_k": self.top_k}
        plain |= {f"perplexity_{name}": reading.perplexity for name, reading in readings.items()}
        plain |= {f"mass_kept_{selection}": self.mass(selection) for selection in ("dsa", "window", "oracle")}
        plain |= {f"prefill_s_{name}": reading.prefill_s for name, reading in readings.items()}
        plain |= {f"decode_tokens_per_s_{name}": reading.decode_tokens_per_s for name, reading in readings.items()}
        plain["peak_rss_mb"] = self.peak_rss_mb
        plain |= {f"peak_rss_mb_{name}": reading.peak_rss_mb for name, reading in readings.items()}
        for name in ("dsa", "window"):
            plain[f"perplexity_ratio_{name}"] = readings[name].perplexity / self.dense.perplexity
        for name in readings:
            mean, most = self.tokens_read(name)
            plain |= {f"tokens_read_mean_{name}": mean, f"tokens_read_max_{name}": most}
        plain["tokens_read_mean_all_layers_dsa"] = self.tokens_read_everywhere()
        plain |= {
            "document": self.document,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "start": self.start,
            "evaluated_tokens": self.dense.evaluated,
            "extrapolated_positions": self.extrapolated,
            "indexers": self.indexers,
            "indexers_trained": self.report.trained,
            "born_with_dsa": self.born_with_dsa,
            "config": self.report.config.to_dict(),
            "dense_attention": self.dense_attention,
            "layers_sparse": self.layers_of("sparse"),
            "layers_shared": self.layers_of("shared"),
            "layers_dense": self.layers_of("dense"),
            "layers_sliding": self.layers_of("sliding"),
            "layers": [asdict(row) for row in self.layers],
            "continuations": self.texts,
            "seconds": self.seconds,
            "environment": self.environment,
        }
        return plain


def evaluate(
    loaded: LoadedModel,
    document: Document,
    *,
    tokens: int | None = None,
    indexers: str | Path | None = None,
    start: int | None = None,
    new_tokens: int = DEFAULT_NEW_TOKENS,
    cache: str | None = None,
    progress: Progress = silent,
    **overrides: Any,
) -> Evaluation:
    """Measures one text with dense attention, DSA and a window of the same size.

    Args:
        loaded: The model. If it is attached already it is measured with its own indexers. Afterwards it is as it
            was given.
        document: The text.
        tokens: Positions in all, decoded ones included. `None`: 8,192, or the whole of a shorter text.
        indexers: As in `dsa.attach`. `None` takes those of an attached model, those shipped with the default
            model, or untrained ones.
        start: First position whose prediction counts; half of `tokens` by default.
        new_tokens: Tokens to decode, at most a quarter of `tokens`.
        cache: As in `dsa.accelerate`, for models born with DSA.
        progress: Shows the steps.
        **overrides: Fields of the configuration to change, `top_k=1024` for example.

    Raises:
        ValueError: The text is too short, `start` leaves nothing to evaluate, or `dsa.attach` refuses.
        OSError: The indexers cannot be read.
    """
    began = time.perf_counter()
    ids = encode(document, loaded.tokenizer, tokens, default=DEFAULT_TOKENS)
    positions = ids.shape[1]
    new_tokens = min(new_tokens, positions // 4)
    prompt = ids[:, : positions - new_tokens]
    start = min(positions // 2, prompt.shape[1] - 2) if start is None else start
    if not 0 <= start <= prompt.shape[1] - 2:
        raise ValueError(f"start must lie in 0 to {prompt.shape[1] - 2} for this many tokens, got {start}")
    model = loaded.model
    reset_peak_rss()

    def reading(label: str, context: Callable[[], DSAContext] | None = None) -> Reading:
        return read(model, prompt, start=start, new_tokens=new_tokens, context=context, label=label, progress=progress)

    with sparse_while(loaded, indexers, cache=cache, **overrides) as (report, source):
        dsa = reading("DSA")
        reset_peak_rss()
        observer = MassObserver(report.config, start)
        with torch.no_grad(), layer_progress(model, "Attention mass", progress):
            context = DSAContext(mode="dense", observer=observer)
            model(prompt.to(model.device), use_cache=False, logits_to_keep=1, dsa_context=context)
        mass_peak = peak_rss_mb()
        if isinstance(report, AccelerateReport):
            dense, window = (reading(name.capitalize(), contexts(name, report.config)) for name in ("dense", "window"))
        else:
            detach(model)
            dense = reading("Dense")
            budgets = {row.layer: row.top_k for row in report.layers if row.top_k is not None}
            with window_attention(model, budgets):
                window = reading("Window")
    readings = {"dense": dense, "dsa": dsa, "window": window}
    peaks = [mass_peak, peak_rss_mb(), *(each.peak_rss_mb or 0.0 for each in readings.values())]
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None) or positions
    return Evaluation(
        model=loaded.name,
        document=document.name,
        tokens=positions,
        prompt_tokens=prompt.shape[1],
        new_tokens=new_tokens,
        top_k=report.config.top_k,
        start=start,
        indexers=source,
        report=report,
        dense=dense,
        dsa=dsa,
        window=window,
        layers=tuple(observer.layers),
        peak_rss_mb=max(peaks),
        extrapolated=max(0, positions - trained),
        dense_attention=ABSORBED if isinstance(report, AccelerateReport) else model.config._attn_implementation,
        texts={name: loaded.tokenizer.decode(reading.continuation) for name, reading in readings.items()},
        seconds=time.perf_counter() - began,
        environment=describe_machine(model.device),
    )
