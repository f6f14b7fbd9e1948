"""What the examples share: training from a YAML file, the weights to compare, and the table that they end with.

Letters: B batches.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningModule
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import load_file
from torch import Tensor

from lightning_ckmerge import Artifact
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.search.interval import score_gain

LATEST, UNIFORM, EMA, PAIR, OURS = "latest weights", "best uniform mean", "best EMA shape", "the paper's pair", "ours"

Weights = Mapping[str, Tensor]
Candidate = Mapping[str, Any]
ScoreBatch = Callable[[Any, Any], Tensor]
Extras = Mapping[str, Callable[[Any], float]]


def command_line() -> list[str]:
    """Return the arguments, and take them off: LightningCLI warns of a command line that it is not given."""
    arguments = sys.argv[1:]
    del sys.argv[1:]
    return arguments


def start(run: Path) -> None:
    """Remove what an earlier run left in ``run``, and silence Lightning's remarks; this package's own are shown."""
    shutil.rmtree(run, ignore_errors=True)
    # On torch's newer names, on loaders without workers and on the like.
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")


def fit(config: Path, overrides: Sequence[str], ckpt_path: Path | None = None) -> LightningCLI:
    """Train as the YAML and ``overrides`` say; return the Trainer, module and data."""
    cli = build(config, overrides)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=ckpt_path)
    return cli


def build(config: Path, overrides: Sequence[str]) -> LightningCLI:
    """Build Trainer, module and data as the YAML and ``overrides`` say."""
    return LightningCLI(args=["--config", str(config), *overrides], run=False, save_config_callback=None)


def fit_followed(config: Path, overrides: Sequence[str], run: Path) -> LightningCLI:
    """Train likewise, and let a follower for each merge callback search beside it; return when all are done."""
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    merges = [c["init_args"] for c in content["trainer"]["callbacks"] if "CheckpointMerge" in c["class_path"]]
    for arguments in merges:
        arguments["search"]["where"] = "follower"
    run.mkdir(parents=True)
    asked, whole = run / "asked.yaml", run / "run.yaml"
    asked.write_text(yaml.safe_dump(content), encoding="utf-8")
    cli = build(asked, overrides)
    # With the overrides, which a follower has to know too.
    cli.parser.save(cli.config, whole, skip_none=False)
    command = [sys.executable, "-c", "from lightning_ckmerge.cli.main import app; app()", "follow"]
    places = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": places}
    followers = [
        subprocess.Popen([*command, arguments["dirpath"], "--config", str(whole)], env=environment)
        for arguments in merges
    ]
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        codes = [follower.wait() for follower in followers]
        if any(codes):
            raise SystemExit("error: a follower has failed; its message stands above.")
    finally:
        for follower in followers:
            follower.kill()
    return cli


@dataclass(frozen=True)
class LastSearch:
    """The search at the end of the run, and what its candidates are made of."""

    artifact: Artifact
    latest: Weights

    @classmethod
    def under(cls, dirpath: Path, module: LightningModule) -> LastSearch:
        """Return the last search that a callback with this ``dirpath`` published, of the run that left ``module``."""
        artifacts = sorted(dirpath.glob("step=*"))
        if not artifacts:
            raise SystemExit(f"error: no search has published anything in {dirpath}; the warnings above say why.")
        latest = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        return cls(Artifact.open(artifacts[-1]), latest)

    @property
    def manifest(self) -> Mapping[str, Any]:
        """How the search went."""
        return self.artifact.manifest

    @property
    def winner(self) -> Candidate:
        """The candidate that the search settled on."""
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
        # The winner's coefficients may differ between groups of tensors.
        groups = self.manifest.get("groups", {}).values() if candidate is self.winner else ()
        own = {name: group["coefficients"] for group in groups for name in group["tensors"]}
        stored = [load_file(files[s["sha256"]]) if s["sha256"] else self.latest for s in self.manifest["snapshots"]]
        # Names under which the buffer keeps a tensor: a tied one has one, and counters are not merged.
        names = [n for n in self.latest if all(n in s for s in stored) and self.latest[n].is_floating_point()]
        merged = {name: torch.zeros_like(self.latest[name]) for name in names}
        for k, weights in enumerate(stored):
            for name, total in merged.items():
                total.add_(weights[name], alpha=own.get(name, candidate["coefficients"])[k])
        return merged


def contenders(ours: LastSearch, pair: LastSearch) -> dict[str, Weights]:
    """Return the weights to compare, each the best of its kind on the search half."""
    # Means over segments and over points are both within a user's reach: the better one is the one to beat.
    source, uniform = min(
        ((search, c) for search in (ours, pair) for c in search.named("uniform")), key=lambda sc: search_value(sc[1])
    )
    in_pair = [c for c in pair.candidates if c["coordinates"] and "lam" in c["coordinates"]]
    return {
        LATEST: ours.latest,
        f"{UNIFORM} ({uniform['name']})": source.merge(uniform),
        EMA: ours.merge(min(ours.named("ema"), key=search_value)),
        PAIR: pair.merge(min(in_pair, key=search_value)),
        OURS: ours.merge(ours.winner),
    }


def search_value(candidate: Candidate) -> float:
    """Return a candidate's value on the search half, an estimate where it was dropped early."""
    return float(candidate["search"]["value"])


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One contender's values; lower is better.

    Args:
        confirm_B: On each batch of the confirmation half.
        test_B: On each test batch.
        extras: Other figures on the test data, by name.
    """

    confirm_B: list[float]
    test_B: list[float]
    extras: dict[str, float] = field(default_factory=dict)

    @property
    def confirm(self) -> float:
        """The mean over the confirmation half."""
        return sum(self.confirm_B) / len(self.confirm_B)

    @property
    def test(self) -> float:
        """The mean over the test data."""
        return sum(self.test_B) / len(self.test_B)


def loss(module: Any, batch: Any) -> Tensor:
    """Return the module's loss on a batch."""
    value: Tensor = module.loss(batch)
    return value


