"""The codec's command line: round trip, what is skipped, refused, stopped and measured."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import safetensors.numpy
import soundfile as sf
import torch

from audiolm import pretrained
from audiolm import store as stores
from audiolm.data import audio
from audiolm.tokenizers import codec_files
from audiolm.tokenizers.acoustic import AcousticTokenizer, load_codec
from audiolm.tokenizers.codec_lookup import open_codec
from tests.worlds.tiny_codec import built_codec, noise, voice, whole_codes
from workflows import codec as command

CORPUS = {"a.wav": (16_000, 1, 20_011), "deep/er/b.flac": (44_100, 2, 50_000), "deep/c.ogg": (8_000, 1, 4_000),
          "short.wav": (48_000, 1, 480)}


def write_corpus(place: str, tmp_path) -> None:
    for i, (name, (rate, channels, frames)) in enumerate(CORPUS.items()):
        local = tmp_path / f"{i}.{name[-3:]}".replace("lac", "flac")
        sf.write(local, noise(frames, channels, index=i), rate)
        stores.put(f"{place}/{name}", local.read_bytes())
    stores.put(f"{place}/notes.txt", b"no audio")
    stores.put(f"{place}/.hidden.wav", b"no audio")


def run(*argv: str) -> int:
    return command.main([*argv, "--device", "cpu"])


def test_a_folder_makes_the_round_trip(store, tmp_path, built, codec, capsys):
    source, out, again = (stores.join(store, name) for name in ("in", "codes", "again"))
    write_corpus(source, tmp_path)
    assert run("encode", source, "--codec", built, "--out", out) == 0
    said = capsys.readouterr().out
    assert "4 done" in said and "x real time" in said and "deep/er/b.flac  1.13 s of audio" in said and "0.60 kb/s" in said
    assert stores.names(out) == ["a.safetensors", "deep", "short.safetensors"]
    assert run("decode", out, "--codec", built, "--out", again) == 0
    assert stores.names(f"{again}/deep") == ["c.wav", "er"] and stores.names(f"{again}/deep/er") == ["b.wav"]
    for name, (rate, _, frames) in CORPUS.items():
        wav_T = np.concatenate(list(audio.stream(f"{source}/{name}")))
        codes_TQ, meta = codec_files.read_codes(f"{out}/{name.rsplit('.', 1)[0]}.safetensors")
        assert np.array_equal(codes_TQ, whole_codes(codec, wav_T).numpy()) and codes_TQ.dtype == np.uint16
        assert meta == {**meta, "codec": codec.hash, "name": "soundstream", "sample_rate": "16000", "hop": "320", "n_q": "3",
                        "vocab": "16", "samples": str(-(-frames * 16_000 // rate)), "source": name}
        made_T, made_hz = audio.decode(f"{again}/{name.rsplit('.', 1)[0]}.wav")
        expected_T = codec.decode(torch.from_numpy(codes_TQ.astype(np.int64))[None])[0, :len(wav_T)].numpy()
        assert made_hz == 16_000 and len(made_T) == len(wav_T)
        np.testing.assert_allclose(made_T, expected_T.clip(-1, 1), atol=1e-4)  # 16 bits


def test_what_is_done_is_skipped_and_what_changed_is_made_again(tmp_path, built, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus("in", tmp_path)
    encode = ("encode", "in", "--codec", built, "--out", "codes")
    decode = ("decode", "codes", "--codec", built, "--out", "again", "--format", "flac")

    def said(*argv: str) -> str:
        assert run(*argv) == 0
        return capsys.readouterr().out.splitlines()[-1]

    assert said(*encode).startswith("4 done:") and said(*encode) == "4 skipped"
    assert said(*decode).startswith("4 done:") and said(*decode) == "4 skipped"
    (tmp_path / "codes/a.safetensors").unlink()
    (tmp_path / "again/a.flac").write_bytes(b"cut off")
    assert said(*encode).startswith("1 done, 3 skipped:") and said(*decode).startswith("1 done, 3 skipped:")
    sf.write(tmp_path / "in/a.wav", noise(20_011, index=9), 16_000)  # the same length, another sound
    assert said(*encode).startswith("1 done, 3 skipped:") and said(*decode).startswith("1 done, 3 skipped:")
    assert said(*encode, "--force").startswith("4 done:") and said(*decode, "--force").startswith("4 done:")
    other = built_codec(str(tmp_path / "other"), seed=1)
    assert said("encode", "in", "--codec", other, "--out", "codes").startswith("4 done:")


def test_names_that_leave_no_room_for_another_ending_make_the_round_trip(tmp_path, built, capsys):
    names = ["a" * 251, "a" * 250 + "b", "é" * 125, "12::30", "b" * 220]
    (tmp_path / "in").mkdir()
    for i, name in enumerate(names):
        sf.write(f"{tmp_path}/in/{name}.wav", noise(4000, 1, index=i), 16_000)
    assert run("encode", f"{tmp_path}/in", "--codec", built, "--out", f"{tmp_path}/codes") == 0
    assert run("decode", f"{tmp_path}/codes", "--codec", built, "--out", f"{tmp_path}/again") == 0
    assert len(stores.names(f"{tmp_path}/again")) == len(names) and "12::30.wav" in stores.names(f"{tmp_path}/again")
    assert "5 done" in capsys.readouterr().out
    assert run("encode", f"{tmp_path}/in", "--codec", built, "--out", f"{tmp_path}/codes") == 0
    assert "5 skipped" in capsys.readouterr().out


def test_levels_take_a_prefix(tmp_path, built, codec, capsys):
    path, (full, few, out) = tmp_path / "a.wav", (str(tmp_path / n) for n in ("full", "few", "out"))
    sf.write(path, noise(16_000), 16_000)
    assert run("encode", str(path), "--codec", built, "--out", full) == 0
    assert run("encode", str(path), "--codec", built, "--out", few, "--levels", "2") == 0
    assert "0.40 kb/s" in capsys.readouterr().out
    all_TQ, two_TQ = (codec_files.read_codes(f"{place}/a.safetensors")[0] for place in (full, few))
    assert two_TQ.shape == (50, 2) and np.array_equal(two_TQ, all_TQ[:, :2])
    for source, levels in ((full, "2"), (few, "2")):
        assert run("decode", source, "--codec", built, "--out", out, "--levels", levels, "--force") == 0
        expected_T = codec.decode(torch.from_numpy(two_TQ.astype(np.int64))[None])[0].numpy()
        np.testing.assert_allclose(audio.decode(f"{out}/a.wav")[0], expected_T, atol=1e-4)
    assert run("decode", few, "--codec", built, "--out", out, "--levels", "3") == 1
    assert "holds 2 levels, --levels asks for 3" in capsys.readouterr().err
    assert run("encode", str(path), "--codec", built, "--out", few, "--levels", "4") == 2
    assert "--levels 4: this codec has 1 to 3" in capsys.readouterr().err


def test_bad_audio_is_told_and_the_rest_goes_on(tmp_path, built, capsys):
    folder, good = tmp_path / "in", noise(32_000)
    folder.mkdir()
    sf.write(folder / "good.wav", good, 16_000)
    sf.write(folder / "whole.flac", good, 16_000)
    sf.write(folder / "nan.wav", np.where(np.arange(32_000) == 24_000, np.nan, good), 16_000, subtype="FLOAT")
    sf.write(folder / "header.wav", good[:0], 16_000)
    (folder / "bytes.wav").write_bytes(b"")
    (folder / "text.mp3").write_bytes(b"this is no sound " * 100)
    (folder / "cut.wav").write_bytes((folder / "good.wav").read_bytes()[:20_000])
    (folder / "half.flac").write_bytes((folder / "whole.flac").read_bytes()[:20_000])
    sf.write(folder / "ok.ogg", good, 16_000)
    (folder / "stops.ogg").write_bytes((folder / "ok.ogg").read_bytes()[:-2000])
    loud_first_T = np.concatenate([noise(64_000), noise(64_000) / 1000])
    sf.write(folder / "guess.mp3", loud_first_T, 16_000, bitrate_mode="VARIABLE", compression_level=0.5)
    sound = (folder / "guess.mp3").read_bytes()  # without its first frame, which counts the others
    (folder / "guess.mp3").write_bytes(sound[sound.find(sound[:2], 4):])
    out = tmp_path / "out"
    missing = str(tmp_path / "missing.wav")
    assert run("encode", str(folder), missing, "--codec", built, "--out", str(out)) == 1
    said = capsys.readouterr()
    assert "4 done, 8 failed" in said.out
    assert sorted(p.name for p in out.iterdir()) == [f"{n}.safetensors" for n in ("good", "guess", "ok", "whole")]
    assert 128_000 <= int(codec_files.read_codes(f"{out}/guess.safetensors")[1]["samples"]) < 130_000
    errors = dict(line.removeprefix("error: ").split(".", 1) for line in said.err.replace(f"{tmp_path}/", "").splitlines())
    for name, text in {"in/nan": "the sample at 1.500 s is NaN or infinite", "in/header": "is empty", "in/bytes": "is empty",
                       "in/text": "no audio that can be read", "in/cut": "truncated", "in/half": "truncated",
                       "in/stops": "truncated", "missing": "no such file"}.items():
        assert text in errors[name], (name, errors[name])


def tamper(path: str, codes_TQ: np.ndarray, **meta: str) -> None:
    _, old = codec_files.read_codes(path)
    stores.put(path, safetensors.numpy.save({"codes": codes_TQ}, {**old, **meta}))


def test_codes_that_are_not_this_codec_s_are_refused(tmp_path, built, codec, capsys):
    sf.write(tmp_path / "a.wav", noise(6400), 16_000)
    folder, out, bad = str(tmp_path / "codes"), tmp_path / "out", str(tmp_path / "codes/a.safetensors")
    assert run("encode", str(tmp_path / "a.wav"), "--codec", built, "--out", folder) == 0

    def refusal(with_codec: str = built) -> str:
        assert run("decode", folder, "--codec", with_codec, "--out", str(out)) == 1
        assert not out.exists() or not list(out.iterdir())
        return capsys.readouterr().err

    other = built_codec(str(tmp_path / "other"), seed=1)
    message = refusal(other)
    assert codec.hash in message and load_codec(other).hash in message and "--codec" in message
    codes_TQ, _ = codec_files.read_codes(bad)
    tamper(bad, np.where(codes_TQ > 14, 16, codes_TQ).astype(np.uint16) + np.uint16(16))
    assert "this codec has codes 0 to 15" in refusal()
    tamper(bad, np.zeros((20, 4), np.uint16))
    assert "holds 4 levels, this codec has 3" in refusal()
    tamper(bad, np.zeros((20, 3), np.uint16))
    for wrong in ({"samples": "6401"}, {"samples": "many"}, {"format": "another 1"}):
        data = safetensors.numpy.save({"codes": codes_TQ}, {**files_meta(codec), **wrong})
        stores.put(bad, data)
        assert "is no whole codes file" in refusal(), wrong
    stores.put(bad, data[:-10])
    assert "is no whole codes file" in refusal()
    stores.put(bad, stores.get(f"{built}/export/model.safetensors"))
    assert "is no whole codes file" in refusal()


def files_meta(codec: AcousticTokenizer) -> dict[str, str]:
    return {"format": codec_files.FORMAT, "codec": codec.hash, "hop": "320", "samples": "6400"}


def test_a_stopped_decode_leaves_nothing(tmp_path, codec):
    sf.write(tmp_path / "a.wav", noise(6400), 16_000)
    job = codec_files.FileJob("a.wav", str(tmp_path / "a.wav"), str(tmp_path / "codes/a.safetensors"))
    assert codec_files.encode_file(codec, job, 3, False, lambda done_s, of_s: None).audio_s == 0.4
    seen = []

    def stop(done_s: float, of_s: float) -> None:
        seen.append((done_s, of_s, len(list((tmp_path / "out").iterdir()))))
        raise KeyboardInterrupt

    back = codec_files.FileJob("a", job.target, str(tmp_path / "out/a.wav"))
    with pytest.raises(KeyboardInterrupt):
        codec_files.decode_file(codec, back, None, "wav", False, stop)
    assert seen == [(0.4, 0.4, 1)] and list((tmp_path / "out").iterdir()) == []


def test_the_codec_is_found_by_build_and_by_run(tmp_path, built, codec, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "ROOT", str(tmp_path))  # without a published codec
    sf.write("a.wav", noise(640), 16_000)
    for argv, message in (((), "train a codec with `python workflows/full_pipeline.py`"),
                          (("--codec", "runs/x.json"), "there is no run index runs/x.json"),
                          (("--codec", str(tmp_path)), "holds no codec")):
        assert run("encode", "a.wav", "--out", "o", *argv) == 2
        assert message in capsys.readouterr().err
    stores.put_json("outputs/runs/quickstart.json", {"steps": {"codec": {"path": built}}})
    stores.put_json("young.json", {"steps": {"manifest": {"path": "x"}}})
    assert run("encode", "a.wav", "--out", "o") == 0 and stores.exists("o/a.safetensors")
    assert run("encode", "a.wav", "--out", "o", "--codec", "young.json") == 2
    assert "names no finished step `codec`" in capsys.readouterr().err


def test_the_plan_keeps_relative_names_and_refuses_collisions(tmp_path):
    for name in ("b/x10.wav", "b/x2.WAV", "b/c/y.mp3", "b/.z.wav", "b/.d/z.wav", "odd.name"):
        stores.put(f"{tmp_path}/{name}", b"")
    jobs = codec_files.plan([f"{tmp_path}/b/", f"{tmp_path}/odd.name"], (".wav", ".mp3"), "s3://bucket/o/", ".safetensors")
    assert [(j.name, j.target.removeprefix("s3://bucket/o/")) for j in jobs] == [
        ("c/y.mp3", "c/y.safetensors"), ("x2.WAV", "x2.safetensors"), ("x10.wav", "x10.safetensors"),
        ("odd.name", "odd.safetensors")]
    stores.put(f"{tmp_path}/b/x2.mp3", b"")
    with pytest.raises(ValueError, match=r"x2\.mp3 and .*x2\.WAV|x2\.WAV and .*x2\.mp3"):
        codec_files.plan([f"{tmp_path}/b"], (".wav", ".mp3"), "o", ".safetensors")
    with pytest.raises(ValueError, match="no files ending in .wav below"):
        codec_files.plan([f"{tmp_path}/b/c"], (".wav",), "o", ".safetensors")


def test_long_files_show_how_far_they_are_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(codec_files, "REDRAW_S", 0.0)

    def do(job: codec_files.FileJob, tick: codec_files.Tick) -> codec_files.FileResult:
        tick(30.0, 120.0)
        return codec_files.FileResult(120.0, 6.0)

    assert codec_files.work([codec_files.FileJob("a.wav", "a.wav", "a")], do) == 0
    said = capsys.readouterr().out
    assert "\ra.wav   25 %" in said and "\x1b[Ka.wav  120.00 s of audio" in said


def test_an_imported_codec_goes_by_pieces(tmp_path, monkeypatch):
    """DAC at 24 kHz: cut in pieces of 2 s with what it sees on both sides, codes and sound are those of the whole."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    transformers.DacModel(transformers.DacConfig(
        sampling_rate=24_000, encoder_hidden_size=2, decoder_hidden_size=16, downsampling_ratios=[2, 4, 5, 8], n_codebooks=4,
        codebook_size=64)).save_pretrained(tmp_path / "dac")
    codec = open_codec(str(tmp_path / "dac"))
    monkeypatch.setattr(codec_files, "PIECE_S", 2.0)
    wav_T = noise(24_000 * 7 + 1234)
    sf.write(tmp_path / "a.wav", wav_T, 24_000, subtype="FLOAT")
    argv = ("--codec", str(tmp_path / "dac"), "--out", str(tmp_path / "o"))
    assert run("encode", str(tmp_path / "a.wav"), *argv) == 0
    codes_TQ, meta = codec_files.read_codes(f"{tmp_path}/o/a.safetensors")
    expected_TQ = whole_codes(codec, wav_T)
    assert codes_TQ.shape == (529, 4) and (codes_TQ == expected_TQ.numpy()).mean() > 0.999 and meta["sample_rate"] == "24000"
    assert run("decode", f"{tmp_path}/o/a.safetensors", *argv) == 0
    made_T, rate = audio.decode(f"{tmp_path}/o/a.wav")
    whole_T = codec.decode(torch.from_numpy(codes_TQ.astype(np.int64))[None])[0, :len(wav_T)].numpy()
    assert rate == 24_000 and len(made_T) == len(wav_T)
    np.testing.assert_allclose(made_T, whole_T.clip(-1, 1), atol=1e-4)


