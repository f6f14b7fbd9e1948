from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_ckmerge import load_merged
from lightning_ckmerge.checkpoints.formats import open_source
from lightning_ckmerge.core.native.mixing import load_mix_kernel
from lightning_ckmerge.errors import ArtifactError
from tests.support.checkpoints import WRITERS, model_at, write_all, write_lightning
from tests.support.commands import ckmerge, ckmerge_json
from tests.support.outcomes import tensors_of
from tests.support.trainers import make_trainer
from tests.support.waiting import wait_until
from tests.support.warnings import only_expected

ROOT = Path(__file__).parents[2]


def merged_tensors(out: Path) -> dict[str, Tensor]:
    source = open_source(out)
    return {name: source.weights[name] for name in source.specs}


def mean_of(*steps: int) -> dict[str, Tensor]:
    """The uniform mean, taken in another way; what cannot be averaged is the newest's."""
    states = [tensors_of(model_at(step)) for step in steps]
    return {
        n: torch.stack([s[n] for s in states]).double().mean(0).float() if t.is_floating_point() else t
        for n, t in states[-1].items()
    }


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("size", ["5GB", "64B"])
def test_every_format_merges_to_the_mean(tmp_path: Path, kind: str, size: str) -> None:
    paths = write_all(tmp_path, kind)
    ckmerge("merge", *paths, "--schedule", "uniform", "--out", tmp_path / "out", "--max-shard-size", size)
    merged, expected = merged_tensors(tmp_path / "out"), mean_of(100, 200, 300)
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7)
    assert merged["norm.num_batches_tracked"].item() == 300
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() is (size == "64B")


