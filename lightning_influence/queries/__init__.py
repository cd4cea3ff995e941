"""Queries and what is told about them: their batches and gradients, and the words and tokens that carry a score."""

from lightning_influence.queries.batches import Carried, laid_aside, num_queries, query_ids, refuse_idle_ranks
from lightning_influence.queries.gradients import QueryGradients
from lightning_influence.queries.ids import sets_of_ids, table_of_ids
from lightning_influence.queries.positions import TokenScores, token_scores
from lightning_influence.queries.words import (
    Decode,
    Decoders,
    WordContribution,
    readable,
    word_contributions,
)

__all__ = [
    "Carried",
    "Decode",
    "Decoders",
    "QueryGradients",
    "TokenScores",
    "WordContribution",
    "laid_aside",
    "num_queries",
    "query_ids",
    "readable",
    "refuse_idle_ranks",
    "sets_of_ids",
    "table_of_ids",
    "token_scores",
    "word_contributions",
]
