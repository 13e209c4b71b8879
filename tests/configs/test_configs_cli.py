"""The config loader: flags, presets, dumps and error messages, on a config of its own."""

import contextlib
import io
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import tyro
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latent_t2i.configs import cli, presets
from latent_t2i.configs.cli import ConfigError, dump, parse


@dataclass(frozen=True, kw_only=True)
class Data:
    """Nested settings."""

    access: Literal["map", "stream"] = "map"
    """How records are read."""
    widths: tuple[int, ...] = (64, 128)
    """Any number of values."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Two values."""
    levels: tuple[bool, ...] = (True, False)
    """A switch for each level."""
    verify: bool = False
    """A switch."""
    num_workers: int | None = None
    """Optional."""

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"data.num_workers: expected 0 or more, found {self.num_workers}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of an imaginary command.

    This paragraph is not shown in the help.
    """

    name: str
    """The only setting without a default."""
    vae: str | None = None
    """Optional."""
    seed: int = 0
    """A whole number."""
    rate: float = 1e-4
    """A number."""
    compile: bool = True
    """A switch with the default on."""
    prompts: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(aliases=["--prompt"])
    ] = ()
    """Any number of texts."""
    data: Data = field(default_factory=Data)
    """The nested settings."""

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate: expected more than 0, found {self.rate} for {self.name}")


WritePreset = Callable[[object], str]


@pytest.fixture
def write_preset(tmp_path: Path) -> WritePreset:
    """Writes a preset from YAML text or a document; returns its path."""

    def write(document: object) -> str:
        path = tmp_path / "preset.yaml"
        text = document if isinstance(document, str) else yaml.safe_dump(document)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def parse_flags(*flags: str) -> Settings:
    return parse(Settings, "train", flags)


def error_of(*flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_flags(*flags)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults() -> None:
    assert parse_flags("--name", "x") == Settings(name="x")


def test_flags_of_every_kind() -> None:
    config = parse_flags(
        "--name=x", "--vae", "a/b", "--rate", "1e-3", "--no-compile", "--data.verify",
        "--data.access", "stream", "--data.widths", "1", "2", "3", "--data.betas", "0.5", "0.6",
        "--data.levels", "False", "--data.num-workers", "4",
    )  # fmt: skip
    assert config == Settings(
        name="x",
        vae="a/b",
        rate=1e-3,
        compile=False,
        data=Data(
            access="stream",
            widths=(1, 2, 3),
            betas=(0.5, 0.6),
            levels=(False,),
            verify=True,
            num_workers=4,
        ),
    )


def test_underscores_equal_hyphens() -> None:
    assert parse_flags("--name", "x", "--data.num_workers", "2").data.num_workers == 2
    assert not parse_flags("--name", "x", "--data.no_verify").data.verify


def test_none_and_empty_and_dashed_values() -> None:
    assert parse_flags("--name", "x", "--data.num-workers", "None").data.num_workers is None
    assert parse_flags("--name", "x", "--data.widths").data.widths == ()
    assert parse_flags("--name=--x").name == "--x"
    assert parse_flags("--name", "-5").name == "-5"


def test_later_flags_win() -> None:
    config = parse_flags("--name", "x", "--data.verify", "--name", "y", "--data.no-verify")
    assert config == Settings(name="y")


@pytest.mark.parametrize(
    "flags",
    [("--prompt", "a", "--prompt", "b"), ("--prompts", "a", "b"), ("--prompts=a", "--prompt", "b")],
)
def test_repeatable_flags_are_appended(flags: tuple[str, ...]) -> None:
    assert parse_flags("--name", "x", *flags).prompts == ("a", "b")


def test_preset_shared_keys_section_and_flags(write_preset: WritePreset) -> None:
    path = write_preset(
        "name: shared\nseed: 3\nimage_size_px: 64\n"
        "train: {seed: 4, rate: 1e-3, compile: false, prompts: [a, b],"
        " data: {widths: [8], verify: yes, num_workers: null}}\n"
        "sample: {name: other}\n"
    )
    config = parse_flags("--config", path, "--prompt", "c", "--data.no-verify")
    assert config == Settings(
        name="shared", seed=4, rate=1e-3, compile=False, prompts=("c",), data=Data(widths=(8,))
    )
    assert parse_flags(f"--config={path}").prompts == ("a", "b")


def test_flags_before_the_preset_win_too(write_preset: WritePreset) -> None:
    path = write_preset("name: preset")
    assert parse_flags("--name", "mine", "--config", path).name == "mine"


def test_empty_preset(write_preset: WritePreset) -> None:
    assert parse_flags("--config", write_preset("train:\n"), "--name", "x") == Settings(name="x")


def test_preset_is_found_from_anywhere(elsewhere: Path) -> None:
    (elsewhere / "mine.yaml").write_text("name: mine")
    assert presets.find_preset("mine.yaml") == Path("mine.yaml")
    assert presets.find_preset("configs/demo.yaml") == presets.PRESETS_DIR / "demo.yaml"
    assert presets.find_preset("demo") == presets.PRESETS_DIR / "demo.yaml"


def test_a_folder_does_not_hide_a_preset(elsewhere: Path) -> None:
    (elsewhere / "scenes").mkdir()
    assert presets.find_preset("scenes") == presets.PRESETS_DIR / "scenes.yaml"


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8)
configs = st.builds(
    Settings,
    name=text,
    vae=st.none() | text.filter(lambda value: value != "None"),
    seed=st.integers(-9, 9),
    rate=st.floats(1e-12, 1e12),
    compile=st.booleans(),
    prompts=st.lists(text, max_size=3).map(tuple),
    data=st.builds(
        Data,
        access=st.sampled_from(["map", "stream"]),
        widths=st.lists(st.integers(-9, 999), max_size=3).map(tuple),
        betas=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
        levels=st.lists(st.booleans(), max_size=3).map(tuple),
        verify=st.booleans(),
        num_workers=st.none() | st.integers(0, 9),
    ),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs)
def test_a_dump_parses_to_an_equal_config(config: Settings, write_preset: WritePreset) -> None:
    document = {"train": dump(config)}
    assert parse_flags("--config", write_preset(document)) == config
    assert yaml.safe_load(yaml.safe_dump(document)) == document


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "missing --name: set it, or choose a preset with --config (see --help)"),
        (["--nam", "x"], "unknown flag --nam, did you mean --name? (see --help)"),
        (["--verify"], "unknown flag --verify, did you mean --data.verify? (see --help)"),
        (["--nw"], "unknown flag --nw, did you mean --data.num-workers? (see --help)"),
        (["--num_workers"], "unknown flag --num_workers, did you mean --data.num-workers? (see"),
        (["--quaxle"], "unknown flag --quaxle (see --help)"),
        (["x"], "unexpected argument 'x': flags start with -- (see --help)"),
        (["--name"], "--name: expected one value, found none (see --help)"),
        (["--name", "x", "y"], "--name: expected one value, found 'x' 'y' (see --help)"),
        (["--config"], "--config: expected one value, found none (see --help)"),
        (
            ["--name", "x", "--data.verify", "True"],
            "--data.verify: expected no value, found 'True': use --data.verify or --data.no-verify",
        ),
        (
            ["--name", "x", "--rate", "fast"],
            "--rate: could not convert string to float: 'fast' (see --help)",
        ),
        (
            ["--name", "x", "--data.betas", "1"],
            "--data.betas: expected 2 values, found 1 (see --help)",
        ),
        (
            ["--name", "x", "--rate", "0"],
            "rate: expected more than 0, found 0.0 for x (see --help)",
        ),
        (
            ["--name", "x", "--data.num-workers", "-1"],
            "data.num_workers: expected 0 or more, found -1 (see --help)",
        ),
    ],
)
def test_invalid_flags_are_refused(flags: list[str], message: str) -> None:
    assert error_of(*flags).startswith(message)


def test_an_invalid_choice_is_refused_with_the_choices() -> None:
    assert error_of("--name", "x", "--data.access", "fetch") == (
        "invalid choice 'fetch' for argument '--data.access'. Expected one of ('map', 'stream')."
        " (see --help)"
    )


class Terminal(io.StringIO):
    """A terminal with UTF-8 and colours."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_messages_are_the_same_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--name", "x", "--data.access", "fetch")
    message = error_of(*flags)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert error_of(*flags) == message


