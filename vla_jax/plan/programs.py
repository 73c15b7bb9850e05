"""The product's own train step and control step, for devices that need not be here."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from vla_jax.config import Config, ConfigError
from vla_jax.convert import answers
from vla_jax.convert.start import Start
from vla_jax.inference import weights as stored_weights
from vla_jax.inference.batched_step import BatchedStep, one_session
from vla_jax.models import layers_apart, vla
from vla_jax.train import lora, state
from vla_jax.train import mesh as meshes
from vla_jax.train.augment import augment
from vla_jax.train.optim import make_optimizer
from vla_jax.train.step import make_train_step
from vla_jax.types import Actions, Batch, Captions, Observation


@dataclass(frozen=True)
class TrainProgram:
    """One optimizer step, and what goes into it.

    Attributes:
        step: jitted, (state, batch) -> (state, metrics).
        forward: (params, batch) -> the loss alone, to count what a step must compute.
        template: abstract state with its shardings.
        batch: abstract global batch with its sharding.
        mesh: of the machine.
        rows: windows of a step, over all devices.
    """

    step: Any
    forward: Callable[[Any, Batch], Any]
    template: state.TrainState
    batch: Batch
    mesh: Mesh
    rows: int

    @property
    def blocks(self) -> int:
        """Blocks that the batch's rows are split into."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]


@dataclass(frozen=True)
class ControlProgram:
    """One control step of some sessions on one device.

    Attributes:
        step: jitted.
        arguments: abstract, on that device.
        weights: bytes of the parameters.
        history: bytes of what one session remembers.
        options: of the compiler.
    """

    step: Any
    arguments: tuple[Any, ...]
    weights: int
    history: int
    options: dict[str, Any] | None


def train_program(config: Config, devices: Sequence[Any], windows: int = 0) -> TrainProgram:
    """The step that launch/train.py would compile on these devices.

    Args:
        config: of the run.
        devices: real ones, of a compiler's topology, or stand-ins.
        windows: of a row block (data x fsdp) in place of the config's batch size; 0 = the config's.

    Raises:
        ConfigError: the mesh does not fit the devices, or the batch does not fit the mesh.
    """
    mesh = meshes.make_mesh(config.mesh, devices)
    blocks = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = windows * blocks or config.train.batch_size
    _divides(rows, blocks * config.train.accumulate, "train.batch_size")
    captions = config.data.cotrain.rows if config.data.cotrain.path else 0
    # Captions go through a step in the same parts as the windows.
    _divides(captions, blocks * config.train.accumulate, "data.cotrain.rows")
    model = vla.build(config.model, Start(config.model).arch())
    init = lora.extend(functools.partial(vla.initial_params, model), config.lora)
    optimizer = make_optimizer(config.optim, config.train.steps)
    # Shapes alone: the state of a large run may fit into no memory here.
    template = state.abstract(
        init, lora.train_rules(config), optimizer, mesh, ema=config.optim.ema_decay > 0
    )
    # The program depends on how many datasets there are, not on what they are called.
    names = [str(dataset.spec) for dataset in config.data.datasets]

    def forward(params: Any, batch: Batch) -> Any:
        # Without random changes: the products of a crop are not the model's work.
        observation = augment(
            batch.observation, batch.sample, config.seed, config.augment, model.image, train=False
        )
        variables = {"params": lora.active(params, config.lora, train=False)}
        args = (observation, batch.actions, jax.random.key(0), config.optim.gripper_weight)
        return model.apply(variables, *args, method="loss")

    return TrainProgram(
        step=make_train_step(model, config, mesh, template, names),
        forward=forward,
        template=template,
        batch=_on(meshes.batch_sharding(mesh), batch_shapes(config, model.image.shape, rows)),
        mesh=mesh,
        rows=rows,
    )