@torch.no_grad()
def measure(
    cli: LightningCLI,
    weights: Weights,
    *,
    score: ScoreBatch = loss,
    prepare: Callable[[Any], None] | None = None,
    extras: Extras | None = None,
) -> Measured:
    """Return the values of ``weights`` on the confirmation half and on the test data.

    Args:
        cli: The run. Its module is left with ``weights``.
        weights: By their names in the module. Other tensors of the module stay.
        score: Returns the monitored metric of a batch.
        prepare: Called with the module once the weights are in it.
        extras: Name -> a function that returns another figure of the module.
    """
    module = cli.model.eval()
    module.load_state_dict(weights, strict=False)
    if prepare is not None:
        prepare(module)
    # Every second batch was kept from the search, for the verdict.
    halves = list(cli.datamodule.val_dataloader())[1::2], cli.datamodule.test_dataloader()
    confirm_B, test_B = ([float(score(module, batch)) for batch in batches] for batches in halves)
    figures = {name: figure(module) for name, figure in (extras or {}).items()}
    return Measured(confirm_B=confirm_B, test_B=test_B, extras=figures)


def gain(ours_B: Sequence[float], latest_B: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Return the gain over the latest weights and its 95 % interval, as a verdict has it (docs/verdict.md)."""

    def as_score(values_B: Sequence[float]) -> Score:
        return Score(value=sum(values_B) / len(values_B), values_B=tuple(values_B), sizes_B=(1.0,) * len(values_B))

    return score_gain(as_score(ours_B), as_score(latest_B), 1)


def table(measured: Mapping[str, Measured], more: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """Return the comparison as aligned text.

    Args:
        measured: The contenders, the latest weights and ours among them.
        more: Further columns: heading -> contender -> text.
    """
    latest, ours = measured[LATEST], find_ours(measured)
    lines = [["", "unseen batches", "gain", "test data", "gain", "95 % interval", "ours over it", "95 % interval"]]
    lines[0] += [*latest.extras, *(more or {})]
    for name, own in measured.items():
        confirm_gain = "" if own is latest else f"{latest.confirm - own.confirm:.4f}"
        gains = [
            *(("", "") if own is latest else in_words(gain(own.test_B, latest.test_B))),
            *(("", "") if own is ours else in_words(gain(ours.test_B, own.test_B))),
        ]
        further = [
            *(f"{figure:.4g}" for figure in own.extras.values()),
            *(t.get(name, "") for t in (more or {}).values()),
        ]
        lines.append([name, f"{own.confirm:.4f}", confirm_gain, f"{own.test:.4f}", *gains, *further])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = (
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    )
    return "\n".join("   ".join(line).rstrip() for line in aligned)


def find_ours(measured: Mapping[str, Measured]) -> Measured:
    """Return ours among the contenders; of several forms, the last."""
    return [own for name, own in measured.items() if name.startswith(OURS)][-1]


def in_words(found: tuple[float, tuple[float, float] | None]) -> tuple[str, str]:
    """Return a gain and its interval as text."""
    value, interval = found
    return f"{value:.4f}", "" if interval is None else "{:.4f} to {:.4f}".format(*interval)


def conclude(title: str, measured: Mapping[str, Measured], ours: LastSearch, pair: LastSearch, run: Path) -> None:
    """Print the table, the verdict, the places of files and the searches' cost, and write ``run/comparison.json``."""
    print(f"\n{title}, after {ours.manifest['step']} steps; lower is better:\n")
    print(table(measured))
    say_where(ours, pair)
    write_record(run / "comparison.json", measured, ours)


def say_where(ours: LastSearch, pair: LastSearch) -> None:
    """Print the verdict, where the artifact and its report lie, and the searches' cost."""
    place = ours.artifact.path.relative_to(Path.cwd())
    print(f"\n{ours.manifest['verdict']['sentence']}")
    print(f"\nartifact  {place}")
    print(f"report    {place / 'report.html'}")
    costs = [search.manifest["cost"] for search in (ours, pair)]
    shares = [cost["share_of_training"] for cost in costs]
    if None in shares:  # by followers
        seconds = [sum(cost["seconds"].values()) for cost in costs]
        print(
            "searches  the last took {:.1f} s for ours, {:.1f} s for the pair, none of them of training".format(
                *seconds
            )
        )
    else:
        print("searches  {:.1%} of the training time for ours, {:.1%} for the pair".format(*shares))


def write_record(path: Path, measured: Mapping[str, Measured], search: LastSearch, **more: Any) -> None:
    """Write a comparison as JSON: the contenders' means, their gains with intervals, and their other figures."""
    latest, ours = measured[LATEST], find_ours(measured)

    def compared(better_B: Sequence[float], worse_B: Sequence[float]) -> dict[str, Any]:
        value, interval = gain(better_B, worse_B)
        return {"gain": value, "interval": interval}

    def record(own: Measured) -> dict[str, Any]:
        return {
            "confirm": {"value": own.confirm, **compared(own.confirm_B, latest.confirm_B)},
            "test": {"value": own.test, **compared(own.test_B, latest.test_B)},
            "ours_over_it": compared(ours.test_B, own.test_B),
            "extras": own.extras,
        }

    content = {
        "monitor": search.manifest["monitor"],
        "step": search.manifest["step"],
        "status": search.manifest["verdict"]["status"],
        "share_of_training": search.manifest["cost"]["share_of_training"],
        "contenders": {name: record(own) for name, own in measured.items()},
        **more,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Return a file's hash in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