def test_evaluate_prints_the_codec_beside_others(tmp_path, built, capsys):
    sounds = tmp_path / "in"
    sounds.mkdir()
    for i in range(3):
        sf.write(sounds / f"{i}.wav", voice(48_000, i).numpy(), 16_000)
    out = tmp_path / "out"
    argv = ("evaluate", str(sounds), "--codec", built, "--clips", "2", "--seconds", "1", "--metrics", "pesq,si_sdr_db,mel,f0",
            "--inline", "--out", str(out), "--levels")
    assert run(*argv, "1", "3") == 0
    text, table = capsys.readouterr().out, stores.get_json(f"{out}/table.json")
    assert "2 clips, 2.0 s" in text and "SI-SDR" in text and "F0 correlation" in text
    ours = [row for row in table["rows"] if row["role"] == "ours"]
    assert [(row["levels"], round(row["kbps"], 2)) for row in ours] == [(1, 0.2), (3, 0.6)]
    assert table["rows"][0]["codec"] == "original" and table["rows"][0]["mel"]["value"] == 0
    assert {row["role"] for row in stores.get_json(f"{out}/rows.json")} == {"ours", "ceiling", "floor", "baseline"}
    assert "<audio" not in (out / "report.html").read_text() and len(os.listdir(out / "parts")) == 2 * 6
    assert run(*argv, "9") == 2 and "has 1 to 3" in capsys.readouterr().err
    assert run(*argv, "some") == 2 and "--levels some: give numbers from 1, or all" in capsys.readouterr().err
    assert run(*argv, "1", "--metrics", "pesk") == 2 and "--metrics pesk: there are pesq" in capsys.readouterr().err
    (sounds / "1.wav").write_bytes(b"not audio")
    assert run(*argv, "all", "--clips", "3", "--seconds", "0.5", "--metrics", "mel") == 0
    printed = capsys.readouterr()
    assert "left out" in printed.err and "1.wav" in printed.err and "2 clips" in printed.out


def test_decode_does_not_replace_what_it_did_not_make(tmp_path, built, capsys):
    sf.write(tmp_path / "a.wav", voice(16_000, 0).numpy(), 16_000)
    mine = (tmp_path / "a.wav").read_bytes()
    assert run("encode", str(tmp_path / "a.wav"), "--codec", built, "--out", str(tmp_path)) == 0
    decode = ("decode", str(tmp_path / "a.safetensors"), "--codec", built, "--out", str(tmp_path))
    assert run(*decode) == 1 and (tmp_path / "a.wav").read_bytes() == mine
    assert "was not made by decode" in capsys.readouterr().err
    assert run(*decode, "--force") == 0 and (tmp_path / "a.wav").read_bytes() != mine
