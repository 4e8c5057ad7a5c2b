"""``docs/wild.md`` out of a log: misses, false accusations, layers, causes, coverage and cost, by network and kind."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from .cases import TRUE
from .networks import base

Record = dict[str, Any]
HEALTHY_GROUPS = {
    "healthy": "as it is",
    "again": "the same network again",
    "torch": "torch against ONNX Runtime",
    "fp16": "FP16 files",
    "int8": "quantized files",
}
CAUSES = ("right", "near", "unknown", "none", "wrong")
HALVES = ("tuning", "held-out")
MOST_MISSES = 60
"""Lines of misses of one sort."""


def markdown(records: Sequence[Record], notes: Sequence[str] = ()) -> str:
    """The page. ``records`` are those of ``read_log``; ``notes`` are further lines of its conditions."""
    true = [r for r in records if r["key"] in TRUE]
    records = [r for r in records if r["key"] not in TRUE]
    healthy = [r for r in records if not r["fault"]]
    faults = [r for r in records if r["fault"]]
    parts = [
        "# Networks in the wild",
        "",
        f"How often cpdebug is right on {len({base(r['network']) for r in records})} networks that packages ship or "
        "torch exports. In the unchanged networks, nothing may be accused. With one seeded fault, exactly the faulty "
        "layer and the cause must be named. [Other networks](wild-besides.md) has more tests and everything that "
        "failed.",
        "",
        "A *case* is one network on two backends. *Accused*: a layer is called guilty although the network is right; "
        "*missed*: a faulty layer that was not named. *Tuning* and *held-out* are the halves of the networks "
        "([conditions](#conditions)). Raw figures: [data/wild.json](data/wild.json). "
        "`python benchmarks/wild/run.py table --log LOG --write docs/wild.md` writes this page; do not edit it.",
        "",
        "## Misses",
        "",
        *_misses(records),
        "## False accusations",
        "",
        *_accusations(healthy),
        *_true(true),
        "## Faults",
        "",
        *_faults(faults),
        "## Coverage and cost",
        "",
        *_coverage(records),
        "## By network",
        "",
        *_by_network(records),
        "## By kind of fault",
        "",
        *_by_kind(faults),
        "## Conditions",
        "",
        *_conditions(records),
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(parts).rstrip() + "\n"


def raw(records: Iterable[Record]) -> list[Record]:
    """What is kept of each record beside the page."""
    keys = (
        "key",
        "half",
        "verdict",
        "beside",
        "cause",
        "said",
        "agrees",
        "layers",
        "compared",
        "replayed",
        "cpu",
        "once",
    )
    kept = []
    for record in records:
        short = {key: record[key] for key in keys if record.get(key) is not None}
        if record["verdict"] not in ("clean", "exact"):
            short["guilty"] = record.get("guilty", [])[:5]
        if record["fault"]:
            short |= {"what": record["fault"]["what"], "size": record["fault"]["size"]}
        kept.append(short)
    return kept


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def _misses(records: Sequence[Record]) -> list[str]:
    healthy, faults = ([r for r in records if bool(r["fault"]) is faulty] for faulty in (False, True))
    sorts: list[tuple[str, Sequence[Record], Callable[[Record], bool]]] = [
        ("Healthy networks with a layer accused", healthy, lambda r: r["verdict"] == "accused"),
        ("Faults missed", faults, lambda r: r["verdict"] == "missed"),
        ("Faults with a healthy layer accused beside the faulty one", faults, lambda r: r["verdict"] == "named"),
        ("Faults with a wrong cause", faults, lambda r: r.get("cause") == "wrong"),
        ("No answer (exit code other than 0 and 1)", records, lambda r: r["verdict"] == "error"),
    ]
    lines = []
    for title, among, is_one in sorts:
        found = sorted((r for r in among if is_one(r)), key=lambda r: r["key"])
        lines += [f"- {title}: **{len(found)} of {len(among)}**"]
        lines += [f"    - `{r['key']}`: {_about(r)}" for r in found[:MOST_MISSES]]
        lines += [f"    - … and {len(found) - MOST_MISSES} more"] if len(found) > MOST_MISSES else []
    return [*lines, ""]


def _about(record: Record) -> str:
    if record["verdict"] == "error":
        said = [line for line in record.get("said", "").splitlines() if line.strip()]
        return f"exit {record['exit']}, {_plain(said[-1]) if said else 'nothing printed'}"
    if record.get("cause") == "wrong" and record["verdict"] != "named":
        return f"{record['fault']['what']}; said `{record['said']}`: {_plain(record.get('says', ''))}"
    rows = record.get("first", [])
    if not rows:
        return f"{record['fault']['what']} (size {record['fault']['size']})"
    faulty = set(record.get("fault", {}).get("values", ()))
    row = next((r for r in rows if r["name"] not in faulty), rows[0])
    return f"{len(record['guilty'])} guilty, such as {row['op']} `{_plain(row['name'])}` ({_plain(row['why'] or '')})"


def _plain(text: str) -> str:
    text = text.replace("|", "/").replace("`", "'")
    return text if len(text) <= 110 else f"{text[:107]}…"


def _accusations(records: Sequence[Record]) -> list[str]:
    rows = []
    for group, title in HEALTHY_GROUPS.items():
        for backends in dict.fromkeys(r["backends"] for r in records if r["group"] == group):
            own = [r for r in records if r["group"] == group and r["backends"] == backends]
            rows.append((title, f"`{backends}`", *_healthy_cells(own)))
    lines = [
        "*Accused*: a layer is accused in a network that is right. *Errors*: an exit code other than 0 and 1. *Exit "
        "1*: no layer is accused, but the outputs are beyond the tolerance. *Compared*: mean (smallest) share of the "
        "reference's layers.",
        "",
    ]
    counts = ("accused: tuning", "accused: held-out", "layers accused", "errors", "exit 1", "compared")
    head = ("files", "backends", "cases", *counts)
    return [*lines, *_table(head, rows)]


def _true(records: Sequence[Record]) -> list[str]:
    if not records:
        return []
    lines = ["Not counted above: networks that have a real fault, although none was seeded.", ""]
    for record in sorted(records, key=lambda r: r["key"]):
        found = _about(record) if record["verdict"] == "accused" else f"missed ({record['verdict']})"
        lines.append(f"- `{record['key']}`: {TRUE[record['key']]} Reported: {found}")
    return [*lines, ""]


def _healthy_cells(records: Sequence[Record]) -> tuple[Any, ...]:
    accused = [r for r in records if r["verdict"] == "accused"]
    halves = [f"{sum(r['half'] == h for r in accused)} of {sum(r['half'] == h for r in records)}" for h in HALVES]
    layers = sum(len(r["guilty"]) for r in accused)
    errors = sum(r["verdict"] == "error" for r in records)
    beyond = sum(r["verdict"] == "clean" and not r["agrees"] for r in records)
    shares = [r["compared"] / r["layers"] for r in records if r.get("layers")]
    paired = f"{100 * statistics.mean(shares):.0f} % ({100 * min(shares):.0f} %)" if shares else "–"
    return len(records), *halves, layers, errors, beyond, paired


def _faults(records: Sequence[Record]) -> list[str]:
    rows, causes = [], []
    for group, backends in dict.fromkeys((r["group"], r["backends"]) for r in records):
        title = f"`{backends}`" + (", all names other" if group == "renamed" else "")
        for half in (*HALVES, "both"):
            own = [
                r for r in records if (r["group"], r["backends"]) == (group, backends) and half in (r["half"], "both")
            ]
            if not own:
                continue
            count = Counter(r["verdict"] for r in own)
            named = count["exact"] + count["named"]
            rows.append(
                (
                    title,
                    half,
                    len(own),
                    _share(count["exact"], len(own)),
                    _share(named, len(own)),
                    count["missed"],
                    count["error"],
                )
            )
            said = Counter(r["cause"] for r in own if "cause" in r)
            causes.append((title, half, *(_share(said[c], len(own)) for c in CAUSES)))
    exact = ("backends", "half", "faults", "guilty list is the faulty layer", "named", "missed", "errors")
    lines = [
        "The faulty layer: exact (nothing else is guilty), named (possibly with others), missed, or no answer.",
        "",
    ]
    lines += _table(exact, rows)
    lines += ["The cause of the faulty layer; each fault declares which names are right and which are near.", ""]
    return [*lines, *_table(("backends", "half", *CAUSES), causes)]


def _share(count: int, total: int) -> str:
    return f"{count} ({100 * count / total:.0f} %)" if total else "–"


def _coverage(records: Sequence[Record]) -> list[str]:
    answered = [r for r in records if r.get("layers")]
    plain = [r for r in answered if r["group"] == "healthy"]
    replayed, layers = sum(r["replayed"] for r in plain), sum(r["layers"] for r in plain)
    fused = sum(r["layers"] - r["compared"] for r in plain)
    reasons: Counter[str] = Counter()
    for record in plain:
        reasons.update(record["skipped"])
    lines = [
        f"Healthy networks: {layers} layers, {replayed} replayed ({100 * replayed / max(layers, 1):.1f} %), "
        f"{fused} missing in the test (fused, or folded to a constant), {layers - fused - replayed} not replayed"
        + (":" if reasons else "."),
        "",
        *(f"- {count} × {_plain(reason)}" for reason, count in reasons.most_common(12)),
        *([""] if reasons else []),
    ]
    if not any(r["once"] for r in answered):
        return [*lines, "Cost was not measured in this run.", ""]
    lines += [
        "Cost: processor time of the whole command with causes (libraries loaded) ÷ that of opening both backends with "
        "all probes and running them once.",
        "",
    ]
    rows = []
    for group, backends in dict.fromkeys((r["group"], r["backends"]) for r in answered if r["once"]):
        ratios = [
            r["cpu"] / r["once"] for r in answered if (r["group"], r["backends"]) == (group, backends) and r["once"]
        ]
        seconds = [r["cpu"] for r in answered if (r["group"], r["backends"]) == (group, backends)]
        rows.append(
            (group, f"`{backends}`", *(f"{f(ratios):.1f}" for f in (statistics.median, max)), f"{sum(seconds):.0f}")
        )
    return [*lines, *_table(("group", "backends", "median", "largest", "seconds in all"), rows)]


def _by_network(records: Sequence[Record]) -> list[str]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["network"]].append(record)
    rows = []
    for name, own in sorted(groups.items()):
        healthy = [r for r in own if not r["fault"]]
        faults = [r for r in own if r["fault"]]
        said = Counter(r["cause"] for r in faults if "cause" in r)
        count = Counter(r["verdict"] for r in own)
        answered = [r for r in healthy if r.get("layers")]
        rows.append(
            (
                name,
                own[0]["half"],
                f"{sum(r['verdict'] == 'accused' for r in healthy)} of {len(healthy)}",
                count["error"],
                f"{count['exact']} / {count['named']} / {count['missed']} of {len(faults)}" if faults else "–",
                " / ".join(str(said[c]) for c in CAUSES) if faults else "–",
                f"{100 * sum(r['replayed'] for r in answered) / max(1, sum(r['layers'] for r in answered)):.0f} %",
                f"{sum(r['cpu'] for r in own):.0f}",
            )
        )
    head = (
        "network",
        "half",
        "accused",
        "errors",
        "exact / named / missed",
        "cause: " + " / ".join(CAUSES),
        "replayed",
        "seconds",
    )
    return _table(head, rows)


def _by_kind(records: Sequence[Record]) -> list[str]:
    rows = []
    for kind in sorted({r["fault"]["kind"] for r in records}):
        own = [r for r in records if r["fault"]["kind"] == kind]
        count, said = Counter(r["verdict"] for r in own), Counter(r.get("cause") for r in own)
        other = Counter(r["said"] for r in own if r.get("cause") in ("near", "wrong"))
        rows.append(
            (
                kind,
                len(own),
                f"{count['exact']} / {count['named']} / {count['missed']} / {count['error']}",
                " / ".join(str(said[c]) for c in CAUSES),
                ", ".join(f"{name} {n}" for name, n in other.most_common(4)),
            )
        )
    head = ("kind", "cases", "exact / named / missed / error", "cause: " + " / ".join(CAUSES), "said instead")
    return _table(head, rows)


def _conditions(records: Sequence[Record]) -> list[str]:
    packages = ("torch", "onnx", "onnxruntime", "nvidia-modelopt", "onnxslim", "numpy")
    versions = ", ".join(f"{name} {_version(name)}" for name in packages)
    pinned = Path(__file__).with_name("requirements.txt").read_text().split()
    shipped = ", ".join(word.replace("==", " ") for word in pinned if "==" in word)
    networks = {base(r["network"]) for r in records}
    commits = Counter(r.get("commit") or "no commit" for r in records)
    return [
        f"- Code: {', '.join(f'{commit} ({count} cases)' for commit, count in commits.most_common())}.",
        f"- {len(records)} cases on {len(networks)} networks (exports and variants of a network count once), "
        f"{sum(r['cpu'] for r in records) / 60:.0f} minutes of processor time, one thread.",
        f"- Networks that packages ship: {shipped}, and the light models of onnx. The others are exported from "
        "`benchmarks/wild/architectures.py` by torch's two exporters; seeded weights, not trained.",
        f"- {versions}; on a CPU.",
        "- Halves are by network (`TUNING` in `benchmarks/wild/networks.py`). This run is not a blind test: the "
        "results of both halves were read while cpdebug was being fixed.",
        "- Faults: `benchmarks/wild/kinds.py`; only those that change the layer by 1e-4 (relative L2) or more.",
        "- `make wild-env`, then `python benchmarks/wild/run.py make --packages .wild-env`, `… run`, `… table`.",
    ]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
