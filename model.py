"""The GPT model: configuration, position schemes, attention, blocks, loss, FLOPs and optimizer groups.

    model = GPT(GPTConfig(block_size=64, vocab_size=85, n_layer=4, n_head=4, n_embd=128))
    logits, loss = model(idx, targets)                      # idx, targets (B, T) int64
    idx = model.generate(idx, max_new_tokens=100, seed=1)   # (B, T + 100)

Sources: GPT-2 (Radford et al. 2019) and its code, github.com/openai/gpt-2. Parameter names, initialization and the
bias option follow github.com/karpathy/nanoGPT, so that checkpoints can be exchanged. docs/positions.md compares the
position schemes. Decoding is implemented in dongpt/decode/decoder.py; hand-written kernels are in dongpt/kernels/.

Shapes: B sequences, T tokens per sequence, C = n_embd channels, nh = n_head heads of hs = C / nh channels,
V = vocab_size, S = tokens in the KV cache.
"""

import math
from dataclasses import dataclass, fields, replace
from operator import ge, gt, le, lt
from typing import Annotated, Any, Iterator, Literal, NamedTuple, get_args, get_origin

import torch
import torch.nn as nn
from torch.nn import functional as F

from dongpt.decode import decoder as decoding
from dongpt.decode.decoder import LayerCache
from dongpt.decode.sampling import Sampling
from dongpt.kernels.autograd import Dropout, biased_attention, rotate  # faster on a CPU than plain PyTorch

# ----------------------------------------------------------------------------------------------------------------------
# configuration


PositionScheme = Literal["default", "absolute", "rope", "relative", "alibi", "default+relative"]
RELATIVE_TABLE = "transformer.relative.relative_embeddings.weight"  # bias by distance and head, (block_size, n_head)
NGRAM_TABLE = "transformer.ngrams.weight"  # embeddings of the last tokens, ((ngrams - 1) * ngram_rows, n_embd)
# Comparison operators in the annotations below. configurator.py has its own copy, since it must not be imported here.
BOUND_OPERATORS = {">=": (ge, "at least"), ">": (gt, "above"), "<=": (le, "at most"), "<": (lt, "below")}


