"""The page of the config's keys is up to date and says something of each."""

from __future__ import annotations

from pathlib import Path

import yaml

from capture.config import ENV_OVERRIDES, load_config
from capture.config_page import BLOCKS, INTRO, config_page
from capture.fields import Frozen
from capture.variants import VARIANTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "config.md"


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == config_page(), "run: python -m capture.config_page > docs/config.md"


def test_every_key_of_every_block_has_a_description() -> None:
    for block in BLOCKS:
        for name, field in block.model_fields.items():
            assert field.description, f"{block.__name__}.{name}"


def test_every_block_variable_and_variant_is_on_the_page() -> None:
    page = config_page()
    blocks = {b for b in Frozen.__subclasses__() if b.__name__ != "Entry"}
    assert blocks == set(BLOCKS)
    for name in (*ENV_OVERRIDES, *VARIANTS):
        assert f"`{name}`" in page


def test_the_example_on_the_page_is_a_config(tmp_path: Path) -> None:
    example = INTRO.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(example)
    (tmp_path / "c.yaml").write_text(example)
    (entry,) = load_config(tmp_path / "c.yaml", {}).entries()
    assert entry.name == "HuggingFaceTB_SmolLM2_135M_to_HuggingFaceTB_SmolLM2_135M_Instruct"
