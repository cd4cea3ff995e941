"""Crash safety, tried out: fits are killed at random moments and resumed, and their stores compared.

    python recipes/crash_safety.py --kills 3 --stops --table recipes/results/crash_safety.md

Every case is a small fit in processes of its own. SIGKILL falls on all of them after a random number of batches and a
random pause ("clock"), or from inside at a random call that makes a file durable, before or after it ("commit"), or on
one rank alone ("rank"). Each time the fit goes on from Lightning's `last` checkpoint; where there is none yet, the
library must refuse the folder, which is then deleted, as its HINT says. The model keeps a diary of the batches, rates
and weights that it really used, forced to the disk at every step; the store at the end must say the same, and equal
that of an undisturbed fit wherever Lightning itself repeats the order of the batches. `--stops` also tries SIGTERM and
an exception of the user's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import lightning
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # also where Lightning starts this file for a rank

from lightning_influence import ArtifactStore
from recipes.crashes.examination import Outcome, examine, in_flight, lineage
from recipes.crashes.fits import CASES, CHILD, FAILED, REFUSED, SHORT, Attempt, Case, run


def kill_and_resume(case: Case, folder: Path, kills: int, rng: random.Random) -> Outcome:
    """Kill a fit `kills` times, let it end, and look at its store."""
    whole, broken = folder / "whole", folder / "broken"
    for each in (whole, broken):
        each.mkdir(parents=True)
    outcome = Outcome(str(case))
    _undisturbed(case, whole)
    stretch = case.epochs * case.batches * 2 // (kills + 1)  # batches of an attempt before its end, at most
    kinds = cycle(["clock", "commit", "rank"] if case.ranks > 1 else ["clock", "commit"])
    number = 0
    while True:
        number += 1
        kind = next(kinds) if sum(outcome.kills.values()) < kills else None
        attempt = Attempt(case, str(broken), number)
        if kind == "commit":
            rank = rng.randrange(case.ranks)
            n = rng.randrange(1, 12 if rank else 40)  # rank zero writes more
            attempt = replace(attempt, strike=(rank, n, rng.random() < 0.5))
        process = run(attempt)
        if kind in ("clock", "rank"):
            batches, pause = rng.randrange(stretch), rng.uniform(0, 0.1)
            if _reached(attempt, batches, process):
                time.sleep(pause)
                victim = _pids(attempt)[rng.randrange(case.ranks)] if kind == "rank" else 0
                _kill(victim, signal.SIGKILL, group=None if victim else process.pid)
        _wait(attempt, process)
        if process.exitcode == REFUSED:
            outcome.refused += 1
            if list((broken / "lightning").glob("last*.ckpt")):
                outcome.problems.append(f"attempt {number}: refused beside a Lightning checkpoint")
            shutil.rmtree(broken / "store")
        elif process.exitcode == 0:
            break
        elif kind is None or (process.exitcode == FAILED and kind != "rank"):
            outcome.problems.append(f"attempt {number} ended by itself with {process.exitcode}")
            return outcome
        else:
            outcome.kills[kind] = outcome.kills.get(kind, 0) + 1
            if (broken / "store" / "manifest.json").exists():
                outcome.untidy += bool(ArtifactStore.open(broken / "store").verify())
    examine(case, whole, broken, outcome)
    return outcome


def _undisturbed(case: Case, folder: Path) -> None:
    attempt = Attempt(case, str(folder), 0)
    process = run(attempt)
    _wait(attempt, process)
    if process.exitcode != 0:
        raise SystemExit(f"{case}: the undisturbed fit failed, {attempt.diary}.log says why")


def _reached(attempt: Attempt, batches: int, process: Any) -> bool:
    """Wait until the fit has started and made `batches` steps more; False if it ended before."""
    while process.is_alive():
        pages = list(attempt.diary.parent.glob(f"{attempt.diary.name}-rank*.jsonl"))
        if len(pages) == attempt.case.ranks and max(len(p.read_bytes().splitlines()) for p in pages) >= batches:
            return True
        time.sleep(0.001)
    return False


def _pids(attempt: Attempt) -> list[int]:
    return [int(p.read_text()) for p in sorted(attempt.diary.parent.glob(f"{attempt.diary.name}-rank*.pid"))]


def _kill(pid: int, number: int, group: int | None = None) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number) if group is None else os.killpg(group, number)


def _wait(attempt: Attempt, process: Any, patience: float = 0) -> None:
    """Wait until every process of an attempt is gone; what outlives the first one by `patience` seconds is killed."""
    process.join(60)
    end = time.monotonic() + patience
    while time.monotonic() < end and any(_alive(pid) for pid in _pids(attempt)):
        time.sleep(0.01)
    _kill(0, signal.SIGKILL, group=process.pid)
    process.join()
    while any(_alive(pid) for pid in _pids(attempt)):
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def stop_and_resume(case: Case, how: str, folder: Path, rng: random.Random) -> Outcome:
    """End a fit by SIGTERM or by an exception after batch 33: every finished record is on disk; then let it end."""
    whole, broken = folder / "whole", folder / "broken"
    for each in (whole, broken):
        each.mkdir(parents=True)
    _undisturbed(case, whole)
    outcome = Outcome(f"{case}", {how: 1})
    attempt = Attempt(case, str(broken), 1, fail_at=33 if how == "exception" else None)
    process = run(attempt)
    if how == "SIGTERM" and _reached(attempt, rng.randrange(5, 30), process):
        _kill(process.pid, signal.SIGTERM)
    _wait(attempt, process, patience=30)
    if (process.exitcode or 0) < 0:
        outcome.problems.append(f"the fit did not end by itself ({process.exitcode})")
    pages = lineage(broken, case.ranks)
    store = ArtifactStore.open(broken / "store")
    if how == "exception" and {len(page) for page in pages} != {33}:
        outcome.problems.append(f"{[len(page) for page in pages]} batches instead of 33")
    if case.mode == "in_flight":
        for rank, page in enumerate(pages):
            if in_flight(store, rank)["ids"].tolist() != [i for entry in page for i in entry["ids"]]:
                outcome.problems.append(f"rank {rank}: not all finished records are on disk")
    outcome.problems += store.verify()
    end = Attempt(case, str(broken), 2)
    process = run(end)
    _wait(end, process)
    if process.exitcode == REFUSED:
        outcome.refused += 1
        shutil.rmtree(broken / "store")
        end = Attempt(case, str(broken), 3)
        _wait(end, run(end))
    examine(case, whole, broken, outcome)
    return outcome


def table(outcomes: list[Outcome], command: str) -> str:
    """The outcomes as a markdown table."""
    lines = [
        f"`{command}` (torch {torch.__version__}, lightning {lightning.__version__})",
        "",
        "Ended by SIGKILL to all processes at a random moment (clock) or at a random call that makes a file durable",
        "(commit), or to one rank alone (rank). Refused: starts on a folder with data and no Lightning checkpoint.",
        "Untidy: restarts that found unfinished or unlisted files. No (order): Lightning resumed with other batches;",
        "the store says which, as the fit's own diary does.",
        "",
        "| fit | ended by | refused | untidy | as uninterrupted | records | problems |",
        "|---|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        ended = ", ".join(f"{count} {kind}" for kind, count in o.kills.items())
        same = "yes" if o.same else "no (order)" if o.same is False and not o.problems else str(o.same)
        lines.append(
            f"| {o.case} | {ended} | {o.refused} | {o.untidy} | {same} | {o.records} | {len(o.problems) or 'none'} |"
        )
    kills = sum(n for o in outcomes for kind, n in o.kills.items() if kind in ("clock", "commit", "rank"))
    return "\n".join([*lines, "", f"{kills} SIGKILLs, {sum(len(o.problems) for o in outcomes)} problems.", ""])


def main() -> None:
    """Run the cases and print the table; exit status 1 if anything was wrong."""
    if CHILD in os.environ:  # a rank that Lightning started
        described = json.loads(os.environ[CHILD])
        strike = described["strike"] and tuple(described["strike"])
        Attempt(**{**described, "case": Case(**described["case"]), "strike": strike}).fit()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="SIGKILLs for each case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--short", action="store_true", help="two cases")
    parser.add_argument("--stops", action="store_true", help="also SIGTERM and a user's exception")
    parser.add_argument("--table", type=Path, help="write the table to this file")
    parser.add_argument("--folder", type=Path, help="keep the stores here")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    folder = arguments.folder or Path(tempfile.mkdtemp())
    outcomes = []
    jobs: list[tuple[Case, str]] = [(case, "SIGKILL") for case in (SHORT if arguments.short else CASES)]
    if arguments.stops:
        jobs += [(Case("in_flight", ranks=n), how) for n in (1, 2) for how in ("exception", "SIGTERM")]
    for job, (case, how) in enumerate(jobs):
        if arguments.only not in str(case):
            continue
        if case.stateful and find_spec("torchdata") is None:
            print(f"{case}: left out, torchdata is not installed", flush=True)
            continue
        if how == "SIGKILL":
            outcome = kill_and_resume(case, folder / f"{job:02d}", arguments.kills, rng)
        else:
            outcome = stop_and_resume(case, how, folder / f"{job:02d}", rng)
        outcomes.append(outcome)
        print(f"{outcome.case}: {outcome.kills}", *outcome.problems, sep="\n    ", flush=True)
    report = table(outcomes, " ".join(["python", "recipes/crash_safety.py", *sys.argv[1:]]))
    print(report)
    if arguments.table:
        arguments.table.parent.mkdir(parents=True, exist_ok=True)
        arguments.table.write_text(f"# Fits killed and resumed\n\n{report}")
    if not arguments.folder:
        shutil.rmtree(folder)
    sys.exit(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    main()
