"""Model factory, and models other than the GPT in model.py: the bigram baseline and EDS's position schemes.

The rope and relative schemes of EDS (the Empathetic-Dialogue-System) differ from the standard methods with these names.
These schemes are reproduced here so that EDS checkpoints give the same logits.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from configurator import UserError
from model import GPT, GPTConfig, rope_cos_sin


@dataclass(frozen=True)
class LegacyConfig(GPTConfig):
    """Architecture of an EDS model; pos_embd has no effect."""

    legacy: Literal["eds-rope", "eds-relative"] = "eds-rope"  # EDS's position scheme

    has_wpe = False
    has_relative = False


def position_scheme(config: GPTConfig) -> str:
    """Return the name of the position scheme for use in messages."""
    return config.legacy if isinstance(config, LegacyConfig) else config.pos_embd


class Bigram(GPT):
    """Baseline that uses the last token's row in a (V, V) table as the next-token logits."""

    can_cache = False
    lm_head: Any

    def __init__(self, config: GPTConfig):
        nn.Module.__init__(self)
        assert config.vocab_size is not None, "set vocab_size from the data before building a model"
        self.config = config
        table = nn.Embedding(config.vocab_size, config.vocab_size)
        self.transformer = nn.ModuleDict(dict(wte=table, h=nn.ModuleList()))
        nn.init.normal_(table.weight, std=0.02)
        self.lm_head = nn.Identity()

    def hidden_states(self, idx, positions, caches=None, previous_ids=None, key_ids=None):
        return self.transformer.wte(idx)  # (B, T, V)

    def logits_at(self, idx, last_positions):
        return self.transformer.wte(idx.gather(1, last_positions[:, None])[:, 0])

    def check_length(self, T: int):
        """Accept any length."""

    def flops_per_token(self) -> int:
        return 0  # a table lookup needs no multiplications

    def crop_block_size(self, block_size: int):
        self.config = replace(self.config, block_size=block_size)


class EmpatheticModel(GPT):
    """Base class of EDS's two models, which have no KV cache and accept at most block_size tokens."""

    can_cache = False

    def check_length(self, T: int):
        if T > self.config.block_size:
            limit = f"block_size={self.config.block_size}, the limit of {position_scheme(self.config)}"
            raise UserError(f"a sequence of {T} tokens is longer than {limit}: pass a shorter sequence")


class EmpatheticRope(EmpatheticModel):
    """EDS's "rope": rotates token embeddings once, over all channels, by RoPE's angle minus 90 degrees. No dropout."""

    def embed(self, idx, positions, previous_ids=None):
        x1, x2 = self.transformer.wte(idx).chunk(2, dim=-1)  # (B, T, C/2) each
        cos, sin = (t.squeeze(-2)[..., : x1.shape[-1]] for t in rope_cos_sin(positions, self.config.n_embd))
        return torch.cat([x1 * sin - x2 * cos, x1 * cos + x2 * sin], dim=-1).to(x1.dtype)


class EmpatheticRelative(EmpatheticModel):
    """EDS's "relative": multiplies embeddings by the sequence length T and adds the sum of T rows of a distance table.

    Position i uses row block_size - 1 - i and the T - 1 rows after it. A token's embedding therefore depends on
    how many tokens follow it, but not on which tokens they are.
    """

    def __init__(self, config: LegacyConfig):
        super().__init__(config)
        table = nn.Embedding(2 * config.block_size - 1, config.n_embd)
        nn.init.normal_(table.weight, std=0.02)
        self.transformer.relative = nn.ModuleDict(dict(relative_embeddings=table))

    def embed(self, idx, positions, previous_ids=None):
        table, T = self.transformer.relative.relative_embeddings.weight, idx.shape[1]
        first = self.config.block_size - 1 - positions[:, None]  # (T, 1)
        row = torch.arange(len(table), device=idx.device)
        is_added = (first <= row) & (row < first + T)  # (T, 2 block_size - 1)
        return self.transformer.drop(T * self.transformer.wte(idx) + is_added.to(table.dtype) @ table)

    def crop_block_size(self, block_size: int):
        table, first = self.transformer.relative.relative_embeddings, self.config.block_size - block_size
        super().crop_block_size(block_size)
        table.num_embeddings = 2 * block_size - 1
        table.weight = nn.Parameter(table.weight[first : first + table.num_embeddings].detach().clone())

    def logits_at(self, idx, last_positions):
        # one sequence at a time, since padding would change the embeddings
        rows = [idx[i : i + 1, : n + 1] for i, n in enumerate(last_positions.tolist())]
        return torch.cat([super(EmpatheticRelative, self).logits_at(row, row.shape[1] - 1) for row in rows])


MODEL_CLASSES = {"eds-rope": EmpatheticRope, "eds-relative": EmpatheticRelative}


def build_model(config: GPTConfig) -> GPT:
    """Build a new model with this architecture: a GPT, a bigram model, or one of EDS's models."""
    if isinstance(config, LegacyConfig):
        return MODEL_CLASSES[config.legacy](config)
    return Bigram(config) if config.model_type == "bigram" else GPT(config)


def grow_vocabulary(model: GPT, vocab_size: int):
    """Add rows for new tokens to the token embedding and the output head, initialized as in a new model."""
    wte, lm_head, old_size = model.transformer.wte, model.lm_head, len(model.transformer.wte.weight)
    if model.config.model_type == "bigram":  # a new token adds a row and a column
        table = nn.init.normal_(torch.empty(vocab_size, vocab_size, device=model.device), std=0.02)
        table[:old_size, :old_size] = wte.weight.detach()
        wte.weight, wte.embedding_dim = nn.Parameter(table), vocab_size
    else:
        for module in (wte,) if model.config.tie_weights else (wte, lm_head):
            rows = torch.empty(vocab_size - old_size, model.config.n_embd, device=model.device)
            module.weight = nn.Parameter(torch.cat([module.weight.detach(), nn.init.normal_(rows, std=0.02)]))
        if model.config.tie_weights:
            lm_head.weight = wte.weight
        lm_head.out_features = vocab_size
    wte.num_embeddings = vocab_size
    model.config = replace(model.config, vocab_size=vocab_size)


class _SkipInit(TorchFunctionMode):
    """Function mode that skips normal_, which would spend seconds importing torch's compiler on the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def build_meta_model(config: GPTConfig) -> GPT:
    """Build a model on the meta device, which has parameter names and shapes but uses no memory for weights."""
    with torch.device("meta"), _SkipInit():
        return build_model(config)
