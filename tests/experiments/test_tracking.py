"""Formal languages and words of groups: rows, smoke runs, and what is chosen."""

import dataclasses
import types

import numpy as np
import pytest

from experiments import state_tracking, table5_formal_languages
from hope_jax.core import config as config_lib
from hope_jax.data.synthetic.formal import LANGUAGES
from hope_jax.evaluate import probe
from hope_jax.models.mixers.self_modifying import SelfModifyingConfig
from hope_jax.train.metrics import read_result

FORMAL, WORDS = table5_formal_languages, state_tracking
GROUPS = [(FORMAL, g) for g in ("table5", "chunks", "longer")] + [(WORDS, None)]


def rows(module, group, scale="full"):
    return module.rows(types.SimpleNamespace(group=group, scale=scale))


@pytest.mark.parametrize(("module", "group"), GROUPS)
def test_every_row_has_a_model_and_the_same_budget(module, group):
    made = rows(module, group)
    budgets = set()
    for row in made.values():
        model = probe.model_for(row.probe, row.mixer)
        assert model.vocab == row.probe.task.vocab and not model.fast
        budgets.add((row.probe.steps, row.probe.batch, row.probe.d_model, row.rates))
        saved = config_lib.to_json(row)
        assert config_lib.from_json(type(row), saved) == row
    assert len(budgets) == 1


def test_controls_of_state_tracking_differ_in_one_thing():
    made = rows(WORDS, None)
    assert set(WORDS.SHOWN) <= set(WORDS.MODELS)
    for name, of, fields in (
        ("delta_product_kept_to_2", "delta_product_to_2", {"retention", "recall"}),
        ("hope_2_kept_to_2", "hope_2_to_2", {"retention", "toward"}),
        ("hope_2_static_to_1", "hope_2_to_1", {"adaptive_k", "adaptive_v"}),
    ):
        lines = config_lib.differences(made[f"s3_{of}"], made[f"s3_{name}"])
        assert {ln.partition(":")[0].split(".")[-1] for ln in lines} == fields, name
    result = {"row": "s3_hope_2_to_1", "seed": 0, "metrics": {"accuracy": 0.5}}
    (line,) = WORDS.evidence([result])
    assert line.result == "of 128: 0.500"
    assert "two keys a token and rates to 1" in line.what


def test_rows_of_table_5():
    made = rows(FORMAL, "table5")
    assert len(made) == len(LANGUAGES) * len(FORMAL.MODELS)
    for name, row in made.items():
        assert name.startswith(row.probe.task.language)
        if isinstance(row.mixer, SelfModifyingConfig):
            assert row.mixer.memory.chunk == 1
            # Either may turn round what is stored along a key.
            assert row.mixer.rate_bound == 2.0 or row.mixer.erase == "gate"
    lengths = [(2, 50), *FORMAL.BINS.values()]
    assert all(a[1] < b[0] for a, b in zip(lengths, lengths[1:], strict=False))


def test_longer_rows_are_the_first_ones_with_more_words():
    first, longer = (rows(FORMAL, group) for group in ("table5", "longer"))
    assert len(longer) == len(FORMAL.COUNTING) * len(FORMAL.MODELS)
    for name, row in longer.items():
        base, _, times = name.rpartition("_")
        own = first[base].probe
        assert times == f"{FORMAL.LONGER}x" and row.mixer == first[base].mixer
        own = dataclasses.replace(own, steps=FORMAL.LONGER * own.steps)
        assert row.probe == own and row.rates == first[base].rates[:1]


def test_rows_of_chunks_differ_in_one_thing_each():
    for name, row in rows(FORMAL, "chunks").items():
        memory = row.mixer.memory
        assert row.mixer.projection_chunk == memory.chunk
        assert f"_{memory.gradient}_{memory.chunk}" in name
        assert memory.gradient == "exact" or row.mixer.rate is None


@pytest.mark.parametrize(
    ("module", "chosen"),
    [(FORMAL, "parity_lstm"), (WORDS, "s3_lstm")],
)
def test_a_smoke_run_writes_results_and_a_table(module, chosen, tmp_path, capsys):
    flags = ["--scale=smoke", "--seeds=1", f"--rows={chosen}", f"--out={tmp_path}"]
    made = module.main(flags)
    for row in chosen.split(","):
        result = read_result(tmp_path / module.NAME / f"{row}-s1.json")
        assert 0.0 <= result["metrics"]["accuracy"] <= 1.0
        assert f"| {row.partition('_')[2]} | 1 | " in made
    capsys.readouterr()
    assert module.main(flags) == made  # nothing is trained again
    assert "seed 1" not in capsys.readouterr().out


