"""Pretrain a small GPT with the callback, and compare what merging gains, also on files that no search saw.

    python examples/demo.py [--decay-branch] [--trainer.max_steps=800 and the like]

Everything is written under ``runs/gpt``, which a new run replaces.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningCLI
from pretraining import GPTModule
from safetensors.torch import load_file
from torch import Tensor

from lightning_ckmerge import Artifact

CONFIG = Path(__file__).with_name("pretrain_gpt.yaml")
RUN = Path("runs/gpt")
MERGES, PAIRS = RUN / "merges", RUN / "merges-pair"
DECAYED = "learning rate decayed"

Weights = Mapping[str, Tensor]
Candidate = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decay-branch", action="store_true", help="also train the last fifth with a decaying rate")
    args, overrides = parser.parse_known_args()
    # LightningCLI warns of a command line that it is not given.
    del sys.argv[1:]
    shutil.rmtree(RUN, ignore_errors=True)
    # Lightning's remarks on torch's newer names and on the branch's checkpoint; this package's own are shown.
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")

    cli = fit(overrides)
    latest = {name: p.detach().clone() for name, p in cli.model.named_parameters()}
    ours, pair = LastSearch.under(MERGES, latest), LastSearch.under(PAIRS, latest)
    losses = {name: measure(cli, weights) for name, weights in contenders(ours, pair).items()}
    if args.decay_branch:
        decay = ["--model.init_args.decay_fraction=0.2", "--trainer.callbacks=null", "--trainer.logger=false"]
        # With the run's own seed it would go through the windows of the run's first steps again.
        branch = fit([*overrides, *decay, "--seed_everything=2"], next((RUN / "checkpoints").glob("*.ckpt")))
        losses[DECAYED] = measure(branch, dict(branch.model.named_parameters()))

    print(f"\nLoss in nats a byte, after {cli.trainer.global_step} steps:\n")
    print(table(losses))
    print(f"\n{ours.manifest['verdict']['sentence']}")
    print(f"\nartifact  {ours.artifact.path.relative_to(Path.cwd())}")
    print(f"report    {ours.artifact.path.relative_to(Path.cwd()) / 'report.html'}")
    shares = [search.manifest["cost"]["share_of_training"] for search in (ours, pair)]
    print("searches  {:.1%} of the training time for ours, {:.1%} for the pair".format(*shares))


def fit(overrides: Sequence[str], ckpt_path: Path | None = None) -> LightningCLI:
    """Train as the YAML and ``overrides`` say; return the Trainer, module and data."""
    cli = LightningCLI(args=["--config", str(CONFIG), *overrides], run=False, save_config_callback=None)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=ckpt_path)
    return cli


@dataclass(frozen=True)
class LastSearch:
    """The search at the end of the run, and what its candidates are made of."""

    artifact: Artifact
    latest: Weights

    @classmethod
    def under(cls, dirpath: Path, latest: Weights) -> LastSearch:
        """Return the last search that a callback with this ``dirpath`` published."""
        artifacts = sorted(dirpath.glob("step=*"))
        if not artifacts:
            raise SystemExit(f"error: no search has published anything in {dirpath}; the warnings above say why.")
        return cls(Artifact.open(artifacts[-1]), latest)

    @property
    def manifest(self) -> Mapping[str, Any]:
        """How the search went."""
        return self.artifact.manifest

    @property
    def winner(self) -> Candidate:
        """What the search settled on."""
        return next(c for c in self.candidates if c["name"] == self.manifest["verdict"]["winner"])

    @property
    def candidates(self) -> list[Candidate]:
        """All that were scored."""
        return [*self.manifest["anchors"], *self.manifest["trials"]]

    def named(self, prefix: str) -> list[Candidate]:
        """Return the anchors of one kind."""
        return [c for c in self.candidates if c["name"].startswith(prefix)]

    def merge(self, candidate: Candidate) -> Weights:
        """Return a candidate's weights, rebuilt from the snapshots that the buffer keeps."""
        files = {sha256(path): path for path in (self.artifact.path.parent / "buffer").glob("*.safetensors")}
        merged = {name: torch.zeros_like(tensor) for name, tensor in self.latest.items()}
        # The winner's coefficients may differ between groups of tensors.
        groups = self.manifest.get("groups", {}).values() if candidate is self.winner else ()
        own = {name: group["coefficients"] for group in groups for name in group["tensors"]}
        for k, snapshot in enumerate(self.manifest["snapshots"]):
            weights = load_file(files[snapshot["sha256"]]) if snapshot["sha256"] else self.latest
            for name, total in merged.items():
                total.add_(weights[name], alpha=own.get(name, candidate["coefficients"])[k])
        return merged


def contenders(ours: LastSearch, pair: LastSearch) -> dict[str, Weights]:
    """Return the weights to compare, each the best of its kind on the search half."""
    # Means over segments and over points are both within a user's reach: the better one is the one to beat.
    source, uniform = min(
        ((search, c) for search in (ours, pair) for c in search.named("uniform")), key=lambda sc: search_loss(sc[1])
    )
    in_pair = [c for c in pair.candidates if c["coordinates"] and "lam" in c["coordinates"]]
    return {
        "latest weights": ours.latest,
        f"best uniform mean ({uniform['name']})": source.merge(uniform),
        "best EMA shape": ours.merge(min(ours.named("ema"), key=search_loss)),
        "the paper's pair": pair.merge(min(in_pair, key=search_loss)),
        "ours": ours.merge(ours.winner),
    }


def search_loss(candidate: Candidate) -> float:
    """Return a candidate's loss on the search half, an estimate where it was dropped early."""
    return float(candidate["search"]["value"])


@torch.no_grad()
def measure(cli: LightningCLI, weights: Weights) -> tuple[float, float]:
    """Return the loss of ``weights`` on the confirmation half and on the test files."""
    module: GPTModule = cli.model.eval()
    module.load_state_dict(weights, strict=False)

    def mean_loss(batches: Iterable[Tensor]) -> float:
        losses = [float(module.loss(batch)) for batch in batches]
        return sum(losses) / len(losses)

    # Every second batch was kept from the search, for the verdict.
    return mean_loss(list(cli.datamodule.val_dataloader())[1::2]), mean_loss(cli.datamodule.test_dataloader())


def table(losses: Mapping[str, tuple[float, float]]) -> str:
    """Return the comparison as aligned text, with the share of the decay branch's gain where that was trained."""
    width = max(map(len, losses))
    decayed = losses.get(DECAYED)
    (latest_confirm, latest_test), *_ = losses.values()
    lines = [
        f"{'':{width}}   confirmation half   unseen test files" + "   share of the decay's" * bool(decayed),
        f"{'':{width}}      loss      gain      loss      gain" + "    gain, test files" * bool(decayed),
    ]
    for name, (confirm, test) in losses.items():
        gain = latest_test - test
        line = f"{name:{width}}   {confirm:7.4f}   {latest_confirm - confirm:7.4f}   {test:7.4f}   {gain:7.4f}"
        if decayed:
            line += f"   {gain / (latest_test - decayed[1]):17.0%}"
        lines.append(line)
    return "\n".join(lines)


def sha256(path: Path) -> str:
    """Return a file's hash in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
