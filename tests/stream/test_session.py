"""Sessions: what they keep apart, what they allow, and what their files are held to."""

import dataclasses
import functools
import json
import os
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.data.tokenizer import ByteTokenizer
from hope_jax.models import lm
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.mixers.memory import NamedConfig
from hope_jax.stream import session as lib
from hope_jax.stream import slots as slots_lib
from hope_jax.stream.generate import Sampling
from hope_jax.stream.session import Limits, Policy, Sessions
from hope_jax.train.checkpoint import Damaged
from tests import compare
from tests.models import small

close = compare.within_both(3e-5)

# Two clocks of the chain, 4 and 8 tokens, and memories that move every 4.
CONFIG = dataclasses.replace(
    small.HOPE,
    vocab=257,
    cms=CMSConfig(
        levels=(CMSLevel(period=4, rate=0.5), CMSLevel(period=8, rate=0.5)), hidden=8
    ),
)
SLOTS, BLOCK = 4, 8
TEXT = b"What a reader says is of nobody else's concern; 31 tokens."
GREEDY = Sampling(temperature=0)


def opened(*names, params=None, tokenizer=None, **more):
    """Sessions of one program, whatever else they are."""
    params = small.built(CONFIG)[1] if params is None else params
    more = {"limits": Limits(slots=SLOTS), "block": BLOCK, **more}
    made = Sessions(CONFIG, params, tokenizer or ByteTokenizer(), **more)
    for name in names:
        made.open(name)
    return made


