"""The random state of this process: what draws from it, as it is now, and as it was."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

GENERATORS: tuple[Any, ...] = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
GENERATORS += (np.random.BitGenerator, np.random.SeedSequence)


def random_state(generators: Sequence[Any] = ()) -> tuple[Any, ...]:
    """Return the state of torch, Python and NumPy, and of generators of the user's own."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    own = [generator_state(g) for g in generators]
    if torch.backends.mps.is_available():
        devices = [torch.mps.get_rng_state()]
    return torch.get_rng_state(), random.getstate(), np.random.get_state(), devices, own


def set_random_state(state: tuple[Any, ...], generators: Sequence[Any] = ()) -> None:
    """Put a state back, of the same generators."""
    torch_state, python_state, numpy_state, devices, own = state
    torch.set_rng_state(torch_state)
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    if devices and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(devices)
    elif devices:
        torch.mps.set_rng_state(devices[0])
    for generator, saved in zip(generators, own, strict=True):
        set_generator_state(generator, saved)


def generator_state(generator: Any) -> Any:
    """Return the state of one generator of ``GENERATORS``; ``None`` for what has none."""
    if isinstance(generator, np.random.Generator):
        generator = generator.bit_generator
    if isinstance(generator, np.random.BitGenerator):
        return generator.state, _num_spawned(getattr(generator, "seed_seq", None))
    if isinstance(generator, np.random.SeedSequence):
        return _num_spawned(generator)
    if isinstance(generator, random.Random):
        return None if isinstance(generator, random.SystemRandom) else generator.getstate()
    return generator.get_state()


def set_generator_state(generator: Any, state: Any) -> None:
    """Put a generator's state back."""
    if isinstance(generator, np.random.Generator):
        generator = generator.bit_generator
    if isinstance(generator, np.random.BitGenerator):
        generator.state, num_spawned = state
        _set_num_spawned(getattr(generator, "seed_seq", None), num_spawned)
    elif isinstance(generator, np.random.SeedSequence):
        _set_num_spawned(generator, state)
    elif isinstance(generator, random.Random):
        if state is not None:
            generator.setstate(state)
    else:
        generator.set_state(state)


def _num_spawned(sequence: Any) -> int | None:
    return sequence.n_children_spawned if isinstance(sequence, np.random.SeedSequence) else None


def _set_num_spawned(sequence: Any, num_spawned: int | None) -> None:
    """Set how many sequences one has spawned, which NumPy lets be read alone."""
    if num_spawned is not None and sequence.n_children_spawned != num_spawned:
        entropy, _, *rest = sequence.__reduce__()[1][2] or sequence.__reduce__()[2]
        sequence.__setstate__((entropy, num_spawned, *rest))


def is_same_state(a: Any, b: Any) -> bool:
    """Whether two random states are equal."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(is_same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and not isinstance(next(iter(a), None), int):
        return len(a) == len(b) and all(map(is_same_state, a, b))
    return bool(a == b)
