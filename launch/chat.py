"""Talks with a trained model, whose memory learns from what is said.

    python -m launch.chat --checkpoint=runs/quickstart/hope

Every line is read, and the model goes on from it; lines that begin with / are commands
(/help). After each answer it says what the memory did: how much the line surprised it,
how often each level moved, and how far it is from where it started. What it learned is
kept apart from the weights, in --sessions, and only when asked to.
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TextIO

import jax

from hope_jax.stream.generate import Sampling
from hope_jax.stream.session import Limits, Policy, Reply, Sessions, check_name
from hope_jax.train import checkpoint
from launch import command
from launch.evaluate import beside, define_checkpoint, fail_in_words, open_given
from launch.generate import define_sampling, sampling_of

SLOTS, BLOCK = 1, 16  # one session talks, and what it says is shown as it comes


def _define(define) -> None:
    define_checkpoint(define)
    define_sampling(define)
    define.string("session", "first", "name of the session to begin, or to load")
    define.string(
        "sessions", None, "folder of saved sessions; by default beside the checkpoints"
    )
    define.bool("frozen", False, "the first session begins frozen")
    define.float("longest_move", None, "bound on the norm of a move of a CMS level")
    define.integer("moves", None, "moves that the CMS levels of a session may make")


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads lines until there are none, or /quit."""
    options = command.parse(__doc__, _define, arguments)
    command.quiet_libraries()
    with fail_in_words():
        check_name(options.session)
        sampling = sampling_of(options)
        if options.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {options.tokens}.")
        policy = Policy(longest_move=options.longest_move, moves=options.moves)
        opened = open_given(options)
        folder = options.sessions
        if folder is None:
            folder = beside(options.checkpoint, "--sessions") / "sessions"
        sessions = Sessions(
            opened.config.model,
            opened.params,
            opened.tokenizer,
            limits=Limits(slots=SLOTS),
            block=BLOCK,
            folder=folder,
        )
        chat = Chat(sessions, sampling, options.tokens, options.seed, policy)
        chat.begin(options.session, options.frozen)
    for line in lines(sys.stdin, chat):
        if not chat(line):
            break


def lines(source: TextIO, chat: "Chat") -> Iterator[str]:
    """Lines of a terminal, after a prompt, or of whatever is piped in."""
    if not source.isatty():
        yield from source
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lets lines be edited
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input(f"{chat.name}> ") + "\n"


class Command(NamedTuple):
    """One that a line may give.

    Attributes:
      takes: what may follow its name, in words.
      says: what it does.
      do: `(chat, what follows)`.
    """

    takes: str
    says: str
    do: Callable[["Chat", str], None]


