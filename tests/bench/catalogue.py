"""What a server says of itself: its models and its version. Knows nothing of load."""

from dataclasses import dataclass

from tests.bench.client import Endpoint, get_json


@dataclass(frozen=True)
class Served:
    """The models of a server, by name; bases are those without a parent."""

    bases: tuple[str, ...]
    adapters: tuple[str, ...]


async def served_models(endpoint: Endpoint) -> Served:
    """Reads /v1/models.

    Raises:
        OSError: the server was not reached or refused.
        ValueError: the answer is not a list of models.
    """
    document = await get_json(endpoint, "/v1/models")
    models = document.get("data") if isinstance(document, dict) else None
    if not isinstance(models, list):
        raise ValueError(f"/v1/models answered {document!r:.200}, not a list of models")
    return Served(
        bases=tuple(sorted(model["id"] for model in models if not model.get("parent"))),
        adapters=tuple(sorted(model["id"] for model in models if model.get("parent"))),
    )


async def server_version(endpoint: Endpoint) -> object:
    """What /version answers, or None: not every server has one."""
    try:
        return await get_json(endpoint, "/version")
    except (OSError, ValueError):
        return None
