"""Train a VLA.

    python launch/train.py --config=configs/kosmos_ph.py --workdir=runs/kosmos_ph
    python launch/train.py --config=... --workdir=... --config.train.batch_size=32
    python launch/train.py --config=... --workdir=... --init=runs/another

The workdir gets checkpoints/ (all that resuming and serving need), log.jsonl and, at the end,
eval.json. A run whose workdir holds a checkpoint goes on from it; SIGTERM saves and exits with 0.
With several processes start the same command in each, under Slurm, Open MPI or on a TPU pod, or
with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID set.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vla_jax import progress
from vla_jax.config import Config, ConfigError, resolve, to_dict
from vla_jax.convert.sentences import embed as embed_sentences
from vla_jax.convert.start import Start
from vla_jax.data.errors import DataError, TextLengthError
from vla_jax.data.language.captions import CaptionLoader, CaptionSet, check_texts
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.data.loader import Loader, open_datasets
from vla_jax.inference.policy import with_complete_arch
from vla_jax.models import legality, vla
from vla_jax.models.weights import WeightError
from vla_jax.shipped import config_names, with_config_path
from vla_jax.train import checkpoint, evaluate, log, lora, resume, runtime, state
from vla_jax.train import mesh as meshes
from vla_jax.train.epochs import with_steps
from vla_jax.train.optim import make_optimizer
from vla_jax.train.step import make_train_step

CONFIG = config_flags.DEFINE_config_file("config")
INIT = flags.DEFINE_string("init", None, "Checkpoint whose weights a new run starts from.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
USER_ERRORS = (
    ConfigError, DataError, TextLengthError, WeightError, FileNotFoundError,
    checkpoint.CheckpointError, log.LogError,
)  # fmt: skip

logger = logging.getLogger("train")


def train(config: Config, workdir: Path) -> None:
    """A whole run, or the rest of one."""
    chief = jax.process_index() == 0
    stop = runtime.StopSignal()

    # Devices.
    mesh = meshes.make_mesh(config.mesh)
    meshes.check_batch(config.train.batch_size, mesh, config.train.accumulate)
    cotrain = config.data.cotrain
    if cotrain.path:
        meshes.check_batch(cotrain.rows, mesh, config.train.accumulate, "data.cotrain.rows")
    logger.info("mesh %s of %s", dict(mesh.shape), jax.devices()[0].device_kind)

    # The model, and what this run was before, if it was: then its workdir is all it needs.
    meta = checkpoint.resumable_meta(workdir)
    origin = Start(config.model, INIT.value, meta)
    model = vla.build(config.model, origin.arch())
    for warning in legality.warnings(config.model):
        logger.warning(warning)
    config = with_complete_arch(config, model.arch)
    checkpoints = checkpoint.Checkpoints(workdir, config.train.keep)
    start = checkpoints.latest_step() or 0
    for change in resume.check_resume(meta["config"], to_dict(config)) if start else ():
        logger.warning("changed since step %d: %s", start, change)

    # Data.
    structure, side = config.model.structure, (model.image.size, model.image.size)
    opened = functools.partial(
        open_datasets, config.data, structure, config.model.action_dim, image_size=side
    )
    data = opened("train", statistics=meta.get("statistics"))
    held_out = opened("val", statistics=data.statistics)
    given, config = to_dict(config), with_steps(config, data.num_windows)
    c = config.train
    texts = CaptionSet(cotrain.path, cotrain.images) if cotrain.path else None
    logger.info("windows: %d to train on, %d held out", data.num_windows, held_out.num_windows)

    # Tokenizer.
    prompt = vla.prompt(config.model)
    prompts = [prompt.format(instruction=text.strip()) for text in data.instructions]
    if meta:
        tokenizer = Tokenizer.from_json(meta["tokenizer"])
    else:
        words = itertools.chain(prompts, texts.words(cotrain.prompt) if texts else ())
        tokenizer = origin.tokenizer() or Tokenizer.build(words, model.word_ids)

    def encode(instruction: str) -> Any:
        return tokenizer.encode(prompt.format(instruction=instruction.strip()), structure.text_len)

    share: dict[str, Any] = {
        "seed": config.seed,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "threads": config.data.threads,
        "prefetch": config.data.prefetch,
    }
    sentences, target = None, config.model.sentence
    if target.dim:
        told = (*data.instructions, *held_out.instructions)
        sentences = embed_sentences(target.dir, told, target.dim)
    load = functools.partial(
        Loader, encode=encode, batch_size=c.batch_size, sentences=sentences, **share
    )

    # Weights and state.
    init = lora.extend(functools.partial(vla.initial_params, model), config.lora)
    optimizer = make_optimizer(config.optim, config.train.steps)
    ema = config.optim.ema_decay > 0
    template = state.abstract(init, lora.train_rules(config), optimizer, mesh, ema=ema)
    if start:
        now, position = checkpoints.restore(template, start)
        check_texts(texts, position)
        logger.info("resumed at step %d", start)
    else:
        place = functools.partial(state.place, template)
        position, loaded = 0, origin.load(lora.without(state.shapes(template)), place)
        now = state.create(init, optimizer, template, config.seed, loaded)
        meta = {
            "statistics": data.statistics,
            "action_specs": {name: spec.to_json() for name, spec in data.action_specs.items()},
            "tokenizer": tokenizer.to_json(),
            "origin": origin.origin(),
        }
    meta["config"] = given
    logger.info("parameters: %s", state.summary(template))
    if config.lora.rank:
        logger.info("LoRA: %d numbers of rank %d", lora.count(template.trainable), config.lora.rank)

    # Steps.
    train_step = runtime.together(
        make_train_step(model, config, mesh, template, data.names), "train"
    )
    baseline = evaluate.mean_actions([dataset.actions for dataset in data.datasets])
    eval_step = runtime.together(
        evaluate.make_eval_step(model, config, mesh, template, baseline), "eval"
    )

    def evaluated() -> dict[str, Any]:
        # All of the split when it is small enough, else the same random sample every time.
        most = c.eval_batches
        whole = held_out.num_windows <= most * c.batch_size
        with load(held_out, shuffle=not whole, pad_last=whole) as batches:
            some = itertools.islice(batches, most)
            return evaluate.evaluate(eval_step, now, some, mesh, data.names)

    # Loop.
    talk: Any = contextlib.nullcontext(itertools.repeat(None))
    if texts:
        ends = vla.ends(config.model)
        talk = CaptionLoader(texts, tokenizer, cotrain, side, start=start, ends=ends, **share)

    def due(done: int, every: int) -> bool:
        return done == c.steps or (every > 0 and done % every == 0)

    rows = log.RunLog(workdir, start, c.tensorboard, c.wandb, meta["config"], active=chief)
    bar = progress.bar(total=c.steps, initial=start, unit="step", disable=not chief)
    with checkpoints, rows, bar, load(data, start=position) as batches, talk as captions:
        meter = log.Meter(start, c.batch_size)
        pending, in_flight = log.Pending(rows, meter, bar), meshes.InFlight(mesh)
        for done in range(start + 1, c.steps + 1):
            began = time.perf_counter()
            local = dataclasses.replace(next(batches), captions=next(captions))
            meter.waited(time.perf_counter() - began)
            now, metrics = train_step(now, meshes.shard_batch(local, mesh))
            in_flight.add(metrics)
            if done == start + 1:
                jax.block_until_ready(metrics)
                logger.info("compiled, first step done: %.0f s", time.perf_counter() - began)
                meter.pause(done)
            pending.flush()  # of the step before: its numbers are ready, this one's are not
            if due(done, c.log_every):
                pending.put(done, metrics)
            bar.update()
            leave = stop.at(done)
            if leave or due(done, c.save_every):
                pending.flush()
                position = {**batches.state(), **({"captions": texts.identity()} if texts else {})}
                checkpoints.save(done, now, position, meta)
                meter.pause(done)
            if leave:
                logger.warning("stopped at step %d; the same command goes on from there", done)
                return
            if done < c.steps and due(done, c.eval_every):
                pending.flush()
                rows.write(done, "eval", evaluated())
                meter.pause(done)
        pending.flush()
        result = evaluated()
        rows.write(c.steps, "eval", result)

    if chief:
        print(evaluate.report(result, workdir))


def main(_: Any) -> None:
    """Resolve the config, join the other processes, train; a user's mistake shows no traceback."""
    try:
        if CONFIG.value is None:
            raise ConfigError(
                "--config: name a config file of yours, or one of " + ", ".join(config_names())
            )
        config = resolve(CONFIG.value)
        runtime.initialize()
        runtime.run(lambda: train(config, Path(WORKDIR.value).expanduser()))
    except USER_ERRORS as error:
        logging.debug("traceback of the error below", exc_info=True)
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    app.run(main, argv=with_config_path(sys.argv))
