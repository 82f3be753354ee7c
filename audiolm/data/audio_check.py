"""Is a named file audio that can be read, and what is wrong with it in words for people.

For commands that take audio files; the manifest has `data.scan`, which this asks.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from audiolm import store
from audiolm.data import audio, scan


def error_line(path: str, e: Exception) -> str:
    """One line that names the file and what was wrong with it."""
    text = "no such file" if isinstance(e, FileNotFoundError) else " ".join(str(e).split()) or type(e).__name__
    return text if path in text else f"{path}: {text}"


def check_audio(path: str) -> tuple[str, float]:
    """(content hash, seconds as the header tells) of an audio file. Raises ValueError for what libsndfile would forgive."""
    fs, p = store.open_fs(path)
    size = int(fs.info(p)["size"])
    if not size:
        raise ValueError(f"{path} is empty: it holds no bytes")
    head, tail = scan.edges(path, size)
    try:
        scan.check_container(head, tail, size)
    except scan.Unusable as e:
        raise ValueError(f"{path}: {e.args[0]}: {e.args[1]}; get the file again") from e
    with audio_errors(path), audio.open_sound(path) as f:
        rate, frames = f.samplerate, f.frames
    if not scan.RATES_HZ[0] <= rate <= scan.RATES_HZ[1]:
        raise ValueError(f"{path} says {rate} Hz; from {scan.RATES_HZ[0]} to {scan.RATES_HZ[1]} are read")
    if not scan.counts_frames(head):  # an MP3 whose length libsndfile guesses, and stops there
        with tempfile.TemporaryDirectory() as folder, open(store.local_copy(path, folder), "rb") as raw:
            with mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
                if scan.mp3_samples(data) > 1.02 * frames + 10 * 1152:
                    raise ValueError(f"{path}: a variable-rate MP3 without the Xing header that tells its length would be cut "
                                     "short; rewrite it with: ffmpeg -i IN.mp3 -c copy OUT.mp3")
    return scan.content_hash(head, tail, size), frames / rate


@contextmanager
def audio_errors(path: str) -> Iterator[None]:
    import soundfile

    try:
        yield
    except soundfile.SoundFileError as e:
        text = getattr(e, "error_string", str(e)).strip(" .")
        raise ValueError(f"{path} is no audio that can be read, or is cut off ({text}); give wav, flac, ogg, opus or "
                         "mp3") from e
