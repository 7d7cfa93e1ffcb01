"""Checkpoints: what comes back is what was saved, or it is refused by name."""

import contextlib
import dataclasses
import gc
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.core import config as config_lib
from hope_jax.data import stream
from hope_jax.data.tokenizer import ByteTokenizer, train_bpe
from hope_jax.memory.compose import MemoryConfig
from hope_jax.memory.flow import FlowState
from hope_jax.models import lm
from hope_jax.models.capture import dense_kernels
from hope_jax.models.cms import CMSLevel
from hope_jax.optim import groups
from hope_jax.optim.rule import Settings
from hope_jax.optim.rules.ggd import GGD
from hope_jax.optim.rules.gradient_memory import GradientMemory
from hope_jax.train import checkpoint, sharding
from hope_jax.train import state as state_lib
from tests.train import tiny

# Orbax leaves coroutines behind when a file is damaged or cannot be written.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)

CONFIG = tiny.rows("smoke")["tiny"]
FINGERPRINT = {"corpus": "abc", "tokenizer": ByteTokenizer().fingerprint}


def some_iterator():
    documents = [np.arange(200, dtype=np.int32) % 250]
    rows = stream.Rows(documents, seq_len=4, vocab_size=257)
    return iter(stream.batches(rows, stream.StreamConfig(seq_len=4, batch=2, seed=1)))


@pytest.fixture(scope="module")
def state():
    """The real parameters, on two clocks and inside a period, inputs captured too."""
    graphdef, params = lm.build(CONFIG.model, jax.random.key(1))
    layers = dense_kernels(graphdef, params)
    names = iter(range(10_000))
    periods = jax.tree.map(lambda _: 1 + 2 * (next(names) % 2), params)
    tx = groups.on_clocks(lambda period: optax.trace(0.9), periods, layers=layers)
    state = state_lib.create(params, tx, jax.random.key(7))
    ones = jax.tree.map(jnp.ones_like, params)
    inputs = jax.tree.map(lambda p, c: p @ p.mT if c else None, ones, layers)
    _, opt = tx.update(ones, state.level.opt, params, inputs=inputs)
    level = state.level._replace(opt=opt, count=jnp.asarray(20, jnp.int32))
    return sharding.replicate(state._replace(level=level), sharding.make_mesh())


def spec(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def shifted(state, by):
    params = jax.tree.map(lambda p: p + by, state.params)
    return state._replace(level=state.level._replace(params=params))


@pytest.fixture(scope="module")
def two_steps(state, tmp_path_factory):
    """Checkpoints of step 10 and, with other parameters, of step 20."""
    directory = tmp_path_factory.mktemp("run") / checkpoint.FOLDER
    iterator = some_iterator()
    with checkpoint.Checkpoints(directory) as checkpoints:
        for step in (10, 20):
            next(iterator)
            save(
                checkpoints, step, shifted(state, 0.0 if step == 20 else 1.0), iterator
            )
    return directory


def save(checkpoints, step, state, iterator):
    checkpoints.save(
        step, state, iterator=iterator, config=CONFIG, fingerprint=FINGERPRINT
    )


def restore(directory, like, **changes):
    arguments = dict(iterator=some_iterator(), config=CONFIG, fingerprint=FINGERPRINT)
    with checkpoint.Checkpoints(directory) as checkpoints:
        return checkpoints.restore(like, **{**arguments, **changes})


@pytest.fixture
def leftovers():
    """Finalises what Orbax abandoned here, not in the middle of something else."""
    yield
    gc.collect()


@pytest.fixture
def copied(two_steps, tmp_path, leftovers):
    directory = tmp_path / checkpoint.FOLDER
    shutil.copytree(two_steps, directory)
    return directory


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def test_round_trip_is_exact(two_steps, state):
    iterator = some_iterator()
    restored, step = restore(two_steps, spec(state), iterator=iterator)
    assert step == 20
    assert_same(restored, state)
    assert jax.random.uniform(restored.key) == jax.random.uniform(state.key)
    reference = some_iterator()
    next(reference), next(reference)
    np.testing.assert_array_equal(next(iterator)["tokens"], next(reference)["tokens"])
    assert jax.tree.leaves(restored.params)[0].sharding.is_fully_replicated


@pytest.mark.parametrize("devices", [1, 2])
def test_round_trip_to_another_mesh(two_steps, state, devices):
    place = sharding.replicated(sharding.make_mesh(jax.devices()[:devices]))
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state
    )
    restored, step = restore(two_steps, like)
    assert step == 20
    assert_same(restored, state)
    assert {x.sharding for x in jax.tree.leaves(restored.params)} == {place}