@dataclass(frozen=True)
class GPTConfig:
    """Model architecture. When training continues from a checkpoint, only the two dropout rates may change."""

    block_size: Annotated[int, ">=", 1] = 1024  # context length: the maximum number of tokens the model sees
    # vocabulary size; default: GPT-2's 50257, padded to a multiple of 64 for speed on a GPU; None: not known yet
    vocab_size: Annotated[int | None, ">=", 1] = 50304
    n_layer: Annotated[int, ">=", 1] = 12  # number of transformer blocks
    n_head: Annotated[int, ">=", 1] = 12  # number of attention heads per block
    n_embd: Annotated[int, ">=", 1] = 768  # embedding size; must be a multiple of n_head
    dropout: Annotated[float, ">=", 0, "<", 1] = 0.0  # dropout on embeddings and residuals; try 0.1 on small data
    attn_dropout: Annotated[float, ">=", 0, "<", 1] = 0.0  # attention dropout; values above 0 disable flash kernels
    bias: bool = True  # use biases in Linear and LayerNorm layers, as GPT-2 does; False is slightly better and faster
    pos_embd: PositionScheme = "default"  # default: learned position embeddings; see docs/positions.md
    activation: Literal["gelu", "gelu_tanh"] = "gelu"  # gelu: exact, as in nanoGPT; gelu_tanh: GPT-2's approximation
    tie_weights: bool = True  # share one matrix between the token embedding and the output head
    ngrams: Annotated[int, ">=", 1] = 1  # embed n-grams up to this length; 6 lowers the loss of a short run by 0.3
    ngram_rows: Annotated[int, ">=", 1] = 32768  # hash-table entries for each n-gram length
    model_type: Literal["gpt", "bigram"] = "gpt"  # bigram: a baseline that sees only the last token

    def resolve_aliases(self):
        """Replace aliases and reset unused fields, so that equal architectures have equal configs."""
        if self.pos_embd == "absolute":
            object.__setattr__(self, "pos_embd", "default")  # the dataclass is frozen
        if self.ngrams == 1 and self.ngram_rows > 0:  # unused; not saved, because nanoGPT rejects unknown model_args
            object.__setattr__(self, "ngram_rows", GPTConfig.ngram_rows)

    @property
    def has_wpe(self) -> bool:
        """True if positions have learned embeddings, which limit the sequence length."""
        return self.pos_embd in ("default", "default+relative")

    @property
    def has_relative(self) -> bool:
        """True if a learned bias for each head and distance is added to the attention scores."""
        return self.pos_embd in ("relative", "default+relative")

    def __post_init__(self):
        """Raise ValueError if no model can be built from these values."""
        self.resolve_aliases()
        for field in fields(self):
            value, meta = getattr(self, field.name), getattr(field.type, "__metadata__", ())
            if get_origin(field.type) is Literal and value not in (choices := get_args(field.type)):
                raise ValueError(f"{field.name}={value!r} is not valid: use one of {', '.join(map(str, choices))}")
            bounds = [(*BOUND_OPERATORS[sign], limit) for sign, limit in zip(meta[::2], meta[1::2])]
            if value is not None and not all(compare(value, limit) for compare, _, limit in bounds):
                bounds_text = " and ".join(f"{bound_text} {limit}" for _, bound_text, limit in bounds)
                raise ValueError(f"{field.name}={value} must be {bounds_text}")
        if self.model_type == "bigram" and self.pos_embd != "default":
            raise ValueError(f"a bigram model has no positions: remove pos_embd={self.pos_embd}")
        if self.model_type == "bigram" and self.ngrams > 1:
            raise ValueError(f"a bigram model sees only the last token: remove ngrams={self.ngrams}")
        multiple = 2 * self.n_head if self.pos_embd == "rope" else self.n_head  # RoPE rotates pairs of channels
        if self.n_embd % multiple:
            n_embd = max(multiple, round(self.n_embd / multiple) * multiple)
            problem = f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}"
            if self.n_embd % self.n_head == 0:
                problem = f"pos_embd=rope needs an even head size, not n_embd={self.n_embd} / n_head={self.n_head}"
            raise ValueError(f"{problem}: use n_embd={n_embd}")


# ----------------------------------------------------------------------------------------------------------------------
# positions


class AttentionInputs(NamedTuple):
    """Positional inputs shared by all layers. Default: causal, no rotation, no bias."""

    rotation: tuple[torch.Tensor, torch.Tensor] | None = None  # cos and sin for queries and keys, (..., T, 1, hs)
    bias: torch.Tensor | None = None  # added to the scores, (1 or B, 1 or nh, T, S); bool: False hides a key
    causal: bool = True  # causal mask when there is no bias; False: attend to every key


def rope_cos_sin(positions, head_size: int, rope_base: float = 10000.0):
    """Return the cosines and sines of RoPE's angles at positions (..., T), each of shape (..., T, 1, hs).

    As in Llama, channels i and i + hs/2 form a pair, which is rotated by position * base^(-2i/hs). See RoFormer,
    arxiv.org/abs/2104.09864, equation 15.
    """
    frequencies = rope_base ** (-torch.arange(0, head_size, 2, device=positions.device).float() / head_size)  # (hs/2,)
    angles = (positions[..., None] * frequencies).unsqueeze(-2)  # (..., T, 1, hs/2)
    angles = torch.cat([angles, angles], dim=-1)  # (..., T, 1, hs)
    return angles.cos(), angles.sin()


def alibi_slopes(n_head: int, device=None):
    """Return ALiBi's penalty per token of distance for each head, (nh,): 2^(-8/nh), 2^(-16/nh), ..., 2^-8.

    Press et al., "Train Short, Test Long", arxiv.org/abs/2108.12409, section 3.
    """
    return 2.0 ** (-8.0 * torch.arange(1, n_head + 1, device=device) / n_head)


