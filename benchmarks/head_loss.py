"""Head, softcap and cross entropy with the logits and without: time, CPU time and peak memory of value and gradient.

    python benchmarks/head_loss.py                    # 2,048 label positions, 262,144 ids, hidden 1,536: 14 GB
    python benchmarks/head_loss.py --positions 192 --vocabulary 32768 --hidden 192
    python benchmarks/head_loss.py --train            # the gradient of the head as well

Both forms are ``gemma_mlx.loss.label_scores``. They alternate, and which comes first does too; medians of --pairs.
FLOPs are those of the matrix products, counted from the shapes. Peaks are above the weights and the hidden states.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import gemma_mlx  # noqa: F401  (OpenBLAS before mlx.core)

import mlx.core as mx  # isort: skip
import mlx.nn as nn

from gemma_mlx.loss import label_scores


class Tail(nn.Module):
    """What of a model follows the final norm."""

    def __init__(self, options: argparse.Namespace):
        super().__init__()
        self.cap = options.cap or None
        self.embed_tokens = nn.Embedding(options.vocabulary, options.hidden)
        self.set_dtype(getattr(mx, options.dtype))
        if options.bits:
            self.embed_tokens = self.embed_tokens.to_quantized(group_size=64, bits=options.bits)
        self.freeze() if options.bits or not options.train else self.unfreeze()

    def output_head(self) -> tuple[nn.Module, float | None]:
        return self.embed_tokens, self.cap

    def logits(self, hidden: mx.array) -> mx.array:
        out = self.embed_tokens.as_linear(hidden).astype(mx.float32)
        return out if self.cap is None else mx.tanh(out / self.cap) * self.cap


def measure(tail: Tail, hidden: mx.array, targets: mx.array, chunked: bool) -> dict[str, float]:
    """Seconds, CPU seconds, peak MB, and the loss, of one value and gradient."""

    def loss(weights: dict, hidden: mx.array) -> mx.array:
        tail.update(weights)
        log_probs, correct = label_scores(tail, hidden, targets, chunked=chunked)
        return -mx.sum(log_probs), mx.sum(correct)

    mx.clear_cache()
    mx.reset_peak_memory()
    held, wall, cpu = mx.get_active_memory(), time.perf_counter(), time.process_time()
    weights = tail.trainable_parameters()
    (total, correct), grads = mx.value_and_grad(loss, argnums=(0, 1))(weights, hidden)
    mx.eval(total, correct, grads)
    taken = time.perf_counter() - wall, time.process_time() - cpu
    tail.update(weights)
    return dict(wall=taken[0], cpu=taken[1], peak=(mx.get_peak_memory() - held) / 1e6, loss=total.item())


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("positions", 2048), ("vocabulary", 262_144), ("hidden", 1536), ("pairs", 5), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cap", type=float, default=30.0, help="softcap, 0 for none")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--bits", type=int, default=0, help="quantize the head")
    parser.add_argument("--train", action="store_true", help="the head trains")
    parser.add_argument("--only", choices=("logits", "chunks"), help="one form alone, --pairs times")
    options = parser.parse_args()
    mx.random.seed(options.seed)
    tail = Tail(options)
    hidden = mx.random.normal((options.positions, options.hidden)).astype(getattr(mx, options.dtype))
    targets = mx.random.randint(0, options.vocabulary, (options.positions,))
    mx.eval(tail.parameters(), hidden, targets)

    forms = {"logits": False, "chunks": True}
    forms = {name: form for name, form in forms.items() if options.only in (None, name)}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
    for pair in range(options.pairs):
        for name in list(forms)[:: -1 if pair % 2 else 1]:
            runs[name].append(measure(tail, hidden, targets, forms[name]))
            print(f"pair {pair} {name}: " + "  ".join(f"{k} {v:.6g}" for k, v in runs[name][-1].items()), flush=True)

    product = 2 * options.positions * options.vocabulary * options.hidden
    products = {"logits": 3 if options.train else 2, "chunks": 4 if options.train else 2}
    machine = platform.processor() or platform.machine()
    print(f"\n{machine}, MLX {mx.__version__}, {mx.default_device()}, {vars(options)}")
    print("| form | TFLOP | s | CPU s | peak MB |\n|---|---|---|---|---|")
    middle = {n: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for n, rs in runs.items()}
    for name, m in middle.items():
        flops = product * products[name] / 1e12
        print(f"| {name} | {flops:.3g} | {m['wall']:.2f} | {m['cpu']:.2f} | {m['peak']:.0f} |")
    if len(middle) == 2:
        a, b = middle["chunks"], middle["logits"]
        ratio = statistics.median(x["wall"] / y["wall"] for x, y in zip(runs["chunks"], runs["logits"], strict=True))
        print(f"chunks / logits: time {ratio:.2f} (median of pairs), CPU {a['cpu'] / b['cpu']:.2f}, ", end="")
        print(f"peak {a['peak'] / b['peak']:.3f}, loss differs by {abs(a['loss'] / b['loss'] - 1):.1e}")


if __name__ == "__main__":
    main()
