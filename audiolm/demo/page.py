"""The demo page: fields, players and spectrograms in gradio, served on this machine without the internet.

Requests are answered one after another.  Uploads and sounds lie in a temporary folder that is emptied hourly and goes with the
server; the page reads no other file.  gradio is imported within functions.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from audiolm.data.audio import wav_bytes
from audiolm.demo.sounds import MAX_SAMPLES, OPEN_ENDED, Request, TitledSound, answer, ladder
from audiolm.generate.audiolm import AudioLM
from audiolm.generate.params import STAGES
from audiolm.generate.prompts import MIN_PROMPT_S, PROMPT_S
from audiolm.render.plots import spectrogram

if TYPE_CHECKING:
    import gradio

MODES = {"Continue the recording": "continuation", "Its words in new voices": "acoustic", "The codec alone": "resynthesis",
         "Without a recording": "unconditional"}
MAX_MB = 50  # of an upload
MAX_WAITING = 8  # requests; further ones are refused
KEEP_S = 3600  # an upload, and a sound that was made
LADDER_TEXT = ("The beginning of the recording, prompt and new seconds together, with one more stage of the system at each "
               "rung. What is wrong from a rung on comes from that rung's stage. Mel distances are to the original.")


@contextmanager
def serving(lm: AudioLM, run: str, longest_s: float, host: str, port: int | None) -> Iterator[str]:
    """The address of a page that is served within the block. `port` None: the first free one from 7860 on.

    `longest_s`: of a sound, its prompt included. Raises ValueError where the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="audiolm-demo-") as folder:
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder)  # before gradio's import
        import gradio as gr

        page = build(lm, run, longest_s)
        page.queue(max_size=MAX_WAITING, api_open=False)  # no way around the queue
        try:
            url = page.launch(server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False,
                              ssr_mode=False, footer_links=[], max_file_size=MAX_MB * 2**20,
                              theme=gr.themes.Default(font=("system-ui", "sans-serif")))[1]
        except OSError as e:
            reason = str(e).split(". ")[0]  # what follows names gradio's parameters
            raise ValueError(f"--host {host} --port {port or 7860}: {reason}; give another --port") from e
        try:
            yield url
        finally:
            page.close(verbose=False)


def build(lm: AudioLM, run: str, longest_s: float) -> gradio.Blocks:
    """The page of a system."""
    import gradio as gr

    with gr.Blocks(title=f"AudioLM: {run}", analytics_enabled=False, delete_cache=(KEEP_S, KEEP_S)) as page:
        gr.Markdown(f"# AudioLM: {run}\nSpeak or upload a few seconds and hear how the model goes on. "
                    f"A sound lasts at most {longest_s:g} s.")
        with gr.Row():
            with gr.Column(min_width=300):
                fields = _fields(lm, longest_s)
                go = gr.Button("Generate", variant="primary")
            with gr.Column(min_width=300):
                status = gr.Markdown("The sounds appear here.")
                shown = _players(1 + MAX_SAMPLES)
        with gr.Accordion("Each stage of the ladder", open=False):
            gr.Markdown(LADDER_TEXT)
            climb = gr.Button("Build the ladder")
            rung_status = gr.Markdown("The rungs appear here.")
            rungs = _players(6 if lm.has_fine else 4)
        for button, make, line, players, name in ((go, answer, status, shown, "generate"),
                                                  (climb, ladder, rung_status, rungs, "ladder")):
            button.click(partial(_respond, partial(make, lm, longest_s=longest_s), len(players) // 2), fields,
                         [line, *players], api_name=name, show_progress_on=line, concurrency_limit=1, concurrency_id="model")
    return page


def _fields(lm: AudioLM, longest_s: float) -> list[Any]:
    """Components in the order of `_respond`'s arguments."""
    import gradio as gr

    prompt_s = min(PROMPT_S, longest_s / 2)
    recording = gr.Audio(type="filepath", label="Recording", buttons=[])
    mode = gr.Radio(list(MODES.items()), value="continuation", label="Mode")
    prompt = gr.Slider(MIN_PROMPT_S, longest_s, value=prompt_s, step=0.1, label="Prompt: first seconds of the recording")
    seconds = gr.Slider(0.5, longest_s, value=min(7.0, longest_s - prompt_s), step=0.1, label="New seconds, at most")
    samples = gr.Slider(1, MAX_SAMPLES, value=2, step=1, label="Sounds")
    own = [lm.sampling[stage].temperature for stage in STAGES]
    everywhere = gr.Slider(0, 2, value=own[0], step=0.05, label="Temperature",
                           info="Moving it sets all stages; 0 takes the most likely.")
    with gr.Accordion("Temperatures by stage, and the seed", open=False):
        has_fine = lm.has_fine or "parallel" in lm.models  # a parallel decoder has temperatures for coarse and fine levels
        stages = [gr.Slider(0, 2, value=value, step=0.05, label=stage, visible=stage != "fine" or has_fine)
                  for stage, value in zip(STAGES, own, strict=True)]
        seed = gr.Number(0, minimum=0, precision=0, label="Seed of the first sound")
    everywhere.input(lambda t: [t] * len(STAGES), everywhere, stages, queue=False, api_visibility="private")
    mode.change(lambda m: [gr.update(visible=m != "unconditional"), gr.update(visible=m == "continuation"),
                           gr.update(visible=m in OPEN_ENDED), gr.update(visible=m != "resynthesis")],
                mode, [recording, prompt, seconds, samples], queue=False, api_visibility="private")
    return [recording, mode, prompt, seconds, samples, seed, *stages]


def _players(count: int) -> list[Any]:
    """Hidden players, each followed by its spectrogram; one or two in a row, as the place allows."""
    import gradio as gr

    parts = []
    with gr.Row():
        for _ in range(count):
            with gr.Column(min_width=520):  # at most the width of the page
                parts += [gr.Audio(visible=False, interactive=False, buttons=["download"]),
                          gr.Image(visible=False, interactive=False, format="png", show_label=False, buttons=["fullscreen"])]
    return parts


def _respond(make: Callable[[Request], list[TitledSound]], count: int, recording: str | None, mode: str, prompt_s: float,
             seconds: float, samples: float, seed: int | None, *temperatures: float) -> list[Any]:
    """A line of text and the updates of `count` players. Raises gradio.Error with the line of a ValueError."""
    import gradio as gr

    began = time.monotonic()
    try:
        sounds = make(Request(recording, mode, prompt_s, seconds, int(samples), seed or 0,
                              dict(zip(STAGES, temperatures, strict=True))))
    except ValueError as e:
        raise gr.Error(str(e), duration=None, print_exception=False) from e
    return [f"Done in {time.monotonic() - began:.1f} s.", *_filled(sounds, count)]


def _filled(sounds: Sequence[TitledSound], count: int) -> Iterator[Any]:
    """Updates of `count` players and their pictures: the sounds, the rest hidden."""
    import gradio as gr
    from PIL import Image

    for sound in sounds:
        picture = Image.open(io.BytesIO(spectrogram(sound.wav_T, "", sound.prompt_s)))
        yield gr.update(value=wav_bytes(sound.wav_T), label=sound.title, visible=True)
        yield gr.update(value=picture, visible=True)
    for _ in range(2 * (count - len(sounds))):
        yield gr.update(value=None, visible=False)