def test_long_values_are_not_wrapped_in_messages() -> None:
    name = "/a/long/path" * 20
    assert name in error_of(f"--name={name}", "--rate", "-1")


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    message = "--config: no preset 'nowhere.yaml'; expected a path, or one of coco256, coco512,"
    assert error_of("--config", "nowhere.yaml").startswith(message)
    assert error_of("--config", "demoo").endswith(", did you mean demo?")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("[1, 2]", ": expected a mapping, found [1, 2]"),
        ("train: 3", ": train: expected a mapping, found 3"),
        ("trian: {}", ": unknown key 'trian', did you mean train?"),
        ("train: {nmae: x}", ": train.nmae: unknown key, did you mean name?"),
        ("train: {verify: true}", ": train.verify: unknown key, did you mean data.verify?"),
        (
            "train: {data: {acess: map}}",
            ": train.data.acess: unknown key, did you mean data.access?",
        ),
        ("train: {data: map}", ": train.data: expected a mapping, found 'map'"),
        ("name: null", ": name: expected a value, found null"),
        ("name: no", ": name: expected a string or number (quote it), found false"),
        ("name: [x]", ": name: expected one value, found ['x']"),
        ("name: {x: 1, y: 2}", ": name: expected a value, found the mapping {'x': 1, 'y': 2}"),
        ("train: {compile: maybe}", ": train.compile: expected true or false, found maybe"),
        ("train: {rate: true}", ": train.rate: expected a string or number (quote it), found true"),
        ("train: {data: {widths: 8}}", ": train.data.widths: expected a list, found 8"),
        ("train: {data: {levels: [1]}}", ": train.data.levels: expected true or false, found 1"),
    ],
)
def test_invalid_presets_are_refused(
    write_preset: WritePreset, document: str, message: str
) -> None:
    path = write_preset(document)
    assert error_of("--config", path, "--name", "x") == path + message


