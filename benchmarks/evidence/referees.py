"""Averages that others wrote, run as they are, and published recipes, on the trajectory of a run of the protocol.

The trajectory is taken again, bit for bit, by a Lightning Trainer that carries the averages; what they end with is kept
beside the run's trail. Where a referee leaves a choice, the best of all on the search half is taken.
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ema_pytorch import PostHocEMA
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import CmaEsSampler
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.evidence.regimes import WARMUP_STEPS
from benchmarks.evidence.train import Trained, Training
from benchmarks.quality.case import Case, Found, search
from lightning_ckmerge.core.spaces import Affine
from lightning_ckmerge.search.stopping import NEVER

EMA_DECAYS = (0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
SWA_STARTS = (0.8, 0.9)
EQUAL_MEAN_SHARES = (0.05, 0.1, 0.2, 0.5)
POST_HOC_LENGTHS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2)
SCHEDULE_FREE_RATES = (1.0, 2.0, 4.0)
WINDOW_STEPS, WINDOW_EVERY, HORIZONS = 500, 5, (1, 2, 3, 4, 5)
QUEUE_LENGTH, QUEUE_EVERY = 10, (0.002, 0.004, 0.008, 0.016, 0.032)
# As many epochs as a run has segments, for averages that count in epochs.
NUM_EPOCHS = 100

Averages = dict[str, Tensor]


class Replayed(LightningModule):
    """A run's training, step by step as it was.

    Args:
        training: The run at its beginning; constant-rate AdamW.
    """

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.net = training.model
        self.training_run = training

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.training_run.task.loss(self.net, batch)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Drawn(self.training_run), batch_size=None)

    def configure_optimizers(self) -> Any:
        (optimizer,) = self.training_run.how.optimizers(self.net, self.training_run.task.rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Drawn(IterableDataset[Any]):
    """The run's batches, one after the other."""

    def __init__(self, training: Training) -> None:
        self.run = training

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.run.task.draw(self.run.generator)


def vector(model: nn.Module) -> Tensor:
    """Return a copy of a model's weights, ``(P,)``."""
    with torch.no_grad():
        return parameters_to_vector(model.parameters()).clone()


class LightningEMA(EMAWeightAveraging):
    """Lightning's, with a key of its own, so that a Trainer takes several."""

    def __init__(self, decay: float) -> None:
        super().__init__(decay=decay)
        self.decay = decay

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}-{self.decay}"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The average is read off the callback: several cannot all become the module's weights.
        pass


