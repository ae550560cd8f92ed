"""What a request says of a merge, as `merging` takes it.

Must not know: HTTP, how merges are made.
"""

from __future__ import annotations

from motet.adapters.errors import GateError
from motet.server.api.base_info import Modality
from motet.server.api.given import example_of
from motet.server.api.inputs import InputError
from motet.server.api.keys import Caller
from motet.server.api.merged import Ask, Merged
from motet.server.api.merging import Merging
from motet.server.api.schemas import MergeBody


def ask_of(body: MergeBody, takes: Modality) -> Ask:
    """The ask; equal bodies, whatever their `expires_s`, give equal ones.

    Args:
        takes: what the base does.

    Raises:
        GateError: weights are given, and what would find them too.
        InputError: an example is not what the base takes.
    """
    support = tuple(example_of(place, example, takes) for place, example in enumerate(body.support))
    if body.weights is None:
        return Ask(support, body.top_k, body.beta, body.gamma, body.seed, trim=body.trim)
    if meaningless := {"top_k", "beta", "gamma", "seed"} & body.model_fields_set:
        raise GateError(min(meaningless), f"{min(meaningless)} means nothing where weights are given; remove either")
    weights = body.weights if isinstance(body.weights, str) else tuple(body.weights)
    return Ask(support, weights=weights, trim=body.trim)


async def inline(merging: Merging, pool: str, body: MergeBody, caller: Caller) -> Merged:
    """The merge of a request that brings its support along.

    Raises:
        AdapterNotFoundError: there is no such pool.
        GateError, InputError: the merge is not possible; the field is named as it stands in the request.
        ScoringError: a step failed.
    """
    try:
        return await merging.make(pool, ask_of(body, merging.inputs.modality), body.expires_s, caller)
    except GateError as error:
        field = error.field if error.field == "model" else f"merge.{error.field}"
        raise GateError(field, str(error)) from error
    except InputError as error:
        raise InputError(f"merge.{error.field}", str(error)) from error