def test_tables_by_hand():
    """Of a length each model with its seeds and the paper's number, then chunks."""

    def result(row, seed, **metrics):
        return {"row": row, "seed": seed, "metrics": metrics}

    gates = {"eta_least": 0.25, "eta_median": 0.5, "eta_most": 0.75}
    gates |= {"alpha_least": 0.1, "alpha_median": 0.9, "alpha_most": 1.0}
    found = [
        result("parity_hope", 0, whole=1.0, whole_bin1=0.5, whole_bin2=0.0),
        result("parity_hope", 1, whole=1.0, whole_bin1=1.0, whole_bin2=0.0),
        result("aa_star_b", 0, whole=0.25, whole_bin1=0.5, whole_bin2=0.0),
        result("aa_star_exact_2_rate_1", 0, whole_bin1=0.5, **gates),
        result("parity_exact_2_rate_1", 0, whole_bin1=1.0, **gates | {"eta_most": 1.0}),
    ]
    seen, longer, longest, chunks = FORMAL.table(found).split("\n\n")
    assert seen.splitlines()[2:] == [
        "| hope | 2 | 100.0 |  |  |  |  |  |",
        "| b | 1 |  | 25.0 |  |  |  |  |",
    ]
    assert longer.splitlines()[2] == (
        "| hope | 2 | 75.0 ± 25.0 (100.0) [100]" + 5 * " | [100]" + " |"
    )
    assert longest.splitlines()[2].startswith("| hope | 2 | 0.0 |")
    lost = result("parity_anchored_4", 0, whole=0.0, whole_bin1=0.0, whole_bin2=0.0)
    last = FORMAL.table([*found, lost]).splitlines()[-1]
    assert last == "| anchored_4 | 0.0 | 0.0 | 0.0 |  |  |  |  |  |"
    assert chunks.splitlines()[2] == (
        "| exact_2_rate_1 |  | 100.0 |  |  | 50.0 |  | "
        "0.25 to 1 (0.5) | 0.1 to 1 (0.9) |"
    )
    figure = FORMAL.draw(found)
    curves = [axes.get_lines() for axes in figure.axes]
    drawn = [
        [c.get_xydata().tolist() for c in of if len(c.get_xdata())] for of in curves
    ]
    assert drawn == [[[[2.0, 100.0]]] * 2, [[[2.0, 50.0]]] * 2]  # a curve and its dot
    assert FORMAL.draw(found[:3]) is None
    found = [
        result("s3_lstm", 0, accuracy=0.5, accuracy_longer=0.25),
        result("s3_lstm", 1, accuracy=1.0, accuracy_longer=0.25),
        result("s5_lstm", 0, accuracy=0.125, accuracy_longer=0.1),
    ]
    assert WORDS.table(found).splitlines()[2:] == [
        "| lstm | 2/1 | 0.750 ± 0.250 (1.000) | 0.250 | 0.125 | 0.100 |"
    ]


def test_the_rate_with_the_least_loss_is_chosen(monkeypatch):
    """Of the task alone, and never one that was not finite."""
    losses, enough = {1.0: 0.5, 0.1: 0.4, 0.01: None, 0.001: 0.6}, 0.3

    def train(config, model, seed, also, ask):
        rate = config.optimizer.learning_rate
        score = {"accuracy": 0.9, "whole": rate, "loss": losses[rate]}
        longer = {"accuracy_b": 0.1, "whole_b": rate, "loss_b": None if rate < 1 else 0}
        ended = {"steps": config.steps, "enough": losses[rate] == enough}
        return score | longer | ended | {"seconds": 1.0, "asked": {"of": rate}}

    monkeypatch.setattr(probe, "train", train)
    config = rows(FORMAL, "table5", "smoke")["parity_lstm"].probe
    config = dataclasses.replace(config, steps=3, batch=5)
    made = probe.tuned(config, None, 0, tuple(losses), {"b": config.task})
    assert made["rate"] == 0.1 and made["whole"] == 0.1 and made["finite"] == 1.0
    assert made["whole_b"] == 0.0 and "loss_b" not in made  # it grew without bound
    assert "loss_at_0.01" not in made and made["seconds_at_0.01"] == 1.0
    assert made["rows"] == 15.0 and made["of"] == 0.1
    losses[0.1] = 0.3  # and then no other rate is tried
    made = probe.tuned(config, None, 0, tuple(losses), {"b": config.task})
    assert made["rate"] == 0.1 and "seconds_at_0.01" not in made
    losses |= dict.fromkeys(losses)
    made = probe.tuned(config, None, 0, tuple(losses), {"b": config.task})
    assert made["finite"] == made["whole"] == 0.0 and "rate" not in made
    assert "of" not in made
    assert all(np.isfinite(value) for value in made.values())
