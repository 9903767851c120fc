"""Peak memory of a training step at real widths, by part and by option, measured beside estimated.

    python benchmarks/memory.py [--model gemma-4-E2B] [--dtype bfloat16] [--options "bits=4 recompute=1,recompute=1"]
        [--layers 5+5,10+5,5+10] [--estimate-only]

The row is one 30 s clip, one picture of 280 soft tokens and 128 text tokens (64 with a label), as far as the checkpoint
reads such; LoRA of rank 16 on the decoder. Weights are random and of the real shapes, apart from the depth: so many
layers that own keys and values + so many that share them, whole periods of sliding and full attention. Two or three
such depths give what a period of either kind takes, and so the figure for all layers: measured and extrapolated beside
the estimate of the whole model. The table of per-layer embeddings is not in memory; its rows are zeros.

MLX's product of packed bfloat16 weights makes 0.3 GFLOP/s on a CPU. With --unpack each such product unpacks its weights
to float32 and frees them after it: all 35 layers of E2B in minutes, and never less memory, so that what is measured
bounds the step without it.
"""

import argparse
import copy
import gc
import platform
import time
from contextlib import contextmanager
from functools import cache

import gemma_mlx.blas  # noqa: F401  before mlx.core

import mlx.core as mx  # isort: skip
from mlx.utils import tree_map

from gemma_mlx.catalog import CHECKPOINTS
from gemma_mlx.estimate import estimate
from gemma_mlx.full import trained_parameters
from gemma_mlx.lora import apply_lora
from gemma_mlx.optim import adamw_init, adamw_scalars
from gemma_mlx.skeleton import skeleton
from gemma_mlx.spec import read_spec
from gemma_mlx.step import Step
from gemma_mlx.typical import CLIP_SECONDS, IMAGE_TOKENS, typical_batch

RANK = 16
DEPTHS = {"gemma-4-E2B": "5+5,10+5,5+10", "gemma-4-E4B": "6+6,12+6,6+12", "gemma-3n-E2B": "5+5,10+5,5+10"}
OTHERS = "6+0,12+0"


def cut(config: dict, own: int, shared: int) -> dict:
    """config.json with so many layers."""
    config = copy.deepcopy(config)
    text = config.get("text_config", config)
    layers = own + shared
    text["num_hidden_layers"] = layers
    for name in ("layer_types", "activation_sparsity_pattern", "intermediate_size"):
        if isinstance(text.get(name), list):
            text[name] = text[name][:layers]
    if "num_kv_shared_layers" in text:
        text["num_kv_shared_layers"] = shared
    return config


def depth(config: dict) -> tuple[int, int]:
    """(layers that own keys and values, layers that share them)."""
    text = config.get("text_config", config)
    shared = text.get("num_kv_shared_layers", 0)
    return text["num_hidden_layers"] - shared, shared


def made(config: dict, dtype: str, bits: int | None):
    """The model with adapters, nothing computed yet."""
    mx.random.seed(0)
    model = skeleton(read_spec(config), dtype, bits)
    apply_lora(model, "decoder", RANK)
    return model


def weights_of(model) -> None:
    """Random weights, small and cheap to make; packed ones too."""

    def drawn(a: mx.array) -> mx.array:
        if not mx.issubdtype(a.dtype, mx.floating):
            return mx.random.randint(0, 1 << 30, a.shape).astype(a.dtype)
        return (0.01 * mx.random.normal(a.shape, dtype=a.dtype)) if a.ndim > 1 else mx.ones(a.shape, a.dtype)

    model.update(tree_map(drawn, model.parameters()))
    for layer in model.modules():  # one by one: the numbers on the way take more than the weights
        mx.eval(layer.parameters() if not layer.children() else [])


@cache
def unpacking(transpose: bool, **packing):
    """What mx.quantized_matmul gives, by way of float32 weights in both directions."""

    def product(x: mx.array, packed: list[mx.array], transposed: bool) -> mx.array:
        w = mx.dequantize(*packed, **packing).astype(mx.float32)
        return (x.astype(mx.float32) @ (w.T if transposed else w)).astype(x.dtype)

    run = mx.custom_function(lambda x, *packed: product(x, packed, transpose))

    @run.vjp
    def gradient(inputs, cotangent, _):
        _, *packed = inputs
        return product(cotangent, packed, not transpose), *map(mx.zeros_like, packed)

    return run


