"""More planted faults, in groups of two SIMD groups: each is told with its line, and its clean twin runs right."""

import mlx.core as mx
import numpy as np
import pytest
from metal.emulator import Emulator, Fault
from metal.inline import launch, only

WHERE = "uint i = thread_position_in_grid.x;\nuint t = thread_position_in_threadgroup.x;\n"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SHARED = "threadgroup float s[64];\ns[t] = x[i];\n"
READ = "out[i] = s[63 - t];"
TWICE = "threadgroup float s[64]; float v = 0.0f;\nfor (int k = 0; k < 2; ++k) { s[t] = x[i];\n"
TWO = "threadgroup float a[64];\nthreadgroup float b[64]; a[t] = x[i]; b[t] = 0.0f;\n"
X = np.arange(128, dtype=np.float32)
MIRRORED = (X // 64 * 64) + 63 - X % 64
SUMS = X.reshape(4, 32).sum(1).repeat(32)

# kind, line of the fault, its text, the twin's text, the twin's result; two lines (WHERE) stand before
CASES = {
    "only a SIMD group waits": (
        "race", 6, f"{SHARED}simdgroup_barrier(mem_flags::mem_threadgroup);\n{READ}",
        f"{SHARED}{BARRIER}\n{READ}", MIRRORED,
    ),
    "a barrier that orders nothing": (
        "race", 6, f"{SHARED}threadgroup_barrier(mem_flags::mem_none);\n{READ}",
        f"{SHARED}{BARRIER}\n{READ}", MIRRORED,
    ),
    "written again too soon": (
        "race", 4,
        f"{TWICE}{BARRIER}\nv += s[63 - t]; }}\nout[i] = v;",
        f"{TWICE}{BARRIER}\nv += s[63 - t];\n{BARRIER} }}\nout[i] = v;",
        2 * MIRRORED,
    ),
    "two writers": (
        "race", 4, f"threadgroup float s[1];\nif (t % 32 == 0) s[0] = x[i];\n{BARRIER}\nout[i] = s[0];",
        f"threadgroup float s[1];\nif (t == 0) s[0] = x[i];\n{BARRIER}\nout[i] = s[0];", X // 64 * 64,
    ),
    "a barrier in each branch": (
        "divergent-barrier", None,
        f"if (t < 32) {{\n{BARRIER}\n}} else {{\n{BARRIER}\n}}\nout[i] = x[i];",
        f"{BARRIER}\nout[i] = x[i];", X,
    ),
    "barriers of different number": (
        "divergent-barrier", 3, f"for (uint k = 0; k <= t / 32; ++k) {BARRIER}\nout[i] = x[i];",
        f"for (uint k = 0; k < 2; ++k) {BARRIER}\nout[i] = x[i];", X,
    ),
    "a return before a barrier": (
        "divergent-barrier", 4, f"if (x[i] == 5.0f) return;\n{BARRIER}\nout[i] = x[i];",
        f"{BARRIER}\nif (x[i] < 0.0f) return;\nout[i] = x[i];", X,
    ),
    "a SIMD sum of some": (
        "inactive-lanes", 4, "float v = 0.0f;\nif (t % 2 == 0) v = simd_sum(x[i]);\nout[i] = v;",
        "float v = simd_sum(x[i]);\nout[i] = v;", SUMS,
    ),
    "two collectives": (
        "inactive-lanes", None,
        "float v = 0.0f;\nif (t % 32 < 16)\nv = simd_sum(x[i]);\nelse\nv = simd_max(x[i]);\nout[i] = v;",
        "float v = simd_sum(x[i]);\nout[i] = v;", SUMS,
    ),
    "broadcast from lane 32": (
        "undefined-lane", 3, "out[i] = simd_broadcast(x[i], ushort(32));", "out[i] = simd_broadcast(x[i], ushort(31));",
        X // 32 * 32 + 31,
    ),
    "shuffle by the thread's number": (
        "undefined-lane", 3, "out[i] = simd_shuffle(x[i], ushort(63 - t));",
        "out[i] = simd_shuffle(x[i], ushort(31 - t % 32));",
        X // 32 * 32 + 31 - X % 32,
    ),
    "the array next to it": (
        "out-of-bounds", 5,
        f"{TWO}auto p = a + 64; out[i] = p[t];",
        f"{TWO}auto p = a; out[i] = p[t] + b[t];", X,
    ),
    "a private index below 0": (
        "out-of-bounds", 4, "float a[2] = {x[i], 1.0f};\nout[i] = a[-int(i % 2)];",
        "float a[2] = {x[i], 1.0f};\nout[i] = a[0 * int(i % 2)];", X,
    ),
    "a vector past the end": (
        "out-of-bounds", 3, "out[i] = ((const device float4*)x)[i / 4 + 1].x;",
        "out[i] = ((const device float4*)x)[i / 4].x;", X // 4 * 4,
    ),
    "an unsigned index that wraps": (
        "out-of-bounds", 3, "out[i] = x[i - 1];", "out[i] = x[i == 0 ? 0 : i - 1];", np.maximum(X - 1, 0),
    ),
    "a product that does not fit": (
        "overflow", 3, "int k = int(i + 1) * 40000000;\nout[i] = k > 0 ? x[i] : 0.0f;",
        "int k = int(i + 1) * 4000000;\nout[i] = k > 0 ? x[i] : 0.0f;", X,
    ),
    "a remainder by 0": (
        "division-by-zero", 3, "out[i] = float(i % (i / 64));", "out[i] = float(i % (i / 64 + 1));", X % (X // 64 + 1),
    ),
    "a negative float as an unsigned number": (
        "conversion", 3, "out[i] = float(uint(x[i] - 1.0f));", "out[i] = float(uint(x[i] + 1.0f));", X + 1,
    ),
    "an address made of what was never set": (
        "uninitialised", 4, "uint at[2]; at[0] = i;\nout[at[i % 2]] = x[i];",
        "uint at[2]; at[0] = i; at[1] = i;\nout[at[i % 2]] = x[i];", X,
    ),
}  # fmt: skip


def run(text, emulator, shape=(128,), **more):
    outputs = {"out": (shape, mx.float32)}
    return only(launch(emulator, WHERE + text, {"x": mx.array(X)}, outputs, (128, 1, 1), (64, 1, 1), **more))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("schedule", ["fifo", "random"])
def test_a_fault_is_told_and_its_twin_runs(case, schedule):
    kind, line, bad, good, result = CASES[case]
    assert np.array_equal(np.array(run(good, Emulator(schedule))), result)
    with pytest.raises(Fault) as found:
        run(bad, Emulator(schedule))
    assert found.value.kind == kind, found.value
    if kind == "race":  # both accesses are named, the later one first
        assert f"inline.metal:{line}" in str(found.value)
    elif line is not None:
        assert (found.value.file, found.value.line) == ("inline.metal", line), found.value


@pytest.mark.parametrize("schedule", ["fifo", "random"])
def test_sums_of_all_groups_need_atomics(schedule):
    with pytest.raises(Fault) as found:
        run("if (t == 0) out[0] += 1.0f;", Emulator(schedule), (1,), init=0.0)
    assert (found.value.kind, found.value.line) == ("race-across-threadgroups", 3)
    add = "atomic_fetch_add_explicit(&out[0], 1.0f, memory_order_relaxed);"
    assert run(add, Emulator(schedule), (1,), init=0.0, atomic=True).item() == 128
    mixed = f"{add}\nif (i == 70) ((device float*)out)[0] = 1.0f;"
    with pytest.raises(Fault) as found:
        run(mixed, Emulator(schedule), (1,), init=0.0, atomic=True)
    assert found.value.kind in ("race", "race-across-threadgroups")


def test_a_private_array_by_pointer():
    """Clang follows a pointer only where it optimises, as the harness of the ops' tests does in two of three orders."""
    array = "float a[2] = {x[i], 1.0f}; thread float* p = a;\n"
    assert np.array_equal(np.array(run(f"{array}out[i] = p[0 * (i % 2)];", Emulator(optimise=True))), X)
    with pytest.raises(Fault) as found:
        run(f"{array}out[i] = p[2 * (i % 2)];", Emulator(optimise=True))
    assert (found.value.kind, found.value.line) == ("out-of-bounds", 4)


@pytest.mark.parametrize("count", [32000, 33000, 80000])
@pytest.mark.parametrize("schedule", ["fifo", "lifo", "random"])
def test_private_memory_is_bounded(count, schedule):
    def text(count):
        return f"float a[{count}];\nfor (uint k = 0; k < {count}; ++k) a[k] = x[i];\nout[i] = a[i];"

    assert np.array_equal(np.array(run(text(400), Emulator(schedule))), X)
    with pytest.raises(Fault) as found:
        run(text(count), Emulator(schedule))
    assert found.value.kind == "stack", found.value
