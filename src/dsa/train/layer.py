"""Training one layer's indexer on what the layer just computed.

The model is frozen, so the layers' losses are independent: each indexer is trained on the spot, while its layer's
queries, keys and hidden states exist, and memory holds one layer at a time.

Shapes: `B` sequences, `S` tokens, `Q` queries of one update, `Hi`/`Di` index heads / index head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dsa.config import DSAConfig
from dsa.models.context import AttentionCall
from dsa.modules.indexer import Indexer, IndexInputs, Rope
from dsa.ops import indexer_loss
from dsa.train.adam import load_state, state_of
from dsa.train.processes import Processes
from dsa.train.settings import BETAS, SparseSettings, WarmupSettings
from dsa.train.start import fit_indexer

TOKENS_AT_ONCE = 8192


class LayerTrainer:
    """An fp32 copy of one layer's indexer with its optimizer.

    The copy is what learns, so that a model in bf16 trains indexers as well as one in fp32; `write_back` gives the
    model what was learnt.

    Args:
        layer: Layer number.
        indexer: The model's indexer; unchanged until `write_back`.
        config: What the model is attached with.
        settings: Those of the stage.
        processes: With which the gradients are averaged; `None` for this one alone.
    """

    def __init__(
        self,
        layer: int,
        indexer: Indexer,
        config: DSAConfig,
        settings: WarmupSettings | SparseSettings,
        processes: Processes | None = None,
    ) -> None:
        self.layer = layer
        self.settings = settings
        self.processes = processes or Processes()
        self.sinks, self.local = settings.always_read(config, layer)
        self.model_indexer = indexer
        self.indexer = copy.deepcopy(indexer).float().requires_grad_(True)
        self.parameters = dict(self.indexer.named_parameters())
        device = next(iter(self.parameters.values())).device
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.indexer_lr,
            betas=BETAS,
            weight_decay=0.0,
            fused=device.type == "cuda",
        )

    @torch.no_grad()
    def fit(
        self,
        call: AttentionCall,
        queries: torch.Tensor,
        query_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Sets the indexer in closed form from the queries of the first sequence; arguments as in `train`.

        Of several processes the first one's weights are everybody's.
        """
        if self.processes.rank == 0:
            fit_indexer(self.indexer, call, queries[:, 0].flatten().unique(), self.sinks, self.local, query_of)
        if self.processes.size > 1:
            for parameter in self.parameters.values():
                parameter.mul_(self.processes.size if self.processes.rank == 0 else 0)
            self.processes.mean_(self.parameters.values())

    def train(
        self,
        call: AttentionCall,
        queries: torch.Tensor,
        step: int,
        query_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Runs one optimizer step per entry of `queries`.

        Args:
            call: What the layer computed.
            queries: Ascending positions int64 `[updates, B, Q]`, on the device of the call.
            step: Number of the step, from 0.
            query_of: Main queries `[B, Q, H, D]` of some positions, where the call has none (`dsa.train.chunked`).

        Returns:
            Mean loss over the updates, and a sum over the activations that is finite if they are; fp32 `[2]` on the
            device, because reading it would make the device wait.
        """
        hidden = call.hidden_states.detach()
        # In parts: on a CPU torch sums narrow tensors in a copy that is as wide as the sum.
        parts = [part for each in (hidden, call.query, call.key) for part in each.split(TOKENS_AT_ONCE, dim=1)]
        activations = torch.stack([part.sum(dtype=torch.float32) for part in parts]).sum()
        total = torch.zeros((), device=hidden.device)
        for update, rows in enumerate(queries):
            lr = self.settings.scheduled(self.settings.indexer_lr, step + (update + 0.5) / len(queries))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            total += self._update(call, hidden, rows, query_of)
        return torch.stack((total / len(queries), activations))

    def _update(
        self,
        call: AttentionCall,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        query_of: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        sequences = torch.arange(len(rows), device=rows.device)[:, None]
        with torch.enable_grad():
            index = index_some(self.indexer, hidden, call.rope, rows, _detached(call.query_latent))
            loss = indexer_loss(
                index.query,
                index.key,
                index.weight,
                call.query[sequences, rows] if query_of is None else query_of(rows),
                call.key,
                attention_scale=call.scale,
                key_start=call.key_start[sequences, rows],
                key_end=call.key_end[sequences, rows],
                sinks=self.sinks,
                local=self.local,
                softcap=call.softcap,
                sink_logits=call.sink_logits,
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.mean_(each.grad for each in self.parameters.values() if each.grad is not None)
        nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
        self.optimizer.step()
        return loss.detach()

    def accumulate(self, call: AttentionCall, rows: torch.Tensor, share: float) -> torch.Tensor:
        """Adds the gradients of `share` times the loss over what was selected (arXiv 2512.02556, eq. 4).

        Nothing of it reaches the model: hidden states are detached, queries and keys are constants of the loss.

        Args:
            call: What the layer computed with its selection; a layer that saw no more than it may select from all.
            rows: Ascending positions int64 `[B, Q]`, on the device of the call.
            share: What the loss is multiplied with.

        Returns:
            The loss, detached.
        """
        sequences = torch.arange(len(rows), device=rows.device)[:, None]
        hidden = call.hidden_states.detach()
        with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
            index = index_some(self.indexer, hidden, call.rope, rows, _detached(call.query_latent))
            loss = indexer_loss(
                index.query,
                index.key,
                index.weight,
                call.query.detach()[sequences, rows],
                call.key.detach(),
                indices=None if call.indices is None else call.indices[sequences, rows],
                attention_scale=call.scale,
                key_start=call.key_start[sequences, rows],
                key_end=call.key_end[sequences, rows],
                sinks=self.sinks,
                local=self.local,
                softcap=call.softcap,
                sink_logits=call.sink_logits,
            )
            (loss * share).backward()
        return loss.detach()

    def update(self, lr: float) -> None:
        """One optimizer step with the gradients accumulated, averaged over the processes."""
        grads = [each.grad for each in self.parameters.values() if each.grad is not None]
        self.processes.mean_(grads)
        nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def write_back(self) -> None:
        """Gives the model's indexer the weights learnt, in its own dtype."""
        for name, parameter in self.model_indexer.named_parameters():
            parameter.copy_(self.parameters[name])

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next update depends on, by name: weights, and both moments and count of AdamW."""
        return state_of(self.parameters, self.optimizer)

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes what `state` returned.

        Raises:
            ValueError: A tensor is missing, left over, or has another shape.
        """
        load_state(self.parameters, self.optimizer, tensors, f"layer {self.layer}")


def index_some(
    indexer: Indexer,
    hidden: torch.Tensor,
    rope: Rope | None,
    rows: torch.Tensor,
    query_latent: torch.Tensor | None = None,
) -> IndexInputs:
    """Index queries and weights of some tokens, index keys of all.

    Taking the rows before the projections keeps the projections of the rest out of both passes.

    Args:
        indexer: The indexer.
        hidden: `[B, S, hidden_size]`.
        rope: Angles for all tokens, or `None`.
        rows: Positions `[B, Q]`.
        query_latent: `[B, S, Lq]`, what the queries are made of where that is not the hidden states.

    Returns:
        Queries `[B, Q, Hi, Di]`, keys `[B, S, Di]`, weights `[B, Q, Hi]`.
    """
    sequences = torch.arange(len(rows), device=rows.device)[:, None]
    angles = None if rope is None else (_rows_of(rope[0], rows), _rows_of(rope[1], rows))
    asking = None if query_latent is None else query_latent[sequences, rows].float()
    query, weight = indexer.queries(hidden[sequences, rows].float(), angles, asking)
    return IndexInputs(query, _keys(indexer, hidden, rope), weight)


def _keys(indexer: Indexer, hidden: torch.Tensor, rope: Rope | None) -> torch.Tensor:
    """Index keys `[B, S, Di]` of an fp32 indexer; narrower hidden states are never held in fp32 as a whole."""
    if hidden.dtype == torch.float32:
        return indexer.keys(hidden, rope)

    def widened(part: torch.Tensor, angles: Rope | None) -> torch.Tensor:
        return indexer.keys(part.float(), angles)

    keys = []
    for begin in range(0, hidden.shape[1], TOKENS_AT_ONCE):
        part = slice(begin, begin + TOKENS_AT_ONCE)
        angles = None if rope is None else (rope[0][:, part], rope[1][:, part])
        keys.append(cast(torch.Tensor, checkpoint(widened, hidden[:, part], angles, use_reentrant=False)))
    return torch.cat(keys, dim=1)


def _detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach()


def _rows_of(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows `[B, Q]` of a table `[B or 1, S, R]`."""
    return table[torch.arange(len(rows), device=rows.device)[:, None] if len(table) > 1 else 0, rows]


def draw_queries(eligible: torch.Tensor, per_update: int, updates: int, generator: torch.Generator) -> torch.Tensor:
    """Which queries each update learns from: a random order of all, cut into updates, and again when used up.

    Args:
        eligible: The queries that learn something, int64 `[n]` on the CPU, ascending.
        per_update: Queries per update, at most `n`.
        updates: Updates.
        generator: Source of the order.

    Returns:
        int64 `[updates, per_update]` on the CPU, each row ascending and without repetition.
    """
    rows: list[torch.Tensor] = []
    per_round = len(eligible) // per_update
    while len(rows) < updates:
        order = eligible[torch.randperm(len(eligible), generator=generator)]
        rows.extend(order[: per_round * per_update].view(per_round, per_update).sort(dim=1).values)
    return torch.stack(rows[:updates])
