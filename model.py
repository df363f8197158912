"""The GPT: configuration, positions, attention, blocks, loss, decoding with a key-value cache, AdamW groups, FLOPs.

    model = GPT(GPTConfig(block_size=64, vocab_size=85, n_layer=4, n_head=4, n_embd=128))
    logits, loss = model(idx, targets)                      # idx, targets (B, T) int64
    idx = model.generate(idx, max_new_tokens=100, seed=1)   # (B, T + 100)

Sources: GPT-2 (Radford et al. 2019) and its code, github.com/openai/gpt-2; parameter names, initialisation and the
bias switch as in github.com/karpathy/nanoGPT, so that checkpoints go both ways. docs/positions.md shows the position
schemes.

Shapes: B rows of a batch, T tokens in a row, C = n_embd channels, nh = n_head heads of hs = C / nh channels,
V = vocab_size, S tokens held in a cache.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Iterator, Literal, NamedTuple, Sequence, get_args, get_origin

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

# ----------------------------------------------------------------------------------------------------------------------
# configuration


Positions = Literal["default", "absolute", "rope", "relative", "alibi", "default+relative"]
RELATIVE = "transformer.relative.relative_embeddings.weight"  # the learned bias by distance, (block_size, n_head)
NGRAMS = "transformer.ngrams.weight"  # embeddings of the last tokens together, ((ngrams - 1) * ngram_rows, n_embd)


@dataclass(frozen=True)
class GPTConfig:
    """The architecture. Everything that shapes the parameters is here and nowhere else."""

    block_size: int = 1024  # context length: how many tokens the model looks back
    vocab_size: int | None = 50304  # GPT-2's 50257 rounded up to a multiple of 64, which GPUs like
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # channels; a multiple of n_head
    dropout: float = 0.0  # on embeddings and residual branches; 0 for pretraining, 0.1 or more for small data
    attn_dropout: float = 0.0  # on attention weights; above 0 attention leaves the flash kernels and is slower
    bias: bool = True  # in Linear and LayerNorm, as GPT-2 has it; without is a bit better and faster
    pos_embd: Positions = "default"  # how positions enter: learned and absolute, or one of docs/positions.md
    activation: Literal["gelu", "gelu_tanh"] = "gelu"  # nanoGPT uses the exact GELU, GPT-2 the tanh approximation
    tie_weights: bool = True  # one matrix for the token embedding and the output head
    ngrams: int = 1  # 4 adds embeddings of the last 2, 3 and 4 tokens together; 6 take 0.3 nats off a short run
    ngram_rows: int = 32768  # of the table for each of these lengths; tokens find their row by a hash
    model_type: Literal["gpt", "bigram"] = "gpt"  # bigram: a table of logits by the last token alone, as a baseline

    def __post_init__(self):
        self.settle_names()
        self.check()

    def settle_names(self):
        """Replace aliases, and what has no effect, so that checkpoints and comparisons know one name."""
        if self.pos_embd == "absolute":
            object.__setattr__(self, "pos_embd", "default")
        if self.ngrams == 1 and self.ngram_rows > 0:  # nanoGPT could not load a file that speaks of them
            object.__setattr__(self, "ngram_rows", GPTConfig.ngram_rows)

    @property
    def positions(self) -> str:
        """The scheme by its name in messages."""
        return self.pos_embd

    @property
    def has_wpe(self) -> bool:
        """Whether positions are looked up in a learned table, beyond which there are none."""
        return self.pos_embd in ("default", "default+relative")

    @property
    def has_relative(self) -> bool:
        """Whether attention scores get a learned bias by head and distance."""
        return self.pos_embd in ("relative", "default+relative")

    def check(self):
        """Raise ValueError for an architecture that cannot be built."""
        for field in fields(self):
            choices = get_args(field.type) if get_origin(field.type) is Literal else None
            if choices and getattr(self, field.name) not in choices:
                raise ValueError(
                    f"{field.name}={getattr(self, field.name)!r} is not known: "
                    f"use one of {', '.join(map(str, choices))}"
                )
        if self.model_type == "bigram" and self.pos_embd != "default":
            raise ValueError(f"a bigram knows no positions: leave pos_embd={self.pos_embd} away")
        if self.model_type == "bigram" and self.ngrams > 1:
            raise ValueError(f"a bigram knows one token alone: leave ngrams={self.ngrams} away")
        for name in ("block_size", "n_layer", "n_head", "n_embd", "ngrams", "ngram_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 1")
        if self.n_embd % self.n_head:
            near = max(self.n_head, round(self.n_embd / self.n_head) * self.n_head)
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}: use n_embd={near}")
        if self.pos_embd == "rope" and self.n_embd // self.n_head % 2:
            raise ValueError(
                f"pos_embd='rope' turns pairs of channels, and n_embd={self.n_embd} with "
                f"n_head={self.n_head} gives heads of {self.n_embd // self.n_head}: use an even size"
            )
        for name in ("dropout", "attn_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")


# ----------------------------------------------------------------------------------------------------------------------
# positions


class Where(NamedTuple):
    """What the attention of every layer is told about positions; as it stands it is plain and causal."""

    rotation: tuple[torch.Tensor, torch.Tensor] | None = None  # of queries and keys: cos and sin, (..., T, 1, hs)
    bias: torch.Tensor | None = None  # added to the scores, (1 or R, 1 or nh, T, S), -inf (or False) where not to look
    causal: bool = True  # without a bias: whether a token looks at none behind it; else it looks at all keys


def rotation_at(positions, head_size: int, base: float = 10000.0):
    """(cos, sin), (..., T, 1, hs) each, of the angles by which RoPE turns a head's channels at positions (..., T).

    Channels i and i + hs/2 form a pair, turned by position * base^(-2i/hs): RoFormer, arxiv.org/abs/2104.09864,
    equation 15, paired as Llama does.
    """
    frequencies = base ** (-torch.arange(0, head_size, 2, device=positions.device).float() / head_size)  # (hs/2,)
    angles = (positions[..., None] * frequencies).unsqueeze(-2)  # (..., T, 1, hs/2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


class _Rotate(torch.autograd.Function):
    """Written by hand, since autograd's own backward of the same four lines moves twice as much memory."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        y = x * cos  # float32, whatever x is
        y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        y[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin), None, None


