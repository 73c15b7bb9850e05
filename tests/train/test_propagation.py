"""Every device its share of the batch: what the compiler's propagation makes of the real steps."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import kosmos_ph
from configs.tiny import ARCHS
from tests.train import programs
from vla_jax.config import MeshConfig, resolve
from vla_jax.models import legality, sharding
from vla_jax.models.structures import STRUCTURES
from vla_jax.train.mesh import make_mesh
from vla_jax.train.propagation import Carry, loop_carries, propagated, unsplit_carries

# Over eight devices; 11 divides no width of a model, so that nothing else passes for rows.
ROWS = 8 * 11
CELLS = [
    cell
    for cell in itertools.product(ARCHS, STRUCTURES)
    if not legality.refusal(*cell, programs.HEADS[cell[1]])
]
# One cell for each kind of loop: decoder and LSTM, windows of a tower, taps of another, ResNet and
# encoder-decoder, perceiver and cross-attention, the denoiser, GPT-2. Kosmos-2 with the LSTM is the
# full-size model below.
QUICK = [
    ("qwen2_5_vl", "interleaved"),
    ("qwen3_vl", "video"),
    ("ofa", "one_step"),
    ("flamingo", "policy_head"),
    ("llava", "discrete"),
    ("prismatic", "parallel"),
]
MESHES = {"fsdp": {"mesh.fsdp": -1}, "all": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}}


def unsplit(config: Any, rows: int = ROWS, **how: Any) -> list[Carry]:
    result = unsplit_carries(propagated(programs.lower(config, rows, **how)), ROWS)
    s = config.model.structure
    # The heads' noise: `jax.random.normal` ends in an inverse error function, through which the
    # compiler hands no sharding back. It is a few numbers a window.
    noise = ("ui32", (s.chunk,))  # by actions as wide as the head draws them
    return [carry for carry in result if (carry.dtype, carry.shape[-2:-1]) != noise]


@pytest.mark.parametrize("cell", QUICK, ids="-".join)
def test_the_batch_stays_split_in_every_kind_of_loop(cell):
    assert unsplit(programs.config(*cell)) == []


def test_the_batch_stays_split_where_words_are_written():
    assert unsplit(programs.config("paligemma", "discrete", "fast")) == []
    changes = {"model.expert.fast_weight": 1.0, "model.expert.insulate": True}
    assert unsplit(programs.config("paligemma", "expert", **changes)) == []


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_the_batch_stays_split_in_every_model(cell, mesh):
    assert unsplit(programs.config(*cell, **MESHES[mesh])) == []


def test_the_full_size_model_keeps_the_batch_split():
    raw = kosmos_ph.get_config("data")
    assert unsplit(resolve(raw)) == []


def test_evaluation_keeps_the_batch_split():
    assert unsplit(programs.config("kosmos2", "interleaved"), kind="eval") == []


def test_captions_are_split_too():
    assert unsplit(programs.config("paligemma", "one_step"), captions=ROWS) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "changes"),
    [
        ("kosmos2", {"model.remat": "none"}),
        ("paligemma2", {"model.remat": "dots"}),
        ("kosmos2", {"model.structure.resampler": 3}),
        ("kosmos2", {"model.structure.readout": "all", "model.head.down_sample": "resampler"}),
        ("kosmos2", {"mesh.data": -1, "mesh.fsdp": 1}),
        ("kosmos2", {"mesh.data": 2, "mesh.fsdp": 4}),
        ("kosmos2", {"mesh.fsdp": 2, "mesh.tensor": 4}),
        (
            "moondream",
            {"model.backbone.arch.vision_config": {"streams": 2, "image_size": 28}},
        ),
    ],
)
def test_whatever_is_chosen_beside_the_model(backbone: str, changes: dict[str, Any]):
    assert unsplit(programs.config(backbone, "policy_head", **changes)) == []


@pytest.mark.slow
def test_each_part_of_an_accumulated_batch_is_split():
    changes: dict[str, Any] = {"train.accumulate": 4}
    config = programs.config("kosmos2", "policy_head", **changes)
    assert unsplit(config, 4 * ROWS) == []


def test_without_the_pins_a_loop_holds_all_rows(monkeypatch):
    monkeypatch.setattr(sharding, "rows", lambda x, count=None: x)
    result = unsplit(programs.config("kosmos2", "interleaved"))
    assert {(carry.shape[0], carry.axes) for carry in result} >= {(ROWS, ((), (), ("fsdp",)))}


def lowered(mesh: Any, rows: int, at: P) -> Any:
    """Three layers over a batch that is moved to `at` before them."""

    def layers(x: Any, kernels: Any) -> Any:
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, at))

        def layer(x: Any, kernel: Any) -> tuple[Any, Any]:
            x = jnp.tanh(x @ kernel)
            return x, x

        x, retained = jax.lax.scan(layer, x, kernels)
        return x.sum() + retained.sum()

    def struct(spec: P, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    x, kernels = struct(P(("data", "fsdp")), rows, 48), struct(P(None, "fsdp", "tensor"), 3, 48, 48)
    return jax.jit(layers).trace(x, kernels).lower()


def test_what_a_loop_carries_is_told_with_where_it_lies():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    program = lowered(mesh, 24, P(("data", "fsdp")))
    before = str(program.compiler_ir("stablehlo"))
    module = propagated(program)
    carries = {carry.shape: carry for carry in loop_carries(module)}
    assert carries[24, 48].axes == (("data", "fsdp"), ("tensor",))
    assert str(carries[24, 48]) == "f32[24, 48] lies as [{data, fsdp}, {tensor}] (in 1 loops)"
    assert carries[3, 24, 48].axes[1] == ("data", "fsdp")
    assert str(program.compiler_ir("stablehlo")) == before
    assert unsplit_carries(module, 24) == []


def test_rows_that_are_whole_or_split_too_little_are_found_and_parameters_are_not():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    for at in (P(), P("data"), P(None, "fsdp")):
        shapes = {carry.shape for carry in unsplit_carries(propagated(lowered(mesh, 24, at)), 24)}
        assert shapes == {(24, 48), (3, 24, 48)}
    single = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    assert unsplit_carries(propagated(lowered(single, 24, P())), 24) == []
