"""Train a VLA.

    python launch/train.py --config=configs/kosmos_ph.py --workdir=runs/kosmos_ph
    python launch/train.py --config=... --workdir=... --config.train.batch_size=32
    python launch/train.py --config=... --workdir=... --init=runs/another

The workdir gets checkpoints/ (all that resuming and serving need), log.jsonl, goodput.jsonl and, at
the end, eval.json. A run whose workdir holds a checkpoint goes on from it. SIGTERM and Ctrl-C save
and exit with 0; a second one ends the run at once. An error in the data saves as well.
With several processes start the same command in each, under Slurm, Open MPI or on a TPU pod, or
with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID set.
"""

import functools
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vla_jax import cli, compilation_cache, progress, refusal
from vla_jax.config import Config, ConfigError, resolve, to_dict
from vla_jax.data.errors import DataError, TextLengthError
from vla_jax.data.language.captions import check_texts
from vla_jax.models import vla
from vla_jax.models.weights import WeightError
from vla_jax.train import evaluate, flops, heap, lock, log, lora, runtime, state
from vla_jax.train import mesh as meshes
from vla_jax.train.checkpoint import FOLDER, CheckpointError, Checkpoints
from vla_jax.train.finite import DivergedError, SkippedSteps
from vla_jax.train.goodput import Goodput
from vla_jax.train.inputs import Inputs, with_captions, without_supervision
from vla_jax.train.meter import Meter
from vla_jax.train.opening import completed, open_run
from vla_jax.train.optim import make_optimizer
from vla_jax.train.peers import Peers
from vla_jax.train.saving import Saver
from vla_jax.train.state import TrainState
from vla_jax.train.step import make_train_step
from vla_jax.train.watch import Profile, Recompilations

CONFIG = config_flags.DEFINE_config_file("config")
INIT = flags.DEFINE_string("init", None, "Checkpoint whose weights a new run starts from.")
DEBUG = flags.DEFINE_boolean("debug", False, refusal.HELP)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
# What a person, a disk or the data has caused: the message says all, a traceback would hide it.
USER_ERRORS = (
    ConfigError, DataError, TextLengthError, WeightError, CheckpointError, DivergedError,
    lock.WorkdirError, log.LogError, refusal.DeviceError, refusal.FlagError, OSError,
)  # fmt: skip

logger = logging.getLogger("train")


@dataclass(frozen=True)
class Run:
    """What every part of the loop needs.

    Attributes:
        config: of the run, complete.
        workdir: the run's folder.
        model: to train.
        mesh: of the devices.
        inputs: the data.
        template: shapes and places of the state.
        train_step: (state, batch) -> (state, metrics).
        eval_step: (state, batch) -> sums, see `evaluate.make_eval_step`.
        saver: of checkpoints.
        rows: the log.
        stop: whether to save and leave.
        peers: the other processes.
        clock: where the time goes.
    """

    config: Config
    workdir: Path
    model: Any
    mesh: Any
    inputs: Inputs
    template: TrainState
    train_step: Any
    eval_step: evaluate.EvalStep
    saver: Saver
    rows: log.RunLog
    stop: runtime.StopSignal
    peers: Peers
    clock: Goodput


