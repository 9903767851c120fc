"""The emulator runs MLX's own text, computes what Metal says, and tells each kind of fault with its line."""

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from metal import compiler
from metal.emulator import SCHEDULES, Emulator, Fault
from metal.inline import Inline, launch, only
from metal.source import source, translation_unit

from gemma_mlx.ops import dispatch
from gemma_mlx.ops.kernel import Launch
from gemma_mlx.ops.registry import ops

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
WHERE = "uint i = thread_position_in_grid.x;\nuint t = thread_position_in_threadgroup.x;\n"
FLOATS = mx.arange(64).astype(mx.float32)


def run(text, emulator=None, inputs=None, shape=(64,), dtype=mx.float32, grid=(64, 1, 1), group=(32, 1, 1), **more):
    inputs = {"x": FLOATS} if inputs is None else inputs
    return only(launch(emulator or Emulator(), text, inputs, {"out": (shape, dtype)}, grid, group, **more))


# kind, line (from 1) of the fault, text with it, the same text without it; the first two lines are WHERE
CASES = {
    "read past the end": ("out-of-bounds", 3, "out[i] = x[i + 1];", "out[i] = x[(i + 1) % 64];"),
    "written before the start": ("out-of-bounds", 3, "out[int(i) - 1] = 0.0f;", "out[i] = 0.0f;"),
    "far away": ("out-of-bounds", 3, "out[i] = x[i * 100000000u];", "out[i] = x[i];"),
    "threadgroup memory": (
        "out-of-bounds", 4,
        "threadgroup float s[32];\nauto p = s + 1; p[t] = x[i]; out[i] = p[t];",
        "threadgroup float s[33];\nauto p = s + 1; p[t] = x[i]; out[i] = p[t];",
    ),
    "private array": ("out-of-bounds", 4, "float a[4] = {1, 2, 3, 4};\nout[i] = a[i % 5];",
                      "float a[4] = {1, 2, 3, 4};\nout[i] = a[i % 4];"),
    "input written": ("write-to-input", 3, "((device float*)x)[i] = 1.0f; out[i] = 1.0f;", "out[i] = 1.0f;"),
    "private value": ("uninitialised", 4, "float a[4]; a[i % 4] = 1.0f;\nout[i] = a[0];",
                      "float a[4]; a[i % 4] = 1.0f;\nout[i] = a[i % 4];"),
    "threadgroup value": (
        "uninitialised", 6,
        f"threadgroup float s[32];\nif (t > 0) s[t] = x[i];\n{BARRIER}\nout[i] = s[t];",
        f"threadgroup float s[32];\ns[t] = x[i];\n{BARRIER}\nout[i] = s[t];",
    ),
    "output read": ("uninitialised", 3, "out[i] += x[i];", "out[i] = x[i];\nout[i] += x[i];"),
    "decides": ("uninitialised", 4, "int a[2]; a[i % 2] = 1;\nout[i] = x[a[0]];",
                "int a[2]; a[i % 2] = 1;\nout[i] = x[a[i % 2]];"),
    "some of an array": ("uninitialised", 5, "float a[2];\nif (x[i] > 100.0f) a[1] = 1.0f;\nout[i] = a[1];",
                         "float a[2];\nif (x[i] < 100.0f) a[1] = 1.0f;\nout[i] = a[1];"),
    "loop that may not run": ("uninitialised", 5, "float a;\nfor (uint k = 0; k < i; ++k) a = x[k];\nout[i] = a;",
                              "float a;\nfor (uint k = 0; k <= i; ++k) a = x[k];\nout[i] = a;"),
    "no barrier": (
        "race", 5, "threadgroup float s[32];\ns[t] = x[i];\nout[i] = s[31 - t];",
        "threadgroup float s[32];\ns[t] = x[i];\nthreadgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = s[31 - t];",
    ),
    "barrier of other memory": (
        "race", 6,
        "threadgroup float s[32];\ns[t] = x[i];\nthreadgroup_barrier(mem_flags::mem_device);\nout[i] = s[31 - t];",
        "threadgroup float s[32];\ns[t] = x[i];\nsimdgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = s[31 - t];",
    ),
    "device memory": (
        "race", 5,
        "out[i] = x[i];\nthreadgroup_barrier(mem_flags::mem_threadgroup);\nfloat v = out[i ^ 1];\n"
        "threadgroup_barrier(mem_flags::mem_device);\nout[i] = v;",
        "out[i] = x[i];\nthreadgroup_barrier(mem_flags::mem_device);\nfloat v = out[i ^ 1];\n"
        "threadgroup_barrier(mem_flags::mem_device);\nout[i] = v;",
    ),
    "groups": ("race-across-threadgroups", 3, "out[i % 32] = x[i];", "if (i < 32) out[i] = x[i];"),
    "barrier of some": (
        "divergent-barrier", 3, "if (t < 16) threadgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = 0.0f;",
        "if (i < 32) threadgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = 0.0f;",
    ),
    "collective of some": ("inactive-lanes", 4, "if (t == 3) return;\nout[i] = simd_sum(x[i]);",
                           "float v = simd_sum(x[i]);\nout[i] = v;"),
    "lane that does not exist": ("uninitialised", 3, "out[i] = simd_shuffle_down(x[i], 1);",
                                 "float v = simd_shuffle_down(x[i], 1); out[i] = t < 31 ? v : 0.0f;"),
    "threadgroup memory in all": ("threadgroup-memory", 3, "threadgroup float s[8193];\ns[t] = 1.0f; out[i] = s[t];",
                                  "threadgroup float s[8192];\ns[t] = 1.0f; out[i] = s[t];"),
    "address spaces": ("address-space", 4,
                       "threadgroup float s[32];\ndevice float* p = s;\np[t] = 1.0f; out[i] = p[t];",
                       "threadgroup float s[32];\nthreadgroup float* p = s;\np[t] = 1.0f; out[i] = p[t];"),
    "constant": ("address-space", 3, "const device int* p = x_shape;\nout[i] = float(p[0]);",
                 "const constant int* p = x_shape;\nout[i] = float(p[0]);"),
    "signed sum": ("overflow", 3, "int k = 2147483640 + int(i);\nout[i] = float(k);",
                   "int k = 2147483584 + int(i);\nout[i] = float(k);"),
    "shift": ("shift", 3, "out[i] = float(1u << i);", "out[i] = float(1u << (i % 32));"),
    "division": ("division-by-zero", 3, "out[i] = float(7 / int(i));", "out[i] = float(7 / int(i + 1));"),
    "conversion": ("conversion", 3, "out[i] = float(int(x[i] * 1e8f));", "out[i] = float(int(x[i] * 1e7f));"),
    "alignment": ("alignment", 3, "out[i] = ((const device float4*)(x + 1))->x;",
                  "out[i] = ((const device float4*)(x + 4))->x;"),
    "word of Metal's": ("compile", 3, "uint thread = t;\nout[i] = float(thread);",
                        "uint lid = t;\nout[i] = float(lid);"),
}  # fmt: skip


