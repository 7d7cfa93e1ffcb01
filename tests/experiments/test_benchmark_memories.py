"""The race of memories: what is raced, who agrees with whom, and what is written."""

import importlib.util
import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import memories, ours
from experiments.benchmarks.worker import Worker, WorkerError
from hope_jax.train.metrics import read_benchmark

# A peer in plain NumPy, token by token; it is wrong, or dies, where a test says so.
FAKE_PEER = """
import os
import numpy as np

def versions():
    return {"transformers": "0"}

def reset():
    pass

def build(spec, arrays):
    if spec["program"] == "canary":
        a = np.ones((spec["size"],) * 2, np.float32)
        return lambda: a @ a, lambda found: {}
    if os.environ["FAKE"] == "dies":
        os._exit(3)
    if spec["compiled"]:
        raise RuntimeError("no compiler here")

    def program():
        k, v, q, eta = (arrays[name] for name in ("k", "v", "q", "eta"))
        m = np.broadcast_to(arrays["w"], (k.shape[0], *arrays["w"].shape))
        y = np.zeros_like(v)
        for t in range(k.shape[2]):
            m = m * np.exp(arrays["decay"][:, :, t, None, None])
            error = v[:, :, t] - np.einsum("bhvk,bhk->bhv", m, k[:, :, t])
            error = error * eta[:, :, t, None]
            m = m + error[..., :, None] * k[:, :, t, None, :]
            y[:, :, t] = np.einsum("bhvk,bhk->bhv", m, q[:, :, t])
        return y * (1.01 if os.environ["FAKE"] == "wrong" else 1.0)

    return program, lambda y: {"y": y}
"""
SMALL = replace(memories.QUICK, chunks=(2,), lengths=(4,), rounds=1, points=())
HERE = replace(SMALL, rows=4, chunks=(4,))  # for four devices


@pytest.fixture
def one_core(monkeypatch):
    cores = memories.available_cores()[:1]
    monkeypatch.setattr(memories, "available_cores", lambda: cores)
    monkeypatch.setattr(memories.timing, "_SHORTEST", 1e-6)


