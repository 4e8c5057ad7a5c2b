"""What a case's JSON says, against what is true."""

from __future__ import annotations

from typing import Any

EXACT, NAMED, MISSED, ERROR = "exact", "named", "missed", "error"
"""Whether the faulty layer is the guilty list, is on it beside others, is not on it, or there is no answer."""
CLEAN, ACCUSED = "clean", "accused"


def guilty_rows(block: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a test block with a verdict against a layer: guilty, or of another shape."""
    return [row for row in block["layers"] if row["verdict"] in ("guilty", "shape")]


def score(case: dict[str, Any], exit_code: int, block: dict[str, Any] | None) -> dict[str, Any]:
    """The verdict on one case; ``block`` is the test block of the JSON, None where there is none.

    Healthy cases give ``clean``, ``accused`` or ``error``; faults ``exact``, ``named``, ``missed`` or ``error``, and
    ``cause``: ``right``, ``near``, ``unknown``, ``wrong`` or ``none`` (no finding on the faulty layer).
    """
    if block is None or exit_code not in (0, 1):
        return {"verdict": ERROR}
    rows = guilty_rows(block)
    found: dict[str, Any] = {
        "guilty": [row["name"] for row in rows],
        "first": [_short(row) for row in rows[:4]],
        "causes": [[f["cause"], f["layers"][:3], f["says"][:160]] for f in block["findings"][:6]],
        **coverage(block),
    }
    if not case["fault"]:
        return {"verdict": ACCUSED if rows else CLEAN, "agrees": block["agrees"], **found}
    fault = case["fault"]
    hit = [row for row in rows if is_faulty(row, fault)]
    verdict = EXACT if hit and len(hit) == len(rows) else NAMED if hit else MISSED
    return {"verdict": verdict, "beside": len(rows) - len(hit), **found, **_cause(fault, hit, block)}


def is_faulty(row: dict[str, Any], fault: dict[str, Any]) -> bool:
    """Whether a guilty row is about the faulty layer: its value, or a region that holds its nodes."""
    return row["onnx"] in fault["values"] or not set(row["nodes"]).isdisjoint(fault["nodes"])


def _cause(fault: dict[str, Any], hit: list[dict[str, Any]], block: dict[str, Any]) -> dict[str, Any]:
    names = {row["name"] for row in hit} | {row["onnx"] for row in hit}
    said = [f for f in block["findings"] if not names.isdisjoint(f["layers"])]
    if not said:
        return {"cause": "none", "said": ""}
    first = said[0]
    cause = first["cause"]
    grade = "right" if cause in fault["right"] else "near" if cause in fault["near"] else "wrong"
    return {"cause": "unknown" if cause == "unknown" else grade, "said": cause, "says": first["says"][:200]}


def coverage(block: dict[str, Any]) -> dict[str, Any]:
    """``compared`` and ``replayed`` as counts of layers, and why the others were not replayed."""
    computed = [row for row in block["layers"] if row["op"] != "input"]
    reasons: dict[str, int] = {}
    for row in computed:
        if row["skipped"]:
            reasons[row["skipped"]] = reasons.get(row["skipped"], 0) + 1
    return {
        "layers": max(block["alignment"]["total"], len(block["layers"])),
        "compared": len(block["layers"]),
        "replayed": len(block["layers"]) - sum(reasons.values()),
        "skipped": dict(sorted(reasons.items(), key=lambda item: -item[1])[:4]),
    }


def _short(row: dict[str, Any]) -> dict[str, Any]:
    keys = ("name", "op", "verdict", "side", "introduced", "expected", "excess", "rel_l2", "why")
    return {key: row.get(key) for key in keys}
