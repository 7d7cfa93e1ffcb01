"""The loop, in this process: what it refuses, writes and stops at."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.core import config as config_lib
from hope_jax.data.tokenizer import PretrainedTokenizer, train_bpe
from hope_jax.models import lm
from hope_jax.train import checkpoint, loop, metrics
from tests.train import tiny

SMOKE = tiny.rows("smoke")["tiny"]


def config(*settings):
    return config_lib.override(SMOKE, settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    outcome = loop.train(
        config("train.validate_every=5", "train.validate_batches=2"), workdir
    )
    after = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    assert before == after  # they are given back
    return workdir, outcome


def test_what_a_run_leaves(finished):
    workdir, outcome = finished
    assert (outcome.step, outcome.finished, outcome.stopped_by) == (12, True, None)
    assert {p.name for p in workdir.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "metrics.jsonl",
        "hosts",
        "tensorboard",
        "checkpoints",
    }
    saved, params, step = checkpoint.restore_params(workdir)
    assert step == 12
    assert config_lib.to_json(saved) == json.loads(
        (workdir / "config.json").read_text()
    )
    assert checkpoint.restore_tokenizer(workdir).vocab_size == 257
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(params))


def test_what_the_log_says(finished):
    workdir, outcome = finished
    log = metrics.read_log(workdir / "metrics.jsonl")
    assert [line["step"] for line in log] == list(range(1, 13))
    assert log[-1]["tokens"] == 12 * 4 * 16
    assert log[-1]["loss"] < log[0]["loss"]
    for line in log:
        # Bytes as tokens, and one token more for each document's start.
        ratio = line["bits_per_byte"] / (line["loss"] / np.log(2))
        assert 1 < ratio < 1.01
        parts = [v for k, v in line.items() if k.startswith("update_norm/")]
        np.testing.assert_allclose(
            np.sqrt(np.sum(np.square(parts))), line["update_norm"], rtol=1e-5
        )
    validated = [line["step"] for line in log if "validation_bits_per_byte" in line]
    assert validated == [5, 10, 12]
    assert {k: v for k, v in log[-1].items() if k != "step"} == outcome.metrics


def test_a_workdir_holds_one_run(finished):
    workdir, _ = finished
    with pytest.raises(FileExistsError, match="has checkpoints already: pass --resume"):
        loop.train(SMOKE, workdir)


def test_resuming_a_finished_run_does_nothing(finished, capsys):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    same = config("train.validate_every=5", "train.validate_batches=2")
    outcome = loop.train(same, workdir, resume=True)
    assert (outcome.step, outcome.finished) == (12, True)
    assert "compiling" not in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_resuming_with_another_config_names_the_field(finished, monkeypatch):
    workdir, _ = finished
    before = (workdir / "config.json").read_bytes()
    monkeypatch.setattr(loop.text, "load", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(checkpoint.ConfigMismatch, match="d_model: saved 16, now 32"):
        loop.train(config("model.d_model=32"), workdir, resume=True)
    assert (workdir / "config.json").read_bytes() == before


def test_nan_stops_and_names_the_step(tmp_path):
    """A step that blows up moves nothing; what stood before it is saved."""
    diverging = config(
        "optimizer.rule=sgd",
        "optimizer.learning_rate=1e38",
        "optimizer.clip_norm=none",
        "optimizer.warmup_steps=0",
        "train.checkpoint_every=1",
        "guard.returns=0",
    )
    with pytest.raises(loop.NonFinite, match=r"Step (\d+): .*(nan|inf)") as caught:
        loop.train(diverging, tmp_path)
    step = int(str(caught.value).split()[1].rstrip(":"))
    assert f"keeps the checkpoint of step {step}" in str(caught.value)
    logged = metrics.read_log(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in logged] == list(range(1, step))
    saved = checkpoint.restore_params(tmp_path).params
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(saved))


def test_an_update_that_is_nan_is_not_saved_either(tmp_path, monkeypatch):
    """Loss and gradient of step 3 are fine: parameters would be NaN after it."""
    made = loop.optim.build

    def poisoned(*arguments, **named):
        def factor(count):
            return jnp.where(count == 2, jnp.float32(jnp.nan), jnp.float32(1.0))

        assert named["mesh"].size == jax.device_count()  # the work is shared
        return optax.chain(made(*arguments, **named), optax.scale_by_schedule(factor))

    monkeypatch.setattr(loop.optim, "build", poisoned)
    every = config("train.checkpoint_every=1", "guard.returns=0")
    with pytest.raises(loop.NonFinite, match="Step 3: update_norm is nan.*of step 3"):
        loop.train(every, tmp_path)
    saved = checkpoint.restore_params(tmp_path).params
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(saved))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.batch=6"], r"batch \(6\) must be a multiple of the 4 devices"),
        (["model.vocab=256"], r"model.vocab \(256\) must be .* set model.vocab=257"),
        (["train.seq_len=30000", "model.mixer.context=30000"], "(?s)seq_len=30000"),
        (
            ["train.seq_len=32"],
            r"train.seq_len \(32\) and model.mixer.context \(16\) must be the same: .* "
            "Set model.mixer.context=32, or train.seq_len=16",
        ),
        (
            ["model.cms.levels.0.rate=0.1"],
            r"train.seq_len \(16\) must be more than the fastest period .* \(48\)",
        ),
        (
            ["train.validate_every=1", "train.batch=4000"],
            "rows of seq_len=16, fewer",
        ),
        (["optimizer.rule=adamv"], "optimizer.rule must be one of .* got 'adamv'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        loop.train(config(*settings), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_bpe_is_trained_once_and_kept(tmp_path):
    bpe = config(
        "data.tokenizer=bpe", "data.vocab=300", "model.vocab=300", "train.steps=2"
    )
    loop.train(bpe, tmp_path)
    kept = checkpoint.restore_tokenizer(tmp_path)
    assert kept.vocab_size == 300
    source = loop.load_source(bpe, tmp_path)
    assert source.tokenizer == kept
    assert source.bytes_per_token > 1


def test_it_starts_where_it_is_told(tmp_path):
    """And leaves what it was given as it is; resumed it is where it stopped."""
    one = config(
        "train.steps=1", "optimizer.warmup_steps=0", "train.checkpoint_every=1"
    )
    one = config_lib.override(one, ["optimizer.learning_rate=1e-5"])
    _, params = lm.build(one.model, jax.random.key(77))
    loop.train(one, tmp_path / "a", params=params)
    after = checkpoint.restore_params(tmp_path / "a").params
    far = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), after, params)
    assert 0 < max(jax.tree.leaves(far)) < 1e-4
    wide = config_lib.override(one, ["model.cms.hidden=24"])
    with pytest.raises(
        ValueError, match=r"levels.0.mlp.down.kernel is \(\(1, 16, 16\)"
    ):
        loop.train(wide, tmp_path / "b", params=params)
    assert not (tmp_path / "b").exists()


def test_a_run_goes_on_with_the_tokenizer_of_a_file(tmp_path):
    """Which may be gone by then."""
    train_bpe([b"the cat and the hat"], 260).save(tmp_path / "ours.json")
    said = json.loads((tmp_path / "ours.json").read_text())
    said["added_tokens"][0]["content"] = "<s>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    run = config("train.steps=2", "model.vocab=260")
    run = config_lib.override(run, [f"data.tokenizer={tmp_path / 'tokenizer.json'}"])
    loop.train(run, tmp_path / "run")
    (tmp_path / "tokenizer.json").unlink()
    kept = checkpoint.restore_tokenizer(tmp_path / "run")
    assert isinstance(kept, PretrainedTokenizer) and kept.bos == 259
    assert loop.load_source(run, tmp_path / "run").tokenizer == kept
    assert loop.train(run, tmp_path / "run", resume=True).finished
    with pytest.raises(ValueError, match="tokenizer must be bytes, bpe or the path of"):
        config("data.tokenizer=words")
