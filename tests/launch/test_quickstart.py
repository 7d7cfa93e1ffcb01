"""The quickstart, end to end at its smallest scale, and a second start of it."""

import functools
import json
import math
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from hope_jax.data import text
from hope_jax.evaluate import language_model
from hope_jax.models import lm
from hope_jax.stream.reader import open_checkpoint
from hope_jax.train import loop
from launch import evaluate, generate, quickstart, train

KEYS = {
    "hope_bpb",
    "hope_bpb_frozen",
    "hope_bpb_carried",
    "transformer_bpb",
    "gzip_bpb",
    "xz_bpb",
    "seconds",
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name in range(8):
        lines = [f"def f{i}(x): return x + {i * name}\n" for i in range(40)]
        (folder / f"{name}.py").write_text("".join(lines))
    workdir = tmp_path_factory.mktemp("runs") / "quickstart"
    return ["--scale=smoke", f"--data={folder}", f"--workdir={workdir}"]


@pytest.fixture(scope="module")
def workdir(arguments):
    """A quickstart that went through."""
    quickstart.main(arguments)
    return Path(arguments[-1].partition("=")[2])


@pytest.fixture
def said(workdir, arguments, capsys):
    """What a second start prints."""
    quickstart.main(arguments)
    return capsys.readouterr().out


def test_writes_the_numbers(workdir):
    results = json.loads((workdir / "results.json").read_text())
    assert set(results) == KEYS | {"info"}
    for key in KEYS:
        assert isinstance(results[key], float) and 0 < results[key] < 1000, key
    # Each number is the one its name says.
    for row, key, mode in (
        ("hope", "hope_bpb", "reset"),
        ("hope", "hope_bpb_frozen", "frozen"),
        ("hope", "hope_bpb_carried", "carried"),
        ("transformer", "transformer_bpb", "reset"),
    ):
        kept = json.loads((workdir / row / quickstart.EVALUATION).read_text())
        assert results[key] == kept["metrics"][f"bits_per_byte_{mode}"]
    corpus = results["info"]["corpus_sha256"]
    assert re.fullmatch("[0-9a-f]{64}", corpus)


def test_writes_the_pictures(workdir):
    for name in ("loss.png", "levels.png"):
        image = matplotlib.image.imread(workdir / name)
        assert min(image.shape[:2]) > 100 and image[..., :3].std() > 0.01, name


def test_both_rows_read_as_many_tokens(workdir):
    logs = [
        (workdir / row / "metrics.jsonl").read_text().splitlines()
        for row in ("hope", "transformer")
    ]
    tokens = [[json.loads(line)["tokens"] for line in log] for log in logs]
    assert tokens[0] == tokens[1] and len(tokens[0]) >= 2


def test_bits_per_byte_of_a_trained_model_by_hand(workdir):
    """One plain forward pass over one file gives the number that is reported."""
    opened = open_checkpoint(workdir / "hope")
    document = text.load(opened.config.data.path).validation[0]
    document = text.Document("its start", document.data[:300])
    score = language_model.score(
        opened.reader,
        opened.params,
        opened.tokenizer,
        [document],
        mode="reset",
        window=64,
    )
    graphdef, _ = lm.abstract_model(opened.config.model)
    ids = np.concatenate([[256], np.frombuffer(document.data, np.uint8)])
    read = jax.jit(functools.partial(lm.apply, graphdef))
    logits, _ = read(opened.params, jnp.asarray(ids[None, :-1]))
    log_p = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
    nats = -log_p[np.arange(len(ids) - 1), ids[1:]].sum()
    by_hand = nats / math.log(2) / len(document.data)
    assert score.bits_per_byte == pytest.approx(by_hand, rel=1e-5)


def test_a_second_start_repeats_nothing(workdir, arguments, monkeypatch, capsys):
    before = json.loads((workdir / "results.json").read_text())
    for name in ("loss.png", "levels.png", "results.json"):
        (workdir / name).unlink()

    def forbidden(*_, **__):
        raise AssertionError("a second start must not do this again")

    monkeypatch.setattr(loop, "train", forbidden)
    monkeypatch.setattr(language_model, "evaluate", forbidden)
    quickstart.main(arguments)
    after = json.loads((workdir / "results.json").read_text())
    assert {k: after[k] for k in KEYS} == {k: before[k] for k in KEYS}
    assert (workdir / "loss.png").exists() and (workdir / "levels.png").exists()
    assert "reusing" in capsys.readouterr().out


def test_prints_one_table(said, workdir):
    results = json.loads((workdir / "results.json").read_text())
    for key in KEYS - {"seconds"}:
        assert f"{results[key]:.3f}" in said, key
    assert said.count("bits per byte") == 1
    assert "sha256" in said


def test_the_commands_it_names_work(said, capsys, tmp_path):
    commands = re.findall(r"^  (\S+) -m (launch\.\w+) (.*)$", said, re.MULTILINE)
    assert [module for _, module, _ in commands] == [
        "launch.generate",
        "launch.evaluate",
        "launch.train",
        "launch.train",
    ]
    for python, module, rest in commands:
        assert (Path.cwd() / python).exists()
        given = shlex.split(rest)
        if module == "launch.generate":
            generate.main([*given, "--tokens=4"])
        elif module == "launch.evaluate":
            mine = tmp_path / "mine.md"
            mine.write_text("some text of mine\n" * 20)
            evaluate.main([given[0], f"--data={mine}"])
        else:
            capsys.readouterr()
            assert train.main([*given, "--describe"]) == 0
            assert '"row": "hope"' in capsys.readouterr().out


def test_a_stopped_training_goes_on(arguments, tmp_path, monkeypatch, capsys):
    resumed = []

    def stopped(config, workdir, *, resume):
        resumed.append(resume)
        workdir.mkdir(parents=True, exist_ok=True)
        loop._write_config(workdir, config)
        return loop.Outcome(step=1, finished=False, stopped_by=15, metrics={})

    monkeypatch.setattr(loop, "train", stopped)
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            quickstart.main([*arguments[:2], f"--workdir={tmp_path}"])
        assert end.value.code == 128 + 15
    assert resumed == [True, True]
    assert "SIGTERM" in capsys.readouterr().out
    assert not (tmp_path / "results.json").exists()


def test_a_folder_of_other_settings_is_refused(workdir, arguments, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in range(4):
        (other / f"{name}.txt").write_text("other text\n" * 100)
    with pytest.raises(SystemExit) as end:
        quickstart.main(["--scale=smoke", f"--data={other}", arguments[-1]])
    message = str(end.value.code)
    assert "corpus: saved" in message and "Remove that folder" in message


def test_rows_differ_in_the_model_alone():
    from experiments import quickstart as experiment

    rows = experiment.rows("full")
    hope, twin = rows["hope"], rows["transformer"]
    assert hope.data.tokenizer == "bpe" and hope.data.vocab == 4096
    assert hope.model.vocab == twin.model.vocab == 4096
    assert hope.model.name == "hope_tiny" and twin.model.name == "transformer_tiny"
    # The model is all that differs.
    assert (hope.data, hope.train, hope.seed) == (twin.data, twin.train, twin.seed)
    assert hope.optimizer == twin.optimizer
    with pytest.raises(ValueError, match="scale must be one of full, smoke, got 'big'"):
        experiment.rows("big")