REFUSED = {
    "inline float f(float* p) { return *p; }": "inline float f(thread float* p) { return *p; }",
    "\ninline float f(float (&p)[2]) { return p[0]; }": "\ninline float f(thread float (&p)[2]) { return p[0]; }",
    "template <typename P>\nfloat f(P& p) { return p[0]; }": "template <typename P>\nfloat f(P p) { return p[0]; }",
    "constexpr float two = 2.0f;\nfloat f(const thread float* p) { return two * *p; }":
        "constant constexpr float two = 2.0f;\nfloat f(const thread float* p) { return two * float(*p); }",
}  # fmt: skip


@pytest.mark.parametrize("bad", REFUSED)
def test_what_only_metal_refuses(bad):
    text = WHERE + "float a[2] = {x[i], x[i]};\nout[i] = f(a);"
    run(text, header=REFUSED[bad])
    with pytest.raises(Fault) as found:
        run(text, header=bad)
    line = 1 + next(k for k, s in enumerate(bad.split("\n")) if "*" in s or "&" in s or "two" in s)
    assert (found.value.kind, found.value.file, found.value.line) == ("compile", "inline.h", line)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_told_and_its_twin_runs(case, schedule):
    kind, line, bad, good = CASES[case]
    run(WHERE + good, Emulator(schedule))
    with pytest.raises(Fault) as found:
        run(WHERE + bad, Emulator(schedule))
    fault = found.value
    if kind == "race":  # both accesses are named, the later one first, which the schedule decides
        assert fault.kind == kind and f"inline.metal:{line}" in str(fault)
        return
    assert (fault.kind, fault.file, fault.line) == (kind, "inline.metal", line), fault


