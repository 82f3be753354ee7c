"""A small set in SALMon's layout (2409.07437), made of anybody's recordings: a right and a wrong sound, sample_I_0.wav and
sample_I_1.wav, where the speaker, the background or the room changes halfway in the wrong one.

Pairs come in twos: what changes from a to b in the first pair changes from b to a in the second.  So a model that scores each
half by itself, and does not ask what came before, gets 50 %.  Both sounds of a pair last equally long.

It is not SALMon.  There the speakers read one sentence, cut at the same word; here each half is of another sentence, in the
right sound too.  There backgrounds and rooms are recordings; here they are noises, babble and decaying noise.  SALMon's
sentiment, alignment and backgrounds of one domain cannot be made of plain speech.

Each two pairs depend on the seed, the task and their number alone: a larger set begins with the smaller one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from audiolm import rng, store
from audiolm.data.audio import SAMPLE_RATE_HZ, decode, resample, wav_bytes
from audiolm.data.containers.layout import ENDINGS
from audiolm.models.augment import reverberated
from audiolm.tokenizers.codec_files import find_files

MIN_S, MAX_S = 3.0, 10.0  # of a recording
LEVEL = 0.05  # rms of each recording, so that loudness does not change with the speaker
SNR_DB = (0.0, 10.0)
FRAME = SAMPLE_RATE_HZ // 25  # samples; a recording is cut in the middle of its quietest one
NOISES = ("hiss", "rumble", "hum", "clicks", "babble")
VOICES = 4  # of babble
ROOMS = {"small": (0.15, 0.4), "large": (1.0, 2.5)}  # seconds until reverberation is 60 dB lower
WET = (0.3, 1.0)  # energy of the reverberation over that of the direct path

Wavs = tuple[np.ndarray, np.ndarray]
Speech = Mapping[str, Mapping[str, str]]  # of each speaker: paths by names below the folder of all


def make_set(speech: str, out: str, pairs: int, seed: int = 0, speakers: Sequence[str] | None = None,
             genders: Mapping[str, str] | None = None) -> dict[str, int]:
    """Writes `pairs` of each task to `out`; returns their numbers by task. The same call writes the same bytes.

    `speech`: a folder with a folder of recordings for each speaker; `speakers`: these alone; `genders`: of each speaker, for
    the task of gender.  Raises ValueError for an odd number, too few speakers or recordings, and where `out` holds another set.
    """
    files = speakers_of(speech, speakers)
    if pairs < 2 or pairs % 2 or len(files) < 2:
        raise ValueError(f"{pairs} pairs of {len(files)} speakers of {speech}: an even number and two speakers are needed, "
                         "each in a folder of its own")
    tasks: dict[str, Callable] = {"speaker_consistency": lambda draw: speaker_change(files, draw, lambda a, b: True)}
    if genders:
        if unknown := [name for name in files if name not in genders]:
            raise ValueError(f"the table of genders lacks the speakers {', '.join(unknown)}: add them, or name others")
        if len({genders[name] for name in files}) < 2:
            raise ValueError(f"all speakers of {speech} have one gender: add others, or leave the table out")
        tasks["gender_consistency"] = lambda draw: speaker_change(files, draw, lambda a, b: genders[a] != genders[b])
    tasks |= {"bg_all_consistency": lambda draw: background_change(files, draw),
              "rir_consistency": lambda draw: room_change(files, draw)}
    settings = {"pairs": pairs, "seed": seed, "speakers": list(files), "recordings": sum(map(len, files.values())),
                "tasks": list(tasks)}
    try:
        store.put_json(store.join(out, "set.json"), settings, exclusive=True)
    except FileExistsError:
        raise ValueError(f"{out} holds a set of other settings, as its set.json says: name another folder") from None
    for task, change in tasks.items():
        about = []
        for number in range(0, pairs, 2):
            one, other, sources = change(rng.generator(seed, task, number))
            for i, (right, wrong) in enumerate((one, other)):
                for side, wav_T in enumerate((right, wrong)):
                    store.put(store.join(out, task, f"sample_{number + i}_{side}.wav"), wav_bytes(wav_T))
            about.append({"indices": [number, number + 1], **sources})
        store.put_json(store.join(out, task, "metadata.json"), about)
    return dict.fromkeys(tasks, pairs)


def speakers_of(speech: str, only: Sequence[str] | None = None) -> Speech:
    """The recordings of each speaker, the first folder below `speech`. Raises ValueError for a speaker that is not there."""
    files: dict[str, dict[str, str]] = defaultdict(dict)
    for name, path in find_files([speech], ENDINGS):
        if "/" in name:
            files[name.split("/")[0]][name] = path
    if unknown := [name for name in only or () if name not in files]:
        raise ValueError(f"{speech} has no recordings of {', '.join(unknown)}; there are {', '.join(files) or 'none'}, the "
                         "folders just below it")
    return {name: files[name] for name in only or files}


def gender_table(path: str) -> dict[str, str]:
    """Genders by speaker of a table `ID | SEX | ...` with ; before remarks, LibriSpeech's SPEAKERS.TXT."""
    lines = store.get(path).decode().splitlines()
    rows = [[field.strip() for field in line.split("|")] for line in lines if "|" in line and not line.startswith(";")]
    return {row[0]: row[1] for row in rows}