class Riders(Callback):
    """All averages that only read the weights after each step.

    Args:
        model: Before its first step.
        num_steps: The run's.
        folder: For checkpoints.
    """

    def __init__(self, model: nn.Module, num_steps: int, folder: str) -> None:
        self.num_steps, self.step = num_steps, 0
        self.equal = {share: AveragedModel(model) for share in EQUAL_MEAN_SHARES}
        self.post_hoc = PostHocEMA(
            model,
            sigma_rels=(0.05, 0.28),
            update_every=1,
            checkpoint_every_num_steps=max(1, num_steps // 50),
            checkpoint_folder=folder,
            checkpoint_dtype=torch.float32,
        )
        self.queues = {e: deque[Tensor](maxlen=QUEUE_LENGTH) for e in QUEUE_EVERY}
        self.window_steps = min(WINDOW_STEPS, num_steps // 10)
        self.sampled = deque[Tensor](maxlen=max(HORIZONS) * self.window_steps // WINDOW_EVERY)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.step += 1
        model, left = pl_module.net, self.num_steps - self.step
        for share, average in self.equal.items():
            if left < round(share * self.num_steps):
                average.update_parameters(model)
        self.post_hoc.update()
        if self.step % WINDOW_EVERY == 0:
            self.sampled.append(vector(model))
        for share, queue in self.queues.items():
            if self.step % max(1, round(share * self.num_steps)) == 0:
                queue.append(vector(model))
        self.latest_P = vector(model)

    def averages(self) -> dict[str, Averages]:
        """Return what each referee may choose from."""
        newest = list(self.sampled)
        a_window = self.window_steps // WINDOW_EVERY
        return {
            "swa_utils": {f"last {100 * s:g} %": vector(average.module) for s, average in self.equal.items()},
            "post-hoc": {
                f"sigma_rel {s:g}": vector(self.post_hoc.synthesize_ema_model(sigma_rel=s).ema_model)
                for s in POST_HOC_LENGTHS
            },
            "windows": {f"horizon {h}": torch.stack(newest[-h * a_window :]).mean(0) for h in HORIZONS},
            "queue": {f"every {100 * e:g} %": torch.stack(list(q)).mean(0) for e, q in self.queues.items()},
        }


def replay(case: Trained, callbacks: list[Callback], *, num_epochs: int = 1) -> Replayed:
    """Train the run again under callbacks."""
    module = Replayed(Training(case.run))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=num_epochs,
            limit_train_batches=case.run.num_steps // num_epochs,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module)
    return module


def ride(case: Trained) -> dict[str, Averages]:
    """Return the averages of one replay, which must end with the run's own latest weights."""
    with tempfile.TemporaryDirectory() as folder:
        riders = Riders(Training(case.run).model, case.run.num_steps, folder)
        emas = [LightningEMA(decay) for decay in EMA_DECAYS]
        follow = Follow(riders)
        replay(case, [*emas, follow])
        if not torch.equal(riders.latest_P, case.latest_P):
            raise RuntimeError("the replay of a run must end with its latest weights: other versions have trained it")
        found = riders.averages()
    found["Lightning EMA"] = {f"decay {e.decay:g}": vector(e._average_model.module.net) for e in emas}
    return found


class Follow(Callback):
    """Lets the riders follow the module's network, which does not exist before."""

    def __init__(self, riders: Riders) -> None:
        self.riders = riders

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        # The averages hold the model that they read.
        self.riders.post_hoc._model = [pl_module.net]
        for ema in self.riders.post_hoc.ema_models:
            ema.online_model = [pl_module.net]

    def on_train_batch_end(self, *args: Any) -> None:
        self.riders.on_train_batch_end(*args)


def lightning_swa(case: Trained) -> dict[str, Averages]:
    """Return Lightning's averages, at the run's own rate: one more model after each hundredth of the run."""
    found = {}
    for share in SWA_STARTS:
        swa = StochasticWeightAveraging(
            swa_lrs=case.run.task().rate, swa_epoch_start=share, annealing_epochs=1, annealing_strategy="linear"
        )
        found[f"from {100 * share:g} %"] = vector(replay(case, [swa], num_epochs=NUM_EPOCHS).net)
    return {"Lightning SWA": found}


def schedule_free(case: Trained) -> dict[str, Averages]:
    """Return what runs of another optimizer end with: the same weights and batches at their beginning."""
    found = {}
    for factor in SCHEDULE_FREE_RATES:
        training = Training(case.run)
        optimizer = AdamWScheduleFree(
            training.model.parameters(),
            lr=factor * training.task.rate,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            warmup_steps=WARMUP_STEPS,
        )
        optimizer.train()
        for _ in range(case.run.num_steps):
            loss = training.task.loss(training.model, training.task.draw(training.generator))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        optimizer.eval()
        found[f"{factor:g} times the rate"] = vector(training.model)
    return {"schedule-free": found}


def averages(case: Trained, name: str, make: Callable[[Trained], dict[str, Averages]]) -> Averages:
    """Return a referee's averages, from beside the run's trail where they are."""
    folder = case.run.directory / "referees"
    if not (folder / f"{name}.npz").exists():
        folder.mkdir(exist_ok=True)
        for made, found in make(case).items():
            temporary = folder / f"{made}.tmp.npz"
            np.savez(temporary, **{label: weights_P.numpy() for label, weights_P in found.items()})
            temporary.rename(folder / f"{made}.npz")
    with np.load(folder / f"{name}.npz") as stored:
        return {label: torch.from_numpy(stored[label]) for label in stored.files}


def best(case: Case, candidates: Mapping[str, Tensor]) -> Found:
    """Return the best candidate on the search half, where all are scored."""
    start = time.monotonic()
    losses = {label: case.score(weights_P, "search").value for label, weights_P in candidates.items()}
    label = min(losses, key=losses.__getitem__)
    num = len(candidates)
    return Found(
        weights_P=candidates[label],
        about={"winner": label, "losses": losses},
        evaluations=num,
        evaluations_to_99=num,
        evaluations_unstaged=num,
        seconds=time.monotonic() - start,
    )


def one_of(
    name: str, make: Callable[[Trained], dict[str, Averages]], labels: Iterable[str] | None = None
) -> Callable[[Any], Found]:
    """Return what finds the best of a referee's averages, of all or of these."""

    def find(case: Trained) -> Found:
        found = averages(case, name, make)
        return best(case, {label: found[label] for label in labels or found})

    return find


def cma_es(times: int) -> Callable[[Any], Found]:
    """Return a search by CMA-ES over free coefficients, at so many times the default's evaluations."""

    def find(case: Trained) -> Found:
        scores = json.loads((case.run.directory / "referees.json").read_text())
        evaluations = scores["methods"]["grouped"]["evaluations"]
        segments_K = case.buffer.segments_K
        # The mean over the newest five means, from which a step of any sign is open.
        num, newest = len(segments_K), 5
        c_K = [0.0] * (num - newest - 1) + [1 / newest] * newest + [0.0]
        space = Affine(max_deviation=1.0)
        sampler_options: dict[str, Any] = {"x0": space.inverse(c_K, segments_K), "sigma0": 0.1, "seed": 0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            # Optuna 5 deprecates the beginning and the spread, and has nothing in their place.
            warnings.simplefilter("ignore", FutureWarning)
            sampler = CmaEsSampler(**sampler_options)
            # The latest weights are scored first.
            n_trials = max(1, round(times * evaluations) - 1)
            return search(
                case, space, anchors=(), n_trials=n_trials, sampler=sampler, staged=False, stopping=NEVER
            )  # fmt: skip

    return find


@dataclass(frozen=True)
class Referee:
    """An average that is not ours.

    Args:
        find: Makes it.
        source: What it is, and where it comes from.
    """

    find: Callable[[Any], Found]
    source: str


REFEREES = {
    "Lightning EMAWeightAveraging": Referee(
        one_of("Lightning EMA", ride), f"every step, decays {', '.join(map(str, EMA_DECAYS))}, the best of them"
    ),
    "Lightning EMAWeightAveraging, its default": Referee(one_of("Lightning EMA", ride, ["decay 0.999"]), "decay 0.999"),
    "Lightning StochasticWeightAveraging": Referee(
        one_of("Lightning SWA", lightning_swa),
        "at the run's own rate, a model each hundredth of the run, from 80 or 90 % of it on, the better of them",
    ),
    "torch AveragedModel": Referee(
        one_of("swa_utils", ride),
        "`torch.optim.swa_utils`, the equal mean over the last 5, 10, 20 or 50 % of the steps, the best of them",
    ),
    "ema-pytorch PostHocEMA": Referee(
        one_of("post-hoc", ride),
        "two EMAs, fifty checkpoints each in float32, synthesised at seven lengths, the best of them; arXiv:2312.02696",
    ),
    "schedulefree AdamWScheduleFree": Referee(
        one_of("schedule-free", schedule_free),
        "a training of its own, arXiv:2405.15682, at 1, 2 and 4 times the rate, the best of them",
    ),
    "schedules-and-scaling": Referee(
        one_of("windows", ride),
        "after arXiv:2405.18392: a mean every 5 steps over one to five windows, the best of them",
    ),
    "queue of 10, every 0.2 %": Referee(
        one_of("queue", ride, ["every 0.2 %"]), "after *When, where and why to average weights*, arXiv:2502.06761"
    ),
    "queue of 10, the best interval": Referee(
        one_of("queue", ride), "the same, every 0.2, 0.4, 0.8, 1.6 or 3.2 % of the steps, the best of them"
    ),
    "CMA-ES, as many evaluations": Referee(
        cma_es(1), "Optuna's, over affine coefficients of the same snapshots, after LCSC, arXiv:2404.02241"
    ),
    "CMA-ES, ten times as many": Referee(cma_es(10), "the same"),
}
