"""One reading of a document with everything that its report shows: tokens, selections, passages, time, memory.

The prompt is read as `dsa generate` reads it, in chunks into a cache, with an observer that keeps what was selected.
Its time is measured and taken off. Behind the answer, a few tokens are read once more dense and once more sparse on the
same cache: their difference is what dense attention would have cost, measured for decoding and carried over to the
prefill, unless the dense prefill itself is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dsa.documents import SourceDocument
from dsa.documents.prompt import Prompt
from dsa.eval.comparison import new_cache
from dsa.models.attached import AttachReport
from dsa.models.context import DSAContext
from dsa.models.decoder import layer_progress
from dsa.models.loading import LoadedModel
from dsa.models.sparse import is_sparse, sparse_report_of
from dsa.modules.cache import IndexedLayer
from dsa.report.passages import Passage, Reading, cut, most_read, shares
from dsa.report.recording import Recorder
from dsa.runs.machine import describe_machine, peak_rss_mb, reset_peak_rss
from dsa.runs.progress import Progress, silent

CHUNK = 4096
EXACT_QUESTION = 48
"""Tokens of the question, at its end, whose selections are kept."""
MEASURED = 256
"""Prompt queries, about, whose attention is measured against everything."""
PROBE = 32
"""Tokens read once more, dense and sparse, to compare their times."""


@dataclass(frozen=True)
class Cost:
    """Time, memory and tokens of one way to read. Seconds and MB (10^6 bytes); `None` where not known.

    Args:
        prefill_s: Reading the prompt.
        decode_s: One token behind it.
        cache_mb: Keys and values of the prompt, and index keys where there are any.
        read: Tokens read per query and layer while reading the prompt, mean.
        peak_rss_mb: Peak resident memory of the process.
        is_estimated: Whether `prefill_s` was carried over from a measured part.
    """

    prefill_s: float | None
    decode_s: float | None
    cache_mb: float
    read: float
    peak_rss_mb: float | None
    is_estimated: bool = False


@dataclass(frozen=True)
class Written:
    """One token of the answer: its text, the probability that the model gave it, and whether it ends the text."""

    text: str
    probability: float
    is_end: bool = False


@dataclass
class Explanation:
    """What the report is made of.

    Args:
        model: What the model was asked for by.
        document: The document's name.
        ask: The question, if any.
        prompt: What was read.
        answer: What was written.
        report: What attaching did.
        recorder: The selections.
        passages: The whole text, answer included, in passages.
        dsa: What reading cost.
        dense: What dense attention costs in its place.
        notes: What a reader must know: untrained indexers, extrapolated positions, a document cut short.
        environment: Machine and versions.
    """

    model: str
    document: str
    ask: str | None
    prompt: Prompt
    answer: list[Written]
    report: AttachReport
    recorder: Recorder
    passages: list[Passage]
    dsa: Cost
    dense: Cost
    notes: list[str]
    environment: dict[str, Any]

    @property
    def queries(self) -> list[int]:
        """Positions of the queries whose selections are kept, ascending."""
        return sorted(self.recorder.rows)

    def query_of(self, answer_token: int) -> int:
        """The query that wrote a token of the answer: the one in front of it."""
        return len(self.prompt.ids) - 1 + answer_token

    def most_read(self, query: int, count: int = 10) -> list[Reading]:
        """The passages that distinguish what a query read, over all layers that select."""
        return most_read(self._shares[query], self._usual, count)

    @cached_property
    def _shares(self) -> dict[int, torch.Tensor]:
        """fp32 `[passages]` by kept query: the attention on each passage."""
        lengths = torch.tensor([each.end - each.start for each in self.passages])
        passage_of = torch.arange(len(self.passages)).repeat_interleave(lengths)
        sinks, selecting = self.recorder.config.sinks, self.selecting()
        return {query: shares(rows, query, passage_of, sinks, selecting) for query, rows in self.recorder.rows.items()}

    @cached_property
    def _usual(self) -> torch.Tensor:
        """fp32 `[passages]`: the median over all kept queries, the lower of two."""
        return torch.stack(list(self._shares.values())).median(dim=0).values

    def selecting(self) -> dict[int, int]:
        """The layers that do not read everything, with the number of last tokens that they always read."""
        return {layer: each.local for layer, each in self.recorder.counts.items() if each.top_k is not None}

    @property
    def answer_text(self) -> str:
        """What the model wrote, without the token that ends it."""
        return "".join(each.text for each in self.answer if not each.is_end)

    @property
    def mass_kept(self) -> float | None:
        """Share of dense attention that the selections hold, mean over layers and sampled tokens of the prompt."""
        return _mean([each.kept / each.sampled for each in self.recorder.counts.values() if each.sampled])

    @property
    def mass_kept_window(self) -> float | None:
        """The same for sinks and a window of the same budget."""
        return _mean([each.window_kept / each.sampled for each in self.recorder.counts.values() if each.sampled])

    def text(self, start: int, end: int) -> str:
        """The text of some tokens, the answer's behind the prompt's."""
        texts = self.prompt.texts
        return "".join(
            texts[place] if place < len(texts) else self.answer[place - len(texts)].text for place in range(start, end)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types: figures, and the most read passages of every token of the answer."""
        tokens = []
        for number, written in enumerate(self.answer):
            rows = [
                row for layer, row in self.recorder.rows[self.query_of(number)].items() if layer in self.selecting()
            ]
            tokens.append(
                {
                    **asdict(written),
                    "window_missed": _mean([row.outside for row in rows]),
                    "kept": _mean([row.kept for row in rows]),
                    "window_kept": _mean([row.window_kept for row in rows]),
                    "passages": [
                        {
                            "page": self.passages[each.passage].page,
                            "part": self.passages[each.passage].part,
                            "share": each.share,
                            "usual": each.usual,
                            "text": self.text(self.passages[each.passage].start, self.passages[each.passage].end),
                        }
                        for each in self.most_read(self.query_of(number))
                    ],
                }
            )
        return {
            "model": self.model,
            "document": self.document,
            "ask": self.ask,
            "prompt_tokens": len(self.prompt.ids),
            "document_tokens": self.prompt.parts.count("document"),
            "answer": self.answer_text,
            "tokens": tokens,
            "mass_kept": self.mass_kept,
            "mass_kept_window": self.mass_kept_window,
            "dsa": asdict(self.dsa),
            "dense": asdict(self.dense),
            "config": self.report.config.to_dict(),
            "indexers_trained": self.report.trained,
            "notes": self.notes,
            "environment": self.environment,
        }


