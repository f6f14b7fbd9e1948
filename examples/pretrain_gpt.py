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
    except CkmergeError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
