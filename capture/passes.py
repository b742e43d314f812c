"""Passes and comparisons: which ways through the pair a capture takes, and what it subtracts from what."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from capture.fields import Bool, Frozen, Text, unique

Owner = Literal["base", "sft"]


class Pass(Frozen):
    """One way through the pair, a run: whose embeddings, whose blocks, whose unembedding."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+]*$",
        description="name of the pass; BB, BS, SB and SS are the canonical four",
    )
    model: Owner = Field(description="whose blocks: base or sft")
    embedding_source: Owner | None = Field(
        default=None, description="whose embeddings; the blocks' model when left out"
    )
    unembedding_source: Owner | None = Field(
        default=None, description="whose unembedding; the blocks' model when left out"
    )

    @property
    def embeddings(self) -> Owner:
        return self.embedding_source or self.model

    @property
    def unembedding(self) -> Owner:
        return self.unembedding_source or self.model

    @property
    def letters(self) -> str:
        """The canonical name: embeddings, blocks, and the unembedding only where it is not the blocks' model's."""
        sources = [self.embeddings, self.model] + [self.unembedding] * (self.unembedding != self.model)
        return "".join(s[0].upper() for s in sources)

    @model_validator(mode="after")
    def _name_tells_the_truth(self) -> Pass:
        if self.name in {"BB", "BS", "SB", "SS"} and self.name != self.letters:
            raise ValueError(
                f"the run '{self.name}' is defined as {self.letters} (embeddings, blocks, unembedding); "
                f"give it that name or another"
            )
        return self


class Comparison(Frozen):
    """An ordered pair of passes: the state of base_run is subtracted from that of sft_run."""

    base_run: str = Field(description="the pass subtracted")
    sft_run: str = Field(description="the pass subtracted from")

    @property
    def name(self) -> str:
        return f"{self.base_run}-{self.sft_run}"


FOUR_PASSES = (
    Pass(name="BB", model="base", embedding_source="base"),
    Pass(name="BS", model="sft", embedding_source="base"),
    Pass(name="SB", model="base", embedding_source="sft"),
    Pass(name="SS", model="sft", embedding_source="sft"),
)


class MultiPass(Frozen):
    """The passes of a capture and the comparisons between them."""

    enabled: Bool = Field(
        default=True, description="true: the passes below; false: one comparison per embedding variant"
    )
    runs: tuple[Pass, ...] = Field(
        default=FOUR_PASSES,
        description="the passes, each a block or one of the names BB, BS, SB, SS; those four by default",
    )
    pairwise_differences: tuple[Comparison, ...] | None = Field(
        default=None, description="pairs of passes, each as [BB, SS] or BB-SS; all pairs in order by default"
    )

    @field_validator("runs", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        canonical = {p.name: p for p in FOUR_PASSES}
        if isinstance(value, list):
            for v in value:
                if isinstance(v, str) and v not in canonical:
                    raise ValueError(f"'{v}' is not a run; expected a block, or one of {', '.join(canonical)}")
            return [canonical.get(v, v) if isinstance(v, str) else v for v in value]
        return value

    @field_validator("pairwise_differences", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        def pair(v: Any) -> Any:
            if isinstance(v, str) and v.count("-") == 1:
                v = v.split("-")
            if isinstance(v, list | tuple) and len(v) == 2:
                return {"base_run": v[0], "sft_run": v[1]}
            return v

        return [pair(v) for v in value] if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _consistent(self) -> MultiPass:
        names = [p.name for p in self.runs]
        if not names:
            raise ValueError("runs is empty; leave the key out for BB, BS, SB, SS")
        unique(names, "two runs are named")
        chosen = self.pairwise_differences or ()
        unique([c.name for c in chosen], "pairwise_differences names twice")
        for c in chosen:
            for name in (c.base_run, c.sft_run):
                if name not in names:
                    raise ValueError(f"pairwise_differences names the run '{name}'; the runs are {', '.join(names)}")
            if c.base_run == c.sft_run:
                raise ValueError(f"pairwise_differences compares the run '{c.base_run}' with itself")
        return self

    def comparisons(self) -> tuple[Comparison, ...]:
        """The comparisons asked for, or all pairs of passes in order."""
        if self.pairwise_differences is not None:
            return self.pairwise_differences
        names = [p.name for p in self.runs]
        return tuple(Comparison(base_run=a, sft_run=b) for i, a in enumerate(names) for b in names[i + 1 :])


class Swap(Frozen):
    """Which embeddings and unembedding one side of an embedding variant uses."""

    embedding_source: Owner | None = Field(default=None, description="whose embeddings; the side's own when left out")
    unembedding_source: Owner | None = Field(
        default=None, description="whose unembedding; the side's own when left out"
    )


class EmbeddingVariant(Frozen):
    """One single comparison: the base side and the sft side, each with its swaps."""

    name: Text = Field(description="name of the variant")
    base: Swap = Field(default=Swap(), description="swaps of the base side")
    sft: Swap = Field(default=Swap(), description="swaps of the sft side")


def single_comparisons(
    variants: tuple[EmbeddingVariant, ...],
) -> tuple[tuple[Pass, ...], tuple[Comparison, ...], dict[str, str]]:
    """The passes and comparisons of a config whose multi_pass is off: one comparison per embedding variant.

    The base side runs the base model's blocks, the sft side the sft model's. A pass is named by its letters: embeddings,
    blocks, and the unembedding where it is not the blocks' model's. What two variants share is made once.
    The third value maps a variant's name to its comparison's.
    """
    passes: dict[str, Pass] = {}
    comparisons: dict[str, Comparison] = {}
    names: dict[str, str] = {}
    for variant in variants:
        sides = []
        for owner, swap in (("base", variant.base), ("sft", variant.sft)):
            fields = {"model": owner} | swap.model_dump()
            letters = Pass.model_validate({"name": "x", **fields}).letters
            passes[letters] = Pass.model_validate({"name": letters, **fields})
            sides.append(letters)
        comparison = Comparison(base_run=sides[0], sft_run=sides[1])
        comparisons[comparison.name] = comparison
        names[variant.name] = comparison.name
    return tuple(passes.values()), tuple(comparisons.values()), names