def speaker_change(files: Speech, draw: np.random.Generator, differ: Callable[[str, str], bool]) -> tuple[Wavs, Wavs, dict]:
    """Two pairs of speakers a and b: in the first, a begins and a goes on, or b does; in the second, b begins.

    The two parts are of two recordings. Each is cut where its middle third is quietest; both second ones last equally long.
    """
    a = str(draw.choice(list(files)))
    b = str(draw.choice([name for name in files if name != a and differ(a, name)]))
    names, (a1, a2, b1, b2) = zip(*(r for name in (a, b) for r in recordings(files[name], draw, 2)), strict=True)
    begin_a, begin_b, end_a, end_b = a1[:pause(a1)], b1[:pause(b1)], a2[pause(a2):], b2[pause(b2):]
    n = min(len(end_a), len(end_b))
    aa, ab, ba, bb = (np.concatenate([begin, end[:n]]) for begin in (begin_a, begin_b) for end in (end_a, end_b))
    return (aa, ab), (bb, ba), {"speakers": [a, b], "recordings": names}


def background_change(files: Speech, draw: np.random.Generator) -> tuple[Wavs, Wavs, dict]:
    """Two pairs of one recording in two noises of different kinds, equally loud: one alone, or one and then the other."""
    kinds, snr_db = draw.choice(NOISES, 2, replace=False).tolist(), draw.uniform(*SNR_DB)
    ((name, wav_T),) = recordings(files[str(draw.choice(list(files)))], draw, 1)
    one, other = (wav_T + 10 ** (-snr_db / 20) * levelled(noise(kind, len(wav_T), files, draw)) for kind in kinds)
    return *crossed(one, other), {"recordings": [name], "noises": kinds, "snr_db": snr_db}


def room_change(files: Speech, draw: np.random.Generator) -> tuple[Wavs, Wavs, dict]:
    """Two pairs of one recording in a small and a large room: one alone, or one and then the other."""
    ((name, wav_T),) = recordings(files[str(draw.choice(list(files)))], draw, 1)
    rooms = {size: (draw.uniform(*decay_s), draw.uniform(*WET)) for size, decay_s in ROOMS.items()}
    seed = int(draw.integers(2**62))
    one, other = (levelled(reverberated(torch.from_numpy(wav_T), *room, SAMPLE_RATE_HZ, torch.Generator().manual_seed(seed))
                           .numpy()) for room in rooms.values())
    return *crossed(one, other), {"recordings": [name], "rooms": rooms}


def crossed(one: np.ndarray, other: np.ndarray) -> tuple[Wavs, Wavs]:
    """Two pairs of a recording that sounds in two ways: the right sound keeps one, the wrong one ends in the other."""
    half = len(one) // 2
    return ((one, np.concatenate([one[:half], other[half:]])), (other, np.concatenate([other[:half], one[half:]])))


def recordings(paths: Mapping[str, str], draw: np.random.Generator, n: int) -> list[tuple[str, np.ndarray]]:
    """(name, wav_T at LEVEL) of n of a speaker's recordings of MIN_S to MAX_S. Raises ValueError where there are fewer."""
    found, names = [], list(paths)
    for i in draw.permutation(len(names)):
        wav_T = resample(*decode(paths[names[i]]), SAMPLE_RATE_HZ)
        if MIN_S <= len(wav_T) / SAMPLE_RATE_HZ <= MAX_S and wav_T.any():
            found.append((names[i], levelled(wav_T)))
        if len(found) == n:
            return found
    raise ValueError(f"a speaker has {len(found)} recordings of {MIN_S:g} to {MAX_S:g} s, {names[0]} and others, and {n} are "
                     "needed: leave the speaker out, or cut recordings to such lengths")


def levelled(wav_T: np.ndarray) -> np.ndarray:
    return (LEVEL * wav_T / np.sqrt(np.mean(np.square(wav_T, dtype=np.float64)))).astype(np.float32)


def pause(wav_T: np.ndarray) -> int:
    """The middle of the quietest FRAME in the middle third, in samples."""
    first = len(wav_T) // 3 // FRAME
    power_N = np.square(wav_T[first * FRAME:2 * first * FRAME]).reshape(-1, FRAME).sum(1)
    return (first + int(power_N.argmin())) * FRAME + FRAME // 2


def noise(kind: str, n: int, files: Speech, draw: np.random.Generator) -> np.ndarray:
    """n samples of one of NOISES; babble is of VOICES recordings, each of any speaker."""
    if kind == "babble":
        names = draw.choice(list(files), VOICES)
        return np.sum([np.resize(recordings(files[str(name)], draw, 1)[0][1], n) for name in names], 0)
    if kind == "hum":
        phase_T, low_hz = 2 * np.pi * np.arange(n) / SAMPLE_RATE_HZ, draw.uniform(60, 240)
        return sum(draw.uniform(0.1, 1) * np.sin(k * low_hz * phase_T + draw.uniform(0, 2 * np.pi)) for k in range(1, 13))
    white_T = draw.standard_normal(n)
    if kind == "clicks":  # about 8 a second, each of 5 ms; the first keeps the noise from being silent
        starts_T = draw.random(n) < 8 / SAMPLE_RATE_HZ
        starts_T[0] = True
        since_T = np.arange(n) - np.maximum.accumulate(np.where(starts_T, np.arange(n), 0))
        return white_T * np.exp(-since_T / (0.005 * SAMPLE_RATE_HZ))
    spectrum = np.fft.rfft(white_T)
    at = np.linspace(0, 1, len(spectrum))
    return np.fft.irfft(spectrum * (at if kind == "hiss" else 1 / np.maximum(at, 0.01)), n)
