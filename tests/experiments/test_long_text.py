"""A run is read on and on, and what moved, or was gathered, is written down."""

import pytest

from experiments import accumulators, long_text, quickstart
from hope_jax.train import loop
from hope_jax.train.metrics import read_result


def test_a_run_is_read_to_its_end(tmp_path):
    config = quickstart.rows("smoke")["hope"]
    assert loop.train(config, tmp_path / "run").finished
    made = long_text.main(
        [f"--checkpoint={tmp_path / 'run'}", "--tokens=2048", f"--out={tmp_path}"]
    )
    saved = read_result(tmp_path / "long_text" / "hope-s0.json")["metrics"]
    assert saved == made | {"tokens": 2048}
    assert 0 < made["after 2048 tokens/nats"] < 10
    assert made["after 2048 tokens/main"] > 0 < made["after 2048 tokens/CMS 1"]

    made = accumulators.main(
        [f"--checkpoint={tmp_path / 'run'}", "--chunks=4", f"--out={tmp_path}"]
    )
    once, often = made["after 1 chunks/apart"], made["after 4 chunks/apart"]
    assert 0 < once < often < 2**-7  # 8 bits, rounded once and four times


def test_too_few_tokens_are_refused():
    with pytest.raises(SystemExit, match="--tokens=3: 3 is not integer >= 1024"):
        long_text.main(["--checkpoint=nowhere", "--tokens=3"])