def resized(program: TrainProgram, rows: int) -> TrainProgram:
    """The same step for so many windows in all; nothing is traced to get it."""

    def cut(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (x.shape[0] * rows // program.rows, *x.shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)

    # Captions have a number of rows of their own, whatever the windows are.
    captions = program.batch.captions
    windows = jax.tree.map(cut, dataclasses.replace(program.batch, captions=None))
    batch = dataclasses.replace(windows, captions=captions)
    return dataclasses.replace(program, batch=batch, rows=rows)


def _divides(rows: int, parts: int, name: str) -> None:
    # Each part of an accumulated batch is split over all blocks by itself.
    if rows % parts:
        raise ConfigError(f"{name}: {rows} is not a multiple of data x fsdp x accumulate = {parts}")


def batch_shapes(config: Config, image: tuple[int, int], rows: int) -> Batch:
    """A global batch of shape structs, as the loader gives it.

    Args:
        config: of the run.
        image: height and width of the model's image.
        rows: windows of the batch.
    """
    c, cotrain = config.model.structure, config.data.cotrain
    window = (rows, c.window)
    captions = None
    if cotrain.path:
        text = (cotrain.rows, cotrain.text_len)
        captions = Captions(
            images=_array((cotrain.rows, *image, 3), "uint8"),
            has_image=_array((cotrain.rows,), "bool"),
            text=_array(text, "int32"),
            text_mask=_array(text, "bool"),
            target=_array(text, "bool"),
        )
    sentence, written = config.model.sentence.dim, vla.written(config.model)
    return Batch(
        observation=Observation(
            images={camera: _array((*window, *image, 3), "uint8") for camera in c.cameras},
            image_mask={camera: _array(window, "bool") for camera in c.cameras},
            text=_array((rows, c.text_len), "int32"),
            text_mask=_array((rows, c.text_len), "bool"),
            proprio=_array((*window, c.proprio), "float32") if c.proprio else None,
            sentence=_array((rows, sentence), "float32") if sentence else None,
        ),
        actions=Actions(
            _array((*window, c.chunk, config.model.action_dim), "float32"),
            _array((*window, c.chunk), "bool"),
            _array((rows, written), "int32") if written else None,
        ),
        sample=_array((rows, 2), "uint32"),
        dataset=_array((rows,), "int32"),
        captions=captions,
    )


def control_program(
    config: Config, device: Any, sessions: int = 1, weights: str = "bf16"
) -> ControlProgram:
    """The step that launch/serve.py would compile on one device.

    Args:
        config: of the run.
        device: of a compiler's topology, or a stand-in.
        sessions: that are served in one pass.
        weights: form in which they are kept, see `inference.weights`.
    """
    model, c = vla.build(config.model, Start(config.model).arch()), config.model.structure
    # No tokenizer is read to plan with.
    model = vla.build(answers.stand_in(model), model.arch)
    where, mesh = SingleDeviceSharding(device), layers_apart.serving_mesh(device)
    maps = vla.linear_maps(model)

    def init(key: jax.Array) -> Any:
        # Only shapes count here: this is traced and never run.
        served = stored_weights.store(vla.initial_params(model, key), weights, jnp.bfloat16, maps)
        return served if mesh is None else layers_apart.apart(served)

    params = jax.eval_shape(init, jax.random.key(0))
    # Of one session: each goes in and out by itself, as sessions come and go.
    history = jax.eval_shape(lambda: model.empty_history(1))
    image = _array((sessions, *model.image.shape, 3), "uint8")
    text = (sessions, c.text_len)
    arguments = (
        params,
        dict.fromkeys(sorted(c.cameras), image),
        _array(text, "int32"),
        _array(text, "bool"),
        _array((sessions, c.proprio), "float32") if c.proprio else None,
        (history,) * sessions,
        _array((sessions,), "uint32"),
    )
    one = one_session(model, model.image, config.seed, mesh)
    step = functools.partial(BatchedStep.program, one)
    return ControlProgram(
        jax.jit(step),
        _on(where, arguments),
        state.nbytes(params),
        state.nbytes(history),
        layers_apart.compiler_options(mesh),
    )


def _array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype))


def _on(where: Any, tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of shape structs with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * _itemsize(x.dtype)
        for x in jax.tree.leaves(tree)
    )


def _itemsize(dtype: Any) -> int:
    # A key is two 32-bit words, but its dtype has no item size in bytes.
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def state_bytes(program: TrainProgram) -> dict[str, int]:
    """Bytes a device of what a step is given, by kind."""
    template = program.template
    return {
        "params": device_bytes(template.trainable),
        "frozen": device_bytes(template.frozen),
        "moments": device_bytes(template.opt_state),
        "average": device_bytes(template.ema),
        "batch": device_bytes(program.batch),
    }
