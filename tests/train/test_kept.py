"""Checkpoints for everyone: extended, branched, of each format, read without us."""

import errno
import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import blake3
import jax
import numpy as np
import pytest

import hope_jax
from hope_jax.core import config as config_lib
from hope_jax.train import checkpoint, loop, metrics
from hope_jax.train.config import RunConfig
from launch import evaluate, generate, train
from tests.train import tiny

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "hope_jax" / "train" / "README.md"
TINY = ["--experiment=tests.train.tiny", "--row=tiny", "--scale=smoke"]


def meta(workdir):
    with checkpoint.Checkpoints(workdir / "checkpoints", read_only=True) as saved:
        return saved._meta(saved.steps()[-1])


@pytest.fixture
def copied(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_one_line_has_it_back_and_meta_says_with_what_it_was_made(trained):
    found = hope_jax.restore(trained)
    assert found.step == 12 and found.tokenizer.vocab_size == 257
    assert found.config == tiny.rows("smoke")["tiny"]
    leaves = jax.tree.leaves(found.params)
    assert leaves and all(isinstance(leaf, jax.Array) for leaf in leaves)
    said = meta(trained)
    assert {"jax", "hope_jax", "orbax-checkpoint"} <= set(said["versions"])
    assert said["versions"]["jax"] == jax.__version__ and said["lineage"] == []


def test_it_comes_back_without_a_word(trained, tmp_path, monkeypatch, caplog):
    """Also where no program has silenced Orbax; a step that is damaged is told."""
    monkeypatch.setattr(logging.getLogger("absl"), "filters", [])
    hope_jax.restore(trained)
    assert not caplog.messages
    spoilt = tmp_path / "spoilt"
    shutil.copytree(trained, spoilt)
    (spoilt / "checkpoints" / "12" / "meta" / "metadata").write_text("{")
    assert hope_jax.restore(spoilt).step == 9
    assert "Trying the step before" in caplog.text


def test_a_run_is_extended(copied, capsys):
    """Without a word on what it is of; its log goes on."""
    line = [f"--workdir={copied}", "--resume", "--set=train.steps=15"]
    assert train.main(line) == 0
    assert "resumed at step 12 of 15" in capsys.readouterr().out
    log = metrics.read_log(copied / "metrics.jsonl")
    assert [line["step"] for line in log] == list(range(1, 16))
    (event,) = meta(copied)["lineage"]
    assert event == {"event": "extended", "step": 12, "steps": [12, 15]}
    assert train.main([f"--workdir={copied}", "--resume", "--set=train.steps=14"]) == 1
    assert "train.steps: saved 15, now 14" in capsys.readouterr().err


def test_a_run_is_branched(trained, tmp_path, capsys):
    """Other data, rate, optimizer and context; the parameters of the first."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 200)
    workdir = tmp_path / "branch"
    changed = {
        *("train.steps=1", "train.seq_len=8", "model.mixer.context=8"),
        *("optimizer.rule=sgd", "optimizer.learning_rate=1e-6"),
        *("optimizer.warmup_steps=0", f"data.path={text}"),
    }
    line = [f"--init_from={trained}", f"--workdir={workdir}"]
    assert train.main([*line, *(f"--set={one}" for one in sorted(changed))]) == 0
    assert f"starts at step 12 of {trained}" in capsys.readouterr().out
    a, b = (checkpoint.restore_params(folder).params for folder in (trained, workdir))
    far = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), a, b)
    assert 0 < max(jax.tree.leaves(far)) < 1e-4
    (event,) = meta(workdir)["lineage"]
    assert event["event"] == "branched" and event["step"] == 0
    assert event["origin"]["path"] == str(trained) and event["origin"]["step"] == 12
    again = [f"--workdir={workdir}", "--resume", "--set=train.steps=2"]
    assert train.main(again) == 0
    assert [e["event"] for e in meta(workdir)["lineage"]] == ["branched", "extended"]


def test_a_branch_has_the_tokens_of_its_origin(trained, tmp_path):
    bpe = ["data.tokenizer=bpe", "data.vocab=300", "model.vocab=300", "train.steps=1"]
    run = config_lib.override(
        tiny.rows("smoke")["tiny"], bpe + ["optimizer.warmup_steps=0"]
    )
    loop.train(run, tmp_path / "bpe")
    text = tmp_path / "text.txt"
    text.write_text("something else, and quite another text\n" * 200)
    other = config_lib.override(run, [f"data.path={text}"])
    loop.train(other, tmp_path / "branch", init_from=tmp_path / "bpe" / "checkpoints")
    a, b = (checkpoint.restore_tokenizer(tmp_path / n) for n in ("bpe", "branch"))
    assert a == b
    plain = config_lib.override(run, ["data.tokenizer=bytes"])
    with pytest.raises(checkpoint.ConfigMismatch, match="'bytes' is not the tokenizer"):
        loop.train(plain, tmp_path / "no", init_from=tmp_path / "bpe")
    with pytest.raises(ValueError, match="model than config.model"):
        loop.train(run, tmp_path / "no", init_from=trained)
    assert not (tmp_path / "no").exists()


def test_programs_speak_the_same_flags(trained, tmp_path, capsys):
    config = trained / "config.json"
    assert train.main([f"--config={config}", "--describe"]) == 0
    described = capsys.readouterr().out
    (tmp_path / "other.json").write_text(
        config.read_text().replace('"d_model": 16', '"d_model": 8')
    )
    for program, more in (
        (evaluate, [f"--out={tmp_path / 'results'}"]),
        (generate, ["--tokens=2", "--prompt=a"]),
    ):
        program.main([f"--workdir={trained}", f"--config={config}", *more])
        with pytest.raises(SystemExit, match="d_model: saved 16, now 8"):
            wrong = f"--config={tmp_path / 'other.json'}"
            program.main([f"--checkpoint={trained}", wrong, *more])
    result = tmp_path / "results" / "tiny" / "tiny-s0.json"
    capsys.readouterr()
    assert train.main([f"--config={result}", "--describe"]) == 0
    assert (
        capsys.readouterr().out == described
    )  # a result file holds the config as well
    for flags, said in (
        ([f"--config={config}", *TINY], "--experiment and --config both name"),
        ([f"--config={config}", "--row=tiny"], "--row is of an --experiment"),
        (["--config=/no/such"], "No such file"),
        ([f"--config={trained / 'metrics.jsonl'}"], "metrics.jsonl' is no config: "),
    ):
        assert train.main([f"--workdir={tmp_path / 'c'}", *flags]) == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "{}", "[" * 100_000, '{"train": 3}', "\0"])
def test_a_config_that_is_damaged_is_named_and_not_needed(copied, text, capsys, caplog):
    (copied / "config.json").write_text(text)
    assert checkpoint.restore_params(copied).config == tiny.rows("smoke")["tiny"]
    if text == "{":  # and of all programs
        generate.main([f"--checkpoint={copied}", "--tokens=2", "--prompt=a"])
        assert "config.json' is no config" in caplog.text
    assert train.main([f"--workdir={copied}", "--resume"]) == 0
    config_lib.from_json(RunConfig, json.loads((copied / "config.json").read_text()))


@pytest.mark.parametrize("how", ["byte", "no step", "gone"])
def test_a_log_that_is_damaged_is_kept_and_gone_on_with(copied, how, caplog):
    log = copied / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    spoilt = {"byte": b"\xff" + lines[3], "no step": b"{}\n"}.get(how)
    if spoilt is None:
        log.unlink()
    else:
        log.write_bytes(b"".join([*lines[:3], spoilt, *lines[4:]]))
    assert train.main([f"--workdir={copied}", "--resume"]) == 0
    assert str(log) in caplog.text
    if spoilt is not None:
        assert "Line 4" in caplog.text
        assert (copied / "metrics.jsonl.damaged").read_bytes().splitlines(True)[
            3
        ] == spoilt
        assert log.read_bytes().splitlines(keepends=True) == lines[:3] + lines[4:]


def test_meta_without_a_format_is_damage(copied):
    file = copied / "checkpoints" / "12" / "meta" / "metadata"
    body = json.loads(file.read_text())["body"]
    del body["format"]
    digest = checkpoint._json_digest(body)
    file.write_text(json.dumps({"body": body, "sha256": digest}))
    with checkpoint.Checkpoints(copied / "checkpoints", read_only=True) as saved:
        with pytest.raises(checkpoint.Damaged, match="its meta has no format"):
            saved.verify(12)
    assert checkpoint.restore_params(copied).step == 9


FAULTS = [
    MemoryError(),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.EACCES, "Permission denied"),
    OSError(errno.EMFILE, "Too many open files"),
    ValueError("RESOURCE_EXHAUSTED: Error reading local file: Too many open files"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"),
    ImportError("no such handler any more"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{type(f).__name__} {f}"[:24])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_no_damage_is_raised_and_nothing_moved(
    copied, fault, wrapped, monkeypatch
):
    with checkpoint.Checkpoints(copied / "checkpoints") as saved:
        whole = saved._manager.restore

        def restore(step, args):
            if step == 12 and "params" in args.keys():
                if wrapped:
                    raise ValueError("while reading") from fault
                raise fault
            return whole(step, args=args)

        monkeypatch.setattr(saved._manager, "restore", restore)
        with pytest.raises((type(fault), ValueError)) as caught:
            saved.restore_params()
        assert fault in (caught.value, caught.value.__cause__)
        assert saved.steps() == [9, 12]
    assert not (copied / "checkpoints.damaged").exists()


@pytest.mark.parametrize("format", [1, 2])
def test_checkpoints_of_every_format_are_read_and_gone_on_with(format, tmp_path):
    with zipfile.ZipFile(HERE / "stored" / f"format_{format}.zip") as stored:
        stored.extractall(tmp_path)
    workdir = tmp_path / "run"
    said = meta(workdir)
    assert said["format"] == format
    found = hope_jax.restore(workdir)
    flat = checkpoint._arrays(found.params, "params")
    assert checkpoint.manifest(flat, format) == said["params"]
    assert found.tokenizer.vocab_size == 257
    config = checkpoint.saved_config(workdir)
    more = ["train.steps=4", f"data.path={tmp_path / 'text.txt'}"]
    longer = config_lib.override(config, more)
    assert loop.train(longer, workdir, resume=True).finished


def test_without_this_package_and_on_other_devices(trained):
    """The recipe of the page, as it is, by Orbax alone."""
    (recipe,) = re.findall(r"(?s)```python\n(.*?)```", PAGE.read_text())
    code = recipe.replace("runs/mine", str(trained)) + (
        "import sys, blake3\nimport numpy as np\n"
        "assert 'hope_jax' not in sys.modules\n"
        "assert jax.device_count() == 1\n"
        "for name, array in params.items():\n"
        "    digest = blake3.blake3(np.asarray(array).tobytes()).hexdigest()\n"
        "    assert digest == saved['params'][name][2], name\n"
        "print(len(params))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(meta(trained)["params"])


def test_digests_are_those_of_the_bytes():
    host = np.arange(1 << 18, dtype=np.float32).reshape(512, 512).T
    raw = host.tobytes()
    for format, digest in ((1, hashlib.sha256(raw)), (2, blake3.blake3(raw))):
        found = checkpoint.manifest({"a": host, "b": host[:0]}, format)
        assert found["a"] == ["float32", [512, 512], digest.hexdigest()]
        assert found["b"][:2] == ["float32", [0, 512]]
