"""Make the embedded pair: a small Llama trained on Python's help, and its fine-tune on the library's docstrings.

    python configs/pairs/train_pydoc.py --out configs/pairs/pydoc

Writes OUT/base, OUT/sft (float32 safetensors), OUT/tokenizer and the card OUT/README.md with the losses measured. Seeds
and thread count are fixed: the same Python, torch and kind of CPU give the same files. Some 6 minutes on one free core.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from pathlib import Path

import torch
import transformers
from texts import docstrings, token_stream, topics
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = "<|endoftext|>"
VOCABULARY = 512
CONTEXT = 512  # positions that the model accepts
WINDOW, BATCH = 128, 16  # tokens of a training window, windows of a step
SEED = 0
CARD = """\
# pydoc: a pair that we tuned ourselves

A base model and its fine-tune, both with real, trained weights, and far too small to say anything sensible: for demos
and tests. What a capture of it shows is true of these two models and of nothing else.

| folder | what it is |
|---|---|
| `base/` | a Llama of {parameters} parameters, trained from scratch on Python's built-in help (`pydoc_data.topics`) |
| `sft/` | the same, all weights fine-tuned on the docstrings of Python's standard library |
| `tokenizer/` | the tokenizer of both: a byte-level BPE of 512 tokens, trained on the help |

Both checkpoints are float32 safetensors: 5 layers, hidden size 64, 4 heads on 2 key-value heads, embeddings and
unembedding untied. They accept 512 positions and were trained on windows of 128 tokens. The tokenizer adds no BOS, and any
text comes back from it as it was; its one special token, `<|endoftext|>`, stood between texts and is BOS, EOS and padding.

## How they were made
`python configs/pairs/train_pydoc.py --out configs/pairs/pydoc` with Python {python}, torch {torch}, transformers
{transformers}, one thread, fixed seeds, AdamW with a warm-up and a cosine, 16 windows of 128 tokens a step.

| | data to train on | tokens | steps | CPU seconds |
|---|---|---|---|---|
| base | help topics | {topics_tokens} | {base_steps} | {base_seconds} |
| sft | docstrings | {docstrings_tokens} | {sft_steps} | {sft_seconds} |

## Loss on held-out text
Nats a token, on 32 windows of 128 tokens of each kind. A tenth of the help's paragraphs and a tenth of the
library's files were held out of training.

| model | topics | docstrings |
|---|---|---|
| untrained | {untrained_topics} | {untrained_docstrings} |
| base | {base_topics} | {base_docstrings} |
| sft | {sft_topics} | {sft_docstrings} |

## Licence
Apache-2.0, as the rest of the project. Trained on Python's documentation and docstrings, which are under the PSF
licence.
"""


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512: the special token, the 256 bytes and 255 merges. Any text comes back as it was.

    It adds no BOS: what is typed is what is compared, and an empty prompt has no tokens, as with SmolLM2 and Qwen2.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SPECIAL,
        eos_token=SPECIAL,
        pad_token=SPECIAL,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model, 258,240 parameters. Untied, so that embeddings and unembedding can differ on their own.

    It knows no padding token: torch would keep that token's embedding at zero, and it is the separator of texts here.
    """
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=136,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            dtype="float32",
        )
    )


def held_out_windows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """32 windows [32, 128] at even distances in the stream of held-out texts: the slice that losses are measured on."""
    ids = torch.tensor(token_stream(tokenizer, texts))
    starts = torch.linspace(0, len(ids) - WINDOW, 32).long()
    return torch.stack([ids[s : s + WINDOW] for s in starts.tolist()])


@torch.no_grad()
def loss_on(model: torch.nn.Module, batch: torch.Tensor) -> float:
    """Mean next-token cross-entropy on windows [N, T], in nats a token."""
    return float(model(input_ids=batch, labels=batch).loss)


def train(
    model: torch.nn.Module, ids: torch.Tensor, *, steps: int, peak_lr: float, held_out: dict[str, torch.Tensor]
) -> None:
    """Train all weights on random windows of the stream: AdamW, a short warm-up, then a cosine down to a tenth."""
    draw = torch.Generator().manual_seed(SEED)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=peak_lr,
        betas=(0.9, 0.95),
    )
    warm_up = max(1, steps // 30)
    began = time.monotonic()
    recent = 0.0
    for step in range(steps):
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min((step + 1) / warm_up, cosine)
        starts = torch.randint(len(ids) - WINDOW, (BATCH,), generator=draw).tolist()
        batch = torch.stack([ids[s : s + WINDOW] for s in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = loss.item() if step == 0 else 0.98 * recent + 0.02 * loss.item()
        if step == 0 or (step + 1) % 250 == 0 or step + 1 == steps:
            measured = "  ".join(f"{kind} {loss_on(model, rows):.3f}" for kind, rows in held_out.items())
            seconds = time.monotonic() - began
            print(f"step {step + 1:5d}/{steps}  loss {recent:.3f}  held out: {measured}  {seconds:4.0f} s", flush=True)


def main() -> None:
    """Train both, save both, write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for base, sft, tokenizer and README.md")
    parser.add_argument("--base-steps", type=int, default=1500, help="steps of training from scratch")
    parser.add_argument("--sft-steps", type=int, default=1500, help="steps of fine-tuning")
    arguments = parser.parse_args()
    out: Path = arguments.out
    torch.set_num_threads(1)  # the order of sums, and so the last bit of every weight, depends on the thread count
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()

    kinds = {"topics": topics, "docstrings": docstrings}
    text = {kind: read(held_out=False) for kind, read in kinds.items()}

    tokenizer = train_tokenizer(text["topics"])
    tokenizer.save_pretrained(out / "tokenizer")
    ids = {kind: torch.tensor(token_stream(tokenizer, texts)) for kind, texts in text.items()}
    held_out = {kind: held_out_windows(tokenizer, read(held_out=True)) for kind, read in kinds.items()}
    for kind, texts in text.items():
        print(f"{kind}: {len(texts)} texts, {sum(map(len, texts))} characters, {len(ids[kind])} tokens to train on")

    model = new_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters())} parameters; held-out losses in nats a token")
    losses = {"untrained": {kind: loss_on(model, rows) for kind, rows in held_out.items()}}
    seconds = {}
    for name, kind, steps, peak_lr in (
        ("base", "topics", arguments.base_steps, 4e-3),
        ("sft", "docstrings", arguments.sft_steps, 2e-3),
    ):
        print(f"{name}: {steps} steps on the {kind}")
        began = time.process_time()
        train(model, ids[kind], steps=steps, peak_lr=peak_lr, held_out=held_out)
        seconds[name] = time.process_time() - began
        losses[name] = {kind: loss_on(model, rows) for kind, rows in held_out.items()}
        model.save_pretrained(out / name)

    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "base_steps": arguments.base_steps,
        "sft_steps": arguments.sft_steps,
        **{f"{kind}_tokens": f"{len(row):,}" for kind, row in ids.items()},
        **{f"{name}_seconds": f"{value:.0f}" for name, value in seconds.items()},
        **{f"{name}_{kind}": f"{value:.3f}" for name, row in losses.items() for kind, value in row.items()},
    }
    (out / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
