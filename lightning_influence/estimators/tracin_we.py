"""TracIn-WE: TracIn on the word embeddings, where every score is a sum over shared words."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.artifacts import ArtifactStore, Checkpoint, Shard
from lightning_influence.errors import QueryError
from lightning_influence.estimators.estimator import Stage, Transform, unchanged
from lightning_influence.estimators.tracin import Preconditioner, TracIn
from lightning_influence.estimators.word_matching import Neighbours, SynonymRows
from lightning_influence.gradients import Gradients, Rows, TargetParameters, select, unpack, word_embeddings


class TracInWE(TracIn):
    """TracIn on word-embedding rows (Yeh et al. 2022, arXiv:2202.11844).

        score(q, z) = sum over words w in both q and z, sum over c of eta_c g_c(q, w) . g_c(z, w)
        g_c(x, w) = sum over positions j with x_j = w of the gradient of l(x; theta_c) at the embedding of position j

    Exact TracIn of the embedding layer, since its gradients are row-sparse; and each summand over w says what that word
    contributes, see `InfluenceModule.words`.

    Args:
        parameters: glob or globs over the names of embedding weights; `None` takes all word embeddings of the store.
        exclude_tokens: token ids that never match: special tokens and common words (TracIn-WE-NoC). Padding is left out
            at capture already.
        top_words: keep per sample only the k words with the largest gradient norm (TracIn-WE-Topk), on both sides, of
            those that are not excluded.
        synonyms: cosine of the final embeddings above which two different words may match, one to one, the closest
            first (TracIn-WE-Syn). Slower: matching is decided pair by pair.
        preconditioner: as in `TracIn`.
        unmatched: `"raise"` refuses a query that shares no word with any training sample, after all others are
            answered: through `Trainer.predict` their answers are filled, saved and in `InfluenceModule.attribution`
            when the error comes. `"zeros"` scores it 0.

    Raises:
        QueryError: as `TracIn`; the parameters are no embeddings; a query that shares no word.
    """

    def __init__(
        self,
        parameters: str | Sequence[str] | TargetParameters | None = None,
        *,
        exclude_tokens: Collection[int] | Tensor = (),
        top_words: int | None = None,
        synonyms: float | None = None,
        preconditioner: Preconditioner = None,
        unmatched: Literal["raise", "zeros"] = "raise",
    ) -> None:
        super().__init__(parameters, preconditioner=preconditioner)
        if top_words is not None and not (isinstance(top_words, Integral) and top_words >= 1):
            raise QueryError(
                "top_words must be a positive integer",
                expected=">= 1",
                found=repr(top_words),
                hint="or None for all words",
            )
        if synonyms is not None and not (isinstance(synonyms, Real) and 0 < synonyms <= 1):
            raise QueryError(
                "synonyms is a cosine",
                expected="in (0, 1]",
                found=repr(synonyms),
                hint="try 0.8, or None for exact words only",
            )
        if unmatched not in ("raise", "zeros"):
            raise QueryError("unknown unmatched", expected='"raise" or "zeros"', found=repr(unmatched), hint="choose")
        self._excluded = _token_ids(exclude_tokens)
        self._top_words, self._synonyms, self._unmatched = top_words, synonyms, unmatched

    def names(self, stage: Stage) -> tuple[str, ...]:
        """The embedding weights of the store."""
        if stage.projection is not None:
            raise QueryError(
                f"{type(self).__name__} matches words, and projected gradients have none",
                expected="a store of word-embedding gradients as they were captured",
                found=f"gradients projected by {stage.projection} in {stage.store.root}",
                hint="use TracIn() on this store, or fit with GradientSnapshot(store, 'word_embeddings')",
            )
        names = super().names(stage)
        embeddings = [name for name in names if len(stage.store.manifest.parameters[name].shape) == 2]
        if self._globs is None and stage.module is not None:
            words = select(stage.module, "word_embeddings").names if word_embeddings(stage.module) else ()
            embeddings = [name for name in embeddings if name in words]
        elif self._globs is None and stage.stored:  # without the model, the gradients themselves tell
            shard = next((s for at in stage.checkpoints for s in _shards(stage.store, at)), None)
            blocks = {} if shard is None else unpack(shard.tensors)
            embeddings = [name for name in embeddings if shard is None or isinstance(blocks[name], Rows)]
        if not embeddings:
            raise QueryError(
                "TracInWE needs word-embedding gradients",
                expected="an embedding weight among the captured parameters",
                found=", ".join(names),
                hint='fit with GradientSnapshot(parameters="word_embeddings")',
            )
        return tuple(embeddings)

    def sides(self, stage: Stage, names: Sequence[str]) -> tuple[Transform, Transform]:
        """Excluded tokens left out, top words kept, and on the query's side near-synonyms where asked for."""
        if self._synonyms is None:  # a word that the query lacks matches nothing: excluding it there is enough
            return self._kept, unchanged if self._top_words is None else self._kept
        final = stage.store.weights(stage.checkpoints[-1])
        neighbours = {name: Neighbours(final[name], self._synonyms) for name in names}

        def with_synonyms(gradients: Gradients) -> Gradients:
            return {name: SynonymRows.of(rows, neighbours[name]) for name, rows in self._kept(gradients).items()}

        return with_synonyms, self._kept

    def check(self, largest: Tensor, query_ids: Tensor) -> None:
        """Refuse queries that share no word with any training sample."""
        silent = query_ids[(largest == 0).cpu()].tolist()
        if silent and self._unmatched == "raise":
            raise QueryError(
                f"{len(silent)} of {len(query_ids)} queries score 0 against every training sample: "
                "no word with a gradient is shared",
                expected="at least one common word, after exclude_tokens and top_words",
                found=f"none for the queries {silent[:5]}{' and others' if len(silent) > 5 else ''}",
                hint="allow synonyms=0.8, exclude fewer tokens, or set unmatched='zeros' to score them 0; after "
                "Trainer.predict the answers to the other queries are in influence.attribution",
            )

    def _kept(self, gradients: Gradients) -> dict[str, Rows]:
        kept = {}
        for name, block in gradients.items():
            if not isinstance(block, Rows):
                raise QueryError(
                    f"'{name}' has no word-wise gradients",
                    expected="the weight of an nn.Embedding or nn.EmbeddingBag that is used for look-ups alone",
                    found=type(block).__name__,
                    hint="restrict TracInWE(parameters=...) to embedding weights, captured as 'word_embeddings'",
                )
            rows = block.without_words(self._excluded) if len(self._excluded) else block
            kept[name] = rows if self._top_words is None else rows.top_words(self._top_words)
        return kept


def _shards(store: ArtifactStore, at: Checkpoint) -> Sequence[Shard]:
    """The replayed gradients of a checkpoint; none where they were recorded in flight."""
    return store.shards(at) if any(file.step == at.step for file in store.artifacts("gradients")) else ()


def _token_ids(tokens: Collection[int] | Tensor) -> Tensor:
    """(n,) ascending int64."""
    try:
        found = list(tokens.tolist() if isinstance(tokens, Tensor) else tokens)
    except TypeError:  # a single one
        found = [tokens]
    wrong = [token for token in found if not isinstance(token, Integral)]
    if wrong or isinstance(tokens, (int, str)):
        raise QueryError(
            "exclude_tokens names tokens by their ids",
            expected="a list of integers",
            found=repr(tokens if isinstance(tokens, (int, str)) else wrong[0]),
            hint="exclude_tokens=tokenizer.convert_tokens_to_ids(['the', 'of'])",
        )
    return torch.tensor(sorted({int(token) for token in found}), dtype=torch.int64)
