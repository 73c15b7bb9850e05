"""The readers of compiled programs, on small ones compiled here and on lines of real ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vla_jax.plan import compiled, hlo, hlo_bytes, hlo_flops, hlo_wire
from vla_jax.train.chips import CHIPS

ROWS, WIDTH, LAYERS = 64, 32, 5

GPU = """\
HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[8,16], bf16[32,64])) -> (s32[], f32[8,16], bf16[32,64]) {
  %p = (s32[], f32[8,16]{1,0}, bf16[32,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[16,32]{1,0} get-tuple-element(%p), index=1
  %w = bf16[32,64]{1,0} get-tuple-element(%p), index=2
  %all-gather-start.1 = (bf16[4,64]{1,0}, bf16[32,64]{1,0}) all-gather-start(%w0), channel_id=6, \
replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}, \
metadata={op_name="jit(step)/jvp(VLA.loss)/backbone/text/text._scan/while/body/layers/attn/o/dot"},\
 backend_config={"collective_backend_config":{"is_sync":false}}
  %w0 = bf16[4,64]{1,0} slice(%w), slice={[0:4], [0:64]}
  %custom-call.1 = (bf16[16,64]{1,0}, s8[4194304]{0}) custom-call(%x, %w), \
custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(step)/jvp(VLA.loss)/backbone/text.run/layers/attn/q/dot_general"}, \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %t = (s32[], f32[8,16]{1,0}, bf16[32,64]{1,0}) tuple(%i, %x, %w)
}

%cond (p.1: (s32[], f32[8,16], bf16[32,64])) -> pred[] {
  %p.1 = (s32[], f32[8,16]{1,0}, bf16[32,64]{1,0}) parameter(0)
  %n = s32[] constant(24)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (a: (s32[], f32[8,16], bf16[32,64])) -> (s32[], f32[8,16], bf16[32,64]) {
  %a = (s32[], f32[8,16]{1,0}, bf16[32,64]{1,0}) parameter(0)
  %q = bf16[4,257,16,64]{3,2,1,0} parameter(1)
  %k = bf16[4,161,16,64]{3,2,1,0} parameter(2)
  %attend = (bf16[4,257,16,64]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaSoftmax", \
metadata={op_name="jit(step)/jvp(VLA.loss)/backbone/vision/layers/attn/fused"}
  %all-reduce = f32[1000]{0} all-reduce(%g), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, \
to_apply=%cond
  %g = f32[1000]{0} constant({...})
  ROOT %while = (s32[], f32[8,16]{1,0}, bf16[32,64]{1,0}) while(%a), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"24"}}
}
"""

TPU = """\
HloModule jit_step, is_scheduled=true

%async (param: bf16[128,256]) -> (bf16[128,256], bf16[512,256], s32[2]) {
  %param = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.4 = bf16[512,256]{1,0:T(8,128)(2,1)} all-gather(%param), channel_id=212, \
replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}
  ROOT %start = (bf16[128,256]{1,0:T(8,128)(2,1)S(1)}, bf16[512,256]{1,0:T(8,128)(2,1)S(1)}, \
s32[2]{0:S(4)}) custom-call(%all-gather.4), custom_call_target="AsyncCollectiveStart"
}

