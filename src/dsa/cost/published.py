"""DeepSeek's published cost curve, predicted: V3.1-Terminus (dense) against V3.2 on H800s at 2 dollars an hour.

The report (arXiv 2512.02556, figure 3) plots the price of a million tokens over their position in the sequence, for
prefill and for decoding. Here the price of a token is the time of its parts, one after the other. Attention and the
index scan take what computing takes at the rates that published kernels reach, or in decoding what reading takes if
that is longer. All the rest does not depend on the position and takes what is left of a published serving throughput
without the attention of its short contexts. Nothing is fitted to the curve itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from dsa.config import DSAConfig
from dsa.cost.model_config import shape_from
from dsa.cost.money import price_per_million
from dsa.cost.presets import PRESETS
from dsa.cost.shape import ModelShape
from dsa.cost.work import Parts, Storage, decode_work, prompt_token_work

OTHER_PARTS = ("attention_projections", "indexer_projections", "feed_forward", "lm_head")


@dataclass(frozen=True)
class Assumptions:
    """Everything that goes into the prediction, apart from the two models' configurations. Rates are per device.

    Args:
        price: Dollars for an H800 for an hour, as the report assumes.
        bf16: Peak operations a second of an H800 (and H100), dense, two a multiply-add.
        fp8: The same in FP8.
        bandwidth: Peak bytes a second of its memory.
        attention_efficiency: Share of bf16 that attention reaches: 640 TFLOP/s of FlashMLA's sparse prefill on H800,
            taken for dense attention as well.
        scan_efficiency: Share of FP8 that the index scan reaches: 1,145 TFLOP/s, sglang #11989.
        memory_efficiency: Share of the bandwidth: 3,000 GB/s of FlashMLA's dense decoding.
        cache_bytes: Bytes of one number of the latents in the cache: bf16, 1,152 bytes a token and layer.
        positions_a_step: Positions that a decoding step computes with one read of dense latents or index keys; more
            than one means multi-token prediction whose drafts are all accepted. Selections are read for each.
        serving_devices: Devices of the serving benchmark below: a node of 8 H100.
        serving_prefill: Input tokens a second of such a node running DeepSeek-V3 in SGLang.
        serving_decode: Output tokens a second of such a node.
        serving_tokens: Length of its prompts.
    """

    price: float = 2.0
    bf16: float = 989e12
    fp8: float = 1979e12
    bandwidth: float = 3.35e12
    attention_efficiency: float = 0.65
    scan_efficiency: float = 0.58
    memory_efficiency: float = 0.9
    cache_bytes: float = 2.0
    positions_a_step: int = 2
    serving_devices: int = 8
    serving_prefill: float = 52_300.0
    serving_decode: float = 22_300.0
    serving_tokens: int = 2_000

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number above 0, got {value}")

    def sentences(self) -> list[str]:
        """Each of them in words."""
        step = "one position a step" if self.positions_a_step == 1 else f"{self.positions_a_step} positions a step"
        return [
            f"an H800 costs ${self.price:.2f} an hour; {self.bf16 / 1e12:,.0f} TFLOP/s bf16, "
            f"{self.fp8 / 1e12:,.0f} TFLOP/s FP8, {self.bandwidth / 1e12:.2f} TB/s",
            f"attention reaches {self.attention_efficiency:.2f} of bf16 (FlashMLA: 640 TFLOP/s sparse prefill), dense "
            "attention as much",
            f"the index scan reaches {self.scan_efficiency:.2f} of FP8 (sglang #11989: 1,145 TFLOP/s)",
            f"decoding reads memory at {self.memory_efficiency:.2f} of its bandwidth (FlashMLA: 3,000 GB/s)",
            f"a latent takes {576 * self.cache_bytes:,.0f} bytes a token and layer, an index key 132",
            "latent attention is expanded in dense prefill, absorbed in decoding and where it is sparse",
            f"decoding computes {step} with one read of latents (dense) and of index keys; selections are read for "
            "each position",
            f"all other work takes what is left of SGLang's {self.serving_prefill:,.0f} input and "
            f"{self.serving_decode:,.0f} output tokens/s on {self.serving_devices} H100 (DeepSeek-V3, prompts of "
            f"{self.serving_tokens:,} tokens), in proportion to its multiply-adds",
            "parts run one after the other; sampling, communication and idle time are in the serving figures alone",
        ]


@dataclass(frozen=True)
class Point:
    """Dollars for a million tokens at one position, dense and with DSA."""

    phase: str
    position: int
    dense: float
    dsa: float

    @property
    def reduction(self) -> float:
        """How many times cheaper."""
        return self.dense / self.dsa

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "reduction": self.reduction}


PUBLISHED = {"prefill": 3.5, "decode": 8.7}
"""Reductions at 128K tokens, read off the report's figure 3."""

PUBLISHED_AT = 131_072


