"""The mathematics of old files: models that donGPT runs and trains on, but does not make anew.

EDS (the Empathetic-Dialogue-System) had two position schemes whose names promise something else. What they compute is
kept here as it was, so that its checkpoints give the logits that they were trained to give.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn

from configurator import UserError
from model import GPT, GPTConfig, rotation_at


@dataclass(frozen=True)
class LegacyConfig(GPTConfig):
    """A GPT with old mathematics where tokens get their positions; pos_embd says nothing here."""

    legacy: Literal["eds-rope", "eds-relative"] = "eds-rope"  # whose

    has_wpe = False
    has_relative = False

    @property
    def positions(self) -> str:
        return self.legacy


class EDSModel(GPT):
    """What the two have in common: no sequence is longer than block_size, and every text is encoded from its start."""

    can_cache = False

    def check_length(self, T: int):
        if T > self.config.block_size:
            raise UserError(
                f"a sequence of {T} tokens is longer than block_size={self.config.block_size}, which "
                f"{self.config.legacy} cannot read: pass block_size or fewer"
            )


class EDSRope(EDSModel):
    """Token embeddings turned once, over all their channels, by 90 degrees less RoPE's angle; no dropout there."""

    def _embed(self, idx, positions, before=None):
        x1, x2 = self.transformer.wte(idx).chunk(2, dim=-1)  # (B, T, C/2) each
        cos, sin = (t.squeeze(-2)[..., : x1.shape[-1]] for t in rotation_at(positions, self.config.n_embd))
        return torch.cat([x1 * sin - x2 * cos, x1 * cos + x2 * sin], dim=-1).to(x1.dtype)


class EDSRelative(EDSModel):
    """Token embeddings times the length t of the sequence, plus the sum of t rows of a table of distances.

    Position i gets rows block_size - 1 - i and the t - 1 behind it: what a token looks like depends on how much text
    follows it, but not on which.
    """

    def __init__(self, config: LegacyConfig):
        super().__init__(config)
        table = nn.Embedding(2 * config.block_size - 1, config.n_embd)
        nn.init.normal_(table.weight, std=0.02)
        self.transformer.relative = nn.ModuleDict(dict(relative_embeddings=table))

    def _embed(self, idx, positions, before=None):
        table, t = self.transformer.relative.relative_embeddings.weight, idx.shape[1]
        first = self.config.block_size - 1 - positions[:, None]  # (T, 1)
        row = torch.arange(len(table), device=idx.device)
        added = (first <= row) & (row < first + t)  # (T, 2 block_size - 1)
        return self.transformer.drop(t * self.transformer.wte(idx) + added.to(table.dtype) @ table)

    def crop_block_size(self, block_size: int):
        table, first = self.transformer.relative.relative_embeddings, self.config.block_size - block_size
        super().crop_block_size(block_size)
        table.num_embeddings = 2 * block_size - 1
        table.weight = nn.Parameter(table.weight[first : first + table.num_embeddings].detach().clone())

    def logits_at(self, idx, last):
        rows = [idx[i : i + 1, : n + 1] for i, n in enumerate(last.tolist())]  # no padding
        return torch.cat([super(EDSRelative, self).logits_at(row, row.shape[1] - 1) for row in rows])


MODELS = {"eds-rope": EDSRope, "eds-relative": EDSRelative}