@pytest.fixture
def fake_peer(monkeypatch, tmp_path, one_core):
    """Runs the forward gated delta rule against `FAKE_PEER` and returns the bench."""
    (tmp_path / "fake_peer.py").write_text(FAKE_PEER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(memories.MODULES, memories.PEERS, "fake_peer")
    (placement,) = memories.placements(memories.available_cores(), rows=2)
    lines = []

    def run(kind):
        monkeypatch.setenv("FAKE", kind)
        with memories.Bench(placement, SMALL, sys.executable, lines.append) as bench:
            (group,) = memories.groups(SMALL, ["gated_delta"])
            bench.run(group._replace(tasks=("forward",)))
        return bench, "\n".join(lines)

    return run


def test_a_peer_that_agrees_is_timed_and_one_that_fails_is_left_out(fake_peer):
    bench, report = fake_peer("right")
    assert bench.failed == []
    found = {w["workload"]: w for w in bench.found}
    race = found[
        "gated delta rule, forward, T 4: ours (C 2) against transformers (eager, C 2)"
    ]
    assert (
        race["metric"] == "tokens per second of one core" and len(race["ratios"]) == 1
    )
    (best,) = (w for w in found if "at their best" in w)
    assert found[best]["ratio"] == race["ratio"]
    targets = {name: target for (name, _), target in bench.targets.items()}
    assert targets == {race["workload"]: 2.0, best: 1.5}
    assert (
        "transformers (compiled, C 2), forward, T 4: left out, RuntimeError: no"
        in report
    )
    assert any(name.startswith("canary beside gated delta rule") for name in found)


def test_compiled_peers_can_be_left_out(fake_peer, monkeypatch):
    monkeypatch.setitem(globals(), "SMALL", replace(SMALL, compiled=False))
    bench, report = fake_peer("right")
    assert bench.failed == [] and "compiler" not in report
    assert any("(eager, C 2)" in w["workload"] for w in bench.found)


def test_a_peer_that_disagrees_gets_no_ratio(fake_peer):
    bench, _ = fake_peer("wrong")
    assert [w for w in bench.found if not w["workload"].startswith("canary")] == []
    (reason,) = bench.failed
    assert (
        "transformers (eager, C 2), forward, T 4 and ours differ by 9.9e-03" in reason
    )


def test_a_peer_that_dies_costs_its_group_alone(fake_peer):
    bench, report = fake_peer("dies")
    (reason,) = bench.failed
    assert reason == "gated delta rule (one core): the worker ended with code 3"
    assert report.count("ours on one core") == 2  # started anew


def test_without_peers(tmp_path, capsys, one_core):
    """Ours is timed alone; a point against its definition, and in length."""
    arguments = ["--quick", "--only=decode,points", "--points=titans", "--rounds=2"]
    if importlib.util.find_spec("torch") is not None:
        arguments.append("--peer_python=false")
    assert memories.main([*arguments, f"--out={tmp_path}"]) == 0
    (path,) = (tmp_path / "benchmarks").iterdir()
    benchmark = read_benchmark(path)
    assert benchmark["name"] == "memories"
    found = {w["workload"]: w for w in benchmark["workloads"]}
    assert len(found) == len(benchmark["workloads"])
    race = "point titans, forward, T 4: ours (chunk) against ours (reference)"
    assert len(found[race]["ratios"]) == 2
    for task in ("forward", "training"):
        growth = f"point titans, {task}: growth of ours (chunk), T 8 against 4"
        assert found[growth]["metric"] == "tokens per second of one core"
        assert found[growth]["ours"] > 0
    assert f"memory of {race.partition(': ')[2]}" in "".join(found)
    output = capsys.readouterr().out
    assert "no peers: " in output and f"{race}: " in output and path.name in output
    assert "target 0.91" in output


def test_every_memory_that_has_a_name_is_measured():
    names = [g.name for g in memories.groups(memories.Sizes(), ["points"])]
    known = {n for n, make in memories.named.POINTS.items() if make().memory}
    assert set(names) == {f"point {name}" for name in known}
    assert len(names) > 20


def test_rows_are_spread_over_two_devices_on_all_cores():
    one, every = memories.placements([3, 5], rows=2)
    assert one.cores == (3,) and memories.DEVICES not in one.workers
    assert every.cores == (3, 5) and memories.DEVICES in every.workers
    assert every.time == "wall" and one.time == "cpu"
    assert memories.DEVICES not in memories.placements([3, 5], rows=1)[1].workers


@pytest.mark.parametrize("anchor", [None, 4])
def test_titans_is_the_rule_of_its_chunks(anchor):
    """W' = (1 − d) W − Σ η ∇½‖W(k) − v‖², where titans-pytorch has no momentum left."""
    group = next(
        g
        for g in memories.groups(HERE, ["titans"])
        if g.variants[0].spec["anchor"] == anchor
    )
    arrays = group.arrays(12)
    program, collect = ours.build(group.variants[0].spec | {"task": "forward"}, arrays)
    (found,) = collect(program()).values()

    def apply(w, x):
        return x + jax.nn.gelu(x @ w["w2"].T) @ w["w1"].T

    def loss(w, k, v, eta):
        return 0.5 * jnp.sum(eta * jnp.sum((apply(w, k) - v) ** 2, axis=-1))

    for row in range(4):
        w = start = {name: arrays[name][0] for name in ("w1", "w2")}
        for chunk in range(3):
            part = slice(4 * chunk, 4 * chunk + 4)
            k, v, q, eta = (arrays[n][row, 0, part] for n in ("k", "v", "q", "eta"))
            np.testing.assert_allclose(found[row, 0, part], apply(w, q), atol=1e-5)
            decay = jax.nn.sigmoid(arrays["decay"][row, 0, chunk])
            gradient = jax.grad(loss)(start if anchor is None else w, k, v, eta)
            w = jax.tree.map(lambda w, g, d=decay: (1.0 - d) * w - g, w, gradient)


def test_one_token_at_a_time_reads_the_same():
    (group,) = memories.groups(HERE, ["decode"])
    spec, arrays = group.variants[0].spec, group.arrays(8)
    found = []
    for task in ("decode", "forward"):
        program, collect = ours.build(spec | {"task": task}, arrays)
        found.append(collect(program())["y"])
    np.testing.assert_allclose(*found, atol=1e-5)


def test_programs_of_ours_give_every_gradient():
    (group,) = memories.groups(HERE, ["gated_delta"])
    spec, arrays = group.variants[0].spec, group.arrays(4)
    program, collect = ours.build(spec | {"task": "training"}, arrays)
    found = collect(program())
    assert set(found) == set(arrays) - {"cotangent"}
    for name, gradient in found.items():
        assert gradient.shape == arrays[name].shape and np.abs(gradient).max() > 0


def test_a_worker_says_what_it_lacks():
    with pytest.raises(WorkerError, match="No module named 'nobody_has_this'"):
        Worker("nobody_has_this", memories.available_cores()[:1])


def test_a_worker_keeps_to_its_memory(tmp_path, monkeypatch):
    (tmp_path / "greedy.py").write_text(
        "import numpy as np\n"
        "versions = dict\n"
        "def build(spec, arrays):\n"
        "    return lambda: np.zeros(spec['size']), lambda found: {}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = Worker("greedy", memories.available_cores()[:1], memory=2**30)
    worker.ask("build", name="small", spec={"size": 2})
    with pytest.raises(WorkerError, match="MemoryError"):
        worker.ask("build", name="large", spec={"size": 2**28})
    assert worker.alive
    worker.close()
    assert not worker.alive


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only=gated_delta,ttt"], "--only: no part 'ttt'; there are gated_delta,"),
        (["--points=titan"], "--points: no memory 'titan'; .* Did you mean 'titans'"),
        (["--lengths=4,x"], "--lengths must be whole numbers, got .*'x'"),
        (["--rounds=0"], "--rounds=0: 0 is not a positive integer"),
        (["--quik"], "flag 'quik'. Did you mean: quick"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(SystemExit, match=message):
        memories.main(arguments)


@pytest.mark.parametrize("package", ["titans-pytorch", "transformers"])
def test_the_peer_computes_the_same(package, tmp_path, monkeypatch, one_core):
    module = package.replace("-", "_")
    for needed in ("torch", module):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed beside JAX")
    small = replace(SMALL, chunks=(4,), lengths=(8,))
    part = {"titans-pytorch": "titans", "transformers": "gated_delta"}[package]
    (placement,) = memories.placements(memories.available_cores(), rows=2)
    with memories.Bench(placement, small, sys.executable, print) as bench:
        for group in memories.groups(small, [part]):
            eager = tuple(v for v in group.variants if not v.spec.get("compiled"))
            bench.run(group._replace(variants=eager))
    assert bench.failed == []
    assert json.dumps(bench.found).count(f"against {package} (eager") > 0