@torch.no_grad()
def explain(
    loaded: LoadedModel,
    document: SourceDocument,
    prompt: Prompt,
    *,
    ask: str | None = None,
    new_tokens: int = 48,
    answer: Sequence[int] | None = None,
    measure_dense: bool = False,
    cache: Any = None,
    progress: Progress = silent,
) -> Explanation:
    """Reads a prompt, continues it greedily until the model ends its text, and keeps what was read.

    Args:
        loaded: An attached model, or one born with DSA that is accelerated.
        document: What the prompt was made of.
        prompt: What `make_prompt` returned.
        ask: The question in it.
        new_tokens: Tokens to write at most.
        answer: Write these tokens, whatever the model would, to see what it reads for them; at least one.
        measure_dense: Read the prompt once more with dense attention, in place of estimating its time.
        cache: What the prompt is read into, from `new_cache` with `room_for` the prompt and the answer; by default a
            new one. Tokens in it must be those that the prompt begins with. They are not read again, and the counts,
            the map and the time are those of the rest: several questions about one document, cropped between them.
        progress: Shows the steps.

    Raises:
        ValueError: The model is not attached, the cache leaves nothing to read, or the output is not finite.
    """
    model = loaded.model
    if not is_sparse(model):
        raise ValueError(f"{loaded.name} is not attached, so it selects nothing to explain; call dsa.attach first")
    report = sparse_report_of(model)
    if answer is not None:
        new_tokens = len(answer)
    tokens = len(prompt.ids)
    kept = max(1, min(EXACT_QUESTION, prompt.parts.count("question") or 1))
    recorder = Recorder(
        report.config, tokens, tokens - kept, kept - 1 + new_tokens, len(report.layers), max(8, tokens // MEASURED)
    )
    ids = torch.tensor([prompt.ids], device=model.device)
    if cache is None:
        cache = new_cache(model, room_for(tokens, new_tokens))
    held = cache.get_seq_length()
    if held >= tokens:
        raise ValueError(f"cache: it holds {held:,} tokens, and the prompt has {tokens:,}: nothing is left to read")
    reset = reset_peak_rss()
    began = time.perf_counter()
    chunks = ids[:, held:].split(CHUNK, dim=1)
    with layer_progress(model, f"Reading {tokens:,} tokens", progress, len(chunks)):
        for chunk in chunks:
            output = model(
                chunk,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                dsa_context=DSAContext(observer=recorder, every_layer=True),
            )
    prefill_s = time.perf_counter() - began - recorder.seconds
    written, decode_s = _write(loaded, output, cache, new_tokens, answer, recorder, progress)
    peak = peak_rss_mb() if reset else None
    made = tokens + max(0, len(written) - 1)
    pages = [*prompt.pages, *[None] * len(written)]
    parts = [*prompt.parts, *["answer"] * len(written)]
    passages = cut([*prompt.texts, *[each.text for each in written]], pages, parts)
    read = {layer: each.read / (tokens - held) for layer, each in recorder.counts.items()}
    mean_read = sum(read.values()) / max(1, len(read))
    both = _probe(model, cache, ids[:, -PROBE:], made, progress)
    if both is not None:
        (dense_chunk, sparse_chunk), (dense_step, sparse_step) = both
        decode_s = sparse_step if decode_s is None else decode_s
        dense_decode: float | None = decode_s + dense_step - sparse_step
        # Per query the difference grows with what it sees, from nothing at K tokens on.
        first, last = (max(0, seen - report.config.top_k) for seen in (held, tokens))
        beyond = (last**2 - first**2) / (2 * last) if last else 0.0
        extra = (dense_chunk - sparse_chunk) / min(PROBE, tokens) * beyond
        dense_prefill: float | None = prefill_s + extra
    else:
        dense_decode = dense_prefill = None
    sizes = _cache_mb(cache, tokens)
    dsa = Cost(prefill_s, decode_s, sum(sizes), mean_read, peak)
    dense_peak = None
    if measure_dense:
        del cache, output
        dense_prefill, dense_peak = _read_dense(model, ids.split(CHUNK, dim=1), tokens, progress)
    dense = Cost(dense_prefill, dense_decode, sizes[0], (held + tokens + 1) / 2, dense_peak, not measure_dense)
    return Explanation(
        model=loaded.name,
        document=Path(document.name).name,
        ask=ask,
        prompt=prompt,
        answer=written,
        report=report,
        recorder=recorder,
        passages=passages,
        dsa=dsa,
        dense=dense,
        notes=_notes(model, report, prompt, tokens),
        environment=describe_machine(model.device),
    )


def room_for(tokens: int, new_tokens: int) -> int:
    """Tokens that a cache must hold for `explain` to read a prompt of `tokens` and to write `new_tokens`."""
    return tokens + new_tokens + PROBE


def _write(
    loaded: LoadedModel,
    output: Any,
    cache: Any,
    new_tokens: int,
    answer: Sequence[int] | None,
    recorder: Recorder,
    progress: Progress,
) -> tuple[list[Written], float | None]:
    """The greedy answer or the one given, and seconds per token without what recording took."""
    model, tokenizer = loaded.model, loaded.tokenizer
    stop = model.generation_config.eos_token_id
    stops = set(stop if isinstance(stop, list) else [stop])
    made: list[int] = []
    probabilities: list[float] = []
    began, recorded = time.perf_counter(), recorder.seconds
    with progress("Writing", new_tokens) as advance:
        while True:
            logits = output.logits[0, -1].float()
            if not bool(torch.isfinite(logits).all()):
                raise ValueError(
                    "the model's output for this text is not finite: its weights or activations are NaN or overflow; "
                    "try fp32, and check the checkpoint"
                )
            token = int(logits.argmax()) if answer is None else answer[len(made)]
            made.append(token)
            probabilities.append(float(logits.softmax(dim=-1)[token]))
            advance()
            if len(made) == new_tokens or (answer is None and token in stops):
                break
            step = torch.tensor([[token]], device=model.device)
            output = model(
                step,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                dsa_context=DSAContext(observer=recorder, every_layer=True),
            )
    seconds = time.perf_counter() - began - (recorder.seconds - recorded)
    texts, before = [], ""
    for count in range(1, len(made) + 1):
        # Decoded together: a character of several tokens appears with its last.
        text = tokenizer.decode(made[:count])
        whole = text if not text.endswith("\ufffd") or count == len(made) else before
        texts.append(whole[len(before) :])
        before = whole
    ends = [token in stops for token in made]
    written = [Written(*each) for each in zip(texts, probabilities, ends, strict=True)]
    return written, seconds / (len(made) - 1) if len(made) > 1 else None


def _probe(
    model: Any, cache: Any, ids: torch.Tensor, made: int, progress: Progress
) -> list[tuple[float, float]] | None:
    """Seconds `(dense, sparse)` of a chunk and of one token behind `made` cached ones; `None` where a cache cannot be
    cropped."""
    if not all(isinstance(layer, IndexedLayer) for layer in cache.layers):
        return None
    times = []
    with progress("Dense attention on the last tokens, to compare", 2) as advance:
        for part in (ids, ids[:, -1:]):
            pair = []
            for mode in ("dense", "sparse"):
                best = float("inf")
                for _ in range(2):
                    began = time.perf_counter()
                    model(
                        part,
                        past_key_values=cache,
                        use_cache=True,
                        logits_to_keep=1,
                        dsa_context=DSAContext(mode=mode),
                    )
                    best = min(best, time.perf_counter() - began)
                    cache.crop(-part.shape[1])
                pair.append(best)
            times.append((pair[0], pair[1]))
            advance()
    return times


def _read_dense(model: Any, chunks: Any, tokens: int, progress: Progress) -> tuple[float, float | None]:
    """Seconds and peak memory of the same prefill with dense attention."""
    cache = new_cache(model, tokens)
    reset = reset_peak_rss()
    began = time.perf_counter()
    with layer_progress(model, f"Reading {tokens:,} tokens dense", progress, len(chunks)):
        for chunk in chunks:
            model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1, dsa_context=DSAContext(mode="dense"))
    return time.perf_counter() - began, peak_rss_mb() if reset else None


