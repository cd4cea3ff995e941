"""Asks a store on two gloo processes, each rank writing what it knows afterwards (test_predict_ddp.py)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.multiprocessing import ProcessRaisedException

from lightning_influence import Attribution, InfluenceModule, QueryError, Stage, Term, TracIn
from tests.stores import Texts, classifier, loader_of, quiet

COUNTS = (11, 9, 5)


class Failing(TracIn):
    """Fails on the rank that got query 0."""

    def terms(self, stage: Stage) -> Sequence[Term]:
        if torch.distributed.get_rank() == 0:
            raise QueryError("refused on one rank", hint="none")
        return super().terms(stage)


class Choosy(TracIn):
    """Refuses the answers to two queries, one of each rank."""

    def check(self, largest: torch.Tensor, query_ids: torch.Tensor) -> None:
        raise QueryError(f"no word: {[q for q in query_ids.tolist() if q in (2, 3)]}", hint="none")


def told(answer: Attribution) -> dict[str, list]:
    return {
        "queries": answer.query_ids.tolist(),
        "proponents": answer.proponents.sample_ids.tolist(),
        "scores": answer.proponents.scores.tolist(),
        "opponents": answer.opponents.sample_ids.tolist(),
    }


def main(folder: Path, strategy: str) -> None:
    torch.set_num_threads(1)
    module, found = classifier(), {}
    saved = None if strategy == "ddp" else folder / f"{strategy}.safetensors"
    options = {"strategy": strategy, "devices": 2}
    for count in COUNTS if strategy == "ddp" else COUNTS[:1]:
        influence = InfluenceModule(module, folder / "store", TracIn(), k=4, save_to=saved)
        trainer = quiet(**options)
        trainer.predict(influence, loader_of(Texts(count, seed=1), 2), return_predictions=strategy == "ddp")
        found[str(count)] = told(influence.attribution if saved is None else Attribution.load(saved))
    if strategy == "ddp":
        influence = InfluenceModule(module, folder / "store", TracIn(), k=4)
        quiet(**options, use_distributed_sampler=False).predict(influence, loader_of(Texts(5, seed=1), 2))
        found["replicated"] = told(influence.attribution)
        quiet(**options).predict(influence, [loader_of(Texts(n, seed=1), 2) for n in (5, 3)])
        found["two loaders"] = told(influence.attribution)
        for name, estimator, count in (("one rank", Failing(), 5), ("one query", TracIn(), 1)):
            try:
                refusing = InfluenceModule(module, folder / "store", estimator, k=4)
                quiet(**options).predict(refusing, loader_of(Texts(count, seed=1), 2))
            except QueryError as error:
                found[name] = str(error)
        choosy = InfluenceModule(module, folder / "store", Choosy(), k=4, save_to=folder / "refused.safetensors")
        try:
            quiet(**options).predict(choosy, loader_of(Texts(5, seed=1), 2))
        except QueryError as error:
            found["some"] = str(error)
        found["others"] = told(choosy.attribution)
        found["saved"] = told(Attribution.load(folder / "refused.safetensors"))
        rank = torch.distributed.get_rank()
    else:
        rank = 0
    if strategy == "ddp_fork":
        try:
            unsaved = InfluenceModule(module, folder / "store", TracIn(), k=4)
            quiet(**options).predict(unsaved, loader_of(Texts(5, seed=1), 2), return_predictions=False)
        except ProcessRaisedException as error:  # raised in the processes
            found["unsaved"] = str(error)
    (folder / f"{strategy}-rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
