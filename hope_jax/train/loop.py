"""The loop: data, mesh and state brought together, steps taken, everything kept.

A workdir holds one run:

    config.json  tokenizer.json  metrics.jsonl  tensorboard/  checkpoints/
"""

import contextlib
import functools
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jaxtyping import PyTree

from hope_jax import optim
from hope_jax.core import config as config_lib
from hope_jax.data import prepared, stream, text, tokenizer, workers
from hope_jax.models import lm, systems
from hope_jax.models.capture import dense_kernels
from hope_jax.optim.leaves import path_names
from hope_jax.train import (
    checkpoint,
    guard,
    limits,
    lock,
    processes,
    release,
    sharding,
    signals,
    watchdog,
    watching,
)
from hope_jax.train import metrics as metrics_lib
from hope_jax.train import state as state_lib
from hope_jax.train import step as step_lib
from hope_jax.train.config import DataConfig, GuardConfig, RunConfig, check_rows
from hope_jax.train.folder import ForeignFolder, check_folder
from hope_jax.train.kept import Kept, Moment, bits
from hope_jax.train.kept import NonFinite as NonFinite
from hope_jax.train.progress import say

CONFIG = "config.json"
_UNFINISHED = f".{CONFIG}"  # what a kill may leave of the first file that is written
_FILES = (
    *(CONFIG, _UNFINISHED, checkpoint.TOKENIZER, tokenizer.BESIDE, checkpoint.FOLDER),
    *("metrics.jsonl", "tensorboard", watchdog.FILE, lock.FILE),
    *(watching.HOSTS, watching.PROFILE, "wandb", "report.html"),
)


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
      step: steps done, and saved.
      finished: whether these are all of them.
      stopped_by: number of the signal that ended it, or None.
      metrics: of the last step that was finite; empty when none was taken.
    """

    step: int
    finished: bool
    stopped_by: int | None
    metrics: dict[str, float]


class Source(NamedTuple):
    """The text of a run in tokens.

    Attributes:
      corpus: the documents.
      tokenizer: their tokens.
      rows: of the training text, for `stream.batches`.
      bytes_per_token: of the training text; turns nats a token into bits a byte.
      validation: batches of rows, or None.
      validation_bytes_per_token: of the validation text.
    """

    corpus: text.Corpus | prepared.Corpus
    tokenizer: tokenizer.Tokenizer
    rows: stream.Source
    bytes_per_token: float
    validation: list[PyTree] | None
    validation_bytes_per_token: float


class Groups(NamedTuple):
    """How the optimizer of a run tells parameters apart; trees like these.

    Attributes:
      periods: ints, after how many steps each moves.
      layers: bools, the matrices whose inputs it needs to know; None if it needs none.
    """

    periods: PyTree
    layers: PyTree | None


def train(
    config: RunConfig,
    workdir: str | os.PathLike,
    *,
    resume: bool = False,
    params: PyTree | None = None,
    init_from: str | os.PathLike | None = None,
    profile: tuple[int, int] | None = None,
    wandb: str | None = None,
) -> Outcome:
    """Runs `config` in `workdir` to its last step, or until it is asked to end.

    SIGTERM, SIGINT, SIGHUP or SIGUSR1 lets the step at hand finish and saves; so does
    an error. `resume` then goes on so that parameters, optimizer state, keys, data and
    `metrics.jsonl` become, byte for byte, those of a run that was never stopped (on the
    same devices and versions). A kill loses no more than the steps since the last
    checkpoint. What `config.guard` says is done about steps that are not finite, and
    about calls that do not return: where Python cannot interrupt one, this process ends
    with the status `hope_jax.train.watchdog.STATUS`, after a try to save.

    Several processes (`jax.distributed`, which `launch.distributed` starts) each call
    this with the same arguments, `workdir` a folder that all of them see. Each reads
    its share of every batch, the first alone writes and speaks, all save; a signal to
    any of them stops all of them after the same step. One that an error ends saves
    nothing, for the others may be well: a run then loses what came since its last save.

    Args:
      config: the run.
      workdir: a folder for it alone; made if absent.
      resume: go on from the newest intact checkpoint; from the start if there is none.
      params: where the model starts, as of `lm.build`, for example pre-trained
        (`hope_jax.models.pretrained`); by default drawn from the seed.
      init_from: the workdir of another run, its checkpoints, or a folder that
        `launch.release` made: the model starts at its newest parameters, with its
        tokenizer, and all else is new: data, rates, optimizer, length of rows.
        Checkpoints say so in their lineage.
      profile, wandb: see `hope_jax.train.watching.Watch`.

    Raises:
      FileExistsError: `workdir` has checkpoints and `resume` is False.
      hope_jax.train.folder.ForeignFolder: `workdir` is not of this program. Nothing in
        it is touched before config, data and folder are accepted.
      ValueError: a config that does not fit its rows, its data or the devices; `params`
        of another model; processes that were given different arguments.
      hope_jax.train.checkpoint.ConfigMismatch: resumed with another config or data.
      hope_jax.train.checkpoint.SaveFailed: a checkpoint could not be written.
      hope_jax.train.lock.InUse: another program trains in `workdir`.
      hope_jax.data.workers.Died: a process that reads data was killed.
      hope_jax.train.watchdog.Stalled: a batch, a step or a save did not end in time.
      NonFinite: too many steps in a row were skipped.
    """
    check_rows(config)
    limits.check_run(config)
    watching.check(config.train.steps, profile, wandb)
    workdir = check_workdir(workdir)
    if params is not None and init_from is not None:
        raise ValueError("params and init_from both say where to start; give one.")
    mesh = make_mesh(config)

    with contextlib.ExitStack() as stack:
        held = not processes.writes() or workdir.is_dir()
        if held and processes.writes():
            stack.enter_context(lock.hold(workdir))
        begun = _has_checkpoints(workdir)  # by none that may still write some
        processes.check_same(checkpoints=f"{workdir}: {begun}")
        if not resume:
            _check_new(workdir)
        if begun:
            with checkpoint.Checkpoints(
                workdir / checkpoint.FOLDER, read_only=True
            ) as saved_before:
                saved_before.check_config(config)
        origin = None
        if init_from is not None and not begun:
            origin = release.origin(init_from)
            params = origin.params
            _check_tokenizer(config, origin)
        source = load_source(config, workdir if begun else init_from)
        readers = workers.Workers()
        iterator, fingerprint = _data(config, source, mesh)
        stack.callback(iterator.close)
        graphdef, state, tx, layers = _model(config, mesh, params)

        # Accepted: what is new is written now, what is gone on with once it is read.
        stop = stack.enter_context(signals.stop_on_signal())
        together = processes.Stop(stop, mesh)
        _agree(config, fingerprint)
        if not begun:
            if processes.writes():
                workdir.mkdir(parents=True, exist_ok=True)
                if not held:
                    stack.enter_context(lock.hold(workdir))
                    _check_new(workdir)  # nobody was kept from it so far
                _write_config(workdir, config)
                source.tokenizer.save(workdir / checkpoint.TOKENIZER)
            _see_folder(workdir)
        checkpoints = stack.enter_context(
            checkpoint.Checkpoints(workdir / checkpoint.FOLDER, keep=config.train.keep)
        )
        say(
            f"{lm.count_parameters(config.model):,} parameters on "
            f"{jax.device_count()} x {jax.devices()[0].device_kind}"
            f"{sharding.describe(mesh)}"
        )
        if origin is not None:
            checkpoints.tell("branched", 0, origin=origin.lineage)
            say(f"starts at step {origin.lineage['step']} of {init_from}")
        like = jax.tree.map(_spec, state)
        kept: Kept | None = None
        dog = stack.enter_context(
            watchdog.Watchdog(
                _limits(config.guard),
                stop,
                lambda: _save_alone(kept),
                workdir / watchdog.FILE,
                dead=readers.dead,
            )
        )
        done, saved = 0, None
        with dog("a restore"):
            restored = checkpoints.restore(
                like, iterator=iterator, config=config, fingerprint=fingerprint
            )
        if restored is not None:
            state, done = restored
            saved = done
            say(f"resumed at step {done} of {config.train.steps}")
            if processes.writes():
                _write_config(workdir, config)
                if not (workdir / checkpoint.TOKENIZER).exists():
                    source.tokenizer.save(workdir / checkpoint.TOKENIZER)
        elif resume:
            say(f"no checkpoint in {workdir} yet: starting at step 0")

        step = make_step(config, graphdef, tx, layers, mesh)
        step = sharding.jit_step(step, mesh, state)
        validate = _validation(graphdef, config, source, mesh)
        watch = stack.enter_context(
            watching.Watch(
                config, workdir, dog.seconds, done, profile=profile, wandb=wandb
            )
        )
        kept = stack.enter_context(
            Kept(
                config,
                workdir,
                checkpoints,
                fingerprint,
                source.bytes_per_token,
                Moment(state, done, iterator.get_state()),
                saved,
                watch,
            )
        )
        try:
            _take_steps(
                config, kept, step, iterator, validate, together, dog, mesh, like
            )
        except Exception as error:
            died = readers.dead(wait=0.0)
            readers.kill()  # one of them may hang
            ended = isinstance(error, watchdog.Stalled)
            ended |= died is not None and processes.alone()
            if not ended or stop.signal is None:
                _save_in_spite(error, kept, dog)
                if died is not None:
                    raise workers.Died(
                        f"{died}: killed, perhaps for want of memory. The run stands "
                        f"at step {kept.saved}; --resume goes on from there."
                    ) from error
                raise
        stopped_by = together.signal
        if stopped_by is not None:
            say(f"{signal.Signals(stopped_by).name}: saving step {kept.now.done}")
        with dog("a save"):
            kept.save()
    done = kept.now.done
    return Outcome(done, done == config.train.steps, stopped_by, kept.latest)


def _take_steps(
    config: RunConfig,
    kept: Kept,
    step: Callable,
    iterator: grain.DatasetIterator,
    validate: Callable[[PyTree], dict[str, float]] | None,
    stop: processes.Stop,
    dog: watchdog.Watchdog,
    mesh: jax.sharding.Mesh,
    like: PyTree,
) -> None:
    """Takes steps until the last, or a signal; saves on the way."""
    train, last = config.train, config.train.steps
    compiled = False
    while kept.now.done < last and (stop.signal is None or kept.returned):
        with dog("a batch"):
            item = next(iterator)
        batch = sharding.shard_batch(_batch(item), mesh)
        with dog("a step" if compiled else "a compilation"):
            state, metrics = step(kept.now.state, batch)  # dispatched, not waited for
        stop.say()
        kept.took(state, iterator.get_state(), metrics)
        done, compiled = kept.now.done, True
        with dog("a step"):
            kept.read(leave=1)
            stop.hear(leave=1)
        if validate and (done % train.validate_every == 0 or done == last):
            with dog("a validation"):
                kept.found(validate(state.params))
        if done % train.checkpoint_every == 0 or done == last or kept.returned:
            with dog("a save"):
                kept.save()
        with dog("a step"):
            too_many = kept.gave_up()
        if too_many:
            with dog("a restore"):
                kept.go_back(like)


def _save_alone(kept: Kept | None) -> None:
    """Saves what was done while a call hangs; other processes would have to help."""
    if kept is not None and kept.ahead and processes.alone():
        kept.save()


def _save_in_spite(error: Exception, kept: Kept, dog: watchdog.Watchdog) -> None:
    """Saves the last good state of a run that an error ends."""
    if isinstance(error, checkpoint.SaveFailed) or not kept.ahead:
        return
    if not processes.alone():  # the others may be well, and save by themselves
        return
    try:
        with dog("a save"):
            kept.save()
    except Exception as another:
        logging.warning("Nothing more could be saved: %s", another)
    else:
        say(f"saved step {kept.now.done} before the error below")


def _limits(config: GuardConfig) -> dict[str, float]:
    """Seconds that each call of the loop may take."""
    return {
        **dict.fromkeys(("a batch", "a step"), config.patience),
        **dict.fromkeys(("a compilation", "a validation"), config.long_patience),
        **dict.fromkeys(("a save", "a restore"), config.long_patience),
    }


def _check_new(workdir: Path) -> None:
    if _has_checkpoints(workdir):
        raise FileExistsError(
            f"{str(workdir)!r} has checkpoints already: pass --resume to go on with "
            "that run, or another --workdir."
        )


def load_source(config: RunConfig, workdir: str | os.PathLike | None) -> Source:
    """The text and the tokenizer of a run, which writes nothing.

    Args:
      config: of the run.
      workdir: whose tokenizer it goes on with; None makes a new one.

    Raises:
      ValueError: the model's vocabulary is smaller than the tokenizer's, or the text
        does not fill a batch.
    """
    corpus = config.data.load()
    say(corpus.summary())
    if isinstance(corpus, prepared.Corpus):
        return _prepared_source(config, corpus, workdir)
    tokens = load_tokenizer(config.data, corpus, workdir)
    _check_vocab(config, tokens)
    learned = tokenizer.encode_documents(tokens, corpus.train)
    rows = _with_long(
        config.data,
        lambda least: _rows([ids for ids in learned if ids.size >= least], config),
    )
    held_out = tokenizer.encode_documents(tokens, corpus.validation)
    return Source(
        corpus=corpus,
        tokenizer=tokens,
        rows=rows,
        bytes_per_token=corpus.train_bytes / sum(map(len, learned)),
        validation=_validation_rows(held_out, config),
        validation_bytes_per_token=corpus.validation_bytes / sum(map(len, held_out)),
    )


def _prepared_source(
    config: RunConfig, corpus: prepared.Corpus, workdir: str | os.PathLike | None
) -> Source:
    """As `load_source`, of which nothing but counts is read."""
    tokens = corpus.tokenizer
    kept = _kept_tokenizer(workdir)
    if kept is not None:
        before = tokenizer.load(kept).fingerprint
        if before != tokens.fingerprint:
            raise checkpoint.ConfigMismatch(
                f"{corpus.name!r} was prepared with another tokenizer than {kept}: "
                f"{tokens.fingerprint}, not {before}."
            )
    _check_vocab(config, tokens)

    def rows(split: prepared.Split, least: int) -> stream.Source:
        size, stretch = config.train.seq_len, config.train.stretch
        made = [
            (part.rows(split, seq_len=size, stretch=stretch, least=least), share)
            for part, share in corpus.parts
        ]
        return stream.Mixture(made) if len(made) > 1 else made[0][0]

    validation = None
    if config.train.validate_every:
        validation = _validation_batches(rows("validation", 0), config)
    return Source(
        corpus=corpus,
        tokenizer=tokens,
        rows=_with_long(config.data, lambda least: rows("train", least)),
        bytes_per_token=corpus.bytes_per_token("train"),
        validation=validation,
        validation_bytes_per_token=corpus.bytes_per_token("validation"),
    )


def _with_long(data: DataConfig, make: Callable[[int], stream.Source]) -> stream.Source:
    """Rows of the documents that `make` is told the least length of."""
    long = make(data.long_tokens)
    if data.long_share == 1:
        return long
    return stream.Mixture([(make(0), 1 - data.long_share), (long, data.long_share)])


def _check_vocab(config: RunConfig, tokens: tokenizer.Tokenizer) -> None:
    if tokens.vocab_size > config.model.vocab:
        raise ValueError(
            f"model.vocab ({config.model.vocab}) must be at least the tokenizer's "
            f"{tokens.vocab_size} entries: set model.vocab={tokens.vocab_size}."
        )


def load_tokenizer(
    data: DataConfig, corpus: text.Corpus, workdir: str | os.PathLike | None
) -> tokenizer.Tokenizer:
    """The tokenizer kept in `workdir`, or beside its checkpoints; a new one without."""
    kept = _kept_tokenizer(workdir)
    if kept is not None:
        return tokenizer.load(kept)
    if data.tokenizer == "bytes":
        return tokenizer.ByteTokenizer()
    if data.tokenizer != "bpe":
        return tokenizer.load(data.tokenizer)
    return tokenizer.train_bpe((d.data for d in corpus.train), data.vocab)


def _kept_tokenizer(workdir: str | os.PathLike | None) -> Path | None:
    if workdir is None:
        return None
    folders = [Path(workdir)]
    if folders[0].name == checkpoint.FOLDER:
        folders.append(folders[0].parent)
    paths = (folder / checkpoint.TOKENIZER for folder in folders)
    return next((path for path in paths if path.exists()), None)


def _check_tokenizer(config: RunConfig, origin: release.Origin) -> None:
    """Refuses other tokens than those that a model to start from has learned."""
    found, asked = origin.tokenizer, config.data.tokenizer
    same = asked in ("bpe", origin.config.data.tokenizer)  # a file need not be here
    if asked == "bytes":
        same = isinstance(found, tokenizer.ByteTokenizer)
    elif not same:
        same = tokenizer.load(asked).fingerprint == found.fingerprint
    if not same:
        raise checkpoint.ConfigMismatch(
            f"data.tokenizer={asked!r} is not the tokenizer of the run to start from, "
            f"{origin.lineage['path']!r}: leave it at that run's value."
        )


def _rows(documents: Sequence[np.ndarray], config: RunConfig) -> stream.Rows:
    return stream.rows_of(
        documents,
        seq_len=config.train.seq_len,
        vocab_size=config.model.vocab,
        stretch=config.train.stretch,
    )


def _batch(item: Mapping[str, Any]):
    """What a step takes of what an iterator, or a row, gives."""
    if "document" in item:
        return step_lib.Packed(item["tokens"], item["document"])
    return item["tokens"]


def _data(
    config: RunConfig, source: Source, mesh: jax.sharding.Mesh
) -> tuple[grain.DatasetIterator, dict]:
    """This process's share of batches, and what their iterator's state belongs to."""
    settings = stream.StreamConfig(
        seq_len=config.train.seq_len,
        batch=config.train.batch,
        seed=config.seed,
        workers=config.train.workers,
        stretch=config.train.stretch,
    )
    index, count = sharding.own_share(mesh)
    fingerprint = stream.fingerprint(
        settings,
        source.corpus.sha256,
        source.tokenizer.fingerprint,
        process_count=count,
    )
    batches = stream.batches(
        source.rows, settings, process_index=index, process_count=count
    )
    return iter(batches), fingerprint


def groups(config: RunConfig, graphdef: nnx.GraphDef, params: PyTree) -> Groups:
    """How the optimizer of a run tells parameters apart; `params` may be shapes."""
    layers = None
    if optim.needs_inputs(config.optimizer):
        layers = dense_kernels(graphdef, params, config.train.seq_len)
    return Groups(lm.periods(config.model, params, config.train.seq_len), layers)


def describe(config: RunConfig) -> str:
    """The groups of a run's optimizer as a table, without making the model."""
    graphdef, params = lm.abstract_model(config.model)
    return optim.describe(
        config.optimizer, params, **groups(config, graphdef, params)._asdict()
    )


