"""What a report carries, packed small: 150,000 tokens with their selections stay below 20 MB.

Every array is deflated and written as base64; the page inflates it with the browser's own `DecompressionStream`.

- `text`: the whole text, UTF-8, with control characters shown as pictures, one for one.
- `widths`: uint16 per token, its length in UTF-16 units, as JavaScript counts.
- `rates`: uint8 `[layers, n]`, how often each token was selected, on a scale of 15 steps (`rate_level`).
- `distances`: uint8 `[n]`, eight times the mean `log2` of the distance from which it was selected.
- `parts`: uint8 `[PARTS, PARTS]`, which part of the text (row) selected which (column).
- `gaps`: for each kept query and layer the selected positions, ascending, as differences in LEB128 with the first
  difference from -1.
- `weights`: uint8 for each of these, the attention on it (`weight_level`).
- `sizes`: uint32 per kept query and layer, how many positions `gaps` holds of it.
- `stats`: float32 `[queries, layers, 5]`: tokens read, attention kept, kept by a window, share outside the window,
  tokens outside the window.
"""

from __future__ import annotations

import base64
import re
import zlib
from typing import Any

import torch
from torch import Tensor

from dsa.report.explanation import Explanation
from dsa.report.recording import PARTS, Row

RATE_STEPS, RATE_SCALE = 15, 1.5
WEIGHT_SCALE, WEIGHT_TOP = 8, 160

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    """Text in which characters that steer or hide are replaced, one for one, by ones that are seen."""
    return _UNSEEN.sub(lambda found: chr(0x2400 + ord(found[0])) if found[0] < " " else "\u2421", text)


def rate_level(rate: Tensor) -> Tensor:
    """uint8: 0 for never, else `15 + 1.5 log2(rate)`, at least 1."""
    level = (RATE_STEPS + RATE_SCALE * rate.clamp(min=1e-9).log2()).round().clamp(1, RATE_STEPS)
    return torch.where(rate > 0, level, 0).to(torch.uint8)


def weight_level(weight: Tensor) -> Tensor:
    """uint8: `160 + 8 log2(weight)`, at least 0, which stands for no weight."""
    return (WEIGHT_TOP + WEIGHT_SCALE * weight.clamp(min=1e-9).log2()).round().clamp(0, WEIGHT_TOP).to(torch.uint8)


def varints(values: Tensor) -> bytes:
    """Non-negative int64 values as LEB128: seven bits a byte, the lowest first, the top bit says that more follow."""
    lengths = 1 + (values[:, None] >= torch.tensor([1 << 7, 1 << 14, 1 << 21, 1 << 28])).sum(dim=1)
    columns = torch.arange(5)
    pieces = (values[:, None] >> (7 * columns)) & 127
    more = (columns < lengths[:, None] - 1).long() << 7
    return bytes((pieces | more)[columns < lengths[:, None]].to(torch.uint8).numpy())


def packed(raw: bytes) -> str:
    """Deflated (zlib), as base64."""
    return base64.b64encode(zlib.compress(raw, 9 if len(raw) < 1 << 20 else 6)).decode("ascii")


def pack(explanation: Explanation) -> dict[str, str]:
    """The arrays of a report by name, as described above."""
    recorder, prompt = explanation.recorder, explanation.prompt
    texts = [visible(text) for text in (*prompt.texts, *(each.text for each in explanation.answer))]
    widths = torch.tensor([min(65535, len(text.encode("utf-16-le")) // 2) for text in texts])
    layers = sorted(recorder.counts)
    rates = torch.stack([rate_level(recorder.rates(layer)) for layer in layers])
    parts = recorder.parts.view(PARTS, PARTS)
    parts = (255 * (parts / parts.amax(dim=1, keepdim=True).clamp(min=1)).sqrt()).round()
    gaps, weights, sizes, stats = [], [], [], []
    for query in explanation.queries:
        for layer in layers:
            row = recorder.rows[query].get(layer) or _NOTHING
            before = torch.cat((torch.tensor([-1]), row.positions[:-1].long()))[: len(row.positions)]
            gaps.append(varints(row.positions.long() - before))
            weights.append(weight_level(row.weights))
            sizes.append(len(row.positions))
            stats.append((row.read, row.kept, row.window_kept, row.outside, row.selected_outside))
    return {
        "text": packed("".join(texts).encode()),
        "widths": _array(widths, torch.uint16),
        "rates": _array(rates, torch.uint8),
        "distances": _array((8 * recorder.distances()).round().clamp(max=255), torch.uint8),
        "parts": _array(parts, torch.uint8),
        "gaps": packed(b"".join(gaps)),
        "weights": _array(torch.cat(weights), torch.uint8),
        "sizes": _array(torch.tensor(sizes), torch.int32),
        "stats": _array(torch.tensor(stats), torch.float32),
    }


def meta(explanation: Explanation) -> dict[str, Any]:
    """What the page needs to know of the arrays, as plain JSON types."""
    recorder, prompt = explanation.recorder, explanation.prompt
    layers = sorted(recorder.counts)
    counts = [recorder.counts[layer] for layer in layers]
    document = [place for place, part in enumerate(prompt.parts) if part == "document"]
    return {
        "tokens": len(prompt.ids),
        "document": [document[0], document[-1] + 1],
        "queries": explanation.queries,
        "sinks": recorder.config.sinks,
        "layers": [
            {
                "number": each.layer,
                "top_k": each.top_k,
                "local": each.local,
                "kept": each.kept / each.sampled if each.sampled else None,
                "window": each.window_kept / each.sampled if each.sampled else None,
            }
            for each in counts
        ],
        "probabilities": [round(each.probability, 4) for each in explanation.answer],
        "answer_tokens": len(explanation.answer),
        "passages": [
            [each.start, each.page or 0, each.part, int(says)]
            for each, says in zip(explanation.passages, explanation.says, strict=True)
        ],
        "parts": PARTS,
        "has_pages": any(page is not None for page in prompt.pages),
    }


_NOTHING = Row(torch.zeros(0, dtype=torch.int32), torch.zeros(0), 0, 1.0, 1.0, 0.0, 0)


def _array(values: Tensor, dtype: torch.dtype) -> str:
    return packed(values.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
