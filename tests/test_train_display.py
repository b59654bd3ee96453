"""What a run says of its speed, and when it says nothing."""

import io

from rich.console import Console

from train import display
from train.display import Display, Speed


def test_no_speed_is_shown_before_one_is_measured(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    out, speed = io.StringIO(), Speed()
    with Display(Console(file=out, width=200), total=9, done=0) as shown:
        for step in (1, 2, 3):
            speed.update(step, 64 * step)
            shown.update(step, {"loss": 2.5}, speed)
            now[0] += 20
        speed.restart()  # what was measured before still counts
        speed.update(4, 64 * 4)
        shown.update(4, {"loss": 2.5}, speed)
    assert out.getvalue().splitlines() == [
        "step 1/9  loss 2.500",
        "step 2/9  loss 2.500  3 tokens/s  ETA 0:02:20",
        "step 3/9  loss 2.500  3 tokens/s  ETA 0:02:00",
        "step 4/9  loss 2.500  3 tokens/s  ETA 0:01:40",
    ]
    assert (speed.seconds, speed.tokens) == (40.0, 128)
