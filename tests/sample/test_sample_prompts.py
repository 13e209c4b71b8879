"""Prompts of the command: text, JSON lines and COCO captions, and the pictures they ask for."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_t2i.configs.cli import parse
from latent_t2i.sample.config import DrawSettings, SampleConfig, settings_from
from latent_t2i.sample.prompts import choose_captions, list_pictures, read_prompts


def write(path: Path, text: str) -> str:
    path.write_text(text, "utf-8")
    return str(path)


def lines(*records: object) -> str:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)


def coco(captions: dict[int, list[str]]) -> str:
    rows = [(image, text) for image, texts in captions.items() for text in texts]
    annotations = [
        {"id": number, "image_id": image, "caption": text}
        for number, (image, text) in enumerate(rows)
    ]
    return json.dumps({"images": [], "annotations": annotations})


def test_each_picture_of_a_prompt_has_the_next_seed() -> None:
    pictures = list_pictures(SampleConfig(prompts=("a", "b"), num_images=2, seed=7))
    assert [(p.prompt, p.seed) for p in pictures] == [("a", 7), ("a", 8), ("b", 9), ("b", 10)]
    assert {p.settings for p in pictures} == {DrawSettings()}


def test_a_line_of_json_may_have_a_seed_and_settings(tmp_path: Path) -> None:
    text = lines(
        {"prompt": "ein Häuschen", "seed": 40, "guidance_interval": [0.5, 2], "size": [96, 64]},
        {"prompt": "b", "num_steps": 3, "guidance_scale": 1, "negative_prompt": ""},
        {"prompt": "c"},
    )
    file = write(tmp_path / "prompts.jsonl", f"{text}\n\n")
    pictures = list_pictures(SampleConfig(prompt_file=file, num_images=2, scheduler="unipc"))
    assert [p.seed for p in pictures] == [40, 41, 2, 3, 4, 5]
    interval = DrawSettings(guidance_interval=(0.5, 2), size=(96, 64), scheduler="unipc")
    assert [p.settings for p in pictures[::2]] == [
        interval,
        DrawSettings(num_steps=3, guidance_scale=1, scheduler="unipc"),
        DrawSettings(scheduler="unipc"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", r'expected an object with a text "prompt", found \[1\]'),
        ('{"prompt": 1}', r'a text "prompt"'),
        ('{"prompt": "a", "seed": -1}', "seed: expected a whole number, 0 or more"),
        ('{"prompt": "a", "seed": 1.5}', "seed: expected a whole number"),
        ('{"prompt": "a", "steps": 3}', "unknown setting 'steps'; expected one of guidance_scale,"),
        ('{"prompt": "a", "num_steps": "3"}', "--num-steps: expected a whole number"),
        ('{"prompt": "a", "num_steps": true}', "--num-steps: expected a whole number"),
        ('{"prompt": "a", "scheduler": ["ddim"]}', "--scheduler: expected one of bundle, ddim"),
        ('{"prompt": "a", "negative_prompt": 3}', "--negative-prompt: expected text, found 3"),
        ('{"prompt": "a", "size": 64}', "--size: expected two numbers, found 64"),
        ('{"prompt": "a", "size": [64, "64"]}', "--size: expected a whole number"),
        ('{"prompt": "a", "guidance_interval": [1]}', "--guidance-interval: expected two numbers"),
        ('{"prompt": "a\\ud800"}', r"prompt: expected Unicode text, found 'a\\ud800'"),
        (
            '{"prompt": "a", "negative_prompt": "\\udfff"}',
            "--negative-prompt: expected Unicode text",
        ),
        ('{"prompt": "a", "guide": "b"}', "guide: one bundle guides all pictures"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = write(tmp_path / "prompts.jsonl", f'{{"prompt": "fine"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=rf"--prompt-file: .*prompts\.jsonl: line 3: .*{message}"):
        list_pictures(SampleConfig(prompt_file=file))


def test_settings_of_a_line_must_fit_those_of_the_command(tmp_path: Path) -> None:
    file = write(tmp_path / "prompts.jsonl", lines({"prompt": "dogs", "guidance_scale": 1}))
    with pytest.raises(ValueError, match=r"prompt 'dogs': --guidance-rescale: has no effect"):
        list_pictures(SampleConfig(prompt_file=file, guidance_rescale=0.5))


def test_captions_are_chosen_by_seed_one_of_each_image(tmp_path: Path) -> None:
    captions = {image: [f"{image} {number}" for number in range(3)] for image in range(50)}
    file = write(tmp_path / "captions.json", coco(captions))

    def texts(**settings: Any) -> list[str]:
        return [p.text for p in read_prompts(SampleConfig(prompt_file=file, **settings))]

    chosen = texts(num_prompts=20)
    # A change of the rule would change which captions published figures are about.
    assert chosen[:3] == ["44 1", "38 2", "6 1"]
    assert len({text.split()[0] for text in chosen}) == 20
    assert len({text.split()[1] for text in chosen}) == 3
    assert texts(num_prompts=30)[:20] == chosen == texts(num_prompts=20, seed=5)
    assert texts(num_prompts=20, prompt_seed=1) != chosen
    assert len(texts()) == 50
    with pytest.raises(ValueError, match=r"50 images with captions, found --num-prompts 51"):
        texts(num_prompts=51)


def test_endings_of_files_may_be_upper_case(tmp_path: Path) -> None:
    upper = write(tmp_path / "captions.JSON", coco({1: ["a"], 2: ["b"]}))
    (prompt,) = read_prompts(SampleConfig(prompt_file=upper, num_prompts=1))
    assert prompt.text in ("a", "b")
    upper = write(tmp_path / "prompts.JSONL", lines({"prompt": "c"}))
    assert read_prompts(SampleConfig(prompt_file=upper))[0].text == "c"


@given(st.randoms(use_true_random=False))
def test_chosen_captions_do_not_depend_on_the_order_of_the_file(random: Any) -> None:
    document = json.loads(coco({image: ["a", "b", str(image)] for image in range(9)}))
    expected = choose_captions(json.dumps(document), Path("c.json"), num=5, seed=3)
    random.shuffle(document["annotations"])
    assert choose_captions(json.dumps(document), Path("c.json"), num=5, seed=3) == expected


@pytest.mark.parametrize(
    "document",
    [
        "{",
        "[]",
        "{}",
        '{"annotations": 3}',
        '{"annotations": [{"id": 1, "image_id": 2}]}',
        '{"annotations": [{"id": 1, "image_id": 2, "caption": 3}]}',
        '{"annotations": [{"id": 1, "image_id": 2, "caption": "\\ud800"}]}',
        '{"annotations": [{"id": "1", "image_id": 2, "caption": "a"}]}',
        '{"annotations": [{"id": 1, "image_id": [2], "caption": "a"}]}',
    ],
)
def test_other_json_is_refused(tmp_path: Path, document: str) -> None:
    file = write(tmp_path / "captions.json", document)
    with pytest.raises(ValueError, match=r"--prompt-file: .*captions\.json: .*expected"):
        read_prompts(SampleConfig(prompt_file=file))


def test_only_captions_are_chosen_from(tmp_path: Path) -> None:
    for file in (None, "prompts.txt"):
        with pytest.raises(
            ValueError, match=r"need COCO captions; expected --prompt-file .*\.json"
        ):
            SampleConfig(prompt_file=file, num_prompts=3)


def test_prompts_of_flags_replace_those_of_a_preset(tmp_path: Path) -> None:
    captions = write(tmp_path / "captions.json", coco({image: [f"{image}"] for image in range(9)}))
    text = write(tmp_path / "prompts.txt", "three")
    preset = write(tmp_path / "own.yaml", f"sample: {{prompts: [one], prompt_file: {text}}}")

    def texts(*flags: str) -> list[str]:
        return [prompt.text for prompt in read_prompts(parse(SampleConfig, "sample", flags))]

    found = texts("--config", "coco256", "--num-prompts", "5", "--prompt-file", captions)
    assert found == texts("--num-prompts", "5", "--prompt-file", captions)
    assert len(texts("--config", "coco256")) == 8
    assert texts("--config", preset) == ["one", "three"]
    assert texts("--config", preset, "--prompt", "two") == ["two"]
    assert texts("--config", preset, "--prompt", "two", "--prompt-file", text) == ["two", "three"]
    assert texts("--config", preset, "--prompt-file", "None") == ["one"]


def test_settings_survive_json() -> None:
    settings = DrawSettings(guidance_interval=(0.1, 3.0), size=(64, 128), guide="x")
    values = json.loads(json.dumps(settings.__dict__))
    assert settings_from(values, "x") == settings