def test_nothing_to_restore(tmp_path, state):
    assert restore(tmp_path / "new", spec(state)) is None
    assert checkpoint.latest_verified_step(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="give the workdir of a run"):
        checkpoint.restore_params(tmp_path)


def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[int(len(data) * kind)] ^= 0x10
        path.write_bytes(data)


@pytest.mark.parametrize("kind", [0.2, 0.7, "cut", "delete"])
def test_damage_to_any_file_is_found_or_harmless(
    two_steps, tmp_path, state, kind, leftovers
):
    """Never wrong numbers: step 20 exactly, or step 10 and a reason."""
    files = sorted(p for p in (two_steps / "20").rglob("*") if p.is_file())
    fell_back = set()
    for i, file in enumerate(files):
        directory = tmp_path / str(i) / checkpoint.FOLDER
        shutil.copytree(two_steps, directory)
        damage(directory / file.relative_to(two_steps), kind)
        iterator = some_iterator()
        restored, step = restore(directory, spec(state), iterator=iterator)
        assert_same(restored, state if step == 20 else shifted(state, 1.0))
        reference = some_iterator()
        for _ in range(step // 10):
            next(reference)
        assert iterator.get_state() == reference.get_state()
        if step == 10:
            fell_back.add(file.relative_to(two_steps / "20").parts[0])
    assert {"data", "meta", "params", "state"} <= fell_back


def test_every_data_file_flipped_is_found(two_steps, tmp_path, leftovers):
    """Orbax alone restores a flipped bit of these without a word."""
    step = two_steps / "20"
    files = [*step.glob("*/d/*"), *step.glob("*/ocdbt.process_*/d/*")]
    assert len(files) >= 2
    for i, file in enumerate(files):
        directory = tmp_path / str(i) / checkpoint.FOLDER
        shutil.copytree(two_steps, directory)
        damage(directory / file.relative_to(two_steps), 0.5)
        assert checkpoint.latest_verified_step(directory) in (10, 20)
    damage_all = tmp_path / "all" / checkpoint.FOLDER
    shutil.copytree(two_steps, damage_all)
    for file in files:
        damage(damage_all / file.relative_to(two_steps), 0.5)
    assert checkpoint.latest_verified_step(damage_all) == 10


def test_a_changed_place_in_the_data_is_found(copied, state):
    """Still JSON, still a state that grain takes: the stream of another step."""
    (file,) = (copied / "20" / "data").glob("*.json")
    place = json.loads(file.read_text())
    file.write_text(json.dumps(place).replace("4", "6"))
    assert json.loads(file.read_text()) != place
    _, step = restore(copied, spec(state))
    assert step == 10


@pytest.mark.parametrize("before, now", [(2, 1), (1, 4), (4, 2), (2, 2)])
def test_other_processes_go_on_with_the_same_rows(tmp_path, state, before, now):
    """Of a step all together read what they would have read; grain names files by
    process."""

    def iterators(count):
        documents = [np.arange(200, dtype=np.int32) % 250]
        rows = stream.Rows(documents, seq_len=4, vocab_size=257)
        settings = stream.StreamConfig(seq_len=4, batch=4, seed=1)
        return [
            iter(stream.batches(rows, settings, process_index=i, process_count=count))
            for i in range(count)
        ]

    def step(each):
        read = np.concatenate([next(iterator)["tokens"] for iterator in each])
        return read[np.lexsort(read.T)]

    saved, folder = iterators(before), tmp_path / checkpoint.FOLDER
    for _ in range(3):
        step(saved)
    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(
            20,
            state,
            iterator=saved[0],
            config=CONFIG,
            fingerprint={**FINGERPRINT, "process_count": before},
        )
    (file,) = (folder / "20" / "data").glob("*.json")
    place = file.read_bytes()
    file.unlink()
    for i in range(before):
        file.with_name(f"process_{i}-of-{before}.json").write_bytes(place)
    each, wanted = iterators(now), step(saved)
    for iterator in each:
        fingerprint = {**FINGERPRINT, "process_count": now}
        assert restore(folder, spec(state), iterator=iterator, fingerprint=fingerprint)
    np.testing.assert_array_equal(step(each), wanted)


def test_a_damaged_step_is_set_aside_and_written_again(copied, state):
    damage(copied / "20" / "meta" / "metadata", 0.5)
    iterator = some_iterator()
    with checkpoint.Checkpoints(copied) as checkpoints:
        _, step = checkpoints.restore(
            spec(state), iterator=iterator, config=CONFIG, fingerprint=FINGERPRINT
        )
        assert (step, checkpoints.steps()) == (10, [10])
        assert (copied.parent / "checkpoints.damaged" / "20").is_dir()
        next(iterator)
        save(checkpoints, 20, state, iterator)
    restored, step = restore(copied, spec(state))
    assert step == 20
    assert_same(restored, state)


def test_when_nothing_is_intact(copied, state):
    for step in ("10", "20"):
        damage(copied / step / "meta" / "metadata", 0.5)
    with pytest.raises(checkpoint.Damaged, match="(?s)No checkpoint .*20.*10 is dam"):
        restore(copied, spec(state))
    assert checkpoint.latest_verified_step(copied) is None
    with pytest.raises(checkpoint.Damaged, match="meta"):
        checkpoint.restore_params(copied)


def test_another_config_is_refused_by_field(two_steps, state):
    other = config_lib.override(CONFIG, ["model.d_model=32", "optimizer.rule.b1=0.5"])
    message = (
        r"(?s)model.d_model: saved 16, now 32.*optimizer.rule.b1: saved 0.9, now 0.5"
    )
    with pytest.raises(checkpoint.ConfigMismatch, match=message):
        restore(two_steps, spec(state), config=other)
    with checkpoint.Checkpoints(two_steps) as checkpoints:
        with pytest.raises(checkpoint.ConfigMismatch, match=message):
            checkpoints.check_config(other)
        free = ["train.keep=9", "train.checkpoint_every=2", "data.path=moved"]
        free += ["train.workers=2"]
        checkpoints.check_config(config_lib.override(CONFIG, free))
    with pytest.raises(checkpoint.ConfigMismatch, match=message):
        checkpoint.restore_params(two_steps, expected=other)


def test_other_data_is_refused_by_field(two_steps, state):
    with pytest.raises(checkpoint.ConfigMismatch, match="corpus: saved 'abc', now 'x'"):
        restore(two_steps, spec(state), fingerprint={**FINGERPRINT, "corpus": "x"})


def test_other_types_and_shapes_are_refused_by_name(two_steps, state):
    def first_leaf(change):
        leaves, treedef = jax.tree.flatten(spec(state))
        index = next(i for i, x in enumerate(leaves) if x.dtype == jnp.float32)
        leaves[index] = change(leaves[index])
        return treedef.unflatten(leaves)

    def as_bfloat16(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding)

    def longer(leaf):
        shape = (leaf.shape[0] + 1, *leaf.shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

    for change, message in [
        (as_bfloat16, r"params\..*: saved float32.*, now bfloat16"),
        (longer, r"params\..*: saved float32\[.*now float32\["),
    ]:
        with pytest.raises(checkpoint.ConfigMismatch, match=message):
            restore(two_steps, first_leaf(change))


def test_params_for_evaluation(two_steps, state):
    config, params, step = checkpoint.restore_params(two_steps.parent, CONFIG)
    assert (config, step) == (CONFIG, 20)
    assert_same(params, state.params)


@pytest.mark.parametrize("known", [0, 1])
def test_levels_that_had_no_inner_rate_begin_at_their_config(tmp_path, known):
    """Earlier versions saved the rates of levels faster than a row alone, or none."""
    levels = (CMSLevel(period=8, rate=0.5), CMSLevel(period=48, rate=0.25))
    cms = dataclasses.replace(CONFIG.model.cms, levels=levels)
    config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, cms=cms)
    )
    _, params = lm.build(config.model, jax.random.key(1))
    learned = jax.tree.map(lambda w: w + 1.0, params)
    old = dict(learned)
    if known:
        old["rates"] = learned["rates"][...][:known]
    else:
        del old["rates"]
    tx = optax.trace(0.9)
    iterator, folder = some_iterator(), tmp_path / checkpoint.FOLDER
    with checkpoint.Checkpoints(folder) as checkpoints:
        before = state_lib.create(old, tx, jax.random.key(7))
        checkpoints.save(
            20, before, iterator=iterator, config=config, fingerprint=FINGERPRINT
        )
    _, found, _ = checkpoint.restore_params(tmp_path, config)
    shares = jax.nn.sigmoid(found["rates"][...])
    kept = jax.nn.sigmoid(learned["rates"][...])[:known]
    np.testing.assert_allclose(shares, [*kept, *[0.5, 0.25][known:]], rtol=1e-5)
    rest = {k: v for k, v in learned.items() if k != "rates"}
    assert_same({k: v for k, v in found.items() if k != "rates"}, rest)

    now = state_lib.create(params, tx, jax.random.key(7))
    now = sharding.replicate(now, sharding.make_mesh())
    with pytest.raises(checkpoint.ConfigMismatch, match="can be read .* not gone on"):
        restore(folder, spec(now), config=config)