def rotate(x, rotation):
    """x (B, T, nh, hs) with its channels turned by a rotation of rotation_at."""
    return _Rotate.apply(x, *rotation)


def ngram_rows(idx, before, ngrams: int, n_rows: int):
    """Rows of a table of (ngrams - 1) * n_rows for the last 2, 3, ... ngrams tokens at each of idx (B, T), (B, T,
    ngrams - 1).

    before (B, ngrams - 1) are the tokens before idx, -1 where there are none; None if there are none at all. A row is
    found by a hash, so that several n-grams may share one, as do the bigrams of github.com/KellerJordan/modded-nanogpt.
    """
    T, n_before = idx.shape[1], ngrams - 1
    before = idx.new_full((len(idx), n_before), -1) if before is None else before
    text, rows = torch.cat([before, idx], dim=1) + 1, []
    number = text[:, n_before:]
    for n in range(1, ngrams):  # of tokens before; numbers beyond 64 bits wrap around
        number = number * 65537 + text[:, n_before - n : n_before - n + T]
        rows.append((number * -7046029254386353131 >> 32) % n_rows + (n - 1) * n_rows)  # Knuth's multiplicative hash
    return torch.stack(rows, dim=-1)


def alibi_slopes(n_head: int, device=None):
    """What ALiBi takes off a score per token of distance, (nh,): 2^(-8/nh), 2^(-16/nh), ..., 2^-8.

    Press et al., "Train Short, Test Long", arxiv.org/abs/2108.12409, section 3.
    """
    return 2.0 ** (-8.0 * torch.arange(1, n_head + 1, device=device) / n_head)


class _BiasedAttention(torch.autograd.Function):
    """Attention with a learned bias on a CPU: PyTorch's flash kernel forward, and here its backward.

    That kernel gives no gradient to the bias; PyTorch's own way out keeps all scores, (B, nh, T, T), in memory. This
    recomputes them in pieces that stay in the processor's cache, and only at or below the diagonal.
    """

    QUERIES, SCORES = 64, 2**20  # in a piece

    @staticmethod
    def forward(ctx, q, k, v, bias):
        ctx.save_for_backward(q, k, v, bias)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.detach())

    @staticmethod
    def backward(ctx, grad):
        q, k, v, bias = ctx.saved_tensors
        (B, n_head, T, _), scale = q.shape, q.shape[-1] ** -0.5
        dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype) for t in (q, k, v))
        dbias = torch.zeros_like(bias)
        n_rows = max(1, _BiasedAttention.SCORES // (n_head * min(T, _BiasedAttention.QUERIES) * T))
        for first in range(0, B, n_rows):
            rows = slice(first, first + n_rows)
            for i in range(0, T, _BiasedAttention.QUERIES):
                n = min(i + _BiasedAttention.QUERIES, T)  # these queries look at keys 0 to n - 1
                qs, ks, vs, gs = q[rows, :, i:n] * scale, k[rows, :, :n], v[rows, :, :n], grad[rows, :, i:n]
                p = ((qs @ ks.mT).float() + bias[:, :, i:n, :n]).softmax(-1)
                dp = (gs @ vs.mT).float()
                ds = p * (dp - (p * dp).sum(-1, keepdim=True))  # of the scores
                dbias[:, :, i:n, :n] += ds.sum(0)
                ds = ds.to(q.dtype)
                dq[rows, :, i:n] = (ds @ ks) * scale
                dk[rows, :, :n] += ds.mT @ qs
                dv[rows, :, :n] += p.to(q.dtype).mT @ gs
        return dq, dk, dv, dbias


def same_document(idx, end: int):
    """(B, 1, T, T) bool: a token of idx (B, T) looks at itself and at what is before it in its document, which begins
    with the token `end` of the one before."""
    document = (idx == end).cumsum(1)
    return (document[:, :, None] == document[:, None, :]).tril()[:, None]


def attend(q, k, v, bias, dropout: float, causal: bool = True):
    """Attention of q (B, nh, T, hs) over k, v (B, nh, S, hs), scores plus bias; without one causal, or of all keys."""
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
    if bias.requires_grad and q.device.type == "cpu" and not dropout and not torch.compiler.is_compiling():
        return _BiasedAttention.apply(q, k, v, bias)
    if bias.is_floating_point() and q.device.type != "cpu":  # only there a float32 bias may go with bfloat16 queries
        bias = bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)


# ----------------------------------------------------------------------------------------------------------------------
# layers


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias; epsilon as in GPT-2."""

    def __init__(self, n_embd: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU with 16 random bits per number, so that p is rounded to 1/65536.

    torch draws random numbers on one core, and for its own dropout 64 bits each: a tenth of a wide model's step in
    float32, half of it where the processor multiplies bfloat16.
    """

    def forward(self, x):
        if not self.training or not self.p or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        n_dropped = min(round(self.p * 65536), 65535)  # of the 65536 values that they have
        keep = bits[: x.numel()].view(x.shape) >= n_dropped - 32768
        return x * keep.to(x.dtype).mul_(65536 / (65536 - n_dropped))


