"""Rankings against the real robot's, by hand and with the published simulation results."""

import pytest

from eval_servers.simpler.published import REAL, agreement, mmrv, pearson
from eval_servers.simpler.tasks import TASKS

# SimplerEnv's own table of simulated rates (visual matching), same order as `REAL`'s rows, and what
# its formulas give for the two tables.
PUBLISHED = {
    "google_robot_pick_coke_can": ((0.787, 0.857, 0.710, 0.567, 0.027, 0.170), 0.031333, 0.975434),
    "google_robot_move_near": ((0.779, 0.442, 0.354, 0.317, 0.050, 0.042), 0.111000, 0.856097),
    "google_robot_open_drawer": ((0.157, 0.601, 0.463, 0.296, 0.000, 0.009), 0.000000, 0.983166),
    "google_robot_close_drawer": ((0.343, 0.861, 0.667, 0.891, 0.278, 0.444), 0.123333, 0.771233),
    "google_robot_place_apple_in_closed_top_drawer": (
        (0.037, 0.065, 0.130, 0.213, 0.000, 0.000), 0.000000, 0.969172
    ),
    "widowx_spoon_on_towel": ((0.000, 0.125, 0.472), 0.000000, 0.826944),
    "widowx_carrot_on_plate": ((0.042, 0.083, 0.097), 0.111333, 0.571368),
    "widowx_stack_cube": ((0.000, 0.000, 0.042), 0.000000, 0.999997),
    "widowx_put_eggplant_in_basket": ((0.000, 0.431, 0.569), 0.000000, 0.989415),
}  # fmt: skip


@pytest.mark.parametrize("task", PUBLISHED)
def test_the_published_tables(task):
    simulated, violation, correlation = PUBLISHED[task]
    real = list(REAL[task].values())
    assert mmrv(simulated, real) == pytest.approx(violation, abs=5e-7)
    assert pearson(simulated, real) == pytest.approx(correlation, abs=5e-7)


def test_every_task_has_real_results():
    assert set(REAL) == set(TASKS) == set(PUBLISHED)


def test_violations_by_hand():
    # Simulation swaps the second and the third, which differ by 0.3 in reality.
    assert mmrv([0.1, 0.6, 0.4, 0.9], [0.0, 0.2, 0.5, 1.0]) == pytest.approx((0.3 + 0.3) / 4)
    assert mmrv([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]) == 0
    # All the other way round: the worst of each.
    assert mmrv([3, 2, 1], [0.0, 0.5, 1.0]) == pytest.approx((1 + 0.5 + 1) / 3)
    # A tie in simulation counts as a violation for the one that is better in reality.
    assert mmrv([0.5, 0.5], [0.2, 0.6]) == pytest.approx(0.4 / 2)


def test_correlation_by_hand():
    assert pearson([0, 1, 2], [1, 3, 5]) == pytest.approx(1, abs=1e-7)
    assert pearson([0, 1, 2], [5, 3, 1]) == pytest.approx(-1, abs=1e-7)
    # Deviations (-1, 0, 1) and (-1, 1, 0): 1 / 2.
    assert pearson([0, 1, 2], [0, 2, 1]) == pytest.approx(0.5, abs=1e-7)
    assert pearson([0.3, 0.3], [0.1, 0.9]) == 0
    assert pearson([0.3, 0.3], [0.3, 0.3]) == 1


def test_agreement_takes_four_policies_that_both_have():
    real = REAL["google_robot_move_near"]
    simulated = {"rt-1-x": 0.3, "mine": 1.0, "octo-base": 0.1, "rt-2-x": 0.8, "rt-1-begin": 0.0}
    result = agreement(simulated, real)
    assert result.policies == ["rt-2-x", "rt-1-x", "rt-1-begin", "octo-base"]
    assert result.mmrv == 0
    assert result.pearson > 0.9
    del simulated["rt-2-x"]
    with pytest.raises(ValueError, match=r"at least 4.*are 3: rt-1-x, rt-1-begin, octo-base"):
        agreement(simulated, real)
    with pytest.raises(ValueError, match="are none: the table has rt-2-x"):
        agreement({"mine": 1.0}, real)
