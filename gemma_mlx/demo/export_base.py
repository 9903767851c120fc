"""Turn the state that `train_base` keeps into the demo's checkpoint: clip bounds calibrated, weights in bfloat16.

    python -m gemma_mlx.demo.export_base --work /tmp/base
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from gemma_mlx.demo import base_data, blueprint, speech, train_base

MARGIN = 1.25  # bounds lie this much outside of what calibration saw, so that they hardly bite


class Watch:
    """Remembers the extremes of what goes into and comes out of one clipped linear."""

    def __init__(self, module):
        self.module, self.seen = module, []
        self.handle = module.linear.register_forward_hook(self)

    def __call__(self, _, inputs, output) -> None:
        self.seen.append([inputs[0].min().item(), inputs[0].max().item(), output.min().item(), output.max().item()])

    def set_bounds(self) -> None:
        """Write the widened extremes into the module's four buffers."""
        self.handle.remove()
        seen = np.array(self.seen)
        low, high = seen.min(0), seen.max(0)
        for name, value in (("input_min", low[0]), ("input_max", high[1]), ("output_min", low[2]),
                            ("output_max", high[3])):
            getattr(self.module, name).fill_(MARGIN * float(value))


@torch.no_grad()
def calibrate(model, writer, data: base_data.SpeechSet, clips: int = 640, pictures: int = 160) -> None:
    """Set every clip bound from augmented training clips and fresh pictures."""
    rng = np.random.default_rng(train_base.SEED)
    watches = [Watch(m) for m in model.modules() if hasattr(m, "input_min")]
    for first in range(0, clips, 32):
        some = range(first, first + 32)
        frames = [base_data.augment(data.features[i], rng) for i in some]
        batch = base_data.speech_batch(writer, [data.texts[i] for i in some], frames, rng)
        model.model.get_audio_features(batch["input_features"], batch["input_features_mask"])
    for _ in range(0, pictures, 16):
        batch = base_data.picture_batch(writer, 16, rng)
        model.model.get_image_features(batch["pixel_values"], batch["image_position_ids"])
    for watch in watches:
        watch.set_bounds()


def export(work: Path, out: Path) -> None:
    """Write the whole checkpoint folder."""
    kept = torch.load(work / "state.pt")
    model = train_base.random_model(train_base.SEED).eval()
    model.load_state_dict(kept["model"])
    data = base_data.speech_set(work / "train.npz", train_base.TRAIN_CLIPS, speech.VOICES["base"], train_base.SEED)
    calibrate(model, base_data.Writer(blueprint.tokenizer()), data)
    model.to(torch.bfloat16).save_pretrained(out)
    blueprint.write_files(out)  # last: transformers writes config.json in its own spelling
    print(f"{out}: step {kept['step']}, {sum(p.numel() for p in model.parameters()):,} parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="the folder given to train_base")
    parser.add_argument("--out", type=Path, default=train_base.CHECKPOINT)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    export(options.work, options.out)


if __name__ == "__main__":
    main()
