"""The examples beyond language models, each on a run of a second or two, in one process."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from lightning_ckmerge import Artifact, load_merged

EXAMPLES = Path(__file__).parents[2] / "examples"
CONTENDERS = ("latest weights", r"best uniform mean \(uniform-\w+\)", "best EMA shape", "the paper's pair", "ours")
ROW = r" +-?\d+\.\d{4} +(-?\d+\.\d{4})?.*$"
# Example -> settings of its short form's data.
TASKS = {
    "classify_digits": {"num_passes": 2},
    "diffuse_digits": {"num_passes": 2},
    "gan_digits": {"num_passes": 2},
    "masked_encoder": {"num_eval_batches": 12, "batch_size": 4},
    "spoken_words": {"num_passes": 1},
}
Run = Callable[[str], tuple[str, Path]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs the short form of an example, once; returns what it printed and where its files lie."""
    done: dict[str, tuple[str, Path]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.chdir(tmp_path_factory.mktemp("tasks"))
        patch.setattr(sys, "argv", ["example"])

        def once(task: str) -> tuple[str, Path]:
            if task not in done:
                printed: list[str] = []
                with pytest.MonkeyPatch.context() as inner:
                    inner.setattr("builtins.print", lambda *parts: printed.append(" ".join(map(str, parts))))
                    importlib.import_module(task).main(["--config", str(shorten(task))])
                done[task] = "\n".join(printed), Path("runs", task.replace("_", "-"))
            return done[task]

        yield once


def shorten(task: str) -> Path:
    """Write an example's YAML for a run of 24 steps, with two trials a search; return its path."""
    config = yaml.safe_load((EXAMPLES / f"{task}.yaml").read_text())
    config["trainer"] |= {"max_steps": 24, "val_check_interval": 12, "log_every_n_steps": 4}
    config["trainer"]["enable_progress_bar"] = False
    for callback in config["trainer"]["callbacks"]:
        callback["init_args"]["search"]["n_trials"] = 2
        callback["init_args"]["on_error"] = "raise"
    config["trainer"]["callbacks"][-1]["init_args"]["buffer"]["every_n_train_steps"] = 4
    config["data"]["init_args"] |= TASKS[task]
    if "warmup_steps" in config["model"]["init_args"]:
        config["model"]["init_args"] |= {"warmup_steps": 2, "learning_rate": 0.01}
    if task == "spoken_words":
        # The short form must run where there is no espeak-ng: with chords, which are no speech.
        config["data"]["class_path"] = "spoken_words.Tones"
        del config["data"]["init_args"]["cache"]
    path = Path(f"{task}.yaml")
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("task", TASKS)
def test_it_ends_with_a_table_of_every_contender_and_the_verdict(run: Run, task: str) -> None:
    """Goes red if an example does not run from its YAML, or leaves a contender out of its table."""
    printed, folder = run(task)
    for contender in CONTENDERS:
        assert re.search(rf"^{contender}{ROW}", printed, re.M), printed
    place = re.search(r"^artifact  (\S+)$", printed, re.M)
    assert place is not None
    assert Artifact.open(place[1]).manifest["verdict"]["sentence"] in printed
    assert (Path(place[1]) / "report.html").is_file()
    assert json.loads((folder / "comparison.json").read_text())["contenders"].keys() >= {"latest weights", "ours"}


@pytest.mark.parametrize("task", [t for t in TASKS if t != "classify_digits"])
def test_it_measures_what_the_search_measured(run: Run, task: str) -> None:
    """Goes red if a merge is rebuilt wrongly, or scored on other batches than the confirmation half."""
    _, folder = run(task)
    measured = json.loads((folder / "comparison.json").read_text())["contenders"]
    verdict = Artifact.open(next((folder / "merges").glob("step=*"))).manifest["verdict"]
    assert measured["ours"]["confirm"]["value"] == pytest.approx(verdict["value"], rel=1e-4, abs=1e-5)


def test_batch_norm_is_shown_with_its_statistics_merged_and_estimated_anew(run: Run) -> None:
    """Goes red if the table does not tell both, or if both are the same."""
    _, folder = run("classify_digits")
    measured = json.loads((folder / "comparison.json").read_text())["contenders"]
    verdict = Artifact.open(next((folder / "merges").glob("step=*"))).manifest["verdict"]
    assert measured["ours"]["confirm"]["value"] == pytest.approx(verdict["value"], rel=1e-4)
    assert measured["ours"]["test"] != measured["ours, statistics anew"]["test"]
    assert "latest weights, statistics anew" in measured


@pytest.mark.parametrize("task", ["diffuse_digits", "gan_digits"])
def test_pictures_are_drawn_before_and_after(run: Run, task: str) -> None:
    """Goes red if a picture is missing, or if both are the same."""
    _, folder = run(task)
    before, after = ((folder / name).read_bytes() for name in ("before.png", "after.png"))
    assert before.startswith(b"\x89PNG")
    assert before != after


def test_transformers_opens_the_merge_of_its_model(run: Run) -> None:
    """Goes red if the directory for transformers is missing, or holds other weights than the artifact."""
    from masked_encoder import MaskedEncoder
    from transformers import BertForMaskedLM

    _, folder = run("masked_encoder")
    artifact = next((folder / "merges").glob("step=*"))
    module = MaskedEncoder()
    load_merged(artifact, module)
    for name, tensor in BertForMaskedLM.from_pretrained(artifact / "hf").state_dict().items():
        torch.testing.assert_close(tensor, module.bert.state_dict()[name], rtol=0, atol=0)


def test_without_espeak_ng_the_example_says_so_in_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes red if it ends in a traceback, or goes on with anything else."""
    run("spoken_words")
    from spoken_words import Speech

    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match=r"^error: .* synthesised by espeak-ng, which is not installed\. .*$"):
        Speech(cache=str(tmp_path)).setup("fit")


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_espeak_ng_speaks_and_is_asked_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes red if a word is silent, or is synthesised again although it lies in the cache."""
    run("spoken_words")
    from spoken_words import NUM_SAMPLES, speak

    spoken = [speak(word, "en-us+f1", 160, tmp_path) for word in ("one", "two")]
    assert all(s.shape == (NUM_SAMPLES,) and abs(float(s.square().mean()) - 1) < 1e-3 for s in spoken)
    assert not torch.equal(*spoken)
    monkeypatch.setenv("PATH", "")
    assert torch.equal(speak("one", "en-us+f1", 160, tmp_path), spoken[0])


def test_the_kernel_distance_of_digits_to_other_digits_is_nothing(run: Run) -> None:
    """Goes red if the generator gets the labels of the images that it is compared with: that biases the estimate."""
    run("gan_digits")
    from digits import SIDE, digits
    from gan_digits import GAN, NUM_EVAL_BATCH, Digits

    images, labels = digits("train")

    class Copier(GAN):
        """Draws real digits of the labels that it is given."""

        def generate(self, noise: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
            chosen = [torch.nonzero(labels == label).flatten() for label in labels_N]
            picks = [c[int(abs(float(n)) * 1e4) % len(c)] for c, n in zip(chosen, noise[:, 0], strict=True)]
            return images[torch.stack(picks)].view(-1, 1, SIDE, SIDE)

    batches = list(Digits(num_passes=8).val_dataloader())
    distances = torch.tensor([float(Copier().distance(batch)) for batch in batches])
    assert len(batches[0][0]) == NUM_EVAL_BATCH
    error = distances.std() / len(distances) ** 0.5
    assert abs(float(distances.mean())) < 4 * float(error)
