"""The example, as a newcomer meets it: its own commands, in an empty folder, on a run of a few seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lightning_ckmerge import Artifact

# A short demo takes 20 seconds on an idle machine.
pytestmark = pytest.mark.timeout(600)
Cli = Callable[..., str]
EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = str(EXAMPLES / "pretrain_gpt.yaml")
CONTENDERS = (
    "latest weights",
    r"best uniform mean \(uniform-\w+\)",
    "best EMA shape",
    "the paper's pair",
    "ours",
    "learning rate decayed",
)
SHORT = (
    "--trainer.max_steps=60",
    "--trainer.callbacks.init_args.every_n_train_steps=48",  # of the last callback, the ModelCheckpoint
    "--data.init_args.batch_size=4",
    "--data.init_args.num_eval_batches=24",
    # So high that the weights jump about, and a mean of them is better than the last ones.
    "--model.init_args.learning_rate=0.02",
    "--model.init_args.warmup_steps=5",
)


def run(cwd: Path, script: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run one of the example's scripts in ``cwd``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / script), *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """``pretrain_gpt.py`` in this process: from its arguments to what it says when it exits."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py"])

    def main(*args: str) -> str:
        from pretrain_gpt import main

        with pytest.raises(SystemExit) as exit_:
            main(args)
        return capsys.readouterr().out if exit_.value.code == 0 else str(exit_.value.code)

    return main


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A short demo with its decay branch: the folder in which it ran, and what it printed."""
    cwd = tmp_path_factory.mktemp("demo")
    done = run(cwd, "demo.py", "--decay-branch", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    return cwd, done.stdout


def test_the_demo_ends_with_every_contender_the_verdict_and_where_things_lie(demo: tuple[Path, str]) -> None:
    """Goes red if a contender is missing, or if a path that is printed does not exist."""
    cwd, printed = demo
    for contender in CONTENDERS:
        row = re.search(rf"^{contender}  +\d\.\d{{4}} .*$", printed, re.M)
        assert row is not None, printed
        # Its losses and gains, and but for the latest weights the share of the decay's gain.
        assert len(re.findall(r"-?\d\.\d{4}", row[0])) >= 5
        assert row[0].endswith("%") == (contender != "latest weights")
    assert artifact_of(demo).manifest["verdict"]["sentence"] in printed
    assert (cwd / last_word(printed, "report")).is_file()


def test_the_demo_measures_what_the_search_measured(demo: tuple[Path, str]) -> None:
    """Goes red if a merge is rebuilt wrongly, or scored on other batches than the confirmation half."""
    _, printed = demo
    measured = float(re.search(r"^ours +(\S+)", printed, re.M)[1])
    assert measured == pytest.approx(artifact_of(demo).manifest["verdict"]["value"], abs=1e-4)


def test_sample_writes_text_with_the_artifact_alone(demo: tuple[Path, str]) -> None:
    """Goes red if the artifact's names or shapes are not those of the plain model."""
    cwd, _ = demo
    done = run(cwd, "sample.py", str(artifact_of(demo).path), "--prompt", "import ", "--num-bytes", "20")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("import ")
    assert len(done.stdout) > len("import \n")


def test_the_yaml_configures_both_callbacks_and_comes_back_unchanged(cli: Cli, tmp_path: Path) -> None:
    """Goes red if an argument of the callback does not survive ``--print_config``."""
    printed = cli("fit", "--config", CONFIG, "--print_config")
    again = tmp_path / "printed.yaml"
    again.write_text(printed)
    assert cli("fit", "--config", str(again), "--print_config") == printed
    ours, pair, _ = yaml.safe_load(printed)["trainer"]["callbacks"]
    assert ours["init_args"]["search"]["space"] == "grouped"
    assert pair["init_args"]["search"]["space"] == "pairwise"
    assert pair["init_args"]["buffer"]["snapshot"] == "point"


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("n_trials: 8", "n_trials: 0", "`search.n_trials >= 1` must hold, got 0. The default is 16."),
        ("monitor: val_loss", "monitor: val_los", "`monitor` must be a metric that validation logs, got 'val_los'."),
        ("snapshot: point", "snapshot: mean", "needs point snapshots, got `buffer.snapshot` 'mean'."),
    ],
)
def test_a_wrong_value_is_answered_by_one_line(cli: Cli, tmp_path: Path, right: str, wrong: str, message: str) -> None:
    """Goes red if a mistake in the YAML costs a training run, or ends in a traceback."""
    text = Path(CONFIG).read_text()
    assert right in text
    config = tmp_path / "wrong.yaml"
    config.write_text(text.replace(right, wrong))
    answer = cli("fit", "--config", str(config), "--trainer.enable_progress_bar=false")
    assert message in answer
    assert answer.startswith("error: ")
    assert "\n" not in answer


def artifact_of(demo: tuple[Path, str]) -> Artifact:
    """Return the artifact whose path the demo printed."""
    cwd, printed = demo
    return Artifact.open(cwd / last_word(printed, "artifact"))


def last_word(printed: str, line: str) -> str:
    """Return the last word of the line that begins with ``line``."""
    return re.search(rf"^{line} .*?(\S+)$", printed, re.M)[1]
