"""When to search. Pure: steps, epochs and seconds in, yes or no out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from lightning_ckmerge.checks import require_at_least
from lightning_ckmerge.errors import ConfigError

# With no trigger given: after each quarter of the run; the last one is the search at its end.
NUM_SEARCHES = 4


@dataclass(kw_only=True)
class Schedule:
    """Decides whether a search is due.

    Args:
        every_n_train_steps: Optimizer steps between searches.
        every_n_epochs: Epochs between searches.
        train_time_interval: Training time between searches.
        total_steps: Length of the run, where it is known.
        step: The last step that was looked at.
        searched_at_s: Training seconds at the last search by time.
        searched_step: The step of the last search of any kind.
    """

    every_n_train_steps: int | None = None
    every_n_epochs: int | None = None
    train_time_interval: timedelta | None = None
    total_steps: int | None = None
    step: int = 0
    searched_at_s: float = 0.0
    searched_step: int = 0

    def __post_init__(self) -> None:
        triggers = ("every_n_train_steps", "every_n_epochs", "train_time_interval")
        given = [name for name in triggers if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"only one of {', '.join(triggers)} may be set, got {' and '.join(given)}. Keep one.")
        for name in ("every_n_train_steps", "every_n_epochs"):
            require_at_least(name, getattr(self, name), 1, "Leave it out for the default schedule.")
        if self.train_time_interval is not None and self.train_time_interval <= timedelta(0):
            raise ConfigError(f"`train_time_interval > 0` must hold, got {self.train_time_interval}.")

    def due_at_step(self, step: int, training_s: float) -> bool:
        """Whether to search after ``step``, which may have jumped: some optimizer loops count by twos."""
        before, self.step = self.step, step
        if self.every_n_train_steps is not None:
            return step // self.every_n_train_steps > before // self.every_n_train_steps
        if self.train_time_interval is not None:
            due = training_s - self.searched_at_s >= self.train_time_interval.total_seconds()
            self.searched_at_s = training_s if due else self.searched_at_s
            return due
        if self.every_n_epochs is None and self.total_steps:
            quarter = NUM_SEARCHES * step // self.total_steps
            return NUM_SEARCHES * before // self.total_steps < quarter < NUM_SEARCHES
        return False

    def due_at_epoch_end(self, epoch: int) -> bool:
        """Whether to search after an epoch, counted from 0."""
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"step": self.step, "searched_at_s": self.searched_at_s, "searched_step": self.searched_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.step, self.searched_at_s = int(state["step"]), float(state["searched_at_s"])
        self.searched_step = int(state["searched_step"])
