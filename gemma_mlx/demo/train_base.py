"""Train the demo's tiny Gemma 4 from random weights: everyday words, letters and shapes, text to copy.

    python -m gemma_mlx.demo.train_base --work /tmp/base --steps 3000

Needs espeak-ng, torch and transformers. One step takes one batch of speech and, in turn, pictures or text. The loss is
the answer's cross entropy, and for speech also CTC (Graves et al. 2006) of the transcript on the audio soft tokens
through the tied head: without it the audio tower learns nothing for a long time.
`--work` keeps features, state and log; the same command continues a run that was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from gemma_mlx.demo import base_data, blueprint, muon, quick, speech

CHECKPOINT = Path(__file__).parent / "checkpoint"
TRAIN_CLIPS, VALID_CLIPS, SEED = 10_000, 140, 1
LAYER_SCALARS = (0.9, 1.1, 0.95, 1.05, 1.0)


def random_model(seed: int):
    """The blueprint's model; attention starts with scores of order 1, as its scale is fixed at 1."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    torch.manual_seed(seed)
    made = Gemma4Config.from_dict(blueprint.config())
    model = Gemma4ForConditionalGeneration(made).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                p.fill_(p.numel() ** -0.25)
            elif "position_embedding_table" in name:
                p.normal_(0, 0.1)
            elif "embed_tokens" in name:
                p.normal_(0, 0.04)
            elif p.ndim == 2:
                p.normal_(0, 0.5 * p.shape[1] ** -0.5)
        for layer, scalar in zip(model.model.language_model.layers, LAYER_SCALARS, strict=True):
            layer.layer_scalar.fill_(scalar)
    return model


def answer_loss(model, batch):
    """Mean cross entropy over label positions -> (loss, correct, count, audio soft tokens or None)."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "transcripts")}
    out = model.model(**inputs, use_cache=False)
    targets = batch["labels"][:, 1:]
    at = targets != -100
    logits = model.lm_head(out.last_hidden_state[:, :-1][at]).float()
    logits = 30 * torch.tanh(logits / 30)
    loss = F.cross_entropy(logits, targets[at])
    return loss, (logits.argmax(-1) == targets[at]).sum().item(), int(at.sum()), out.audio_hidden_states


def ctc_loss(model, batch, soft):
    """CTC of each transcript on its clip's soft tokens, <pad> as the blank -> (loss, log-probabilities)."""
    lengths = batch["input_features_mask"][:, ::4].sum(1)
    soft = soft.float()
    soft = soft * torch.rsqrt(soft.pow(2).mean(-1, keepdim=True) + 1e-6)
    logits = F.linear(soft, model.lm_head.weight.float()).split(lengths.tolist())
    log_probs = torch.nn.utils.rnn.pad_sequence(logits).log_softmax(-1)
    targets = batch["transcripts"]
    sizes = torch.tensor([len(t) for t in targets])
    total = F.ctc_loss(log_probs, torch.cat(targets), lengths, sizes, blank=0, reduction="sum", zero_infinity=True)
    return total / sizes.sum(), log_probs


class Order:
    """Clips in batches of like length; a new shuffle an epoch, a function of (seed, epoch) alone."""

    def __init__(self, lengths, size: int, seed: int):
        self.lengths, self.size, self.seed = np.asarray(lengths), size, seed

    def batch(self, step: int) -> np.ndarray:
        per_epoch = len(self.lengths) // self.size
        epoch, place = divmod(step, per_epoch)
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        span = self.size * 16
        groups = [g[np.argsort(self.lengths[g], kind="stable")] for g in np.split(order, range(span, len(order), span))]
        whole = np.concatenate(groups)[: per_epoch * self.size].reshape(per_epoch, self.size)
        return whole[rng.permutation(per_epoch)[place]]


def learning_rate(step: int, steps: int, warmup: int = 60) -> float:
    """Share of the peak: linear warm-up, flat, then linear to zero over the last 60 %."""
    return min((step + 1) / warmup, 1.0, max((steps - step) / (0.6 * steps), 0.0))