class Held(NamedTuple):
    """One layer's share of a KVCache, and where in it the tokens at hand belong."""

    keys: torch.Tensor  # (B, nh, size, hs)
    values: torch.Tensor  # (B, nh, size, hs)
    rows: slice | torch.Tensor  # which rows of the batch are at hand: the first few, or (R,) their numbers
    positions: torch.Tensor  # (T,), or (R, T) where the rows differ, of the tokens at hand
    start: int | None  # the first of the positions where all rows have the same, and they follow each other
    n_held: int  # S: no row holds more tokens than this, those at hand included

    def extend(self, k, v):
        """Store k, v (R, nh, T, hs) of the tokens at hand; return all that their rows hold, (R, nh, S, hs) each."""
        return self._store(self.keys, k), self._store(self.values, v)

    def _store(self, held, new):
        if self.start is not None:
            held[self.rows, :, self.start : self.n_held] = new
        else:
            rows = torch.arange(len(new), device=new.device) if isinstance(self.rows, slice) else self.rows
            held[rows[:, None], :, self.positions] = new.transpose(1, 2).to(held.dtype)
        return held[self.rows, :, : self.n_held]  # of a slice a view; numbers of rows copy


class KVCache:
    """Keys and values of the tokens that a batch holds, so that a new token is encoded alone.

    Room for size tokens per row, by default block_size, is taken once. Rows may hold different numbers of tokens: what
    lies in a row beyond its newest token is garbage that the mask hides and that later tokens overwrite.
    """

    def __init__(self, model: "GPT", n_rows: int, size: int | None = None):
        config, like = model.config, model.transformer.wte.weight
        shape = (n_rows, config.n_head, size or config.block_size, config.n_embd // config.n_head)
        kind, self.dtype = like.device.type, like.dtype
        if torch.is_autocast_enabled(kind):
            self.dtype = torch.get_autocast_dtype(kind)
        self.layers = [
            [torch.zeros(shape, device=like.device, dtype=self.dtype) for _ in "kv"] for _ in model.transformer.h
        ]

    def at(self, positions, n_held: int, start: int | None = None, rows=slice(None)) -> list[Held]:
        """For each layer, where tokens at positions (T,) or (R, T) of these rows belong; see Held."""
        return [Held(keys, values, rows, positions, start, n_held) for keys, values in self.layers]

    def clear(self):
        """Forget what was held."""
        for held in (tensor for layer in self.layers for tensor in layer):
            held.zero_()

    def copy_first(self, n_held: int):
        """Give all rows the n_held tokens of the first."""
        for held in (tensor for layer in self.layers for tensor in layer):
            held[1:, :, :n_held] = held[:1, :, :n_held]


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what comes before it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)
        self.n_head, self.attn_dropout = config.n_head, config.attn_dropout

    def forward(self, x, where: Where = Where(), held: Held | None = None):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head) for t in self.c_attn(x).split(C, dim=2))
        if where.rotation is not None:
            q, k = rotate(q, where.rotation), rotate(k, where.rotation)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        if held is not None:
            k, v = held.extend(k, v)  # (B, nh, S, hs)
        y = attend(q, k, v, where.bias, self.attn_dropout if self.training else 0.0, where.causal)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with a GELU between them, four times as wide as the block."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """One transformer layer, normalised before each branch (pre-LN) as GPT-2 is."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x, where: Where = Where(), held: Held | None = None):
        x = x + self.attn(self.ln_1(x), where, held)
        return x + self.mlp(self.ln_2(x))


# ----------------------------------------------------------------------------------------------------------------------
# the model


