"""Whether a score says that another run would give it again."""

import pytest

from eval_servers import repeats, rollout

SERVER = {"max_batch": 1, "device": "cpu"}


@pytest.mark.parametrize(
    ("changes", "servers", "workers", "varies", "reason"),
    [
        ({}, "ws://a:1", 2, "", None),
        ({"max_batch": 4}, "ws://a:1", 1, "", None),
        ({"max_batch": 4}, "ws://a:1", 2, "", "--max-batch=1"),
        ({"max_batch": None}, "ws://a:1", 1, "", "does not say whether requests share"),
        ({"device": "gpu"}, "ws://a:1", 1, "", "computes on a gpu"),
        ({"device": None}, "ws://a:1", 1, "", "on what its policy computes"),
        ({}, "ws://a:1,ws://b:1", 1, "", "which of several servers"),
        ({}, "ws://a:1", 1, repeats.NOT_COMPARED, "have not been compared"),
    ],
)
def test_one_reason_each(changes, servers, workers, varies, reason):
    options = rollout.Options(servers, workers=workers, max_steps=1)
    result = repeats.statement({**SERVER, **changes}, options, varies)
    assert result["bit_equal"] == (reason is None)
    assert len(result["why_not"]) == (reason is not None)
    assert all(reason in text for text in result["why_not"])