class Curve:
    """The predicted curve under some assumptions.

    Args:
        assumptions: Defaults are those of the module.

    Raises:
        ValueError: The serving figures leave no time for anything but attention.
    """

    def __init__(self, assumptions: Assumptions | None = None) -> None:
        self.assumptions = assumptions or Assumptions()
        self.dense = shape_from(PRESETS["DeepSeek-V3"], "DeepSeek-V3.1-Terminus")
        self.sparse = shape_from(PRESETS["DeepSeek-V3.2"], "DeepSeek-V3.2")
        self._efficiency = {"prefill": self._calibrated("prefill"), "decode": self._calibrated("decode")}

    @property
    def efficiency(self) -> dict[str, float]:
        """Share of FP8 that all other work reaches, by phase."""
        return dict(self._efficiency)

    def at(self, phase: str, position: int) -> Point:
        """The price of the token at a position, which sees as many."""
        dense = self._seconds(self.dense, None, phase, position)
        dsa = self._seconds(self.sparse, self.sparse.trained_dsa, phase, position)
        price = self.assumptions.price
        return Point(phase, position, price_per_million(price, 1 / dense), price_per_million(price, 1 / dsa))

    def to_json(self, positions: list[int]) -> dict[str, Any]:
        """Assumptions, what follows from them, the points, and the published figures to compare."""
        points = [self.at(phase, position) for phase in PUBLISHED for position in positions]
        return {
            "dense_model": self.dense.name,
            "dsa_model": self.sparse.name,
            "assumptions": asdict(self.assumptions),
            "assumptions_in_words": self.assumptions.sentences(),
            "efficiency_of_other_work": self.efficiency,
            "points": [point.to_json() for point in points],
            "published": self._held_against(),
        }

    def _held_against(self) -> list[dict[str, Any]]:
        """The published and the predicted reductions; decoding with one position a step as well."""
        alone = Curve(replace(self.assumptions, positions_a_step=1))
        rows = [("prefill", self), ("decode", self)] + [("decode", alone)] * (self.assumptions.positions_a_step != 1)
        found = []
        for phase, curve in rows:
            predicted = curve.at(phase, PUBLISHED_AT).reduction
            found.append(
                {
                    "phase": phase,
                    "positions_a_step": None if phase == "prefill" else curve.assumptions.positions_a_step,
                    "position": PUBLISHED_AT,
                    "reduction": PUBLISHED[phase],
                    "predicted": predicted,
                    "difference": predicted / PUBLISHED[phase] - 1,
                }
            )
        return found

    def _parts(self, shape: ModelShape, config: DSAConfig | None, phase: str, position: int) -> Parts:
        """The work of the one token at a position."""
        storage = Storage(weights=1.0, cache=self.assumptions.cache_bytes)
        if phase == "decode":
            return decode_work(shape, config, position, position, storage)
        return prompt_token_work(shape, config, position, storage)

    def _seconds(self, shape: ModelShape, config: DSAConfig | None, phase: str, position: int) -> float:
        parts = self._parts(shape, config, phase, position)
        return self._attention_seconds(parts, phase, sparse=config is not None) + _operations(parts) / (
            self._efficiency[phase] * self.assumptions.fp8
        )

    def _attention_seconds(self, parts: Parts, phase: str, *, sparse: bool) -> float:
        given = self.assumptions
        shared = given.positions_a_step
        rates = {
            "attention": (given.attention_efficiency * given.bf16, 1 if sparse else shared),
            "index_scan": (given.scan_efficiency * given.fp8, shared),
        }
        seconds = 0.0
        for part, (rate, sharing) in rates.items():
            # The rates of prefill are those of whole kernels, their reading included.
            read = parts[part].cache_read / sharing if phase == "decode" else 0.0
            reading = read / (given.memory_efficiency * given.bandwidth)
            seconds += max(2 * parts[part].multiply_adds / rate, reading)
        return seconds

    def _calibrated(self, phase: str) -> float:
        """Share of FP8 that all other work reaches: DeepSeek-V3's serving time without its attention."""
        given = self.assumptions
        served = given.serving_devices / (given.serving_prefill if phase == "prefill" else given.serving_decode)
        # A prompt's tokens see half of it on average.
        position = given.serving_tokens // 2 if phase == "prefill" else given.serving_tokens
        parts = self._parts(self.dense, None, phase, position)
        left = served - self._attention_seconds(parts, phase, sparse=False)
        if left <= 0:
            raise ValueError(
                f"serving_{phase}: attention alone takes {1 / (served - left):,.0f} tokens/s at these rates, so "
                f"{1 / served:,.0f} cannot be served on one device; give a lower figure"
            )
        return _operations(parts) / left / given.fp8


def _operations(parts: Parts) -> float:
    """Of all that does not depend on the position, two a multiply-add."""
    return 2 * sum(parts[part].multiply_adds for part in OTHER_PARTS)