def same_bits(one, other):
    """Whether two trees of arrays are the same to the last bit."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def wishes(i):
    """What user `i` asks for, one after another: lengths and settings of their own."""
    rng = np.random.default_rng(i)
    sampling = Sampling(
        temperature=[0.0, 0.7, 1.3][i % 3],
        top_k=[None, 5, 40][i // 3 % 3],
        top_p=[1.0, 0.9][i % 2],
        min_p=[0.0, 0.05][i // 2 % 2],
        stop=("z",) if i % 5 == 0 else (),
    )
    for j in range(2):
        yield {
            "text": rng.integers(0, 256, rng.integers(1, 14)),
            "tokens": int(rng.integers(0, 6)),
            "key": jax.random.key(1000 * i + j),
            "sampling": sampling,
        }


@functools.cache
def alone(i):
    """What user `i` gets without any others, and the memory at the end."""
    made = opened("alone")
    replies = []
    for wish in wishes(i):
        made.ask("alone", **wish)
        replies.append(made.run()["alone"])
    return replies, made.logits("alone"), made.row("alone")


def assert_as_alone(made, i, name, replies):
    expected, logits, row = alone(i)
    assert repr(replies) == repr(expected)  # NaN too
    assert made.logits(name).tobytes() == logits.tobytes()
    assert same_bits(made.row(name), row)


def test_it_reads_as_the_model_does():
    made = opened("a")
    reply = made.feed("a", TEXT)
    assert (reply.read, reply.ids, reply.text) == (len(TEXT) + 1, (), "")
    ids = np.concatenate([[256], np.frombuffer(TEXT, np.uint8)]).astype(np.int32)[None]
    start = small.start(CONFIG, 1)
    logits, state = small.read(CONFIG, ids, start, aligned=False)
    close(made.logits("a")[None], logits[:, -1])
    close(made.row("a").state, state)
    nats = lm.next_token_loss(logits[0, :-1], jnp.asarray(ids[0, 1:]))
    close(reply.bits, float(np.mean(nats)) / np.log(2))
    assert made.info("a").bits == reply.bits and made.info("a").tokens == reply.read
    assert made.feed("a", ids[0, 1:]).read == len(TEXT)  # ids go on without a start


def test_a_user_is_as_alone_in_any_slot_beside_any_others():
    for slot in range(SLOTS):
        made = opened(*(f"other{i}" for i in range(slot)), "a")
        for i in range(slot):
            made.ask(f"other{i}", b"canary " * 9, tokens=3, sampling=GREEDY)
        replies = []
        for wish in wishes(1):
            made.ask("a", **wish)
            if "late" in made:
                made.ask("late", b"!" * 5)
            elif len(made) < SLOTS:
                made.open("late")
            replies.append(made.run()["a"])
        assert made._seats[slot] == "a"
        assert_as_alone(made, 1, "a", replies)


def test_slots_in_one_batch_are_apart_too():
    """To rounding as one after another, and to the bit whatever others do."""
    rows = []
    for other in (TEXT, b"another"):
        made = opened("a", "b", limits=Limits(slots=2), together=True)
        made.open("c", Policy(longest_move=0.02))
        for wish in wishes(1):
            made.ask("a", **wish)
            made.ask("b", other, tokens=2, sampling=GREEDY)
            made.run()
            made.ask("c", TEXT[:5])
        rows.append(made.row("a"))
        made.run()
    change = made.diff("c")["CMS 1"]
    assert change.shortened == change.moves == 2
    assert same_bits(*rows)
    close(rows[0], alone(1)[2])


def test_many_sessions_interleaved_are_never_mixed():
    """64 of them on 4 slots, in an order of no meaning: as if each had been alone."""
    count = 64
    made = opened(*(f"user{i}" for i in range(count)))
    before = lib.weights_hash(CONFIG, made.params)
    programs = slots_lib.step._cache_size()
    left = {f"user{i}": list(wishes(i)) for i in range(count)}
    replies = {name: [] for name in left}
    rng = np.random.default_rng(0)
    while left or any(made.info(name).busy for name in made):
        for name in rng.permutation(sorted(left))[:9].tolist():
            if not made.info(name).busy:
                made.ask(name, **left[name].pop(0))
                if not left[name]:
                    del left[name]
        for name, reply in made.tick().items():
            replies[name].append(reply)
    for i in range(0, count, 5):
        assert_as_alone(made, i, f"user{i}", replies[f"user{i}"])
    assert slots_lib.step._cache_size() == max(programs, 1)
    assert lib.weights_hash(CONFIG, made.params) == before  # nobody wrote to them


def test_nothing_is_left_in_a_slot():
    made = opened("a", "b", "c", "d", "e")
    start = made.row("e")
    for name in "abcd":
        made.feed(name, TEXT[:9])
    slot = made._seats.index("a")
    assert not same_bits(slots_lib.take(made._slots, slot), start)
    made.close("a")
    assert same_bits(slots_lib.take(made._slots, slot), start)
    made.feed("e", TEXT[:3])  # takes the empty one
    made.open("f")
    parked = made.row("b")
    made.feed("f", TEXT[:3])  # takes that of the session which was idle longest
    assert "b" not in made._seats and same_bits(made.row("b"), parked)
    assert made.feed("b", TEXT[9:12]).read == 3


def test_saved_loaded_forked_in_mid_chunk_as_if_never_interrupted(tmp_path):
    made = opened("a", folder=tmp_path)
    whole = made.generate("a", 9, sampling=GREEDY, text=TEXT[:22])
    expected = made.row("a")
    rest = made.feed("a", TEXT[:5])

    cut = opened("a", folder=tmp_path)
    cut.feed("a", TEXT[:6])  # with its start 7 tokens: within every chunk
    cut.fork("a", "b")
    cut.save("a")
    cut.feed("a", b"and another one reads on")
    again = opened(folder=tmp_path)
    again.load("a")
    for sessions, name in ((cut, "b"), (again, "a")):
        reply = sessions.generate(name, 9, sampling=GREEDY, text=TEXT[6:22])
        assert reply.ids == whole.ids and same_bits(sessions.row(name), expected)
        assert sessions.info(name).tokens == 23 + 9
        assert sessions.feed(name, TEXT[:5]) == rest


def test_a_file_is_of_one_session_on_one_model(tmp_path):
    made = opened("a", folder=tmp_path)
    made.feed("a", TEXT[:5])
    path = made.save("a")
    assert os.stat(path).st_mode & 0o077 == 0
    shutil.copy(path, tmp_path / "b.safetensors")
    with pytest.raises(lib.WrongSession, match="of another name: saved 'a', here 'b'"):
        made.load("b")
    with pytest.raises(ValueError, match="an open session 'a' already"):
        made.load("a")
    params = jax.tree.map(lambda w: w, small.built(CONFIG)[1])
    params["embed"]["embedding"] = jax.tree.map(
        lambda w: w.at[0, 0].add(1e-3), params["embed"]["embedding"]
    )
    other = opened(params=params, folder=tmp_path)
    with pytest.raises(lib.WrongSession, match="of another weights"):
        other.load("a")
    with pytest.raises(FileNotFoundError, match=r"No session at .*nobody"):
        made.load("nobody")
    assert "b" not in made and len(other) == 0

    assert made.saved() == ("a", "b")
    os.utime(path, (0, 0))
    assert made.expire(1e6) == ("a",) and made.saved() == ("b",)
    made.save("a")
    made.delete("a")
    made.delete("b")
    assert made.saved() == () and "a" not in made
    with pytest.raises(LookupError, match="no session 'a', neither open nor saved"):
        made.delete("a")


@functools.cache
def a_file(folder):
    made = opened("a", folder=folder)
    made.feed("a", TEXT[:5])
    return made.save("a").read_bytes()


def test_damaged_files_are_refused(tmp_path):
    whole = a_file(tmp_path)
    path, made = tmp_path / "a.safetensors", opened(folder=tmp_path)
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])

    def refused(data, message):
        path.write_bytes(data)
        with pytest.raises(Damaged, match=message):
            made.load("a")

    def with_header(change):
        changed = json.loads(json.dumps(header))
        change(changed)
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length :]

    name = "logits"
    refused(b"", "header too small")
    refused(whole[:-1], "not fully covered")
    refused(whole + b"0", "not fully covered")
    refused(struct.pack("<Q", 2**62) + whole[8:], "header too large")
    refused(whole[:8] + b"x" * length + whole[8 + length :], "invalid JSON in header")
    refused(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], "checksum is wrong")
    huge = lambda h: h[name].update(shape=[2**40])  # noqa: E731
    refused(with_header(huge), "cannot be read")
    refused(with_header(lambda h: h.pop(name)), "cannot be read")
    other = lambda h: h.update(others=h.pop(name))  # noqa: E731
    refused(with_header(other), "of another model, as 'others'")
    anchors = "state.blocks.mixer.memories.anchor.w1"
    former = lambda h: h.update({anchors: h.pop(name)})  # noqa: E731
    refused(with_header(former), "of a version that kept a second copy of the memories")
    flat = lambda h: h[name].update(shape=h[name]["shape"][::-1])  # noqa: E731
    refused(with_header(flat), "of another model, as 'logits'")
    older = lambda h: h["__metadata__"].update(format="hope_jax.session.0")  # noqa: E731
    refused(with_header(older), "not of the format hope_jax.session.1")
    less = lambda h: h["__metadata__"].update(about="{}")  # noqa: E731
    refused(with_header(less), "checksum is wrong")
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Damaged, match="no plain file"):
        made.load("a")
    path.unlink()
    rng = np.random.default_rng(0)
    for _ in range(300):  # of the header, mostly, and of the lengths
        data = bytearray(whole)
        for at in rng.integers(0, 8 + length + 64, 3):
            data[at] = rng.integers(0, 256)
        path.write_bytes(data)
        if bytes(data) != whole:
            with pytest.raises(Damaged):
                made.load("a")
    path.write_bytes(whole)
    made.load("a")


def test_numbers_that_no_session_has_are_refused(tmp_path):
    """A checksum is no secret: who writes files can make one that is right."""
    made = opened("a", folder=tmp_path)
    made.feed("a", TEXT[:5])
    row = made.row("a")
    spent = row.ledger._replace(moves=row.ledger.moves - 9)
    for wrong in (row._replace(logits=row.logits * np.nan), row._replace(ledger=spent)):
        made._put(made._session("a"), wrong)
        made.save("a")
        with pytest.raises(Damaged, match="numbers that no session has"):
            opened(folder=tmp_path).load("a")
    made._put(made._session("a"), row)
    made._session("a").tokens = -1
    made.save("a")
    with pytest.raises(Damaged, match="has -1 as tokens"):
        opened(folder=tmp_path).load("a")


HOSTILE = (
    *("", ".", "..", "../a", "a/../b", "/etc/passwd", "a/b", "a\\b", "..\\a", "C:\\a"),
    *("C:a", "~", "~root", "a\0b", "\0", "a\nb", "a b", " a", "a ", ".hidden", "-flag"),
    *("a" * 65, "a" * 5000, "\u2024\u2024/a", "\uff0e\uff0e", "a\u202eb", "é", "a*"),
    *("$(touch x)", "a;b", "%2e%2e", "file://a", "a\u2215b", "_a"),
)


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:12])
def test_hostile_names(name, hostile):
    sessions, outside = hostile
    with pytest.raises(ValueError, match="name of a session must be") as refused:
        sessions.open(name)
    assert len(str(refused.value)) < 300
    for call in (sessions.load, sessions.delete):
        with pytest.raises(ValueError, match="name of a session must be"):
            call(name)
    with pytest.raises(ValueError, match="name of a session must be"):
        sessions.fork("a", name)
    assert list(sessions) == ["a"] and sorted(outside.iterdir()) == [outside / "in"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "in").mkdir()
    return opened("a", folder=outside / "in"), outside


def test_there_are_enough_hostile_names():
    assert len(set(HOSTILE)) >= 30
    for good in ("a", "A-1_b.c", "9", "a" * 64):
        assert lib.check_name(good) == good


def test_a_frozen_session_learns_nothing_and_reads_on():
    made = opened("a", "b")
    made.freeze("a")
    assert made.info("a").learn is False
    made.ask("a", TEXT)
    made.ask("b", TEXT)  # beside it, in the program of those that learn
    made.run()
    assert {change.norm for change in made.diff("a").values()} == {0.0}
    assert all(change.norm > 0 for change in made.diff("b").values())
    assert made.info("a").tokens == made.info("b").tokens == len(TEXT) + 1
    assert not np.array_equal(made.logits("a"), made.logits("b"))
    made.freeze("a", False)
    made.feed("a", TEXT)
    assert all(change.norm > 0 for change in made.diff("a").values())
    assert same_bits(made.row("b"), alone_after(TEXT))
    made.open("c", Policy(learn=False))
    made.feed("c", TEXT)
    assert {change.norm for change in made.diff("c").values()} == {0.0}


@functools.cache
def alone_after(text):
    made = opened("b")
    made.feed("b", text)
    return made.row("b")


def test_moves_are_no_longer_than_they_may_be():
    longest = 0.02
    made = opened("free", "all")
    made.open("short", Policy(longest_move=longest))
    made.open("never", Policy(longest_move=1e9))
    for name in made:
        made.ask(name, TEXT)
    made.run()
    diff = {name: made.diff(name) for name in made}
    for level in ("CMS 1", "CMS 2"):
        free, short = diff["free"][level], diff["short"][level]
        assert short.moves == free.moves == (len(TEXT) + 1) // (4 * int(level[-1]))
        assert short.shortened == short.moves and free.shortened == 0
        assert short.way <= 1.001 * longest * short.moves < free.way
        assert short.norm <= short.way
    never = made.row("never")
    free = made.row("free")
    assert same_bits(never._replace(ledger=free.ledger), free)
    assert same_bits(free, alone_after(TEXT))


def test_moves_end_with_their_budget():
    made = opened("free")
    made.open("three", Policy(moves=3))
    for name in made:
        made.feed(name, TEXT[:12])  # moves after 4, 8 (both levels) and 12
    assert [made.diff("free")[f"CMS {i}"].moves for i in (1, 2)] == [3, 1]
    assert [made.diff("three")[f"CMS {i}"].moves for i in (1, 2)] == [2, 1]
    before = made.row("three").state.blocks.fast
    made.feed("three", TEXT)
    assert same_bits(made.row("three").state.blocks.fast, before)
    assert sum(made.diff("three")[f"CMS {i}"].moves for i in (1, 2)) == 3
    made.open("none", Policy(moves=0))
    made.feed("none", TEXT[:9])
    assert made.diff("none")["CMS 1"] == lib.Change(0.0, 0.0, 0, 0, 0.0)


@pytest.mark.parametrize("then", ["reset", "undo"])
def test_a_memory_that_is_not_finite_is_mended_alone(then, caplog):
    made = opened("b")
    made.open("a", Policy(not_finite=then, moves=9))
    made.feed("a", TEXT[:12])
    moved = made.diff("a")["CMS 1"].moves
    row = made.row("a")
    weights = jax.tree.map(lambda w: w * np.nan, row.state.blocks.fast[0])
    fast = (weights, *row.state.blocks.fast[1:])
    blocks = row.state.blocks._replace(fast=fast)
    broken = row._replace(state=row.state._replace(blocks=blocks))
    made._put(made._session("a"), broken)
    made.ask("a", TEXT, tokens=3, sampling=GREEDY)
    made.ask("b", TEXT)
    replies = made.run()
    assert replies["a"].ended == then and replies["b"].ended == "length"
    assert same_bits(made.row("b"), alone_after(TEXT))
    assert made.info("a").resets == 1 and f"Session a is not finite: {then}" in (
        caplog.text
    )
    assert TEXT.decode()[:9] not in caplog.text
    if then == "undo":
        assert same_bits(made.row("a"), broken)
        return
    assert made.diff("a")["CMS 1"].norm == 0
    assert made.diff("a")["CMS 1"].moves == moved == 3  # a budget is not had again
    assert made.feed("a", TEXT[:3]).read == 4  # its text begins anew


def test_limits_are_errors_before_anything_is_done():
    limits = Limits(slots=SLOTS, sessions=2, request=20, session=30)
    made = opened("a", "b", limits=limits)
    with pytest.raises(lib.LimitExceeded, match="2 sessions are open, and no more"):
        made.open("c")
    with pytest.raises(lib.LimitExceeded, match="no more"):
        made.fork("a", "c")
    with pytest.raises(lib.LimitExceeded, match="request of 26 tokens .* the 20"):
        made.ask("a", TEXT[:20], tokens=5, sampling=GREEDY)
    made.feed("a", TEXT[:19])
    with pytest.raises(lib.LimitExceeded, match="'a' has read 20 .* 11 more .* the 30"):
        made.ask("a", TEXT[:11])
    assert made.info("a").tokens == 20 and not made.info("a").busy
    assert made.feed("a", TEXT[:10]).read == 10
    for name in ("slots", "sessions", "request", "session"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Limits(**{name: 0})


def test_requests_that_make_no_sense_are_refused(key):
    made = opened("a")
    for arguments, message in (
        ({}, "tokens must be 0 or more, and above 0 without a text, got 0"),
        ({"text": "a", "tokens": -1}, "tokens must be 0 or more.* got -1"),
        ({"tokens": 3}, "key is None"),
        ({"tokens": 3, "key": jax.random.split(key)}, "key must be one key"),
        ({"text": [257]}, r"ids must be ids in \[0, 257\)"),
        ({"text": [0.5]}, "ids must be integers"),
        ({"text": [[1]]}, "ids must be one row"),
    ):
        with pytest.raises(ValueError, match=message):
            made.ask("a", **arguments)
    with pytest.raises(LookupError, match="no open session 'b'"):
        made.feed("b", "a")
    made.ask("a", TEXT)
    for call in (made.freeze, made.reset, made.save, lambda name: made.ask(name, "b")):
        with pytest.raises(ValueError, match="'a' is busy"):
            call("a")
    made.tick()
    made.cancel("a")
    reply = made.run()["a"]
    assert (reply.read, reply.ended) == (BLOCK, "cancelled") and not made.run()
    assert made.info("a").tokens == BLOCK and made.feed("a", b"on").read == 2
    made.ask("a", TEXT)
    made.close("a")
    assert made.run() == {}
    with pytest.raises(ValueError, match="folder is None"):
        opened("a").save("a")
    for policy, message in (
        ({"longest_move": 0.0}, "longest_move must be above 0"),
        ({"moves": -1}, "moves must be 0 or more"),
        ({"not_finite": "hope"}, "not_finite must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            Policy(**policy)


def test_a_policy_for_what_the_model_has_not_is_refused():
    params = small.built(small.TRANSFORMER)[1]
    config = dataclasses.replace(small.TRANSFORMER, vocab=257)
    made = Sessions(config, lm.build(config, jax.random.key(0))[1], ByteTokenizer())
    with pytest.raises(ValueError, match="longest_move is about CMS levels"):
        made.open("a", Policy(longest_move=1.0))
    made.open("a")
    assert made.diff("a") == {}
    with pytest.raises(ValueError, match="has nothing to merge"):
        made.merge({"a": 1.0}, "b")
    with pytest.raises(ValueError, match="257 ids, more than the model's vocab"):
        Sessions(small.TRANSFORMER, params, ByteTokenizer())
    with pytest.raises(ValueError, match="block must be at least 1 token, got 0"):
        opened(block=0)


def test_a_text_ends_where_it_should(key):
    """What it has read is what was kept, to the bit, wherever in a step that ends."""
    made = opened("a")
    wish = {"text": TEXT[:4], "tokens": 40, "key": key}
    sampling = Sampling(temperature=3.0)
    whole = made.generate("a", sampling=sampling, **wish)
    assert whole.ended == "length"
    letters = bytes(whole.ids)
    at = next(  # of two letters which nobody said before, not in the first step
        i
        for i in range(9, 38)
        if letters[i : i + 2].isascii() and letters.index(letters[i : i + 2]) == i
    )
    stop = letters[at : at + 2].decode()
    made.open("b")
    sampling = Sampling(temperature=3.0, stop=("never", stop))
    reply = made.generate("b", sampling=sampling, **wish)
    assert reply.ended == "stop" and bytes(reply.ids) == letters[: at + 2]
    assert reply.text == letters[:at].decode("utf-8", "replace")
    made.open("c")
    made.feed("c", TEXT[:4])
    made.feed("c", letters[: at + 2])
    assert same_bits(made.row("b"), made.row("c"))
    made.open("d")
    *pieces, last = made.stream("d", sampling=sampling, **wish)
    assert "".join(pieces) == reply.text and last == reply


class EndsAtZero(ByteTokenizer):
    bos = 0


def test_a_text_ends_before_the_model_starts_another():
    params = jax.tree.map(lambda w: w, small.built(CONFIG)[1])
    params["norm"]["scale"] = jax.tree.map(jnp.zeros_like, params["norm"]["scale"])
    # It says nothing, so all tokens are as likely, and the first ends the text.
    made = opened("a", params=params, tokenizer=EndsAtZero())
    made.feed("a", TEXT[:4])
    row, info = made.row("a"), made.info("a")
    reply = made.generate("a", 20, sampling=GREEDY)
    assert (reply.ended, reply.ids, reply.text) == ("document", (), "")
    assert same_bits(made.row("a"), row) and made.info("a") == info


def test_levels_are_put_back_by_name():
    made = opened("a")
    made.feed("a", TEXT)
    row, fresh = made.row("a"), opened("a").row("a")
    made.fork("a", "b")
    made.reset("b", ["CMS 1"])
    now = made.row("b").state
    assert same_bits(now.blocks.fast[0], fresh.state.blocks.fast[0])
    assert same_bits(now.blocks.fast[1], row.state.blocks.fast[1])
    assert same_bits(now.blocks.mixer, row.state.blocks.mixer)
    assert made.feed("b", TEXT[:2]).read == 2  # the text goes on
    made.fork("a", "c")
    made.reset("c", ["mixers", "CMS 1"])
    now = made.row("c").state
    assert same_bits(now.blocks.mixer, fresh.state.blocks.mixer)
    assert same_bits(now.blocks.fast[1], row.state.blocks.fast[1])
    assert same_bits(now.levels[1].learned, fresh.state.levels[1].learned)
    assert not np.any(now.held.count) and not np.any(now.position)
    assert made.feed("c", TEXT[:2]).read == 3  # another one begins
    made.reset("a")
    assert same_bits(made.row("a")._replace(ledger=fresh.ledger), fresh)
    assert made.diff("a")["CMS 1"].norm == 0
    assert made.diff("a", "b")["CMS 2"].norm == made.diff("b")["CMS 2"].norm > 0
    message = "has no 'CMS 3', only mixers, CMS 1, CMS 2"
    with pytest.raises(ValueError, match=message):
        made.reset("a", ["CMS 3"])


@pytest.mark.parametrize("inner", ["first_order", "exact"])
def test_a_start_is_kept_by_the_level_that_owns_it(inner):
    """Nested levels: a fast one that is put back begins where the slow one, which is
    kept, would have it begin; merged sessions own the mean of their starts."""
    cms = dataclasses.replace(CONFIG.cms, variant="nested", inner=inner)
    config = dataclasses.replace(CONFIG, layers=1, cms=cms)
    params = small.built(config)[1]
    fresh = slots_lib.begin(config, params)

    def learned(by):
        """As if levels had moved so far, and the start that is owned half as far."""
        state, add = fresh.state, lambda tree, by: jax.tree.map(lambda w: w + by, tree)
        first, second = state.levels
        owned = first.owned._replace(
            start=add(first.owned.start, by / 2), learned=add(first.owned.learned, by)
        )
        blocks = state.blocks._replace(fast=add(state.blocks.fast, by))
        levels = first._replace(owned=owned), second
        return fresh._replace(state=state._replace(blocks=blocks, levels=levels))

    one = learned(1.0)
    reset = lambda *levels: slots_lib.reset(config, params, one, levels).state  # noqa: E731
    start, owned = fresh.state.blocks.fast[0], one.state.levels[0].owned
    without = owned._replace(window=None)
    again = reset("CMS 1")
    assert same_bits(again.blocks.fast[0], owned.start)
    assert same_bits(again.levels[0].owned._replace(window=None), without)
    if inner == "exact":  # its window is no longer as it was read
        assert again.levels[0].owned.window.chunks[0] < 0 == owned.window.chunks[0]
    again = reset("mixers", "CMS 1")
    assert same_bits(again.blocks.fast[0], owned.start)
    assert not any(np.any(a) for a in jax.tree.leaves(again.levels[0].owned.learned))
    for levels in (("CMS 1", "CMS 2"), ("mixers", "CMS 1", "CMS 2")):
        again = reset(*levels)
        assert same_bits(again.blocks.fast[0], start)
        assert same_bits(again.levels[0].owned, fresh.state.levels[0].owned)
    again = reset("mixers")
    assert same_bits(again.blocks.fast, one.state.blocks.fast)
    assert same_bits(again.levels[0].owned.start, owned.start)

    both = slots_lib.merged(config, params, [one, learned(3.0)], [1.0, 1.0]).state
    close(both.levels[0].owned.start, jax.tree.map(lambda w: w + 1.0, start))
    close(both.blocks.fast[0], jax.tree.map(lambda w: w + 2.0, start))


def test_merging_averages_what_was_learned():
    made = opened("a", "b")
    made.feed("a", TEXT)
    made.feed("b", TEXT[::-1][:21])  # stands elsewhere in its chunks
    made.merge({"a": 1.0, "b": 3.0}, "c")
    params = made.params
    levels = [slots_lib.memories(CONFIG, params, made.row(n).state) for n in "abc"]
    expected = jax.tree.map(lambda a, b: 0.25 * a + 0.75 * b, *levels[:2])
    compare.within(1e-6, 1e-7)(levels[2], expected)
    fresh = opened("a").row("a")
    row = made.row("c")
    assert same_bits(row.state.blocks.mixer.tails, fresh.state.blocks.mixer.tails)
    assert not np.any(row.state.position) and same_bits(row.ledger, fresh.ledger)
    main = row.state.blocks.mixer.main
    assert same_bits(main.anchor, main.weights)
    made.merge({"c": 2.0}, "d")
    assert same_bits(made.row("d"), row)
    assert made.generate("c", 3, sampling=GREEDY, text="x").read == 2
    for shares in ({}, {"a": 0.0}, {"a": float("nan")}):
        with pytest.raises(ValueError, match="shares must name sessions"):
            made.merge(shares, "e")
    mesa = dataclasses.replace(
        CONFIG, mixer=NamedConfig(kind="mesa", chunk=4), cms=CMSConfig(hidden=8)
    )
    params = lm.build(mesa, jax.random.key(0))[1]
    one = slots_lib.begin(mesa, params)
    with pytest.raises(ValueError, match="the rule of its memory keeps more"):
        slots_lib.merged(mesa, params, [one], [1.0])


def test_a_session_has_one_size():
    made = opened("a")
    sizes = made.sizes
    measured = lambda: sum(leaf.nbytes for leaf in jax.tree.leaves(made.row("a")))  # noqa: E731
    assert measured() == sizes["all"] == sum(sizes.values()) - sizes["all"] + 4
    made.feed("a", TEXT)
    assert measured() == sizes["all"] and "CMS 2 weights" in sizes
    floats = {a.dtype for a in jax.tree.leaves(made.row("a")) if a.dtype.kind == "f"}
    assert floats == {np.dtype("float32")}
