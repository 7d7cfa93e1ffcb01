"""Rows of one size that lack one thing each; what was asked is written and told."""

import dataclasses
import math

import pytest

from experiments import lab, small_lm
from hope_jax.core import config as config_lib
from hope_jax.models import lm
from hope_jax.train import loop
from hope_jax.train.config import check_rows
from hope_jax.train.metrics import read_result


@pytest.mark.parametrize("scale", ["full", "smoke"])
def test_rows_are_of_one_size_and_differ_in_the_model_alone(scale):
    rows = small_lm.rows(scale)
    wanted = small_lm.SCALES[scale].parameters
    first = next(iter(rows.values()))
    for name, config in rows.items():
        more = 1.15 if name.endswith("_115") else 1.0
        size = lm.count_parameters(config.model)
        assert abs(size - more * wanted) <= 0.02 * more * wanted, name
        check_rows(config)
        same = dataclasses.replace(config, row=first.row, model=first.model)
        assert same == first
    assert len({config.model for config in rows.values()}) == len(rows) == 16


def test_each_row_of_table_6_lacks_one_thing():
    models = small_lm.models("full")
    whole = config_lib.to_json(models["whole"])
    lacks = {}
    for name, model in models.items():
        if name.startswith("whole_no_"):
            lines = config_lib.differences(whole, model)
            fields = {line.partition(":")[0] for line in lines} - {"cms.hidden"}
            lacks[name.removeprefix("whole_no_")] = {f.split(".")[-1] for f in fields}
    levels = lacks.pop("cms")
    assert levels >= {"rates"} and models["whole_no_cms"].fast == ()
    assert lacks == {
        "dgd": {"dgd"},
        "momentum": {"rule"},
        "retention": {"retention", "toward"},
        "k": {"adaptive_k"},
        "v": {"adaptive_v"},
        "q": {"adaptive_q"},
    }
    assert set(small_lm.PAPER) == {*lacks, "cms"}
    assert models["whole"].mixer.memory.inertia and len(models["whole"].fast) == 3


def test_each_control_differs_in_one_thing():
    models, controls = small_lm.models("full"), small_lm.controls("full")
    wanted = {
        "delta_narrow": ("hope_delta", {"hidden"}, "hope"),
        "hope_wide": ("hope", {"hidden"}, "hope_delta"),
        "matrix_wide": ("hope_matrix", {"hidden"}, "hope_delta"),
        "hope_expansion_1": ("hope", {"hidden", "expansion"}, None),
        "matrix_static": ("hope_matrix", {"hidden", "adaptive_k", "adaptive_v"}, None),
        "matrix_slice": ("hope_matrix", {"hidden", "inputs"}, None),
    }
    assert set(controls) == set(wanted)
    for name, (of, fields, as_wide) in wanted.items():
        lines = config_lib.differences(models[of], controls[name])
        assert {ln.partition(":")[0].split(".")[-1] for ln in lines} == fields, name
        if as_wide:
            assert controls[name].cms.hidden == models[as_wide].cms.hidden
        else:
            size = lm.count_parameters(controls[name])
            assert size == pytest.approx(small_lm.SCALES["full"].parameters, rel=0.02)


