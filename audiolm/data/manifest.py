"""The manifest: every usable clip of a corpus with its speaker, split, source and place in the shards.

`build_manifest` is the step.  It writes clips.parquet (data/clips.py), and rejected.parquet: unusable audio with the
reason, and the listing of all files (data/listing.py).  The same corpus, config and seed give the same bytes, whatever the
number of workers.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from operator import attrgetter

from audiolm import rng, store
from audiolm.config.base import ConfigError
from audiolm.config.corpus import CorpusConfig
from audiolm.data import scan, sources
from audiolm.data.audio import SAMPLE_RATE_HZ
from audiolm.data.clips import Clip, Part, clips_parquet, parquet_bytes
from audiolm.data.inputs.found import ending
from audiolm.data.inputs.walk import LEFT_OUT
from audiolm.data.listing import file_hash, write_listing
from audiolm.data.parallel import parallel_map, thread_map
from audiolm.data.sources import SPLITS, Found
from audiolm.data.splits import assign
from audiolm.data.units import Unit

GROUP_BYTES = 512 << 20  # of audio files that one scan task decodes, a single larger file apart
REJECTED = ("start", "frames", "reason", "detail")  # as a scan writes them
LISTED = 10  # rejected files named in the error


def build_manifest(config: dict, inputs: dict, out) -> dict:
    """The manifest step; config {"corpus", "seed", "cluster"}, no inputs.

    Returns facts: clips, files, hours by source and split, speakers by split, rejected by reason, shards by split,
    listing (digest), remarks, summary.  Raises ConfigError for a source that cannot be read, for too many rejected
    files and for a corpus with nothing to train on."""
    corpus, seed = config["corpus"], config["seed"]
    if corpus.sample_rate != SAMPLE_RATE_HZ:
        raise ConfigError(f"corpus.sample_rate is {corpus.sample_rate}; the models take {SAMPLE_RATE_HZ} Hz, and "
                          f"audio of any rate is resampled to that: set it to {SAMPLE_RATE_HZ} or leave it out")
    found, entries = [], []
    for source in corpus.sources:
        f, e = sources.survey(source)
        found += f
        entries += [(source.name, x) for x in e]
    found, units, rejected, hashes = _scan(found, corpus, config["cluster"], out)
    left_out = Counter(ending(f.key) for f in found if f.fault and f.fault[0] == LEFT_OUT)
    tried = [f for f in found if not f.fault or f.fault[0] != LEFT_OUT]
    bad = [r for r in rejected if r["reason"] != LEFT_OUT]
    facts = {"files": len({(f.origin, f.uri) for f in tried}),
             "rejected": {"total": len(bad), **Counter(r["reason"] for r in bad)},
             **({"left_out": dict(left_out)} if left_out else {})}
    # Written before the checks, so that a corpus that is refused leaves the whole list of reasons.
    store.put(store.join(out.path, "rejected.parquet"), parquet_bytes(
        rejected, [("origin", "string"), ("uri", "string"), ("start", "int64"), ("frames", "int64"),
                   ("reason", "string"), ("detail", "string")]))
    _check_rejected(bad, len(tried), corpus)
    splits, remarks = assign(units, corpus, seed, hashes)
    remarks += _cancelled(units)
    clips = _hashed(cut_shards(join_units(units, splits, corpus.join_s), corpus.shard_s, seed), hashes)
    listing = _listing(entries, found, hashes)
    out.check()  # a worker that lost its lease writes nothing
    write_listing(out.path, listing)
    store.put(store.join(out.path, "clips.parquet"), clips_parquet(clips))
    return {**facts, **_facts(clips), "listing": _digest(listing), "remarks": remarks,
            "summary": _summary(clips, facts, remarks)}


def join_units(units: list[Unit], splits: list[str], join_s: float) -> list[Clip]:
    """Clips of one or more units: consecutive utterances of one speaker's chapter are joined up to `join_s` seconds.

    All units of a clip have one split and one rate.  Nothing is joined across an utterance that was rejected."""
    clips: list[tuple[str, list[Unit]]] = []
    seconds = 0.0
    for i, (u, split) in enumerate(zip(units, splits, strict=True)):
        # The open clip's last unit is always the unit before this one.
        if i and seconds + u.seconds <= join_s and split == splits[i - 1] and _follows(units[i - 1], u):
            clips[-1][1].append(u)
            seconds += u.seconds
        else:
            clips.append((split, [u]))
            seconds = u.seconds
    taken: Counter = Counter()
    return [_clip(members, split, taken) for split, members in clips]


def cut_shards(clips: list[Clip], shard_s: float, seed: int) -> list[Clip]:
    """The clips in order of their new (shard, row): shards of one split each, at most `shard_s` seconds or one clip.

    Shards of a split are about equally long.  A shuffle drawn from the seed makes them alike in content."""
    done: list[Clip] = []
    shard = 0
    for split in SPLITS:
        members = sorted((c for c in clips if c.split == split), key=lambda c: c.id)
        members = [members[i] for i in rng.generator(seed, f"shards {split}").permutation(len(members))]
        total = sum(c.seconds for c in members)
        even = total / max(1, -(-total // shard_s))  # the length at which the fewest shards are equally long
        row, seconds = 0, 0.0
        for c in members:
            # A new shard starts where the clip would not fit, or would end farther past `even` than it starts before.
            if row and (seconds + c.seconds > shard_s or seconds + c.seconds / 2 > even):
                shard, row, seconds = shard + 1, 0, 0.0
            done.append(replace(c, shard=shard, row=row))
            row, seconds = row + 1, seconds + c.seconds
        shard += bool(members)
    return done


def _hashed(clips: list[Clip], hashes: dict) -> list[Clip]:
    """The clips with their files' hashes, so that a token step knows a changed file without the listing."""
    return [replace(c, parts=tuple(replace(p, hash=hashes[c.origin, p.uri]) for p in c.parts)) for c in clips]


