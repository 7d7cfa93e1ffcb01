"""The page of a run says what the run says of itself, and fetches nothing."""

import json
import re
from html.parser import HTMLParser

import pytest

from launch import report


def run(folder, name="mine", **more):
    (folder / "checkpoints" / "20").mkdir(parents=True)
    config = {"experiment": "x", "row": f"<{name}>", "train": {"steps": 30}}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {
            "step": step,
            "loss": 5.0 - step / 10,
            "bits_per_byte": 7.25 - step / 10,
            "grad_norm": 1.0,
            "update_norm/mixer": 0.125,
            "tokens": 1000 * step,
        }
        for step in range(1, 21)
    ]
    lines[-1] |= more
    (folder / "hosts").mkdir()
    host = {"step": 20, "goodput": 0.8125, "at": 1.0}
    (folder / "hosts" / "0.jsonl").write_text(json.dumps(host) + "\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(o) + "\n" for o in lines))
    return folder


def test_a_page_of_two_runs(tmp_path, capsys):
    one = run(tmp_path / "a" / "run", "one", validation_bits_per_byte=6.0625)
    two = run(tmp_path / "b" / "run", "two")
    before = sorted(path.name for path in two.rglob("*"))
    report.main([f"--workdir={one}", f"--workdir={two}", f"--out={tmp_path}/r.html"])
    assert f"wrote {tmp_path}/r.html" in capsys.readouterr().out
    page = (tmp_path / "r.html").read_text()
    assert sorted(path.name for path in two.rglob("*")) == before
    HTMLParser().feed(page)
    for said in (
        "a/run",
        "b/run",
        "20,000",
        "6.062",
        "0.125",
        "0.8125",
        "Checkpoints: 20.",
        "&lt;one",
    ):
        assert said in page, said
    assert "<one>" not in page
    assert len(re.findall("src=", page)) == len(re.findall("data:image/png", page)) == 3
    assert "http" not in page


def test_what_is_no_run_is_named(tmp_path, capsys):
    def fails(*arguments):
        with pytest.raises(SystemExit) as error:
            report.main(arguments)
        return str(error.value)

    assert "Give --workdir" in fails()
    assert f"'{tmp_path}' is no folder of a run" in fails(f"--workdir={tmp_path}")
    (tmp_path / "config.json").write_text("{")
    assert "config.json' is no JSON" in fails(f"--workdir={tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    assert "has logged no step yet" in fails(f"--workdir={tmp_path}")