def _check_params(config: RunConfig, params: PyTree) -> None:
    """Refuses parameters of another model."""
    expected, given = (
        {
            ".".join(path_names(path)): (leaf.shape, jnp.dtype(leaf.dtype).name)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (lm.abstract(config.model), params)
    )
    for name in [*expected, *given]:
        if expected.get(name) != given.get(name):
            raise ValueError(
                f"params are of another model than config.model: {name} is "
                f"{given.get(name)}, must be {expected.get(name)}."
            )


def _model(config: RunConfig, mesh: jax.sharding.Mesh, params: PyTree | None = None):
    """The static half of the model, the state before the first step, the optimizer and
    the matrices whose inputs it needs, if any."""

    def begin(params=None):
        parameters_key, run_key = jax.random.split(jax.random.key(config.seed))
        if params is None:
            params = lm.build(config.model, parameters_key)[1]
        return state_lib.create(params, tx, run_key, guard.begin(config.guard.window))

    graphdef, shapes = lm.abstract_model(config.model)
    tx, layers = make_optimizer(config, graphdef, shapes, mesh)
    if params is not None:
        _check_params(config, params)
        params = jax.tree.map(jnp.copy, params)  # a step gives its buffers away
    elif sharding.cuts(mesh):  # no device has room for all of it
        lies = sharding.state_shardings(jax.eval_shape(begin), shapes, mesh)
        return graphdef, jax.jit(begin, out_shardings=lies)(), tx, layers
    return graphdef, sharding.place(begin(params), shapes, mesh), tx, layers


def make_step(
    config: RunConfig, graphdef: Any, tx: Any, layers: PyTree | None, mesh: Any
) -> Callable:
    """The guarded step of a run, pure (`hope_jax.train.step.make_step`)."""
    step = step_lib.make_step(
        graphdef,
        functools.partial(lm.apply, horizon=config.train.seq_len),
        tx,
        functools.partial(optim.differentiation, config.optimizer, layers),
        mesh,
        config.train.stretch,
        config.train.accumulate,
        config.train.gather == "layer",
        functools.partial(systems.of_step, config.model),
    )
    return guard.guarded(step, config.guard.sigma)


def make_optimizer(config: RunConfig, graphdef: Any, params: PyTree, mesh: Any):
    """The optimizer of a run, and the matrices whose inputs it needs, if any; `params`
    may be shapes."""
    moved = groups(config, graphdef, params)
    tx = optim.build(
        config.optimizer,
        total_steps=config.train.steps,
        **moved._asdict(),
        mesh=mesh if mesh is not None and mesh.size > 1 else None,
    )
    return tx, moved.layers


def make_mesh(config: RunConfig, devices: Sequence[Any] | None = None):
    """The mesh of a run, which its model, its optimizer and its batch fit.

    Raises:
      ValueError: they do not; says what does.
    """
    mesh = sharding.make_mesh(devices, sharding.read_mesh(config.train.mesh))
    check_mesh(config, mesh)
    return mesh


def check_mesh(config: RunConfig, mesh: Any) -> None:
    """Refuses a mesh that model, optimizer or batch do not fit; see `make_mesh`."""
    train = config.train
    sharding.check_heads(config.model.heads, mesh)
    sharding.check_batch(train.batch, mesh, train.accumulate)
    sharding.check_tokens(config.model, train.seq_len, train.stretch, mesh)
    rule = config.optimizer.rule
    if sharding.FSDP in mesh.axis_names and rule.inputs and train.gather == "layer":
        raise ValueError(
            f"optimizer.rule ({rule.kind}) learns from the inputs of whole matrices: "
            "with fsdp set train.gather=step."
        )


def _agree(config: RunConfig, fingerprint: Mapping[str, Any]) -> None:
    """Returns once every process has accepted the same run."""
    processes.check_same(
        config=json.dumps(config_lib.to_json(config), sort_keys=True),
        data=json.dumps(fingerprint, sort_keys=True),
    )


def _see_folder(workdir: Path) -> None:
    """Waits for the folder of a new run, and refuses one that not all see."""
    processes.wait("the folder of the run")
    if not processes.all_true((workdir / checkpoint.TOKENIZER).exists()):
        raise ValueError(
            f"workdir ({workdir}) must be a folder that all processes see, but some "
            "see nothing of what process 0 wrote there: give one on shared storage."
        )


def _validation_rows(
    documents: Sequence[np.ndarray], config: RunConfig
) -> list[PyTree] | None:
    if not config.train.validate_every:
        return None
    return _validation_batches(_rows(documents, config), config)


def _validation_batches(rows: stream.Source, config: RunConfig) -> list[PyTree]:
    seq_len, batch = config.train.seq_len, config.train.batch
    batches = min(config.train.validate_batches, len(rows) // batch)
    if batches == 0:
        raise ValueError(
            f"The validation text gives {len(rows)} rows of seq_len={seq_len}, fewer "
            f"than one batch of {batch}. Use a smaller batch, a shorter seq_len, more "
            "text, or train.validate_every=0."
        )
    chosen = [_batch(rows[i]) for i in range(batches * batch)]
    return [
        jax.tree.map(lambda *leaves: np.stack(leaves), *chosen[i : i + batch])
        for i in range(0, len(chosen), batch)
    ]


def _validation(graphdef: Any, config: RunConfig, source: Source, mesh):
    """`params -> metrics` over the validation rows, or None."""
    rows = source.validation
    if rows is None:
        return None
    evaluate = sharding.jit_evaluation(
        step_lib.make_evaluation(graphdef, lm.apply, config.train.stretch, mesh),
        mesh,
        lm.abstract(config.model),
    )
    own = [sharding.own_rows(batch, mesh) for batch in rows]

    def mean(params) -> dict[str, float]:
        # Waited for, as steps are: of more than 32 programs in flight the collectives
        # of virtual CPU devices can dead-lock before jax 0.12.
        losses = [
            float(evaluate(params, sharding.shard_batch(batch, mesh))) for batch in own
        ]
        loss = float(np.mean(losses))
        a_byte = bits(loss, source.validation_bytes_per_token)
        return {"validation_loss": loss, "validation_bits_per_byte": a_byte}

    return mean


def check_workdir(workdir: str | os.PathLike) -> Path:
    """The folder of a run, new, empty or of this program; only looks.

    Raises:
      hope_jax.train.folder.ForeignFolder: any other; a release, of which training would
        spoil the files.
    """
    folder = check_folder("--workdir", workdir, _FILES, is_run)
    if release.is_release(folder):
        given = os.fspath(workdir)
        raise ForeignFolder(
            f"--workdir={given!r} is a release, whose files are to stay as they are. "
            f"Give another folder, and --init_from={given} to begin with its model."
        )
    return folder


def is_run(folder: Path) -> bool:
    """Whether this program wrote `folder`: by its config, or by its checkpoints'."""
    if {path.name for path in folder.iterdir()} <= {_UNFINISHED, lock.FILE}:
        return True
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config_lib.from_json(RunConfig, data)
        return True
    except (OSError, ValueError, TypeError, RecursionError):
        if not _has_checkpoints(folder):
            return False
    with checkpoint.Checkpoints(folder / checkpoint.FOLDER, read_only=True) as saved:
        return saved.readable()


def _has_checkpoints(folder: Path) -> bool:
    saved = folder / checkpoint.FOLDER
    return saved.is_dir() and any(p.name.isdigit() for p in saved.iterdir())


def _write_config(workdir: Path, config: RunConfig) -> None:
    """Beside, then renamed: a folder with a config is one of a run."""
    text_ = json.dumps(config_lib.to_json(config), indent=2, allow_nan=False)
    metrics_lib.replace(workdir / CONFIG, text_ + "\n")


def _spec(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
