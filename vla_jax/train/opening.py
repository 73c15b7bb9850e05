"""What a run needs beside its devices and its folder: a model, and data that fit it."""

import logging
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from vla_jax import refusal
from vla_jax.config import Config, ConfigError, resolve, to_dict
from vla_jax.convert.start import Start
from vla_jax.data.errors import DataError
from vla_jax.data.robot import resolve_with_data
from vla_jax.inference.policy import with_complete_arch
from vla_jax.models import legality, vla
from vla_jax.train import mesh as meshes
from vla_jax.train import resume
from vla_jax.train.checkpoint_folder import CheckpointError
from vla_jax.train.epochs import with_steps
from vla_jax.train.inputs import Inputs, open_inputs

logger = logging.getLogger(__name__)


def completed(raw: Any, init: str | None, new: bool) -> tuple[Config, Mesh]:
    """The config as its datasets complete it and the mesh of the devices, before much is read.

    Args:
        raw: the config as its file and the flags have it.
        init: checkpoint whose weights a new run starts from; None = `model.backbone.hf_dir`.
        new: whether it is a new run, which needs these weights.

    Raises:
        ConfigError, CheckpointError, FlagError: naming all that is wrong with the mesh, with where
            the weights come from and with what the datasets say of their robots.
    """
    config = complete = resolve(raw)
    problems, mesh = refusal.Problems(ConfigError, DataError, CheckpointError, OSError), None
    with problems.part():
        mesh = meshes.make_mesh(config.mesh)
        # A batch that the devices cannot share is refused before anything is loaded.
        c, cotrain = config.train, config.data.cotrain
        meshes.check_batch(c.batch_size, mesh, c.accumulate)
        if cotrain.path:
            meshes.check_batch(cotrain.rows, mesh, c.accumulate, "data.cotrain.rows")
    with problems.part():
        if new:
            start_of(config, init, {})
    with problems.part():
        complete = resolve_with_data(raw)
    problems.refuse()
    assert mesh is not None
    return complete, mesh


def start_of(config: Config, init: str | None, meta: Mapping[str, Any]) -> Start:
    """Where the weights come from.

    Raises:
        ConfigError, CheckpointError: there are none, or of another model.
    """
    try:
        return Start(config.model, init, meta)
    except CheckpointError as error:
        raise CheckpointError(f"--init: {error}") from error


def open_run(
    config: Config, init: str | None, meta: Mapping[str, Any], start: int
) -> tuple[Start, Any, Config, Inputs]:
    """The model and the data of a run, opened before there is a folder of it.

    Args:
        config: of the run, as the config file and the flags have it.
        init: checkpoint whose weights a new run starts from; None = `model.backbone.hf_dir`.
        meta: of the checkpoint that the run goes on from; {} for a new one.
        start: its step.

    Returns:
        What the weights come from, the model, the complete config, the data.

    Raises:
        ConfigError, DataError, CheckpointError: whatever is wrong with them.
    """
    origin = start_of(config, init, meta)
    model = vla.build(config.model, origin.arch())
    for warning in legality.warnings(config.model):
        logger.warning(warning)
    # Checkpoints must do without the pretrained folder that the sizes came from.
    config = with_complete_arch(config, model.arch)
    config = resume.as_begun(config, meta["config"]) if start else config
    for change in resume.check_resume(meta["config"], to_dict(config)) if start else ():
        logger.warning("changed since step %d: %s", start, change)

    # Epochs become steps now that it is known how many windows there are; checkpoints keep the
    # config as it was given, so that a resumed run counts anew.
    inputs = open_inputs(config, model, origin, meta)
    # Now that the words have their ids, a model that writes its actions knows what to write.
    model = vla.build(inputs.config.model, model.arch)
    config = with_steps(inputs.config, inputs.train.num_windows)
    windows = inputs.train.num_windows, inputs.held_out.num_windows
    logger.info("windows: %d to train on, %d held out", *windows)
    return origin, model, config, inputs
