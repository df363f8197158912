"""The GPT: configuration, attention, blocks, loss, decoding with a key-value cache, AdamW groups, FLOPs.

    model = GPT(GPTConfig(block_size=64, vocab_size=85, n_layer=4, n_head=4, n_embd=128))
    logits, loss = model(idx, targets)                      # idx, targets (B, T) int64
    idx = model.generate(idx, max_new_tokens=100, seed=1)   # (B, T + 100)

Sources: GPT-2 (Radford et al. 2019) and its code, github.com/openai/gpt-2; parameter names, initialisation and the
bias switch as in github.com/karpathy/nanoGPT, so that checkpoints go both ways.

Shapes: B rows of a batch, T tokens in a row, C = n_embd channels, nh = n_head heads of hs = C / nh channels,
V = vocab_size, S tokens held in a cache.
"""
import math
from dataclasses import dataclass, replace
from typing import Iterator, Literal, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

# ----------------------------------------------------------------------------------------------------------------------
# configuration


Positions = Literal["default", "absolute", "rope", "relative", "alibi", "default+relative"]


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
    pos_embd: Positions = "default"  # how positions enter; default (absolute) is learned, the others are not built yet
    activation: Literal["gelu", "gelu_tanh"] = "gelu"  # nanoGPT uses the exact GELU, GPT-2 the tanh approximation
    tie_weights: bool = True  # one matrix for the token embedding and the output head

    def __post_init__(self):
        self.settle_names()
        self.check()

    def settle_names(self):
        """Replace aliases, so that checkpoints and comparisons know one name."""
        if self.pos_embd == "absolute":
            object.__setattr__(self, "pos_embd", "default")

    def check(self):
        """Raise ValueError for an architecture that cannot be built."""
        if self.pos_embd != "default":
            raise ValueError(f"pos_embd={self.pos_embd!r} is not built yet: use pos_embd=default")
        for name in ("block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 1")
        if self.n_embd % self.n_head:
            near = max(self.n_head, round(self.n_embd / self.n_head) * self.n_head)
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}: use n_embd={near}")
        for name in ("dropout", "attn_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")


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


class Held(NamedTuple):
    """One layer's share of a KVCache, and where in it the tokens at hand belong."""
    keys: torch.Tensor  # (B, nh, block_size, hs)
    values: torch.Tensor  # (B, nh, block_size, hs)
    rows: torch.Tensor  # (R,): which rows of the batch are at hand
    every_row: bool  # whether these are all
    positions: torch.Tensor  # (R, T) of the tokens at hand
    mask: torch.Tensor  # (R, 1, T, S): each token sees itself and what is before it

    def extend(self, k, v):
        """Store k, v (R, nh, T, hs) of the tokens at hand; return all that their rows hold, (R, nh, S, hs) each."""
        at = (self.rows[:, None], slice(None), self.positions)
        self.keys[at] = k.transpose(1, 2)
        self.values[at] = v.transpose(1, 2)
        S = self.mask.shape[-1]
        if self.every_row:  # a slice is a view, an index would copy the cache
            return self.keys[:, :, :S], self.values[:, :, :S]
        return self.keys[self.rows, :, :S], self.values[self.rows, :, :S]


