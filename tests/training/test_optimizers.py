"""8-bit AdamW and Adafactor against bitsandbytes, NumPy and transformers; stochastic rounding; bytes held."""

import mlx.core as mx
import numpy as np
import pytest

from gemma_mlx.config import FIELDS
from gemma_mlx.optim import adamw_init, adamw_scalars, adamw_update
from gemma_mlx.optim_8bit import BLOCK, DynamicMap, adamw_8bit_init, adamw_8bit_update, dynamic_map
from gemma_mlx.optimizers import OPTIMIZERS, round_at_random, rounding_key, update

SHAPES = {
    "matrix": (7, 30), "one row": (1, 9), "one column": (9, 1), "norm": (13,), "experts": (3, 6, 5),
    "convolution": (4, 3, 3, 2), "depthwise": (6, 5, 1),
}  # fmt: skip


def random(r, shapes=SHAPES, scale=1.0):
    return {k: (scale * r.standard_normal(s)).astype(np.float32) for k, s in shapes.items()}


def arrays(values):
    return {k: mx.array(v) for k, v in values.items()}


def nbytes(group):
    return sum(a.nbytes for a in group.values())


def test_the_options_are_the_optimizers():
    assert FIELDS["optimizer"].metadata["choices"] == tuple(OPTIMIZERS)


# Adafactor


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("compiled", [False, True])
def test_adafactor_equals_transformers(weight_decay, compiled):
    """20 steps in float32, rates that change, gradients over six decades and some all zero: within 2e-6 of weights
    near one. transformers factors the last two axes of any tensor as well."""
    torch = pytest.importorskip("torch")
    adafactor = pytest.importorskip("transformers.optimization").Adafactor
    r = np.random.default_rng(0)
    start = random(r)
    theirs = {k: torch.nn.Parameter(torch.tensor(w)) for k, w in start.items()}
    optimizer = adafactor(
        theirs.values(), lr=1.0, scale_parameter=False, relative_step=False, warmup_init=False, clip_threshold=1.0,
        weight_decay=weight_decay,
    )  # fmt: skip
    ours = OPTIMIZERS["adafactor"]
    weights = arrays(start)
    state, step_of = ours.init(weights), mx.compile(ours.update) if compiled else ours.update
    for step in range(20):
        lr = 0.01 * (1 + np.sin(step))
        grads = random(r, scale=10.0 ** r.integers(-6, 1))
        grads["norm"][:] *= step != 3
        grads["matrix"][2] = 0.0
        optimizer.param_groups[0]["lr"] = lr
        for k, p in theirs.items():
            p.grad = torch.tensor(grads[k])
        optimizer.step()
        weights, state = step_of(weights, state, arrays(grads), ours.scalars(step + 1, lr, weight_decay))
        mx.eval(weights, state)
    for k, p in theirs.items():
        assert np.abs(np.array(weights[k]) - p.detach().numpy()).max() < 2e-6, k
        assert np.abs(np.array(weights[k]) - start[k]).max() > 0.01 or k == "one row"


def test_adafactor_as_the_paper_in_float64():
    """Algorithm 4 of the paper written out for one matrix and one vector, with alpha = lr."""
    r = np.random.default_rng(1)
    shapes = {"a": (6, 11), "b": (8,)}
    weights = {k: v.astype(np.float64) for k, v in random(r, shapes).items()}
    mine, ours = arrays({k: v.astype(np.float32) for k, v in weights.items()}), OPTIMIZERS["adafactor"]
    state = ours.init(mine)
    rows, columns, vector = np.zeros(6), np.zeros(11), np.zeros(8)
    for t in range(1, 13):
        grads = random(r, shapes, scale=0.1 * t)
        beta = 1 - t**-0.8
        square = grads["a"].astype(np.float64) ** 2 + 1e-30
        rows, columns = beta * rows + (1 - beta) * square.sum(1), beta * columns + (1 - beta) * square.sum(0)
        vector = beta * vector + (1 - beta) * (grads["b"].astype(np.float64) ** 2 + 1e-30)
        second = {"a": np.outer(rows, columns) / rows.sum(), "b": vector}
        for k, v in second.items():
            change = grads[k] / np.sqrt(v)
            weights[k] -= 0.02 * change / max(1.0, np.sqrt(np.mean(change**2)))
        mine, state = ours.update(mine, state, arrays(grads), ours.scalars(t, 0.02, 0.0))
    for k, w in weights.items():
        assert np.abs(np.array(mine[k]) - w).max() < 2e-6


