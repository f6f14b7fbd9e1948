"""K snapshots into the live tensors of a model: against C, against PyTorch, and over sizes.

Letters: K snapshots, oldest first; N tensors of one snapshot; P elements of the model.
"""

from __future__ import annotations

import ctypes
import gc
import math
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.rounds import Row, at_least, at_most, medians
from lightning_ckmerge.core.layout import OwnedTensor, TensorLayout
from lightning_ckmerge.core.merge import merge_tensor
from lightning_ckmerge.core.merge_plan import MergePlan
from lightning_ckmerge.core.native.fused import load_kernel

KS = (2, 4, 8, 16)
# Half of GPT-2 where all of it, sixteen times over, would need more than this.
MAX_BYTES = 6 << 30
COPIES = {"float32": 4, "bfloat16": 2}


def gpt2(num_layers: int = 12) -> list[tuple[int, ...]]:
    """Return the shapes of GPT-2's parameters: 124 M in 12 layers."""
    block = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,), (3072, 768), (3072,)]
    block += [(768, 3072), (768,)]
    return [(50257, 768), (1024, 768), *(block * num_layers), (768,), (768,)]


def numel(shapes: Sequence[tuple[int, ...]]) -> int:
    """Return P."""
    return sum(map(math.prod, shapes))


class Model:
    """Live tensors, K snapshots in flat memory, and coefficients."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], num_snapshots: int, dtype: torch.dtype) -> None:
        owned = [
            OwnedTensor(name=f"{n:05}", role="parameter", tensor=torch.zeros(shape, dtype=dtype))
            for n, shape in enumerate(shapes)
        ]
        layout = TensorLayout(owned)
        self.dtype = dtype
        self.flats_K = [layout.allocate()[dtype].normal_() for _ in range(num_snapshots)]
        self.sources_KN = [layout.views({dtype: flat}) for flat in self.flats_K]
        self.flat_target = layout.allocate()[dtype].zero_()
        self.targets_N = layout.views({dtype: self.flat_target})
        total = num_snapshots * (num_snapshots + 1) / 2
        self.c_K = [(k + 1) / total for k in range(num_snapshots)]
        self.plan = MergePlan(self.targets_N, self.sources_KN, ["parameter"] * len(shapes))

    def ours(self) -> None:
        """Merge as a search does."""
        self.plan.merge(self.c_K)

    def without_compiler(self) -> None:
        """Merge as a search does where there is no compiler."""
        for n, target in enumerate(self.targets_N):
            merge_tensor(target, [s[n] for s in self.sources_KN], self.c_K)

    def as_dicts(self) -> None:
        """Merge as most scripts do."""
        pairs = list(zip(self.c_K, self.sources_KN, strict=True))
        merged = {n: sum(c * sources_N[n] for c, sources_N in pairs) for n in range(len(self.targets_N))}
        for n, target in enumerate(self.targets_N):
            target.copy_(merged[n])

    def foreach_lerp(self) -> None:
        """Merge by PyTorch's fastest operators in place."""
        torch._foreach_copy_(self.targets_N, self.sources_KN[0])
        total = self.c_K[0]
        for c, sources_N in zip(self.c_K[1:], self.sources_KN[1:], strict=True):
            total += c
            torch._foreach_lerp_(self.targets_N, sources_N, c / total)

    def in_c(self, library: ctypes.CDLL) -> Callable[[], None]:
        """Return the reference's merge."""
        num = len(self.flats_K)
        function = getattr(library, f"{str(self.dtype).removeprefix('torch.')}_{num}")
        sources = (ctypes.c_void_p * num)(*(f.data_ptr() for f in self.flats_K))
        target = ctypes.c_void_p(self.flat_target.data_ptr())
        size = ctypes.c_int64(self.flat_target.numel())
        return lambda: function(size, sources, (ctypes.c_float * num)(*self.c_K), target)


def reference() -> ctypes.CDLL:
    """Compile ``reference.c``."""
    with tempfile.TemporaryDirectory() as dirpath:
        library = Path(dirpath) / "reference.so"
        source = Path(__file__).with_name("reference.c")
        command = ["cc", "-O3", "-march=native", "-fopenmp-simd", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))