def _scan(found: list[Found], corpus: CorpusConfig, cluster, out) -> tuple[list[Found], list[Unit], list[dict], dict]:
    """(all sounds, containers by theirs, units, rejected rows, {(origin, uri): hash}), in the order of the sounds."""
    groups = list(_groups(found))
    items = [(found[a:b], corpus, store.join(out.path, "scan")) for a, b in groups]
    paths = parallel_map(scan.scan_group, items, out=out, cluster=cluster, unit="files",
                         sizes=[float(b - a) for a, b in groups])
    sounds, units, rejected, hashes = [], [], [], {}
    for (first, end), result in zip(groups, thread_map(store.get_json, paths), strict=True):
        own = found[first:end] if result["found"] is None else [_from_fields(row) for row in result["found"]]
        first = len(sounds)
        sounds += own
        hashes |= {(own[row].origin, own[row].uri): digest for row, digest in result["files"]}
        units += [(first + row, rest) for row, *rest in result["units"]]
        rejected += [(first + row, rest) for row, *rest in result["rejected"]]
    # What lies in containers is put in the order that it would have as files, so that the same clips come of it.
    origins = {s.name: i for i, s in enumerate(corpus.sources)}
    rows = sorted(range(len(sounds)), key=lambda i: (origins[sounds[i].origin], sources.order(sounds[i])))
    place = {old: new for new, old in enumerate(rows)}
    units = [Unit(place[i], sounds[i], *rest) for i, rest in sorted(units, key=lambda u: place[u[0]])]
    rejected = [{"origin": sounds[i].origin, "uri": sounds[i].uri, **dict(zip(REJECTED, rest, strict=True))}
                for i, rest in sorted(rejected, key=lambda r: place[r[0]])]
    return [sounds[i] for i in rows], units, rejected, hashes


def _from_fields(row: list) -> Found:
    """A sound as a scan wrote it."""
    f = Found(*row)
    return replace(f, fault=tuple(f.fault) if f.fault else None)


