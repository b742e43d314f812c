"""The weights of one model by name: which of them come and go together, which are tied, and where in the model each stands."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from capture.group import nbytes_of

EMBEDDING, HEAD, REST = "embedding", "head", "rest"


class Groups:
    """by_group: embedding, head, rest, and ("layer", i) -> names of weights. meta: each weight as it will stand, without data.
    tied: whether the unembedding is the embedding; they are one group then. ties: target -> source, and of these, both_stored: the
    targets that a checkpoint holds as well."""

    def __init__(self, model: PreTrainedModel, layers_name: str, n_layers: int) -> None:
        self.model, self.layers_name = model, layers_name
        self.ties: dict[str, str] = {}
        self.both_stored: set[str] = set()
        self._nbytes: dict[Any, int] = {}
        names = {id(m): n for n, m in model.named_modules(remove_duplicate=False)}
        embedding = names[id(model.get_input_embeddings())] + "."
        self._head = head = names[id(model.get_output_embeddings())] + "."
        ties = model.all_tied_weights_keys.items()
        self.tied = any({t.startswith(head), s.startswith(head)} == {True, False} for t, s in ties)
        self._prefix = {embedding: EMBEDDING, head: EMBEDDING if self.tied else HEAD}
        layers = [("layer", i) for i in range(n_layers)]
        self.by_group: dict[Any, list[str]] = {g: [] for g in (EMBEDDING, HEAD, REST, *layers)}
        self.meta: dict[str, torch.Tensor] = {}
        # The dict of its module that a weight is kept in, under which name, and whether that is the one of parameters: the way
        # through the modules takes as long as all else that loading a mapped tensor does.
        self._holders: dict[str, tuple[dict[str, Any], str, bool]] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        saved = model.state_dict().keys()
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            if name in saved:  # buffers that a checkpoint does not hold are no weights
                self.by_group[self._group_of(name)].append(name)
                self.meta[name] = tensor
                owner, _, leaf = name.rpartition(".")
                module = modules[owner]
                is_parameter = leaf in module._parameters
                self._holders[name] = (module._parameters if is_parameter else module._buffers), leaf, is_parameter

    def _group_of(self, name: str) -> Any:
        if name.startswith(self.layers_name + "."):
            return ("layer", int(name[len(self.layers_name) + 1 :].split(".")[0]))
        for prefix, group in self._prefix.items():
            if name.startswith(prefix):
                return group
        return REST

    def split(self, leaves: dict[Any, list[str]]) -> None:
        """What is named in `leaves` leaves its layer's group for one of its own; the matrices of embedding and unembedding are in
        none any more."""
        self._nbytes.clear()
        own = {name for names in leaves.values() for name in names}
        for group, names in self.by_group.items():
            ends = group in (EMBEDDING, HEAD)
            self.by_group[group] = [n for n in names if n not in own and not (ends and self.meta[n].dim() >= 2)]
        self.by_group |= leaves

    def tie(self, found: set[str]) -> None:
        """Which parameter stands in for which. As in the library: whichever of the two the checkpoint holds is the source."""
        self._nbytes.clear()
        for target, source in self.model.all_tied_weights_keys.items():
            if target in found and source not in found:
                target, source = source, target
            self.ties[target] = source
        self.both_stored = {t for t, s in self.ties.items() if t in found and s in found}

    def untie_ends(self, target: str) -> None:
        """A weight of the unembedding, or of the embedding, is not the one that it was to be tied to: each comes and goes by itself."""
        del self.ties[target]
        self.both_stored.discard(target)
        self.tied = False
        self._prefix = {prefix: HEAD if prefix == self._head else group for prefix, group in self._prefix.items()}
        ends = [*self.by_group[EMBEDDING], *self.by_group[HEAD]]
        for group in (EMBEDDING, HEAD):
            self.by_group[group] = [name for name in ends if self._group_of(name) == group]
        self._nbytes.clear()

    def untie_layers(self) -> list[tuple[str, str]]:
        """(target, source) of the weights of a layer that are another layer's (Zamba2's shared blocks), which are tied no more: each
        layer has its own copy, because it may stand in memory when the other one does not."""
        found = []
        for target, source in list(self.ties.items()):
            one, other = self._group_of(target), self._group_of(source)
            if isinstance(one, tuple) and isinstance(other, tuple) and one != other:
                found.append((target, source))
                del self.ties[target]
                self.both_stored.discard(target)
        self._nbytes.clear()
        return found

    # -- where they stand ----------------------------------------------------------------------------------------------

    def get(self, name: str) -> torch.Tensor:
        holder, leaf, _ = self._holders[name]
        found: torch.Tensor | None = holder.get(leaf)
        assert found is not None, name
        return found

    def set(self, name: str, tensor: torch.Tensor) -> None:
        holder, leaf, _ = self._holders[name]
        holder[leaf] = tensor

    def as_weight(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as its module wants it: a parameter, or a buffer."""
        return nn.Parameter(tensor, requires_grad=False) if self._holders[name][2] else tensor

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def nbytes(self, group: Any) -> int:
        """Of one group when loaded; a tied tensor counts once."""
        if group not in self._nbytes:
            tensors = {id(t): t for t in (self.meta[n] for n in self.by_group[group] if n not in self.ties)}
            self._nbytes[group] = sum(nbytes_of(t) for t in tensors.values())
        return self._nbytes[group]

    def live_bytes(self, group: Any) -> int:
        """Of a group's tensors that hold data, a tied tensor once."""
        tensors = {id(t): t for t in map(self.get, self.by_group[group]) if not t.is_meta}
        return sum(nbytes_of(t) for t in tensors.values())