def ngram_ids(idx, previous_ids, ngrams: int, n_rows: int):
    """Return hash-table indices of the 2- to n-grams ending at each token: (B, T) -> (B, T, ngrams - 1).

    previous_ids (B, ngrams - 1) are the ids before idx, or -1 before the start of the sequence (default: all -1).
    For example, with ngrams=3 the last token of "a b c" gets one index for "b c", in the first n_rows entries, and one
    for "a b c", in the next n_rows. Colliding n-grams share an entry, as in github.com/KellerJordan/modded-nanogpt.
    """
    T, num_previous = idx.shape[1], ngrams - 1
    previous_ids = idx.new_full((len(idx), num_previous), -1) if previous_ids is None else previous_ids
    shifted_ids, rows = torch.cat([previous_ids, idx], dim=1) + 1, []
    ngram_hash = shifted_ids[:, num_previous:]
    for n in range(1, ngrams):  # n earlier tokens; int64 overflow wraps around
        ngram_hash = ngram_hash * 65537 + shifted_ids[:, num_previous - n : num_previous - n + T]
        rows.append((ngram_hash * -7046029254386353131 >> 32) % n_rows + (n - 1) * n_rows)  # Knuth's hash
    return torch.stack(rows, dim=-1)


def same_document_mask(idx, end_id: int, positions=None):
    """Return a boolean mask (B, 1, T, S) that is True where query and key belong to the same document.

    The keys are all tokens of idx (B, S). The queries are the tokens at positions (T,) or (B, T) (default: all). An
    end_id belongs to the document after it, so that a document's first token has an earlier token to attend to.
    """
    document_ids = (idx == end_id).cumsum(1)  # (B, S): 0 0 0 1 1 1 1 2 2 ...
    query_document_ids = document_ids
    if positions is not None:
        query_document_ids = document_ids.gather(1, torch.atleast_2d(positions).expand(len(idx), -1))
    return (query_document_ids[:, :, None] == document_ids[:, None, :])[:, None]


def attend(q, k, v, bias, dropout: float, causal: bool = True):
    """Compute attention of q (B, nh, T, hs) over k and v (B, nh, S, hs), adding bias to the scores: (B, nh, T, hs).

    causal is used only if bias is None. With causal=False, every query attends to every key.
    """
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
    if bias.requires_grad and q.device.type == "cpu" and not dropout and not torch.compiler.is_compiling():
        return biased_attention(q, k, v, bias)
    if bias.is_floating_point() and q.device.type != "cpu":  # only CPUs accept a float32 bias with bfloat16 queries
        bias = bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)


# ----------------------------------------------------------------------------------------------------------------------
# layers


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which each token attends to itself and to earlier tokens."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key and value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)  # mixes the heads
        self.resid_dropout = Dropout(config.dropout)
        self.n_head, self.attn_dropout = config.n_head, config.attn_dropout

    def forward(self, x, inputs: AttentionInputs = AttentionInputs(), cache: LayerCache | None = None):
        B, T, C = x.shape
        # One matmul is faster than three. q, k, v: (B, T, nh, hs), one set per head
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head) for t in self.c_attn(x).split(C, dim=2))
        if inputs.rotation is not None:  # scores then depend only on the distance between query and key
            q, k = rotate(q, k, *inputs.rotation)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        if cache is not None:  # decoding: keys and values of earlier tokens are cached
            k, v = cache.extend(k, v)  # (B, nh, S, hs)
        y = attend(q, k, v, inputs.bias, self.attn_dropout if self.training else 0.0, inputs.causal)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenate the heads
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Feed-forward network: two linear layers with a GELU between them and 4 * n_embd hidden channels."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """One transformer layer, with LayerNorm before attention and before the MLP (pre-LN), as in GPT-2."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, inputs: AttentionInputs = AttentionInputs(), cache: LayerCache | None = None):
        # residual connections: gradients reach the first layer through any number of blocks
        x = x + self.attn(self.ln_1(x), inputs, cache)
        return x + self.mlp(self.ln_2(x))


# ----------------------------------------------------------------------------------------------------------------------
# the model