def test_too_many_threads():
    with pytest.raises(Fault, match="1056 threads"):
        run(WHERE + "out[i] = 0.0f;", grid=(1056, 1, 1), group=(1056, 1, 1))


def test_bfloat_is_cast():
    inputs = {"x": FLOATS.astype(mx.bfloat16)}
    with pytest.raises(Fault, match="static_cast") as found:
        run(WHERE + "\nout[i] = 2.0f * x[i];", inputs=inputs, dtype=mx.bfloat16)
    assert found.value.line == 4
    out = run(WHERE + "out[i] = static_cast<bfloat16_t>(2.0f * x[i]);", inputs=inputs, dtype=mx.bfloat16)
    assert np.array_equal(np.array(out.astype(mx.float32)), 2.0 * np.arange(64))


def test_an_endless_loop_ends():
    with pytest.raises(Fault, match="processor time") as found:
        run(WHERE + "uint k = i;\nwhile (x[k % 64] > -1.0f) ++k;\nout[i] = float(k);", Emulator(seconds=1))
    assert (found.value.kind, found.value.line) == ("endless", 4)


def test_a_fault_leaves_the_emulator_usable():
    for _ in range(3):
        with pytest.raises(Fault):
            run(WHERE + "out[i + 1] = 0.0f;")
        assert np.array_equal(np.array(run(WHERE + "out[i] = x[i];")), np.arange(64))


def test_lines_of_headers():
    header = "inline float first(const device float* p) {\n  return p[64];\n}\n"
    with pytest.raises(Fault) as found:
        run(WHERE + "out[i] = first(x);", header=header)
    assert (found.value.kind, found.value.file, found.value.line) == ("out-of-bounds", "inline.h", 2)


def _launches(op):
    """Those of an op at its small size."""

    class Recorder(Emulator):
        def run(self, launch):
            seen.append(launch)
            return super().run(launch)

    seen = []
    arguments = list(op.sizes["small"](np.random.default_rng(0), mx.bfloat16))

    def of(*arrays):
        given = list(arguments)
        for i, array in zip(op.wrt, arrays, strict=True):
            given[i] = array
        made = op.function(*given)
        return list(made) if isinstance(made, (list, tuple)) else [made]

    with dispatch.using(Recorder()):
        outputs = of(*(arguments[i] for i in op.wrt))
        mx.eval(outputs)
        if op.wrt:
            mx.eval(mx.vjp(of, [arguments[i] for i in op.wrt], outputs)[1])
    return seen


@pytest.mark.parametrize("op", ops(), ids=lambda op: op.name)
def test_what_is_compiled_is_the_text_of_mlx(op):
    """But for declarations of threadgroup arrays, and attributes of the instantiation that C++ does not take."""
    launches = _launches(op)
    assert {a.kernel.name for a in launches} == {k.name for k in op.kernels}
    for made in launches:
        text = source(made).text
        assert made.kernel.body in text and made.kernel.header in text
        unit = translation_unit(made, source(made))
        compiled = unit.split('#include "metal.h"\n', 1)[1].split('\n#line 1 "entry"\n')[0].split("\n")
        compiled = [line for line in compiled if not line.startswith("#line ")]
        for ours, theirs in zip(compiled, text.split("\n"), strict=True):
            if theirs.startswith("template [[host_name("):
                assert ours.split() == [w for w in theirs.split() if "[[" not in w]
            elif "EMULATED_" in ours:
                assert theirs.strip().startswith("threadgroup ")
            else:
                assert ours == theirs


