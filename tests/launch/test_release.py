"""What is handed out comes back: the same logits, or it is refused and nothing is
touched."""

import json
import shutil
import subprocess

import jax
import numpy as np
import pytest

from hope_jax import restore
from hope_jax.core import config as config_lib
from hope_jax.data.tokenizer import train_bpe
from hope_jax.train import checkpoint, loop, metrics, release
from launch import evaluate, generate, train
from launch import release as program
from tests.launch.test_evaluate import refusal
from tests.train import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "tiny"
    text = workdir.with_name("mine.txt")
    text.write_text("".join(f"line {i} of what I wrote\n" for i in range(400)))
    config = tiny.rows("smoke")["tiny"]
    config = config_lib.override(config, [f"data.path={text}"])
    assert loop.train(config, workdir).finished
    return workdir


@pytest.fixture(scope="module")
def scores(trained, tmp_path_factory):
    """Result files of this run and of another, in one folder."""
    folder, config = tmp_path_factory.mktemp("scores"), restore(trained).config
    found = {"bits_per_byte_reset": 6.125, "bits_per_byte_frozen": 6.25, "bytes": 4000}
    for row, more in (("tiny", {}), ("other", {"seed": 1})):
        metrics.write_result(
            folder,
            experiment="tiny",
            row=row,
            scale="smoke",
            seed=0,
            config=json.loads((trained / loop.CONFIG).read_text()) | more,
            metrics=found,
        )
    assert config.experiment == "tiny"
    return folder


@pytest.fixture(scope="module")
def released(trained, scores, tmp_path_factory):
    out = tmp_path_factory.mktemp("released") / "tiny"
    flags = [f"--checkpoint={trained}", f"--out={out}", "--licence=Apache-2.0"]
    program.main([*flags, f"--results={scores}"])
    return out