@torch.no_grad()
def transcribe(model, writer, frames: list, prompt: str, most: int = 32) -> list[str]:
    """Greedy answers by transformers' generate, prompts padded on the left."""
    rows, texts = [], []
    for f in frames:
        ids, labels = writer.row([prompt, writer.slots("audio", -(-len(f) // 4))], "")
        rows.append(ids[: labels.index(writer.ids["<turn|>"])])
    batch = base_data.speech_batch(writer, [""] * len(frames), frames, np.random.default_rng(0))
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows])
    attend = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    out = model.generate(input_ids=ids, attention_mask=attend, input_features=batch["input_features"],
                         input_features_mask=batch["input_features_mask"], do_sample=False, max_new_tokens=most,
                         eos_token_id=[1, writer.ids["<turn|>"]], pad_token_id=0)
    for row in out[:, longest:].tolist():
        texts.append(writer.decode([t for t in row if t > writer.ids["<pad>"] and t != writer.ids["<turn|>"]]))
    return texts


def spell(writer, log_probs, lengths) -> list[str]:
    """CTC's best path."""
    texts = []
    for i, n in enumerate(lengths):
        path = log_probs[:n, i].argmax(-1).tolist()
        texts.append(writer.decode([t for t, before in zip(path, [0, *path], strict=False) if t and t != before]))
    return texts


@torch.no_grad()
def validate(model, writer, valid, generate: bool) -> dict:
    """Word error rates on unheard voices (CTC's and the decoder's) and the share of right tokens for pictures."""
    import jiwer

    model.eval()
    batch = base_data.speech_batch(writer, valid.texts, valid.features, np.random.default_rng(0))
    loss, right, count, soft = answer_loss(model, batch)
    _, log_probs = ctc_loss(model, batch, soft)
    lengths = batch["input_features_mask"][:, ::4].sum(1).tolist()
    found = {"valid_loss": loss.item(), "ctc_wer": jiwer.wer(valid.texts, spell(writer, log_probs, lengths))}
    pictures = base_data.picture_batch(writer, 120, np.random.default_rng(77))
    loss, right, count, _ = answer_loss(model, pictures)
    found |= {"picture_loss": loss.item(), "picture_tokens": right / count}
    if generate:
        said = transcribe(model, writer, valid.features, base_data.DEFAULT_PROMPT)
        found["wer"] = jiwer.wer(valid.texts, said)
        print("\n".join(f"  {a!r} -> {b!r}" for a, b in list(zip(valid.texts, said, strict=True))[:8]), flush=True)
    model.train()
    return found


def batches(step: int, writer, data, order: Order, options) -> dict:
    """The batches of one step, a function of (data, step) alone, so that a continued run sees the same ones."""
    rng = np.random.default_rng([SEED, step])
    chosen = order.batch(step)
    frames = [base_data.augment(data.features[i], rng) for i in chosen]
    out = {"speech": base_data.speech_batch(writer, [data.texts[i] for i in chosen], frames, rng)}
    if step % options.picture_every == 0:
        out["picture"] = base_data.picture_batch(writer, options.pictures, rng, options.blanks)
    elif step % options.picture_every == 1:
        out["copy"] = base_data.copy_batch(writer, options.copies, rng)
    return out


def train_step(model, optimizers, share: float, made: dict) -> dict:
    logged = {}
    for kind, batch in made.items():
        loss, right, count, soft = answer_loss(model, batch)
        logged |= {kind: loss.item(), f"{kind}_tokens": right / count}
        if soft is not None:
            extra, _ = ctc_loss(model, batch, soft)
            logged["ctc"] = extra.item()
            loss = loss + extra
        loss.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group.setdefault("peak", group["lr"])
    logged["norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0).item()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return logged


def save_state(path: Path, model, optimizers, step: int) -> None:
    kept = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
    torch.save(kept, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def run(options) -> None:
    work = Path(options.work)
    tokenizer = blueprint.tokenizer()
    writer = base_data.Writer(tokenizer)
    writer.decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    data = base_data.speech_set(work / "train.npz", TRAIN_CLIPS, speech.VOICES["base"], SEED)
    valid = base_data.speech_set(work / "valid.npz", VALID_CLIPS, speech.VOICES["base_test"], 101)
    order = Order([len(f) for f in data.features], options.batch, SEED)
    model = random_model(SEED).train()
    quick.quicken(model, bfloat16=options.bfloat16)
    optimizers = muon.build_optimizers(model, options.muon_lr, options.adam_lr)
    state, first = work / "state.pt", 0
    if state.exists():
        kept = torch.load(state)
        model.load_state_dict(kept["model"])
        for optimizer, old in zip(optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(old)
        first = kept["step"]
    began, log = time.time(), (work / "log.jsonl").open("a")
    for step in range(first, options.steps):
        logged = train_step(model, optimizers, learning_rate(step, options.steps),
                            batches(step, writer, data, order, options))
        last = step + 1 == options.steps
        if (step + 1) % 25 == 0 or last or step < 3:
            if (step + 1) % options.valid_every == 0 or last:
                logged |= validate(model, writer, valid, last or (step + 1) % (4 * options.valid_every) == 0)
                save_state(state, model, optimizers, step + 1)
            logged = {"step": step + 1, "seconds": time.time() - began} | logged
            line = json.dumps({k: round(v, 4) if isinstance(v, float) and math.isfinite(v) else v
                               for k, v in logged.items()})
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", required=True, help="folder for features, state and log")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--copies", type=int, default=32)
    parser.add_argument("--blanks", type=float, default=0.0, help="share of pictures that are plain grey")
    parser.add_argument("--picture-every", type=int, default=3)
    parser.add_argument("--valid-every", type=int, default=200)
    parser.add_argument("--muon-lr", type=float, default=0.015)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bfloat16", action="store_true", help="audio tower in bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(options)


if __name__ == "__main__":
    main()
