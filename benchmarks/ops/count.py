"""Launches, bytes and FLOPs of every op: plain MLX beside the kernels, counted from shapes; and a roofline.

    python benchmarks/ops/count.py [--out FOLDER] [--dtype bfloat16]

Writes kernels.md, kernels.json and roofline.png. How things are counted: gemma_mlx/kernel_counts.py. Sizes are the
checkpoints': a clip of 30 s, a picture of 280 soft tokens, 512 text tokens. Times: `python -m gemma_mlx doctor
--kernels` on a machine with a GPU.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import matplotlib
import mlx.core as mx

import gemma_mlx  # noqa: F401
from gemma_mlx.kernel_counts import Count, plain, with_kernels
from gemma_mlx.ops.registry import Op, ops

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CHIPS = {"M3 Max": (400, 40), "M4 Pro": (273, 20), "M4 Max": (546, 40), "M5": (153, 10)}
"""GB/s and GPU cores of the largest form, as Apple's technical specifications give them."""
FLOPS_OF_A_CORE = 256 * 1.4e9
"""128 fused multiply-adds a cycle; Apple does not publish the clock, 1.4 GHz is assumed."""
HEADINGS = (
    "op", "launches", "plain", "MB", "plain", "of plain", "gradients: launches", "plain", "MB", "plain", "of plain",
    "FLOPs a byte",
)  # fmt: skip


def counted(op: Op, dtype: mx.Dtype) -> dict[str, Count]:
    """Forward and gradients, in plain MLX and with kernels."""
    before, after = plain(op, "real", dtype), with_kernels(op, "real", dtype)
    return dict(zip(("plain", "plain gradients", "kernels", "kernels gradients"), (*before, *after), strict=True))


def row(name: str, found: dict[str, Count]) -> list[str]:
    """A line of the table."""
    cells = [name]
    for which in ("", " gradients"):
        ours, theirs = found[f"kernels{which}"], found[f"plain{which}"]
        if not ours.launches:
            cells += [""] * 5
            continue
        share = f"{ours.moved / theirs.moved:.2f}" if theirs.moved else ""
        cells += [str(c.launches) for c in (ours, theirs)] + [f"{c.moved / 1e6:.1f}" for c in (ours, theirs)] + [share]
    return [*cells, f"{intensity(found):.1f}"]


def intensity(found: dict[str, Count]) -> float:
    """FLOPs of the formula for each byte that the kernels move, forward and gradients."""
    flops = found["plain"].flops + found["plain gradients"].flops
    return flops / (found["kernels"].moved + found["kernels gradients"].moved)


def markdown(all_found: dict[str, dict[str, Count]]) -> str:
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(row(name, found) for name, found in all_found.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def roofline(all_found: dict[str, dict[str, Count]], path: Path) -> None:
    """What each chip can give at each op's FLOPs a byte, on paper."""
    figure, axes = plt.subplots(figsize=(9, 5.5))
    span = (0.1, 2000.0)
    for chip, (bandwidth, cores) in CHIPS.items():
        peak = cores * FLOPS_OF_A_CORE / 1e12
        corner = 1e3 * peak / bandwidth
        heights = [span[0] * bandwidth / 1e3, peak, peak]
        axes.plot([span[0], corner, span[1]], heights, label=f"{chip}, {bandwidth} GB/s")
    for i, (name, found) in enumerate(sorted(all_found.items(), key=lambda item: intensity(item[1]))):
        at = intensity(found)
        axes.axvline(at, color="0.85", linewidth=0.8, zorder=0)
        axes.text(at, 0.0105 * 1.5 ** (i % 9), name, rotation=0, fontsize=6, ha="center")
    axes.set(xscale="log", yscale="log", xlim=span, ylim=(0.01, 30), xlabel="FLOPs a byte",
             ylabel="TFLOP/s, on paper", title="Left of a chip's corner bytes decide, right of it FLOPs")  # fmt: skip
    axes.legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    all_found = {op.name: counted(op, getattr(mx, chosen.dtype)) for op in ops()}
    table = markdown(all_found)
    print(table)
    (chosen.out / "kernels.md").write_text(table)
    made = {name: {k: asdict(c) for k, c in found.items()} for name, found in all_found.items()}
    (chosen.out / "kernels.json").write_text(json.dumps({"dtype": chosen.dtype, "ops": made}, indent=1) + "\n")
    roofline(all_found, chosen.out / "roofline.png")


if __name__ == "__main__":
    main()
