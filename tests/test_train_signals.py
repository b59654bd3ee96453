import signal

import pytest

from train.signals import STOPPING, StopRequest


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_noted_and_nothing_is_interrupted(number):
    with StopRequest() as request:
        assert request.signal is None
        signal.raise_signal(number)
        assert request.signal is number


def test_a_second_signal_ends_at_once():
    with StopRequest():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in STOPPING]
    with StopRequest():
        assert [signal.getsignal(number) for number in STOPPING] != before
    assert [signal.getsignal(number) for number in STOPPING] == before