def measure() -> Iterator[Row]:
    """Yield the rows of ``merge``."""
    torch.set_num_threads(1)
    library = reference()
    start = time.perf_counter()
    assert load_kernel() is not None, "needs a C compiler"
    compiled_s = time.perf_counter() - start
    for name, size in COPIES.items():
        for num in KS:
            layers = 12 if (num + 1) * numel(gpt2()) * size <= MAX_BYTES else 3
            model = Model(gpt2(layers), num, getattr(torch, name))
            methods: dict[str, Any] = {
                "c": model.in_c(library),
                "ours": model.ours,
                "eager": model.without_compiler,
                "dicts": model.as_dicts,
                "lerp": model.foreach_lerp,
            }
            found = medians(methods)
            moved = (num + 1) * model.flat_target.numel() * size / 1e9
            title = f"merge {num} x {model.flat_target.numel() / 1e6:.0f} M, {name}"
            speed = f" ({moved / found['ours']:.0f} GB/s; C {moved / found['c']:.0f})"
            yield at_least(f"{title}: speed, of fused C", found["c"] / found["ours"], 0.8, speed)
            eager = found["c"] / found["eager"]
            if name == "float32":
                yield at_least(f"{title}: speed without a compiler, of fused C", eager, 0.7)
            else:
                what = f"{title}: speed without a compiler, of fused C"
                yield Row(what=what, target="", measured=f"{eager:.2f}", met=None)
            yield at_least(f"{title}: speed, of `sum(c * w[k])`", found["dicts"] / found["ours"], 8)
            yield at_least(f"{title}: speed, of `_foreach_lerp_`", found["lerp"] / found["ours"], 1.6)
            del model, methods
            gc.collect()
    yield at_most("compiling the kernel and comparing its bits, seconds a process", compiled_s, 5)
    yield _extra_memory()


def _extra_memory() -> Row:
    model = Model(gpt2(), 2, torch.float32)
    model.ours()
    tracemalloc.start()
    model.ours()
    _, python_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    with torch.profiler.profile(profile_memory=True) as profile:
        model.ours()
    torch_bytes = sum(max(0, e.self_cpu_memory_usage) for e in profile.events() or ())
    share = (python_bytes + torch_bytes) / (model.flat_target.numel() * 4)
    return at_most("extra memory of a merge, share of the model", share, 0.01)


def measure_growth() -> Iterator[Row]:
    """Yield the rows of ``growth``: exponents of time over sizes, and time over the number of tensors."""
    torch.set_num_threads(1)
    # Between two merges of a search, a validation pass takes the caches; the kernel is measured, at all sizes.
    elsewhere = torch.zeros(1 << 26)
    sizes = [1 << 20, 1 << 22, 1 << 24, 1 << 26, 350_000_000]
    seconds = []
    for size in sizes:
        model = Model([(size,)], 2, torch.float32)
        seconds.append(medians({"ours": _kernel(model)}, prepare=lambda: elsewhere.add_(1))["ours"])
        del model
        gc.collect()
    yield _exponent("time of a merge over P, 1 M to 350 M, K = 2, cold caches: exponent", sizes, seconds)
    counts = (2, 4, 8, 16, 32)
    models = {f"{k}": Model([(20_000_000,)], k, torch.float32) for k in counts}
    found = medians({k: m.ours for k, m in models.items()})
    yield _exponent("time of a merge over K, 2 to 32, P = 20 M: exponent", counts, found.values())
    del models
    gc.collect()
    few = Model([(12_400_000,)] * 4, 4, torch.float32)
    many = Model([(4960,)] * 10_000, 4, torch.float32)
    found = medians({"few": few.ours, "many": many.ours})
    yield at_most("time of a merge in 10,000 tensors, of that in 4 (50 M, K = 4)", found["many"] / found["few"], 1.1)


def _kernel(model: Model) -> Callable[[], None]:
    kernel = load_kernel()
    assert kernel is not None
    c = {"": model.c_K}
    model.plan._merge_fused(kernel, c)
    return lambda: model.plan._merge_fused(kernel, c)


def _exponent(what: str, sizes: Sequence[int], seconds: Any) -> Row:
    x, y = (torch.tensor([math.log(v) for v in values], dtype=torch.float64) for values in (sizes, list(seconds)))
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    return Row(what=what, target="<= 1.1", measured=f"{slope:.2f}", met=slope <= 1.1)
