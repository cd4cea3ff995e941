"""BackgroundWriter: order, back-pressure, failures that are passed on, and an end that finishes what was submitted."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch

from lightning_influence.artifacts import BackgroundWriter


class DiskOnFire(Exception):
    pass


def burn() -> None:
    raise DiskOnFire("first")


def test_order_and_flush() -> None:
    done: list[int] = []
    with BackgroundWriter(max_pending=2) as writer:
        for number in range(50):
            writer.submit(lambda number=number: done.append(number))
        writer.flush()
        assert done == list(range(50)) and writer.pending == 0


def test_back_pressure() -> None:
    gate, entered = threading.Event(), threading.Event()
    highest = 0
    writer = BackgroundWriter(max_pending=3)

    def wait() -> None:
        entered.set()
        gate.wait(10)

    submitted: list[int] = []

    def fill() -> None:
        for number in range(5):
            writer.submit(wait)
            submitted.append(number)

    thread = threading.Thread(target=fill)
    thread.start()
    assert entered.wait(10)
    deadline = time.monotonic() + 10
    while len(submitted) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)  # a fourth submit would have come through by now
    highest = writer.pending
    assert (len(submitted), highest) == (3, 3)
    gate.set()
    thread.join(10)
    writer.close()
    assert len(submitted) == 5 and writer.pending == 0


def test_the_first_failure_is_raised_by_every_later_call_and_nothing_more_is_written() -> None:
    done: list[int] = []
    gate = threading.Event()
    writer = BackgroundWriter(max_pending=4)
    writer.submit(lambda: (gate.wait(10), burn()))
    writer.submit(lambda: done.append(1))
    gate.set()
    with pytest.raises(DiskOnFire, match="first") as error:
        writer.flush()
    assert any(entry.name == "burn" for entry in error.traceback)
    with pytest.raises(DiskOnFire):
        writer.submit(lambda: done.append(2))
    with pytest.raises(DiskOnFire):
        writer.flush()
    assert done == []
    writer.close()  # the failure was seen


def test_a_caller_that_waits_for_room_hears_of_the_failure() -> None:
    gate = threading.Event()
    writer = BackgroundWriter(max_pending=1)
    writer.submit(lambda: (gate.wait(10), burn()))
    threading.Timer(0.05, gate.set).start()
    with pytest.raises(DiskOnFire):
        writer.submit(lambda: None)
    writer.close()


def test_close_raises_a_failure_that_nobody_has_seen_once() -> None:
    writer = BackgroundWriter()
    writer.submit(burn)
    with pytest.raises(DiskOnFire):
        writer.close()
    writer.close()


def test_close_finishes_and_then_refuses() -> None:
    done: list[int] = []
    writer = BackgroundWriter(max_pending=8)
    for number in range(5):
        writer.submit(lambda number=number: (time.sleep(0.002), done.append(number)))
    writer.close()
    assert done == list(range(5))
    with pytest.raises(RuntimeError, match="closed"):
        writer.submit(lambda: None)
    BackgroundWriter().close()  # never used


def test_an_error_of_the_caller_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), BackgroundWriter() as writer:
        writer.submit(burn)
        raise ZeroDivisionError


def test_a_finished_task_lets_go_of_its_tensors() -> None:
    writer = BackgroundWriter()
    tensor = torch.zeros(3)
    alive = weakref.ref(tensor)
    writer.submit(lambda tensor=tensor: tensor.add_(1))
    del tensor
    writer.flush()
    deadline = time.monotonic() + 5
    while alive() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.005)
    assert alive() is None
    writer.close()


def test_at_least_one_pending() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BackgroundWriter(max_pending=0)