class KVCache:
    """Keys and values of the tokens that a batch holds, so that a new token is encoded alone.

    Room for block_size tokens per row is taken once. Rows may hold different numbers of tokens: what lies in a row
    beyond its newest token is garbage that the mask hides and that later tokens overwrite.
    """

    def __init__(self, model: "GPT", n_rows: int):
        config, like = model.config, model.lm_head.weight
        shape = (n_rows, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.n_rows = n_rows
        self.layers = [[torch.zeros(shape, device=like.device, dtype=like.dtype) for _ in "kv"]
                       for _ in range(config.n_layer)]

    def at(self, rows: Sequence[int], positions, n_held: int) -> list[Held]:
        """For each layer, where tokens of these rows at positions (R, T) belong; no row holds more than n_held then."""
        mask = (torch.arange(n_held, device=positions.device) <= positions[:, :, None])[:, None]  # (R, 1, T, S)
        rows, every_row = torch.tensor(rows, device=positions.device), len(rows) == self.n_rows
        return [Held(keys, values, rows, every_row, positions, mask) for keys, values in self.layers]


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what comes before it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.attn_dropout = config.n_head, config.attn_dropout

    def forward(self, x, held: Held | None = None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        if held is None:
            dropout = self.attn_dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, nh, T, hs)
        else:
            k, v = held.extend(k, v)  # (B, nh, S, hs)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=held.mask)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with a GELU between them, four times as wide as the block."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

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

    def forward(self, x, held: Held | None = None):
        x = x + self.attn(self.ln_1(x), held)
        return x + self.mlp(self.ln_2(x))


# ----------------------------------------------------------------------------------------------------------------------
# the model


class GPT(nn.Module):
    """A decoder-only transformer: logits for the next token at every position."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.vocab_size is not None, "vocab_size comes from the data before a model is made"
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=LayerNorm(config.n_embd, config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # two residual branches per layer add up: GPT-2 paper, section 2.3
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def _hidden(self, idx, positions, held: list[Held] | None = None):
        """The last layer's output, normalised: (B, T, C) for idx (B, T) at positions (T,) or (B, T)."""
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))  # (B, T, C)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, held[layer] if held else None)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Logits and mean loss in nats for idx (B, T) int64.

        With targets (B, T), of which -1 is ignored: logits (B, T, V) and the loss. Without: logits (B, 1, V) of the
        last position and None. Raises ValueError for a sequence that is longer than block_size.
        """
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size={self.config.block_size}, "
                             f"and pos_embd=default has no positions beyond it: pass at most block_size tokens")
        x = self._hidden(idx, torch.arange(T, device=idx.device))
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    # ------------------------------------------------------------------------------------------------------------------
    # size, cost, optimizer

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters; by default without the position table, as nanoGPT counts (the head is tied to wte)."""
        count = sum(p.numel() for p in self.parameters())
        return count - self.transformer.wpe.weight.numel() if non_embedding else count

    def flops_per_token(self) -> int:
        """FLOPs of forward and backward per token, 6 N + 12 L C T: PaLM, appendix B, arxiv.org/abs/2204.02311."""
        config = self.config
        looked_up = 0 if config.tie_weights else self.transformer.wte.weight.numel()  # multiplies nothing
        return 6 * (self.get_num_params() - looked_up) + 12 * config.n_layer * config.n_embd * config.block_size

    def configure_optimizers(self, weight_decay: float, learning_rate: float, betas: tuple[float, float],
                             device_type: str) -> torch.optim.AdamW:
        """AdamW with two groups: matrices and embeddings decay, biases and LayerNorm gains do not."""
        parameters = [p for p in self.parameters() if p.requires_grad]  # a tied weight comes once
        groups = [dict(params=[p for p in parameters if p.dim() >= 2], weight_decay=weight_decay),
                  dict(params=[p for p in parameters if p.dim() < 2], weight_decay=0.0)]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu"))

    def crop_block_size(self, block_size: int):
        """Forget the positions from block_size on, so that a pretrained model trains on shorter windows."""
        assert block_size <= self.config.block_size
        self.config = replace(self.config, block_size=block_size)
        self.transformer.wpe.num_embeddings = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

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
    def generate(self, idx, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, seed: int | None = None, use_kv_cache: bool = True,
                 n_ids: int | None = None):
        """idx (B, T) with max_new_tokens drawn ids behind it: (B, T + max_new_tokens). See stream for the settings."""
        new = self.stream(idx, max_new_tokens, temperature, top_k, top_p, seed, use_kv_cache, n_ids=n_ids)
        return torch.cat([idx, *(ids[:, None] for ids in new)], dim=1)

    @torch.no_grad()
    def stream(self, prompts, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
               top_p: float | None = None, seed: int | None = None, use_kv_cache: bool = True,
               stop_ids: Sequence[int] = (), n_ids: int | None = None) -> Iterator[torch.Tensor]:
        """Yield the next id of every row, (B,) int64, up to max_new_tokens times; a finished row gives -1.

        prompts: (B, T) ids, or a list of id lists of any lengths above 0. temperature 0 takes the likeliest id;
        top_k and top_p cut the distribution, 0 or None leaves it. A row is finished after an id of stop_ids; the
        stream ends when all rows are. Only ids below n_ids (a tokenizer's size, where the vocabulary is padded) are
        drawn. Row i draws its random numbers from (seed, i) alone; seed None takes a seed from torch's generator.
        When block_size tokens are held and one more comes, only the newest half of the tokens is kept: what the
        model sees depends on the count of tokens alone, with and without cache. Call model.eval() before.
        Raises ValueError for settings that make no sense, an empty prompt, and logits that are not finite.
        """
        rows = prompts.tolist() if torch.is_tensor(prompts) else [list(row) for row in prompts]
        n_ids = self.config.vocab_size if n_ids is None else n_ids
        _check_decoding(rows, self.config.vocab_size, max_new_tokens, temperature, top_k, top_p)
        if seed is None:
            seed = int(torch.randint(2 ** 62, ()))
        windows = [row[-window_size(len(row), self.config.block_size):] for row in rows]  # what the model sees
        fresh = [len(window) for window in windows]  # how many of these the cache does not hold yet
        cache = KVCache(self, len(rows)) if use_kv_cache else None
        generators = [np.random.Generator(np.random.Philox(key=seed % 2 ** 64 + (i << 64))) for i in range(len(rows))]
        device, finished = self.lm_head.weight.device, [False] * len(rows)
        for _ in range(max_new_tokens):
            logits = self._next_logits(windows, fresh, cache)[:, :n_ids]  # (B, V)
            uniforms = torch.tensor([generator.random() for generator in generators], dtype=torch.float64)
            drawn = draw(logits, uniforms, temperature, top_k, top_p).tolist()
            yield torch.tensor([-1 if done else i for i, done in zip(drawn, finished)], device=device)
            finished = [done or i in stop_ids for i, done in zip(drawn, finished)]
            if all(finished):
                return
            for row, i in enumerate(drawn):  # a finished row goes on unseen, so that the rows stay in step
                windows[row].append(i)
                fresh[row] = 1
                if len(windows[row]) > self.config.block_size:
                    windows[row] = windows[row][-window_size(len(windows[row]), self.config.block_size):]
                    fresh[row] = len(windows[row])

    def _next_logits(self, windows: list[list[int]], fresh: list[int], cache: KVCache | None):
        """Logits (B, V) behind each window; with a cache only the newest fresh[i] tokens of window i are encoded."""
        if cache is None:
            return self._logits_behind(windows, [0] * len(windows))
        logits = torch.empty(len(windows), self.config.vocab_size, device=self.lm_head.weight.device,
                             dtype=self.lm_head.weight.dtype)
        for many in (False, True):  # rows with one new token go apart from rows that start anew: no padding
            rows = [row for row in range(len(windows)) if (fresh[row] > 1) == many]
            if rows:
                new = [windows[row][-fresh[row]:] for row in rows]
                logits[rows] = self._logits_behind(new, [len(windows[r]) - fresh[r] for r in rows], cache, rows)
        return logits

    def _logits_behind(self, pieces: list[list[int]], starts: list[int], cache: KVCache | None = None, rows=None):
        """Logits (R, V) behind each piece of tokens; piece i begins at position starts[i]. Shorter ones are padded."""
        device, T = self.lm_head.weight.device, max(map(len, pieces))
        idx = torch.tensor([piece + [0] * (T - len(piece)) for piece in pieces], device=device)  # (R, T)
        last = torch.tensor([len(piece) - 1 for piece in pieces], device=device)
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(T, device=device)  # (R, T)
        n_held = max(start + len(piece) for start, piece in zip(starts, pieces))
        x = self._hidden(idx, positions, cache.at(rows, positions, n_held) if cache else None)
        return self.lm_head(x[torch.arange(len(pieces), device=device), last])  # (R, V)


