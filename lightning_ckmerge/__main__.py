"""``python -m lightning_ckmerge`` is ``ckmerge``."""

from lightning_ckmerge.cli.main import app

if __name__ == "__main__":
    app(prog_name="ckmerge")
