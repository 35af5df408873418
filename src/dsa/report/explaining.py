"""Reading a prompt and writing an answer with an observer that keeps everything that the report shows.

The prompt is read as `dsa generate` reads it. What recording takes is measured and left out of the times.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from dsa.documents import SourceDocument
from dsa.documents.prompt import Prompt
from dsa.generation.passages import cut
from dsa.generation.sampling import GREEDY, Chooser, check_finite
from dsa.generation.session import Session
from dsa.models.attached import AttachReport
from dsa.models.context import DSAContext
from dsa.models.loading import LoadedModel
from dsa.models.sparse import is_sparse, sparse_report_of
from dsa.report.costs import PROBE, costs
from dsa.report.explanation import Explanation, Written
from dsa.report.recording import Recorder
from dsa.runs.machine import describe_machine, reset_peak_rss
from dsa.runs.progress import Progress, silent

EXACT_QUESTION = 48
"""Tokens of the question, at its end, whose selections are kept."""
MEASURED = 256
"""Prompt queries, about, whose attention is measured against everything."""


def explain(
    loaded: LoadedModel,
    document: SourceDocument,
    prompt: Prompt,
    *,
    ask: str | None = None,
    new_tokens: int = 48,
    answer: Sequence[int] | None = None,
    measure_dense: bool = False,
    session: Session | None = None,
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
        session: What reads, by default a new one. What the prompt has in common with the tokens that it holds is not
            read again, but for the question, and the counts, the map and the time are those of the rest.
        progress: Shows the steps.

    Raises:
        ValueError: The model is not attached, or the output is not finite.
    """
    model = loaded.model
    if not is_sparse(model):
        raise ValueError(f"{loaded.name} is not attached, so it selects nothing to explain; call dsa.attach first")
    report = sparse_report_of(model)
    if answer is not None:
        new_tokens = len(answer)
    tokens = len(prompt.ids)
    exact = max(1, min(EXACT_QUESTION, prompt.parts.count("question") or 1))
    recorder = Recorder(
        report.config, tokens, tokens - exact, exact - 1 + new_tokens, len(report.layers), max(8, tokens // MEASURED)
    )
    if session is None:
        session = Session(model)
    session.crop(tokens - exact)
    has_peak = reset_peak_rss()
    with session.using(lambda: DSAContext(observer=recorder, every_layer=True)):
        session.read(prompt.ids, new_tokens=new_tokens + PROBE, progress=progress)
        prefill_s = session.timings.read_s - recorder.seconds
        written, decode_s = _write(loaded, session, new_tokens, answer, recorder, progress)
    pages = [*prompt.pages, *[None] * len(written)]
    parts = [*prompt.parts, *["answer"] * len(written)]
    passages = cut([*prompt.texts, *[each.text for each in written]], pages, parts)
    dsa, dense = costs(session, prompt.ids, recorder, (prefill_s, decode_s), has_peak, measure_dense, progress)
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


def _write(
    loaded: LoadedModel,
    session: Session,
    new_tokens: int,
    answer: Sequence[int] | None,
    recorder: Recorder,
    progress: Progress,
) -> tuple[list[Written], float | None]:
    """The greedy answer or the one given, and seconds per token without what recording took."""
    tokenizer = loaded.tokenizer
    chooser = Chooser(loaded.model, GREEDY, session.token_ids, new_tokens)
    made: list[int] = []
    probabilities: list[float] = []
    began, recorded = time.perf_counter(), recorder.seconds
    with progress("Writing", new_tokens) as advance:
        while True:
            logits = session.logits
            assert logits is not None
            check_finite(logits)
            token = chooser(logits) if answer is None else answer[len(made)]
            made.append(token)
            probabilities.append(float(logits.softmax(dim=-1)[token]))
            advance()
            if len(made) == new_tokens or (answer is None and token in chooser.ends):
                break
            session.feed([token])
    seconds = time.perf_counter() - began - (recorder.seconds - recorded)
    texts, before = [], ""
    for count in range(1, len(made) + 1):
        # Decoded together: a character of several tokens appears with its last.
        text = tokenizer.decode(made[:count])
        whole = text if not text.endswith("\ufffd") or count == len(made) else before
        texts.append(whole[len(before) :])
        before = whole
    ends = [token in chooser.ends for token in made]
    written = [Written(*each) for each in zip(texts, probabilities, ends, strict=True)]
    return written, seconds / (len(made) - 1) if len(made) > 1 else None


def _notes(model: PreTrainedModel, report: AttachReport, prompt: Prompt, tokens: int) -> list[str]:
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
        whole = f" of the document's {prompt.document_tokens:,}" if prompt.document_tokens else ""
        notes.append(f"Only the first {taken:,}{whole} tokens{'' if whole else ' of the document'} were read.")
    return notes
