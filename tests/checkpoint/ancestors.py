"""The systems that donGPT replaces, as references for tests: their mathematics and the exact layout of their files.

Written from ANCESTORS.md alone, on dictionaries of named tensors and plain torch operations; nothing of model.py is in
here, so that a mistake there cannot hide here.

    old = NanoGPT(pos_embd="rope", generation="C", n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=13)
    old.train(3)                                   # real AdamW updates: states exist where they did
    torch.save(old.checkpoint(prefix="_orig_mod."), path)
    old.logits(idx)                                # (B, T, V)
    old.continued(batches)                         # weights after more updates, as a straight run would have them
"""

import pickle
import sys
import types
from collections import OrderedDict
from contextlib import contextmanager

import torch
from torch.nn import functional as F

BETAS, WEIGHT_DECAY, GRAD_CLIP = (0.9, 0.95), 0.1, 1.0

# every int, float, bool and str that nanoGPT's train.py has in its globals, on somebody else's machine
CONFIG = dict(
    out_dir="out",
    eval_interval=250,
    log_interval=10,
    eval_iters=200,
    eval_only=False,
    always_save_checkpoint=True,
    init_from="scratch",
    wandb_log=False,
    wandb_project="owt",
    wandb_run_name="mini-gpt",
    dataset="tiny_char",
    gradient_accumulation_steps=1,
    batch_size=2,
    block_size=8,
    n_layer=2,
    n_head=2,
    n_embd=16,
    dropout=0.0,
    bias=False,
    learning_rate=1e-3,
    max_iters=5000,
    weight_decay=WEIGHT_DECAY,
    beta1=BETAS[0],
    beta2=BETAS[1],
    grad_clip=GRAD_CLIP,
    decay_lr=False,
    warmup_iters=100,
    lr_decay_iters=5000,
    min_lr=1e-4,
    backend="nccl",
    device="mps",
    dtype="float16",
    compile=True,
)


def layer_norm(x, weights: dict, name: str):
    """LayerNorm with the gain and, where there is one, the bias of this name."""
    return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights.get(name + ".bias"), 1e-5)


def linear(x, weights: dict, name: str):
    """A Linear of this name, with a bias where there is one."""
    return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))


