"""``ckmerge``: look at a run's artifacts, check them, and use them."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from lightning_ckmerge import __version__
from lightning_ckmerge.cli import export, follow, insight, merge, offline, review, verify
from lightning_ckmerge.cli.console import fail, interruptible
from lightning_ckmerge.errors import CkmergeError

AS_JSON = "lightning_ckmerge.as_json"


class Commands(TyperGroup):
    """Reports an error in one line; only our own mistakes show a traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Remember whether programs are listening, also where the arguments turn out to be wrong."""
        ctx.meta[AS_JSON] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        as_json = ctx.meta[AS_JSON]
        try:
            with interruptible():
                return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `ckmerge show ... | head`: typer ends quietly
        except (CkmergeError, OSError) as error:
            raise fail(str(error), type(error).__name__, as_json=as_json) from error
        except Exception as error:
            # Wrong usage, which typer itself explains on standard error.
            if not as_json or not hasattr(error, "format_message"):
                raise
            raise fail(error.format_message(), type(error).__name__, as_json=True) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def main(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Look at the merges that a run left behind, check them, and use them.

    Every command takes --json; errors are JSON then, too. Exit codes: 0 all is well, 1 the command found that something
    is not (a damaged artifact, a rejected search), 2 it could not do its work.
    """
    if version:
        typer.echo(__version__)
        raise typer.Exit


app.command("list")(review.list_searches)
app.command("show")(review.show)
app.command("report")(review.report)
app.command("verify")(verify.verify)
app.command("merge")(merge.merge)
app.command("search")(offline.search)
app.command("follow")(follow.follow)
app.command("study")(insight.study)
app.command("ensemble")(insight.ensemble)
app.command("explain")(insight.explain)
app.command("export")(export.export)
app.command("plan")(offline.plan)