@pytest.fixture
def copied(released, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(released, tmp_path / "copy")


def logits(opened):
    reader, tokens = opened.reader, np.arange(16, dtype=np.int32)[None] + 97
    start = reader.initial_state(opened.params, 1)
    return np.asarray(reader.apply(opened.params, tokens, start, True, True)[0])


def fails(*arguments):
    return refusal(program, *arguments)


def test_one_line_gives_the_same_logits_bit_for_bit(trained, released):
    ours, theirs = restore(released), restore(trained)
    np.testing.assert_array_equal(logits(ours), logits(theirs))
    assert ours.step == theirs.step == 12
    assert ours.tokenizer == theirs.tokenizer
    assert ours.config.model == theirs.config.model
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_who_may_read_one_file_may_read_all(released):
    assert (
        len({path.stat().st_mode for path in released.iterdir() if path.is_file()}) == 1
    )


def test_float16_is_near(trained, released, tmp_path, capsys):
    """Within a hundredth of the largest logit; the card says a thousandth or so."""
    out, whole = tmp_path / "half", logits(restore(trained))
    flags = [f"--out={out}", "--licence=CC-BY-4.0", "--dtype=float16"]
    program.main([f"--checkpoint={released}", *flags])  # a release of a release
    half = logits(restore(out))
    assert 0 < np.abs(half - whole).max() < 1e-2 * np.abs(whole).max()
    sizes = [
        (folder / "model.safetensors").stat().st_size for folder in (released, out)
    ]
    assert sizes[1] < 0.6 * sizes[0]
    about = [json.loads((f / release.ABOUT).read_text()) for f in (released, out)]
    assert about[0]["training"] == about[1]["training"]
    assert "rounded to float16" in (out / "README.md").read_text()


def test_the_card_says_what_config_log_and_results_say(trained, released):
    card = (released / "README.md").read_text()
    last = metrics.read_log(trained / "metrics.jsonl")[-1]["bits_per_byte"]
    for said in (
        "# tiny, tiny",
        "licence Apache-2.0",
        "| text | mine.txt, SHA-256 `",
        f"{restore(released).config.model.kinds}",
        "12 steps of 4 rows of 16 tokens: 768 tokens",
        f"{last:.3f} bits a byte of training",
        "| `results/tiny-tiny-s0.json` | 4,000 | 6.125 |  | 6.250 |",
        "hope_jax.restore(",
        checkpoint.saved_meta(trained)["fingerprint"]["corpus"],
    ):
        assert said in card, said
    names = release.files(released)
    assert "results/tiny-other-s0.json" not in names  # of another seed
    assert {"config.json", "metrics.jsonl", "tokenizer.json"} < {*names}
    whole = "".join(
        path.read_text() for path in released.rglob("*") if path.suffix == ".json"
    )
    assert str(trained.parent) not in whole + card


def test_sums_are_those_of_sha256sum(released):
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=released, check=True)
    program.main([f"--verify={released}"])
    assert {*release.verify(released)} == {*release.files(released)} - {"SHA256SUMS"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
def test_a_file_that_changed_is_named(copied, name):
    data = bytearray((copied / name).read_bytes())
    data[-2] ^= 1
    (copied / name).write_bytes(bytes(data))
    assert f"{name}' is not the file that was released" in fails(f"--verify={copied}")
    if name == "README.md":  # which says nothing of the model
        assert restore(copied).step == 12
    else:
        with pytest.raises(checkpoint.Damaged, match="is not the file"):
            restore(copied)
        said = refusal(generate, f"--checkpoint={copied}")
        assert "is not the file that was released" in said


def test_what_is_missing_too_much_or_leads_out_is_named(copied):
    (copied / "more.txt").write_text("mine")
    assert "'more.txt', which SHA256SUMS does not list" in fails(f"--verify={copied}")
    (copied / "tokenizer.json").unlink()
    assert "tokenizer.json' is missing" in fails(f"--verify={copied}")
    with (copied / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  ../outside\n")
    assert "has a line" in fails(f"--verify={copied}")
    assert "is no release" in fails(f"--verify={copied / 'results'}")


def test_weights_of_another_model_are_refused(copied):
    said = json.loads((copied / "config.json").read_text())
    said["model"]["cms"]["hidden"] *= 2
    (copied / "config.json").write_text(json.dumps(said))
    release.seal(copied)
    with pytest.raises(checkpoint.Damaged, match=r"levels.0.mlp.* is \(1, 16, 16\)"):
        restore(copied)


def test_only_a_release_as_it_was_is_replaced(trained, copied, tmp_path):
    flags = [f"--checkpoint={trained}", "--licence=MIT"]
    program.main([*flags, f"--out={copied}"])
    assert "licence MIT" in (copied / "README.md").read_text()
    assert not (copied / "results").exists()
    assert [path.name for path in copied.parent.iterdir()] == ["copy"]
    (copied / "README.md").write_text("edited by hand")
    assert "did not write" in fails(*flags, f"--out={copied}")
    assert (copied / "README.md").read_text() == "edited by hand"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("notes")
    assert "did not write" in fails(*flags, f"--out={tmp_path / 'mine'}")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_release_that_cannot_be_put_in_place_leaves_the_one_before(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("before")
    with pytest.raises(OSError):
        program._replace(tmp_path / "out", tmp_path / "none", tmp_path / "old")
    assert (tmp_path / "out" / "kept").read_text() == "before"


def test_mistakes_are_told_before_anything_is_made(trained, scores, tmp_path):
    out, run = f"--out={tmp_path / 'out'}", f"--checkpoint={trained}"
    assert "Give --licence" in fails(run, out)
    assert "must be a name of SPDX" in fails(run, out, "--licence=a\nb")
    fine = [run, out, "--licence=MIT"]
    other = scores / "tiny" / "other-s0.json"
    assert "seed: saved 1, now 0" in fails(*fine, f"--results={other}")
    assert "nothing is there" in fails(*fine, f"--results={tmp_path / 'none'}")
    assert "holds no result of this run" in fails(*fine, f"--results={tmp_path}")
    assert "No checkpoint in" in fails(f"--checkpoint={tmp_path}", *fine[1:])
    assert list(tmp_path.iterdir()) == []


def test_weights_that_float16_cannot_hold_are_refused(trained, tmp_path):
    config, _, params, tokens, step = restore(trained)
    large = jax.tree.map(lambda a: a + 1e5, params)
    with pytest.raises(ValueError, match="not finite in float16: its largest is 1000"):
        release.write(tmp_path, config, large, tokens, step=step, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_added_to_a_release(released):
    said = refusal(evaluate, f"--checkpoint={released}", "--ablate")
    assert "Give --output, a folder" in said


def test_a_run_begins_with_it(trained, released, tmp_path, capsys):
    """As with the run that it was made of, whose config, tokens and digest it has; what
    is released of that run says so, without paths."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 200)
    more = [f"--data={text}", "--set=train.steps=1", "--set=optimizer.warmup_steps=0"]
    runs = tmp_path / "a", tmp_path / "b"
    for origin, workdir in zip((trained, released), runs, strict=True):
        line = [f"--init_from={origin}", f"--workdir={workdir}", *more]
        assert train.main(line) == 0
    assert f"starts at step 12 of {released}" in capsys.readouterr().out
    ours, theirs = (restore(folder).params for folder in runs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    (a,), (b,) = (checkpoint.saved_meta(folder)["lineage"] for folder in runs)
    assert a["origin"].pop("path") == str(trained)
    assert b["origin"].pop("path") == str(released)
    assert a == b and b["event"] == "branched" and b["origin"]["step"] == 12

    out = tmp_path / "again"
    program.main([f"--checkpoint={runs[1]}", f"--out={out}", "--licence=MIT"])
    (said,) = json.loads((out / release.ABOUT).read_text())["training"]["lineage"]
    assert said == b | {"origin": b["origin"] | {"path": released.name}}
    card = (out / "README.md").read_text()
    assert (
        f"step 12 of `tiny`, SHA-256 of its parameters `{b['origin']['sha256']}`"
        in card
    )
    assert "a parameter since it began with another model" in card
    assert "began with" not in (released / "README.md").read_text()


def test_a_run_begins_with_its_tokens(tmp_path):
    """Wherever the file lies that the first run had them from."""
    text = "".join(f"line {i} of what I wrote\n" for i in range(400)).encode()
    kept = tmp_path / "kept.json"
    train_bpe([text], 300).save(kept)
    (tmp_path / "text.txt").write_bytes(text)
    settings = [
        f"data.path={tmp_path / 'text.txt'}",
        "model.vocab=300",
        "train.steps=1",
    ]
    settings += ["optimizer.warmup_steps=0", f"data.tokenizer={kept}"]
    config = config_lib.override(tiny.rows("smoke")["tiny"], settings)
    loop.train(config, tmp_path / "run")
    out = program.make(tmp_path / "run", tmp_path / "out", licence="MIT")
    kept.unlink()
    line = [f"--init_from={out}", f"--data={tmp_path / 'text.txt'}"]
    assert train.main([*line, f"--workdir={tmp_path / 'next'}"]) == 0
    assert restore(tmp_path / "next").tokenizer == restore(out).tokenizer


def test_no_run_begins_with_what_was_changed(copied, tmp_path, capsys):
    with (copied / "model.safetensors").open("ab") as file:
        file.write(b"x")
    line = [f"--init_from={copied}", f"--workdir={tmp_path / 'no'}"]
    assert train.main(line) == 1
    assert "is not the file that was released" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_no_run_is_trained_in_it(released, capsys):
    before = release.verify(released)
    for how in (["--resume"], ["--experiment=tests.train.tiny", "--scale=smoke"]):
        assert train.main([f"--workdir={released}", *how]) == 1
        assert f"--init_from={released}" in capsys.readouterr().err
    assert release.verify(released) == before
