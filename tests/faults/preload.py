"""What an attempt imports, imported once in the fork server: an attempt is forked from here."""

import gc

import pandas  # noqa: F401  pyarrow looks for it
import torch
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral
import transformers.models.qwen2.modeling_qwen2  # noqa: F401
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: F401

import capture.attempt
import capture.manifest
import capture.show
import capture.work  # noqa: F401

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # so that a child's collections do not walk through, and copy, all that was imported
