"""The two programs that read a checkpoint: launch.evaluate and launch.generate."""

import json
import shutil

import jax
import pytest

from experiments import quickstart
from hope_jax.core import config as config_lib
from hope_jax.data import tokenizer
from hope_jax.evaluate import ablation
from hope_jax.stream.reader import open_checkpoint
from hope_jax.train import checkpoint, loop, metrics
from hope_jax.train.config import RunConfig
from launch import evaluate, generate


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name in range(8):
        lines = [f"def f{i}(x): return x + {i * name}\n" for i in range(40)]
        (folder / f"{name}.py").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus_folder):
    """The workdir of a run of two steps."""
    config = config_lib.override(
        quickstart.rows("smoke")["transformer"], [f"data.path={corpus_folder}"]
    )
    workdir = tmp_path_factory.mktemp("run")
    assert loop.train(config, workdir).finished
    return workdir


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(trained, tmp_path / "copy")


def refusal(program, *arguments):
    with pytest.raises(SystemExit) as stopped:
        program.main(list(arguments))
    assert stopped.value.code != 0
    return str(stopped.value.code)


def test_prints_all_modes_and_writes_a_result(trained, tmp_path, capsys):
    evaluate.main([f"--checkpoint={trained}", f"--output={tmp_path}"])
    said = capsys.readouterr().out
    result = metrics.read_result(tmp_path / "quickstart" / "transformer-s0.json")
    for name in ("reset", "carried", "frozen", "gzip", "xz"):
        assert f"{result['metrics'][f'bits_per_byte_{name}']:.3f}" in said, name
    assert result["metrics"]["step"] == 2
    assert "wrote" in said and "sha256" in said


def test_scores_the_text_that_is_named(trained, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("what I wrote\n" * 40)
    arguments = [f"--checkpoint={trained}", f"--data={tmp_path / 'mine.txt'}"]
    evaluate.main([*arguments, "--rows=1"])
    assert "1 documents, 26 bytes" in capsys.readouterr().out
    evaluate.main([*arguments, "--split=all"])
    assert "2 documents, 520 bytes" in capsys.readouterr().out


@pytest.mark.parametrize("program", [evaluate, generate])
def test_a_setting_that_is_not_the_checkpoints_is_refused(program, trained):
    width = open_checkpoint(trained).config.model.d_model
    said = refusal(
        program, f"--checkpoint={trained}", f"--set=model.d_model={2 * width}"
    )
    assert f"model.d_model: saved {width}, now {2 * width}" in said


def test_a_setting_that_is_the_checkpoints_is_accepted(trained):
    width = open_checkpoint(trained).config.model.d_model
    opened = open_checkpoint(trained, [f"model.d_model={width}", "seed=0"])
    assert opened.step == 2


def test_the_context_of_a_trained_model_may_be_raised(trained):
    opened = open_checkpoint(trained, ["model.mixer.context=640"])
    assert opened.config.model.mixer.context == 640 > opened.config.train.seq_len
    same = jax.tree.map(
        lambda a, b: a.shape == b.shape, opened.params, open_checkpoint(trained).params
    )
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("program", [evaluate, generate])
def test_a_changed_config_file_is_refused(program, copied):
    path = copied / loop.CONFIG
    config = json.loads(path.read_text())
    config["train"]["seq_len"] = 48
    path.write_text(json.dumps(config))
    said = refusal(program, f"--checkpoint={copied}")
    assert "train.seq_len: saved 160, now 48" in said


@pytest.mark.parametrize("program", [evaluate, generate])
def test_another_tokenizer_is_refused(program, copied):
    other = tokenizer.train_bpe([b"abababab"], vocab_size=257)
    assert other.vocab_size == 257  # so that only the fingerprint tells
    other.save(copied / checkpoint.TOKENIZER)
    said = refusal(program, f"--checkpoint={copied}")
    assert "tokenizer" in said and other.fingerprint in said


@pytest.mark.parametrize("program", [evaluate, generate])
def test_a_missing_checkpoint_is_named(program, tmp_path):
    said = refusal(program, f"--checkpoint={tmp_path / 'nothing'}")
    assert "No checkpoint in" in said and "nothing" in said


def test_bad_arguments_are_named(trained):
    said = refusal(evaluate, f"--checkpoint={trained}", "--rows=0")
    assert "rows must be at least 1, got 0" in said
    said = refusal(evaluate, f"--checkpoint={trained}", "--data=/no/such/text")
    assert "/no/such/text" in said
    for argument, message in (
        (
            "--temperature=-1",
            "temperature must be a finite number, 0 (greedy) or above",
        ),
        ("--top_k=0", "top_k must be at least 1"),
        ("--tokens=0", "tokens must be at least 1, got 0"),
    ):
        assert message in refusal(generate, f"--checkpoint={trained}", argument)


def test_generates_text_after_the_prompt(trained, capsys):
    def said(*arguments):
        generate.main([f"--checkpoint={trained}", "--tokens=24", *arguments])
        return capsys.readouterr().out

    text_ = said("--prompt=def ", "--top_k=50", "--seed=1")
    assert text_.startswith("def ") and len(text_) > len("def \n")
    assert text_ == said("--prompt=def ", "--top_k=50", "--seed=1")
    assert text_ != said("--prompt=def ", "--top_k=50", "--seed=2")
    greedy = said("--prompt=def ", "--temperature=0")
    assert greedy == said("--prompt=def ", "--temperature=0", "--seed=9")
    assert said().endswith("\n")  # an empty prompt starts a document


def test_ablation_prints_every_row_and_saves_the_numbers(trained, tmp_path, capsys):
    evaluate.main(
        [
            *(f"--checkpoint={trained}", f"--output={tmp_path}", "--ablate"),
            *("--ablate_rows=2", "--ablate-tokens=128", "--ablate-facts=3"),
        ]
    )
    said = capsys.readouterr().out
    result = metrics.read_result(tmp_path / "ablation" / "transformer-s0.json")
    model = config_lib.from_json(RunConfig, result["config"]).model
    for row in ablation.rows(model):
        assert row.name in said and row.reason.rstrip(".") in said
        first = result["metrics"].get(f"{row.name}/first")
        assert (first is None) == (row.learn is None)
        if first is not None:
            assert f"{first:.3f}" in said
    mean, high = (
        result["metrics"][f"nothing learns/fact at 96/{what}"]
        for what in ("mean", "high")
    )
    assert f"{mean:.3f} ± {high - mean:.3f}" in said
    assert "facts at 1000 left out: they need 1032 tokens a text" in said


def test_ablation_refuses_one_fact(trained):
    said = refusal(evaluate, f"--checkpoint={trained}", "--ablate", "--ablate-facts=1")
    assert "ablate-facts must be at least 2, got 1" in said


@pytest.mark.parametrize("program", [evaluate, generate])
def test_a_model_without_chunks_is_not_read_with_others(program, trained):
    said = refusal(program, f"--checkpoint={trained}", "--rechunk=2")
    assert "rechunk (2) does not fit: attention has no chunk" in said