def window_size(n_tokens: int, block_size: int) -> int:
    """How many of the newest of n_tokens the model sees: all up to block_size; one more, and it is half a block.

    The window then grows to block_size again, and so on: block_size=4 gives 1 2 3 4 2 3 4 2 3 4 ...
    """
    if n_tokens <= block_size:
        return n_tokens
    half = max(1, block_size // 2)
    return half + (n_tokens - block_size - 1) % (block_size - half + 1)


def _check_decoding(rows, vocab_size, max_new_tokens, temperature, top_k, top_p):
    """Raise ValueError, with all that is wrong, unless ids can be drawn with these settings."""
    problems = []
    if not rows or not all(isinstance(row, list) and row for row in rows):
        problems.append("a prompt is empty: pass rows of at least one token id each")
    elif not all(0 <= min(row) and max(row) < vocab_size for row in rows):
        problems.append(f"a prompt holds ids beyond the model's vocabulary of {vocab_size}: use the model's tokenizer")
    if max_new_tokens < 0:
        problems.append(f"max_new_tokens={max_new_tokens} must be at least 0")
    if not 0 <= temperature < math.inf:
        problems.append(f"temperature={temperature} must be at least 0 (0 takes the likeliest token)")
    if top_k is not None and top_k < 0:
        problems.append(f"top_k={top_k} must be at least 0 (0 or None is off)")
    if top_p is not None and not 0 <= top_p <= 1:
        problems.append(f"top_p={top_p} must be between 0 and 1 (0 or None is off)")
    if problems:
        raise ValueError("; ".join(problems))


def draw(logits, uniforms, temperature: float, top_k: int | None, top_p: float | None):
    """One id per row (B,), drawn from logits (B, V) by inverting the cumulative distribution at uniforms (B,) < 1.

    The filters are Hugging Face's, in its order: temperature, then the top_k likeliest, then the smallest set whose
    probability reaches top_p. Raises ValueError for logits that are not finite.
    """
    logits = logits.float()
    if logits.device.type == "mps":
        logits = logits.cpu()  # sampling on MPS has given wrong ids without an error: nanoGPT issues 255 and 458
    if not torch.isfinite(logits).all():
        raise ValueError("the model's logits are not finite: use dtype=float32, or an earlier checkpoint "
                         "if the training diverged")
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.max(-1, keepdim=True).values) / max(temperature, 1e-37)  # no tiny one may overflow
    if top_k:
        least = torch.topk(logits, min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p:
        ascending, order = logits.sort()
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        outside[:, -1] = False  # the likeliest id always stays
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    # float64, so that ids of small probability keep theirs; searchsorted never lands on one of probability 0
    cumulative = logits.double().softmax(-1).cumsum(-1)  # (B, V)
    points = uniforms.to(logits.device)[:, None].clamp(max=1 - 2 ** -40) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True)[:, 0]