# 8-bit AdamW


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_the_paper_s(signed):
    """Sign, then zeros that count the decade, a one, and a linear fraction in the bits that are left: decoded bit by
    bit. 256 values; 0 and 1 take the two codes that hold no fraction."""
    bits, found = 7 if signed else 8, {0.0, 1.0}
    for code in range(2, 1 << bits):  # 1 has no bit left for a fraction, as 0
        zeros = bits - code.bit_length()  # leading zeros: the exponent
        left = code.bit_length() - 1
        fraction = (code - (1 << left) + 0.5) / (1 << left)
        value = 10.0**-zeros * (0.1 + 0.9 * fraction)
        found |= {value, -value} if signed else {value}
    if signed:
        found |= {5.5e-7, -5.5e-7}  # code 1: its decade as a whole
    values = dynamic_map(signed)
    assert len(found) == len(values) == len(set(values.tolist())) == 256
    assert np.allclose(values, sorted(found), rtol=1e-6, atol=0)
    functional = pytest.importorskip("bitsandbytes.functional")
    assert np.allclose(values, functional.create_dynamic_map(signed).numpy(), rtol=1e-6, atol=0)


def borders_of(signed):
    values = dynamic_map(signed)
    return (values[:-1] + values[1:]) / 2


@pytest.mark.parametrize("signed", [True, False])
def test_every_value_goes_to_the_nearest(signed):
    """At each border between two values, one float below and one above it, at the ends and at a million others."""
    borders = borders_of(signed)
    cells = borders.view(np.uint32) >> 16
    assert len(set(cells.tolist())) == 255  # what the table of cells needs
    r = np.random.default_rng(2)
    low, exponents = -1.0 if signed else 0.0, 10.0 ** r.uniform(-9, 0, 500_000)
    exponents *= r.choice([-1, 1], 500_000) if signed else 1
    near = [np.nextafter(borders, np.float32(end)) for end in (-2, 2)]
    x = np.concatenate([borders, *near, [0.0, 1.0, low], r.uniform(low, 1, 500_000), exponents]).astype(np.float32)
    wanted = np.searchsorted(borders, x)
    if not signed:
        wanted = np.maximum(wanted, x > 0)
    blocks = np.concatenate([np.ones((-(-len(x) // 255), 1)), np.resize(x, (-(-len(x) // 255), 255))], 1)
    index, largest = DynamicMap(signed).pack(mx.array(blocks.astype(np.float32)))
    assert np.all(np.array(largest) == 1.0)
    assert np.array_equal(np.array(index)[:, 1:].reshape(-1)[: len(x)], wanted)


@pytest.mark.parametrize("shape", [(BLOCK,), (1,), (BLOCK - 1,), (BLOCK + 1,), (17, 3, 41), (64, 64)])
@pytest.mark.parametrize("signed", [True, False])
def test_blocks_and_their_error(signed, shape):
    """Against NumPy: the largest of each block is exact, and each value is off by at most half the gap it lies in,
    times its block's largest; blocks of zeros stay zero."""
    r = np.random.default_rng(3)
    x = (r.standard_normal(shape) * 10.0 ** r.uniform(-6, 2, shape)).astype(np.float32)
    x = (x if signed else x * x).reshape(-1)
    x[: x.size // 3] = 0.0
    part = DynamicMap(signed)
    index, largest = part.pack(mx.array(x.reshape(shape)))
    back = np.array(part.unpack(index, largest)).reshape(-1)
    values, borders = dynamic_map(signed), borders_of(signed)
    assert index.dtype == mx.uint8 and index.shape == shape and largest.dtype == mx.float32
    for i in range(-(-x.size // BLOCK)):
        block, got = x[i * BLOCK : (i + 1) * BLOCK], back[i * BLOCK : (i + 1) * BLOCK]
        top = np.abs(block).max()
        assert top == np.array(largest)[i]
        share = block / max(top, 1e-38)
        at = np.searchsorted(borders, share)
        gaps = np.maximum(np.diff(values, prepend=values[0])[at], np.diff(values, append=values[-1])[at])
        bound = 0.5 * gaps + (0 if signed else values[1] / 2 * (at == 0))
        assert np.all(np.abs(got - block) <= (bound + 1e-6 * np.abs(share)) * top)
        assert np.all(got[block == 0] == 0) and got[np.abs(block).argmax()] == pytest.approx(
            block[np.abs(block).argmax()], rel=0.0071
        )


def test_packing_equals_bitsandbytes():
    """Codes and scales, bit for bit. Its kernel for float32 on a CPU looks values up in a coarser table and misses the
    nearest for 0.2 % of them; float64 takes its plain path."""
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    r = np.random.default_rng(4)
    for signed in (True, False):
        x = r.standard_normal(100_000).astype(np.float32) * 3
        x = x if signed else np.abs(x) + 1e-3
        code = functional.create_dynamic_map(signed)
        theirs, scale = torch.ops.bitsandbytes.quantize_blockwise.default(torch.tensor(x).double(), code, BLOCK)
        index, largest = DynamicMap(signed).pack(mx.array(x))
        assert np.array_equal(np.array(largest), scale.numpy())
        assert np.array_equal(np.array(index), theirs.numpy())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_8_bit_steps_equal_those_of_bitsandbytes(weight_decay):
    """Each of 30 steps from the same weights and state, a matrix with a last block of 198 values and a small one that
    stays float32: weights within 1e-6, scales within 1e-6 relative, codes as its coarser table allows (above)."""
    torch = pytest.importorskip("torch")
    optimizers = pytest.importorskip("bitsandbytes.optim")
    r = np.random.default_rng(5)
    shapes = {"large": (70, 65), "small": (63, 65)}
    weights = arrays(random(r, shapes))
    theirs = {k: torch.nn.Parameter(torch.zeros(s)) for k, s in shapes.items()}
    optimizer = optimizers.AdamW8bit(theirs.values(), lr=1.0, weight_decay=weight_decay)
    parts = {"state1": "m", "state2": "v", "absmax1": "m_largest", "absmax2": "v_largest"}
    state = adamw_8bit_init(weights)
    for step in range(30):
        lr = 0.01 * (1 + np.sin(step))
        grads = {k: g + 0.1 * np.sign(g) for k, g in random(r, shapes).items()}  # no second moment near zero
        optimizer.param_groups[0]["lr"] = lr
        for k, p in theirs.items():
            p.data.copy_(torch.tensor(np.array(weights[k])))
            p.grad = torch.tensor(grads[k])
            for name, kind in parts.items() if step else ():
                if k in state[kind]:
                    optimizer.state[p][name].copy_(torch.tensor(np.array(state[kind][k])))
        optimizer.step()
        scalars = adamw_scalars(step + 1, lr, weight_decay)
        weights, state = adamw_8bit_update(weights, state, arrays(grads), scalars)
        for k, p in theirs.items():
            assert np.abs(np.array(weights[k]) - p.detach().numpy()).max() < 1e-6
            held = {kind: optimizer.state[p][name].numpy() for name, kind in parts.items() if k in state[kind]}
            for kind, wanted in held.items():
                found = np.array(state[kind][k])
                assert found.dtype == wanted.dtype and found.shape == wanted.shape
                if found.dtype == np.uint8:
                    assert np.mean(found != wanted) < 0.01
                else:
                    assert np.allclose(found, wanted, rtol=1e-6, atol=1e-7 if k == "small" else 0)
    assert state["m"]["large"].dtype == state["v"]["large"].dtype == mx.uint8
    assert state["m"]["small"].dtype == mx.float32 and "small" not in state["m_largest"]


def test_small_tensors_are_adamw_itself():
    r = np.random.default_rng(6)
    weights = arrays(random(r))
    grads, scalars = arrays(random(r)), adamw_scalars(1, 0.01, 0.1)
    exact, _ = adamw_update(weights, adamw_init(weights), grads, scalars)
    found, state = adamw_8bit_update(weights, adamw_8bit_init(weights), grads, scalars)
    assert all(mx.array_equal(found[k], exact[k]) for k in exact) and not state["v_largest"]


def test_compiled_8_bit_is_the_same():
    r = np.random.default_rng(7)
    weights = arrays(random(r, {"a": (80, 60), "b": (5,)}))
    runs = []
    for function in (adamw_8bit_update, mx.compile(adamw_8bit_update)):
        r, w, state = np.random.default_rng(8), weights, adamw_8bit_init(weights)
        for step in range(5):
            grads = arrays(random(r, {k: v.shape for k, v in weights.items()}))
            w, state = function(w, state, grads, adamw_scalars(step + 1, 0.01, 0.0))
        runs.append(w)
    assert all(np.abs(np.array(runs[0][k] - runs[1][k])).max() < 1e-4 for k in weights)


def test_a_second_moment_never_becomes_zero():
    """Values a ten-thousandth of their block's largest, and then a step without a gradient: AdamW's step is at most
    about the rate; divided by epsilon it would be thousands of times that."""
    r = np.random.default_rng(9)
    size = 10.0 ** r.uniform(-6, 0, (64, 64)).astype(np.float32)
    size[:, 0] = 1.0
    weights, moved = {"w": mx.zeros((64, 64))}, {}
    for name in ("adamw", "adamw8bit"):
        w, state = weights, OPTIMIZERS[name].init(weights)
        for step, grad in enumerate((size, 0 * size, 0 * size)):
            before = w["w"]
            w, state = OPTIMIZERS[name].update(w, state, {"w": mx.array(grad)}, adamw_scalars(step + 1, 1.0, 0.0))
            moved[name] = max(moved.get(name, 0.0), mx.abs(w["w"] - before).max().item())
    assert moved["adamw8bit"] < 1.5 * moved["adamw"] < 2.0


def regression(name, steps=300, width=96):
    """Loss of each step: a linear map with noise, learnt from batches of 64 rows whose columns' sizes span a decade."""
    r = np.random.default_rng(10)
    true, sizes = r.standard_normal((width, width)) / width**0.5, 10.0 ** r.uniform(-1, 0, width)
    weights, optimizer, losses = {"w": mx.zeros((width, width))}, OPTIMIZERS[name], []
    state = optimizer.init(weights)

    def loss(w, x, y):
        return mx.mean(mx.square(x @ w["w"] - y))

    for step in range(steps):
        x = (r.standard_normal((64, width)) * sizes).astype(np.float32)
        y = (x @ true + 0.05 * r.standard_normal((64, width))).astype(np.float32)
        value, grads = mx.value_and_grad(loss)(weights, mx.array(x), mx.array(y))
        rate = 0.02 * (1 - step / steps)
        weights, state = optimizer.update(weights, state, grads, optimizer.scalars(step + 1, rate, 0.0))
        mx.eval(weights, state)
        losses.append(value.item())
    return np.array(losses)


def test_training_follows_float32_adamw():
    """A regression of 9,216 weights over 300 steps: every loss within 5 % of float32 AdamW's; Adafactor learns it."""
    losses = {name: regression(name) for name in OPTIMIZERS}
    away = np.abs(losses["adamw8bit"] / losses["adamw"] - 1).max()
    print({k: v[-1] for k, v in losses.items()}, away)
    assert away < 0.05
    assert losses["adamw"][-1] < 0.1 * losses["adamw"][0] and losses["adafactor"][-1] < 0.1 * losses["adafactor"][0]


# Stochastic rounding


def neighbours(x):
    """float32 -> the bfloat16 numbers around it, as float32: towards zero, and away from it."""
    bits = x.view(np.uint32)
    inner = bits & np.uint32(0xFFFF0000)
    return inner.view(np.float32), (inner + np.uint32(0x10000)).view(np.float32)


def test_the_mean_over_keys_is_the_value():
    """4,000 keys on numbers of all sizes and both signs: only the two neighbours occur, and the mean is within 4
    standard errors of the value."""
    r, keys = np.random.default_rng(11), 4000
    x = (r.standard_normal(500) * 10.0 ** r.uniform(-30, 30, 500)).astype(np.float32)
    x[:3] = 1.0 + 2**-9, -1.0 - 2**-20, np.nextafter(np.float32(2), np.float32(1))  # below a power of two
    found = np.stack([np.array(round_at_random(mx.array(x), mx.random.key(i)).astype(mx.float32)) for i in range(keys)])
    near, far = neighbours(x)
    assert np.all((found == near) | (found == far))
    share = (x.astype(np.float64) - near) / (far.astype(np.float64) - near)
    error = np.sqrt(share * (1 - share) / keys)
    away = np.abs((found == far).mean(0) - share)
    assert np.all(away <= 4 * error + 1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 7), (4, 2, 3)])
def test_what_bfloat16_holds_stays(shape):
    r = np.random.default_rng(12)
    x = mx.array(r.standard_normal(shape).astype(np.float32)).astype(mx.bfloat16)
    for i in range(20):
        assert mx.array_equal(round_at_random(x.astype(mx.float32), mx.random.key(i)), x)
    special = mx.array([0.0, -0.0, np.inf, -np.inf, np.nan], dtype=mx.float32)
    got = np.array(round_at_random(special, mx.random.key(0)).astype(mx.float32))
    assert np.array_equal(got, np.array(special), equal_nan=True) and np.signbit(got[1])


def test_values_are_rounded_independently():
    """Neighbouring values and tensors of one step: correlations of 100,000 pairs within 4 standard errors of 0."""
    x = mx.full((100_002,), 1.0 + 2**-9)
    up = np.array(round_at_random(x, rounding_key(3, 1)).astype(mx.float32)) > 1
    other = np.array(round_at_random(x, rounding_key(3, 2)).astype(mx.float32)) > 1
    pairs = [(up[:-1], up[1:]), (up[:-2], up[2:]), (up, other)]
    assert all(abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(1e5) for a, b in pairs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_small_updates_are_kept_on_average(name):
    """300 steps of 1e-4 down from 1, where bfloat16's numbers are 4e-3 apart: rounding to the nearest never leaves 1;
    the mean of 8,192 weights at random is within 4 standard errors of float32's."""
    optimizer, shape, steps = OPTIMIZERS[name], (128, 64), 300
    start = {"w": mx.ones(shape), "v": mx.ones((7,))}
    low = {"w": mx.ones(shape, mx.bfloat16), "v": mx.ones((7,))}
    grads = {"w": mx.ones(shape), "v": mx.ones((7,))}
    state = other = optimizer.init(start)
    for step in range(steps):
        scalars = optimizer.scalars(step + 1, 1e-4, 0.0)
        start, state = update(optimizer, start, state, grads, scalars)
        low, other = update(optimizer, low, other, grads, scalars, rounding_key(0, step))
        mx.eval(start, state, low, other)
    nearest = mx.ones(shape, mx.bfloat16) - mx.array(1e-4, mx.bfloat16)
    assert mx.all(nearest == 1).item()
    assert low["w"].dtype == mx.bfloat16 and low["v"].dtype == mx.float32
    assert mx.array_equal(low["v"], start["v"])
    found = np.array(low["w"].astype(mx.float32))
    wanted = start["w"].mean().item()
    assert abs(wanted - (1 - steps * 1e-4)) < 1e-4
    assert abs(found.mean() - wanted) < 4 * found.std() / np.sqrt(found.size)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32_weights_need_no_key_and_do_not_change_by_one(name):
    optimizer, r = OPTIMIZERS[name], np.random.default_rng(13)
    weights, grads = arrays(random(r)), arrays(random(r))
    scalars = optimizer.scalars(1, 0.01, 0.1)
    plain = optimizer.update(weights, optimizer.init(weights), grads, scalars)[0]
    for key in (None, mx.random.key(1)):
        found, _ = update(optimizer, weights, optimizer.init(weights), grads, scalars, key)
        assert all(mx.array_equal(found[k], plain[k]) for k in plain)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_arithmetic_is_float32_whatever_the_gradients_are(name):
    optimizer, r = OPTIMIZERS[name], np.random.default_rng(15)
    weights, grads = ({k: w.astype(mx.bfloat16) for k, w in arrays(random(r)).items()} for _ in range(2))
    scalars, key = optimizer.scalars(1, 0.01, 0.1), mx.random.key(1)
    exact = {k: g.astype(mx.float32) for k, g in grads.items()}
    runs = [update(optimizer, weights, optimizer.init(weights), g, scalars, key) for g in (grads, exact)]
    assert all(mx.array_equal(runs[0][0][k], runs[1][0][k]) for k in weights)
    assert {a.dtype for group in runs[0][1].values() for a in group.values()} == {mx.float32}


def test_keys_of_steps_seeds_and_dropout_differ():
    from gemma_mlx.loop import dropout_key

    keys = [rounding_key(seed, step) for seed in (0, 1, 2**40) for step in range(4)]
    keys += [dropout_key(seed, step, micro) for seed in (0, 1) for step in range(3) for micro in range(3)]
    assert len({tuple(k.tolist()) for k in keys}) == len(keys)
    assert mx.array_equal(rounding_key(5, 7), rounding_key(5, 7))


# Bytes


@pytest.mark.parametrize("name,bound", [("adamw", 8.0), ("adamw8bit", 2 + 8 / 256), ("adafactor", 0.1)])
def test_bytes_of_state_for_a_weight(name, bound):
    """Of matrices as a decoder's: exactly 8; two bytes and two scales of 4 for 256; a row and a column."""
    weights = {"a": mx.zeros((512, 256)), "b": mx.zeros((8, 96, 128))}
    state = OPTIMIZERS[name].init(weights)
    held = sum(map(nbytes, state.values())) / sum(w.size for w in weights.values())
    assert held == bound if name != "adafactor" else held < bound


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_large_tensors_wait_for_each_other(name, monkeypatch):
    """The same bits, and an update of 16 tensors takes far less memory at a time."""
    r, peaks, found = np.random.default_rng(14), [], []
    grads = {str(i): mx.array(r.standard_normal((256, 512)).astype(np.float32)) for i in range(16)}
    weights = {k: g.astype(mx.bfloat16) for k, g in grads.items()}
    optimizer = OPTIMIZERS[name]
    for large in (1 << 17, 1 << 30):
        monkeypatch.setattr("gemma_mlx.optimizers.LARGE", large)
        state = optimizer.init(weights)
        mx.eval(state, weights, grads)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        new, state = update(optimizer, weights, state, grads, optimizer.scalars(1, 0.01, 0.1), mx.random.key(0))
        mx.eval(new, state)
        peaks.append(mx.get_peak_memory() - before)
        found.append(new)
    count = sum(w.size for w in weights.values())
    print(name, [p / count for p in peaks])
    assert all(mx.array_equal(found[0][k], found[1][k]) for k in weights)
    assert peaks[0] < 0.8 * peaks[1]
