"""Sessions: readers whose memories learn apart from each other and from the weights.

A model's weights are shared and never change; a session is what one reader's memory has
made of its text since. It has one size, however long that is, and can be saved, loaded
under its own name on the same weights, forked, merged, compared, frozen, put back and
deleted. As many sessions as there are slots have a turn at once, in one program
(`stream.slots`); the others are parked.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, PyTree

from hope_jax.core import config as config_lib
from hope_jax.core.config import at_least, did_you_mean, one_of
from hope_jax.data.tokenizer import Tokenizer
from hope_jax.models import learning, lm
from hope_jax.models.config import ModelConfig
from hope_jax.models.learning import Learning
from hope_jax.optim.leaves import path_names
from hope_jax.stream import saved, slots
from hope_jax.stream.generate import Sampling, drawing, find_stop, in_characters
from hope_jax.train.checkpoint import Damaged, manifest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class LimitExceeded(ValueError):
    """A request for more than `Limits` allow; nothing was done."""


class WrongSession(ValueError):
    """A file of another session, or of other weights; nothing was loaded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What all sessions together, and each of them, may take.

    Attributes:
      slots: sessions that have a turn at once.
      sessions: that are open.
      request: tokens of one request, read and drawn.
      session: tokens that one session ever reads and draws.
    """

    slots: int = 8
    sessions: int = 1024
    request: int = 100_000
    session: int = 2**31 - 1  # what a position can count

    def __post_init__(self):
        at_least(self, slots=1, sessions=1, request=1, session=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """How one session may learn.

    Attributes:
      learn: which parts do; False is a frozen session. Each other value is a program.
      longest_move: bound on the norm of one move of a CMS level, over its whole stack;
        a longer one is shortened to it.
      moves: that its CMS levels may make, all together; then they stay as they are.
      not_finite: what follows where a number of the session is NaN or infinite: its
        request ends, and the session is put back to its start, `reset`, or to where it
        stood before the step, `undo`.
    """

    learn: bool | Learning = True
    longest_move: float | None = None
    moves: int | None = None
    not_finite: Literal["reset", "undo"] = "reset"

    def __post_init__(self):
        if self.longest_move is not None and not self.longest_move > 0:
            raise ValueError(
                f"longest_move must be above 0, or None, got {self.longest_move}."
            )
        if self.moves is not None and not 0 <= self.moves <= slots.NO_BOUND:
            raise ValueError(f"moves must be 0 or more, or None, got {self.moves}.")
        one_of(self, not_finite=("reset", "undo"))


class Reply(NamedTuple):
    """What came of a request.

    Attributes:
      ids: the tokens that were drawn and read again.
      text: what they say, up to the text that stopped them.
      read: how many tokens were given.
      bits: what they cost on average under what was said before each, in bits: how
        much they surprised; NaN if none was.
      ended: `length`, all was done; `document`, the model would start another one;
        `stop`, a text of `Sampling.stop` is complete, and read; `reset` or `undo`, see
        `Policy.not_finite`; `cancelled`; `closed`, the session was.
    """

    ids: tuple[int, ...]
    text: str
    read: int
    bits: float
    ended: str


class Change(NamedTuple):
    """What a level has become.

    Attributes:
      norm: of its weights minus their start, over all rows of its stack.
      share: that, of the norm of the start; inf from a start of zeros.
      moves, shortened, way: of a CMS level, how often it moved, how often not so far as
        it would have, and the sum of the norms; None of a memory, which moves with
        every chunk.
    """

    norm: float
    share: float
    moves: int | None = None
    shortened: int | None = None
    way: float | None = None


@dataclasses.dataclass(frozen=True)
class Info:
    """What is known of a session without its memory.

    Attributes:
      name: of the session.
      tokens: that it has read.
      bits: that those given to it cost on average; NaN before any did.
      learn: which parts learn now.
      resets: how often it was put back because of a number that is not finite.
      busy: whether a request of it is under way.
    """

    name: str
    tokens: int
    bits: float
    learn: bool | Learning
    resets: int
    busy: bool


@dataclasses.dataclass
class _Job:
    """A request under way."""

    given: np.ndarray
    draws: int
    sampling: Sampling
    key: np.ndarray
    unscored: int  # given tokens before the first that anything was said of
    read: int = 0
    ids: list[int] = dataclasses.field(default_factory=list)
    text: bytes = b""
    stopped: int | None = None  # where the text that ended it begins
    nats: float = 0.0
    cancelled: bool = False
    ended: str = ""

    @property
    def scored(self) -> int:
        return max(0, self.read - self.unscored)

    def reply(self) -> Reply:
        text = self.text[: self.stopped].decode("utf-8", "replace")
        bits = _bits(self.nats, self.scored)
        return Reply(tuple(self.ids), text, self.read, bits, self.ended)


@dataclasses.dataclass
class _Session:
    """One reader: its memory is in a slot, or `parked`."""

    name: str
    policy: Policy
    parked: slots.Slots | None
    slot: int | None = None
    frozen: bool = False
    fresh: bool = True  # has read nothing since its start
    tokens: int = 0
    scored: int = 0
    nats: float = 0.0
    resets: int = 0
    used: int = 0
    job: _Job | None = None

    @property
    def learn(self) -> bool | Learning:
        return False if self.frozen else self.policy.learn


class Sessions:
    """All sessions on one model. For one thread.

    Args:
      config: of the model.
      params: its parameters, which are shared and never written to.
      tokenizer: as in training.
      limits: what sessions may take.
      block: most tokens between two looks at the host; a speed choice, never a result.
      together: of `slots.step`: True gives up the last bit for the speed of a batch.
      folder: where sessions are saved; None keeps none.

    Raises:
      ValueError: a tokenizer with more ids than the model, or `block` below 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: PyTree,
        tokenizer: Tokenizer,
        *,
        limits: Limits = Limits(),
        block: int = 16,
        together: bool = False,
        folder: str | Path | None = None,
    ):
        if tokenizer.vocab_size > config.vocab:
            raise ValueError(
                f"tokenizer has {tokenizer.vocab_size} ids, more than the model's vocab"
                f" ({config.vocab}). Use the tokenizer that the model was trained with."
            )
        if block < 1:
            raise ValueError(f"block must be at least 1 token, got {block}.")
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.limits, self.block, self.together = limits, block, together
        self.folder = None if folder is None else Path(folder).expanduser()
        self._start = slots.begin(config, params, 1)
        self._slots = slots.begin(config, params, limits.slots)
        self._seats: list[str | None] = [None] * limits.slots
        self._sessions: dict[str, _Session] = {}
        self._queue: dict[str, None] = {}  # names with a job, first come first
        self._done: dict[str, Reply] = {}  # replies that nobody has been told
        self._clock = 0

    def __contains__(self, name: str) -> bool:
        return name in self._sessions

    def __iter__(self) -> Iterator[str]:
        return iter(self._sessions)

    def __len__(self) -> int:
        return len(self._sessions)

    @functools.cached_property
    def weights(self) -> str:
        """A hash of the model: of its config and its parameters, by name."""
        return weights_hash(self.config, self.params)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of one session, part by part; they do not grow with its text."""
        made = lm.state_bytes(self.config)
        more = {
            "logits": self._start.logits.nbytes,
            "ledger": sum(leaf.nbytes for leaf in self._start.ledger),
        }
        return {**made, **more, "all": made["all"] + sum(more.values())}

    def open(self, name: str, policy: Policy = Policy()) -> None:
        """Begins a session, whose memory is at the model's start.

        Raises:
          ValueError: the name is no name or taken, or the policy is of parts that the
            model has not.
          LimitExceeded: as many sessions are open as may be.
        """
        self._check_new(name)
        self._check_policy(policy)
        self._sessions[name] = _Session(
            name, policy, self._bounded(self._start, policy)
        )

    def close(self, name: str) -> None:
        """Forgets an open session, and a request of it; a file of it stays."""
        session = self._sessions.pop(self._session(name).name)
        self._queue.pop(name, None)
        self._done.pop(name, None)
        if session.job is not None:
            session.job.ended = "closed"
        if session.slot is not None:
            self._clear(session)

    def cancel(self, name: str) -> None:
        """Lets the next tick end the request of a session where it stands."""
        job = self._session(name).job
        if job is not None:
            job.cancelled = True

    def info(self, name: str) -> Info:
        """What is known of a session without its memory."""
        session = self._session(name)
        return Info(
            name=name,
            tokens=session.tokens,
            bits=_bits(session.nats, session.scored),
            learn=session.learn,
            resets=session.resets,
            busy=session.job is not None,
        )

    def ask(
        self,
        name: str,
        text: str | bytes | Sequence[int] | np.ndarray = b"",
        *,
        tokens: int = 0,
        key: Array | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        """Gives a session a request, of which every `tick` does a part.

        Args:
          name: of the session, which has none under way.
          text: what it reads first, or token ids. A text of its own begins with the
            tokenizer's `bos`, which is put before it.
          tokens: most tokens that it then draws, and reads.
          key: decides every draw; token i is drawn with `fold_in(key, i)`.
          sampling: how tokens are drawn; None is `Sampling()`.

        Raises:
          LookupError: no such session.
          LimitExceeded: more tokens than one request, or the session, may have.
          ValueError: the session is busy; ids that the model has no row for; nothing to
            do; draws without a key.
        """
        session = self._idle(name)
        ids = self._ids(session, text)
        if tokens < 0 or (not len(text) and not tokens):
            raise ValueError(
                f"tokens must be 0 or more, and above 0 without a text, got {tokens}."
            )
        self._check_limits(session, len(ids) + tokens)
        sampling = Sampling() if sampling is None else sampling
        session.job = _Job(
            ids, tokens, sampling, _key_data(key, tokens, sampling), int(session.fresh)
        )
        self._queue[name] = None

    def tick(self) -> dict[str, Reply]:
        """One step: up to `block` tokens of every session with a slot and a request.

        Returns:
          The replies of those whose request is done, by name.
        """
        done, self._done = self._done, {}
        for session in [self._sessions[name] for name in self._queue]:
            if session.job is not None and session.job.cancelled:
                session.job.ended = "cancelled"
                done[session.name] = self._let_go(session)
        self._seat()
        groups: dict[bool | Learning, list[_Session]] = {}
        for name in filter(None, self._seats):
            session = self._sessions[name]
            if session.job is not None:
                groups.setdefault(session.learn, []).append(session)
        self._clock += 1
        for learn, sessions in groups.items():
            self._step(learn, sessions)
            for session in sessions:
                session.used = self._clock
                assert session.job is not None
                if session.job.ended:
                    done[session.name] = self._let_go(session)
        return done

    def _let_go(self, session) -> Reply:
        """The reply to a request that has ended, which is then forgotten."""
        reply, session.job = session.job.reply(), None
        del self._queue[session.name]
        return reply

    def run(self) -> dict[str, Reply]:
        """Ticks until no request is under way; the replies by name."""
        done = {}
        while self._queue or self._done:
            done |= self.tick()
        return done

    def feed(self, name: str, text: str | bytes | Sequence[int] | np.ndarray) -> Reply:
        """Lets a session read a text or ids, beside whatever else is under way.

        Raises:
          as `ask`.
        """
        return self._finish(name, text)

    def generate(
        self,
        name: str,
        tokens: int,
        *,
        key: Array | None = None,
        sampling: Sampling | None = None,
        text: str | bytes | Sequence[int] | np.ndarray = b"",
    ) -> Reply:
        """Lets a session read a text, by default none, and go on from it.

        Raises:
          as `ask`.
        """
        return self._finish(name, text, tokens=tokens, key=key, sampling=sampling)

    def stream(
        self,
        name: str,
        text: str | bytes | Sequence[int] | np.ndarray = b"",
        *,
        tokens: int,
        key: Array | None = None,
        sampling: Sampling | None = None,
    ) -> Iterator[str | Reply]:
        """`generate` as it is made: pieces of the text, and at last the reply.

        What may be the beginning of a text that stops it is held back.
        """
        self.ask(name, text, tokens=tokens, key=key, sampling=sampling)
        return self._stream(name, self._job(name))

    def _stream(self, name, job):
        back = max([len(one.encode()) - 1 for one in job.sampling.stop], default=0)

        def pieces():
            at = 0
            while not job.ended:
                self._done |= self.tick()
                if not job.ended:
                    end = max(at, len(job.text) - back)
                    yield job.text[at:end]
                    at = end
            yield job.text[at : job.stopped]

        yield from in_characters(pieces())
        self._done.pop(name, None)
        yield job.reply()

    def logits(self, name: str) -> np.ndarray:
        """What a session says next, float32[vocab]; zeros before it has read."""
        return np.asarray(self._row(self._session(name)).logits)[0]

    def row(self, name: str) -> slots.Slots:
        """The memory of a session, as arrays of one row."""
        return jax.device_get(self._row(self._session(name)))

    def fork(self, name: str, new: str) -> None:
        """Begins a session `new` where another one stands; the two then go on apart.

        Raises:
          LookupError, ValueError, LimitExceeded: as of `ask` and `open`.
        """
        session = self._idle(name)
        self._check_new(new)
        self._sessions[new] = dataclasses.replace(
            session, name=new, parked=self._row(session), slot=None
        )

    def merge(
        self, shares: Mapping[str, float], new: str, policy: Policy = Policy()
    ) -> None:
        """Begins a session `new` that has learned what several have: the weighted mean
        of their fast weights, at the start of a text; see `slots.merged`.

        Args:
          shares: of each session, above 0; they are divided by their sum.
          new: its name.
          policy: its own.

        Raises:
          LookupError, ValueError, LimitExceeded: as of `ask` and `open`; or shares that
            are none, or a model that cannot be merged.
        """
        if not shares or not all(0 < w < math.inf for w in shares.values()):
            raise ValueError(
                f"shares must name sessions, each with a number above 0, got {shares}."
            )
        rows = [self._row(self._idle(name)) for name in shares]
        self._check_new(new)
        self._check_policy(policy)
        one = slots.merged(self.config, self.params, rows, list(shares.values()))
        self._sessions[new] = _Session(new, policy, self._bounded(one, policy))

    def diff(self, name: str, other: str | None = None) -> dict[str, Change]:
        """What each level of a session has become, by name.

        Args:
          name: of the session.
          other: a session to compare it with; None is the model's start.
        """
        one = self._row(self._session(name))
        base = self._start if other is None else self._row(self._session(other))
        names, ledger = slots.names(self.config), jax.device_get(one.ledger)
        if not names:
            return {}
        made = {}
        norms = np.asarray(
            slots.changed(self.config, self.params, one, base)
        ).T.tolist()
        for level, (norm, start) in zip(names, norms, strict=True):
            share = norm / start if start else (math.inf if norm else 0.0)
            made[level] = Change(norm, share)
        for i, place in enumerate(self.config.fast):
            moves, shortened, way = (a[0, i] for a in ledger[2:])
            made[f"CMS {place + 1}"] = made[f"CMS {place + 1}"]._replace(
                moves=int(moves), shortened=int(shortened), way=float(way)
            )
        return made

    def freeze(self, name: str, frozen: bool = True) -> None:
        """Stops all learning of a session, or lets it go on by its policy."""
        self._idle(name).frozen = frozen

    def reset(self, name: str, levels: Sequence[str] | None = None) -> None:
        """Puts a session back to the model's start, or some levels of it.

        Args:
          name: of the session.
          levels: of `slots.parts`: `mixers`, `CMS 1`, ...; None is all. With the
            mixers a new text begins.

        Raises:
          LookupError, ValueError: no such session or level, or it is busy.
        """
        session = self._idle(name)
        known = slots.parts(self.config)
        levels = known if levels is None else tuple(levels)
        for level in levels:
            if level not in known:
                raise ValueError(
                    f"levels: {self.config.name!r} has no {level!r}, only "
                    f"{', '.join(known)}.{did_you_mean(level, known)}"
                )
        self._reset(session, levels)

    def save(self, name: str) -> Path:
        """Writes a session to `folder`, under its name: its memory, the tokens of an
        unfinished chunk, and counts; no other text.

        Raises:
          LookupError, ValueError: no such session, it is busy, or there is no folder.
        """
        session, path = self._idle(name), self._path(name)
        about = {field: getattr(session, field) for field in _KEPT} | self._bound(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        saved.write(path, _named(jax.device_get(self._row(session))), about)
        return path

    def load(self, name: str, policy: Policy = Policy()) -> None:
        """Opens a session where it was saved, in the middle of a chunk as well.

        Args:
          name: under which it was saved.
          policy: of now; a file cannot loosen it.

        Raises:
          FileNotFoundError: no file of that name.
          WrongSession: it is of another session, other weights or another tokenizer.
          hope_jax.train.checkpoint.Damaged: the file is not what was saved.
          ValueError, LimitExceeded: as of `open`; or there is no folder.
        """
        self._check_new(name)
        self._check_policy(policy)
        path = self._path(name)
        arrays, about = saved.read(path, _named(self._start))
        for field, value in self._bound(name).items():
            if about.get(field) != value:
                raise WrongSession(
                    f"The session in {path} is of another {field}: saved "
                    f"{_short(about.get(field))}, here {_short(value)}."
                )
        for field, kind in _KEPT.items():
            value = about.get(field)
            if type(value) is not kind or not 0 <= kind(value) < math.inf:
                raise Damaged(f"The session in {path} has {_short(value)} as {field}.")
        leaves = [arrays[name] for name in _named(self._start)]
        one = jax.tree.unflatten(jax.tree.structure(self._start), leaves)
        if not slots.sound(one):
            raise Damaged(f"The session in {path} has numbers that no session has.")
        self._sessions[name] = _Session(
            name,
            policy,
            self._bounded(one, policy),
            **{field: about[field] for field in _KEPT},
        )

    def delete(self, name: str) -> None:
        """Forgets a session, open or saved or both: nothing of it is left.

        Raises:
          LookupError: it is neither.
        """
        check_name(name)
        path = None if self.folder is None else self._path(name)
        there = path is not None and (path.exists() or path.is_symlink())
        if name in self._sessions:
            self.close(name)
        elif not there:
            raise LookupError(f"There is no session {name!r}, neither open nor saved.")
        if path is not None:
            path.unlink(missing_ok=True)

    def saved(self) -> tuple[str, ...]:
        """Names of the sessions in `folder`, in order."""
        folder = self._path("any").parent
        if not folder.is_dir():
            return ()
        found = (path for path in folder.iterdir() if path.suffix == saved.SUFFIX)
        return tuple(sorted(p.stem for p in found if _NAME.fullmatch(p.stem)))

    def expire(self, seconds: float) -> tuple[str, ...]:
        """Deletes the files of sessions that were saved longer ago; their names."""
        last = time.time() - seconds
        old = [n for n in self.saved() if self._path(n).lstat().st_mtime < last]
        for name in old:
            self._path(name).unlink()
        return tuple(old)

    def _bound(self, name):
        """What a file is bound to."""
        return {
            "name": name,
            "weights": self.weights,
            "tokenizer": self.tokenizer.fingerprint,
        }

    def _finish(self, name, text, **more):
        self.ask(name, text, **more)
        job = self._job(name)
        while not job.ended:
            self._done |= self.tick()
        self._done.pop(name, None)
        return job.reply()

    def _path(self, name) -> Path:
        if self.folder is None:
            raise ValueError(
                "folder is None, so no session is saved: give Sessions a folder."
            )
        return self.folder / f"{check_name(name)}{saved.SUFFIX}"

    def _session(self, name) -> _Session:
        if name not in self._sessions:
            raise LookupError(f"There is no open session {_short(name)}.")
        return self._sessions[name]

    def _job(self, name) -> _Job:
        job = self._session(name).job
        assert job is not None
        return job

    def _idle(self, name) -> _Session:
        session = self._session(name)
        if session.job is not None:
            raise ValueError(f"Session {name!r} is busy: a request is under way.")
        return session

    def _check_new(self, name):
        check_name(name)
        if name in self._sessions:
            raise ValueError(f"There is an open session {name!r} already.")
        if len(self._sessions) >= self.limits.sessions:
            raise LimitExceeded(
                f"{self.limits.sessions} sessions are open, and no more may be: close "
                "one."
            )

    def _check_policy(self, policy):
        learning.resolve(self.config, policy.learn)
        for name in ("longest_move", "moves"):
            if getattr(policy, name) is not None and not self.config.fast:
                raise ValueError(
                    f"{name} is about CMS levels that move while reading, and "
                    f"{self.config.name!r} has none: leave it None."
                )

    def _check_limits(self, session, count):
        if count > self.limits.request:
            raise LimitExceeded(
                f"A request of {count} tokens is longer than the {self.limits.request} "
                "that one may have: cut it."
            )
        if session.tokens + count > self.limits.session:
            raise LimitExceeded(
                f"Session {session.name!r} has read {session.tokens} tokens, and "
                f"{count} more are above the {self.limits.session} that it may read."
            )
        if self.config.most is not None:
            read = int(self._row(session).state.position[0])
            self.config.check_room(f"session {session.name!r}", read + count)

    def _ids(self, session, text):
        bos = np.array([self.tokenizer.bos], np.int32)
        if isinstance(text, str):
            text = text.encode("utf-8", "surrogateescape")
        if isinstance(text, bytes):
            ids = self.tokenizer.encode(text)
        else:
            given = np.asarray(text)
            given = given.astype(np.int32) if not given.size else given
            if given.ndim != 1:
                raise ValueError(f"ids must be one row of them, got {given.shape}.")
            ids = np.asarray(lm.ids("ids", given, self.config.vocab))
        begins = session.fresh and not (len(ids) and ids[0] == bos[0])
        return np.concatenate([bos, ids]) if begins else ids

    def _seat(self):
        """Gives slots to sessions that wait for one, those that came first first."""
        waiting = [n for n in self._queue if self._sessions[n].slot is None]
        for name in waiting:
            slot = self._free()
            if slot is None:
                return
            session = self._sessions[name]
            self._slots = slots.put(self._slots, session.parked, slot)
            session.slot, session.parked = slot, None
            self._seats[slot] = name

    def _free(self):
        """An empty slot, or that of the session which was idle longest."""
        if None in self._seats:
            return self._seats.index(None)
        seated = [self._sessions[name] for name in self._seats if name is not None]
        idle = [session for session in seated if session.job is None]
        if not idle:
            return None
        oldest = min(idle, key=lambda session: session.used)
        oldest.parked = jax.device_get(self._row(oldest))
        slot = oldest.slot
        self._clear(oldest)
        return slot

    def _clear(self, session):
        """Leaves nothing of a session in its slot."""
        self._slots = slots.put(self._slots, self._start, session.slot)
        self._seats[session.slot] = None
        session.slot = None

    def _row(self, session) -> slots.Slots:
        if session.slot is None:
            return session.parked
        return slots.take(self._slots, session.slot)

    def _put(self, session, one):
        if session.slot is None:
            session.parked = one
        else:
            self._slots = slots.put(self._slots, one, session.slot)

    def _bounded(self, one, policy):
        longest = math.inf if policy.longest_move is None else policy.longest_move
        most = slots.NO_BOUND if policy.moves is None else policy.moves
        return slots.bounded(one, longest, most)

    def _reset(self, session, levels):
        one = slots.reset(self.config, self.params, self._row(session), levels)
        self._put(session, one)
        session.fresh = session.fresh or "mixers" in levels

    def _step(self, learn, sessions):
        """A turn of sessions in slots that learn alike."""
        before = self._slots
        given = {session.slot: self._next(session.job) for session in sessions}
        said, self._slots = self._turn(learn, given, sessions)
        again = {}
        for session in sessions:
            job, slot = session.job, session.slot
            if not said.finite[slot]:
                self._mend(session, before)
                continue
            count = len(given[slot])
            tokens, losses = said.tokens[slot, :count], said.losses[slot, :count]
            read = int(np.sum(given[slot] >= 0))
            skip = max(0, job.unscored - job.read)
            nats = float(np.sum(losses[skip:read], dtype=np.float64))
            scored = max(0, read - skip)
            job.read, job.nats = job.read + read, job.nats + nats
            session.nats, session.scored = session.nats + nats, session.scored + scored
            kept = read + self._keep(job, tokens[read:].tolist())
            session.tokens += kept
            session.fresh = session.fresh and not kept
            if kept < count:  # it has read on beyond its end
                self._put(session, slots.take(before, slot))
                again[slot] = tokens[:kept]
        if any(len(tokens) for tokens in again.values()):
            _, self._slots = self._turn(learn, again, sessions)

    def _next(self, job):
        given = job.given[job.read : job.read + self.block]
        draws = min(self.block - len(given), job.draws - len(job.ids))
        return np.concatenate([given, np.full(draws, -1, np.int32)])

    def _turn(self, learn, given, sessions):
        """One step in which slots read and draw what is `given` to each."""
        count, jobs = self.limits.slots, {s.slot: s.job for s in sessions}
        rows = np.zeros((count, self.block), np.int32)
        counts, order = np.zeros(count, np.int32), np.zeros_like(rows)
        keys = np.zeros((count, *_NO_KEY.shape), np.uint32)
        sampling = [_GREEDY] * count
        for slot, tokens in given.items():
            job, length = jobs[slot], len(tokens)
            rows[slot, :length], counts[slot] = tokens, length
            order[slot, :length] = len(job.ids) + np.cumsum(tokens < 0) - 1
            keys[slot], sampling[slot] = job.key, job.sampling
        turn = slots.Turn(
            rows, counts, drawing(sampling, self.config.vocab), keys, order
        )
        said, after = slots.step(
            self.config,
            self.tokenizer.vocab_size,
            learn,
            self.together,
            self.params,
            self._slots,
            turn,
        )
        return jax.device_get(said), after

    def _keep(self, job, drawn):
        """How many drawn tokens are the session's, and whether its request is done."""
        for kept, token in enumerate(drawn):
            if token == self.tokenizer.bos:
                job.ended = "document"
                return kept
            new = self.tokenizer.decode([token])
            job.ids.append(token)
            job.text += new
            job.stopped = find_stop(job.text, job.sampling.stop, len(new))
            if job.stopped is not None:
                job.ended = "stop"
                return kept + 1
        if job.read == len(job.given) and len(job.ids) == job.draws:
            job.ended = "length"
        return len(drawn)

    def _mend(self, session, before):
        """Ends the request of a session that has numbers which are none."""
        session.job.ended = session.policy.not_finite
        session.resets += 1
        logging.warning(
            "Session %s is not finite: %s.", session.name, session.policy.not_finite
        )
        old = slots.take(before, session.slot)
        self._put(session, old)
        if session.policy.not_finite == "reset":
            self._reset(session, slots.parts(self.config))