BOMB = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]" for n in range(1, 40))])


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("name: [x", "invalid YAML in line 1: while parsing a flow sequence, expected ',' or ']'"),
        ("name: x\nname: y", "invalid YAML in line 2: duplicate key 'name'"),
        ("train: {? [a] : 1}", "line 1: expected a name as key, found a list or mapping"),
        ("? {a: 1}\n: 1", "line 1: expected a name as key, found a list or mapping"),
        (BOMB, "expected at most 100,000 values, with aliases expanded"),
        ("[" * 10**6, "line 1: expected at most 50 nested levels"),
        ("train: &a {data: *a}", "line 1: the alias 'a' refers to itself"),
        ("name: !!int x", "line 1: expected plain values, found the tag 'tag:yaml.org,2002:int'"),
        ("name: 2024-13-01", "invalid YAML: month must be in 1..12"),
        ("name: '\x00'", "invalid YAML: unacceptable character #x0000"),
        ("#" * 10_000_001, "expected at most 10,000,000 bytes, found 10,000,001"),
        ("name: {x: [[1, 2]]}", ": name: expected a value, found the mapping {'x': [[1, 2]]}"),
        ("train: {prompts: [[a]]}", ": train.prompts: expected a list of values, found ['a'] in"),
        ("train: [" + "x, " * 999 + "]", ": train: expected a mapping, found ['x', 'x', 'x', 'x'"),
    ],
)
def test_hostile_yaml_is_refused(write_preset: WritePreset, document: str, message: str) -> None:
    found = error_of("--config", write_preset(document))
    assert "preset.yaml: " in found and message in found
    assert len(found) < 500


def test_random_yaml_never_ends_in_another_error(write_preset: WritePreset) -> None:
    rng = random.Random(0)
    words = "name train data x { } [ ] , : - ? | > % @ = ~ << &a *a !!binary ' yes .nan 1:30 0x_ 1_"
    parts = [*words.split(), "2001-1-1", ": ", "- ", "\n", "\n  ", '"', "\t", "\x1b"]
    for _ in range(400):
        document = "".join(rng.choices(parts, k=rng.randrange(1, 20)))
        with contextlib.suppress(ConfigError):
            parse_flags("--config", write_preset(document))


@dataclass(frozen=True, kw_only=True)
class Length:
    """The length of a run."""

    EXCLUSIVE: ClassVar = (("num_steps", "num_epochs"),)
    num_steps: int | None = None
    num_epochs: int | None = None


