"""The loop: data, mesh and state brought together, steps taken, everything kept.

A workdir holds one run:

    config.json  tokenizer.json  metrics.jsonl  tensorboard/  checkpoints/
"""

import contextlib
import functools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree
from rich import progress

from hope_jax import optim
from hope_jax.core import config as config_lib
from hope_jax.data import stream, text, tokenizer
from hope_jax.models import lm, systems
from hope_jax.models.capture import dense_kernels
from hope_jax.optim.leaves import path_names
from hope_jax.train import checkpoint, processes, sharding
from hope_jax.train import state as state_lib
from hope_jax.train import step as step_lib
from hope_jax.train.config import DataConfig, RunConfig, check_rows
from hope_jax.train.folder import check_folder
from hope_jax.train.metrics import MetricLog

CONFIG = "config.json"
_UNFINISHED = f".{CONFIG}"  # what a kill may leave of the first file that is written
_FILES = (
    *(CONFIG, _UNFINISHED, checkpoint.TOKENIZER, tokenizer.BESIDE, checkpoint.FOLDER),
    *("metrics.jsonl", "tensorboard"),
)
_MUST_BE_FINITE = ("loss", "grad_norm", "update_norm")


class NonFinite(FloatingPointError):
    """A step whose loss, gradient or update is NaN or infinite. Names the step."""


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
      step: steps done, and saved.
      finished: whether these are all of them.
      stopped_by: number of the signal that ended it, or None.
      metrics: of the last step read; empty when none was taken.
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

    corpus: text.Corpus
    tokenizer: tokenizer.Tokenizer
    rows: stream.Rows
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
) -> Outcome:
    """Runs `config` in `workdir` to its last step, or until SIGTERM or SIGINT.

    A signal lets the step at hand finish and saves; `resume` then goes on so that
    parameters, optimizer state, keys, data and `metrics.jsonl` become, byte for byte,
    those of a run that was never stopped (on the same devices and versions).

    Several processes (`jax.distributed`, which `launch.distributed` starts) each call
    this with the same arguments, `workdir` a folder that all of them see. Each reads
    its share of every batch, the first alone writes and speaks, all save; a signal to
    any of them stops all of them after the same step.

    Args:
      config: the run.
      workdir: a folder for it alone; made if absent.
      resume: go on from the newest intact checkpoint; from the start if there is none.
      params: where the model starts, as of `lm.build`, for example pre-trained
        (`hope_jax.models.pretrained`); by default drawn from the seed.

    Raises:
      FileExistsError: `workdir` has checkpoints and `resume` is False.
      hope_jax.train.folder.ForeignFolder: `workdir` is not of this program. Nothing in
        it is touched before config, data and folder are accepted.
      ValueError: a config that does not fit its rows, its data or the devices; `params`
        of another model; processes that were given different arguments.
      hope_jax.train.checkpoint.ConfigMismatch: resumed with another config or data.
      hope_jax.train.checkpoint.SaveFailed: a checkpoint could not be written.
      NonFinite: the loss, gradient or update of a step is NaN or infinite.
    """
    check_rows(config)
    workdir = check_workdir(workdir)
    mesh = make_mesh(config)
    begun = _has_checkpoints(workdir)
    processes.check_same(checkpoints=f"{workdir}: {begun}")
    if begun and not resume:
        raise FileExistsError(
            f"{str(workdir)!r} has checkpoints already: pass --resume to go on with "
            "that run, or another --workdir."
        )

    with contextlib.ExitStack() as stack:
        stop = processes.Stop(stack.enter_context(_stop_on_signal()), mesh)
        if begun:
            with checkpoint.Checkpoints(
                workdir / checkpoint.FOLDER, read_only=True
            ) as saved_before:
                saved_before.check_config(config)
        source = load_source(config, workdir if begun else None)
        iterator, fingerprint = _data(config, source, mesh)
        stack.callback(iterator.close)
        graphdef, state, tx, layers = _model(config, mesh, params)

        # Accepted: what is new is written now, what is gone on with once it is read.
        _agree(config, fingerprint)
        if not begun:
            _begin_folder(workdir, config, source.tokenizer)
        checkpoints = stack.enter_context(
            checkpoint.Checkpoints(workdir / checkpoint.FOLDER, keep=config.train.keep)
        )
        _say(
            f"{lm.count_parameters(config.model):,} parameters on "
            f"{jax.device_count()} x {jax.devices()[0].device_kind}"
            f"{sharding.describe(mesh)}"
        )
        done, saved = 0, None
        restored = checkpoints.restore(
            jax.tree.map(_spec, state),
            iterator=iterator,
            config=config,
            fingerprint=fingerprint,
        )
        if restored is not None:
            state, done = restored
            saved = done
            _say(f"resumed at step {done} of {config.train.steps}")
            if processes.writes():
                _write_config(workdir, config)
                if not (workdir / checkpoint.TOKENIZER).exists():
                    source.tokenizer.save(workdir / checkpoint.TOKENIZER)
        elif resume:
            _say(f"no checkpoint in {workdir} yet: starting at step 0")

        step = make_step(config, graphdef, tx, layers, mesh)
        step = sharding.jit_step(step, mesh, state)
        validate = _validation(graphdef, config, source, mesh)
        log = MetricLog(workdir, done) if processes.writes() else _Unwritten()
        stack.callback(log.close)
        shown = stack.enter_context(_Progress(config, done))
        latest: dict[str, float] = {}

        def read(number: int, metrics: Mapping[str, jax.Array], extra: Mapping):
            """Waits for the metrics of a step, refuses bad ones, writes them down."""
            nonlocal latest
            latest = {k: float(v) for k, v in jax.device_get(metrics).items()}
            stop.hear()
            _check_finite(latest, number, saved, workdir)
            latest["bits_per_byte"] = _bits(latest["loss"], source.bytes_per_token)
            latest["tokens"] = number * config.train.batch * config.train.seq_len
            latest |= extra
            shown.update(number, latest)
            if extra or number % config.train.log_every == 0 or number == last:
                log.write(number, latest, speeds=shown.speeds())

        last = config.train.steps
        pending = None
        while done < last and stop.signal is None:
            batch = sharding.shard_batch(_batch(next(iterator)), mesh)
            state, metrics = step(state, batch)  # dispatched, not waited for
            stop.say()
            done += 1
            if pending is not None:
                read(*pending)
            pending = (done, metrics, {})
            if validate and (done % config.train.validate_every == 0 or done == last):
                pending = (done, metrics, validate(state.params))
            if done % config.train.checkpoint_every == 0 or done == last:
                read(*pending)
                pending = None
                log.sync()
                checkpoints.save(
                    done,
                    state,
                    iterator=iterator,
                    config=config,
                    fingerprint=fingerprint,
                )
                saved = done
        if stop.signal is not None:
            _say(f"{signal.Signals(stop.signal).name}: saving step {done}")
        if pending is not None:
            read(*pending)
        if saved != done:
            log.sync()
            checkpoints.save(
                done, state, iterator=iterator, config=config, fingerprint=fingerprint
            )
        checkpoints.wait()
    return Outcome(done, done == last, stop.signal, latest)


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
    _say(corpus.summary())
    tokens = load_tokenizer(config.data, corpus, workdir)
    if tokens.vocab_size > config.model.vocab:
        raise ValueError(
            f"model.vocab ({config.model.vocab}) must be at least the tokenizer's "
            f"{tokens.vocab_size} entries: set model.vocab={tokens.vocab_size}."
        )
    learned = tokenizer.encode_documents(tokens, corpus.train)
    rows = _rows(learned, config)
    held_out = tokenizer.encode_documents(tokens, corpus.validation)
    return Source(
        corpus=corpus,
        tokenizer=tokens,
        rows=rows,
        bytes_per_token=corpus.train_bytes / sum(map(len, learned)),
        validation=_validation_rows(held_out, config),
        validation_bytes_per_token=corpus.validation_bytes / sum(map(len, held_out)),
    )


