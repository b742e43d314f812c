"""Whether two opened models can be compared layer by layer, and whether prompts are not too long for them."""

from __future__ import annotations

import logging

from torch import nn

from capture.checkpoint import StreamedModel
from capture.errors import PromptError, UnsupportedModelError

log = logging.getLogger(__name__)


def check_comparable(base: StreamedModel, sft: StreamedModel) -> None:
    """Raise UnsupportedModelError unless two models can be compared layer by layer."""
    facts = (
        ("architecture", type(base.model).__name__, type(sft.model).__name__),
        ("number of layers", base.n_layers, sft.n_layers),
        ("hidden size", base.config.hidden_size, sft.config.hidden_size),
        ("dtype", base.model.dtype, sft.model.dtype),
    )
    for what, a, b in facts:
        if a != b:
            remedy = "set dtype in the config" if what == "dtype" else "base_model and sft_model must be of one family"
            where = f"base '{base.directory}' and sft '{sft.directory}'"
            raise UnsupportedModelError(f"{where} differ in {what}: {a} against {b}; {remedy}")


def check_lengths(model: StreamedModel, longest: int) -> None:
    """Refuse prompts that run past positions that are learned or a table; warn where rotary ones run past what the model was made
    for."""
    by_distance = model.config.model_type == "mpt"  # its table is of biases
    most = getattr(model.config, "max_seq_len" if by_distance else "max_position_embeddings", None)
    if most is None or longest <= most:
        return
    learned = [m for m in model.base.modules() if isinstance(m, nn.Embedding) and m is not model.embedding]
    ends = [m.num_embeddings - getattr(m, "offset", 0) for m in learned]  # OPT's first positions are at row 2
    ends += [b.shape[0] for name, b in model.base.named_buffers() if name.endswith("embed_positions")]  # GPT-J, CodeGen
    if by_distance or any(end < longest for end in ends):
        raise PromptError(f"a prompt has {longest} tokens; the {model.label} model has positions for {most} only")
    log.warning("a prompt has %d tokens; the %s model was made for %d", longest, model.label, most)
