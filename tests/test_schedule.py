"""At which times samplers and rollouts evaluate the network (spec causal_rcm 4.5, 6.1)."""

import numpy as np
import pytest

from crcm_jax.sampling import schedule
from crcm_jax.sampling.schedule import MID_TIMES, ContextRule, Cycle, Schedule


def test_few_step_times():
    """σ_max/(σ_max+1), a prefix of the intermediate times, 0."""
    assert schedule.few_step(4) == (1600 / 1601, 15 / 16, 5 / 6, 5 / 8, 0.0)
    assert schedule.few_step(2) == (1600 / 1601, 15 / 16, 0.0)
    assert schedule.few_step(1) == (1600 / 1601, 0.0)
    assert schedule.few_step(2, (5 / 6,), sigma_max=None) == (1.0, 5 / 6, 0.0)


def test_multi_step_times():
    """Evenly spaced before the shift, from σ_max to 0, written out with the formula of spec causal_rcm 6.1."""
    times = np.array(schedule.multi_step(50, 3.0, 1600.0))
    top = 1600 / 1601
    u = np.linspace(top / (3 - 2 * top), 0, 51)
    np.testing.assert_allclose(times, 3 * u / (1 + 2 * u), atol=1e-15)
    assert len(times) == 51 and times[-1] == 0 and abs(times[0] - top) < 1e-15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedule.few_step(0), "use at least 1"),
        (lambda: schedule.few_step(5), "5 steps need 4 intermediate times, not 3"),
        (lambda: schedule.few_step(3, (0.5, 0.6)), "must decrease strictly"),
        (lambda: schedule.few_step(2, (0.0,)), "must decrease strictly"),
        (lambda: schedule.decreasing((1.5, 0.0)), "must decrease strictly"),
        (lambda: Schedule(steps=(2, 4)), "never increase"),
        (lambda: Schedule(steps=()), "at least 1"),
        (lambda: Schedule(steps=(2, 0)), "at least 1"),
        (lambda: Schedule((4,), ((0.9,),)), "4 steps need 3"),
        (lambda: Schedule((4, 2), (MID_TIMES, ())), "2 steps need 1"),
        (lambda: Schedule((3,), ((0.5, 0.9),)), "must decrease strictly"),
    ],
)
def test_impossible_schedules_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_schedules_of_the_recipes():
    """The training presets of spec causal_rcm 6.1; the last entry serves all later chunks."""
    two = Schedule((4, 2), (MID_TIMES, (5 / 6,)))
    assert two.times(0) == (1.0, 15 / 16, 5 / 6, 5 / 8)
    assert two.times(1) == two.times(9) == (1.0, 5 / 6)
    assert ContextRule().times(two, 3) == (5 / 8, 5 / 6, 5 / 6)
    np.testing.assert_allclose(two.table(2), [[1, 15 / 16, 5 / 6, 5 / 8], [1, 5 / 6, 5 / 6, 5 / 6]], rtol=1e-7)
    one = Schedule((4, 1), (MID_TIMES, ()))
    assert one.times(5) == (1.0,)
    assert ContextRule().times(one, 2) == (5 / 8, 1.0)
    # One list of times serves every chunk by its prefix.
    assert Schedule((4, 2), (MID_TIMES,)).times(1) == (1.0, 15 / 16)


def test_simulated_steps_cycle():
    """N = updates mod m_0 + 1 (spec causal_rcm 4.5); chunk b takes min(N, m_b)."""
    plan = Schedule((4, 2), (MID_TIMES, (5 / 6,)))
    assert [int(Cycle().steps(plan, n, None)) for n in range(6)] == [1, 2, 3, 4, 1, 2]
    per_chunk = lambda n: [min(int(Cycle().steps(plan, n, None)), plan.most_steps(b)) for b in range(5)]  # noqa: E731
    assert per_chunk(0) == [1] * 5
    assert per_chunk(3) == [4, 2, 2, 2, 2]
    assert per_chunk(4) == [1] * 5
