"""Every packaged config parses, builds its model and data, and says what it is."""

import pytest
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lightning_modules.callbacks.checkpointing import CheckpointConfig
from mirrorla.complexity import count_parameters
from mirrorla.config_files import find_config, packaged_configs

RECIPES = [name for name in packaged_configs() if not name.startswith(("trainer/", "deepspeed/", "slurm/"))]
TRAINERS = [name for name in packaged_configs() if name.startswith(("trainer/", "deepspeed/"))]


def load(*names):
    parser = LightningArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--seed_everything", type=int)
    parser.add_subclass_arguments(LightningModule, "model")
    parser.add_subclass_arguments(LightningDataModule, "data")
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_class_arguments(CheckpointConfig, "checkpoint")
    return parser, parser.parse_args([f"--config={find_config(name)}" for name in names])


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_model_and_data(name):
    parser, config = load(name)
    del config.trainer  # eight GPUs are not to be had here; its keys and types were checked by parsing
    built = parser.instantiate(config)
    assert isinstance(built.data, LightningDataModule)
    assert count_parameters(built.model.backbone) > 100_000
    named_after_data = name.startswith(("digits/", "fashion_mnist/"))
    assert built.model.backbone_config.name.removeprefix("mirrorla_") in name or named_after_data


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_config_merges_over_a_recipe(name):
    recipe, merged = load("digits/classification")[1], load("digits/classification", name)[1]
    assert merged.model == recipe.model and merged.data.class_path == recipe.data.class_path
    assert merged.trainer != recipe.trainer


@pytest.mark.parametrize("name", packaged_configs())
def test_header_says_what_it_is_and_how_to_run_it(name):
    header = [line for line in find_config(name).read_text().splitlines() if line.startswith("#")]
    assert any("mirrorla fit" in line for line in header)
    if name.startswith(("imagenet/", "coco/", "ade20k/")):
        assert any("not measured" in line for line in header)