def test_a_flag_replaces_the_other_setting_of_its_group(write_preset: WritePreset) -> None:
    def length(*flags: str) -> Length:
        return parse(Length, "train", ["--config", path, *flags])

    path = write_preset("train: {num_epochs: 4}")
    assert length() == Length(num_epochs=4)
    assert length("--num-steps", "9") == Length(num_steps=9)
    assert length("--num-steps", "9", "--num-epochs", "None") == Length(num_steps=9)
    assert length("--num-steps", "None") == Length(num_epochs=4)
    with pytest.raises(ConfigError, match="--num-steps and --num-epochs: expected one of them,"):
        length("--num-steps", "9", "--num-epochs", "4")


@pytest.mark.parametrize(
    "section",
    ["rate: fast", "rate: -1", "data: {access: fetch}", "data: {betas: [1]}"],
)
def test_errors_name_the_preset_of_the_value(write_preset: WritePreset, section: str) -> None:
    path = write_preset(f"name: x\ntrain: {{{section}}}")
    assert f" (in {path}) (see --help)" in error_of("--config", path)


def test_errors_about_flags_do_not_name_the_preset(write_preset: WritePreset) -> None:
    path = write_preset("train: {rate: 0.1}")
    assert path not in error_of("--config", path, "--name", "x", "--rate", "fast")


def test_help_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_flags("--help")
    assert not stop.value.code
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("--data.num-workers" in line for line in lines)
    assert any("--config PRESET" in line for line in lines)
    assert "usage: python -m train.run" in lines[0]


def test_help_shows_the_given_program_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Settings, "train", ["--help"], prog="latent-t2i train")
    assert capsys.readouterr().out.startswith("usage: latent-t2i train ")


def run_main(monkeypatch: pytest.MonkeyPatch, run: Callable[[Settings], None], *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *flags])
    with pytest.raises(SystemExit) as stop:
        cli.main(run, Settings, "train")
    assert isinstance(stop.value.code, int)
    return stop.value.code


def raise_(error: BaseException) -> Callable[[Settings], None]:
    def run(config: Settings) -> None:
        raise error

    return run


def test_main_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr(sys, "argv", ["run.py", "--name", "x"])
    cli.main(seen.append, Settings, "train")
    assert seen == [Settings(name="x")]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("shards: found\n  another VAE"), "error: shards: found another VAE"),
        (FileNotFoundError(2, "No such file or directory", "x.json"),
         "error: x.json: No such file or directory"),
        (OSError("disk full"), "error: disk full"),
        (ValueError("\x1b[31m\udcff"), r"error: \x1b[31m\udcff"),
        (FileNotFoundError(2, "No such file", "\x1b]0;x"), r"error: \x1b]0;x: No such file"),
    ],
)  # fmt: skip
def test_main_prints_user_errors_as_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    line: str,
) -> None:
    assert run_main(monkeypatch, raise_(error), "--name", "x") == 2
    assert capsys.readouterr().err == f"{line}\n"


def test_main_prints_invalid_flags_as_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, raise_(AssertionError("not reached")), "--nam", "x") == 2
    assert capsys.readouterr().err.startswith("error: unknown flag --nam")


def test_main_does_not_catch_program_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--name", "x"])
    with pytest.raises(ZeroDivisionError):
        cli.main(raise_(ZeroDivisionError()), Settings, "train")


def test_main_exits_with_130_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_main(monkeypatch, raise_(KeyboardInterrupt()), "--name", "x") == 130


def test_a_closed_pipe_is_not_an_error() -> None:
    code = (
        "from dataclasses import dataclass\n"
        "from latent_t2i.configs.cli import main\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Nothing:\n"
        "    'Nothing.'\n"
        "def run(_):\n"
        "    while True: print('line' * 1000)\n"
        "main(run, Nothing, 'train')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=presets.PRESETS_DIR.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_main_imports_the_function_after_parsing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--name", "x"])
    cli.main("builtins:print", Settings, "train")
    assert capsys.readouterr().out.startswith("Settings(name='x'")
    for run in ("jinja2.missing:run", "quaxle:run"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(run, Settings, "train")
    first, second = capsys.readouterr().err.splitlines()
    name = "'latent-t2i[eval]'"
    assert first == f"error: the package jinja2 is not installed; install it: pip install {name}"
    assert second.endswith("the package quaxle is not installed; install it: pip install 'quaxle'")
    with pytest.raises(ModuleNotFoundError):
        cli.main("latent_t2i.quaxle:run", Settings, "train")
