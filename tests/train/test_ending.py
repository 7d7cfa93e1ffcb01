"""How runs end: by signals, by calls that hang, by another run in their folder."""

import ctypes
import gc
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments.reliability import end, lines
from hope_jax.core import config as config_lib
from hope_jax.data import workers
from hope_jax.train import lock, loop, signals, watchdog
from tests.train import tiny

RUN = tiny.rows("smoke")["tiny"]


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def test_signals_are_noted_and_a_second_loses_nothing():
    before = [signal.getsignal(number) for number in signals.ENDING]
    for first in signals.ENDING:
        with signals.stop_on_signal() as stop:
            assert stop.arrived() is None
            send(first, *signals.ENDING)
            assert stop.signal == first
            assert stop.arrived()[0] == first
    assert [signal.getsignal(number) for number in signals.ENDING] == before


def test_a_person_interrupts_by_a_second_ctrl_c(monkeypatch):
    monkeypatch.setattr(signals, "AGAIN", 0.05)
    with signals.stop_on_signal(), pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
        time.sleep(0.1)
        send(signal.SIGTERM, signal.SIGINT)


def test_what_nohup_ignores_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stop_on_signal() as stop:
            send(signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def long_call(until, most=20.0):
    """One that Python cannot interrupt, as a compilation is, until `until()`; it waits
    for a lock of the system, which no signal ends."""
    system, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    system.pthread_mutex_init(mutex, None)
    system.pthread_mutex_lock(mutex)

    def release():
        last = time.monotonic() + most
        while not until() and time.monotonic() < last:
            time.sleep(0.02)
        system.pthread_mutex_unlock(mutex)

    thread = threading.Thread(target=release)
    thread.start()
    system.pthread_mutex_lock(mutex)
    thread.join()


def test_threads_see_a_signal_during_a_long_call():
    with signals.stop_on_signal() as stop:
        noted = []

        def look():
            time.sleep(0.1)  # by then the call has begun
            send(signal.SIGTERM)
            while stop.arrived() is None:
                time.sleep(0.01)
            noted.append((stop.signal, stop.arrived()))

        thread = threading.Thread(target=look)
        thread.start()
        long_call(lambda: noted)
        thread.join()
    ((by_handler, by_pipe),) = noted
    assert by_handler is None and by_pipe[0] == signal.SIGTERM


@pytest.fixture
def watch(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "REACT", 0.3)
    monkeypatch.setattr(watchdog, "RESCUE", 0.3)
    monkeypatch.setattr(watchdog, "GRACE", 0.3)
    ended = []

    def made(rescue=lambda: None, stop=None, **more):
        stop = signals.Stop() if stop is None else stop
        limits = {"a batch": 0.3, "a save": 0.0}
        file = tmp_path / "stalled.txt"
        exit = ended.append
        return watchdog.Watchdog(limits, stop, rescue, file, exit=exit, **more)

    made.ended, made.file = ended, tmp_path / "stalled.txt"
    return made


def test_a_call_that_hangs_is_shown_and_interrupted(watch, capfd):
    start = time.monotonic()
    with watch() as dog, pytest.raises(watchdog.Stalled, match="a batch has not ended"):
        with dog("a batch"):
            threading.Event().wait(20)
    assert time.monotonic() - start < 5 and not watch.ended
    assert "test_a_call_that_hangs" in watch.file.read_text()


def test_calls_in_time_are_left_alone(watch):
    with watch() as dog:
        for _ in range(3):
            with dog("a batch"):
                time.sleep(0.1)
        with dog("a save"):  # without a limit
            time.sleep(0.6)
        time.sleep(0.6)
    assert not watch.ended and not watch.file.exists()


@pytest.mark.parametrize("asked", [None, signal.SIGTERM])
def test_what_cannot_be_interrupted_is_saved_and_ends(watch, asked, capfd):
    saved = []
    with signals.stop_on_signal() as stop:
        with watch(lambda: saved.append(watch.file.exists()), stop) as dog:
            with dog("a batch" if asked is None else "a save"):
                if asked:
                    send(asked)
                long_call(lambda: watch.ended)
    assert saved == [True]
    assert watch.ended == [watchdog.STATUS if asked is None else 128 + asked]
    assert "--resume goes on" in capfd.readouterr().err


def test_a_rescue_that_hangs_or_fails_ends_as_well(watch, capfd):
    def fails():
        raise OSError("no room")

    given_up = threading.Event()
    for n, rescue in enumerate((given_up.wait, fails), start=1):
        with watch(rescue) as dog, dog("a batch"):
            long_call(lambda n=n: len(watch.ended) == n)
    given_up.set()
    assert watch.ended == [watchdog.STATUS] * 2
    said = capfd.readouterr().err
    assert "could not be saved in 0.3 s" in said and "is lost: no room" in said


def test_a_dead_worker_ends_the_call_that_waits_for_it(watch, capfd):
    with watch(dead=lambda: "a worker has ended") as dog:
        with pytest.raises(watchdog.Stalled, match="a worker has ended"):
            with dog("a batch"):
                threading.Event().wait(20)


def test_workers_are_known_and_ended(monkeypatch):
    monkeypatch.setattr(workers, "WAIT", 0.2)
    spawn = multiprocessing.get_context("spawn")
    other = spawn.Process(target=time.sleep, args=(60,))
    other.start()
    known = workers.Workers()
    own = [spawn.Process(target=time.sleep, args=(60,)) for _ in range(2)]
    for process in own:
        process.start()
    assert known.dead() is None
    own[0].kill()
    own[0].join()
    assert known.dead() is None  # the library may say it first
    assert "has ended with status -9" in known.dead(wait=0.0)
    time.sleep(0.3)
    assert "has ended with status -9" in known.dead()
    os.kill(own[1].pid, signal.SIGSTOP)
    known.kill()
    own[1].join(10)
    assert other.is_alive() and not own[1].is_alive()
    other.kill()
    other.join()


READ = f"""
import multiprocessing, os, runpy, time
begin = runpy.run_path({workers.__file__!r})["begin"]
def read():
    begin()
    for n in range(600):
        print(os.getpid(), n, flush=True)
        time.sleep(0.03)
multiprocessing.get_context("fork").Process(target=read).start()
os.close(1)  # what is said now is the worker's
time.sleep(60)
"""


def test_workers_end_with_their_parent_alone():
    """Not when all are asked to end, as by a terminal: the run finishes its step."""
    parent = subprocess.Popen([sys.executable, "-c", READ], stdout=subprocess.PIPE)
    with parent:
        said = lambda: map(int, parent.stdout.readline().split())  # noqa: E731
        worker, n = said()
        for number in signals.ENDING:
            os.kill(worker, number)
        while n < 10:
            _, n = said()
        parent.kill()
        parent.communicate(timeout=10)  # until nobody is left who could say more


def test_a_stop_that_ends_workers_too_is_a_stop(tmp_path, monkeypatch):
    """Those that a signal reaches before they ignore it."""

    def fails(item):
        send(signal.SIGTERM)
        raise RuntimeError("Worker process was terminated unexpectedly")

    def dead(self, wait=None):
        return None if wait is None else "a worker has ended"

    monkeypatch.setattr(loop, "_batch", fails)
    monkeypatch.setattr(workers.Workers, "dead", dead)
    outcome = loop.train(RUN, tmp_path)
    assert (outcome.step, outcome.stopped_by) == (0, signal.SIGTERM)


HOLD = f"""
import runpy, sys, time
hold = runpy.run_path({lock.__file__!r})["hold"]
with hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_one_program_s(trained, tmp_path, monkeypatch):
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
    )
    with held:
        assert held.stdout.readline() == "held\n"
        said = f"is in use by process {held.pid} on "
        with pytest.raises(lock.InUse, match=said), lock.hold(tmp_path):
            pass
        with pytest.raises(lock.InUse, match=said):
            loop.train(RUN, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {lock.FILE}
        held.kill()
    shutil.copytree(trained, tmp_path / "run")
    with lock.hold(tmp_path / "run"):  # said before that it has checkpoints
        with pytest.raises(lock.InUse):
            loop.train(RUN, tmp_path / "run")
    shutil.rmtree(tmp_path / "run")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space"), lock.hold(tmp_path):
            pass
    with lock.hold(tmp_path, "--out"):  # what a killed one leaves is no hindrance
        with pytest.raises(lock.InUse, match=f"--out=.* by process {os.getpid()} on"):
            with lock.hold(tmp_path, "--out"):
                pass
    assert not list(tmp_path.iterdir())


def test_an_error_saves_what_was_done(trained, tmp_path, monkeypatch):
    """And the run goes on from there to the same end."""

    numbers = iter(range(100))

    def fails(item):
        if next(numbers) == 5:
            raise OSError(5, "the data is gone")
        return item["tokens"]

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_batch", fails)
        with pytest.raises(OSError, match="the data is gone"):
            loop.train(RUN, tmp_path / "run")
    assert loop.checkpoint.latest_verified_step(tmp_path / "run") == 5
    assert loop.train(RUN, tmp_path / "run", resume=True).finished
    assert end(tmp_path / "run") == end(trained)


def test_a_run_that_is_asked_to_stop_saves_the_step_at_hand(
    trained, tmp_path, monkeypatch
):
    """Also by several at once; and it goes on to the same bytes."""
    numbers = iter(range(100))

    def asked(item):
        if next(numbers) == 4:
            send(signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM)
        return item["tokens"]

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_batch", asked)
        outcome = loop.train(RUN, tmp_path)
    assert (outcome.step, outcome.stopped_by) == (5, signal.SIGHUP)
    assert loop.checkpoint.latest_verified_step(tmp_path) == lines(tmp_path) == 5
    assert loop.train(RUN, tmp_path, resume=True).finished
    assert end(tmp_path) == end(trained)


def test_a_stopped_worker_hangs_nothing(tmp_path, monkeypatch):
    """A run that waits for it in vain saves and ends when it is asked to."""
    monkeypatch.setattr(watchdog, "GRACE", 0.5)
    numbers, found = iter(range(100)), []

    def stopped(item):
        if next(numbers) == 3:
            found.extend(multiprocessing.active_children())
            for worker in found:
                os.kill(worker.pid, signal.SIGSTOP)
            threading.Timer(1.0, send, [signal.SIGTERM]).start()  # all is used up then
        return item["tokens"]

    monkeypatch.setattr(loop, "_batch", stopped)
    run = config_lib.override(tiny.rows("full")["tiny"], ["train.workers=1"])
    outcome = loop.train(run, tmp_path)
    assert outcome.stopped_by == signal.SIGTERM and 4 <= outcome.step < 90
    assert loop.checkpoint.latest_verified_step(tmp_path) == lines(tmp_path)
    assert "a batch has not ended" in (tmp_path / watchdog.FILE).read_text()
    (worker,) = found
    worker.join(10)
    assert not worker.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "room, said", [(20_000, "of step 9"), (4_500, "metrics|tensorb")]
)
def test_a_full_disk_is_one_message(tmp_path, room, said, capfd):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises((loop.checkpoint.SaveFailed, OSError), match=said):
            loop.train(RUN, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    gc.collect()  # what Orbax left behind is of this test
    assert capfd.readouterr().err.count("Traceback") == 0


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_a_folder_that_cannot_be_made_is_told_at_once(tmp_path, name):
    loop._write_config(tmp_path, RUN)
    (tmp_path / name).write_text("a file")
    start = time.monotonic()
    with pytest.raises((loop.checkpoint.SaveFailed, OSError), match=name):
        loop.train(RUN, tmp_path)
    assert time.monotonic() - start < 20
    assert Path(tmp_path / name).read_text() == "a file"
