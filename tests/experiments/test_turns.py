"""Turns on a device, between real processes."""

import itertools
import multiprocessing
import os
import signal
import socket
import time

from experiments.turns import Turns


def step_on(runs, started, stop, spans):
    """Steps of 10 ms, one after another; the times of each go into ``spans``."""
    with Turns(runs, "cpu") as turns:
        while not stop.is_set():
            with turns.shared():
                begun = time.monotonic()
                started.set()
                time.sleep(0.01)
                spans.put((begun, time.monotonic()))


def stepping(runs, n):
    context = multiprocessing.get_context("spawn")
    started, stop, spans = [context.Event() for _ in range(n)], context.Event(), context.Queue()
    workers = [context.Process(target=step_on, args=(runs, one, stop, spans)) for one in started]
    for worker in workers:
        worker.start()
    assert all(one.wait(60) for one in started)
    return workers, stop, spans


def test_a_timing_is_alone_and_steps_share(tmp_path):
    workers, stop, spans = stepping(tmp_path, 2)
    alone = []
    with Turns(tmp_path, "cpu") as turns:
        for _ in range(3):
            with turns.alone():  # an endless stream of steps doesn't keep it out
                begun = time.monotonic()
                time.sleep(0.05)
                alone.append((begun, time.monotonic()))
            time.sleep(0.05)
    stop.set()
    steps = []
    while any(worker.is_alive() for worker in workers) or not spans.empty():
        steps += [spans.get() for _ in range(spans.qsize())]
        time.sleep(0.01)
    assert len(steps) > 10
    assert not [(a, s) for a in alone for s in steps if a[0] < s[1] and s[0] < a[1]]
    steps.sort()
    assert any(later[0] < earlier[1] for earlier, later in itertools.pairwise(steps))


def test_a_killed_process_keeps_no_turn(tmp_path):
    workers, _, _ = stepping(tmp_path, 1)
    os.kill(workers[0].pid, signal.SIGKILL)
    workers[0].join()
    with Turns(tmp_path, "cpu") as turns, turns.alone():
        pass


def test_devices_are_apart_and_without_a_folder_every_turn_is_free(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    with Turns(tmp_path, "cpu") as cpu, Turns(tmp_path, "cuda:0") as gpu, Turns() as free:
        with cpu.alone(), gpu.alone(), free.alone(), free.shared():
            pass
        assert {path.name for path in (tmp_path / ".turns").iterdir()} == {
            f"{socket.gethostname()}-{name}" for name in ("cpu.gate", "cpu.work", "cuda-0-1-2.gate", "cuda-0-1-2.work")
        }