def test_a_smoke_run_writes_results_and_tables(tmp_path, capsys, monkeypatch):
    row = "library_gated_delta_net"
    flags = ["--scale=smoke", f"--out={tmp_path}", f"--rows={row}", "--seeds=1"]
    tried = []
    trained = lab.trained

    def train(config, folder):
        tried.append((config.seed, folder.name))
        if config.seed == 0:  # chooses the rate
            return [{"step": 1, "bits_per_byte": 8.0}]
        return trained(config, folder)

    evaluate = small_lm.language_model.evaluate

    def overflows(*arguments, modes):
        if modes == ("frozen",):
            raise FloatingPointError("not finite")
        return evaluate(*arguments, modes=modes)

    first_readings = small_lm.ablation.first_readings

    def some_overflow(*arguments):
        return {
            name: costs * math.nan if name == "main memory off" else costs
            for name, costs in first_readings(*arguments).items()
        }

    monkeypatch.setattr(lab, "trained", train)
    monkeypatch.setattr(small_lm.language_model, "evaluate", overflows)
    monkeypatch.setattr(small_lm.ablation, "first_readings", some_overflow)
    flags += [f"--workdir={tmp_path / 'runs'}"]
    made = small_lm.main(flags)
    found = read_result(tmp_path / "small_lm" / f"{row}-s1.json")
    m = found["metrics"]
    assert tried == [(0, f"{row}-s0-0.001"), (1, f"{row}-s1-0.001")]
    assert found["config"]["run"]["seed"] == 1 and m["rate"] == 1e-3
    for mode in ("reset", "carried"):
        assert 1 < m[f"perplexity/{mode}"] < 300
    assert m["overflow/frozen"] == 1.0 and "bits/frozen" not in m
    # A byte is a token here.
    assert m["bits/reset"] == pytest.approx(math.log2(m["perplexity/reset"]), rel=0.01)
    ends = m["position/all learn/0-64"], m["position/all learn/64-256"]
    assert m["part/all learn"] == pytest.approx((ends[0] + 3 * ends[1]) / 4)
    assert m["overflow/main memory off"] == 1.0 and "part/main memory off" not in m
    assert m["part/nothing learns"] != m["part/all learn"]
    assert "part/all CMS off" not in m
    (line,) = (text for text in made.splitlines() if "gated_delta_net" in text)
    whole = [f"{m[f'perplexity/{mode}']:.1f}" for mode in ("reset", "carried")]
    seen, still = f"{m['part/all learn']:.2f}", f"{m['part/nothing learns']:.2f}"
    cells = ["gated_delta_net", "1", f"{m['parameters']:,}", *whole, "overflow", seen]
    assert line == f"| {' | '.join([*cells, '', still])} |"
    capsys.readouterr()
    assert small_lm.main(flags) == made  # nothing is trained or asked again
    assert "step" not in capsys.readouterr().out


def test_plays_that_are_not_there_are_asked_for(tmp_path):
    flags = ["--group=plays", f"--data_dir={tmp_path}", f"--workdir={tmp_path / 'w'}"]
    with pytest.raises(ValueError, match="has no tinyshakespeare/input.txt: give"):
        small_lm.main([*flags, "--scale=smoke", f"--out={tmp_path / 'out'}"])
    assert list(tmp_path.iterdir()) == []


def test_the_best_finite_rate_is_taken(monkeypatch, tmp_path):
    config = small_lm.rows("smoke")["library_transformer"]

    def train(config, folder):
        rate = config.optimizer.learning_rate
        assert folder.name == f"row-{rate:g}"
        if rate == 1.0:
            raise loop.NonFinite("diverged")
        return [{"step": 1, "bits_per_byte": 9.0}, {"step": 2, "bits_per_byte": rate}]

    monkeypatch.setattr(lab, "trained", train)
    made, folder = lab.best_rate(config, tmp_path / "row", (0.5, 0.25, 1.0))
    assert folder == tmp_path / "row-0.25"
    assert made == {"training/0.5": 4.75, "training/0.25": 4.625, "rate": 0.25}
    assert lab.best_rate(config, tmp_path / "row", (1.0,)) == ({}, None)


def test_evidence_by_hand():
    def result(row, perplexity):
        metrics = {"perplexity/reset": perplexity}
        return {"row": f"library_{row}", "seed": 0, "metrics": metrics}

    found = [result("hope", 50.0), result("gated_delta_net", 40.0)]
    (line,) = small_lm.evidence(found)
    assert line.result == "whole: 1.25" and line.distance == "whole: +0.49"
    assert line.paper == "whole: 0.76 (over DeltaNet's, 760M)"
    near = [("hope", 5.0, 3.0), ("gated_delta_net", 3.0, 3.0)]  # of 64 and 192 tokens
    for made, (_, begin, rest) in zip(found, near, strict=True):
        ends = {"0-64": begin, "64-256": rest}
        made["metrics"] |= {f"position/all learn/{k}": v for k, v in ends.items()}
    (line,) = small_lm.evidence(found)
    assert line.result == f"whole: 1.25, first 256 tokens: {math.exp(0.5):.2f}"
    assert line.paper == "whole: 0.76 (over DeltaNet's, 760M)"
    pairs = [("library_hope", 50.0), ("why_delta_narrow", 25.0)]
    *_, last = small_lm.evidence([result("", p) | {"row": row} for row, p in pairs])
    assert "as narrow as Hope's" in last.what and last.result == "2.00"
    assert last.command == "small_lm --group=why --workdir=DIR"
    found += [result("whole", 100.0)]
    found += [result(f"whole_no_{part}", 110.0) for part in small_lm.PAPER]
    *_, line = small_lm.evidence(found)
    assert line.result.startswith("dgd 1.10, momentum 1.10, ")
    assert line.paper.startswith("dgd 1.10, momentum 1.11, ")
    # |1.1 - 13.41/12.24| and so on, over seven.
    assert line.distance == "0.03 on average"