def test_the_tokenizer_must_be_the_saved_one(copied):
    path = copied.parent / checkpoint.TOKENIZER
    with pytest.raises(FileNotFoundError, match="No tokenizer.json beside"):
        checkpoint.restore_tokenizer(copied.parent)
    ByteTokenizer().save(path)
    assert checkpoint.restore_tokenizer(copied.parent) == ByteTokenizer()
    train_bpe([b"abab abab"], 258).save(path)
    with pytest.raises(checkpoint.ConfigMismatch, match="is not the tokenizer of"):
        checkpoint.restore_tokenizer(copied.parent)


@contextlib.contextmanager
def files_no_larger_than(size):
    """A real failed write, in Orbax's own threads: the system refuses more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_save_is_reported_and_never_restored(copied, state):
    iterator = some_iterator()
    with checkpoint.Checkpoints(copied) as checkpoints:
        with files_no_larger_than(4000):
            save(
                checkpoints, 30, state, iterator
            )  # returns: it fails in the background
            with pytest.raises(checkpoint.SaveFailed, match="of step 30 could not"):
                save(checkpoints, 40, state, iterator)
        assert checkpoints.steps() == [10, 20]
        save(checkpoints, 40, state, iterator)
        checkpoints.wait()
        assert checkpoints.steps() == [10, 20, 40]
    assert checkpoint.latest_verified_step(copied) == 40
    with checkpoint.Checkpoints(copied) as checkpoints:
        save(checkpoints, 50, state, iterator)
    assert not list(copied.glob("*tmp*"))  # the next start clears what was half-written


def test_a_failed_last_save_is_reported_on_the_way_out(copied, state):
    with pytest.raises(checkpoint.SaveFailed, match="of step 30 could not"):
        with files_no_larger_than(4000), checkpoint.Checkpoints(copied) as checkpoints:
            save(checkpoints, 30, state, some_iterator())
    _, step = restore(copied, spec(state))
    assert step == 20


def test_saving_a_step_twice_is_an_error(copied, state):
    with checkpoint.Checkpoints(copied) as checkpoints:
        with pytest.raises(checkpoint.SaveFailed, match="step 20"):
            save(checkpoints, 20, state, some_iterator())


def test_only_so_many_are_kept(copied, state):
    with checkpoint.Checkpoints(copied, keep=2) as checkpoints:
        save(checkpoints, 30, state, some_iterator())
        checkpoints.wait()
        assert checkpoints.steps() == [20, 30]


def test_names_that_could_lead_elsewhere_are_refused(state, tmp_path):
    level = state.level._replace(params={"../evil": jnp.zeros(2)})
    with checkpoint.Checkpoints(tmp_path / "a") as checkpoints:
        with pytest.raises(ValueError, match="'../evil' in params cannot name"):
            save(checkpoints, 1, state._replace(level=level), some_iterator())


def test_donated_right_after_the_save(copied, state):
    give_away = jax.jit(lambda s: shifted(s, 5.0), donate_argnums=0)
    mine = jax.tree.map(jnp.copy, state)
    with checkpoint.Checkpoints(copied) as checkpoints:
        save(checkpoints, 30, mine, some_iterator())
        give_away(mine)
    restored, step = restore(copied, spec(state))
    assert step == 30
    assert_same(restored, state)


def test_what_is_opened_to_be_read_stays_as_it_is(copied, state):
    before = sorted(copied.rglob("*"))
    with checkpoint.Checkpoints(copied, read_only=True) as checkpoints:
        with pytest.raises(checkpoint.SaveFailed, match="opened to be read"):
            save(checkpoints, 30, state, some_iterator())
    assert sorted(copied.rglob("*")) == before


def test_what_a_crash_left_unfinished_is_cleared(tmp_path):
    (tmp_path / "3.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with checkpoint.Checkpoints(tmp_path, read_only=True):
        assert list(tmp_path.iterdir())
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == []
    assert not list(tmp_path.iterdir())


MEMORY = MemoryConfig(
    architecture="linear", rule="momentum", retention="bregman", dgd="none", chunk=1
)


def in_a_row(flow):
    return tuple(part for part in flow if part is not None)


def rule_apart(flow):
    return (in_a_row(flow[:2]), *in_a_row(flow[2:]))


@pytest.mark.parametrize(
    "rule, before",
    [(GGD(memory=MEMORY), in_a_row), (GradientMemory(memory=MEMORY), rule_apart)],
    ids=["ggd", "gradient_memory"],
)
def test_a_flow_saved_by_places_is_restored_by_names(tmp_path, rule, before):
    """Momentum and dual weights have one shape: by the wrong places each would come
    back as the other."""
    params = {"first": {"kernel": jnp.ones((2, 3))}, "second": {"kernel": jnp.ones(3)}}
    rate = Settings(rate=lambda count: 0.1, weight_decay=0.0)
    state = state_lib.create(params, rule.make(rate), jax.random.key(7))
    numbers = iter(range(10_000))
    opt = jax.tree.map(lambda x: x + next(numbers), state.level.opt)
    state = state._replace(level=state.level._replace(opt=opt))
    is_flow = lambda node: isinstance(node, FlowState)  # noqa: E731
    old = jax.tree.map(
        lambda node: before(node) if is_flow(node) else node, opt, is_leaf=is_flow
    )
    assert jax.tree.structure(old) != jax.tree.structure(opt)
    folder, iterator = tmp_path / checkpoint.FOLDER, some_iterator()
    with checkpoint.Checkpoints(folder) as checkpoints:
        saved = state._replace(level=state.level._replace(opt=old))
        save(checkpoints, 20, saved, iterator)
    state = sharding.replicate(state, sharding.make_mesh())
    restored, _ = restore(folder, spec(state))
    assert_same(restored, state)
