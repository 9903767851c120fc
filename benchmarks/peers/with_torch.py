"""A worker of ``step.py``: transformers and PEFT on torch, on MPS where there is one, else on the CPU.

A third argument is the decoder's attention: eager or sdpa (the audio tower has eager alone).
"""

import os
import sys

import torch
from peft import LoraConfig, get_peft_model
from protocol import ALPHA, LINEARS, LR, RANK, arguments, serve
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma4ForConditionalGeneration


def main() -> None:
    folder, arrays, dtype = arguments()
    attention = sys.argv[4] if len(sys.argv) > 4 else "sdpa"
    device = "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model = Gemma4ForConditionalGeneration.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation={"text_config": attention, "vision_config": attention, "audio_config": "eager"},
    )
    targets = rf".*language_model.*\.({'|'.join(LINEARS)})"
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    audio = int(arrays.pop("audio_id"))
    inputs = {name: torch.tensor(a).to(device) for name, a in arrays.items()}
    inputs = {name: t.long() if t.dtype == torch.int32 else t for name, t in inputs.items()}
    inputs["mm_token_type_ids"] = torch.where(inputs["input_ids"] == audio, 3, 0)
    counted = []

    def step() -> float:
        if counted:
            return one()
        with FlopCounterMode(display=False) as counter:  # in the first step, which is not timed
            loss = one()
        counted.append(counter.get_total_flops())
        print(f"torch counted {counted[0] / 1e9:.0f} GFLOP a step, tower included", file=sys.stderr)
        return loss

    def one() -> float:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    peak = None if device == "cpu" else torch.mps.driver_allocated_memory
    serve(f"transformers + PEFT ({attention})", step, peak, version=f"torch {torch.__version__}", device=device)


if __name__ == "__main__":
    main()