def train(raw: Any, workdir: Path, init: str | None, peers: Peers) -> None:
    """A whole run, or the rest of one.

    Args:
        raw: config of the run, as its file and the flags have it.
        workdir: the run's folder.
        init: checkpoint whose weights a new run starts from; None = `model.backbone.hf_dir`.
        peers: the other processes of the run.
    """
    clock, stop, chief = Goodput(), runtime.StopSignal(), jax.process_index() == 0

    # Devices, and what the data say of the robot.
    new = not (workdir / FOLDER).is_dir()
    config, mesh = completed(raw, init, new)
    logger.info("mesh %s of %s", dict(mesh.shape), jax.devices()[0].device_kind)

    # A new run's folder appears when its model and its data are known to be sound; what goes on
    # needs its folder first. All wait for all here, as indexing may take one of them far longer.
    opened = open_run(config, init, {}, 0) if new else None
    runtime.meet("opened")
    with (
        lock.held(workdir, active=chief),
        Checkpoints(workdir, config.train.keep) as checkpoints,
        peers.leaving(USER_ERRORS),  # before a save in progress waits for all processes
    ):
        # What this run was before, if it was: the newest checkpoint that is whole. Then its workdir
        # is all it needs.
        begun = checkpoints.latest_step()
        start = checkpoints.intact() or 0
        if begun and not start:
            logger.warning("no checkpoint of this run is whole: it begins again at step 0")
        meta = checkpoints.meta(start) if start else {}
        if start or not opened:
            opened = open_run(config, init, meta, start)
        origin, model, config, inputs = opened
        original = to_dict(inputs.config)

        # Weights and optimizer, each number where it belongs from the start: no device, and no
        # host, ever holds all of them.
        initial = lora.extend(functools.partial(vla.initial_params, model), config.lora)
        optimizer = make_optimizer(config.optim, config.train.steps)
        ema = config.optim.ema_decay > 0
        template = state.abstract(initial, lora.train_rules(config), optimizer, mesh, ema=ema)
        if start:
            train_state, position = checkpoints.restore(template, start)
            check_texts(inputs.texts, position)
            logger.info("resumed at step %d", start)
        else:
            place = functools.partial(state.place, template)
            loaded = origin.load(lora.without(state.shapes(template)), place)
            train_state, position = (
                state.create(initial, optimizer, template, config.seed, loaded),
                0,
            )
            meta = {**inputs.meta(), "origin": origin.origin()}
        logger.info("parameters: %s", state.summary(template))
        if config.lora.rank:
            count = lora.count(template.trainable)
            logger.info("LoRA: %d numbers of rank %d", count, config.lora.rank)

        # The two programs of a run. They are compiled by their first call.
        names = inputs.train.names
        train_step = make_train_step(model, config, mesh, template, names)
        chunk, sets = config.model.structure.chunk, inputs.train.datasets
        means, middles = zip(*((s.mean_action(chunk), s.gripper_middle) for s in sets), strict=True)
        baseline = evaluate.mean_actions(means, middles, config.model.has_gripper)
        eval_step = evaluate.make_eval_step(model, config, mesh, template, baseline)

        c = config.train
        with log.RunLog(workdir, start, c.tensorboard, c.wandb, original, active=chief) as rows:
            clock.add("lost", rows.lost_seconds)
            run = Run(
                config=config,
                workdir=workdir,
                model=model,
                mesh=mesh,
                inputs=inputs,
                template=template,
                # A collective gives up long before a slower process has compiled.
                train_step=runtime.together(train_step, "train"),
                eval_step=runtime.together(eval_step, "eval"),
                saver=Saver(checkpoints, {**meta, "config": original}),
                rows=rows,
                stop=stop,
                peers=peers,
                clock=clock,
            )
            done, train_state = run_steps(run, train_state, start, position)
            result = (
                # A run that was told to stop has no time for an evaluation.
                evaluated(run, train_state, done) if done == c.steps and not stop.received else {}
            )
        if not result:
            logger.warning("stopped at step %d; the same command goes on from there", done)
        if chief:
            clock.report(workdir, start, done)
            if result:
                print(evaluate.report(result, workdir))