class GPT(nn.Module):
    """A decoder-only transformer: logits for the next token at every position."""

    can_cache = True  # whether a token's keys and values stay what they are when the text grows
    # packer(model, n_tokens) gives what runs blocks and head on a CPU for so many tokens one after another, faster than
    # their own forward, which it replaces then; or None. dongpt/kernels/cpu.py has it.
    packer = None
    # the id behind every document where losses are taken with attention that stops there (document_mask in train.py)
    document_end: int | None = None

    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.vocab_size is not None, "vocab_size comes from the data before a model is made"
        self.config = config
        self.transformer = nn.ModuleDict(dict(wte=nn.Embedding(config.vocab_size, config.n_embd)))
        if config.has_wpe:
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        if config.has_relative:
            self.transformer.relative = nn.ModuleDict(
                dict(relative_embeddings=nn.Embedding(config.block_size, config.n_head))
            )
        if config.ngrams > 1:
            self.transformer.ngrams = nn.Embedding((config.ngrams - 1) * config.ngram_rows, config.n_embd)
        self.transformer.update(
            dict(
                drop=Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=LayerNorm(config.n_embd, config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # two residual branches per layer add up: GPT-2 paper, section 2.3
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif name in (RELATIVE, NGRAMS):  # a model that is given such a table computes what it did without
                nn.init.zeros_(parameter)

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def _embed(self, idx, positions, before=None):
        """What enters the first layer, (B, T, C) for idx (B, T) at positions (T,) or (B, T); before: see ngram_rows."""
        x, config = self.transformer.wte(idx), self.config
        if config.ngrams > 1:
            x = x + self.transformer.ngrams(ngram_rows(idx, before, config.ngrams, config.ngram_rows)).sum(-2)
        if config.has_wpe:
            x = x + self.transformer.wpe(positions)
        return self.transformer.drop(x)

    def where(self, positions, held: Held | None = None) -> Where:
        """What attention needs to know of tokens at positions (T,) or (R, T) that look at what a cache holds.

        Without one they look at each other.
        """
        config, positions = self.config, torch.atleast_2d(positions)  # flash takes masks of 4 dimensions alone
        rotation = rotation_at(positions, config.n_embd // config.n_head) if config.pos_embd == "rope" else None
        no_bias = config.pos_embd in ("default", "rope")
        if no_bias and (held is None or held.start == 0):
            return Where(rotation)
        if no_bias and held.start is not None and positions.shape[1] == 1:  # the newest token looks at all
            return Where(rotation, causal=False)
        keys = positions[0] if held is None else torch.arange(held.n_held, device=positions.device)
        distance = (positions[:, :, None] - keys)[:, None]  # (1 or R, 1, T, S)
        if no_bias:
            return Where(rotation, distance >= 0)
        if config.pos_embd == "alibi":
            bias = -alibi_slopes(config.n_head, positions.device)[:, None, None] * distance
        else:  # what lies beyond the table is as far as its last entry
            table = self.transformer.relative.relative_embeddings
            bias = table(distance[:, 0].clamp(0, config.block_size - 1)).movedim(-1, 1)
        return Where(None, bias.float().masked_fill(distance < 0, -math.inf).contiguous())

    def _hidden(self, idx, positions, held: list[Held] | None = None, before=None, mask=None):
        """The last layer's output, normalised: (B, T, C) for idx (B, T) at positions (T,) or (B, T); before as in
        ngram_rows; mask (B, 1, T, T) says what a token looks at, by default all before it."""
        x = self._embed(idx, positions, before)
        where = self.where(positions, held[0] if held else None)
        if mask is not None:
            assert where.bias is None
            where = where._replace(bias=mask)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, where, held[layer] if held else None)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Logits and mean loss in nats for idx (B, T) int64.

        With targets (B, T), of which -1 is ignored: logits (B, T, V) and the loss. Without: logits (B, 1, V) of the
        last position and None. Raises ValueError for a sequence longer than block_size where pos_embd has default.
        """
        T = idx.shape[1]
        self.check_length(T)
        in_documents = targets is not None and self.document_end is not None
        x = self._hidden(
            idx,
            torch.arange(T, device=idx.device),
            **({"mask": same_document(idx, self.document_end)} if in_documents else {}),
        )
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    def check_length(self, T: int):
        """Raise ValueError for a sequence of more tokens than there are positions for."""
        if T > self.config.block_size and self.config.has_wpe:
            raise ValueError(
                f"a sequence of {T} tokens is longer than block_size={self.config.block_size}, and "
                f"pos_embd={self.config.pos_embd} has no positions beyond it: pass block_size or fewer"
            )

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def __getstate__(self):  # what copies and pickles take: not what was recorded on a GPU
        return {key: value for key, value in self.__dict__.items() if key != "_decoder"}

    # ------------------------------------------------------------------------------------------------------------------
    # size, cost, optimizer

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters; by default without the position table, as nanoGPT counts (the head is tied to wte)."""
        count = sum(p.numel() for p in self.parameters())
        return count - self.transformer.wpe.weight.numel() if non_embedding and "wpe" in self.transformer else count

    def get_num_multiplied(self) -> int:
        """Number of parameters by which every token is multiplied: without tables of which it takes rows."""
        looked_up = 0 if self.config.tie_weights else self.transformer.wte.weight.numel()
        looked_up += self.transformer.ngrams.weight.numel() if self.config.ngrams > 1 else 0
        return self.get_num_params() - looked_up

    def flops_per_token(self) -> int:
        """FLOPs of forward and backward per token, 6 N + 12 L C T: PaLM, appendix B, arxiv.org/abs/2204.02311."""
        config = self.config
        return 6 * self.get_num_multiplied() + 12 * config.n_layer * config.n_embd * config.block_size

    def parameter_groups(self, muon: bool = False) -> list[list[str]]:
        """Names by group of the optimizer: matrices and embeddings, biases and gains; for Muon the blocks' matrices
        apart; a table of n-grams, one of distances, if any."""
        parameters = {name: p for name, p in self.named_parameters() if p.requires_grad}  # a tied weight comes once
        has = {NGRAMS: self.config.ngrams > 1, RELATIVE: self.config.has_relative}
        tables = [name for name in has if has[name] and name in parameters]
        matrices = [name for name, p in parameters.items() if p.dim() >= 2 and name not in tables]
        in_blocks = [name for name in matrices if muon and name.startswith("transformer.h.")]
        return [
            [name for name in matrices if name not in in_blocks],
            [name for name, p in parameters.items() if p.dim() < 2],
            *([in_blocks] if muon else []),
            *([name] for name in tables),
        ]

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.AdamW:
        """AdamW over parameter_groups(), as in nanoGPT: LayerNorm weights, biases and n-gram tables do not decay."""
        parameters, groups = dict(self.named_parameters()), []
        for i, names in enumerate(self.parameter_groups()):
            decay = 0.0 if i == 1 or names == [NGRAMS] else weight_decay
            groups.append(dict(params=[parameters[name] for name in names], weight_decay=decay))
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu"))
        optimizer.register_step_pre_hook(_make_gradients_dense)
        return optimizer

    def crop_block_size(self, block_size: int):
        """Forget the positions from block_size on, so that a pretrained model trains on shorter windows."""
        assert block_size <= self.config.block_size
        tables = [self.transformer.wpe] if self.config.has_wpe else []
        tables += self.transformer.relative.values() if self.config.has_relative else []
        for table in tables:
            table.num_embeddings = block_size
            table.weight = nn.Parameter(table.weight[:block_size].detach().clone())
        self.config = replace(self.config, block_size=block_size)

    def grow_vocabulary(self, vocab_size: int):
        """Add rows for new tokens, initialised as all are, to the token embedding and the head."""
        wte, lm_head = self.transformer.wte, self.lm_head
        for module in (wte,) if self.config.tie_weights else (wte, lm_head):
            rows = torch.empty(vocab_size - self.config.vocab_size, self.config.n_embd, device=self.device)
            module.weight = nn.Parameter(torch.cat([module.weight.detach(), nn.init.normal_(rows, std=0.02)]))
        if self.config.tie_weights:
            lm_head.weight = wte.weight
        wte.num_embeddings = lm_head.out_features = vocab_size
        self.config = replace(self.config, vocab_size=vocab_size)

    def set_dropout(self, dropout: float, attn_dropout: float):
        """Give a loaded model the dropout of a new run."""
        self.config = replace(self.config, dropout=dropout, attn_dropout=attn_dropout)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            elif isinstance(module, CausalSelfAttention):
                module.attn_dropout = attn_dropout

    # ------------------------------------------------------------------------------------------------------------------
    # decoding

    @torch.no_grad()
    def generate(
        self,
        idx,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        use_kv_cache: bool = True,
        **more,
    ):
        """idx (B, T) with max_new_tokens drawn ids behind it: (B, T + max_new_tokens). See stream for the settings."""
        new = self.stream(idx, max_new_tokens, temperature, top_k, top_p, seed, use_kv_cache, **more)
        return torch.cat([idx, *(ids[:, None].to(idx.device) for ids in new)], dim=1)

    @torch.no_grad()
    def stream(
        self,
        prompts,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        use_kv_cache: bool = True,
        stop_ids: Sequence[int] = (),
        n_ids: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        decoder: "Decoder | None" = None,
    ) -> Iterator[torch.Tensor]:
        """Yield the next id of every row, (B,) int64 on the CPU, up to max_new_tokens times; a finished row gives -1.

        prompts: (B, T) ids, or a list of id lists of any lengths above 0. The settings are those of Sampling. A row is
        finished after an id of stop_ids; the stream ends when all rows are. Only ids below n_ids (a tokenizer's size,
        where the vocabulary is padded) are drawn. Row i draws its random numbers from (seed, i) alone; seed None takes
        a seed from torch's generator. When block_size tokens are held and one more comes, only the newest half of the
        tokens is kept: what the model sees depends on the count of tokens alone, with and without cache. A decoder
        made with keeps=True encodes only what differs from the text that it wrote before. Call model.eval() before.
        Raises ValueError for settings that make no sense, an empty prompt, and logits that are not finite.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        rows = prompts.tolist() if torch.is_tensor(prompts) else prompts
        rows = [list(row) if isinstance(row, Sequence) else row for row in rows]
        n_ids = self.config.vocab_size if n_ids is None else n_ids
        _check_decoding(rows, self.config.vocab_size, n_ids, max_new_tokens, sampling)
        seed = int(torch.randint(2**62, ())) if seed is None else int(seed)
        finished, stop_ids = [False] * len(rows), frozenset(stop_ids)
        size = min(max(map(len, rows)) + max_new_tokens, self.config.block_size)
        if decoder is None:
            decoder = Decoder.of(self, len(rows), size, sampling, n_ids, use_kv_cache)
        decoder.settle(sampling, n_ids)
        for drawn in decoder.draws(rows, seed, max_new_tokens):
            if any(i == NOT_FINITE and not done for i, done in zip(drawn, finished)):
                raise ValueError(
                    "the model's logits are not finite: use dtype=float32, or an earlier checkpoint "
                    "if the training diverged"
                )
            yield torch.tensor([-1 if done else i for i, done in zip(drawn, finished)])
            finished = [done or i in stop_ids for i, done in zip(drawn, finished)]
            if all(finished):
                return

    def logits_at(self, idx, last):
        """Logits (R, V) behind token last[i] of each row of idx (R, T), encoded anew; what follows it is no matter."""
        x = self._hidden(idx, torch.arange(idx.shape[1], device=idx.device))
        return self.lm_head(x[torch.arange(len(idx), device=idx.device), last])


def _make_gradients_dense(optimizer: torch.optim.Optimizer, args, kwargs):
    """A step pre-hook: AdamW refuses the sparse gradients of an n-gram table with sparse=True."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.to_dense()


class Bigram(GPT):
    """A baseline: the logits of the next token are a row, by the last token alone, of one V x V table."""

    can_cache = False

    def __init__(self, config: GPTConfig):
        nn.Module.__init__(self)
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(wte=nn.Embedding(config.vocab_size, config.vocab_size), h=nn.ModuleList())
        )
        self.lm_head = nn.Identity()
        self.apply(self._init_weights)

    def _hidden(self, idx, positions, held=None, before=None):
        return self.transformer.wte(idx)  # (B, T, V)

    def logits_at(self, idx, last):
        return self.transformer.wte(idx.gather(1, last[:, None])[:, 0])

    def check_length(self, T: int):
        """Any length will do."""

    def flops_per_token(self) -> int:
        return 0  # a look-up multiplies nothing

    def crop_block_size(self, block_size: int):
        self.config = replace(self.config, block_size=block_size)

    def grow_vocabulary(self, vocab_size: int):
        old, self.config = self.transformer.wte.weight.detach(), replace(self.config, vocab_size=vocab_size)
        table = nn.init.normal_(torch.empty(vocab_size, vocab_size, device=self.device), std=0.02)
        table[: len(old), : len(old)] = old
        self.transformer.wte = nn.Embedding(vocab_size, vocab_size, _weight=table)


def new_model(config: GPTConfig) -> GPT:
    """An initialised model of config.model_type."""
    return Bigram(config) if config.model_type == "bigram" else GPT(config)


def window_size(n_tokens: int, block_size: int) -> int:
    """How many of the newest of n_tokens the model sees: all up to block_size; one more, and it is half a block.

    The window then grows to block_size again, and so on: block_size=4 gives 1 2 3 4 2 3 4 2 3 4 ...
    """
    if n_tokens <= block_size:
        return n_tokens
    half = max(1, block_size // 2)
    return half + (n_tokens - block_size - 1) % (block_size - half + 1)


@dataclass(frozen=True)
class Sampling:
    """How an id is drawn from the logits: the filters are Hugging Face's, in its order, which is the one here."""

    temperature: float = 1.0  # below 1 bolder on the likely, above 1 more random; 0 takes the likeliest token
    top_k: int | None = None  # draw from this many likeliest tokens; 0 or None is off
    top_p: float | None = None  # draw from the likeliest tokens that reach this probability; None is off
    min_p: float | None = None  # draw from tokens at least so probable as this share of the likeliest; None is off
    repetition_penalty: float | None = None  # above 1 makes tokens that the text has less likely; before all others

    def problems(self) -> list[str]:
        """A sentence on each setting that makes no sense."""
        found = []
        if not 0 <= self.temperature < math.inf:
            found.append(f"temperature={self.temperature} must be at least 0 (0 takes the likeliest token)")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 0):
            found.append(f"top_k={self.top_k} must be a whole number, at least 0 (0 or None is off)")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p} must be above 0 and at most 1 (1 or None is off)")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            found.append(f"min_p={self.min_p} must be between 0 and 1 (0 or None is off)")
        if self.repetition_penalty is not None and not 1e-9 < self.repetition_penalty < 1e9:
            found.append(f"repetition_penalty={self.repetition_penalty} must be above 0, near 1 (1 or None is off)")
        return found


def _check_decoding(rows, vocab_size: int, n_ids: int, max_new_tokens: int, sampling: Sampling):
    """Raise ValueError, with all that is wrong, unless ids can be drawn with these settings."""
    problems = []
    if not all(isinstance(row, list) and all(isinstance(i, int) for i in row) for row in rows):
        problems.append("prompts must be rows of token ids: a tensor (B, T) of whole numbers, or a list of lists")
    elif not rows or not all(rows):
        problems.append("a prompt is empty: pass rows of at least one token id each")
    elif not all(0 <= min(row) and max(row) < vocab_size for row in rows):
        problems.append(f"a prompt holds ids beyond the model's vocabulary of {vocab_size}: use the model's tokenizer")
    if max_new_tokens < 0:
        problems.append(f"max_new_tokens={max_new_tokens} must be at least 0")
    if n_ids < 1:
        problems.append(f"n_ids={n_ids} must be at least 1")
    if problems := problems + sampling.problems():
        raise ValueError("; ".join(problems))


NOT_FINITE = -2  # drawn where the logits are not finite: a number, so that a GPU need not be waited for


def penalise(logits, seen, penalty: float):
    """logits (B, V) with those of the ids in seen (B, V) made less likely: CTRL, arxiv.org/abs/1909.05858, section 4.1.

    As Hugging Face has it: a positive logit is divided by the penalty, a negative one multiplied.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits, uniforms, sampling: Sampling):
    """One id per row (B,), drawn from logits (B, V) by inverting the cumulative distribution at uniforms (B,) < 1.

    A row whose logits are not finite gives NOT_FINITE. repetition_penalty is not applied here: see penalise.
    """
    logits = logits.float()
    if logits.device.type == "mps":
        logits = logits.cpu()  # sampling on MPS has given wrong ids without an error: nanoGPT issues 255 and 458
    lowest, highest = logits.amin(-1, keepdim=True), logits.amax(-1, keepdim=True)  # both are NaN where one logit is
    finite = torch.isfinite(highest - lowest)[:, 0]
    if sampling.temperature == 0:
        return torch.where(finite, logits.argmax(-1), NOT_FINITE)
    logits, ids = _keep_top_k(logits, sampling.top_k)
    drawn = _draw_at(uniforms, logits - highest, sampling)
    if ids is not None:
        drawn = ids.gather(1, drawn[:, None])[:, 0]
    return torch.where(finite, drawn, NOT_FINITE)


def _keep_top_k(logits, k: int | None):
    """Logits (B, V) with -inf for all but the k likeliest ids, and None; or those (B, k) alone, and their ids in order.

    Ids that tie with the last one stay. The shorter form is faster to draw from, and the same otherwise.
    """
    if not k or k >= logits.size(-1):
        return logits, None
    values, ids = torch.topk(logits, k + 1)
    last, next_one = values[:, k - 1 : k], values[:, k:]
    if logits.device.type == "cpu" and (last > next_one).all():  # no ties; to ask that of a GPU would be to wait
        ids, order = ids[:, :k].sort(-1)
        return values.gather(1, order), ids
    return logits.masked_fill(logits < last, -math.inf), None


def _draw_at(uniforms, logits, sampling: Sampling):
    """The index drawn in each row of logits (B, n), none of them above 0, at a temperature above 0."""
    logits = logits / max(sampling.temperature, 1e-37)  # no tiny one may overflow
    if sampling.top_p is not None and sampling.top_p < 1:
        ascending, order = logits.sort()
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        outside[:, -1] = False  # the likeliest id always stays
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    if sampling.min_p:
        probabilities = logits.softmax(-1)
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -math.inf)
    # summed in float64, so that ids of small probability keep theirs; searchsorted lands on none of probability 0
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # (B, V)
    points = uniforms.to(logits.device)[:, None].clamp(max=1 - 2**-40) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True)[:, 0].clamp(max=logits.size(-1) - 1)


def tokens_before(text, at, n: int):
    """The n tokens before position at[i] of row i of text (B, T), (B, n), -1 where there are none; None for n = 0."""
    if not n:
        return None
    positions = at[:, None] + torch.arange(-n, 0, device=text.device)
    return text.gather(1, positions.clamp(min=0)).masked_fill(positions < 0, -1)


class Decoder:
    """A batch of texts that is being written: what the model sees of each row, and how the next ids are drawn.

    All that a step reads and writes are tensors that stay where they are, so that a GPU can replay a step that was
    recorded once, and no step waits for the ids of another: which tokens are seen depends on their number alone.
    """

    UNIFORMS = 64  # random numbers per row that are drawn at a time
    PREFILL = 8192  # tokens that are encoded at a time
    BUCKET = 128  # a recorded step looks at a multiple of so many keys

    def __init__(
        self,
        model: GPT,
        n_rows: int,
        sampling: Sampling,
        n_ids: int,
        use_kv_cache: bool,
        size: int | None = None,
        keeps: bool = False,
    ):
        self.model, self.sampling, self.n_ids, self.keeps = model, sampling, n_ids, keeps
        self.device, self.block_size, B = model.device, model.config.block_size, n_rows
        self.counts = [0] * B  # tokens that are seen of each row
        self.text = torch.zeros(B, self.block_size + 1, dtype=torch.int64, device=self.device)  # then garbage
        self.last = torch.zeros(B, dtype=torch.int64, device=self.device)  # where the newest token stands
        # in float64, which MPS does not have: there ids are drawn on the CPU
        self.uniforms = torch.zeros(
            self.UNIFORMS, B, dtype=torch.float64, device="cpu" if self.device.type == "mps" else self.device
        )
        self.n_drawn = torch.zeros(1, dtype=torch.int64, device=self.uniforms.device)  # of the uniforms at hand
        self.drawn = torch.zeros(B, dtype=torch.int64, device=self.device)
        self.seen = self._nothing_seen()  # (B, V): which ids a row has, where that matters
        self.cache = KVCache(model, B, size) if use_kv_cache and model.can_cache else None
        self.n_before = model.config.ngrams - 1  # tokens before one that its embedding depends on
        self.packed = None  # runs the blocks for the newest tokens, where the model has what does it faster
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # a recorded step, by the number of keys that it looks at
        self.busy = False

    @classmethod
    def of(cls, model: GPT, n_rows: int, size: int, *settings) -> "Decoder":
        """A Decoder for size tokens a row: on CUDA the model's last one with its graphs, if it fits and is free."""
        weights, last = [*model.parameters(), *model.buffers()], model.__dict__.get("_decoder")
        if model.device.type != "cuda" or model.training or any(weight.requires_grad for weight in weights):
            return cls(model, n_rows, *settings, size=size)  # nothing is kept of a model that may go on training
        key = (n_rows, settings, model.config, *(weight.data_ptr() for weight in weights))
        if last is None or last.busy or last.key != key:
            last = cls(model, n_rows, *settings)  # room for block_size tokens, so that any text fits
            model.__dict__["_decoder"], last.key = last, key
        return last

    def _nothing_seen(self):
        if self.sampling.repetition_penalty in (None, 1):
            return None
        return torch.zeros(len(self.counts), self.model.config.vocab_size, dtype=torch.bool, device=self.device)

    def settle(self, sampling: Sampling, n_ids: int):
        """Draw like this from now on."""
        if (sampling, n_ids) != (self.sampling, self.n_ids):
            self.sampling, self.n_ids = sampling, n_ids
            self.graphs.clear()  # they were recorded with the old settings
            self.seen = self._nothing_seen()

    def draws(self, rows: list[list[int]], seed: int, n: int) -> Iterator[list[int]]:
        """Begin with these rows, and give the next id of each, n times.

        On a GPU the next step is already under way when they come: stop conditions are read one step behind.
        """
        self.busy, model = True, self.model
        try:
            if self.cache and model.packer and not model.training and self.cache.dtype == torch.float32:
                self.packed = model.packer(model, n)
            self._begin(rows)
            generators = [np.random.Generator(np.random.Philox(key=seed % 2**64 + (i << 64))) for i in range(len(rows))]
            waiting = None
            for i in range(n):
                if i % self.UNIFORMS == 0:
                    numbers = np.array([generator.random(self.UNIFORMS) for generator in generators]).T
                    self.uniforms.copy_(torch.from_numpy(numbers))
                    self.n_drawn.zero_()
                self._make_room()
                self._step()
                self.counts = [count + 1 for count in self.counts]
                if self.device.type != "cuda":
                    yield self.drawn.tolist()
                    continue
                if waiting:
                    yield self._wait(*waiting)
                waiting = self.drawn.to("cpu", non_blocking=True), torch.cuda.Event()
                waiting[1].record()
            if waiting:
                yield self._wait(*waiting)
        finally:
            self.busy = False

    @staticmethod
    def _wait(drawn, copied) -> list[int]:
        copied.synchronize()
        return drawn.tolist()

    def _begin(self, rows: list[list[int]]):
        """Take the prompts, and encode them but for their newest tokens."""
        windows = [row[-window_size(len(row), self.block_size) :] for row in rows]
        n_known = self._n_known(windows[0]) if self.keeps else 0
        self.counts = [len(window) for window in windows]
        longest = max(self.counts)
        padded = torch.tensor([window + [0] * (longest - len(window)) for window in windows])
        self.text[:, :longest] = padded.to(self.device)
        self.last.copy_(torch.tensor(self.counts) - 1)
        if self.seen is not None:
            seen = torch.zeros(self.seen.shape, dtype=torch.bool)
            for i, row in enumerate(rows):
                seen[i, row] = True
            self.seen.copy_(seen)
        if self.cache:
            if self.graphs and not n_known:  # used before: what a mask hides must be finite
                self.cache.clear()
            self._encode(range(len(rows)), all(window == windows[0] for window in windows), n_known)

    def _n_known(self, window: list[int]) -> int:
        """How many of the first tokens of window the cache of the only row holds; the newest is always encoded."""
        before = self.text[0, : max(0, self.counts[0] - 1)].tolist()
        same = next((i for i, (a, b) in enumerate(zip(before, window)) if a != b), min(len(before), len(window)))
        return min(same, len(window) - 1)

    def _make_room(self):
        """Where a row has one token too many, keep its newest half, and encode that anew but for its newest."""
        full = [row for row, count in enumerate(self.counts) if count > self.block_size]
        if not full:
            return
        half = window_size(self.block_size + 1, self.block_size)
        rows = torch.tensor(full, device=self.device)
        self.text[rows, :half] = self.text[rows, self.block_size + 1 - half :]
        self.last[rows] = half - 1
        for row in full:
            self.counts[row] = half
        if self.cache:
            self._encode(full, False)

    def _encode(self, rows: Sequence[int], same: bool, first: int = 0):
        """Put the tokens from the first to the last but one of these rows into the cache; where all rows are the same,
        one does for all."""
        n = max(self.counts[row] for row in rows) - 1
        whole = len(rows) == len(self.counts)
        if same:
            at = slice(0, 1)
        else:
            at = slice(None) if whole else torch.tensor(rows, device=self.device)
        text = self.text[at]
        size = max(1, self.PREFILL // len(text))
        for start in range(first, n, size):
            stop = min(start + size, n)
            positions = torch.arange(start, stop, device=self.device)
            self.model._hidden(
                text[:, start:stop],
                positions,
                self.cache.at(positions, stop, start, at),
                tokens_before(text, torch.full_like(text[:, 0], start), self.n_before),
            )
        if same and len(self.counts) > 1:
            self.cache.copy_first(n)

    def _step(self):
        """Draw one id for each row."""
        longest = max(self.counts)
        if self.cache is None:
            self._draw(self.model.logits_at(self.text[:, :longest], self.last))
        elif self.device.type == "cuda" and not torch.is_autocast_enabled("cuda"):  # its casts are gone when it ends
            self._replay(min(-(-longest // self.BUCKET) * self.BUCKET, self.block_size))
        else:
            start = longest - 1 if min(self.counts) == longest else None
            self._draw(self._logits(longest, start))

    def _logits(self, n_held: int, start: int | None):
        """Logits (B, V) behind the newest tokens, which are put into the cache; start where all stand there."""
        newest = self.text.gather(1, self.last[:, None])  # (B, 1)
        before = tokens_before(self.text, self.last, self.n_before)
        positions = self.last[:1] if start is not None else self.last[:, None]
        held, model = self.cache.at(positions, n_held, start), self.model
        if self.packed is None:
            return model.lm_head(model._hidden(newest, positions, held, before)[:, 0])
        x = self.packed.blocks(model._embed(newest, positions, before), model.where(positions, held[0]), held)
        return self.packed.head(model.transformer.ln_f(x)[:, 0])

    def _draw(self, logits):
        """Draw an id from each row of logits (B, V), and put it behind the row's text."""
        if self.seen is not None:
            logits = penalise(logits.float(), self.seen, self.sampling.repetition_penalty)
        uniforms = self.uniforms.index_select(0, self.n_drawn)[0]
        self.drawn.copy_(draw(logits[:, : self.n_ids], uniforms, self.sampling))
        self.n_drawn += 1
        self.last += 1
        ids = self.drawn[:, None].clamp(min=0)  # (B, 1)
        self.text.scatter_(1, self.last[:, None], ids)
        if self.seen is not None:
            self.seen.scatter_(1, ids, True)

    def _replay(self, n_held: int):
        """A step on CUDA, as one recorded graph: without it a small model waits for its kernels to be started."""
        if n_held not in self.graphs:
            state = [t for t in (self.n_drawn, self.last, self.text, self.seen) if t is not None]
            kept = [t.clone() for t in state]

            def restore():
                for tensor, value in zip(state, kept):
                    tensor.copy_(value)

            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # as torch.cuda.graph wants it: a few steps beforehand, beside the others
                for _ in range(3):
                    self._draw(self._logits(n_held, None))
                    restore()
            torch.cuda.current_stream().wait_stream(stream)
            self.graphs[n_held] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[n_held]):
                self._draw(self._logits(n_held, None))
        self.graphs[n_held].replay()
