"""Every preset parses for every command, and every command has a readable help text."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from latent_t2i.configs.cli import EXTRAS, SECTIONS, dump, parse
from latent_t2i.configs.presets import PRESETS_DIR, ConfigError, find_preset
from latent_t2i.evaluation.protocols import apply_protocol
from tests.commands import COMMANDS

PRESETS = sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))


def test_each_command_has_a_section() -> None:
    assert tuple(COMMANDS) == SECTIONS
    assert {"demo", "scenes", "coco64", "coco256", "finetune-sd"} <= set(PRESETS)


@pytest.mark.parametrize("section", COMMANDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_parse_to_the_same_after_a_dump(preset: str, section: str, tmp_path: Path) -> None:
    config = parse(COMMANDS[section], section, ["--config", preset])
    assert config.name == preset
    document = {section: dump(config)}
    for text in (yaml.safe_dump(document), json.dumps(document)):
        path = tmp_path / "dump.yaml"
        path.write_text(text, encoding="utf-8")
        assert parse(COMMANDS[section], section, ["--config", str(path)]) == config


@pytest.mark.parametrize("section", COMMANDS)
def test_a_misspelt_key_is_refused(section: str, tmp_path: Path) -> None:
    document = yaml.safe_load(find_preset("demo").read_bytes())
    document[section]["num_stepz"] = 1
    path = tmp_path / "misspelt.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"misspelt\.yaml: {section}\.num_stepz: unknown key"):
        parse(COMMANDS[section], section, ["--config", str(path)])


@pytest.mark.parametrize("section", COMMANDS)
def test_help_fits_80_columns_and_lists_flags(
    section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(COMMANDS[section], section, ["--help"])
    assert not stop.value.code
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.strip("│ ").startswith("--") for line in lines) > 5
    assert "(fixed" not in " ".join(lines), "a setting that no flag can change"


@pytest.mark.parametrize("flags", [["--prompt", "a", "b"], ["--prompt", "a", "--prompts", "b"]])
def test_prompts_replace_those_of_the_preset(flags: list[str]) -> None:
    config = parse(COMMANDS["sample"], "sample", ["--config", "demo", *flags])
    assert config.prompts == ("a", "b")


@pytest.mark.parametrize("name", ["coco64", "coco256", "coco512"])
def test_coco_presets_judge_by_all_metrics(name: str) -> None:
    """A metric whose weights are absent is skipped; one named by the preset would be an error."""
    config = parse(COMMANDS["evaluation"], "evaluation", ["--config", name])
    assert config.metrics == ("all",)
    weights = config.weights
    assert None not in (weights.captioner, weights.detector, config.objects)
    pipeline = parse(COMMANDS["pipeline"], "pipeline", ["--config", name])
    assert weights.clip != pipeline.text_encoder, "the scorer must not condition the model"
    assert apply_protocol(config).reference == "data/coco/val2014"


def test_coco64_has_the_documented_settings() -> None:
    pipeline = parse(COMMANDS["pipeline"], "pipeline", ["--config", "coco64"])
    train = parse(COMMANDS["train"], "train", ["--config", "coco64"])
    assert (pipeline.vae, pipeline.text_encoder, pipeline.image_size_px) == (
        "stabilityai/sd-vae-ft-mse",
        "openai/clip-vit-large-patch14",
        64,
    )
    assert (train.batch_size, train.num_epochs, train.mixed_precision) == (8, 4, "fp16")
    assert train.objective.beta_schedule == "linear"
    assert 0 < train.objective.caption_dropout < 1


HEAVY = ("torch", "diffusers", "transformers", "accelerate", "webdataset")


@pytest.mark.parametrize("flag", ["--help", "--hlep"])
@pytest.mark.parametrize("section", COMMANDS)
def test_help_and_typos_do_not_import_torch(section: str, flag: str) -> None:
    code = f"""if True:
        import sys
        from latent_t2i.{section}.run import main
        sys.argv[1:] = [{flag!r}]
        try:
            main()
        except SystemExit as stop:
            print(stop.code, [name for name in {HEAVY} if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PRESETS_DIR.parent, capture_output=True, text=True
    )
    expected = "0 []" if flag == "--help" else "2 []"
    assert done.stdout.splitlines()[-1:] == [expected], done.stderr


def test_extras_are_those_of_pyproject() -> None:
    project = tomllib.loads((PRESETS_DIR.parent / "pyproject.toml").read_text())["project"]
    for extra, packages in EXTRAS.items():
        listed = project["optional-dependencies"][extra]
        names = [re.split("[<>=]", each)[0].replace("-", "_") for each in listed]
        assert names == list(packages)