def load_tokenizer(
    data: DataConfig, corpus: text.Corpus, workdir: str | os.PathLike | None
) -> tokenizer.Tokenizer:
    """The tokenizer kept in `workdir`; a new one without it."""
    if workdir is not None and (Path(workdir) / checkpoint.TOKENIZER).exists():
        return tokenizer.load(Path(workdir) / checkpoint.TOKENIZER)
    if data.tokenizer == "bytes":
        return tokenizer.ByteTokenizer()
    if data.tokenizer != "bpe":
        return tokenizer.load(data.tokenizer)
    return tokenizer.train_bpe((d.data for d in corpus.train), data.vocab)


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
        return state_lib.create(params, tx, run_key)

    graphdef, shapes = lm.abstract_model(config.model)
    tx, layers = make_optimizer(config, graphdef, shapes, mesh)
    if params is not None:
        _check_params(config, params)
        params = jax.tree.map(jnp.copy, params)  # a step gives its buffers away
    elif sharding.cuts(mesh):  # no device has room for all of it
        lies = sharding.state_shardings(state_lib.abstract(shapes, tx), shapes, mesh)
        return graphdef, jax.jit(begin, out_shardings=lies)(), tx, layers
    return graphdef, sharding.place(begin(params), shapes, mesh), tx, layers