def test_formats_may_be_mixed_and_tied_weights_stay_tied(tmp_path: Path) -> None:
    paths = [write_all(tmp_path / kind, kind)[i] for i, kind in enumerate(("safetensors", "lightning", "torch"))]
    ckmerge("merge", *paths, "--weights", "1,1,1", "--out", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert len({"wte.weight", "head.weight"} & tensors.keys()) == 1
    torch.testing.assert_close(merged_tensors(tmp_path / "out")["head.weight"], mean_of(100, 200, 300)["head.weight"])


def test_weights_untied_in_one_checkpoint_are_written_apart(tmp_path: Path) -> None:
    (tied, _, _), (_, untied, _) = write_all(tmp_path / "a", "lightning"), write_all(tmp_path / "b", "hub")
    ckmerge("merge", tied, untied, "--schedule", "linear", "--out", tmp_path / "out")
    assert {"wte.weight", "head.weight"} <= load_file(tmp_path / "out" / "model.safetensors").keys()


def test_merging_one_checkpoint_copies_it(tmp_path: Path) -> None:
    path = write_lightning(tmp_path / "a.ckpt", 100)
    ckmerge("merge", path, "--schedule", "uniform", "--out", tmp_path / "out")
    model, expected = model_at(200), tensors_of(model_at(100))
    model.load_state_dict(merged_tensors(tmp_path / "out"), strict=False)
    assert all(torch.equal(tensors_of(model)[n], t) for n, t in expected.items())


def test_complex_tensors_are_averaged(tmp_path: Path) -> None:
    for i, value in enumerate((1 + 2j, 3 + 6j)):
        torch.save({"z": torch.full((2,), value, dtype=torch.complex64)}, tmp_path / f"{i}.pt")
    ckmerge("merge", tmp_path / "0.pt", tmp_path / "1.pt", "--schedule", "uniform", "--out", tmp_path / "out")
    assert merged_tensors(tmp_path / "out")["z"].tolist() == [2 + 4j, 2 + 4j]


def test_the_recipe_tells_inputs_hashes_and_coefficients(tmp_path: Path) -> None:
    paths = write_all(tmp_path / "in", "lightning")
    out = tmp_path / "out"
    printed = ckmerge_json("merge", *paths, "--weights", "1,0,3", "--out", out)
    recipe = json.loads((out / "recipe.json").read_text())
    assert {**recipe, "out": str(out)} == printed
    assert recipe["coefficients"] == [0.25, 0, 0.75]
    assert [i["step"] for i in recipe["inputs"]] == [100, 200, 300]
    for given, path in zip(recipe["inputs"], paths, strict=True):
        assert given["files"][path.name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    sha256 = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    assert recipe["files"]["model.safetensors"]["sha256"] == sha256
    with safe_open(out / "model.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["ckmerge_recipe"])
    del recipe["files"]
    assert header == recipe


def test_a_hub_directory_brings_its_config_and_tokenizer(tmp_path: Path) -> None:
    paths = write_all(tmp_path, "hub")
    ckmerge("merge", *paths, "--schedule", "ema:1", "--out", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json", "tokenizer.json", "model.safetensors", "recipe.json",
    }  # fmt: skip
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["files"].keys() == {"config.json", "tokenizer.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a", "b"], "one of --weights and --schedule must be given, got neither"),
        (["a", "b", "--weights", "1,1", "--schedule", "uniform"], "got both"),
        (["a", "b", "--weights", "1"], "got 1 weights for 2 checkpoints"),
        (["a", "b", "--schedule", "uniform", "--out", "x.pt"], "got 'x.pt'. Choose one of these endings, or none"),
        (["a", "b", "--weights", "1,x"], "must be numbers"),
        (["a", "b", "--weights", "1,-1"], "must not sum to 0"),
        (["a", "b", "--schedule", "cosine"], "a schedule must be one of"),
        (["a", "b", "c", "--schedule", "slerp:0.5"], "slerp takes two checkpoints, got 3"),
        (["b", "a", "no-step", "--schedule", "uniform"], "oldest first, got steps 200, 100"),
        (["a", "other", "--schedule", "uniform"], "must hold the same tensors, got bias, weight only in other"),
        (["a", "wide", "--schedule", "uniform"], "of another shape or kind"),
        (["a", "gone", "--schedule", "uniform"], "got nothing at"),
        (["a", "b", "--schedule", "uniform", "--max-shard-size", "5"], "must be a positive number with a unit"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_leaves_nothing(tmp_path: Path, args: list[str], message: str) -> None:
    for name, step in (("a", 100), ("b", 200), ("c", 300)):
        write_lightning(tmp_path / f"{name}.ckpt", step)
    torch.save({"weight": torch.ones(2), "bias": torch.ones(2)}, tmp_path / "other.ckpt")
    torch.save(tensors_of(model_at(100)), tmp_path / "no-step.ckpt")
    wide = {n: torch.cat([t, t]) if t.dim() else t for n, t in tensors_of(model_at(1)).items()}
    torch.save(wide, tmp_path / "wide.ckpt")
    named = [tmp_path / f"{a}.ckpt" if a in ("a", "b", "c", "other", "wide", "gone", "no-step") else a for a in args]
    before = sorted(tmp_path.iterdir())
    out = [] if "--out" in named else ["--out", tmp_path / "out"]
    assert message in ckmerge("merge", *named, *out, code=2).stderr
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_output_is_left_alone(tmp_path: Path) -> None:
    path = write_lightning(tmp_path / "a.ckpt", 100)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    error = ckmerge("merge", path, "--schedule", "uniform", "--out", tmp_path / "out", code=2).stderr
    assert "must not exist yet" in error
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def write_large(root: Path, num_checkpoints: int, num_tensors: int, numel: int) -> list[Path]:
    root.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(num_checkpoints):
        paths.append(root / f"step={k}.safetensors")
        save_file({f"layer.{i:03d}": torch.full((numel,), float(k)) for i in range(num_tensors)}, paths[-1])
    return paths


@pytest.mark.parametrize("kind", ["safetensors", "hub"])
def test_safetensors_are_merged_without_pytorch(tmp_path: Path, kind: str) -> None:
    """Whose import takes longer than the merge, and more memory."""
    if load_mix_kernel() is None:
        pytest.skip("needs a C compiler for an x86 processor with FMA")
    args = ["merge", *map(str, write_all(tmp_path, kind)), "--schedule", "ema:2", "--out", str(tmp_path / "out")]
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from lightning_ckmerge.cli.main import app
try:
    app({args!r})
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert (tmp_path / "out" / "recipe.json").is_file()


def test_memory_stays_at_a_few_blocks(tmp_path: Path) -> None:
    """Three checkpoints of 200 MB, out of tensors of 50 MB: mapped pages of files do not count, allocations do."""
    paths = write_large(tmp_path, 3, 4, 50 << 18)
    program = f"""
import sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import lightning_ckmerge.checkpoints.formats, lightning_ckmerge.checkpoints.merge
from lightning_ckmerge.cli.main import app
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
start, peak = anonymous(), [0.0]
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
try:
    app({["merge", *map(str, paths), "--schedule", "minus-sqrt", "--out", str(tmp_path / "out")]!r})
finally:
    print("grew by", peak[0] - start)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads Linux's /proc")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size >= 200 << 20, done.stderr
    assert float(done.stdout.split("grew by")[1]) < (48 if load_mix_kernel() else 200)


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    paths = write_large(tmp_path / "in", 2, 60, 1 << 20)
    # A shell's background jobs ignore Ctrl-C, and so would what they start.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from lightning_ckmerge.cli.main import app; app()"
    options = ["--schedule", "uniform", "--out", tmp_path / "o" / "out"]
    command = [sys.executable, "-c", f"{heed}; {start}", "merge", *paths, *options]
    process: Any = subprocess.Popen([str(c) for c in command], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: process.poll() is not None or list((tmp_path / "o").glob(".tmp-out-*/*")))
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr, stderr
    assert list((tmp_path / "o").iterdir()) == []


@pytest.mark.parametrize(
    "names",
    [
        ("epoch=9-step=900.ckpt", "epoch=10-step=1000.ckpt", "last.ckpt"),
        ("epoch=0-step=900.ckpt", "epoch=0-step=1000-v1.ckpt", "last-v1.ckpt"),
        ("step=000900.ckpt", "step=001000.ckpt", "best.ckpt"),
    ],
)
@pytest.mark.parametrize("as_directory", [False, True])
def test_lightnings_own_names_are_merged_by_their_steps(
    tmp_path: Path, names: tuple[str, ...], as_directory: bool
) -> None:
    """A shell lists `epoch=10` before `epoch=9`, and `last.ckpt` tells its step in the file alone."""
    for name, step in zip(names, (900, 1000, 1100), strict=True):
        write_lightning(tmp_path / "in" / name, step)
    if as_directory:
        write_lightning(tmp_path / "in" / "copy-of-the-last.ckpt", 1100)
    paths = [tmp_path / "in"] if as_directory else sorted((tmp_path / "in").iterdir(), reverse=True)
    schedule = ckmerge_json("merge", *paths, "--schedule", "minus-sqrt", "--out", tmp_path / "a")
    assert [i["step"] for i in schedule["inputs"]] == [900, 1000, 1100]
    assert schedule["order"] == "step"
    text = ckmerge("merge", *paths, "--schedule", "minus-sqrt", "--out", tmp_path / "b").stdout
    assert "order: by step, oldest first" in text


def test_weights_stay_with_the_checkpoints_that_they_were_given_to(tmp_path: Path) -> None:
    old, new = write_lightning(tmp_path / "old.ckpt", 100), write_lightning(tmp_path / "new.ckpt", 200)
    found = ckmerge_json("merge", new, old, "--weights", "3,1", "--out", tmp_path / "out")
    assert [(i["step"], c) for i, c in zip(found["inputs"], found["coefficients"], strict=True)] == [
        (100, 0.25), (200, 0.75),
    ]  # fmt: skip


def test_checkpoints_without_a_step_stay_as_given(tmp_path: Path) -> None:
    for name in "ab":
        torch.save({"w": torch.ones(2)}, tmp_path / f"{name}.pt")
    text = ckmerge("merge", tmp_path / "b.pt", tmp_path / "a.pt", "--weights", "1,1", "-o", tmp_path / "out").stdout
    assert "order: as given" in text
    assert text.index("b.pt") < text.index("a.pt")
    assert "note" not in text


def test_averaged_batchnorm_statistics_are_told_with_the_remedy(tmp_path: Path) -> None:
    paths = write_all(tmp_path, "lightning")
    text = ckmerge("merge", *paths, "--schedule", "uniform", "--out", tmp_path / "out").stdout
    assert "note: The statistics of 1 normalization layer, such as norm.running_mean, were averaged too" in text
    assert "update_bn" in text


@pytest.mark.parametrize("out", ["merged", "merged.safetensors"])
def test_load_merged_opens_what_merge_wrote(tmp_path: Path, out: str) -> None:
    paths = write_all(tmp_path, "lightning")
    ckmerge("merge", *paths, "--schedule", "uniform", "--out", tmp_path / out, "--max-shard-size", "64B")
    assert (tmp_path / out).is_file() is out.endswith(".safetensors")
    model, expected = model_at(1), mean_of(100, 200, 300)
    loaded = load_merged(tmp_path / out, model)
    assert repr(loaded) == f"MergedFiles('{(tmp_path / out).resolve()}', uniform, 3 checkpoints)"
    assert loaded.manifest["coefficients"] == [1 / 3] * 3
    for name, tensor in tensors_of(model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    with pytest.raises(ArtifactError, match="must fit Linear"):
        load_merged(tmp_path / out, torch.nn.Linear(2, 2))


def test_a_merge_that_was_damaged_is_not_loaded(tmp_path: Path) -> None:
    ckmerge("merge", *write_all(tmp_path, "lightning"), "--schedule", "uniform", "--out", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="another SHA-256"):
        load_merged(tmp_path / "out", model_at(1))


class Small(pl.LightningModule):
    """Takes an argument that only the checkpoint knows, and keeps more than tensors in its state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)
        self.head = torch.nn.Linear(width, 1)
        self.head.weight = self.layer.weight
        self.register_buffer("calls", torch.tensor(0))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", self.layer(batch).sum())


def test_a_ckpt_is_what_lightning_opens(tmp_path: Path) -> None:
    paths = []
    for step, width in ((100, 3), (200, 3)):
        model, trainer = Small(width), make_trainer()
        trainer.strategy.connect(model)
        model.calls.fill_(step)  # type: ignore[operator]
        paths.append(tmp_path / f"step={step}.ckpt")
        trainer.save_checkpoint(paths[-1])
    content = [torch.load(path, weights_only=True) for path in paths]
    for path, step, held in zip(paths, (100, 200), content, strict=True):
        torch.save({**held, "global_step": step, "mine": step}, path)
    out = tmp_path / "merged.ckpt"
    ckmerge("merge", *reversed(paths), "--schedule", "uniform", "--out", out)
    merged = torch.load(out, weights_only=True)
    assert (merged["global_step"], merged["mine"]) == (200, 200)
    assert not {"optimizer_states", "lr_schedulers", "callbacks", "loops"} & merged.keys()
    loaded = Small.load_from_checkpoint(out)
    mean = (content[0]["state_dict"]["layer.weight"] + content[1]["state_dict"]["layer.weight"]) / 2
    torch.testing.assert_close(loaded.layer.weight.detach(), mean)
    assert loaded.head.weight is loaded.layer.weight
    assert int(loaded.calls) == 200  # type: ignore[arg-type]
    loader = torch.utils.data.DataLoader(torch.ones(2, 3))
    with only_expected():
        (found,) = make_trainer().test(Small(3), loader, ckpt_path=out, verbose=False)
    assert found["loss"] == pytest.approx(float(loaded.layer(torch.ones(1, 3))))
    ckmerge("merge", out, paths[1], "--weights", "1,1", "--out", tmp_path / "again.ckpt")
    with pytest.raises(ArtifactError, match="load_from_checkpoint"):
        load_merged(out, loaded)


def test_a_ckpt_needs_hyperparameters_from_somewhere(tmp_path: Path) -> None:
    paths = write_all(tmp_path, "safetensors")
    found = ckmerge("merge", *paths, "--schedule", "uniform", "--out", tmp_path / "out.ckpt", code=2)
    assert "from the newest Lightning .ckpt among the checkpoints, got step=100" in found.stderr
    assert not (tmp_path / "out.ckpt").exists()