def _cache_mb(cache: Any, tokens: int) -> tuple[float, float]:
    """MB of keys and values, and of index keys, of the prompt's tokens."""
    kv = index = 0.0
    for layer in cache.layers:
        keys, values = layer.keys, layer.values
        per_token = sum(each[0, :, 0].numel() * each.element_size() for each in (keys, values))
        kv += per_token * tokens
        if isinstance(layer, IndexedLayer) and layer.index_dtype is not None:
            stored = layer.index_keys()
            width = stored.shape[-1] if isinstance(stored, torch.Tensor) else stored.data.shape[-1]
            index += tokens * (width * 4 if isinstance(stored, torch.Tensor) else width + 4)
    return kv / 1e6, index / 1e6


def _notes(model: Any, report: AttachReport, prompt: Prompt, tokens: int) -> list[str]:
    notes = []
    if not report.trained:
        notes.append("The indexers are UNTRAINED: what was selected here is arbitrary.")
    if tokens <= report.config.top_k:
        notes.append(
            f"The text has {tokens:,} tokens, no more than K = {report.config.top_k:,}: everything was read, and "
            "nothing had to be selected."
        )
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if trained is not None and tokens > trained:
        notes.append(f"{tokens - trained:,} tokens lie beyond the {trained:,} positions of the model.")
    own = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if own.get("rope_type", "default") != "default":
        notes.append(
            f"The model's positions were extended ({own['rope_type']}, factor {own.get('factor', 1):g}); it was not "
            "trained on texts of this length, so the answer may be worse than on a shorter one."
        )
    taken = prompt.parts.count("document")
    if prompt.is_cut:
        notes.append(f"Only the first {taken:,} of the document's {prompt.document_tokens:,} tokens were read.")
    return notes


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
