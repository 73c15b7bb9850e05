import asyncio
import time
from typing import Any

import numpy as np
import pytest

from tests.serve.fakes import BatchCountingPolicy, CountingPolicy
from vla_jax.inference.protocol import BatchPolicy, ObservationError
from vla_jax.serve.engine import Engine, PolicyFailedError, Seat, ShuttingDownError


def obs(value=7, prompt="go"):
    return {"observation/image": np.full((8, 8, 3), value, np.uint8), "prompt": prompt}


def drive(policy: Any, scenario, max_wait=0.25) -> Any:
    """Run `scenario(engine)` against a running engine."""

    async def main():
        engine = Engine(policy, max_wait)
        await engine.warmup()
        async with engine.running():
            result = await scenario(engine)
        engine.close()
        return result

    return asyncio.run(main())


def take(engine, count):
    seats = [Seat() for _ in range(count)]
    engine.seats.update(seats)
    return seats


def test_a_lone_client_does_not_wait():
    async def scenario(engine):
        (seat,) = take(engine, 1)
        for _ in range(5):
            await engine.act(seat, obs())
            await asyncio.sleep(0.01)
        return engine

    begin = time.perf_counter()
    engine = drive(BatchCountingPolicy(), scenario, max_wait=5.0)
    assert time.perf_counter() - begin < 2.0
    assert "vla_batch_size_count 5.0" in engine.metrics.render()


def test_nobody_waits_for_sessions_that_are_not_due():
    async def scenario(engine):
        quick, slow, silent = take(engine, 3)
        for seat in (quick, slow, silent):
            await engine.act(seat, obs())
        await asyncio.sleep(0.6)
        await engine.act(slow, obs())  # asks every 0.6 s
        begin = time.perf_counter()
        await engine.act(quick, obs())
        await engine.act(quick, obs())
        return time.perf_counter() - begin

    assert drive(BatchCountingPolicy(), scenario) < 0.2


def test_requests_wait_for_those_that_are_due_and_share_a_pass():
    policy = BatchCountingPolicy()

    async def client(engine, seat, delay):
        replies = []
        for _ in range(10):
            await asyncio.sleep(delay)
            replies.append(await engine.act(seat, obs()))
        return replies

    async def scenario(engine):
        seats = take(engine, 4)
        pauses = (0.02, 0.03, 0.04, 0.05)
        jobs = [client(engine, s, d) for s, d in zip(seats, pauses, strict=True)]
        return await asyncio.gather(*jobs)

    histories = drive(policy, scenario)
    # Once their habits are known, all four are awaited; some end before the others.
    assert policy.batches.count(4) >= 4, policy.batches
    assert sum(policy.batches) == 40
    assert 4 in [reply["server_timing"]["batch"] for reply in histories[0]]
    numbers = set()
    for replies in histories:
        numbers.add(int(replies[0]["actions"][0, 0]))
        assert [int(r["actions"][0, 1]) for r in replies] == list(range(1, 11))
        assert len({int(r["actions"][0, 0]) for r in replies}) == 1
    assert len(numbers) == 4


def test_waiting_is_bounded():
    async def scenario(engine):
        single, other = take(engine, 2)
        for _ in range(2):  # both ask every 50 ms
            await asyncio.gather(engine.act(single, obs()), engine.act(other, obs()))
            await asyncio.sleep(0.05)
        begin = time.perf_counter()
        reply = await engine.act(single, obs())  # the other one never comes again
        return time.perf_counter() - begin, reply["server_timing"]

    seconds, timing = drive(BatchCountingPolicy(), scenario, max_wait=0.15)
    assert 0.1 < seconds < 0.5
    assert timing["queue_ms"] > 100
    assert timing["batch"] == 1


def test_requests_pile_up_while_the_policy_is_busy():
    policy = BatchCountingPolicy(seconds=0.1, max_batch=4)

    async def scenario(engine):
        seats = take(engine, 7)
        first = asyncio.create_task(engine.act(seats[0], obs()))
        await asyncio.sleep(0.03)
        assert engine.waiting == 0
        remainder = [asyncio.create_task(engine.act(seat, obs())) for seat in seats[1:]]
        await asyncio.sleep(0)
        assert engine.waiting == 6
        await asyncio.gather(first, *remainder)

    drive(policy, scenario, max_wait=0.0)
    assert policy.batches == [1, 4, 2]


def test_one_bad_request_of_a_batch_harms_none_of_the_others():
    policy = BatchCountingPolicy(fail_on="crash", seconds=0.05)
    asked = [obs(1), obs(2, "crash"), {"prompt": "no image"}, obs(3, "nan"), obs(4)]

    async def scenario(engine):
        blocker = asyncio.create_task(engine.act(Seat(), obs()))
        await asyncio.sleep(0.02)
        jobs = [engine.act(seat, o) for seat, o in zip(take(engine, 5), asked, strict=True)]
        answers = await asyncio.gather(*jobs, return_exceptions=True)
        await blocker
        return answers

    good, crash, no_image, nan, last = drive(policy, scenario)
    assert good["actions"][0, 3] == 1
    assert last["actions"][0, 3] == 4
    assert isinstance(crash, PolicyFailedError)
    assert "ArithmeticError: told to fail" in str(crash)
    assert isinstance(no_image, ObservationError)
    assert isinstance(nan, PolicyFailedError)
    assert "finite" in str(nan)
    assert policy.batches == [1, 4, 1, 1, 1, 1]


def test_a_refused_request_keeps_the_history_and_a_new_prompt_ends_it():
    async def scenario(engine):
        (seat,) = take(engine, 1)
        steps = []
        for prompt in ("a", "a", "b", "b"):
            steps.append((await engine.act(seat, obs(prompt=prompt)))["actions"][0, 1])
        with pytest.raises(ObservationError):
            await engine.act(seat, {"prompt": "b"})
        steps.append((await engine.act(seat, obs(prompt="b")))["actions"][0, 1])
        seat.reset()
        steps.append((await engine.act(seat, obs(prompt="b")))["actions"][0, 1])
        return steps

    assert drive(CountingPolicy(), scenario) == [1, 2, 1, 2, 3, 1]


def test_policies_that_take_one_at_a_time_are_served_too():
    assert not isinstance(CountingPolicy(), BatchPolicy)

    async def scenario(engine):
        jobs = [engine.act(seat, obs()) for seat in take(engine, 6)]
        replies = await asyncio.gather(*jobs)
        return {int(r["actions"][0, 0]) for r in replies}

    assert drive(CountingPolicy(), scenario) == {1, 2, 3, 4, 5, 6}


def test_those_who_wait_at_the_end_are_let_go():
    async def main():
        engine = Engine(BatchCountingPolicy(seconds=0.3), 0.0)
        async with engine.running():
            jobs = [asyncio.create_task(engine.act(Seat(), obs())) for _ in range(3)]
            await asyncio.sleep(0.05)
        done = await asyncio.wait_for(asyncio.gather(*jobs, return_exceptions=True), 2)
        engine.close()
        return done

    assert all(isinstance(x, ShuttingDownError) for x in asyncio.run(main()))