def test_the_text_is_what_mlx_prints():
    code = """
import mlx.core as mx, tempfile
kernel = mx.fast.metal_kernel("inline", ["x"], ["out"], "out[0] = x[0] * T(x_shape[0]);", "// header")
def f(x):
    return kernel(inputs=[x], template=[("T", mx.float32)], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(1,)],
                  output_dtypes=[mx.float32], verbose=True)
mx.export_function(tempfile.mkdtemp() + "/f.mlxfn", f, mx.zeros((8,)))
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    kernel = Inline("inline", ("x",), ("out",), text="out[0] = x[0] * T(x_shape[0]);", header_text="// header")
    made = Launch(kernel, (mx.zeros((8,)),), {"T": mx.float32}, (1, 1, 1), (1, 1, 1), ((1,),), (mx.float32,))
    assert source(made).text in printed and len(source(made).text) > len(printed) - 80


def test_the_compiler_is_needed(monkeypatch):
    compiler.zig.cache_clear()
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(RuntimeError, match="pip install ziglang"):
        compiler.zig()
    monkeypatch.undo()
    compiler.zig.cache_clear()


def test_schedules_differ_and_are_repeated():
    text = WHERE + "out[i] = atomic_fetch_add_explicit((device atomic<uint>*)&count[0], 1u, memory_order_relaxed);"

    def order(emulator):
        outputs = {"out": ((64,), mx.uint32), "count": ((1,), mx.uint32)}
        made = launch(emulator, text, {"x": FLOATS}, outputs, (64, 1, 1), (32, 1, 1), init=0)
        return np.array(made[0])

    assert np.array_equal(order(Emulator("fifo")), np.arange(64))
    assert np.array_equal(order(Emulator("lifo")), np.arange(64)[::-1])
    one, two, again = (order(Emulator("random", seed)) for seed in (1, 2, 1))
    assert np.array_equal(one, again) and not np.array_equal(one, two) and sorted(one) == list(range(64))


def test_samples():
    emulator = Emulator(sample=5, seed=3)
    text = "out[thread_position_in_grid.x] = 1.0f;"
    out = np.array(run(text, emulator, shape=(1024,), grid=(1024, 1, 1)))
    (record,) = emulator.records
    ran = ~np.isnan(out)
    assert record.groups == (5, 32) and ran.sum() == 5 * 32 and ran[0] and ran[-1]
    assert np.array_equal(record.written[0].all(-1), ran)


def test_positions():
    """Of a grid of partial threadgroups, in three dimensions."""
    grid, group = (7, 5, 4), (4, 2, 3)
    text = """
uint3 p = thread_position_in_grid;
uint at = (p.z * 5 + p.y) * 7 + p.x;
uint made[14] = {thread_position_in_threadgroup.x, thread_position_in_threadgroup.y, thread_position_in_threadgroup.z,
  threadgroup_position_in_grid.x, threadgroup_position_in_grid.y, threadgroup_position_in_grid.z,
  threads_per_threadgroup.x, threads_per_threadgroup.y, threads_per_threadgroup.z, thread_index_in_threadgroup,
  thread_index_in_simdgroup, simdgroup_index_in_threadgroup, threads_per_grid.y, threadgroups_per_grid.x};
for (uint k = 0; k < 14; ++k) out[at * 14 + k] = made[k];
"""
    out = np.array(run(text, shape=(4, 5, 7, 14), dtype=mx.uint32, grid=grid, group=group))
    for x, y, z in np.ndindex(grid):
        p = np.array([x, y, z])
        inside, where = p % group, p // group
        size = np.minimum(group, np.array(grid) - where * group)
        index = inside[0] + size[0] * (inside[1] + size[1] * inside[2])
        assert out[z, y, x].tolist() == [*inside, *where, *size, index, index % 32, index // 32, 5, 2]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_collectives(dtype):
    x = mx.random.randint(-8, 9, (64,)).astype(dtype)
    rows = np.array(x.astype(mx.float32)).reshape(2, 32)
    names = ["simd_sum(v)", "simd_max(v)", "simd_min(v)", "simd_prefix_inclusive_sum(v)",
             "simd_prefix_exclusive_sum(v)", "simd_broadcast(v, 5)", "simd_broadcast_first(v)",
             "simd_shuffle(v, 31 - l)", "simd_shuffle_xor(v, 4)",
             "T(simd_any(v > T(7)))", "T(simd_all(v > T(-8)))"]  # fmt: skip
    sums = rows.cumsum(1)
    lanes = np.arange(32)
    ones = np.ones((1, 32))
    expected = [rows.sum(1)[:, None] * ones, rows.max(1)[:, None] * ones, rows.min(1)[:, None] * ones, sums,
                sums - rows, rows[:, 5:6] * ones, rows[:, :1] * ones, rows[:, ::-1], rows[:, lanes ^ 4],
                (rows > 7).any(1)[:, None] * ones, (rows > -8).all(1)[:, None] * ones]  # fmt: skip
    text = WHERE + "T v = x[i]; ushort l = thread_index_in_simdgroup;\n"
    text += "".join(f"out[{k * 64} + i] = {name};\n" for k, name in enumerate(names))
    for schedule in SCHEDULES:
        emulator, shape = Emulator(schedule), (len(names), 2, 32)
        out = run(text, emulator, {"x": x}, shape, dtype, group=(64, 1, 1), template={"T": dtype})
        assert np.array_equal(np.array(out.astype(mx.float32)), np.stack(expected))


def test_shuffles_by_a_distance():
    text = WHERE + "float a = simd_shuffle_up(x[i], 3); float b = simd_shuffle_down(x[i], 2);\n"
    text += "out[i] = (t < 3 ? 0.0f : a) + (t > 29 ? 0.0f : b);"
    rows, lanes = np.arange(64).reshape(2, 32), np.arange(32)
    up, down = np.roll(rows, 3, 1) * (lanes >= 3), np.roll(rows, -2, 1) * (lanes <= 29)
    assert np.array_equal(np.array(run(text)), (up + down).ravel())


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_simdgroup_matrices(dtype):
    a, b = (mx.random.normal((16, 24)).astype(dtype) for _ in range(2))
    text = """