def _groups(found: list[Found]) -> Iterator[tuple[int, int]]:
    """Ranges of rows for one task each. Rows of one file stay together, so that no file is decoded twice."""
    # About 64 tasks for a small corpus; the limits keep a task between a start-up's cost and a few minutes' work.
    most, first, size = min(256, max(8, len(found) // 64)), 0, 0
    for i, f in enumerate(found):
        same = i > 0 and f.path == found[i - 1].path
        alone = f.container or (i > 0 and found[i - 1].container)  # a container's sounds are as many as a group's
        if i > first and not same and (alone or i - first >= most or size + f.size > GROUP_BYTES):
            yield first, i
            first, size = i, 0
        size += 0 if same else max(0, f.size)
    if found:
        yield first, len(found)


def _check_rejected(rejected: list[dict], files: int, corpus: CorpusConfig) -> None:
    """Raises ConfigError for more rejected files than corpus.max_rejected allows, or no usable file."""
    bad = [r for r in rejected if r["frames"] == 0]  # not the silent pieces of a long file that is usable
    if len(bad) <= corpus.max_rejected * files and len(bad) < files:
        return
    head = "".join(f"\n  {r['origin']}/{r['uri']}: {r['reason']} ({r['detail']})" for r in bad[:LISTED])
    more = f"\n  and {len(bad) - LISTED} more in rejected.parquet" if len(bad) > LISTED else ""
    fix = f"remove or mend them, or raise corpus.max_rejected ({corpus.max_rejected})"
    what = "no usable file:" if len(bad) == files else f"{len(bad) / files:.1%} of the files cannot be used:"
    raise ConfigError(f"corpus {corpus.name!r}: {what} {len(bad)} of {files} were rejected "
                      f"({_counts(Counter(r['reason'] for r in bad))}); {fix}{head}{more}")


def _cancelled(units: list[Unit]) -> list[str]:
    """A remark on the files of which one channel is taken."""
    files = list(dict.fromkeys(f"{u.found.origin}/{u.found.uri}" for u in units if u.channel is not None))
    return [f"the channels of {len(files)} files cancel each other, so the strongest is taken: {', '.join(files[:3])}"
            + (" ..." if len(files) > 3 else "")] if files else []


def _follows(a: Unit, b: Unit) -> bool:
    """True where b is the next piece or utterance after a in one speaker's chapter, at one rate."""
    if a.found.chapter is None or a.chapter != b.chapter or a.sample_rate != b.sample_rate:
        return False
    if a.row == b.row:
        return b.piece == a.piece + 1
    return b.row == a.row + 1 and a.piece == a.pieces - 1 and b.piece == 0


def _clip(units: list[Unit], split: str, taken: Counter) -> Clip:
    """A clip of the units end to end, with its first part's id and the number of the others."""
    parts, offset = [], 0
    for u in units:
        text = u.found.text if u.pieces == 1 else None  # a piece's share of the words is unknown
        parts.append(Part(_part_id(u, taken), u.found.uri, u.start, u.frames, offset, text, u.channel))
        offset += u.frames
    u = units[0]
    more = f"+{len(parts) - 1}" if len(parts) > 1 else ""
    return Clip(f"{u.found.origin}/{parts[0].id}{more}", u.found.origin, u.found.source, u.speaker, split,
                u.sample_rate, offset, tuple(parts))


def _part_id(u: Unit, taken: Counter) -> str:
    """LibriSpeech's utterance id where the name is one, else the uri; @start for a stretch of a file, ~N for a repeat."""
    stem = u.found.key.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    name = stem if u.found.speaker and stem.startswith(f"{u.found.speaker}-") else u.found.key
    name += f"@{u.start}" if u.pieces > 1 or u.found.start is not None else ""
    taken[u.found.origin, name] += 1
    count = taken[u.found.origin, name]
    return f"{name}~{count}" if count > 1 else name


def _listing(entries: list, found: list[Found], hashes: dict) -> list[dict]:
    """The rows of listing.parquet. Files that no task scanned (transcripts, tables, containers) are hashed here."""
    others = {(origin, e.uri): e for origin, e in entries if not hashes.get((origin, e.uri))}
    hashes = hashes | dict(zip(others, thread_map(file_hash, list(others.values())), strict=True))
    listed = [*entries, *((f.origin, f) for f in found if f.name)]
    return [{"origin": o, "uri": e.uri, "size": e.size, "stamp": e.stamp, "hash": hashes[o, e.uri]} for o, e in listed]


def _digest(listing: list[dict]) -> str:
    """A hash of names and contents without dates, so that a copy of a corpus has the digest of the original."""
    rows = sorted(f"{r['origin']}|{r['uri']}|{r['size']}|{r['hash']}" for r in listing)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def _counts(counts: dict) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items(), key=lambda kv: (-kv[1], kv[0])))


def _facts(clips: list[Clip]) -> dict:
    hours: dict = {}
    where = attrgetter("source", "split")
    for (source, split), members in groupby(sorted(clips, key=where), key=where):
        hours.setdefault(source, {})[split] = round(sum(c.seconds for c in members) / 3600, 4)
    by_split = {s: [c for c in clips if c.split == s] for s in SPLITS}
    return {"clips": len(clips), "parts": sum(len(c.parts) for c in clips), "hours": hours,
            "clips_by_split": {s: len(m) for s, m in by_split.items()},
            "speakers": {s: len({(c.origin, c.speaker) for c in m}) for s, m in by_split.items()},
            "shards": {s: len({c.shard for c in m}) for s, m in by_split.items()}}


def _summary(clips: list[Clip], facts: dict, remarks: list[str]) -> str:
    """The text that the driver prints: one line, then a line a remark."""
    hours = sum(c.seconds for c in clips) / 3600
    reasons = {k: v for k, v in facts["rejected"].items() if k != "total"}
    bad = f"rejected {facts['rejected']['total']}" + (f" ({_counts(reasons)}; see rejected.parquet)" if reasons else "")
    left = facts.get("left_out")
    out = f"; left out {sum(left.values())} that look like audio ({_counts(left)}; see rejected.parquet)" if left else ""
    return "\n".join([f"{len(clips)} clips, {hours:.2f} h of {facts['files']} files; {bad}{out}", *remarks])
