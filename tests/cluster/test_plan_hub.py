"""Where sizes come from: the hub's answers and its silence, without a network."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from capture.errors import CheckpointError
from cluster.plan_hub import TIMEOUT_S, hub_sizes
from cluster.plan_models import Models

CONFIG = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
          "vocab_size": 32, "tie_word_embeddings": False, "dtype": "bfloat16"}  # fmt: skip
TENSORS = {"model.embed_tokens.weight": (32, 8), "lm_head.weight": (32, 8), "model.norm.weight": (8,)} | {
    f"model.layers.{i}.mlp.up_proj.weight": (16, 8) for i in range(2)
}


class Hub:
    """What of the hub's client a plan uses."""

    def __init__(self, tmp_path, *, gated=False, fails=None, names=("model.safetensors",)):
        self.path, self.gated, self.fails, self.names, self.asked = tmp_path / "config.json", gated, fails, names, []
        self.path.write_text(json.dumps(CONFIG))

    def __call__(self):
        return self

    def model_info(self, model, *, revision, timeout, token):
        self.asked.append(model)
        assert timeout == TIMEOUT_S
        if self.fails and not isinstance(self.fails, type):
            raise self.fails
        return SimpleNamespace(sha="abc", gated=self.gated, siblings=[SimpleNamespace(rfilename=n) for n in self.names])

    def get_safetensors_metadata(self, model, *, revision, token, timeout):
        assert (revision, timeout) == ("abc", TIMEOUT_S)
        if isinstance(self.fails, type):
            raise self.fails("no safetensors")
        tensors = {k: SimpleNamespace(dtype="BF16", shape=list(s)) for k, s in TENSORS.items()}
        return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})

    def hf_hub_download(self, model, name, *, revision, token, etag_timeout):
        assert name == "config.json"
        return str(self.path)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    def use(**keys):
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        one = Hub(tmp_path, **keys)
        monkeypatch.setattr("huggingface_hub.HfApi", one)
        return one

    return use


def test_headers_on_the_hub_give_all_sizes(hub):
    hub(gated="auto")
    found = hub_sizes("some/model", None, "auto")
    assert (found.source, found.gated, found.n_layers, found.dtype) == ("hub", "auto", 2, "bfloat16")
    assert found.parameters == 2 * 32 * 8 + 8 + 2 * 16 * 8
    assert found.download_bytes == found.weights.total == 2 * found.parameters


def test_a_repository_without_safetensors_is_named_by_what_it_holds(hub):
    from huggingface_hub.errors import NotASafetensorsRepoError

    hub(fails=NotASafetensorsRepoError, names=("model.nemo",))
    with pytest.raises(CheckpointError, match="NeMo archive"):
        hub_sizes("some/model", None, "auto")


def test_a_hub_that_does_not_answer_is_asked_once(hub):
    one = hub(fails=ConnectionError("no route"))
    models = Models()
    for name in ("some/model", "some/other"):
        with pytest.raises(CheckpointError, match="the hub cannot be reached"):
            models.sizes(name, None, "auto")
    assert one.asked == ["some/model"]


def test_the_shipped_facts_are_taken_without_asking(hub):
    one = hub()
    assert Models().sizes("Qwen/Qwen2.5-7B", None, "auto").source == "models.yaml"
    assert one.asked == []


def test_refresh_asks_the_hub_for_what_the_facts_know(hub):
    one = hub()
    assert Models(refresh=True).sizes("Qwen/Qwen2.5-7B", None, "auto").source == "hub"
    assert one.asked == ["Qwen/Qwen2.5-7B"]
    silent = hub(fails=ConnectionError("no route"))
    assert Models(refresh=True).sizes("Qwen/Qwen2.5-7B", None, "auto").source == "models.yaml"
    assert silent.asked


@pytest.mark.parametrize("how", ["option", "environment"])
def test_offline_asks_nobody(how, hub, monkeypatch):
    one = hub()
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="made offline"):
        Models(offline=how == "option").sizes("some/model", None, "auto")
    assert one.asked == []


def test_gated_without_access_says_what_to_do(hub):
    from huggingface_hub.errors import GatedRepoError

    hub(fails=GatedRepoError("no", response=SimpleNamespace(headers={}, request=None)))
    with pytest.raises(CheckpointError, match="hf auth login"):
        Models().sizes("some/model", None, "auto")


def test_what_the_hubs_library_lacks_is_told(hub):
    hub(fails=ImportError("the 'socksio' package is not installed"))
    with pytest.raises(CheckpointError, match=r"'some/model' here: .*socksio.*; install that"):
        Models().sizes("some/model", None, "auto")
