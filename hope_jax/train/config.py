"""The config of a run: everything that decides its result, in one frozen place."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from hope_jax import optim
from hope_jax.core import config as config_lib
from hope_jax.core import show
from hope_jax.core.config import at_least, at_most, float32
from hope_jax.data import prepared, text, tokenizer
from hope_jax.models import lm
from hope_jax.models.mixers.attention import AttentionConfig
from hope_jax.optim.rules import RULES, saved
from hope_jax.train import sharding
from hope_jax.train.metrics import check_name

C = TypeVar("C")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, in which tokens.

    Attributes:
      path: a text file, a folder or a glob; None for the standard library's sources. Or
        a folder that `launch.prepare_data` made, or several with the shares of rows
        that they give: `a:0.7,b:0.3`.
      tokenizer: `bytes`, `bpe` (byte-level BPE trained on the training files), or the
        path of a `tokenizer.json`, as that of a checkpoint.
      vocab: entries of the BPE; bytes always have 257.
      undecodable: what to do with files that are not UTF-8.
      max_train_bytes: most bytes of training text, None for all.
      max_validation_bytes: the same for the validation text.
      long_tokens: a share of the rows is made of documents of so many tokens or more
        alone; 0 makes no difference between documents.
      long_share: that share.
    """

    path: str | None = None
    tokenizer: str = "bytes"
    vocab: int = 4096
    undecodable: text.Undecodable = "raise"
    max_train_bytes: int | None = None
    max_validation_bytes: int | None = 250_000
    long_tokens: int = 0
    long_share: float = 1.0

    _repr_html_ = show.config

    def __post_init__(self):
        at_least(self, vocab=257, long_tokens=0)
        if not 0 < self.long_share <= 1:
            raise ValueError(
                f"long_share must be above 0 and at most 1, got {self.long_share}."
            )
        if self.long_share < 1 and not self.long_tokens:
            raise ValueError(
                f"long_share ({self.long_share}) needs long_tokens: of how many tokens "
                "a long document is."
            )
        if self.tokenizer not in ("bytes", "bpe") and Path(self.tokenizer).suffix != (
            ".json"
        ):
            raise ValueError(
                "tokenizer must be bytes, bpe or the path of a tokenizer.json, got "
                f"{self.tokenizer!r}."
            )

    def load(self, path: str | None = None) -> text.Corpus | prepared.Corpus:
        """The text, or that of another `path` under the same limits; errors are those
        of `hope_jax.data.text.load` and `hope_jax.data.prepared.corpus`."""
        found = prepared.corpus(path or self.path, self.max_validation_bytes)
        if found is not None:
            if path is None:
                self._check_prepared(found)
            return found
        return text.load(
            path or self.path,
            max_train_bytes=self.max_train_bytes,
            max_validation_bytes=self.max_validation_bytes,
            undecodable=self.undecodable,
        )

    def _check_prepared(self, found: prepared.Corpus) -> None:
        """Refuses fields that were decided when the data was prepared."""
        for name, unset in (("max_train_bytes", None), ("undecodable", "raise")):
            value = getattr(self, name)
            if value != unset:
                raise ValueError(
                    f"data.{name} ({value}) is for text, but {found.name!r} is "
                    f"prepared already: leave it at {unset}, or prepare other data."
                )
        if self.tokenizer == "bytes":
            same = isinstance(found.tokenizer, tokenizer.ByteTokenizer)
        elif self.tokenizer == "bpe":
            same = isinstance(found.tokenizer, tokenizer.BpeTokenizer)
            same = same and found.tokenizer.vocab_size == self.vocab
        else:
            own = tokenizer.load(self.tokenizer)
            same = own.fingerprint == found.tokenizer.fingerprint
        if not same:
            path = found.parts[0][0].folder / prepared.TOKENIZER
            raise ValueError(
                f"data.tokenizer ({self.tokenizer}, data.vocab {self.vocab}) is not "
                f"the one that {found.name!r} was prepared with: set "
                f"data.tokenizer={path} (and model.vocab="
                f"{found.tokenizer.vocab_size} or more)."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the outermost level learns.

    Attributes:
      rule: one of `hope_jax.optim.RULES`, with its options; in Python its name will do.
        It moves matrices, and all else too unless it is one for matrices alone: then
        adamw does.
      embeddings: another rule for these; None for what `rule` says.
      convolutions: the same.
      others: the same, for biases, scales, rates and initial states.
      learning_rate: the highest, reached after `warmup_steps`.
      warmup_steps: of linear warm-up from 0.
      final_fraction: of `learning_rate`, where the cosine ends.
      weight_decay: decoupled, times the learning rate; matrices only.
      clip_norm: most global norm of a gradient; None for no limit.
    """

    rule: Annotated[optim.Rule, RULES] = RULES.get("adamw")
    embeddings: Annotated[optim.Rule, RULES] | None = None
    convolutions: Annotated[optim.Rule, RULES] | None = None
    others: Annotated[optim.Rule, RULES] | None = None
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0

    _repr_html_ = show.config

    def __post_init__(self):
        for name in ("rule", "embeddings", "convolutions", "others"):
            object.__setattr__(self, name, RULES.of(getattr(self, name), name))
        optim.rules_of(self)
        at_least(self, learning_rate=0.0, warmup_steps=0, weight_decay=0.0)
        float32(self, "learning_rate", "weight_decay", "clip_norm")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(
                f"final_fraction must lie between 0 and 1, got {self.final_fraction}."
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(
                "clip_norm must be above 0, or none for no limit; got "
                f"{self.clip_norm}."
            )

    @classmethod
    def migrated(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """Saved when rules were names, and the options of all of them stood beside."""
        if "name" not in data:
            return data
        kinds = ("embeddings", "convolutions", "others")
        gone = {"name", "b1", "b2", *kinds, *RULES}
        now = {key: value for key, value in data.items() if key not in gone}
        now["rule"] = saved(data["name"], data)
        plain = dataclasses.asdict(RULES.get("adamw"))
        adam = plain | saved("adamw", data)  # of all that a rule for matrices leaves
        for kind in kinds:
            if data.get(kind) is not None:
                now[kind] = saved(data[kind], data)
            elif RULES.get(data["name"]).matrices and adam != plain:
                now[kind] = adam
        return now


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, and what is written down on the way.

    Attributes:
      steps: optimizer steps of the whole run.
      batch: sequences of a step, over all devices.
      accumulate: parts in which each device reads its sequences of a step, one after
        another; the gradient is their mean. What the backward pass needs is kept of
        one part alone.
      mesh: how devices share the work, `data:2,fsdp:4` (`hope_jax.train.sharding`);
        `data` is what the others leave. With `sequence` they share the tokens of rows.
      gather: on a mesh with `fsdp`, when weights are made whole: a `layer` at a time,
        whenever one is read, or all before each `step`, for which there must be room.
      seq_len: tokens of a sequence; those that attention to whole rows looks back over
        (`check_rows`).
      stretch: tokens, a multiple of the model's `span`: every document begins at a
        multiple of so many tokens of a row and knows nothing of the one before it. 0
        lays documents end to end, and a row goes on from one to the next.
      workers: processes that read data; 0 reads in the training process.
      log_every: steps between two lines of `metrics.jsonl`.
      checkpoint_every: steps between two checkpoints; the last step is always saved.
      validate_every: steps between two passes over validation rows; 0 for none.
      validate_batches: batches of such a pass.
      keep: newest checkpoints kept.
    """

    steps: int
    batch: int = 8
    accumulate: int = 1
    mesh: str = ""
    gather: Literal["layer", "step"] = "layer"
    seq_len: int = 256
    stretch: int = 0
    workers: int = 0
    log_every: int = 10
    checkpoint_every: int = 200
    validate_every: int = 0
    validate_batches: int = 8
    keep: int = 3

    _repr_html_ = show.config

    def __post_init__(self):
        at_least(
            self,
            steps=1,
            batch=1,
            accumulate=1,
            seq_len=1,
            stretch=0,
            workers=0,
            log_every=1,
            checkpoint_every=1,
            validate_every=0,
            validate_batches=1,
            keep=1,
        )
        whole = 2**31 - 1  # steps are counted in int32
        at_most(self, steps=whole, batch=whole, accumulate=whole, seq_len=whole)
        sizes = sharding.read_mesh(self.mesh)
        if self.gather != "layer" and sizes.get(sharding.FSDP, 1) < 2:
            raise ValueError(
                f"gather={self.gather!r} is for a mesh with fsdp, got "
                f"mesh={self.mesh!r}: elsewhere weights are whole."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a run does about harm (`hope_jax.train.guard`, `hope_jax.train.watchdog`).

    Attributes:
      sigma: a step whose loss or gradient norm is so many standard deviations above the
        mean of the last ones is skipped; 0 skips only what is not finite. 6 is usual;
        of 250 ordinary steps of a small Hope 4 skipped none, and 3 two. Leave it 0
        where the text itself changes at once, and is to be learned.
      window: how many the last ones are.
      give_up: steps skipped in a row after which the run goes back or ends; a tenth of
        `train.steps` if that is fewer.
      returns: how often it may go back to an earlier checkpoint. It then reads on in
        the data, and does not see again what it read since.
      back: steps that it goes back at least, if checkpoints reach so far.
      patience: seconds in which a batch has to come or a step to end, 0 for no limit.
      long_patience: seconds for a compilation, a save, a restore or a validation.
    """

    sigma: float = 0.0
    window: int = 128
    give_up: int = 20
    returns: int = 1
    back: int = 100
    patience: float = 300.0
    long_patience: float = 3600.0

    _repr_html_ = show.config

    def __post_init__(self):
        at_least(
            self,
            sigma=0.0,
            window=2,
            give_up=1,
            returns=0,
            back=0,
            patience=0.0,
            long_patience=0.0,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One row of an experiment.

    Attributes:
      experiment: the module under `experiments/` that names the row.
      row: the row of its table.
      scale: which of its sizes, for example "smoke" or "full".
      seed: of the initial parameters and of the order of the data.
    """

    experiment: str
    row: str
    scale: str = "full"
    seed: int = 0
    model: lm.ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    guard: GuardConfig = GuardConfig()

    _repr_html_ = show.config

    def __post_init__(self):
        for name in ("experiment", "row"):
            check_name(name, getattr(self, name))
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32), got {self.seed}.")
        if self.optimizer.warmup_steps > self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) exceeds "
                f"train.steps ({self.train.steps}); use a shorter warm-up."
            )


