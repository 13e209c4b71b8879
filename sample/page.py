"""`sample.app`: the page's layout. sample/studio.py does the work.

Everything that the browser loads comes from this server: fonts of the system, no analytics, no
share link.
"""

import html
import os
import random
import threading
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, get_args

from latent_t2i.model.checks import check_number
from latent_t2i.sample.config import SEED_LIMIT, DrawSettings, SchedulerName
from latent_t2i.sample.settings import AppConfig, EditConfig
from latent_t2i.sample.studio import Event, Progress, Studio, Waiting, parse_scales, short_name

# gradio reads it when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import gradio as gr

TITLE = "latent-t2i"
MAX_UPLOAD = "50mb"
MAX_STEPS = 1000
CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
.gallery img { image-rendering: pixelated; }
"""
Update = tuple[list[tuple[Any, str]], str, Any]
"""The pictures with their captions, the line of status, and the button Stop."""


def serve(config: AppConfig) -> None:
    """Serves the page until the process is interrupted."""
    studio = Studio(config)
    page, launch = build(studio), launch_settings(studio)
    _, url, _ = page.launch(**launch, prevent_thread_lock=True)
    print(f"page: {url}\npictures: {studio.out}", flush=True)
    page.block_thread()


def launch_settings(studio: Studio) -> dict[str, Any]:
    """Returns the arguments of `launch`."""
    config = studio.config
    studio.out.mkdir(parents=True, exist_ok=True)
    system = ("system-ui", "sans-serif")
    return {
        "server_name": config.host,
        "server_port": config.port or None,
        "theme": gr.themes.Default(font=system, font_mono=("ui-monospace", "monospace")),
        "css": CSS,
        "allowed_paths": [str(studio.out)],
        "max_file_size": MAX_UPLOAD,
        "footer_links": [],
        "run_history": False,
        "share": False,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
        "enable_monitoring": False,
        "show_error": True,
        "quiet": True,
    }


def build(studio: Studio) -> gr.Blocks:
    """Returns the page."""
    names, stops = list(studio.bundles()), _Stops()
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# {TITLE}\nPictures from text, drawn on this machine.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                shared = _shared_inputs(studio, names)
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                with gr.Tab("Generate"):
                    _generate_tab(studio, shared, stops)
                with gr.Tab("Compare"):
                    _compare_tab(studio, shared, stops)
                with gr.Tab("Edit"):
                    _edit_tab(studio, shared, stops)
        page.load(lambda: gr.Dropdown(choices=list(studio.bundles())), None, shared["bundle"])
    return page


def _shared_inputs(studio: Studio, names: list[str]) -> dict[str, Any]:
    """Adds the settings that all tabs use; returns them by name."""
    prompt = gr.Textbox(
        label="Prompt", value="a small red star above a large blue circle", lines=2, max_lines=6
    )
    negative = gr.Textbox(label="Negative prompt (no effect at guidance 1)", lines=1)
    bundle = gr.Dropdown(names, value=names[0], label="Bundle")
    with gr.Row():
        guidance = gr.Slider(1, 15, value=4, step=0.5, label="Guidance scale", min_width=140)
        steps = gr.Slider(1, 100, value=25, step=1, label="Steps", min_width=140)
    with gr.Row():
        schedulers = list(get_args(SchedulerName))
        scheduler = gr.Dropdown(schedulers, value="dpmpp", label="Scheduler", min_width=140)
        num = gr.Slider(1, studio.config.max_images, value=4, step=1, label="Images", min_width=140)
    with gr.Row(equal_height=True):
        seed = gr.Number(value=0, precision=0, minimum=0, label="Seed", min_width=140, scale=3)
        dice = gr.Button("Random seed", min_width=120, scale=1)
    dice.click(lambda: random.randrange(2**31), None, seed, queue=False)
    found = {"bundle": bundle, "prompt": prompt, "negative_prompt": negative}
    found |= {"guidance_scale": guidance, "num_steps": steps, "scheduler": scheduler}
    return found | {"seed": seed, "num_images": num}


def _generate_tab(studio: Studio, shared: dict[str, Any], stops: "_Stops") -> None:
    outputs = _result(columns=2)

    def run(request: gr.Request, *values: Any) -> Iterator[Update]:
        chosen = dict(zip(shared, values, strict=True))
        with _Messages(), stops.of(request) as event:
            seed, settings = _seed(chosen), _settings(chosen)
            seeds = range(seed, seed + _num_images(chosen, studio))
            images = [(own, settings) for own in seeds]
            events = studio.draw(chosen["bundle"], _text(chosen["prompt"]), images, event)
            yield from _updates(events, [f"seed {own}" for own in seeds], studio, event)

    _connect(run, list(shared.values()), outputs, stops, [shared["prompt"].submit])


def _compare_tab(studio: Studio, shared: dict[str, Any], stops: "_Stops") -> None:
    gr.Markdown("The same prompt and seed at several guidance scales.")
    scales = gr.Textbox("1, 2, 4, 7", label="Guidance scales")
    outputs = _result(columns=4, label="Compare")

    def run(request: gr.Request, text: str, *values: Any) -> Iterator[Update]:
        chosen = dict(zip(shared, values, strict=True))
        with _Messages(), stops.of(request) as event:
            found, seed = parse_scales(text), _seed(chosen)
            images = [(seed, _settings(chosen | {"guidance_scale": scale})) for scale in found]
            labels = [f"guidance {scale:g}" for scale in found]
            events = studio.draw(chosen["bundle"], _text(chosen["prompt"]), images, event)
            yield from _updates(events, labels, studio, event)

    _connect(run, [scales, *shared.values()], outputs, stops, [scales.submit])


def _edit_tab(studio: Studio, shared: dict[str, Any], stops: "_Stops") -> None:
    with gr.Row():
        picture = _image_input("Image")
        mask = _image_input("Mask (optional): white is repainted")
    strength = gr.Slider(0.05, 1, value=0.6, step=0.05, label="Strength: how much may change")
    outputs = _result(columns=2, label="Change the image")

    def run(
        request: gr.Request, image: str | None, area: str | None, share: float, *values: Any
    ) -> Iterator[Update]:
        chosen = dict(zip(shared, values, strict=True))
        with _Messages(), stops.of(request) as event:
            if image is None:
                raise ValueError("image: none given; drop one into the field Image")
            config = EditConfig(
                bundle=chosen["bundle"],
                init_image=image,
                mask=area,
                strength=share,
                seed=_seed(chosen),
                num_images=_num_images(chosen, studio),
                batch_size=1,
                **_stock(_settings(chosen)),
            )
            labels = [f"seed {config.seed + number}" for number in range(config.num_images)]
            # Without a prompt these are variations.
            prompt = (chosen["prompt"] or "").strip()
            yield from _updates(studio.edit(prompt, config, event), labels, studio, event)

    inputs = [picture, mask, strength, *shared.values()]
    _connect(run, inputs, outputs, stops)


def _image_input(label: str) -> Any:
    """Adds a field for an image file, which answers another file with a message."""
    field = gr.Image(label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"])
    read = field.preprocess  # opens the file; read_image decodes and checks it

    def preprocess(payload: Any) -> Any:
        try:
            return read(payload)
        except OSError as error:
            raise _message(f"image: {error}") from error

    # A subclass would do, but gradio writes a stub file beside the module that defines one.
    field.preprocess = preprocess
    return field


def _result(*, columns: int, label: str = "Generate") -> tuple[Any, Any, Any, Any]:
    """Adds buttons, gallery and status line."""
    with gr.Row():
        button = gr.Button(label, variant="primary", min_width=140, scale=3)
        stop = gr.Button("Stop", min_width=80, scale=1, interactive=False)
    gallery = gr.Gallery(
        label="Pictures",
        columns=columns,
        fit_columns=False,
        height="auto",
        object_fit="contain",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_classes="gallery",
    )
    return button, stop, gallery, gr.Markdown("")


def _connect(
    run: Any,
    inputs: list[Any],
    outputs: tuple[Any, Any, Any, Any],
    stops: "_Stops",
    triggers: Sequence[Any] = (),
) -> None:
    """Runs `run` at a click and at the triggers; one runs at a time, the others wait."""
    button, stop, gallery, status = outputs
    gr.on(
        [button.click, *triggers],
        run,
        inputs,
        [gallery, status, stop],
        concurrency_limit=1,
        concurrency_id="draw",
        show_progress="hidden",
    )
    stop.click(stops.set, None, None, queue=False)


class _Stops:
    """What Stop stops: the drawings of one visitor.

    gradio could cancel the events itself, but a click at the very start is lost, and leaves a page
    that waits for ever.
    """

    def __init__(self) -> None:
        self._events: defaultdict[str | None, list[threading.Event]] = defaultdict(list)

    @contextmanager
    def of(self, request: gr.Request) -> Iterator[threading.Event]:
        """Yields the event that is set when this visitor presses Stop."""
        events, event = self._events[request.session_hash], threading.Event()
        events.append(event)
        try:
            yield event
        finally:
            events.remove(event)

    def set(self, request: gr.Request) -> None:
        for event in self._events[request.session_hash]:
            event.set()


def _updates(
    events: Generator[Event], labels: list[str], studio: Studio, stop: threading.Event
) -> Iterator[Update]:
    """Yields the gallery, the status line and the button Stop after each event."""
    done: list[tuple[Any, str]] = []
    total = len(labels)
    shown, status = list(done), "Loading ..."
    yield shown, status, gr.Button(interactive=True)
    with closing(events):
        for event in events:
            if isinstance(event, Waiting):
                status = event.reason or status
            elif isinstance(event, Progress):
                shown = [*done, (event.picture, f"{labels[event.number]} ...")]
                status = f"Picture {event.number + 1} of {total}, step {event.step} of "
                status += str(event.num_steps)
            else:
                done.append((str(event.path), labels[event.number]))
                shown, status = list(done), f"{len(done)} of {total} pictures"
            yield shown, status, gr.skip()
    where = f"saved in {short_name(studio.out)}"
    status = f"{'Stopped. ' if stop.is_set() else ''}{len(done)} of {total} pictures, {where}"
    yield list(done), status, gr.Button(interactive=False)


class _Messages:
    """Shows a ValueError in the page; any other error is a fault and keeps its traceback."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, ValueError):
            raise _message(str(error)) from error