class Chat:
    """A person and the sessions they talk to, one at a time.

    Args:
      sessions: all of them.
      sampling: how answers are drawn.
      tokens: most of an answer.
      seed: of the draws.
      policy: of the sessions that begin or are loaded.
    """

    def __init__(
        self,
        sessions: Sessions,
        sampling: Sampling,
        tokens: int,
        seed: int,
        policy: Policy,
    ):
        self.sessions, self.sampling, self.tokens = sessions, sampling, tokens
        self.policy, self.name = policy, ""
        self._key, self._turns = jax.random.key(seed), 0

    def begin(self, name: str, frozen: bool) -> None:
        """Goes on with a saved session, or begins one."""
        saved = name in self.sessions.saved()
        if saved:
            self.sessions.load(name, self.policy)
        else:
            self.sessions.open(name, self.policy)
        if frozen:
            self.sessions.freeze(name)
        self.name = name
        _say(f"session {name}{', as saved' if saved else ''}; /help lists the commands")

    def __call__(self, line: str) -> bool:
        """One line; False if it was the last."""
        try:
            if not line.startswith("/"):
                if line.strip():
                    self._answer(line)
                return True
            name, _, rest = line[1:].strip().partition(" ")
            if name == "quit":
                return False
            if name not in COMMANDS:
                raise ValueError(f"There is no /{name}; /help lists what there is.")
            COMMANDS[name].do(self, rest.strip())
        except (ValueError, LookupError, OSError, checkpoint.Damaged) as error:
            _say(f"error: {error.args[0] if error.args else error}")
        return True

    def _answer(self, line):
        before = self.sessions.diff(self.name)
        self._turns += 1
        made = self.sessions.stream(
            self.name,
            line.encode("utf-8", "surrogateescape"),
            tokens=self.tokens,
            key=jax.random.fold_in(self._key, self._turns),
            sampling=self.sampling,
        )
        with _interrupts(lambda: self.sessions.cancel(self.name)):
            for piece in made:
                if isinstance(piece, Reply):
                    self._tell(piece, before)
                    break
                sys.stdout.write(command.printable(piece, sys.stdout))
                sys.stdout.flush()

    def _tell(self, reply, before):
        sys.stdout.write("\n")
        learn = self.sessions.info(self.name).learn
        _say(
            f"read {reply.read} tokens, {reply.bits:.2f} bits each; wrote "
            f"{len(reply.ids)} ({reply.ended}){'' if learn else '; frozen'}"
        )
        for level, change in self.sessions.diff(self.name).items():
            moved = ""
            if change.moves is not None:
                moves = change.moves - before[level].moves
                way = change.way - before[level].way
                moved = f"{moves} moves, {way:.3g} in all; "
            _say(f"{level}: {moved}{_far(change)}")

    def save(self, name: str) -> None:
        """This session, or under another name a copy of it."""
        if name in ("", self.name):
            path = self.sessions.save(self.name)
        else:
            self.sessions.fork(self.name, name)
            try:
                path = self.sessions.save(name)
            finally:
                self.sessions.close(name)
        _say(f"saved as {path.stem}: {path.stat().st_size:,} bytes")

    def load(self, name: str) -> None:
        """Goes on with one that is open or saved."""
        if name not in self.sessions:
            self.sessions.load(name, self.policy)
        self.name = name
        _say(f"session {name}, {self.sessions.info(name).tokens:,} tokens")

    def fork(self, name: str) -> None:
        """Goes on with a copy, beside this one."""
        self.sessions.fork(self.name, name)
        _say(f"session {name}, a copy of {self.name}")
        self.name = name

    def reset(self, levels: str) -> None:
        """Puts all of this session back, or some levels."""
        some = [level.strip() for level in levels.split(",")] if levels else None
        self.sessions.reset(self.name, some)
        _say(f"at its start again: {levels or 'all of it'}")

    def freeze(self, _: str) -> None:
        """Stops learning, or lets it go on."""
        frozen = self.sessions.info(self.name).learn is not False
        self.sessions.freeze(self.name, frozen)
        _say("frozen: it learns nothing" if frozen else "it learns again")

    def diff(self, other: str) -> None:
        """What each level has become."""
        for level, change in self.sessions.diff(self.name, other or None).items():
            _say(f"{level}: {_far(change, other or 'its start')}")

    def list(self, _: str) -> None:
        """What is open, what is saved, and how large one is."""
        for name in self.sessions:
            info = self.sessions.info(name)
            here = " (this one)" if name == self.name else ""
            _say(f"open: {name}, {info.tokens:,} tokens, {info.bits:.2f} bits{here}")
        for name in self.sessions.saved():
            _say(f"saved: {name}")
        sizes = (f"{part} {size:,}" for part, size in self.sessions.sizes.items())
        _say(f"bytes of a session: {', '.join(sizes)}")

    def delete(self, name: str) -> None:
        """Leaves nothing of a session."""
        if name == self.name:
            raise ValueError(
                f"{name!r} is the session that you talk to: /load another."
            )
        self.sessions.delete(name)
        _say(f"nothing is left of {name}")

    def help(self, _: str) -> None:
        """All commands."""
        for name, one in COMMANDS.items():
            _say(f"/{name} {one.takes}".rstrip() + f": {one.says}")
        _say("/quit: ends; what was not saved is lost")


COMMANDS = {
    "save": Command("[NAME]", "keeps this session, or a copy under a name", Chat.save),
    "load": Command("NAME", "goes on with one that is open or saved", Chat.load),
    "fork": Command("NAME", "goes on with a copy, beside this one", Chat.fork),
    "reset": Command("[LEVEL, ...]", "back to the start: all, or levels", Chat.reset),
    "freeze": Command("", "stops learning, or lets it go on", Chat.freeze),
    "diff": Command("[NAME]", "what each level has become", Chat.diff),
    "sessions": Command("", "what is open and saved, and its size", Chat.list),
    "delete": Command("NAME", "leaves nothing of a session", Chat.delete),
    "help": Command("", "this", Chat.help),
}


@contextlib.contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C ends an answer and not the program."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _far(change, start="its start"):
    share = f" ({100 * change.share:.1f} % of it)" if change.share < 1e6 else ""
    return f"{change.norm:.3g} from {start}{share}"


def _say(text: str) -> None:
    """A line of the program's own, which no model wrote."""
    print(f"[{command.printable(text, sys.stdout)}]", flush=True)


if __name__ == "__main__":
    command.run(main)
