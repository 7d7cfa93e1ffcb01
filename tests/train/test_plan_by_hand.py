"""What a run is said to cost, against arithmetic on paper for the tiny model: one layer
of width 16, two heads, an MLP of 16 hidden units, 257 entries, rows of 16 tokens."""

import pytest

from hope_jax.core.config import override
from hope_jax.train import plan
from tests.train import tiny

SMOKE = tiny.rows("smoke")["tiny"]
EMBEDDING, NORMS = 257 * 16, 3 * 16
QKV, OUT = 3 * 16 * 16, 16 * 16  # q, k and v are one array, in which no head is apart
MLP = 3 * 16 * 16  # which moves every third step, by the mean of its gradients
MATRICES = QKV + OUT + MLP


@pytest.fixture(scope="module")
def one():
    return plan.plan(SMOKE, 1)


@pytest.mark.parametrize(
    ("mesh", "kept"),
    [
        ("", EMBEDDING + MATRICES + NORMS),
        ("fsdp:2", EMBEDDING // 2 + MATRICES // 2 + NORMS),
        ("tensor:2", EMBEDDING + QKV + (OUT + MLP) // 2 + NORMS),  # 257 is odd
        ("fsdp:2,tensor:2", (EMBEDDING + QKV) // 2 + (OUT + MLP) // 4 + NORMS),
    ],
)
def test_bytes_of_parameters(mesh, kept):
    said = plan.plan(override(SMOKE, [f"train.mesh={mesh}"]), 4)
    assert said.parameters == EMBEDDING + MATRICES + NORMS == 5952
    assert said.params == 4 * kept
    # A device of four that share rows alone hands on the gradient of all it has.
    assert (
        said.gradient
        == (4 * 5952 // (2 if "tensor" in mesh else 1), 4 * kept)["fsdp" in mesh]
    )


def test_bytes_of_optimizer_and_checkpoint(one):
    """Two moments of each parameter, a sum for the MLP, and some counts."""
    assert 0 < one.optimizer - 4 * (2 * 5952 + MLP) < 100
    window = 4 * 2 * SMOKE.guard.window
    rest = one.checkpoint - one.params - one.optimizer - window
    assert 0 < rest < 64  # the key and counts


def test_bytes_of_the_states_of_rows(one):
    """Keys and values of the tokens read so far, of four rows, and where they are."""
    assert 0 <= one.rows - 4 * 2 * 4 * 16 * 16 < 256


def test_products_of_a_step(one):
    """Forward each token meets every matrix and the embedding, as the head; scores and
    means of values are of 16 tokens with 16. Backward makes two products of each."""
    forward = 2 * 16 * (MATRICES + EMBEDDING) + 2 * 2 * 16 * 16 * 16
    more = plan.plan(override(SMOKE, ["train.batch=8"]), 1)
    assert (one.tokens, more.tokens) == (4 * 16, 8 * 16)
    assert more.step_flops - one.step_flops == 4 * 3 * forward
    norms = 2 * 2 * 5952  # of gradients and updates, once a step
    assert one.step_flops == 4 * 3 * forward + norms


def test_tokens_a_second(one):
    machine = plan.Machine(devices=2, bytes=0, flops=1e12, topology="2x1")
    assert one.tokens_per_second(machine, 0.25) == pytest.approx(
        64 * 0.25 * 2e12 / one.step_flops
    )
