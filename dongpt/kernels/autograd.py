"""Training operations with hand-written backward passes, which are faster on a CPU than autograd's.

In tests, results are compared with rotate_reference and biased_attention_reference, which use standard operations.
Dropout uses fewer random bits than torch.nn.Dropout.
"""

import math

import torch
import torch.nn as nn
from torch.nn import functional as F


def rotate_reference(x, rotation):
    """Rotate the channel pairs (i, i + hs/2) of x (B, T, nh, hs). rotation is (cos, sin), each (..., T, 1, hs)."""
    cos, sin = rotation
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-x2, x1], dim=-1) * sin).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """Rotate queries and keys. The backward pass moves half as much memory as that of rotate_reference."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        half_size, outputs = q.shape[-1] // 2, []
        for x in (q, k):
            y = x * cos  # float32, whatever the dtype of x
            y[..., :half_size].addcmul_(x[..., half_size:], sin[..., :half_size], value=-1)
            y[..., half_size:].addcmul_(x[..., :half_size], sin[..., half_size:])
            outputs.append(y.to(x.dtype))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        return *_Rotate.apply(*grads, cos, -sin), None, None  # the transpose of a rotation is its inverse


rotate = _Rotate.apply  # rotate(q, k, cos, sin) returns the rotated (q, k)


def biased_attention_reference(q, k, v, bias):
    """Compute attention of q, k, v (B, nh, T, hs) with bias (1, nh, T, T) added to the scores; -inf masks a key."""
    scores = (q @ k.mT) / math.sqrt(q.shape[-1])
    return (scores.float() + bias).softmax(-1).to(v.dtype) @ v


def biased_attention(q, k, v, bias):
    """Compute biased_attention_reference for a causal bias, with PyTorch's flash kernel in the forward pass.

    The flash kernel does not compute a gradient for the bias, and PyTorch's fallback stores all scores (B, nh, T, T).
    This backward pass recomputes the scores in tiles that fit in the CPU cache and skips tiles above the diagonal.
    """
    return _BiasedAttention.apply(q, k, v, bias)


TILE_QUERIES, TILE_SCORES = 64, 2**20  # maximum per tile in the backward pass


class _BiasedAttention(torch.autograd.Function):
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
        n_sequences = max(1, TILE_SCORES // (n_head * min(T, TILE_QUERIES) * T))
        for batch_start in range(0, B, n_sequences):
            b = slice(batch_start, batch_start + n_sequences)
            for i in range(0, T, TILE_QUERIES):
                j = min(i + TILE_QUERIES, T)  # queries i to j - 1 attend to keys 0 to j - 1
                q_tile, k_tile, v_tile, grad_tile = q[b, :, i:j] * scale, k[b, :, :j], v[b, :, :j], grad[b, :, i:j]
                p = ((q_tile @ k_tile.mT).float() + bias[:, :, i:j, :j]).softmax(-1)
                dp = (grad_tile @ v_tile.mT).float()
                ds = p * (dp - (p * dp).sum(-1, keepdim=True))  # gradient of softmax
                dbias[:, :, i:j, :j] += ds.sum(0)  # all sequences share the bias
                ds = ds.to(q.dtype)
                dq[b, :, i:j] = (ds @ k_tile) * scale
                dk[b, :, :j] += ds.mT @ q_tile
                dv[b, :, :j] += p.to(q.dtype).mT @ grad_tile
        return dq, dk, dv, dbias


class Dropout(nn.Dropout):
    """nn.Dropout that uses 16 random bits per element on a CPU, so that p is rounded to a multiple of 1/65536.

    torch's dropout draws 64 random bits per element on one core. In a wide model, drawing them takes a tenth of the
    step time in float32, and half of it on a CPU with bfloat16 matrix instructions.
    """

    def forward(self, x):
        if not self.training or not self.p or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        random_bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        n_dropped = min(round(self.p * 65536), 65535)  # number of the 65536 possible values that drop an element
        keep_mask = random_bits[: x.numel()].view(x.shape) >= n_dropped - 32768
        return x * keep_mask.to(x.dtype).mul_(65536 / (65536 - n_dropped))