class GPT(nn.Module):
    """A decoder-only transformer that predicts the next token at every position."""

    transformer: Any  # an nn.ModuleDict: wte, wpe, relative, ngrams, drop, h, ln_f
    can_cache = True  # False if a token's keys and values change as the sequence grows
    use_packed_weights = True  # whether decoding on a CPU may repack a copy of the weights
    adapter: dict | None = None  # LoRA adapter that is trained instead of the weights: see dongpt/checkpoint/lora.py
    document_end_id: int | None = None  # end-of-document id if attention stays within documents (document_mask)

    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.vocab_size is not None, "vocab_size must be set from the data before a model is created"
        self.config = config
        # Modules are created in this order, which determines their random numbers and the order in checkpoints.
        self.transformer = nn.ModuleDict(dict(wte=nn.Embedding(config.vocab_size, config.n_embd)))
        if config.has_wpe:
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        if config.has_relative:
            bias_table = nn.Embedding(config.block_size, config.n_head)
            self.transformer.relative = nn.ModuleDict(dict(relative_embeddings=bias_table))
        if config.ngrams > 1:
            self.transformer.ngrams = nn.Embedding((config.ngrams - 1) * config.ngram_rows, config.n_embd)
        self.transformer.drop = Dropout(config.dropout)
        self.transformer.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.transformer.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight  # as in GPT-2; Press and Wolf, arxiv.org/abs/1608.05859
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)  # as in GPT-2
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # two residual branches per layer; GPT-2 paper, section 2.3
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif name in (RELATIVE_TABLE, NGRAM_TABLE):  # zero init: adding the table leaves the output unchanged
                nn.init.zeros_(parameter)

    def embed(self, idx, positions, previous_ids=None):
        """Return the first layer's input (B, T, C) for idx (B, T) at positions (T,) or (B, T). See also ngram_ids."""
        x, config = self.transformer.wte(idx), self.config
        if config.ngrams > 1:  # sum over the n-gram lengths
            x = x + self.transformer.ngrams(ngram_ids(idx, previous_ids, config.ngrams, config.ngram_rows)).sum(-2)
        if config.has_wpe:
            x = x + self.transformer.wpe(positions)
        return self.transformer.drop(x)

    def attention_inputs(self, positions, cache: LayerCache | None = None, key_ids=None) -> AttentionInputs:
        """Return rotation, bias and mask for queries at positions (T,) or (B, T).

        Without a cache, the keys have the same positions. key_ids (B, S) are needed only if document_end_id is set.
        """
        config, positions = self.config, torch.atleast_2d(positions)  # (1 or B, T)
        rotation = rope_cos_sin(positions, config.n_embd // config.n_head) if config.pos_embd == "rope" else None
        has_score_bias, document_end_id = config.pos_embd not in ("default", "rope"), self.document_end_id
        if not has_score_bias and document_end_id is None:  # no mask needed: use the fastest kernel
            if cache is None or cache.start == 0:  # keys and queries are the same tokens: is_causal works
                return AttentionInputs(rotation)
            if cache.start is not None and positions.shape[1] == 1:  # the newest token attends to all others
                return AttentionInputs(rotation, causal=False)
        key_positions = positions[0] if cache is None else torch.arange(cache.cache_len, device=positions.device)
        # The mask has four dimensions because flash attention on a CPU accepts two or four, but not three.
        distance = (positions[:, :, None] - key_positions)[:, None]  # (1 or B, 1, T, S)
        visible_mask = distance >= 0
        if document_end_id is not None:
            visible_mask = visible_mask & same_document_mask(key_ids, document_end_id, positions)  # (B, 1, T, S)
        if not has_score_bias:
            return AttentionInputs(rotation, visible_mask)
        if config.pos_embd == "alibi":
            bias = -alibi_slopes(config.n_head, positions.device)[:, None, None] * distance
        else:  # distances beyond the table use its last entry
            bias_table = self.transformer.relative.relative_embeddings
            bias = bias_table(distance[:, 0].clamp(0, config.block_size - 1)).movedim(-1, 1)  # (1 or B, nh, T, S)
        return AttentionInputs(rotation, bias.float().masked_fill(~visible_mask, -math.inf).contiguous())

    def hidden_states(self, idx, positions, caches: list[LayerCache] | None = None, previous_ids=None, key_ids=None):
        """Return the normalized output of the last layer, (B, T, C), for idx (B, T) at positions (T,) or (B, T).

        With caches, key_ids (B, S) are the ids of all cached tokens including idx. See ngram_ids for previous_ids.
        """
        x = self.embed(idx, positions, previous_ids)
        inputs = self.attention_inputs(positions, caches[0] if caches else None, idx if key_ids is None else key_ids)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, inputs, caches[layer] if caches else None)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Return the logits and the mean loss in nats for idx (B, T) int64.

        With targets (B, T), the logits are (B, T, V), and targets of -1 are ignored. Without targets, the logits are
        (B, 1, V), for the last position only, and the loss is None. Raises ValueError if T is too large.
        """
        T = idx.shape[1]
        self.check_length(T)  # otherwise wpe raises an obscure error, on CUDA a fatal one
        x = self.hidden_states(idx, torch.arange(T, device=idx.device))
        if targets is None:
            return self.lm_head(x[:, -1:]), None  # lm_head is the largest matmul; sampling needs one position
        logits = self.lm_head(x)
        # float32: log-sum-exp over the vocabulary is too inaccurate in bfloat16
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    def logits_at(self, idx, last_positions):
        """Return logits (B, V) at last_positions (B,) of idx (B, T). No cache is used, and later tokens are ignored."""
        x = self.hidden_states(idx, torch.arange(idx.shape[1], device=idx.device))
        return self.lm_head(x[torch.arange(len(idx), device=idx.device), last_positions])

    def check_length(self, T: int):
        """Raise ValueError if positions have learned embeddings and T exceeds block_size."""
        if T > self.config.block_size and self.config.has_wpe:
            limit_text = (
                f"block_size={self.config.block_size}, and pos_embd={self.config.pos_embd} has no positions beyond it"
            )
            raise ValueError(f"a sequence of {T} tokens exceeds {limit_text}: pass at most block_size tokens")

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def __getstate__(self):  # copies and pickles exclude the decoder and its CUDA graphs
        return {key: value for key, value in self.__dict__.items() if key != "_decoder"}

    # ------------------------------------------------------------------------------------------------------------------
    # size, cost, optimizer

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Return the number of parameters, by default without position embeddings, as in nanoGPT."""
        count = sum(p.numel() for p in self.parameters())
        return count - self.transformer.wpe.weight.numel() if non_embedding and "wpe" in self.transformer else count

    def get_num_matmul_params(self) -> int:
        """Return the number of parameters used in matmuls per token, which excludes embedding look-ups."""
        n_embedding = 0 if self.config.tie_weights else self.transformer.wte.weight.numel()  # if tied, lm_head uses it
        n_embedding += self.transformer.ngrams.weight.numel() if self.config.ngrams > 1 else 0
        return self.get_num_params() - n_embedding

    def flops_per_token(self) -> int:
        """Return FLOPs per token, forward and backward: 6 N + 12 L C T (PaLM, appendix B, arxiv.org/abs/2204.02311)."""
        config, n = self.config, 4 if self.adapter else 6  # 2 FLOPs for each of: forward, gradient of x, gradient of w
        return n * self.get_num_matmul_params() + 12 * config.n_layer * config.n_embd * config.block_size

    def parameter_groups(self, muon: bool = False) -> dict[str, list[str]]:
        """Return the names of trained parameters by optimizer group, in the order in which checkpoints store them.

        "matrices" include embeddings; "vectors" are biases and LayerNorm weights. With muon=True, the matrices of the
        transformer blocks are in "blocks". The tables "ngrams" and "relative" are separate groups.
        """
        parameters = {name: p for name, p in self.named_parameters() if p.requires_grad}  # a tied weight appears once
        tables = {"ngrams": NGRAM_TABLE}
        tables |= {"relative": RELATIVE_TABLE} if self.config.has_relative else {}  # in EDS, this is another table
        matrices = [name for name, p in parameters.items() if p.dim() >= 2 and name not in tables.values()]
        block_matrices = [name for name in matrices if muon and name.startswith("transformer.h.")]
        groups = {
            "matrices": [name for name in matrices if name not in block_matrices],
            "vectors": [name for name, p in parameters.items() if p.dim() < 2],
        }
        groups |= {"blocks": block_matrices} if muon else {}
        return groups | {kind: [name] for kind, name in tables.items() if name in parameters}

    def configure_optimizers(
        self, weight_decay, learning_rate, betas, device_type, optimizer_class=torch.optim.AdamW, group_settings={}
    ):
        """Return an AdamW optimizer as in nanoGPT, without weight decay on biases, LayerNorm weights and n-gram tables.

        dongpt/train/optim.py passes its own optimizer class and settings for some groups. The group "blocks" uses Muon.
        """
        parameters, groups = dict(self.named_parameters()), []
        for kind, names in self.parameter_groups(muon="blocks" in group_settings).items():
            group = dict(params=[parameters[name] for name in names], **group_settings.get(kind, {}))
            groups.append({**group, "weight_decay": 0.0 if kind in ("vectors", "ngrams") else weight_decay})
        optimizer = optimizer_class(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu"))
        if optimizer_class is not torch.optim.AdamW:
            return optimizer

        def make_gradients_dense(*_):  # AdamW rejects the gradients of an embedding with sparse=True
            for p in parameters.values():
                if p.grad is not None and p.grad.is_sparse:
                    p.grad = p.grad.to_dense()

        optimizer.register_step_pre_hook(make_gradients_dense)
        return optimizer

    def crop_block_size(self, block_size: int):
        """Truncate the position tables to block_size, so that a pretrained model can be trained on shorter windows."""
        assert block_size <= self.config.block_size
        position_tables = [self.transformer.wpe] if self.config.has_wpe else []
        position_tables += self.transformer.relative.values() if self.config.has_relative else []
        for table in position_tables:
            table.num_embeddings = block_size  # shown by print(model)
            table.weight = nn.Parameter(table.weight[:block_size].detach().clone())
        self.config = replace(self.config, block_size=block_size)

    # ------------------------------------------------------------------------------------------------------------------
    # decoding

    @torch.no_grad()
    def generate(
        self, idx, max_new_tokens: int, temperature=1.0, top_k=None, top_p=None, seed=None, use_kv_cache=True, **kwargs
    ):
        """Return idx (B, T) followed by sampled ids: (B, T + max_new_tokens). See stream for the arguments."""
        new_ids = self.stream(idx, max_new_tokens, temperature, top_k, top_p, seed, use_kv_cache, **kwargs)
        return torch.cat([idx, *(ids[:, None].to(idx.device) for ids in new_ids)], dim=1)

    def stream(
        self,
        prompts,
        max_new_tokens: int,
        temperature=1.0,
        top_k=None,
        top_p=None,
        seed=None,
        use_kv_cache=True,
        min_p=None,
        repetition_penalty=None,
        **kwargs,
    ) -> Iterator[torch.Tensor]:
        """Yield each sequence's next id, (B,) int64 on the CPU, up to max_new_tokens times; -1 for ended sequences.

        prompts is a tensor of ids (B, T) or a list of non-empty lists of ids. See Sampling for temperature, top_k,
        top_p, min_p and repetition_penalty. kwargs may contain stop_ids, which end a sequence; n_ids, to sample only
        ids below it (for a padded vocabulary); and decoder, a Decoder to reuse. The stream ends when all sequences end.
        The random numbers for sequence i depend only on (seed, i). If seed is None, torch's generator provides one.
        If a sequence exceeds block_size tokens, only its newer half is kept as context, with or without the cache.
        Call model.eval() first. Raises ValueError for invalid settings, an empty prompt, or non-finite logits.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        return decoding.stream(self, prompts, max_new_tokens, sampling, seed, use_kv_cache, **kwargs)