def attention(x, weights: dict, name_in: str, name_out: str, n_head: int):
    """Causal attention, written out; q, k and v are the thirds of one matrix, the heads lie side by side in each."""
    T, C = x.shape[1:]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    q, k, v = linear(x, weights, name_in).split(C, dim=-1)
    heads = []
    for head in range(n_head):
        at = slice(head * C // n_head, (head + 1) * C // n_head)
        scores = q[..., at] @ k[..., at].transpose(1, 2) / (C // n_head) ** 0.5
        heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[..., at])
    return linear(torch.cat(heads, dim=-1), weights, name_out)


class Ancestor:
    """Named weights, and AdamW updates on them as a training script of that time did them."""

    weights: "OrderedDict[str, torch.Tensor]"  # the tied head not among them

    def __init__(self, seed: int):
        self.random = torch.Generator().manual_seed(seed)
        self.weights, self.optimizer, self.n_updates = OrderedDict(), None, 0

    def add(self, name: str, *shape: int):
        """A random parameter: gains around 1, all else around 0, none at its usual start, so that a swap shows."""
        tensor = 0.15 * torch.randn(*shape, generator=self.random)
        self.weights[name] = torch.nn.Parameter(tensor + ("ln_" in name or "norm" in name) * name.endswith("weight"))

    def groups(self, old: bool = False) -> list[list[str]]:
        """The names in AdamW's two groups: [decayed, not decayed]."""
        if old:  # nanoGPT until May 2023: the weights of Linear alone decay, both groups sorted by name
            is_linear = {
                name
                for name, weight in self.weights.items()
                if weight.dim() == 2 and not name.startswith(("transformer.wte", "transformer.wpe"))
            }
            return [sorted(is_linear), sorted(self.weights.keys() - is_linear)]
        return [
            [name for name, weight in self.weights.items() if weight.dim() >= 2],
            [name for name, weight in self.weights.items() if weight.dim() < 2],
        ]

    def adamw(self, weights: dict, old_groups: bool = False, lr: float = 1e-2, weight_decay: float = WEIGHT_DECAY):
        decayed, others = self.groups(old_groups)
        return torch.optim.AdamW(
            [
                dict(params=[weights[name] for name in decayed], weight_decay=weight_decay),
                dict(params=[weights[name] for name in others], weight_decay=0.0),
            ],
            lr=lr,
            betas=BETAS,
        )

    def update(self, weights: dict, optimizer, x, y, clip: float = 0.0):
        loss = F.cross_entropy(self.logits(x, weights).flatten(0, 1), y.flatten())
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(weights.values(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def train(self, n_updates: int = 3, old_groups: bool = False):
        """n_updates on random tokens; what takes no part in the logits gets no optimizer state. Returns self."""
        self.optimizer, self.old_groups = self.adamw(self.weights, old_groups), old_groups
        for _ in range(n_updates):
            ids = torch.randint(self.vocab_size, (4, self.block_size + 1), generator=self.random)
            self.update(self.weights, self.optimizer, ids[:, :-1], ids[:, 1:])
        self.n_updates += n_updates
        return self

    def states(self) -> dict[str, dict]:
        """The optimizer state of each parameter that has one, by name."""
        names = {id(weight): name for name, weight in self.weights.items()}
        return {names[id(weight)]: state for weight, state in self.optimizer.state.items() if state}

    def continued(self, batches, lr: float = 1e-3, weight_decay: float = WEIGHT_DECAY, forget: bool = False) -> dict:
        """The weights, by name, after one more update on each (x, y) of batches, with nanoGPT's present groups.

        forget: with a new optimizer instead of the one so far, to see what difference the states make.
        """
        weights = OrderedDict((name, weight.detach().clone().requires_grad_()) for name, weight in self.weights.items())
        optimizer = self.adamw(weights, lr=lr, weight_decay=weight_decay)
        for name, state in ({} if forget else self.states()).items():
            optimizer.state[weights[name]] = {key: value.clone() for key, value in state.items()}
        for x, y in batches:
            self.update(weights, optimizer, x, y, GRAD_CLIP)
        return {name: weight.detach() for name, weight in weights.items()}

    def greedy(self, ids: list[int], n: int) -> list[int]:
        """ids with the n likeliest next ones behind them; up to block_size in all."""
        for _ in range(n):
            with torch.no_grad():
                ids = ids + [int(self.logits(torch.tensor([ids]))[0, -1].argmax())]
        return ids


class NanoGPT(Ancestor):
    """nanoGPT, and EDS, which is nanoGPT with other positions.

    pos_embd: None (nanoGPT, EDS generation A), default, rope or relative. generation C has EDS's relative table always.
    """

    def __init__(
        self,
        pos_embd: str | None = None,
        generation: str = "A",
        gelu: str = "none",
        seed: int = 0,
        n_layer: int = 2,
        n_head: int = 2,
        n_embd: int = 16,
        block_size: int = 8,
        bias: bool = False,
        vocab_size: int = 13,
        dropout: float = 0.0,
    ):
        super().__init__(seed)
        self.args = dict(
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            block_size=block_size,
            bias=bias,
            vocab_size=vocab_size,
            dropout=dropout,
        )
        self.pos_embd, self.generation, self.gelu = pos_embd, generation, gelu
        self.n_layer, self.n_head, self.block_size, self.vocab_size = n_layer, n_head, block_size, vocab_size

        def both(name, *shape):
            self.add(name + ".weight", *shape)
            if bias:
                self.add(name + ".bias", shape[0])

        self.add("transformer.wte.weight", vocab_size, n_embd)
        self.add("transformer.wpe.weight", block_size, n_embd)
        if generation == "C":
            self.add("transformer.relative.relative_embeddings.weight", 2 * block_size - 1, n_embd)
        for i in range(n_layer):
            both(f"transformer.h.{i}.ln_1", n_embd)
            both(f"transformer.h.{i}.attn.c_attn", 3 * n_embd, n_embd)
            both(f"transformer.h.{i}.attn.c_proj", n_embd, n_embd)
            both(f"transformer.h.{i}.ln_2", n_embd)
            both(f"transformer.h.{i}.mlp.c_fc", 4 * n_embd, n_embd)
            both(f"transformer.h.{i}.mlp.c_proj", n_embd, 4 * n_embd)
        both("transformer.ln_f", n_embd)

    def embed(self, idx, weights):
        """What enters the first block: EDS's rope and relative are what ANCESTORS B3 says, not what they are called."""
        tokens, T = weights["transformer.wte.weight"][idx], idx.shape[1]
        if self.pos_embd == "rope":
            C = tokens.shape[-1]
            angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, C, 2) / C)
            one, two = tokens[..., : C // 2], tokens[..., C // 2 :]
            return torch.cat([one * angles.sin() - two * angles.cos(), one * angles.cos() + two * angles.sin()], dim=-1)
        if self.pos_embd == "relative":
            table = weights["transformer.relative.relative_embeddings.weight"]
            distances = torch.arange(T)[None, :] - torch.arange(T)[:, None]  # j - i
            return T * tokens + table[distances + self.block_size - 1].sum(dim=1)
        return tokens + weights["transformer.wpe.weight"][:T]

    def logits(self, idx, weights=None):
        """(B, T, V) for idx (B, T)."""
        weights = weights or self.weights
        x = self.embed(idx, weights)
        for i in range(self.n_layer):
            name = f"transformer.h.{i}."
            x = x + attention(
                layer_norm(x, weights, name + "ln_1"), weights, name + "attn.c_attn", name + "attn.c_proj", self.n_head
            )
            hidden = linear(layer_norm(x, weights, name + "ln_2"), weights, name + "mlp.c_fc")
            x = x + linear(F.gelu(hidden, approximate=self.gelu), weights, name + "mlp.c_proj")
        return F.linear(layer_norm(x, weights, "transformer.ln_f"), weights["transformer.wte.weight"])

    def checkpoint(
        self,
        prefix: str = "",
        masks: bool = False,
        updated: bool = False,
        config: dict | None = CONFIG,
        data_dir: str = "",
    ) -> dict:
        """The dict that goes into ckpt.pt.

        masks: include the mask buffers that nanoGPT has before PyTorch 2. updated: include the zeros that EDS's
        ckpt_update.ipynb adds to files of generations A and B; it does not change their optimizer state.
        data_dir: use EDS's key data_dir instead of dataset.
        """
        state = OrderedDict()
        for name, weight in self.weights.items():
            if name == "transformer.h.0.ln_1.weight" and updated:
                state[prefix + "transformer.relative.relative_embeddings.weight"] = torch.zeros(
                    2 * self.block_size - 1, self.args["n_embd"]
                )
            state[prefix + name] = weight.detach()
            if masks and name.endswith("attn.c_proj." + ("bias" if self.args["bias"] else "weight")):
                block = name.split(".attn.")[0] + ".attn."
                state[f"{prefix}{block}bias"] = torch.ones(self.block_size, self.block_size).tril()[None, None]
                state[f"{prefix}{block}masked_bias"] = torch.tensor(-1e4)
        state[prefix + "lm_head.weight"] = state[prefix + "transformer.wte.weight"]  # tied: one storage
        state._metadata = OrderedDict({"": dict(version=1)})  # what Module.state_dict leaves there
        more = {"pos_embd": self.pos_embd} if self.generation != "A" else {}
        checkpoint = {
            "model": state,
            "optimizer": self.optimizer.state_dict(),
            "model_args": {**self.args, **more},
            "iter_num": self.n_updates,
            "best_val_loss": torch.tensor(3.25),
        }
        if config is not None:
            config = {**config, **{key: value for key, value in self.args.items() if key in config}}
            if data_dir:
                del config["dataset"]
                config["data_dir"] = data_dir
            checkpoint["config"] = config
        return checkpoint


class Plus(Ancestor):
    """nanoGPT+: the GPT, whose file is a bare state dict."""

    def __init__(
        self,
        n_layer: int = 2,
        n_head: int = 2,
        n_embd: int = 16,
        block_size: int = 8,
        vocab_size: int = 13,
        bias: bool = False,
        tied: bool = True,
        seed: int = 0,
    ):
        super().__init__(seed)
        self.n_layer, self.n_head, self.block_size, self.vocab_size = n_layer, n_head, block_size, vocab_size
        self.tied = tied

        def both(name, *shape):
            self.add(name + ".weight", *shape)
            if bias:
                self.add(name + ".bias", shape[0])

        self.add("token_embedding_table.weight", vocab_size, n_embd)
        self.add("positional_embedding_table.weight", block_size, n_embd)
        for i in range(n_layer):
            name = f"transformer_blocks.{i}."
            both(name + "self_attention.causal_self_attention", 3 * n_embd, n_embd)
            both(name + "self_attention.projection", n_embd, n_embd)
            both(name + "feed_forward.c_fc", 4 * n_embd, n_embd)
            both(name + "feed_forward.projection", n_embd, 4 * n_embd)
            both(name + "layer_norm_1", n_embd)
            both(name + "layer_norm_2", n_embd)
        both("layer_norm_final", n_embd)
        if not tied:
            self.add("language_model_head.weight", vocab_size, n_embd)

    def logits(self, idx, weights=None):
        """(B, T, V) for idx (B, T)."""
        weights = weights or self.weights
        x = weights["token_embedding_table.weight"][idx] + weights["positional_embedding_table.weight"][: idx.shape[1]]
        for i in range(self.n_layer):
            name = f"transformer_blocks.{i}."
            x = x + attention(
                layer_norm(x, weights, name + "layer_norm_1"),
                weights,
                name + "self_attention.causal_self_attention",
                name + "self_attention.projection",
                self.n_head,
            )
            hidden = linear(layer_norm(x, weights, name + "layer_norm_2"), weights, name + "feed_forward.c_fc")
            x = x + linear(F.gelu(hidden, approximate="tanh"), weights, name + "feed_forward.projection")
        head = weights["token_embedding_table.weight" if self.tied else "language_model_head.weight"]
        return F.linear(layer_norm(x, weights, "layer_norm_final"), head)

    def checkpoint(self) -> OrderedDict:
        """What gpt_model_SIZE.pth.tar holds."""
        state = OrderedDict()
        for name, weight in self.weights.items():
            if name.endswith("causal_self_attention.weight"):  # a module's own buffers come before its children
                state[name.replace("causal_self_attention.weight", "tril")] = torch.ones(
                    self.block_size, self.block_size
                ).tril()
            state[name] = weight.detach()
        if self.tied:
            state["language_model_head.weight"] = state["token_embedding_table.weight"]
        state._metadata = OrderedDict({"": dict(version=1)})
        return state


class PlusBigram(Ancestor):
    """nanoGPT+: the bigram, a table of logits by the last token."""

    def __init__(self, vocab_size: int = 13, seed: int = 0):
        super().__init__(seed)
        self.vocab_size, self.block_size = vocab_size, 8
        self.add("token_embedding_table.weight", vocab_size, vocab_size)

    def logits(self, idx, weights=None):
        """(B, T, V) for idx (B, T)."""
        return (weights or self.weights)["token_embedding_table.weight"][idx]

    def checkpoint(self) -> OrderedDict:
        """What bigram_model.pth.tar holds."""
        return OrderedDict((name, weight.detach()) for name, weight in self.weights.items())


# ----------------------------------------------------------------------------------------------------------------------
# what lies beside a checkpoint


def write_meta_pkl(path, characters: str):
    """nanoGPT's meta.pkl."""
    meta = dict(
        vocab_size=len(characters),
        itos=dict(enumerate(characters)),
        stoi={character: i for i, character in enumerate(characters)},
    )
    with open(path, "wb") as file:
        pickle.dump(meta, file)


@contextmanager
def modules_of_others(name: str, **contents):
    """Within this, a module of somebody else's program can be imported; afterwards it is gone, as it is for a user."""
    parts = name.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    before = {name: sys.modules.get(name) for name in names}
    for one in names:
        sys.modules[one] = types.ModuleType(one)
    vars(sys.modules[name]).update(contents)
    try:
        yield
    finally:
        for one, module in before.items():
            if module is None:
                del sys.modules[one]
            else:
                sys.modules[one] = module


def pickled_tokenizer(characters: str, protocol: int | None = None, **more) -> bytes:
    """nanoGPT+'s pickled tokenizer: an object of its class src.data.tokenizer.CharTokenizer."""
    kind = type("CharTokenizer", (), {"__module__": "src.data.tokenizer"})
    tokenizer = kind()
    tokenizer.vocab, tokenizer.vocab_size = list(characters), len(characters)
    tokenizer.stoi = {character: i for i, character in enumerate(characters)}
    tokenizer.itos = dict(enumerate(characters))
    vars(tokenizer).update(more)
    with modules_of_others("src.data.tokenizer", CharTokenizer=kind):
        return pickle.dumps(tokenizer, protocol)


def save_whole_notebook_model(path):
    """The word notebook's file: the pickle of an object of a class that its __main__ had."""
    kind = type("BigramModel", (torch.nn.Module,), {"__module__": "__main__"})
    model = kind()
    model.token_embedding_table = torch.nn.Embedding(7, 4)
    model.lm_head = torch.nn.Linear(4, 7)
    with modules_of_others("__main__", BigramModel=kind):
        torch.save(model, path)
