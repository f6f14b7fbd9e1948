"""A byte-level GPT of about a million parameters, in plain PyTorch.

Letters: B windows in a batch, T bytes in a window, W the model's width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

NUM_BYTES = 256


class GPT(nn.Module):
    """A pre-norm transformer over bytes, with the output layer tied to the embedding.

    Args:
        num_layers: Blocks of attention and MLP.
        num_heads: Attention heads; divides ``width``.
        width: Features a byte.
        context: Longest window in bytes.
    """

    def __init__(self, num_layers: int = 4, num_heads: int = 4, width: int = 144, context: int = 128) -> None:
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(NUM_BYTES, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, NUM_BYTES, bias=False)
        self.head.weight = self.embed.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What adds to the residual stream starts smaller, or its variance grows with depth.
                scale = (2 * num_layers) ** -0.5 if name.endswith(("project.weight", "shrink.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, bytes_BT: Tensor) -> Tensor:
        """Return the logits of each next byte, ``(B, T, 256)``."""
        x_BTW = self.embed(bytes_BT) + self.position.weight[: bytes_BT.shape[1]]
        for block in self.blocks:
            x_BTW = block(x_BTW)
        return self.head(self.norm(x_BTW))


class Block(nn.Module):
    """Attention, then an MLP, each on a normalised copy of the residual stream."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width, bias=False)
        self.shrink = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTW: Tensor) -> Tensor:
        heads = self.query_key_value(self.attention_norm(x_BTW)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_BTW = x_BTW + self.project(mixed.transpose(1, 2).flatten(2))
        return x_BTW + self.shrink(F.gelu(self.widen(self.mlp_norm(x_BTW)), approximate="tanh"))