def check_name(name: str) -> str:
    """`name`, if it can name a session, and its file and nothing else.

    Raises:
      ValueError: it could lead out of its folder, hide, or be taken for another.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            "The name of a session must be 1 to 64 letters, digits, '.', '_' and '-', "
            f"beginning with a letter or a digit, got {_short(name)}."
        )
    return name


def weights_hash(config: ModelConfig, params: PyTree) -> str:
    """SHA-256 of a config and of every parameter, with its name, type and shape."""
    about = [config_lib.to_json(config), manifest(_named(params))]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


_KEPT = {
    "tokens": int,
    "scored": int,
    "nats": float,
    "resets": int,
    "fresh": bool,
    "frozen": bool,
}
_GREEDY = Sampling(temperature=0)
_NO_KEY = np.zeros(2, np.uint32)


def _named(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(path_names(path)): leaf for path, leaf in flat}


def _key_data(key, tokens, sampling):
    if key is None:
        if tokens and not sampling.greedy:
            raise ValueError("key is None, but drawing tokens needs one: give a key.")
        return _NO_KEY
    data = np.asarray(jax.random.key_data(key))
    if data.shape != _NO_KEY.shape:
        raise ValueError(
            f"key must be one key of JAX's default kind, got {key.shape} of "
            f"{jax.random.key_impl(key)}."
        )
    return data


def _bits(nats, count):
    return nats / count / math.log(2) if count else math.nan


def _short(value):
    said = repr(value)
    return said if len(said) <= 80 else f"{said[:60]}... ({len(said)} characters)"