simdgroup_matrix<T, 8, 8> x, y;
simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
const uint row = threadgroup_position_in_grid.y * 8, column = threadgroup_position_in_grid.x * 8;
for (uint k = 0; k < 24; k += 8) {
  simdgroup_load(x, a, 24, ulong2(k, row));
  simdgroup_load(y, b, 24, ulong2(k, column), true);
  simdgroup_multiply_accumulate(sum, x, y, sum);
}
simdgroup_store(sum, out + row * 16 + column, 16);
"""
    out = run(text, inputs={"a": a, "b": b}, shape=(16, 16), grid=(64, 2, 1), template={"T": dtype})
    a, b = (np.array(m.astype(mx.float32), np.float64) for m in (a, b))
    assert np.abs(np.array(out) - a @ b.T).max() < 1e-5


@pytest.mark.parametrize(
    "dtype", [mx.uint8, mx.int8, mx.uint16, mx.int16, mx.uint32, mx.int32, mx.int64, mx.bool_, mx.float16, mx.bfloat16]
)
@pytest.mark.parametrize("size", [7, 8])
def test_every_dtype_arrives_and_leaves(dtype, size):
    """Seven elements lie in constant memory, eight in device memory."""
    x = mx.random.randint(0, 100, (size,)).astype(dtype)
    out = run("uint i = thread_position_in_grid.x;\nout[i] = x[i];", inputs={"x": x}, shape=(size,), dtype=dtype,
              grid=(size, 1, 1), group=(size, 1, 1))  # fmt: skip
    assert out.dtype == dtype and mx.array_equal(out, x).item()


def test_bfloat_rounds_as_mlx_does():
    x = mx.array(np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)).view(mx.float32)
    out = run("uint i = thread_position_in_grid.x;\nout[i] = static_cast<bfloat16_t>(x[i]);", inputs={"x": x},
              shape=(4096,), dtype=mx.bfloat16, grid=(4096, 1, 1))  # fmt: skip
    ours, theirs = (np.array(a.astype(mx.float32)) for a in (out, x.astype(mx.bfloat16)))
    assert np.array_equal(ours, theirs, equal_nan=True)


@pytest.mark.slow
def test_speed():
    """At least 20 million checked accesses a second, on one core."""
    import time

    text = WHERE + "float s = 0.0f;\nfor (uint k = 0; k < 64; ++k) s += x[(i + k) % 64] * 2.0f;\nout[i] = s;"
    emulator, start = Emulator(), time.perf_counter()
    run(text, emulator, shape=(1 << 20,), grid=(1 << 20, 1, 1), group=(256, 1, 1))
    assert emulator.records[0].accesses / (time.perf_counter() - start) > 20e6


def test_strided_inputs():
    """Of a kernel that finds its elements by their strides, as MLX's documentation shows."""
    x = mx.random.normal((8, 6))[::2, 1:5]
    kernel = Inline("strided", ("x",), ("out",), strided=True, text="""
uint i = thread_position_in_grid.x;
out[i] = x[elem_to_loc(i, x_shape, x_strides, x_ndim)];
""")  # fmt: skip
    (out,) = Emulator().run(Launch(kernel, (x,), {}, (16, 1, 1), (16, 1, 1), ((4, 4),), (mx.float32,)))
    assert mx.array_equal(out, x).item()