def run_steps(
    run: Run, train_state: TrainState, start: int, position: Any
) -> tuple[int, TrainState]:
    """Optimizer steps up to the last one, or until the run is told to stop.

    Args:
        run: see `Run`.
        train_state: the state after `start` steps; its buffers are given up.
        start: steps done.
        position: where the data goes on.

    Returns:
        Steps done, all saved, and the state after them.
    """
    c, clock = run.config.train, run.clock
    bar = progress.bar(total=c.steps, initial=start, unit="step", disable=jax.process_index() != 0)
    meter = Meter(start, c.batch_size, list(run.mesh.devices.flat))
    pending, in_flight = log.Pending(run.rows, meter, bar), meshes.InFlight(run.mesh)
    skipped, compilations = (
        SkippedSteps(c.max_skipped, c.batch_size, run.rows.write),
        Recompilations(),
    )
    profile = Profile(c.profile, run.workdir / "profile")
    broken: Exception | None = None  # what keeps this process from giving its rows of a batch
    host_batch, culprit = None, None
    clock.started()
    with (
        bar,
        profile,
        run.inputs.batches(position) as batches,
        run.inputs.captions(start) as captions,
    ):
        for done in range(start + 1, c.steps + 1):
            run.peers.at(done)
            # What is wrong with the data must not cost the steps that are done. Saving takes all
            # processes: of several this one gives rows without supervision until they have agreed.
            began = time.perf_counter()
            try:
                if broken is None:
                    texts = next(captions)
                    host_batch = with_captions(next(batches), texts)
            except Exception as error:
                if run.peers.count == 1 or host_batch is None:
                    save_before_error(run, done - 1, start, train_state, batches)
                    raise
                logger.warning("an error in the data of this process; saving, then exiting")
                broken, host_batch = error, without_supervision(host_batch)
                run.stop.ask()
            meter.waited(time.perf_counter() - began)
            clock.add("data", time.perf_counter() - began)

            batch = meshes.shard_batch(host_batch, run.mesh)
            began = time.perf_counter()
            profile.before(done)
            with compilations.step(done, done - start):
                train_state, metrics = run.train_step(train_state, batch)
            profile.after(done, metrics)
            if done == start + 1:
                # A call returns before its step is done, so this one must be waited for.
                jax.block_until_ready(metrics)
                clock.add("compile", time.perf_counter() - began)
                logger.info("compiled, first step done: %.0f s", time.perf_counter() - began)
                # Neither compiling nor this count is part of a step's speed, hence the pause.
                if jax.process_index() == 0:  # which alone writes the log
                    flops.expect(meter, run.model, run.config, run.template, batch, run.mesh)
                heap.trim()
                meter.pause(done)

            # The host runs a step or two ahead of the devices, so it looks at numbers late.
            following = batches.state()["samples"]
            for step, values, sample in in_flight.add((done, metrics, following)):
                skipped.add(step, values, sample)
            pending.flush()
            if due(done, c.log_every, c.steps):
                pending.put(done, metrics)
            bar.update()

            # Asked at every step: the processes agree on a point by counting these questions.
            leave, where = run.stop.asked(), run.inputs.position(batches)
            if leave:
                # A process that lacked data has not come as far; nothing of it must be left out.
                where["samples"], culprit = runtime.agree(where["samples"], broken is not None)
            if leave or due(done, c.save_every, c.steps):
                # A state is saved only when all steps that led to it are known to be finite.
                for step, values, sample in in_flight.drain():
                    skipped.add(step, values, sample)
                pending.flush()
                with clock.spent("checkpoint"):
                    run.saver.save(done, train_state, where)
                heap.trim()
                meter.pause(done)
            else:
                # A save in the background may have failed, and here is a state to save instead.
                run.saver.check(done, train_state, where)
            # A peer that ends says from which step the run will go on.
            run.peers.saved(run.saver.last)
            if not leave and done < c.steps and due(done, c.eval_every, c.steps):
                pending.flush()
                # An evaluation that was cut short is the sign to leave.
                try:
                    leave = not evaluated(run, train_state, done)
                except DataError:
                    save_before_error(run, done, start, train_state, batches)
                    raise
                heap.trim()
                meter.pause(done)
            if leave or done == c.steps:
                pending.flush()
                with clock.spent("checkpoint"):
                    run.saver.finish(done, train_state, where)
                if broken is not None:
                    raise broken
                if culprit is not None:
                    raise DataError(f"process {culprit} lacks data and ends; step {done} is saved")
                return done, train_state
    return start, train_state  # there was nothing left to do


def due(done: int, interval: int, last: int) -> bool:
    """Whether something that is done every so many steps, and at the last one, is done now."""
    return done == last or (interval > 0 and done % interval == 0)


def evaluated(run: Run, train_state: TrainState, done: int) -> dict[str, Any]:
    """Evaluate on held-out windows and log the result; {} if the run was told to stop."""
    with run.clock.spent("evaluation"), run.inputs.held_out_batches() as batches:
        names = run.inputs.train.names
        result = evaluate.evaluate(
            run.eval_step, train_state, batches, run.mesh, names, run.stop.asked
        )
    if result:
        run.rows.write(done, "eval", result)
    return result


def save_before_error(
    run: Run, done: int, start: int, train_state: TrainState, batches: Any
) -> None:
    """Save the steps of this process before an error in the data ends it.

    One process of several cannot: saving takes all of them, and the others have not seen the error.
    """
    if done > start and run.peers.count == 1:
        run.saver.finish(done, train_state, run.inputs.position(batches))
        logger.warning("an error in the data; step %d is saved", done)


def main(_: Any) -> None:
    """Resolve the config, join the other processes, train; a user's mistake shows no traceback."""
    try:
        raw, workdir = cli.required(CONFIG.value), Path(WORKDIR.value or "").expanduser()
        # `refuse` goes on only with a config that has been resolved.
        config, problems = Config(), refusal.Problems(ConfigError, lock.WorkdirError)
        with problems.part():
            config = resolve(raw)
        with problems.part():
            if not WORKDIR.value:
                raise ConfigError(
                    "--workdir: name the folder of the run, a new one or one to go on in"
                )
            lock.check(workdir)
        problems.refuse()
        heap.limit()
        keep = config.train.keep_heap and heap.keep()
        runtime.initialize()
        logger.info("memory that a step frees is %s", "kept for the next" if keep else "given back")
        compilation_cache.enable(config.train.compilation_cache)
        peers = Peers()

        def run() -> None:
            train(raw, workdir, INIT.value, peers)

        runtime.run(run, peers, () if DEBUG.value else USER_ERRORS)
    except USER_ERRORS as error:
        sys.exit(refusal.tell(error, DEBUG.value))


if __name__ == "__main__":
    cli.run_with_flags(main)
