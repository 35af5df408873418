"""The passes over the model that a calibration is made of, each with the indexers put on as that pass needs them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsa.calibrate.effects import compared_positions, divergence, recording, resumed
from dsa.calibrate.measure import Curves, SelectionObserver, sampled_positions
from dsa.config import DSAConfig, LayerConfig
from dsa.eval.reading import token_losses
from dsa.models.attachment import Attachment, detach, put_on
from dsa.models.context import DSAContext
from dsa.models.decoder import decoder_output, layer_progress
from dsa.runs.progress import Progress


@dataclass
class Text:
    """One text and what each of its tokens costs the dense model.

    Args:
        name: What to call it.
        ids: int64 `[1, n]`.
        losses: Of the tokens after position `start`, once a dense pass was made.
    """

    name: str
    ids: torch.Tensor
    losses: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def short_name(self) -> str:
        """The name without folders."""
        return Path(self.name).name

    @property
    def tokens(self) -> int:
        """How many positions it has."""
        return self.ids.shape[1]

    @property
    def start(self) -> int:
        """First position that counts: the first half is context."""
        return self.tokens // 2


@dataclass
class DensePass:
    """What is kept of a dense pass over a text, for passes that begin in the middle.

    Args:
        decoded: What the decoder returned.
        outputs: What each of its layers returned; empty where nobody asked.
        seconds: How long the pass took, without what was observed on the way.
    """

    decoded: Any
    outputs: list[Any]
    seconds: float


@dataclass
class Passes:
    """A model that is not attached between passes, and the indexers to put on it.

    Args:
        model: The model.
        taken: Its indexers and the configuration they came with.
        full: Layers with full attention.
        progress: Shows the passes.
    """

    model: Any
    taken: Attachment
    full: list[int]
    progress: Progress

    @property
    def config(self) -> DSAConfig:
        """The configuration that the indexers came with."""
        return self.taken.config

    def measure(self, text: Text, curves: Curves, largest: int, *, share: bool, record: bool) -> DensePass:
        """The dense pass over a text: adds to `curves` what selections would keep, and fills in the text's losses."""
        observer = SelectionObserver(curves, self.config, sampled_positions(text.start, text.tokens), share)
        observed = 0.0

        def observe(call: Any) -> None:
            nonlocal observed
            began = time.perf_counter()
            observer(call)
            observed += time.perf_counter() - began

        outputs: list[Any] = []
        began = time.perf_counter()
        with self.attached(top_k=largest), recording(self.model, outputs) if record else nullcontext():
            context = DSAContext(mode="dense", observer=observe)
            decoded = self.forward(text, f"Dense pass over {text.short_name}", context)
        text.losses = self.losses(decoded, text)
        observer.finish()
        return DensePass(decoded, outputs, time.perf_counter() - began - observed)

    def effects(self, text: Text, dense: DensePass, layers: Sequence[int], top_k: int) -> list[float]:
        """What each layer does to the predictions when it alone is sparse; frees `dense.outputs` as it goes."""
        positions = compared_positions(text.start, text.tokens)
        found = {}
        with self.progress(f"Each layer alone at K = {top_k:,}", len(layers)) as advance:
            for layer in sorted(layers, reverse=True):
                alone = {other: LayerConfig(dense=True) for other in self.full if other != layer}
                local = self.config.layers.get(layer, LayerConfig()).local
                if local is not None:
                    alone[layer] = LayerConfig(local=local)
                del dense.outputs[layer:]
                with self.attached(top_k=top_k, layers=alone), resumed(self.model, dense.outputs, layer):
                    sparse = self.forward(text)
                ids = text.ids.to(self.model.device)
                found[layer] = divergence(self.model, dense.decoded, sparse, ids, positions)
                advance()
        return [found[layer] for layer in layers]

    def read_dense(self, text: Text) -> None:
        """Fills in a text's losses."""
        with self.attached():
            decoded = self.forward(text, f"Dense pass over {text.short_name}", DSAContext(mode="dense"))
        text.losses = self.losses(decoded, text)

    def losses_with(self, config: DSAConfig, texts: Sequence[Text], label: str) -> list[torch.Tensor]:
        """The losses of each text, read sparsely."""
        with self.attached(top_k=config.top_k, layers=config.layers):
            return [self.losses(self.forward(text, f"{label}: {text.short_name}"), text) for text in texts]

    @contextmanager
    def attached(self, **overrides: Any) -> Iterator[None]:
        """Puts the indexers on while the context is open."""
        put_on(self.model, self.taken, **overrides)
        try:
            yield
        finally:
            detach(self.model)

    @torch.no_grad()
    def forward(self, text: Text, label: str | None = None, context: DSAContext | None = None) -> Any:
        """What the decoder returns for a text; shown layer by layer under `label`."""
        shown = nullcontext() if label is None else layer_progress(self.model, label, self.progress)
        ids = text.ids.to(self.model.device)
        with shown, decoder_output(self.model) as captured:
            self.model(ids, use_cache=False, logits_to_keep=1, dsa_context=context or DSAContext())
        return captured[0]

    def losses(self, decoded: Any, text: Text) -> torch.Tensor:
        """What the tokens after `text.start` cost, nats."""
        return token_losses(self.model, decoded, text.ids.to(self.model.device), text.start)
