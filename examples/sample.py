"""Let a merged model write some Python. Plain PyTorch: neither Lightning nor this package is needed.

python examples/sample.py runs/gpt/merges/best --prompt "import os"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from gpt import GPT
from safetensors.torch import load_model
from torch import nn


@torch.inference_mode()
def sample(model: GPT, prompt: bytes, num_bytes: int, temperature: float) -> bytes:
    """Return ``num_bytes`` bytes that the model puts after ``prompt``."""
    text = torch.tensor([list(prompt)])
    for _ in range(num_bytes):
        logits = model(text[:, -model.context :])[:, -1]
        text = torch.cat([text, torch.multinomial((logits / temperature).softmax(-1), 1)], dim=1)
    return bytes(text[0, len(prompt) :].tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, nargs="?", default=Path("runs/gpt/merges/best"))
    parser.add_argument("--prompt", default="def ", help="what the text begins with")
    parser.add_argument("--num-bytes", type=int, default=400)
    parser.add_argument("--temperature", type=float, default=0.7, help="below 1: safer, above: wilder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # Names in the file are the LightningModule's, where the model is the attribute `gpt`.
    model = nn.ModuleDict({"gpt": GPT()})
    load_model(model, args.artifact / "model.safetensors")
    torch.manual_seed(args.seed)
    text = sample(model.eval()["gpt"], args.prompt.encode(), args.num_bytes, args.temperature)
    print(args.prompt + text.decode(errors="replace"))


if __name__ == "__main__":
    main()