def make_step(
    config: RunConfig, graphdef: Any, tx: Any, layers: PyTree | None, mesh: Any
):
    """The step of a run, pure (`hope_jax.train.step.make_step`)."""
    return step_lib.make_step(
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
    rule = config.optimizer.rule
    if sharding.FSDP in mesh.axis_names and rule.inputs and train.gather == "layer":
        raise ValueError(
            f"optimizer.rule ({rule.kind}) learns from the inputs of whole matrices: "
            "with fsdp set train.gather=step."
        )


def _validation_rows(
    documents: Sequence[np.ndarray], config: RunConfig
) -> list[PyTree] | None:
    if not config.train.validate_every:
        return None
    seq_len, batch = config.train.seq_len, config.train.batch
    rows = _rows(documents, config)
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
        step_lib.make_evaluation(graphdef, lm.apply, config.train.stretch),
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
        bits = _bits(loss, source.validation_bytes_per_token)
        return {"validation_loss": loss, "validation_bits_per_byte": bits}

    return mean


def _check_finite(
    metrics: Mapping[str, float], step: int, saved: int | None, workdir: Path
) -> None:
    bad = [name for name in _MUST_BE_FINITE if not math.isfinite(metrics[name])]
    if not bad:
        return
    kept = f"the checkpoint of step {saved}" if saved is not None else "no checkpoint"
    values = ", ".join(f"{name} is {metrics[name]}" for name in bad)
    raise NonFinite(
        f"Step {step}: {values}. Nothing was saved of it; {workdir} keeps {kept}. A "
        "lower optimizer.learning_rate or a longer optimizer.warmup_steps may help."
    )


def check_workdir(workdir: str | os.PathLike) -> Path:
    """The folder of a run, new, empty or of this program; only looks.

    Raises:
      hope_jax.train.folder.ForeignFolder: any other.
    """
    return check_folder("--workdir", workdir, _FILES, is_run)


def is_run(folder: Path) -> bool:
    """Whether this program wrote `folder`: by its config, or by its checkpoints'."""
    if {path.name for path in folder.iterdir()} <= {_UNFINISHED}:
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


def _agree(config: RunConfig, fingerprint: Mapping[str, Any]) -> None:
    """Returns once every process has accepted the same run."""
    processes.check_same(
        config=json.dumps(config_lib.to_json(config), sort_keys=True),
        data=json.dumps(fingerprint, sort_keys=True),
    )


def _begin_folder(workdir: Path, config: RunConfig, tokens: tokenizer.Tokenizer):
    """Makes the folder of a new run, which all processes then see."""
    if processes.writes():
        workdir.mkdir(parents=True, exist_ok=True)
        _write_config(workdir, config)
        tokens.save(workdir / checkpoint.TOKENIZER)
    processes.wait("the folder of the run")
    if not processes.all_true((workdir / checkpoint.TOKENIZER).exists()):
        raise ValueError(
            f"workdir ({workdir}) must be a folder that all processes see, but some "
            "see nothing of what process 0 wrote there: give one on shared storage."
        )


def _write_config(workdir: Path, config: RunConfig) -> None:
    """Beside, then renamed: a folder with a config is one of a run."""
    text_ = json.dumps(config_lib.to_json(config), indent=2, allow_nan=False)
    (workdir / _UNFINISHED).write_text(text_ + "\n", encoding="utf-8")
    (workdir / _UNFINISHED).replace(workdir / CONFIG)


def _spec(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _bits(nats: float, bytes_per_token: float) -> float:
    return nats / math.log(2) / bytes_per_token


def _say(line: str) -> None:
    if processes.writes():
        print(line, flush=True)


class _Unwritten:
    """The log of a process that writes none."""

    def write(self, *_, **__) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Stop:
    signal: int | None = None


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    """Notes the first SIGTERM or SIGINT; a second one acts as it did before."""
    stop, before = _Stop(), {}

    def note(number, frame):
        stop.signal = number
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals are somebody else's
        pass
    try:
        yield stop
    finally:
        restore()


class _Progress:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, config: RunConfig, done: int):
        self._config, self._start, self._done = config, done, done
        self._began: float | None = None
        self._bar: progress.Progress | None = None
        if sys.stdout.isatty() and processes.writes():
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[numbers]}"),
                progress.TimeRemainingColumn(),
            )

    def __enter__(self) -> "_Progress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                self._config.row,
                total=self._config.train.steps,
                completed=self._done,
                numbers="compiling",
            )
        else:
            _say("compiling the step, once")
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self._done = step
        if self._began is None:  # the first step compiles, so the clock starts after it
            self._began, self._start = time.monotonic(), step
        numbers = (
            f"loss {metrics['loss']:.4f} nats  {metrics['bits_per_byte']:.3f} bits/byte"
        )
        speed = self.speeds().get("tokens_per_second")
        if speed:
            numbers += f"  {speed:,.0f} tokens/s"
        if "validation_bits_per_byte" in metrics:
            numbers += f"  validation {metrics['validation_bits_per_byte']:.3f}"
        train = self._config.train
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step % train.log_every == 0 or step in (1, train.steps):
            left = ""
            if speed:
                seconds = (train.steps - step) * train.batch * train.seq_len / speed
                left = f"  {seconds:,.0f} s left"
            _say(f"step {step}/{train.steps}  {numbers}{left}")

    def speeds(self) -> dict[str, float]:
        """Tokens a second since the first step of this process."""
        steps = self._done - self._start
        if self._began is None or steps < 1:
            return {}
        tokens = steps * self._config.train.batch * self._config.train.seq_len
        return {"tokens_per_second": tokens / (time.monotonic() - self._began)}