def _message(text: str) -> gr.Error:
    # The page would render HTML, which an error may quote.
    return gr.Error(html.escape(text, quote=False), duration=None, print_exception=False)


def _settings(chosen: Mapping[str, Any]) -> DrawSettings:
    """Returns the settings of the shared fields; raises ValueError with what is wrong."""
    scale, negative = chosen["guidance_scale"], (chosen["negative_prompt"] or "").strip()
    return DrawSettings(
        guidance_scale=scale,
        num_steps=_whole("steps", chosen["num_steps"], least=1, most=MAX_STEPS),
        scheduler=chosen["scheduler"],
        # Without guidance it would be refused; the field says so.
        negative_prompt="" if scale == 1 else negative,
    )


def _stock(settings: DrawSettings) -> dict[str, Any]:
    """Returns the settings that image to image has."""
    names = ("guidance_scale", "num_steps", "scheduler", "negative_prompt")
    return {name: getattr(settings, name) for name in names}


def _seed(chosen: Mapping[str, Any]) -> int:
    return _whole("seed", chosen["seed"], least=0, most=SEED_LIMIT - 1)


def _num_images(chosen: Mapping[str, Any], studio: Studio) -> int:
    return _whole("images", chosen["num_images"], least=1, most=studio.config.max_images)


def _whole(name: str, value: Any, *, least: int, most: int) -> int:
    """Returns a number of the page, which may be a float; raises ValueError if it is not whole."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    check_number(name, value, least=least, most=most, whole=True)
    return int(value)


def _text(prompt: Any) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("prompt: expected what the picture shows, found an empty text")
    return prompt.strip()
