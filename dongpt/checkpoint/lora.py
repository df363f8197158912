"""LoRA adapters: small low-rank terms that are trained while the weights of a loaded model, the base, stay frozen.

    add_adapter(model, target_ranks(model, "attn", 8), {"alpha": 16.0, ...})   # only the adapter is trained
    merge_adapter(model)                                                       # adds the terms to the weights

Hu et al. 2021, arxiv.org/abs/2106.09685, section 4.1. Only Linear layers of the blocks are adapted: wte and lm_head are
usually one matrix, so that a term merged into one of them would change the other. Embeddings of new tokens are part of
the adapter. model.adapter holds alpha, path and hash of the base, and if needed first_new_id and the adapted blocks.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import UserError
from model import GPT

ATTENTION_LAYERS = ("attn.c_attn", "attn.c_proj")
TARGET_LAYERS = {"attn": ATTENTION_LAYERS, "all": (*ATTENTION_LAYERS, "mlp.c_fc", "mlp.c_proj")}


@dataclass(frozen=True)
class LoraConfig:
    """LoRA settings: train a small adapter, and keep the weights that init_from loads."""

    lora_rank: Annotated[int, ">=", 0] = 0  # train only low-rank terms of this rank, such as 8; 0: train all weights
    lora_alpha: Annotated[float | None, ">", 0] = None  # the terms are scaled by lora_alpha / lora_rank; None: by 2
    lora_dropout: Annotated[float, ">=", 0, "<", 1] = 0.0  # dropout on the inputs of the low-rank terms
    lora_targets: Literal["attn", "all"] = "attn"  # layers to adapt: those of attention, or those of the MLP as well
    base: str = ""  # path of the model that the adapter in init_from or out_dir was trained on, if it has moved

    def check_lora(self, init_from: str, optimizer: str, freeze_wte: int):
        """Raise UserError if these settings do not fit together or do not fit the other ones."""
        names = ("lora_alpha", "lora_dropout", "lora_targets")
        given = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) != getattr(LoraConfig, name)]
        if given and not self.lora_rank:
            raise UserError(f"{', '.join(given)} has no effect without LoRA: set lora_rank, or remove it")
        setting = f"lora_rank={self.lora_rank}" if self.lora_rank else f"base={self.base}" * (self.base != "")
        if setting and init_from == "scratch":
            raise UserError(f"{setting} needs the weights of a model: set init_from, or remove it")
        if self.lora_rank and (optimizer != "adamw" or freeze_wte):
            other = f"freeze_wte={freeze_wte}, since all loaded weights are frozen" if freeze_wte else optimizer
            raise UserError(f"{setting} works with optimizer=adamw, not with {other}: change one of them")


class LoRALinear(nn.Linear):
    """Linear layer x W' with a frozen weight W (out, in) plus scale * x A' B' with trained A (r, in) and B (out, r)."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scale: float
    lora_dropout: float

    def forward(self, x):
        x_dropped = F.dropout(x, self.lora_dropout, self.training)
        return super().forward(x) + F.linear(F.linear(x_dropped, self.lora_A), self.scale * self.lora_B)


class NewTokenEmbedding(nn.Embedding):
    """Frozen token embedding with trained rows (n, C) for the ids from first_new_id to first_new_id + n - 1."""

    new_rows: torch.Tensor
    first_new_id: int

    def forward(self, idx):
        new_x = F.embedding((idx - self.first_new_id).clamp(0, len(self.new_rows) - 1), self.new_rows)
        return torch.where((idx >= self.first_new_id)[..., None], new_x, super().forward(idx))


class NewTokenHead(nn.Linear):
    """Frozen output head with trained rows (n, C) for the ids from first_new_id to first_new_id + n - 1."""

    new_rows: torch.Tensor
    first_new_id: int

    def forward(self, x):
        logits, first, end = super().forward(x), self.first_new_id, self.first_new_id + len(self.new_rows)
        return torch.cat([logits[..., :first], F.linear(x, self.new_rows), logits[..., end:]], dim=-1)


def linear_layers(model: GPT) -> dict[str, nn.Linear]:
    """Return the Linear layers of the blocks, {"transformer.h.0.attn.c_attn": ...}, the only ones to be adapted."""
    layers = model.transformer.h.named_modules(prefix="transformer.h")
    return {name: layer for name, layer in layers if isinstance(layer, nn.Linear)}


def target_ranks(model: GPT, targets: str, rank: int) -> dict[str, int]:
    """Return {layer name: rank} for the layers that lora_targets selects. Raises UserError for a bigram model."""
    if model.config.model_type == "bigram":
        raise UserError(f"lora_rank={rank}: a bigram model has no layers to adapt; remove lora_rank")
    return {name: rank for name in linear_layers(model) if name.endswith(TARGET_LAYERS[targets])}


def add_adapter(model: GPT, ranks: dict[str, int], info: dict, n_new_ids: int = 0):
    """Freeze model and add an adapter, whose term is 0 at first, to the layers in ranks, and rows for new tokens."""
    model.requires_grad_(False)
    layer: Any  # its class is changed, as torch.nn.utils.parametrize does, so that the frozen weights keep their names
    for name, layer in linear_layers(model).items():
        if rank := ranks.get(name):
            layer.__class__, layer.scale, layer.lora_dropout = LoRALinear, info["alpha"] / rank, 0.0
            layer.lora_A = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
            layer.lora_B = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
            nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))  # as in Microsoft's loralib and in PEFT
    embeddings = [(model.transformer.wte, NewTokenEmbedding), (model.lm_head, NewTokenHead)] if n_new_ids else []
    for layer, layer_class in embeddings:
        layer.__class__, layer.first_new_id = layer_class, info["first_new_id"]
        layer.new_rows = nn.Parameter(layer.weight[layer.first_new_id :][:n_new_ids].detach().clone())
    if n_new_ids and model.config.tie_weights:
        model.lm_head.new_rows = model.transformer.wte.new_rows
    model.adapter, model.use_packed_weights = info, False  # packed weights would lack the adapter


@torch.no_grad()
def merge_adapter(model: GPT):
    """Merge a model's adapter, if it has one, into its weights, which leaves a plain model."""
    layer: Any
    for layer in model.modules():
        layer_class = layer.__class__
        if layer_class is LoRALinear:
            layer.weight += layer.scale * layer.lora_B @ layer.lora_A
            layer.__class__ = nn.Linear
            del layer.lora_A, layer.lora_B
        elif layer_class in (NewTokenEmbedding, NewTokenHead):
            layer.weight[layer.first_new_id :][: len(layer.new_rows)] = layer.new_rows
            layer.__class__ = nn.Embedding if layer_class is NewTokenEmbedding else nn.Linear
            del layer.new_rows
    model.adapter, model.use_packed_weights = None, GPT.use_packed_weights


def trained_weights(model: GPT) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint: those of the adapter, or all weights of a model without one."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return parameters if model.adapter else model.state_dict()


def weights_sha256(weights: dict[str, torch.Tensor], is_tied: bool = False, prefix: str = "") -> str:
    """Return the SHA-256 of weights in float32, which does not depend on the format of the file they came from."""
    digest = hashlib.sha256(prefix.encode())
    for name, weight in sorted(weights.items()):
        if not (is_tied and name == "lm_head.weight"):
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.float().contiguous().numpy().data)
    return digest.hexdigest()