%all-reduce-scatter.2 (input: f32[32,24,64]) -> f32[8,24,64] {
  %input = f32[32,24,64]{2,1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[32,24,64]{2,1,0:T(8,128)} all-reduce(%input), channel_id=3, \
replica_groups=[1,4]<=[4], to_apply=%add
  %index = s32[] constant(0)
  ROOT %part = f32[8,24,64]{2,1,0:T(8,128)} dynamic-slice(%all-reduce.9, %index, %index, %index), \
dynamic_slice_sizes={8,24,64}
}

ENTRY %main (w: bf16[128,256], x: f32[32,24,64]) -> f32[8,24,64] {
  %w = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %x = f32[32,24,64]{2,1,0:T(8,128)} parameter(1)
  %fusion.1 = (bf16[128,256]{1,0}, bf16[512,256]{1,0}, s32[2]{0:S(4)}) fusion(%w), kind=kCustom, \
calls=%async
  %fusion.2 = (bf16[128,256]{1,0}, bf16[512,256]{1,0}, s32[2]{0:S(4)}) fusion(%w), kind=kCustom, \
calls=%async
  ROOT %fusion.3 = f32[8,24,64]{2,1,0:T(8,128)} fusion(%x), kind=kCustom, \
calls=%all-reduce-scatter.2
}
"""


def test_sizes_in_memory():
    assert hlo.plain_bytes("(f32[3,5]{1,0}, /*index=1*/bf16[7]{0}, token[])") == 60 + 14
    # 257 x 64 in tiles of 8 x 128, the last dimension of the layout's order first.
    assert hlo.memory_bytes("bf16[2,257,64]{2,1,0:T(8,128)(2,1)}") == 2 * 264 * 128 * 2
    assert hlo.memory_bytes("bf16[2,64,257]{1,2,0:T(8,128)(2,1)}") == 2 * 264 * 128 * 2
    assert hlo.memory_bytes("f32[1024,1024]{1,0:T(8,128)S(1)}") == 0


def test_a_gpu_program():
    work = compiled.read(GPU, {"data": 1, "fsdp": 8, "tensor": 1}, [0] * 8)
    product, attention = 24 * 2 * 16 * 64 * 32, 2 * 2 * (4 * 257 * 16 * 64) * 161
    assert work.flops == product + attention
    gather, reduce = work.exchanges if work.exchanges[0].loops else work.exchanges[::-1]
    assert (gather.kind, gather.axes, gather.group) == ("all-gather", ("fsdp",), 8)
    assert (gather.executions, gather.loops, gather.overlapped) == (24, (24,), True)
    assert gather.wire_bytes == 24 * 32 * 64 * 2 * 7 / 8
    assert (reduce.executions, reduce.overlapped) == (1, False)
    assert reduce.wire_bytes == 2 * 4000 * 7 / 8
    assert work.wire_bytes == gather.wire_bytes + reduce.wire_bytes
    # The workspace of the product is not moved.
    assert work.classes["text: projections"] == 24 * 2 * (16 * 32 + 32 * 64 + 16 * 64)
    assert work.classes["vision: attention"] == 2 * 64 * 16 * 4 * (2 * 257 + 2 * 161)
    assert sum(work.classes.values()) == work.hbm_bytes
    # The attention's inputs; what the loop is handed is read inside of it.
    assert work.given_bytes == 2 * 64 * 16 * 4 * (257 + 2 * 161)


def test_a_tpu_program():
    program = hlo.parse(TPU)
    result = hlo_wire.collectives(program, {"data": 1, "fsdp": 4, "tensor": 1}, [0, 0, 1, 1])
    gather, scatter = sorted(result, key=lambda each: each.kind)
    # Drawn through two fusions, it is one exchange.
    assert (gather.kind, gather.executions, gather.overlapped) == ("all-gather", 1, True)
    assert gather.wire_bytes == 512 * 256 * 2 * 3 / 4
    assert (scatter.kind, scatter.overlapped) == ("reduce-scatter", False)
    assert scatter.wire_bytes == 32 * 24 * 64 * 4 * 3 / 4
    assert scatter.domains == 2
    chip = CHIPS["v5e"]
    assert compiled.speed(scatter, chip) == 2 * chip.network  # two devices of each slice send


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [0, 4]),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", [0, 1, 2, 3]),
        ("source_target_pairs={{3,1},{1,3}}", [3, 1]),
        ("replica_groups={}", list(range(8))),
    ],
)
def test_groups(text, group):
    assert hlo_wire.first_group(text, 8) == group


def test_products_that_a_tpu_writes_as_convolutions():
    """[4, 6] @ [6, 10] over a window that meets one input a place; and a real convolution."""
    text = """\
ENTRY %main (x: f32[4,6], w: f32[6,10]) -> f32[4,10] {
  %x = f32[4,6]{1,0} parameter(0)
  %w = f32[6,10]{1,0} parameter(1)
  %image = f32[2,8,8,3]{3,2,1,0} parameter(2)
  %kernel = f32[3,3,3,7]{3,2,1,0} parameter(3)
  %conv = f32[2,4,4,7]{3,2,1,0} convolution(%image, %kernel), \
window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_01io->b01f
  ROOT %dot = f32[4,10]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
}
"""
    program = hlo.parse(text)
    main = program.get("main")
    assert hlo_flops.flops(main["dot"], main, program) == 2 * 4 * 6 * 10
    # The last place of each side has one of its three inputs in the padding.
    places = 3 * 3 + 2
    assert hlo_flops.flops(main["conv"], main, program) == 2 * places * places * 2 * 3 * 7


AROUND = """\
HloModule jit_step, is_scheduled=true

%body (p: (bf16[8,4], u32[])) -> (bf16[8,4], u32[]) {
  %p = (bf16[8,4]{1,0}, u32[]{:T(128)}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %x = bf16[8,4]{1,0} get-tuple-element(%p), index=0
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %t = (bf16[8,4]{1,0}, u32[]{:T(128)}) tuple(%x, %next)
}

%cond (q: (bf16[8,4], u32[])) -> pred[] {
  %bound = u32[]{:T(128)} constant(9)
  %q = (bf16[8,4]{1,0}, u32[]{:T(128)}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%q), index=1
  ROOT %less = pred[]{:T(512)} compare(%j, %bound), direction=LT
}

ENTRY %main (a: (bf16[8,4], u32[])) -> (bf16[8,4], u32[]) {
  %a = (bf16[8,4]{1,0}, u32[]{:T(128)}) parameter(0)
  ROOT %while.1 = (bf16[8,4]{1,0}, u32[]{:T(128)}) while(%a), condition=%cond, body=%body
}
"""


def test_loops_that_pass_parts_around_take_several_in_a_turn():
    program = hlo.parse(AROUND)
    assert program.trips(program.get("main")["while.1"]) == 5
    single = hlo.parse(AROUND.replace("add(%i, %two)", "add(%i, %i)"))
    # A counter of a kind that is not known is taken to count one by one.
    assert single.trips(single.get("main")["while.1"]) == 9


def test_attention_kernels_of_a_tpu():
    text = """\
ENTRY %main (q: bf16[4,16,640,64], k: bf16[4,16,640,64]) -> bf16[4,16,640,64] {
  %blocks = s32[1,2,2]{2,1,0} constant({...})
  %q = bf16[4,16,640,64]{3,2,1,0} parameter(0)
  %k = bf16[4,16,640,64]{3,2,1,0} parameter(1)
  %splash_mha_dkv_segmented.1 = (bf16[4,16,640,64]{3,2,1,0}, bf16[4,16,640,64]{3,2,1,0}) \
custom-call(%blocks, %q, %k, %k), custom_call_target="tpu_custom_call"
  %other = bf16[4]{0} custom-call(%q), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"123","bytes_accessed":"9"}}}
  ROOT %splash_mha_fwd_segmented_residuals.1 = bf16[4,16,640,64]{3,2,1,0} \
