"""``ckmerge follow``: search what a live run leaves on the disk, while training goes on."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightning_ckmerge.cli.configs import DataClass, ModelClass, adapted, build_config, quietly, settings_of
from lightning_ckmerge.cli.console import FOUND, console, print_json, progress
from lightning_ckmerge.cli.options import Json

if TYPE_CHECKING:
    from lightning_ckmerge.artifact.due import DueResult
    from lightning_ckmerge.config import MergeSettings

ENDINGS = {
    "ended": "the run has ended",
    "stopped": "the run was stopped by an exception",
    "lost": "the run has given no sign of life for too long",
    "once": "nothing more is due now",
}


def follow(
    merges: Annotated[Path, typer.Argument(metavar="MERGES", help="The callback's dirpath; it need not exist yet.")],
    config: Annotated[Path, typer.Option("--config", help="The LightningCLI config of the run.")],
    share: Annotated[
        bool, typer.Option("--share", help="Share each search's trials with other followers that are started so.")
    ] = False,
    storage: Annotated[
        str | None, typer.Option("--storage", help="Optuna storage URL for them; a journal in MERGES without.")
    ] = None,
    accelerator: Annotated[
        str | None, typer.Option("--accelerator", help="Such as cpu or gpu, in place of the config's.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Search what is due now, and stop.")] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds without a sign of life after which the run counts as dead.")
    ] = 300.0,
    poll: Annotated[float, typer.Option("--poll", help="Seconds between two looks at the run.")] = 0.5,
    model_class: ModelClass = None,
    data_class: DataClass = None,
    as_json: Json = False,
) -> None:
    """Search a live run's merges in a process of its own, while training goes on, and publish them in its place.

    The run needs `search.where: follower` and nothing else; it waits for nobody. One follower finds what the run would
    have found itself. Started before the run or at any time, it ends when the run has. Exit code 1: the run was
    stopped, or is lost.

    \b
    Examples:
      ckmerge follow runs/merges --config run.yaml
      CUDA_VISIBLE_DEVICES=1 ckmerge follow runs/merges --config run.yaml --share
    """
    out = sys.stdout  # the command's own words, while all others go elsewhere

    def tell(text: str) -> None:
        if not as_json:
            typer.echo(text, file=out)

    with quietly():
        from lightning_ckmerge.plugin.follow.follower import FollowOptions, follow_run
        from lightning_ckmerge.plugin.offline.scoring import ALONE

        place = {"accelerator": accelerator} if accelerator is not None else {}
        configured = build_config(config, model_class, data_class, {**ALONE, **place})
        settings = _of(merges, settings_of(configured, config))
        with progress("Searching", None) as advance:
            done = follow_run(
                configured.trainer,
                configured.module,
                {"datamodule": configured.datamodule},
                adapted(settings, storage, None, share),
                merges.absolute(),
                FollowOptions(shares=share, once=once, timeout_s=timeout, poll_s=poll),
                on_scored=lambda scored, total: advance(1, total),
                on_begun=lambda: tell(f"following {merges}"),
                on_result=lambda result: tell(_told(result)),
            )
    if as_json:
        print_json(asdict(done))
    else:
        helped = f", and scored {done.num_helped} candidates for others" if done.num_helped else ""
        num = "1 search" if len(done.results) == 1 else f"{len(done.results)} searches"
        console().print(f"{ENDINGS[done.ending]}: took {num}{helped}")
    if done.ending in ("stopped", "lost"):
        raise typer.Exit(FOUND)


def _of(merges: Path, found: list[MergeSettings]) -> MergeSettings:
    """Return the settings of the callback that writes there; of the only one, whatever its directory."""
    own = [s for s in found if s.dirpath is not None and Path(s.dirpath).absolute() == merges.absolute()]
    followed = [s for s in found if s.search.where == "follower"]
    return next(iter(own or followed or found))


def _told(result: DueResult) -> str:
    if result.artifact is None:
        return f"step {result.step}: no merge: {result.reason}"
    return f"step {result.step}: {result.artifact} after {result.seconds:.3g} s"
