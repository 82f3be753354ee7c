"""Slide and prompt: the length asked for, the prompt kept, one sound over the seams, constant memory, refusals."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from audiolm.generate.load import load
from audiolm.generate.long_form import stream
from tests.worlds.layouts import TIMED
from tests.worlds.tiny_system import PLAIN, RUN, build, voice


@pytest.fixture(scope="module", params=[{"dedupe": False}, {"dedupe": False, "kind": "frame"}, TIMED],
                ids=["frames", "frame-wise", "lengths"])
def lm(request, tmp_path_factory):
    return load(build(str(tmp_path_factory.mktemp("plain")), **request.param), mean_run=RUN)


def test_windows_join_to_one_sound_of_the_length_asked_for(lm, monkeypatch):
    prompt, seen, decode = voice(0.6), [], lm.decode
    monkeypatch.setattr(lm, "decode", lambda codes, *rest: seen.append(codes) or decode(codes, *rest))
    pieces = list(stream(lm, prompt, 5.13, 3, **PLAIN))
    wav_T = np.concatenate(pieces)
    assert len(wav_T) == 9_600 + round(5.13 * 16_000) and len(pieces) > 4
    np.testing.assert_array_equal(seen[0][:30], lm.encode([prompt])[0])
    whole = seen[0]
    for codes in seen[1:]:  # 30 semantic frames are 60 acoustic ones
        np.testing.assert_array_equal(codes[:60], whole[-60:])
        whole = np.concatenate([whole, codes[60:]])
    np.testing.assert_allclose(wav_T, decode(whole, len(wav_T)), atol=1e-5)  # as if decoded at once
    assert len({c.tobytes() for c in whole}) > 50


def test_the_same_seed_gives_the_same_sound_and_eos_ends_it(lm):
    one, two, other = (np.concatenate(list(stream(lm, voice(0.6), 3.0, s, **PLAIN))) for s in (3, 3, 4))
    assert np.array_equal(one, two) and not np.array_equal(one, other)
    lengths = {len(np.concatenate(list(stream(lm, None, 4.0, s, window_s=2.0, overlap_s=1.2)))) for s in range(6)}
    assert min(lengths) < 64_000


def test_refusals(lm, tmp_path):
    with pytest.raises(ValueError, match="lm.lengths: false"):
        stream(load(build(str(tmp_path)), mean_run=RUN), None, 20.0, 0)
    with pytest.raises(ValueError, match=r"fills the window of 2 s"):
        stream(lm, voice(2.1), 4.0, 0, overlap_s=1.0)
    with pytest.raises(ValueError, match="overlap"):
        stream(lm, None, 4.0, 0, overlap_s=3.0)
    with pytest.raises(ValueError, match="seconds"):
        stream(lm, None, 0.0, 0, overlap_s=1.0)


def test_60_seconds_take_the_memory_of_10(tmp_path):
    code = f"""
import resource
from tests.worlds.layouts import TIMED
from tests.worlds.tiny_system import PLAIN, RUN, build
from audiolm.generate.load import load
from audiolm.generate.long_form import stream
lm = load(build({str(tmp_path)!r}, dedupe=False), mean_run=RUN)
for seconds in (10.0, 60.0):
    print(sum(map(len, stream(lm, None, seconds, 0, **PLAIN))), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    (ten, before), (sixty, after) = (map(int, printed[i:i + 2]) for i in (0, 2))
    assert (ten, sixty) == (160_000, 960_000)
    assert after < before + 8_192  # kB
