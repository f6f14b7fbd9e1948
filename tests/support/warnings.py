"""The inventory of warnings that a test's run may show. Any other fails the test."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Patterns, each with the reason why nothing is wrong.
EXPECTED: tuple[str, ...] = (
    r"\(Triggered internally at ",  # torch's own code in C++ warns once a process, in whichever test comes first
    # Libraries of one release that use each other's names of an earlier one.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 with torch 2.13
    r"is_gradient_checkpointing` is deprecated",  # PEFT 0.21 with transformers 5.23
    r"`torch\.nn\.utils\.(weight|spectral)_norm` is deprecated",  # the old ones are what a case is about
    r"quantized tensor creation functions",  # torch 2.13 on its own; quantized buffers are what a case is about
    r"Sparse (CSR|invariant)",  # torch calls the layouts of a case beta
    r"Lazy modules are a new feature",  # torch, since 1.8
    r"multi-threaded, use of fork\(\)",  # Python 3.12, of each fork that Lightning or a loader makes
    r"is experimental \(supported from",  # Optuna, of the sampler and the storage that it recommends
    r"`optuna\.terminator` module",  # Optuna 5
    # Lightning's advice to people whose runs are longer.
    r"does not have many workers",
    r"smaller than the logging interval",
    r"exists and is not empty",  # a run that goes on, or two in one directory, are what a case is about
    r"sampler has shuffling enabled",  # shuffled validation is what a case is about
    r"overfit but enabled train(ing)? dataloader shuffling",
    r"`max_epochs` was not set",
    r"ended before the epoch ended",  # runs resume in mid-epoch
    r"callbacks used to create the checkpoint need to be provided",  # a run goes on with fewer of them
    r"The dirpath has changed from",  # ModelCheckpoint, of a run that goes on elsewhere
    r"Swapping scheduler",  # StochasticWeightAveraging takes over, as it says
    r"use `self\.log\(.*sync_dist=True\)`",  # metrics that are not reduced are what a case is about
    r"ambiguous collection",  # batches of several loaders
    r"You defined a `validation_step` but have no `val_dataloader`",
    r"could not find the monitored key",  # ModelCheckpoint, before the first step
    # The tests' own models.
    r"module\(s\) in eval mode at the start of training",  # `Classifier` freezes a block
    r"method of metric \w+ was called before the ``update``",  # one metric object for training and validation
    r"call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`",  # torch, under accumulation and closures
    r"torch\.distributed is disabled, unavailable or uninitialized",  # torch, of a checkpoint that one process saves
    r"Encountered `nan` values in tensor",  # torchmetrics, of gradients that leave no number to log
    r"FSDP2-wrapped module .* returned a view tensor",  # torch 2.13, of `nn.Linear` under gradients off
    r"tie_word_embeddings|tied_target_modules",  # PEFT, of adapters on the tied embedding
)


@contextmanager
def only_expected(*also: str) -> Iterator[list[str]]:
    """Yield a list, which holds the texts of all warnings once the block has been left.

    Args:
        also: Patterns of warnings that this block alone may show, beside those of the inventory. A text is searched
            for them.

    Raises:
        AssertionError: The block has ended well, and showed another warning.
    """
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield said
        finally:
            said += [str(w.message) for w in caught]
    known = re.compile("|".join((*EXPECTED, *also)))
    others = [w for w in caught if not known.search(str(w.message))]
    assert not others, "\n".join(f"{w.filename}:{w.lineno}: {w.category.__name__}: {w.message}" for w in others)
