"""What a run is said to cost, held to what its arrays and its compiler say."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from experiments import fits, lab, paper
from hope_jax.core.config import from_json, override
from hope_jax.models import convert, lm, zoo
from hope_jax.train import loop, plan, sharding
from hope_jax.train.config import RunConfig
from launch import plan as program
from tests.train import tiny

SMOKE = tiny.rows("smoke")["tiny"]


def test_products_are_counted_as_often_as_they_run():
    w = jnp.ones((4, 8, 8))

    def run(x, w):
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, w)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w[0], lambda x: x, x)

    x = jnp.ones((3, 8))
    assert plan.flops(jax.jit(run).trace(x, w).jaxpr.jaxpr) == 5 * 2 * 3 * 8 * 8

    def chain(x, w):  # without loops, of which XLA's analysis counts one round
        return sum((((x @ w[i]) @ w[i].T) ** 2).sum() for i in range(4))

    gradient = jax.jit(jax.value_and_grad(chain, argnums=1))
    traced = gradient.trace(jnp.ones((64, 32)), jnp.ones((4, 32, 32)))
    found = traced.lower().compile().cost_analysis()["flops"]
    assert plan.flops(traced.jaxpr.jaxpr) == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("mesh", ["", "data:2,fsdp:2", "fsdp:2,tensor:2"])
def test_bytes_are_those_of_the_arrays(mesh):
    """Of a device and of a checkpoint; and what XLA says goes into a step."""
    config = override(SMOKE, [f"train.mesh={mesh}"])
    said = plan.plan(config, 4)
    assert said.parameters == lm.count_parameters(config.model)
    _, state, _, _ = loop._model(config, loop.make_mesh(config))

    def own(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in map_arrays(tree))

    assert (said.params, said.optimizer) == (own(state.params), own(state.level.opt))
    whole = sum(leaf.nbytes for leaf in map_arrays(state))
    assert said.checkpoint == pytest.approx(whole, rel=0.02)
    assert said.tokens == 4 * 16
    if mesh == "data:2,fsdp:2":
        found = fits.measure(lab.Task("tiny", config, 0, None, Path()))
        kept = said.params + said.optimizer
        assert found["arguments"] == pytest.approx(kept, rel=0.1)
        assert min(found["temporaries"], found["compiling"]) > 0


def map_arrays(tree):
    return [
        leaf
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]


def test_flops_grow_with_rows_alone():
    """A step's own work, the optimizer's, is not counted again for every row."""
    some, more = (
        plan.plan(override(SMOKE, [f"train.batch={batch}"]), 4) for batch in (4, 8)
    )
    assert some.step_flops * 2 == pytest.approx(more.step_flops, rel=0.05)
    model = SMOKE.model
    matrices = some.parameters - model.vocab * model.d_model
    least = 6 * matrices + 6 * model.vocab * model.d_model  # the head, tied
    assert least < some.step_flops / some.tokens < 1.5 * least
    machine = plan.MACHINES["v5e-64"]
    speed = some.tokens_per_second(machine, 0.5)
    per_token = some.step_flops / some.tokens
    assert speed == pytest.approx(64 * 197e12 * 0.5 / per_token)


def test_flops_of_shared_rows_are_those_of_all_devices():
    """Of whom each reads its own tokens, and keys of those before."""
    one, two = (
        plan.plan(override(SMOKE, [f"train.mesh={mesh}"]), 4)
        for mesh in ("", "data:2,sequence:2")
    )
    assert two.step_flops == pytest.approx(one.step_flops, rel=0.2)
    assert (one.params, one.tokens) == (two.params, two.tokens)


def test_the_paper_rows_fit_their_machines():
    """As far as shapes say: batch, mesh and heads; what is kept takes half at most."""
    shapes = {name: lm.abstract(zoo.get(name)) for name in ("hope_760m", "hope_1b3")}
    for name, machine in plan.MACHINES.items():
        rows = paper.rows(name)
        assert {"transformer_760m", "hope_attention_1b3", *shapes} <= rows.keys()
        for row, params in shapes.items():
            config = rows[row]
            mesh = plan._abstract_mesh(config, machine.devices)
            assert config.train.batch * config.train.seq_len == 524_288
            lies = sharding.state_shardings(params, params, mesh)
            kept = 3 * plan._bytes(params, lies)  # and two moments
            assert kept < machine.bytes / 2
        rates = {rows[row].optimizer.learning_rate for row in shapes}
        assert rates == {1.25e-3, 7e-4}


def test_what_the_compiler_said_of_the_paper_rows():
    """Results are of the rows as they are, all fit, and the page has their table."""
    found = lab.results(lab.RESULTS, fits.NAME, fits.rows("full"))
    assert [result["row"] for result in found] == list(fits.rows("full"))
    for result in found:
        config = from_json(RunConfig, result["config"])
        assert config == fits.rows("full")[result["row"]]
        said = result["metrics"]
        machine = plan.MACHINES[config.scale]
        assert said["parameters"] == lm.count_parameters(config.model)
        assert said["memory"] == machine.bytes
        need = said["arguments"] + said["temporaries"] + said["code"]
        assert need < machine.bytes
        kept = sum(plan.kept(config, machine.devices, machine.tiled))
        assert kept == pytest.approx(said["arguments"], rel=0.01)
    page = (lab.RESULTS.parent / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- plan -->\n(.*)\n<!-- /plan -->", page, re.DOTALL)
    assert block and block[1] == fits.table(found), (
        "python -m experiments.fits prints it"
    )


def test_llama_with_levels_is_what_stacking_makes():
    """In both readings; without them it has the parameters of Llama-3 8B."""
    assert lm.count_parameters(paper.LLAMA) == 8_030_261_248
    ways = {"stacked": convert.stack_levels, "copied": convert.copy_levels}
    for reading, way in ways.items():
        made = []

        def leveled(params, way=way, made=made):
            config, params = way(paper.LLAMA, params, paper.LEVELS)
            made.append(config)
            return params

        shapes = jax.eval_shape(leveled, lm.abstract(paper.LLAMA))
        row = paper.rows("v5p-128")[f"llama3_8b_{reading}"]
        assert made == [dataclasses.replace(row.model, name=paper.LLAMA.name)]
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 19_304_812_547


def test_the_program_prints_it(capsys):
    row = ["--experiment=tests.train.tiny", "--row=tiny", "--scale=smoke"]
    assert program.main([*row, "--devices=4", "--mesh=fsdp:2"]) == 0
    out = capsys.readouterr().out
    assert "parameters                   5,952\n" in out
    assert "mesh                         fsdp:2\n" in out
    for wrong, message in (
        (["--mesh=fsdp:3"], r"mesh \(fsdp 3\) is of 3 devices, but there are 4"),
        (["--machine=v9"], "--machine=v9 must be one of v5e-64, "),
        (["--mfu=2"], "--mfu must lie in"),
        (["--effort=2", "--compile"], r"--effort must lie in \[-1, 1\], got 2.0"),
        (["--effort=-1"], r"--effort=-1.0 is of the compiler: add --compile"),
    ):
        with pytest.raises(SystemExit, match=message):
            program.main([*row, "--devices=4", *wrong])


@pytest.mark.parametrize(
    ("name", "wanted"), [("v5e-64", "libtpu"), ("8xH100", "jax-cuda12-plugin")]
)
def test_what_cannot_be_compiled_without_the_machine(monkeypatch, name, wanted):
    def nowhere(**_):
        raise NotImplementedError("topology not implemented")

    monkeypatch.setattr(topologies, "get_topology_desc", nowhere)
    with pytest.raises(ValueError, match=f"not implemented.; install {wanted}"):
        plan.topology(plan.MACHINES[name])


def test_a_step_is_compiled_for_gpus_that_are_not_there():
    """Where their compiler is installed."""
    reason = "pip install jax-cuda12-plugin compiles for GPUs"
    pytest.importorskip("jax_plugins.xla_cuda12", reason=reason)
    machine = plan.MACHINES["8xH100"]
    devices = plan.topology(machine)
    assert [device.platform for device in devices] == ["gpu"] * machine.devices
    config = override(SMOKE, ["train.mesh=fsdp:4,tensor:2", "train.batch=8"])
    memory = plan.compiled(config, devices).memory_analysis()
    kept = sum(plan.kept(config, machine.devices, machine.tiled))
    assert memory.argument_size_in_bytes == pytest.approx(kept, rel=0.1)