def check_rows(config: RunConfig) -> None:
    """Refuses to train on rows that do not fit the model.

    Raises:
      ValueError: rows longer or shorter than what the model's attention looks back
        over, or too short for any CMS level to move inside them.
    """
    seq_len, model = config.train.seq_len, config.model
    stretch = config.train.stretch
    if stretch and (seq_len % stretch or stretch % model.span):
        raise ValueError(
            f"train.stretch ({stretch}) must divide train.seq_len ({seq_len}) and be a "
            f"multiple of the model's span ({model.span}), after which all its clocks "
            "may begin anew."
        )
    for i, mixer in enumerate(model.pattern):
        place = f"model.mixer.{i}" if len(model.pattern) > 1 else "model.mixer"
        if mixer.most is not None and mixer.most < seq_len:
            raise ValueError(
                f"train.seq_len ({seq_len}) must be at most {place}.context "
                f"({mixer.most}), the most tokens of a row that {mixer.kind} has room "
                f"for: set {place}.context={seq_len}, or shorter rows."
            )
        if isinstance(mixer, AttentionConfig) and mixer.context != seq_len:
            raise ValueError(
                f"train.seq_len ({seq_len}) and {place}.context ({mixer.context}) must "
                "be the same: rows are what attention looks back over. Set "
                f"{place}.context={seq_len}, or train.seq_len={mixer.context}."
            )
    if model.fast and seq_len <= model.fast_periods[0]:
        raise ValueError(
            f"train.seq_len ({seq_len}) must be more than the fastest period of "
            f"model.cms.levels ({model.fast_periods[0]}): no level would move inside a "
            "row, and inner rates would learn nothing. Use longer rows or a shorter "
            "period, or set the rates of the levels to 0 to train them between rows "
            "alone."
        )


def read_config(cls: type[C], path: str | os.PathLike) -> C:
    """The config of a file that this program wrote.

    Args:
      cls: of the config, for example `RunConfig`.
      path: a `config.json`, or a file with one under `config`, as those of results.

    Raises:
      OSError: it cannot be read.
      ValueError: it holds no such config; the message names the file.
    """
    text = Path(path).read_bytes()
    try:
        data = json.loads(text)
        if isinstance(data, dict) and isinstance(data.get("config"), dict):
            data = data["config"]
        return config_lib.from_json(cls, data)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no config: {error}") from None
