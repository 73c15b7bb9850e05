"""Whether two runs of one evaluation would give the same numbers, to the bit."""

from __future__ import annotations

from typing import Any, Dict, List

# What only runs that were compared may claim.
NOT_COMPARED = "two runs of this simulator have not been compared"


def statement(metadata: Dict[str, Any], options: Any, varies: str) -> Dict[str, Any]:
    """What a score says of itself.

    Args:
        metadata: of the policy server.
        options: `rollout.Options` of the run.
        varies: see `cli.Evaluation`.

    Returns:
        {"bit_equal": whether another run with the same settings, on the same machines, must give
        the same actions, states and so the same score, "why_not": reasons, [] where it must}.
    """
    reasons: List[str] = []
    batch, device = metadata.get("max_batch"), metadata.get("device")
    # Requests that share a pass of the model are summed in another order than alone.
    if batch is None:
        reasons.append("the server does not say whether requests share a pass of its model")
    elif batch > 1 and options.workers > 1:
        reasons.append(
            "{} simulators ask at once and share passes of up to {} as they happen to arrive, which"
            " changes actions by rounding (serve with --max-batch=1)".format(options.workers, batch)
        )
    if device is None:
        reasons.append("the server does not say on what its policy computes")
    elif device != "cpu":
        reasons.append(
            "the policy computes on a {}, where a program that is compiled again may sum in another"
            " order".format(device)
        )
    if len(options.servers) > 1:
        reasons.append("which of several servers answers an episode depends on which is free")
    if varies:
        reasons.append(varies)
    return {"bit_equal": not reasons, "why_not": reasons}
