import pytest

from vlm_dist.observability import eta as eta_module
from vlm_dist.observability.eta import WINDOW_STEPS, Eta


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 50.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(eta_module, "time", clock)
    return clock


def steps(eta, clock, first, last, seconds):
    for position in range(first, last + 1):
        clock.now += seconds
        eta.step_done(position)


def test_nothing_is_known_before_the_first_step(clock):
    assert Eta(0, 100).seconds_left() is None


def test_a_slow_first_step_is_forgotten_and_a_resumed_run_counts_what_is_left(clock):
    eta = Eta(40, 100)
    clock.now += 30
    eta.restart_clock()
    steps(eta, clock, 41, 41, 60)
    assert eta.seconds_left() == 60 * 59
    steps(eta, clock, 42, 50, 2)
    assert eta.seconds_left() == pytest.approx(2 * 50)


def test_evaluations_and_saves_are_no_steps_but_those_to_come_count(clock):
    eta = Eta(0, 10, eval_steps=4, save_steps=5)
    steps(eta, clock, 1, 4, 1)
    with eta.pause("evaluation"):
        clock.now += 100
    steps(eta, clock, 5, 5, 1)
    with eta.pause("save"):
        clock.now += 7
    # 5 steps, evaluations at 8 and at the end, a save at 10
    assert eta.seconds_left() == pytest.approx(5 * 1 + 2 * 100 + 7)
    steps(eta, clock, 6, 10, 1)
    assert eta.seconds_left() == 0


def test_it_follows_the_last_steps(clock):
    eta = Eta(0, 1000)
    steps(eta, clock, 1, 300, 1)
    steps(eta, clock, 301, 300 + WINDOW_STEPS, 3)
    assert eta.seconds_left() == pytest.approx(3 * (700 - WINDOW_STEPS))
