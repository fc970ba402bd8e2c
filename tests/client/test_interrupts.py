"""The search for an interrupt behind the error that replaced it."""

import threading

import pytest

from hvpd._transport.interrupts import interrupt_behind, leave


def strike():
    raise KeyboardInterrupt


def test_an_interrupt_inside_of_a_condition_is_found_behind_its_error():
    condition = threading.Condition()
    with pytest.raises(RuntimeError) as error, condition:
        condition.release()  # `wait` has released the lock at this place, too.
        strike()
    assert isinstance(interrupt_behind(error.value, None), KeyboardInterrupt)


def test_an_error_without_an_interrupt_has_none_behind_it():
    with pytest.raises(ZeroDivisionError) as error:
        1 // 0  # noqa: B018 - for its error
    assert interrupt_behind(error.value, None) is None


def test_an_interrupt_that_was_handled_before_does_not_count():
    def in_a_handler():
        try:
            strike()
        except KeyboardInterrupt:
            raise ValueError("later") from None

    with pytest.raises(ValueError, match="later") as error:
        in_a_handler()
    interrupt = error.value.__context__
    assert interrupt_behind(error.value, None) is interrupt
    assert interrupt_behind(error.value, interrupt) is None


def test_a_call_that_is_left_is_cancelled_by_another_thread(monkeypatch):
    cancelled = threading.Event()
    held = threading.Lock()

    class Call:
        def cancel(self):
            with held:
                cancelled.set()

    with held:
        leave(Call())  # Does not wait.
        assert not cancelled.is_set()
    assert cancelled.wait(10)

    def full(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    leave(Call())
