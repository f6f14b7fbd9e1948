"""Pretrain the GPT of ``gpt.py`` as a YAML file says.

python examples/pretrain_gpt.py fit --config examples/pretrain_gpt.yaml
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningCLI

from lightning_ckmerge.errors import CkmergeError


def main(args: Sequence[str] | None = None) -> None:
    try:
        LightningCLI(args=list(args) if args is not None else None)
    except Exception as error:
        if fault := find_fault(error):
            raise SystemExit(f"error: {fault}") from error
        raise


def find_fault(error: BaseException | None) -> CkmergeError | None:
    """Return the error of ours behind ``error``: jsonargparse buries it in all the types that a callback could have."""
    while error is not None and not isinstance(error, CkmergeError):
        error = error.__cause__ or error.__context__
    return error


if __name__ == "__main__":
    main()