custom-call(%blocks, %q, %k, %k), custom_call_target="tpu_custom_call"
}
"""
    program = hlo.parse(text)
    main = program.get("main")
    results = {name.partition(".")[0]: hlo_flops.flops(main[name], main, program) for name in main}
    product = 2 * 4 * 16 * 640 * 640 * 64
    assert results["splash_mha_fwd_segmented_residuals"] == 2 * product
    assert results["splash_mha_dkv_segmented"] == 4 * product
    assert results["other"] == 123


def test_our_own_attention_kernels_of_a_gpu():
    text = """\
ENTRY %main (q: bf16[4,640,16,64], k: bf16[4,320,8,64]) -> bf16[4,640,16,64] {
  %q = bf16[4,640,16,64]{3,2,1,0} parameter(0)
  %k = bf16[4,320,8,64]{3,2,1,0} parameter(1)
  %pallas_call.3 = (bf16[4,320,8,64]{3,2,1,0}, bf16[4,320,8,64]{3,2,1,0}) \
custom-call(%q, %k, %k, %q), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(step)/transpose(jvp(dropping_key_kernel))/pallas_call"}, \
backend_config={debug = false, ir = "ML\\EFR{", name = "dropping_key_kernel", num_warps = 4 : i32}
  %pallas_call.2 = bf16[4,640,16,64]{3,2,1,0} custom-call(%q, %k, %k, %q), \
custom_call_target="__gpu$xla.gpu.triton", backend_config={name = "dropping_query_kernel"}
  ROOT %pallas_call.1 = (bf16[4,640,16,64]{3,2,1,0}, f32[4,16,640]{2,1,0}) \
custom-call(%q, %k, %k), custom_call_target="__gpu$xla.gpu.triton", \
backend_config={name = "dropping_forward_kernel"}
}
"""
    program = hlo.parse(text)
    main = program.get("main")
    counts = {name: hlo_flops.flops(main[name], main, program) for name in main}
    product = 2 * 4 * 16 * 640 * 320 * 64
    expected = {"1": 2 * product, "2": 3 * product, "3": 4 * product}
    assert {name[-1]: n for name, n in counts.items() if n} == expected
    wide, narrow = 2 * 4 * 640 * 16 * 64, 2 * 4 * 320 * 8 * 64
    moved = hlo_bytes.moved(main["pallas_call.1"], main, program)
    assert moved == 2 * wide + 2 * narrow + 4 * 4 * 16 * 640  # the scores are nowhere


def test_updates_in_place_count_as_their_part():
    text = """\
%update (whole: f32[24,1000], part: f32[1,1000], i: s32[]) -> f32[24,1000] {
  %whole = f32[24,1000]{1,0} parameter(0)
  %part = f32[1,1000]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %out = f32[24,1000]{1,0} dynamic-update-slice(%whole, %part, %i, %i)
}

ENTRY %main (a: f32[24,1000], b: f32[1,1000], c: s32[]) -> f32[24,1000] {
  %a = f32[24,1000]{1,0} parameter(0)
  %b = f32[1,1000]{1,0} parameter(1)
  %c = s32[] parameter(2)
  ROOT %fusion = f32[24,1000]{1,0} fusion(%a, %b, %c), kind=kLoop, calls=%update
}
"""
    program = hlo.parse(text)
    main = program.get("main")
    assert hlo_bytes.moved(main["fusion"], main, program) == 4000 + 4 + 2 * 4000


def test_what_a_step_reads_of_its_arguments():
    """The kernel twice, of the table the rows that are looked up, and nothing of what was made."""
    text = """\
HloModule jit_step, is_scheduled=true

%looked_up (table: bf16[1000,64], at: s32[2,1]) -> bf16[2,64] {
  %table = bf16[1000,64]{1,0} parameter(0)
  %at = s32[2,1]{1,0} parameter(1)
  ROOT %gather = bf16[2,64]{1,0} gather(%table, %at), offset_dims={1}, slice_sizes={1,64}
}

%product (x: bf16[2,64], kernel: s8[64,32]) -> bf16[2,32] {
  %x = bf16[2,64]{1,0} parameter(0)
  %kernel = s8[64,32]{1,0} parameter(1)
  %wide = bf16[64,32]{1,0} convert(%kernel)
  ROOT %dot = bf16[2,32]{1,0} dot(%x, %wide), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (table: bf16[1000,64], at: s32[2,1], kernel: s8[64,4,8]) -> (bf16[2,32], bf16[2,32]) {
  %table.1 = bf16[1000,64]{1,0} parameter(0)
  %at.1 = s32[2,1]{1,0} parameter(1)
  %kernel.1 = s8[64,4,8]{2,1,0} parameter(2)
  %flat = s8[64,32]{1,0} bitcast(%kernel.1)
  %rows = bf16[2,64]{1,0} fusion(%table.1, %at.1), kind=kLoop, calls=%looked_up
  %a = bf16[2,32]{1,0} fusion(%rows, %flat), kind=kCustom, calls=%product
  %b = bf16[2,32]{1,0} fusion(%rows, %flat), kind=kCustom, calls=%product
  ROOT %both = (bf16[2,32]{1,0}, bf16[2,32]{1,0}) tuple(%a, %b)
}
"""
    work = compiled.read(text, {"device": 1}, [0])
    assert work.given_bytes == 2 * 64 * 32 + 2 * 64 * 2 + 2 * 4
    assert work.hbm_bytes == work.given_bytes + 2 * 64 * 2 * 3 + 2 * 2 * 32 * 2


def test_a_slice_of_a_stack_that_is_tiled_anew_counts_as_the_slice():
    """A copy within a fusion makes the part that is taken of it, and no more."""
    text = """\
HloModule jit_step, is_scheduled=true

%tiled (stack: s8[24,64,32]) -> s8[24,64,32] {
  %stack = s8[24,64,32]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %copy = s8[24,64,32]{2,1,0:T(8,128)(4,1)} copy(%stack)
}

%layer (stack.1: s8[24,64,32], i: s32[]) -> s8[1,64,32] {
  %stack.1 = s8[24,64,32]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %again = s8[24,64,32]{2,1,0:T(8,128)(4,1)} fusion(%stack.1), kind=kLoop, calls=%tiled
  ROOT %part = s8[1,64,32]{2,1,0} dynamic-slice(%again, %i, %zero, %zero), \
dynamic_slice_sizes={1,64,32}
}

ENTRY %main (stack.2: s8[24,64,32], i.1: s32[]) -> s8[1,64,32] {
  %stack.2 = s8[24,64,32]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i.1 = s32[] parameter(1)
  ROOT %kernel = s8[1,64,32]{2,1,0} fusion(%stack.2, %i.1), kind=kLoop, calls=%layer
}
"""
    work = compiled.read(text, {"device": 1}, [0])
    assert work.given_bytes == 64 * 32 + 4
    assert work.hbm_bytes == 2 * 64 * 32 + 4


def test_a_program_compiled_here():
    """Layers with split weights: products, gathers in the loop and the sum behind it."""
    mesh = Mesh(np.array(jax.devices()).reshape(1, 8, 1), ("data", "fsdp", "tensor"))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    def function(x, w):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None

        return jax.lax.scan(layer, x, w)[0].sum()

    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=split)
    program = jax.jit(function).lower(x, w).compile()
    work = compiled.read(program.as_text() or "", dict(mesh.shape), [0] * 8)
    assert work.flops == LAYERS * 2 * ROWS // 8 * WIDTH * WIDTH
    gathers = [each for each in work.exchanges if each.kind == "all-gather"]
    assert sum(each.wire_bytes for each in gathers) == LAYERS * WIDTH * WIDTH * 4 * 7 / 8
    assert {each.axes for each in work.exchanges} == {("fsdp",)}
    assert any(each.kind == "all-reduce" for each in work.exchanges)
    assert work.hbm_bytes > LAYERS * WIDTH * WIDTH * 4
    sizes = compiled.memory(program)
    assert sizes["total"] == sum(size for kind, size in sizes.items() if kind != "total")
    assert sizes["arguments"] == 4 * (ROWS * WIDTH + LAYERS * WIDTH * WIDTH) // 8


def test_times():
    chip = CHIPS["h100"]
    work = compiled.Work(chip.flops, 3 * chip.bandwidth, {}, [], 1)
    time = compiled.roofline(work, chip)
    assert (time.compute, time.hbm, time.wire, time.bound) == (1, 3, 0, "hbm")
    assert time.seconds == 3 / 0.75
    assert time.mfu(chip.flops / 3, chip) == 0.25


def test_the_batch_that_fits():
    sizes = {"arguments": 2, "results": 1, "temporaries": 8, "total": 11}
    assert compiled.largest_windows(sizes, 4.0, 19.0, gradients=0) == 8
    assert compiled.largest_windows(sizes, 4.0, 19.0, gradients=4) == 12
    assert compiled.largest_windows(sizes, 4.0, 2.0, gradients=0) == 0


def test_a_refusal_says_how_much():
    message = (
        "RESOURCE_EXHAUSTED: ... memory required for HLO temporaries (115.54G) exceeds available"
    )
    assert compiled.refused(RuntimeError(message)) == int(115.54 * 2**30)
    assert compiled.refused(RuntimeError("INTERNAL: something else")) is None