@contextmanager
def unpacked(wanted: bool):
    """Products with packed weights go through `unpacking` within the block."""
    own = mx.quantized_matmul

    def quantized_matmul(x, w, scales, biases=None, transpose=True, **packing):
        return unpacking(transpose, **packing)(x, w, scales, *([] if biases is None else [biases]))

    if wanted:
        mx.quantized_matmul = quantized_matmul
    try:
        yield
    finally:
        mx.quantized_matmul = own


def measure(model, batch, **options) -> int:
    """Peak bytes of a step, the frozen towers' work included."""
    weights_of(model)
    step = Step(model, 1.0, False, **options)
    weights = trained_parameters(model)
    moments = adamw_init(weights)
    mx.eval(model.parameters(), weights)
    step.install(weights)
    mx.reset_peak_memory()
    grads, sums = step.gradients(weights, batch, mx.random.key(0))
    weights, moments, norm = step.apply(weights, moments, grads, sums.labels, adamw_scalars(1, 1e-4, 0.0))
    mx.eval(weights, moments, norm, sums.loss, sums.correct)
    return mx.get_peak_memory()


def extrapolated(points: dict[tuple[int, int], float], whole: tuple[int, int]) -> float:
    """The plane through two or three (own, shared) depths, at the whole depth."""
    (first, value), *others = points.items()
    for (own, shared), other in others:
        step = (own - first[0]) or (shared - first[1])
        value += (other - points[first]) / step * ((whole[0] - first[0]) if own != first[0] else (whole[1] - first[1]))
    return value


def parse(text: str) -> dict:
    """"bits=4 recompute=1" -> options."""
    return {name: int(value) for name, _, value in (part.partition("=") for part in text.split())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gemma-4-E2B", choices=CHECKPOINTS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--layers", help="depths, own+shared, comma separated")
    parser.add_argument("--options", default=",recompute=1,bits=4,bits=4 recompute=1,pick_labels=0",
                        help="settings, comma separated: bits, recompute, pick_labels")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=CLIP_SECONDS, help="of the clip; 0: none")
    parser.add_argument("--image-tokens", type=int, default=IMAGE_TOKENS, help="of the picture; 0: none")
    parser.add_argument("--unpack", action="store_true", help="packed products through float32: a bound, quickly")
    parser.add_argument("--estimate-only", action="store_true")
    chosen = parser.parse_args()
    config = CHECKPOINTS[chosen.model]
    depths = chosen.layers or DEPTHS.get(chosen.model, OTHERS)
    depths = [tuple(map(int, pair.split("+"))) for pair in depths.split(",")]
    batch = typical_batch(read_spec(config), seconds=chosen.seconds, image_tokens=chosen.image_tokens)
    print(
        f"{chosen.model}, {chosen.dtype}, seed 0; rows of {batch.input_ids.shape[1]} tokens, {batch.label_count} "
        f"labels; {platform.machine()}, {mx.default_device()}, MLX {mx.__version__}\n"
    )
    print("| options | layers | measured GB | estimated GB | of measured | s | parts at the estimated peak |")
    print("| --- " * 7 + "|")
    for text in chosen.options.split(","):
        line_up(config, chosen, parse(text), text.strip() or "plain", depths, batch)


def line_up(config: dict, chosen, options: dict, name: str, depths: list, batch) -> None:
    """The lines of one setting."""
    bits, found = options.pop("bits", None), {}
    for own, shared in [] if chosen.estimate_only else depths:
        began = time.perf_counter()
        model = made(cut(config, own, shared), chosen.dtype, bits)
        guess = estimate(model, batch, **options)
        gc.collect()
        held = mx.get_active_memory()
        with unpacked(chosen.unpack):
            found[own, shared] = measure(model, batch, **options) - held
        took = time.perf_counter() - began
        del model
        gc.collect()
        report(name, f"{own}+{shared}", found[own, shared], guess, f"{took:.0f}")
    whole = estimate(made(config, chosen.dtype, bits), batch, **options)
    full = depth(config)
    measured = extrapolated(found, full) if len(found) > 1 else None  # one depth has no slope
    layers = f"all ({full[0]}+{full[1]})" + (", extrapolated" if measured else "")
    report(name, layers, measured, whole)


def report(name: str, layers: str, measured: float | None, guess, took: str = "") -> None:
    shown = ("", "") if measured is None else (f"{measured / 1e9:.3f}", f"{guess.peak / measured:.3f}")
    print(f"| {name} | {layers} | {shown[0]} | {guess.peak / 1e9:.3f} | {shown[1]} | {took} | {guess.describe()} |",
          flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
